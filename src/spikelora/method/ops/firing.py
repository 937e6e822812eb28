"""The gate by one number: the activations that fire are all those above the greatest one that stays silent."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
# The search looks at so many neighbours of `tau * v_threshold`, then at so many places between the two that are left.
_NEAR, _PARTS = 3, 64


class Firing(NamedTuple):
    """`silent` is the greatest `a` that stays silent. `threshold` is `tau * v_threshold`, as a tensor `()` in the dtype
    in which the neuron is charged.
    """

    silent: float
    threshold: Tensor
    tau: float


def firing(a: Tensor, v_threshold: Tensor, tau: Tensor) -> Firing | None:
    """What gates `a` by one comparison, or None where that cannot be had for nothing.

    The numbers are read in every forward, which on a CPU takes less than a microsecond, so that nothing has to be told
    when they change. On another device the reading would wait for the device, a compiler would compile for each value,
    and a number that is learned is another one at each step.
    """
    if not a.is_cpu or v_threshold.requires_grad or tau.requires_grad or torch.compiler.is_compiling():
        return None
    return _firing(v_threshold.item(), tau.item(), a.dtype)


@functools.lru_cache(maxsize=4096)
def _firing(v_threshold: float, tau: float, dtype: torch.dtype) -> Firing:
    charged = torch.float32 if dtype in _HALF else dtype
    with torch.inference_mode(False), torch.no_grad():
        return Firing(_greatest_silent(v_threshold, tau, dtype), torch.tensor(tau * v_threshold, dtype=charged), tau)


def _greatest_silent(v_threshold: float, tau: float, dtype: torch.dtype) -> float:
    """The greatest `a` of a dtype for which not `a / tau >= v_threshold`.

    The division by a positive tau is monotone in floating point, so that all above fire and all below do not. Where
    everything fires the answer is NaN, as nothing is as small.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    mask, tau_, threshold = torch.iinfo(bits).max, torch.tensor(tau), torch.tensor(v_threshold)

    # Floating-point numbers by their places in the order of all; that of 0 is 0.
    def number(place: Tensor) -> Tensor:
        return torch.where(place < 0, place ^ mask, place).view(dtype)

    def fires(places: list[int]) -> list[bool]:
        a = number(torch.tensor(places, dtype=bits))
        return ((a.float() if dtype in _HALF else a) / tau_ >= threshold).tolist()

    of_bits = torch.tensor([-math.inf, tau * v_threshold, math.inf], dtype=dtype).view(bits)
    lowest, about, highest = torch.where(of_bits < 0, of_bits ^ mask, of_bits).tolist()
    silent, firing, places = lowest - 1, highest + 1, [lowest, *range(about - _NEAR, about + _NEAR + 1), highest]
    while firing - silent > 1:
        places = [place for place in places if silent < place < firing]
        fired = fires(places)
        silent = max((place for place, f in zip(places, fired, strict=True) if not f), default=silent)
        firing = min((place for place, f in zip(places, fired, strict=True) if f), default=firing)
        step = max(1, (firing - silent) // _PARTS)
        places = list(range(silent + step, firing, step))
    return math.nan if silent < lowest else number(torch.tensor(silent, dtype=bits)).item()
