"""What `import spikelora` takes beyond `import peft`, in fresh processes."""

import subprocess
import sys
from functools import partial

import pandas as pd
import torch

from .job import Job, Row
from .measure import spread

# Both are timed within their process, so that the interpreter's own start does not blur the difference.
CODE = """
import time
start = time.perf_counter()
import {first}
middle = time.perf_counter()
import spikelora
print(middle - start, time.perf_counter() - middle)
"""
PEFT, SPIKELORA, DIFFERENCE, AFTER = "import peft", "import spikelora", "difference", "import spikelora after peft"


def jobs(device: torch.device, quick: bool) -> list[Job]:
    return [Job("import time", partial(_run, 1 if quick else 6))]


def _run(rounds: int) -> dict[str, list[Row]]:
    measured = []
    for k in range(rounds):
        order = ("peft", "spikelora") if k % 2 else ("spikelora", "peft")
        both = {module: _import(module) for module in order}
        measured.append({PEFT: both["peft"][0], SPIKELORA: both["spikelora"][0], AFTER: both["peft"][1]})
    # The first may have to write bytecode, and does not count if there are others.
    times = pd.DataFrame(measured[1:] or measured)
    times[DIFFERENCE] = times[SPIKELORA] - times[PEFT]
    return {"import_time": [{"what": n, "rounds": len(times)} | spread(times[n] * 1e3, "milliseconds") for n in times]}


def _import(first: str) -> tuple[float, float]:
    """Seconds of the first import, and of `import spikelora` after it."""
    output = subprocess.run(
        [sys.executable, "-c", CODE.format(first=first)], check=True, capture_output=True, text=True
    ).stdout
    first_seconds, second_seconds = map(float, output.split())
    return first_seconds, second_seconds
