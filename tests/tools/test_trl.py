"""TRL's command line with the method: `make tools`."""

import json

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.fixture
def data(tmp_path):
    """A folder that `datasets` reads as one with a split `train`."""
    rows = [{"text": f"The value of item {n} is {n * n}."} for n in range(16)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def flags(base, data, output):
    return [
        *("--model_name_or_path", base, "--dataset_name", data, "--output_dir", output, "--max_steps", "3"),
        *("--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--use_cpu", "--bf16", "False"),
        *("--report_to", "none", "--max_length", "32", "--logging_steps", "1", "--dtype", "float32"),
        *("--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--lora_dropout", "0"),
    ]


def test_the_script_trains_a_spiking_adapter_with_the_flags_of_trl(environment, examples, base, data, tmp_path):
    script = examples / "tools" / "trl_spikelora.py"
    process = environment.start(script, "sft", *flags(base, data, tmp_path / "out"), "--v_threshold", "0.25")

    assert process.returncode == 0, process.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert [config[name] for name in ("peft_type", "r", "v_threshold", "task_type")] == [
        "SPIKELORA",
        4,
        0.25,
        "CAUSAL_LM",
    ]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {float(value) for name, value in tensors.items() if name.endswith("v_threshold")} == {0.25}
    assert all(value.abs().sum() > 0 for name, value in tensors.items() if "layers.0" in name and "lora_B" in name)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")


def test_the_script_refuses_what_it_cannot_do_or_does_not_know(environment, examples, base, data, tmp_path):
    script = examples / "tools" / "trl_spikelora.py"
    (tmp_path / "run.yaml").write_text("v_threshold: 0.25\nuse_dora: true\n")
    dora = environment.start(script, "sft", *flags(base, data, tmp_path / "out"), "--config", tmp_path / "run.yaml")
    assert "`use_dora` cannot be combined with SpikeLoRA" in dora.stderr

    (tmp_path / "run.yaml").write_text("v_treshold: 0.25\n")
    typo = environment.start(script, "sft", *flags(base, data, tmp_path / "out"), "--config", tmp_path / "run.yaml")
    assert "v_treshold" in typo.stderr
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_trl_s_own_command_does_not_take_the_neuron_s_flags_for_its_lora(environment, base, data, tmp_path):
    command = ["-m", "trl.cli.main", "sft", *flags(base, data, tmp_path / "out"), "--use_peft", "--v_threshold", "0.25"]
    process = environment.start(*command)

    assert process.returncode != 0, process.stdout
    assert "v_threshold" in process.stderr
    assert not (tmp_path / "out" / "adapter_config.json").exists()
