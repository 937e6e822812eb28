"""One run of `make gpu`: its device, its time, and the rows of the tables that it writes."""

import csv
import datetime
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from ..check import CheckError, worst_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MODES = ("default", "reduce-overhead")  # of torch.compile


class OutOfTime(BaseException):
    """No `Exception`: torch.compile would take that for an error of its compiler."""


class NoCuda:
    """What is taken from torch.cuda, for a dry run on a CPU."""

    synchronize = empty_cache = reset_peak_memory_stats = staticmethod(lambda: None)
    memory_allocated = max_memory_allocated = staticmethod(lambda: 0)


class Run:
    """The device, and the rows of the tables."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.started = dry, time.perf_counter()
        self.device, self.cuda = (torch.device("cpu"), NoCuda) if dry else (torch.device("cuda"), torch.cuda)
        self.name = "a CPU, dry" if dry else torch.cuda.get_device_name()
        self.backend = "torch_backend" if dry else "triton_backend"  # that layers have to take
        self.tables: dict[str, list[dict[str, object]]] = {"checks": [], "times": [], "launches": [], "training": []}
        self.rounds = 2 if dry else 15

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}", flush=True)

    def check(self, what: str, errors: dict[str, float], limit: float) -> float:
        """Note the worst of some errors; one above the limit, or NaN, ends the run."""
        worst = worst_of(errors)
        self.tables["checks"].append({"what": what, "worst": worst, "error": errors[worst], "limit": limit})
        if not errors[worst] <= limit:
            raise CheckError(f"{what}: relative error {errors[worst]:.3g} of the {worst}, where {limit:g} is allowed")
        return errors[worst]

    def write(self, folder: Path) -> None:
        """One CSV file for each table, each row with device, versions and date."""
        folder.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        machine = {"device": self.name, "python": platform.python_version(), "versions": versions(), "date": date}
        for name, rows in self.tables.items():  # an empty one too, or an older run's would stay
            columns = dict.fromkeys(column for row in rows for column in row) | machine
            with (folder / f"gpu_{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(columns))
                writer.writeheader()
                writer.writerows(row | machine for row in rows)
        self.say(f"written to {folder}")


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End what runs in it with `OutOfTime` after some seconds, be it a compilation."""

    def stop(*_: object) -> None:
        raise OutOfTime

    handler = signal.signal(signal.SIGALRM, stop)
    # And again every 5 s: Python drops what is raised in a `__del__`.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # pytest has one too


def versions() -> str:
    """By the modules: the distribution of triton has other names as well."""
    names = ("torch", "triton", "transformers", "peft")
    return ", ".join(f"{name} {import_module(name).__version__ if find_spec(name) else 'none'}" for name in names)
