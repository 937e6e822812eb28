"""All checks and measurements that need a GPU, in one command of at most 8 minutes: `make gpu`.

Values come first: a wrong one, or a layer that does not take the kernels, ends it with status 1. Then it measures what
the speed goals are about, as far as the time goes. It needs torch, triton, transformers, PEFT and a C++ compiler, no
other package and no network. `--dry` runs it on a CPU with tiny sizes, with stand-ins for what is CUDA's alone; its
figures mean nothing.
"""

import argparse
import gc
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..check import CheckError
from .run import MODES, OutOfTime, Run, limited, versions
from .times import compiled_training, eager, host, sizes
from .values import captured, compiled, finetuning, kernels, moving

RESULTS = Path(__file__).parents[1] / "results"
SECONDS = 450  # of the 8 minutes; the rest is for imports and for the end
VALUES = (kernels, moving, compiled, captured, finetuning)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on a CPU; the tables go to a temporary folder")
    parser.add_argument("--output", type=Path, help="folder for the tables (default: benchmarks/results/<device>)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="then it stops (%(default)s)")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("There is no CUDA GPU here; `--dry` runs on a CPU.", file=sys.stderr)
        return 2
    # PEFT 0.21 uses names of checkpointing that transformers 5 deprecates.
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
    run = Run(options.dry)
    run.say(f"{run.name}, Python {platform.python_version()}, {versions()}")
    values = [(f"{step.__name__}: {step.__doc__}", step) for step in VALUES]
    left = [*values, *_times(run)]
    try:
        with limited(options.seconds):
            while left:
                name, step = left[0]
                run.say(name)
                step(run)
                del left[0]
                torch._dynamo.reset()
                gc.collect()
                run.cuda.empty_cache()
    except CheckError as error:
        print(f"A result is wrong: {error}", file=sys.stderr)
        return 1
    except OutOfTime:
        run.say("the time is over; left out: " + "; ".join(name for name, _ in left))
    folder = (Path(tempfile.gettempdir()) if options.dry else RESULTS) / re.sub(r"\W+", "_", run.name.lower())
    run.write(options.output or folder)
    if len(left) > len(_times(run)):
        print("Not all values were compared: there was no time for it.", file=sys.stderr)
        return 1
    run.say("done")
    return 0


def _times(run: Run) -> list[tuple[str, Callable[[Run], None]]]:
    """What is measured: the quick first, and for all sizes, then what has to be compiled."""
    of_size = [(f"{eager.__name__}, {size}: {eager.__doc__}", partial(eager, size=size)) for size in sizes(run)]
    of_mode = [
        (f"{compiled_training.__name__}, {size}, {mode}", partial(compiled_training, size=size, mode=mode))
        for size in sizes(run)
        for mode in MODES
    ]
    return [(f"{host.__name__}: {host.__doc__}", host), *of_size, *of_mode]


if __name__ == "__main__":
    sys.exit(main())
