"""axolotl's commands with the plugin of examples/tools: `make axolotl`."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("axolotl")


@pytest.fixture
def axolotl(environment, examples, base, tmp_path, monkeypatch):
    """Runs one of axolotl's commands with a file of these keys; returns the process and the folder of its output."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    shutil.copy(examples / "tools" / "axolotl_spikelora.py", tmp_path)  # found there, as the commands are run there
    rows = [{"text": f"The value of item {n} is {n * n}. " * 3} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*command, **keys):
        settings = {
            "base_model": str(base),
            "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": "completion", "field": "text"}],
            "dataset_prepared_path": "prepared",
            "dataset_num_proc": 1,
            "plugins": ["axolotl_spikelora.SpikeLoraPlugin"],
            **{"adapter": "spikelora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]},
            **{"sequence_len": 32, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 3},
            **{"optimizer": "adamw_torch", "learning_rate": 0.01, "seed": 1, "logging_steps": 1},
            **{"bf16": False, "fp16": False, "tf32": False, "output_dir": "out"},
        }
        (tmp_path / "run.yaml").write_text(yaml.dump(settings | keys))
        process = environment.start("-m", "axolotl.cli.main", *command, cwd=tmp_path)
        return process, tmp_path / settings["output_dir"]

    return run


TRAIN = ("train", "run.yaml", "--launcher", "python")


def trained(axolotl, **keys):
    """What a training saves."""
    process, folder = axolotl(*TRAIN, **keys)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def test_the_command_trains_a_spiking_adapter_with_axolotl_s_keys(axolotl, base, tmp_path):
    config, tensors = trained(axolotl, spikelora={"v_threshold": 0.25})

    assert [config[name] for name in ("peft_type", "r", "lora_alpha", "v_threshold", "task_type")] == [
        "SPIKELORA",
        4,
        8,
        0.25,
        "CAUSAL_LM",
    ]
    assert {float(value) for name, value in tensors.items() if name.endswith("v_threshold")} == {0.25}
    assert all(value.abs().sum() > 0 for name, value in tensors.items() if "layers.0" in name and "lora_B" in name)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
        gated = model(ids).logits
        assert not torch.equal(gated, before)
        for module in model.modules():
            if type(module).__name__ == "SpikeGate":
                module.v_threshold.fill_(1e30)
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_an_adapter_whose_gates_are_always_open_learns_what_axolotl_s_lora_does(axolotl):
    _, spiking = trained(axolotl, spikelora={"v_threshold": -1e30})
    kernels = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False)
    config, plain = trained(axolotl, adapter="lora", **kernels)

    assert config["peft_type"] == "LORA"
    assert any(value.abs().sum() > 0 for name, value in plain.items() if "lora_B" in name)
    assert {name for name in spiking if ".lora_gate." not in name} == set(plain)
    for name, value in plain.items():
        torch.testing.assert_close(spiking[name], value, rtol=1e-4, atol=1e-6)


def test_a_target_is_held_and_a_saved_adapter_trained_further(axolotl, tmp_path):
    neuron = {"v_threshold": 1e9, "target_sparsity": 0.9, "target_tolerance": 0.5}
    config, tensors = trained(axolotl, spikelora=neuron)

    assert config["target_sparsity"] == 0.9
    thresholds = [float(value) for name, value in tensors.items() if name.endswith("v_threshold")]
    assert max(thresholds) < 100  # from where nothing would fire they came down to the activations
    saved = (tmp_path / "out").rename(tmp_path / "saved")
    again, further = trained(axolotl, lora_model_dir=str(saved))
    assert again["target_sparsity"] == 0.9  # the saved adapter's, and none is in the file
    assert any(not torch.equal(further[name], tensors[name]) for name in tensors if "lora_B" in name)
    assert any(not torch.equal(further[name], tensors[name]) for name in tensors if name.endswith("v_threshold"))


def test_merging_is_refused_by_the_command(axolotl, adapter, tmp_path):
    process, _ = axolotl("merge-lora", "run.yaml", f"--lora-model-dir={adapter}")

    assert process.returncode != 0, process.stdout
    assert "`merge_lora` cannot be combined with `adapter: spikelora`" in process.stderr
    assert not (tmp_path / "out" / "merged").exists()


def test_without_the_plugin_merging_is_no_lora_s(axolotl, adapter, tmp_path):
    process, _ = axolotl("merge-lora", "run.yaml", f"--lora-model-dir={adapter}", adapter="lora", plugins=[])

    assert process.returncode != 0, process.stdout
    assert "reads it as LoRA, without its gate" in process.stderr
    assert not list((tmp_path / "out").glob("merged/*.safetensors"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"load_in_4bit": True}, "`load_in_4bit` cannot be combined"),
        ({"lora_qkv_kernel": True}, "`lora_qkv_kernel` cannot be combined"),
        ({"fsdp_config": {"reshard_after_forward": True}}, "`fsdp_config` cannot be combined"),
        ({"spikelora": {"v_treshold": 0.1}}, "unexpected keyword argument 'v_treshold'"),
        ({"spikelora": {"tau": 0.5}}, "`tau` must be greater than 1"),
        ({"adapter": "lora", "spikelora": {"tau": 3.0}}, "`adapter: lora` has none"),
        ({"peft_use_dora": True}, "`use_dora` cannot be combined with SpikeLoRA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_pass_the_gate_by_is_refused(axolotl, keys, message):
    process, folder = axolotl(*TRAIN, **keys)

    assert process.returncode != 0, process.stdout
    assert message in process.stderr
    assert not (folder / "adapter_config.json").exists()
