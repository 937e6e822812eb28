"""The job script for SLURM, with stand-ins for `scontrol` and `srun` that know two nodes, both here: `make tools`."""

import json
import os
import subprocess
import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM

COMMANDS = {
    "scontrol": 'echo "$3"\necho another\n',
    "srun": '"$@" & first=$!\n"$@" & wait $! && wait $first\n',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
}


def test_two_nodes_train_one_adapter(examples, base, tmp_path):
    for name, script in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "rows.txt").write_text("\n\n".join(f"The value of item {n} is {n * n}." for n in range(80)))
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "41", "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--max_steps=4", "--eval_step=4", "--batch_size=4", "--cutoff_len=32", "--val_set_size=16"]
    process = subprocess.run(
        ["bash", "slurm.sh", f"--data_path={tmp_path / 'rows.txt'}", f"--output_dir={tmp_path / 'run'}", *flags],
        cwd=examples / "spikelora_finetuning",
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=590,
    )

    assert process.returncode == 0, process.stderr[-5000:]
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["peft_type"] == "SPIKELORA"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
