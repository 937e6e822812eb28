# Two commands for newcomers: `make finetune` and `make test`. Each sets up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
# One process for each core, each of one thread; a file's tests stay together, as they share what is slow to make.
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile
READY := .venv/.ready

.PHONY: finetune test quality format bench gpu study compatibility quantised versions conformance wheel clean

finetune: $(READY)  ## fine-tune the small model shipped here; more flags through ARGS="--compare_lora"
	$(BIN)/python examples/spikelora_finetuning/spikelora_finetuning.py $(ARGS)

test: $(READY)
	$(TEST)

quality: $(READY)  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## what it costs, against PEFT's LoRA; writes benchmarks/results
	$(BIN)/python -m benchmarks $(ARGS)

# For a machine with a GPU and a Python that has torch, triton, transformers and PEFT, or finds them in the folder DEPS.
gpu:  ## what has to be seen on a GPU, in 8 minutes: values, then times; ARGS=--dry runs every line on a CPU
	PYTHONPATH=src:$(DEPS) $(PYTHON) -m benchmarks.gpu $(ARGS)

study: $(READY)  ## LoRA against SpikeLoRA, reduced to a few minutes; the real studies: experiments/README.md
	$(BIN)/python -m experiments run reduced --workers 2 --results outputs/study
	$(BIN)/python -m experiments table reduced --results outputs/study
	$(BIN)/python -m experiments plot reduced --results outputs/study --output outputs/study

# Set aside, as transformers and PEFT import them wherever they are installed, which takes seconds each time. They use
# what torch and Python deprecate.
QUANTISED := build/quantised
WITH_QUANTISED = PYTHONPATH=$(QUANTISED) $(TEST) -W ignore::DeprecationWarning
OLDEST := build/oldest
NEWEST := build/newest
SET ?= oldest
ANOTHER := build/torch-$(TORCH)

$(QUANTISED)/.ready: $(READY)
	$(BIN)/python -m pip install --no-deps --target $(QUANTISED) bitsandbytes==0.50.2 torchao==0.18.0 hqq==0.2.8.post1 \
		einops==0.8.2 termcolor==3.3.0
	touch $@

compatibility: $(QUANTISED)/.ready  ## what works and what is refused; writes docs/compatibility.md from the tests' outcomes
	$(WITH_QUANTISED) -p tests.compatibility -m compatibility

quantised: $(QUANTISED)/.ready  ## the tests that need a library that quantises
	$(WITH_QUANTISED) tests/test_quantised.py tests/test_finetuning.py -k quantised

# transformers 5.17 needs a huggingface_hub below 2, and that an older client of HTTP.
$(OLDEST)/.ready: $(READY)
	$(BIN)/python -m pip install --no-deps --target $(OLDEST) peft==0.21.0 transformers==5.17.0 huggingface_hub==1.33.0 \
		certifi==2026.10.19.post1 httpcore==1.0.9 httpx==0.28.1
	touch $@

$(NEWEST)/.ready: $(READY)
	$(BIN)/python -m pip install --no-deps --target $(NEWEST) transformers==5.24.0
	touch $@

# torch brings its own triton; the interpreter of triton 3.6 fails with NumPy 2.4.
$(ANOTHER)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ANOTHER)
	grep -vE '^(torch|triton|numpy)==' constraints.txt > $(ANOTHER)/constraints.txt
	printf 'torch==%s\nnumpy<2.4\n' $(TORCH) >> $(ANOTHER)/constraints.txt
	$(ANOTHER)/bin/python -m pip install -c $(ANOTHER)/constraints.txt torch
	$(ANOTHER)/bin/python -m pip install -c $(ANOTHER)/constraints.txt -e '.[example,experiments,report,dev]'
	$(ANOTHER)/bin/python -m pip install -c $(ANOTHER)/constraints.txt --no-deps spikingjelly
	touch $@

# All tests with the oldest PEFT and transformers, with the newest transformers (SET=newest), or with another torch
# (TORCH=2.10.0 PYTHON=python3.13).
versions: BIN := $(if $(TORCH),$(ANOTHER)/bin,.venv/bin)
versions: $(if $(TORCH),$(ANOTHER),build/$(SET))/.ready  ## all tests with other versions; writes docs/versions.json
	$(if $(TORCH),,PYTHONPATH=build/$(SET)) $(TEST) -p tests.compatibility

conformance: $(READY)  ## PEFT's own tests with SpikeLoRA in LoRA's place; writes docs/conformance.md
	$(BIN)/python -m tests.conformance $(ARGS)

wheel: $(READY)
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist outputs

# torch goes first and by itself, and is looked at again at the end: a dependency with a looser range may replace it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[example,experiments,report,dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps spikingjelly "triton; sys_platform == 'linux'"
	$(BIN)/python -c 'import torch; v = torch.__version__; assert v.startswith("2.13.0"), f"torch was replaced by {v}"'
	touch $(READY)
