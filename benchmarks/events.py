"""When skipping silent tokens pays on a CPU: the dense and the event-driven up-projection, each of them forced.

`spikelora.method.ops.torch_backend` chooses between them by `_MAX_FIRING` and `_MIN_ELEMENTS`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from spikelora.method.ops import torch_backend

from .check import compare
from .job import Job, Row
from .measure import interleaved, ratio, repeats_for, spread
from .one_layer import Size

DENSE, EVENTS = "dense", "event-driven"
FORCED = {DENSE: (0.0, math.inf), EVENTS: (1.0, 0)}
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SIZES = [Size(128, 1024, 8), Size(1024, 1024, 8), Size(1024, 4096, 8), Size(1024, 1024, 64)]
# From 4 thousand elements of y to half a million, with few tokens firing.
FEW_TOKENS, FEW_FIRING = (4, 16, 32, 64, 128, 512), 0.1


def jobs(device: torch.device, quick: bool) -> list[Job]:
    if device.type == "cuda":  # counting the firing tokens would wait for the device: there is no such path
        return []
    if quick:
        return [Job("events", partial(_run, "share", [Size(64, 64, 8)], (0.0, 0.5, 1.0), 3))]
    few = [Size(tokens, 1024, 8) for tokens in FEW_TOKENS]
    many = [
        Job(f"events, {s.tokens} tokens, width {s.width}, r {s.r}", partial(_run, "share", [s], SHARES, 15))
        for s in SIZES
    ]
    return [*many, Job("events, few tokens", partial(_run, "size", few, (FEW_FIRING,), 15))]


def _run(varied: str, sizes: list[Size], shares: tuple[float, ...], rounds: int) -> dict[str, list[Row]]:
    device, rows = torch.device("cpu"), []
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        y = torch.randn(size.tokens, size.width, generator=generator)
        B = torch.randn(size.width, size.r, generator=generator) * 0.02
        for share in shares:
            a = activation(size, share, generator)
            error = _check(y, a, B)
            calls = {name: _call(name, y.clone(), a, B) for name in FORCED}
            times = interleaved(calls, rounds, device, repeats_for(calls[DENSE], device))
            row = (
                {"varied": varied}
                | size._asdict()
                | {"elements": y.numel(), "firing_tokens": (a > 0).any(1).float().mean().item()}
            )
            for name in FORCED:
                row |= spread(times[name], name.replace("-", "_") + "_seconds")
            row |= spread(ratio(times, EVENTS, DENSE), "to_dense") | {"rounds": rounds, "error": error} | times.attrs
            rows.append(row | {"max_firing": torch_backend._MAX_FIRING, "min_elements": torch_backend._MIN_ELEMENTS})
    return {"events": rows}


def activation(size: Size, share: float, generator: torch.Generator) -> Tensor:
    """`a (N, r)` of which a share of the tokens, spread at random, fires with one element each."""
    a = -torch.ones(size.tokens, size.r)
    firing = torch.randperm(size.tokens, generator=generator)[: round(share * size.tokens)]
    a[firing, torch.randint(size.r, (len(firing),), generator=generator)] = 1.0
    return a


def break_even(shares: list[float], ratios: list[float]) -> float:
    """Share of firing tokens at which the ratio to dense first passes 1, interpolated between two points."""
    points = list(zip(shares, ratios, strict=True))
    if points[0][1] >= 1:
        return points[0][0]
    for (left, low), (right, high) in pairwise(points):
        if high >= 1:
            return left + (1 - low) / (high - low) * (right - left)
    return math.inf


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Force the product to be dense, without looking at the tokens, or event-driven, whatever fires."""
    before = torch_backend._MAX_FIRING, torch_backend._MIN_ELEMENTS
    torch_backend._MAX_FIRING, torch_backend._MIN_ELEMENTS = FORCED[name]
    try:
        yield
    finally:
        torch_backend._MAX_FIRING, torch_backend._MIN_ELEMENTS = before


def _call(name: str, y: Tensor, a: Tensor, B: Tensor) -> Callable[[], Tensor]:
    v_threshold, tau = torch.tensor([0.1]), torch.tensor([2.0])

    @torch.no_grad()
    def add_up() -> Tensor:
        with forced(name):
            torch_backend.add_up_(y, a, B, v_threshold, tau, 1.0)
        return y

    return add_up


def _check(y: Tensor, a: Tensor, B: Tensor) -> float:
    expected = y + torch.where(a / 2.0 >= 0.1, a, 0) @ B.T
    results = {f"{name} up-projection": _call(name, y.clone(), a, B)() for name in FORCED}
    return compare("the up-projection and its formula", results, dict.fromkeys(results, expected), y.dtype)
