"""The example's own script on two workers of Ray Train: `make tools`."""

import json

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

pytest.importorskip("ray")


def test_two_workers_train_one_adapter(environment, examples, base, tmp_path):
    script = examples / "spikelora_finetuning" / "ray_train.py"
    flags = ["--max_steps", "4", "--eval_step", "4", "--batch_size", "4", "--cutoff_len", "32", "--val_set_size", "16"]
    (tmp_path / "rows.txt").write_text("\n\n".join(f"The value of item {n} is {n * n}." for n in range(80)))
    command = [script, "--workers", "2", "--data_path", tmp_path / "rows.txt", "--output_dir", "run", *flags]
    process = environment.start(*command, cwd=tmp_path)

    assert process.returncode == 0, process.stderr[-5000:] + process.stdout[-5000:]
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["peft_type"] == "SPIKELORA"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
    print(process.stdout[-3000:])
