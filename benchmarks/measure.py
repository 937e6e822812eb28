"""Times in interleaved rounds and their paired statistics, and the exact peak of allocated memory."""

import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds that one call takes, the mean of `repeats` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device, repeats: int = 1
) -> pd.DataFrame:
    """Seconds per call, one row per round and one column per name; each round has its own order.

    Other load on the machine slows all calls of a round alike, so ratios within a round say more than ratios of two
    medians. `attrs["busy_cores"]` says how many cores the process had while it was timed.
    """
    for call in calls.values():  # warm up
        seconds(call, device, repeats)
    order, rows, busy, wall = random.Random(0), [], 0.0, 0.0
    gc.collect()
    gc.freeze()  # collections between the rounds need not look at existing objects again
    for _ in range(rounds):
        gc.collect()
        gc.disable()
        busy, wall = busy - time.process_time(), wall - time.perf_counter()
        try:
            rows.append({name: seconds(calls[name], device, repeats) for name in order.sample(list(calls), len(calls))})
        finally:
            busy, wall = busy + time.process_time(), wall + time.perf_counter()
            gc.enable()
    gc.unfreeze()
    times = pd.DataFrame(rows, columns=list(calls))
    times.attrs["busy_cores"] = busy / wall
    return times


def repeats_for(call: Callable[[], object], device: torch.device) -> int:
    """How many calls in a row take about 5 ms, long enough for the clock and the start of a round not to matter."""
    seconds(call, device)
    return max(1, min(100, round(5e-3 / seconds(call, device))))


def spread(values: pd.Series, name: str) -> dict[str, float]:
    """Median and quartiles under the names `<name>`, `<name>_q25` and `<name>_q75`."""
    return {name: values.median(), f"{name}_q25": values.quantile(0.25), f"{name}_q75": values.quantile(0.75)}


def ratio(times: pd.DataFrame, name: str, reference: str) -> pd.Series:
    """What one method takes as a multiple of another, round by round."""
    return times[name] / times[reference]


def overhead_share(times: pd.DataFrame, name: str, base: str, reference: str) -> pd.Series:
    """What a method adds to the base as a share of what the reference adds, round by round."""
    return (times[name] - times[base]) / (times[reference] - times[base])


def overhead_is_clear(times: pd.DataFrame, base: str, reference: str) -> bool:
    """Whether the reference's overhead is clear: above 2 % of the base, and above its own interquartile range.

    If it is not, a share of it is a share of noise.
    """
    added = times[reference] - times[base]
    spread = added.quantile(0.75) - added.quantile(0.25)
    return bool(added.median() > max(0.02 * times[base].median(), spread))


class Memory(NamedTuple):
    """Bytes: `held` before the call, and `added` to them at the peak during the call."""

    held: int
    added: int

    @property
    def peak(self) -> int:
        return self.held + self.added


def peak_memory(call: Callable[[], object], tensors: Iterable[Tensor], device: torch.device) -> Memory:
    """Bytes of the given tensors, and the most that is allocated on top of them in the call, by the allocator's
    count."""
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    return Memory(held, _added_on_cuda(call, device) if device.type == "cuda" else _added_on_cpu(call))


def _added_on_cuda(call: Callable[[], object], device: torch.device) -> int:
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _added_on_cpu(call: Callable[[], object]) -> int:
    """From the allocator's own record: the system's figure for the process includes what malloc keeps for later."""
    gc.collect()
    record = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)  # or torch 2.10 warns
    with _without_stderr():
        record.start()
    call()
    with _without_stderr():
        record.stop()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what goes to stderr's file descriptor: torch's profiler logs its start and stop there at any log level."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
