"""Functions run in several processes that talk over gloo, as `torchrun` would start them.

    alone, two, four = in_processes(train, folder, 1, 2, 4)

The processes are forked from one that has imported everything, as the imports take longer than the tests.
"""

import faulthandler
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def in_processes(function: Callable[[Path], Any], folder: Path, *sizes: int) -> list[list[Any]]:
    """For each number of processes what `function(folder / str(size))`, a test module's, gives in each, as JSON."""
    what = [function.__module__, function.__name__, str(folder), *map(str, sizes)]
    command = [sys.executable, "-W", "ignore", __file__, *what]
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    settings |= {"CUDA_VISIBLE_DEVICES": ""}  # gloo is for CPUs, and a GPU that was started is lost in a fork
    # What this process finds, as a script of its own would not look in the folder that tests are started from.
    environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-6000:]
    return [[json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)] for size in sizes]


def _run(function: Callable[[Path], Any], folder: Path, size: int, rank: int, port: int) -> None:
    if size > 1:
        import torch

        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    with (folder / f"{size}-{rank}.crash").open("w") as crash:
        faulthandler.enable(crash)
        result = function(folder / str(size))
        faulthandler.disable()
    (folder / f"{size}-{rank}.json").write_text(json.dumps(result))
    if size > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first holds the store, through which others may still be finding each other


def _fork(function: Callable[[Path], Any], folder: Path, size: int, may_crash: bool = True) -> bool:
    """Whether all processes came to their end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        try:
            _run(function, folder, size, rank, port)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    ended = [os.waitpid(child, 0)[1] for child in children]
    crashes = [folder / f"{size}-{rank}.crash" for rank in range(size)]
    if may_crash and any(crashed_by_itself(crash.read_text()) for crash in crashes if crash.exists()):
        shutil.rmtree(folder / str(size), ignore_errors=True)
        return _fork(function, folder, size, may_crash=False)
    return not any(ended)


def crashed_by_itself(said: str) -> bool:
    """Whether, by `faulthandler`, a thread without Python ended a process, as gloo's own does in a malloc of its."""
    return "Segmentation fault" in said and "Current thread" not in said


if __name__ == "__main__":
    module, name, folder, *sizes = sys.argv[1:]
    function = getattr(importlib.import_module(module), name)
    sys.exit(not all(_fork(function, Path(folder), int(size)) for size in sizes))
