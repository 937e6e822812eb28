"""What one layer costs the host: how many kernels it launches, and how long Python and torch take to launch them.

If the GPU has little to do, this is the time of a step. A GPU's launches are also counted without a GPU: the layer runs
on the CPU through the code for a GPU, with kernels that start nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spikelora.method.ops import frozen, linear

from .job import Job, Row
from .measure import interleaved, overhead_share, ratio, spread
from .models import BASE, LORA
from .one_layer import layers

# Few and small, so that there is little but the host's time.
TOKENS, WIDTH, R = 1, 64, 8
INFERENCE, FORWARD, STEP = "inference", "forward of a training", "forward and backward"
CPU, KERNELS = "torch on a CPU", "kernels of a GPU, not started"
# The usual training, and what else trainings have; the first alone is also counted for torch on a CPU.
USUAL, AUTOCAST = "usual", "bfloat16 autocast"
OTHERS: dict[str, dict[str, Any]] = {"dropout": {"lora_dropout": 0.05}, "learned threshold": {"learn_threshold": True}}
KINDS = (USUAL, AUTOCAST, *OTHERS)
# These launch nothing: memory, and one number that a CPU reads.
_NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense", "_unsafe_view", "detach"}


def jobs(device: torch.device, quick: bool) -> list[Job]:
    if device.type == "cuda":  # its table is of the CPU; there whole models are timed, and `make gpu` counts launches
        return []
    rounds = 3 if quick else 41
    return [
        Job(f"host, {way}, {dtype}, {kind}", partial(_run, way, dtype, kind, rounds))
        for way, kinds in ((CPU, (USUAL,)), (KERNELS, KINDS))
        for kind in kinds
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _run(way: str, dtype: torch.dtype, kind: str, rounds: int) -> dict[str, list[Row]]:
    rows, threads = [], torch.get_num_threads()
    launched = launches(way, dtype, kind)
    torch.set_num_threads(1)  # others would only wait for each other
    with as_on(way):
        for quantity, calls in calls_of(dtype, kind).items():
            times = interleaved(calls, rounds, torch.device("cpu"), 100)
            for name in times.columns:
                row = {"way": way, "dtype": str(dtype).removeprefix("torch."), "kind": kind, "quantity": quantity}
                row |= {"method": name}
                row |= {"launches": launched[quantity][name], "rounds": rounds} | spread(times[name], "seconds")
                row |= spread(ratio(times, name, LORA), "to_lora")
                rows.append(row | spread(overhead_share(times, name, BASE, LORA), "overhead_share") | times.attrs)
    torch.set_num_threads(threads)
    return {"host": rows}


def calls_of(dtype: torch.dtype, kind: str = USUAL) -> dict[str, dict[str, Callable[[], object]]]:
    """The calls that are measured, by quantity and method."""
    built = layers(WIDTH, R, dtype, torch.device("cpu"), **OTHERS.get(kind, {}))
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    around, of_y = (partial(torch.autocast, "cpu"), torch.bfloat16) if kind == AUTOCAST else (nullcontext, dtype)
    leaf, grad_y = x.clone().requires_grad_(), torch.ones_like(x, dtype=of_y)
    makers = {
        INFERENCE: lambda layer: torch.no_grad()(partial(_forward, layer, x, around)),
        FORWARD: lambda layer: partial(_forward, layer, leaf, around),
        STEP: lambda layer: partial(_step, layer, leaf, around, grad_y, [leaf, *layer.parameters()]),
    }
    return {quantity: {name: make(layer) for name, layer in built.items()} for quantity, make in makers.items()}


def _forward(layer: nn.Module, x: Tensor, around: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    with around():
        return layer(x)


def _step(
    layer: nn.Module, x: Tensor, around: Callable[[], AbstractContextManager[Any]], grad_y: Tensor, leaves: list[Tensor]
) -> None:
    _forward(layer, x, around).backward(grad_y)
    for leaf in leaves:
        leaf.grad = None


def launches(way: str, dtype: torch.dtype, kind: str = USUAL) -> dict[str, dict[str, int]]:
    """Number of kernels that a call launches, by quantity and method."""
    counted: dict[str, dict[str, int]] = {}
    with as_on(way) as started:
        for quantity, calls in calls_of(dtype, kind).items():
            for name, call in calls.items():
                call()
                started.clear()
                with _Operations() as operations:
                    call()
                counted.setdefault(quantity, {})[name] = operations.count + len(started)
    return counted


class _Operations(TorchDispatchMode):
    """Counts torch's operations that launch a kernel on a GPU: those that are not views and compute something."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and func.overloadpacket.__name__ not in _NO_LAUNCH:
            self.count += 1
        return func(*args, **kwargs or {})


@contextmanager
def as_on(way: str) -> Iterator[list[None]]:
    """Run layers as on a GPU, up to the call that would start a kernel; yields a list with an item for each such
    call."""
    started: list[None] = []
    with _not_started(started) if way == KERNELS else nullcontext():
        yield started


@contextmanager
def _not_started(started: list[None]) -> Iterator[None]:
    from spikelora.method.ops import triton_backend  # needs triton, which torch for CPUs does not bring

    class Kept(dict):
        def get(self, key: tuple) -> tuple:
            # The arguments are not kept: that would cost time in allocations and garbage collections.
            return lambda *args: started.append(None), None, None, None

    changed = {
        (linear, "_backend"): lambda y, A: triton_backend,
        (linear, "firing_of_few"): lambda x, adapter: None,  # it is for a CPU
        (frozen, "_is_slow"): lambda grad_y: False,
        (triton_backend, "_compiled"): Kept(),
        (triton_backend, "driver"): SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 0)),
    }
    before = {place: getattr(*place) for place in changed}
    try:
        for place, value in changed.items():
            setattr(*place, value)
        yield
    finally:
        for place, value in before.items():
            setattr(*place, value)
