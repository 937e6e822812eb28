"""The README's quick start, as its authors present the method: TRL, bfloat16, `device_map="auto"`, a fresh process."""

import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt2, tiny_opt
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import spikelora  # registers the method with PEFT, and so comes first

# isort: split
from peft import PeftModel, SpikeLoraConfig, get_peft_model

EMBEDDED_MODEL = Path(__file__).parents[1] / "examples" / "spikelora_finetuning" / "model"

FRESH_PROCESS = """
import sys
import spikelora
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, expected = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map="auto")
model = PeftModel.from_pretrained(model, adapter).eval()
saved = torch.load(expected)
with torch.no_grad():
    assert torch.equal(model(saved["tokens"].to(model.device)).logits.cpu(), saved["logits"])
"""


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning")
@pytest.mark.parametrize("make_base", [tiny_opt, tiny_gpt2])
def test_quick_start(make_base, tmp_path, fresh, device):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    base = make_base()
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(tmp_path / "base")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16, device_map="auto")
    config = SpikeLoraConfig(v_threshold=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_length=32,
            max_steps=3,
            learning_rate=1e-2,
            report_to="none",
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"text": ["The neuron fires at equality.", "def gate(a): return a"] * 8}),
        processing_class=tokenizer,
    )
    assert model.device.type == device.type
    trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("lora_B" in name for name in moved)
    assert not any("lora_gate" in name or "base_layer" in name for name in moved)

    trainer.model.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(3, 31).view(2, 14)
    with torch.no_grad():
        logits = trainer.model.eval()(tokens.to(device)).logits
    torch.save({"tokens": tokens, "logits": logits.cpu()}, tmp_path / "expected.pt")
    files = [tmp_path / "base", tmp_path / "adapter", tmp_path / "expected.pt"]
    run = fresh(FRESH_PROCESS, *files)
    assert run.returncode == 0, run.stderr


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning")
def test_the_readme_s_code_runs(tmp_path, monkeypatch, device):
    """On CUDA as it stands, trained under autocast in bfloat16; elsewhere with what the README adds on a CPU."""
    base = tiny_opt()
    base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(EMBEDDED_MODEL)))
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(tmp_path / "base")
    (code,) = re.findall(r"```python\n(.*?)```", (EMBEDDED_MODEL.parents[2] / "README.md").read_text(), re.DOTALL)
    assert "# on a CPU: use_cpu=True, bf16=False" in code
    added = {"cpu": ", use_cpu=True, bf16=False", "cuda": ""}.get(device.type, ", bf16=False")
    for downloaded, local in {
        '"facebook/opt-350m"': repr(str(tmp_path / "base")),
        'load_dataset("stanfordnlp/imdb", split="train")': "rows",
        "learning_rate=3e-4)": f'learning_rate=3e-4, max_length=32, max_steps=2, report_to="none"{added})',
    }.items():
        assert downloaded in code
        code = code.replace(downloaded, local)
    monkeypatch.chdir(tmp_path)
    names = {"rows": Dataset.from_dict({"text": ["The neuron fires at equality."] * 8})}
    exec(code, names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16, device_map="auto")
    loaded = PeftModel.from_pretrained(loaded, "my-adapter").eval()
    tokens = torch.arange(3, 31).view(2, 14).to(device)
    # Where the trainer trained under autocast, it has put that into the model's own forward.
    trained = names["trainer"].accelerator.unwrap_model(names["model"], keep_fp32_wrapper=False).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, trained(tokens).logits)
    batches = [{"input_ids": tokens}]
    spikelora.calibrate_thresholds(names["model"], batches, target_sparsity=0.9)  # at 0.1 some modules never fire
    names["trainer"].add_callback(spikelora.SparsityCallback(names["trainer"]))
    names["trainer"].train()
    spikelora.calibrate_thresholds(names["model"], batches, target_sparsity=0.9)
    with spikelora.SparsityMeter(names["model"]) as meter:
        names["model"](**batches[0])
    assert meter.report().sparsity == pytest.approx(0.9, abs=0.05)


def test_dpo_reference_gates_as_the_trained_adapter_did(tmp_path):
    """TRL copies a trained adapter by its parameters: it would miss buffers, and makes fixed parameters trainable."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.bfloat16)
    model = get_peft_model(base, SpikeLoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "v_threshold" in name:
            parameter.data.fill_(0.3)  # other than the configuration has it
    tokens = torch.arange(3, 31).view(2, 14)
    with torch.no_grad():
        expected = model.eval()(tokens).logits
    rows = {"prompt": ["The neuron"] * 4, "chosen": [" fires at equality."] * 4, "rejected": [" is silent."] * 4}
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    model.eval().set_adapter("ref")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_gate" in name)
