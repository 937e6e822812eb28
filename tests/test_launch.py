"""The example under `accelerate launch` with the configuration files beside it, on the CPU: two would need two GPUs."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from processes import crashed_by_itself
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "examples" / "spikelora_finetuning"
SCRIPT = FOLDER / "spikelora_finetuning.py"
FLAGS = ["--max_steps=4", "--cutoff_len=32", "--val_set_size=8", "--save_step=2", "--eval_step=4", "--learn_threshold"]
# The whole batch is the same, however many processes share it.
ROWS = 8
ON_THE_CPU = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# accelerate shards on accelerators only, see test_fsdp.
SHARDED_ON_CPU = f"""
import runpy, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.distributed.init_process_group("gloo")
from test_fsdp import shard_on_cpu
shard_on_cpu()
sys.argv[0] = {str(SCRIPT)!r}
sys.path.insert(0, {str(FOLDER)!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small text, by the name of its file."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n\n".join((FOLDER / "README.md").read_text().splitlines()))
    return f"--data_path={path}"


def launch(text, folder, configuration, script=SCRIPT, may_crash=True):
    """Run the example in two processes; what it printed, and what it wrote into `metrics.json`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "accelerate.commands.launch", f"--config_file={FOLDER / 'accelerate' / configuration}"]
    launcher += ["--num_processes=2", f"--main_process_port={port}"]
    command = [
        sys.executable,
        *launcher,
        str(script),
        *FLAGS,
        text,
        f"--batch_size={ROWS // 2}",
        f"--output_dir={folder}",
    ]
    environment = ON_THE_CPU | {"PYTHONFAULTHANDLER": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode and may_crash and crashed_by_itself(run.stderr):
        shutil.rmtree(folder, ignore_errors=True)
        return launch(text, folder, configuration, script, may_crash=False)
    assert run.returncode == 0, run.stderr[-6000:]
    return run.stdout, json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, str(SCRIPT), *FLAGS, text, f"--batch_size={ROWS}", f"--output_dir={folder}"]
    subprocess.run(command, check=True, capture_output=True, env=ON_THE_CPU)
    return folder, json.loads((folder / "metrics.json").read_text())


def check_run(alone, folder, printed, metrics):
    """Printed and saved once, with the figures of one process."""
    one_folder, of_one = alone
    for line in ("Model: ", "Held-out text", "the same logits to the bit", "Everything is in"):
        assert printed.count(line) == 1
    for when in ("before", "spikelora"):
        assert metrics[when]["tokens"] == of_one[when]["tokens"]
        assert metrics[when]["loss"] == pytest.approx(of_one[when]["loss"], abs=1e-4)
        assert metrics[when]["sparsity"] == pytest.approx(of_one[when]["sparsity"], abs=1e-3)
    assert metrics["spikelora"]["trainable_parameters"] == of_one["spikelora"]["trainable_parameters"]
    reports = [json.loads((path / "sparsity.json").read_text()) for path in (folder, one_folder)]
    assert reports[0]["tokens"] == reports[1]["tokens"]
    shapes = [
        {name: tensor.shape for name, tensor in load_file(path / "adapter_model.safetensors").items()}
        for path in (folder, one_folder)
    ]
    assert shapes[0] == shapes[1]
    assert not (folder / ".partial").exists()


# `make test` has test_distributed and test_fsdp, which train as these do.
@pytest.mark.slow
@pytest.mark.compatibility("Many processes", "`accelerate launch` with ddp.yaml")
def test_ddp(alone, text, tmp_path):
    check_run(alone, tmp_path, *launch(text, tmp_path, "ddp.yaml"))


@pytest.mark.slow
@pytest.mark.compatibility("Many processes", "`accelerate launch` with fsdp2.yaml", note="here over gloo, see its page")
def test_fsdp2(alone, text, tmp_path):
    script = tmp_path / "sharded_on_cpu.py"
    script.write_text(SHARDED_ON_CPU)
    folder = tmp_path / "run"
    check_run(alone, folder, *launch(text, folder, "fsdp2.yaml", script))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("deepspeed_zero3", DistributedType.DEEPSPEED),
    ],
)
def test_accelerate_reads_the_configuration(name, kind):
    configuration = load_config_from_file(str(FOLDER / "accelerate" / f"{name}.yaml"))

    assert configuration.distributed_type is kind
    assert (configuration.num_processes, configuration.mixed_precision) == (2, "no")


@pytest.mark.compatibility("Many processes", "DeepSpeed ZeRO-3")
def test_deepspeed():
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed, and needs a GPU")
    pytest.skip("nobody has run accelerate/deepspeed_zero3.yaml")
