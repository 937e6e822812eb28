"""The gate as one comparison: an activation fires if it is above the greatest one that stays silent."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_SQUARED = {torch.float32: 1e18, torch.float64: 1e150}  # the square of which is finite
# The search tries this many neighbours of `tau * v_threshold`, then this many places between the two that are left.
_NEAR, _PARTS = 3, 64


_LARGE = 1e6  # above this, the squares of the closed form lose too much precision


class Firing(NamedTuple):
    """`silent` is the greatest `a` that stays silent. `threshold` is `tau * v_threshold`, as a tensor `()` in the dtype
    in which the neuron is charged; `silent_` is `silent` as such a tensor.
    """

    silent: float
    silent_: Tensor
    threshold: Tensor
    tau: float


def firing(a: Tensor, v_threshold: Tensor, tau: Tensor) -> Firing | None:
    """What gates `a` by one comparison, or None if finding it would cost too much.

    The numbers are read in every forward, so a change is never missed; on a CPU that takes less than a microsecond. On
    another device the reading would wait for the device, a compiler would compile for each value, and a learned number
    changes at each step.
    """
    if not a.is_cpu or v_threshold.requires_grad or tau.requires_grad or torch.compiler.is_compiling():
        return None
    return _firing(v_threshold.item(), tau.item(), a.dtype)


@functools.lru_cache(maxsize=4096)
def _firing(v_threshold: float, tau: float, dtype: torch.dtype) -> Firing:
    charged = torch.float32 if dtype in _HALF else dtype
    with torch.inference_mode(False), torch.no_grad():
        silent = _greatest_silent(v_threshold, tau, dtype)
        return Firing(silent, scalar(silent, charged), scalar(tau * v_threshold, charged), tau)


def has_closed_form(number: Firing, surrogate_alpha: float) -> bool:
    """Whether `gate_backward` is exact enough with these numbers; with NaN for `silent` it is not."""
    return abs(number.silent) < _LARGE and 1 / _LARGE < surrogate_alpha < _LARGE


def gate_backward(g: Tensor, a: Tensor, number: Firing, surrogate_alpha: float, straight_through: bool) -> Tensor:
    """`grad_a` of `torch_backend.up_backward`, from the distance between `a` and the point where the neuron fires.

    With `d = a - tau * v_threshold` and `c = pi / 2 * alpha`:

        a * s'(u) / tau = a / (2 * tau / alpha + d ** 2 * 2 * c ** 2 / (alpha * tau))
        w(u)            = 1 / (1 + d ** 2 * (c / tau) ** 2)
    """
    c, dtype, (_, silent, threshold, tau) = math.pi / 2 * surrogate_alpha, a.dtype, number
    charged = threshold.dtype
    if dtype is not charged:
        a, g = a.to(charged), g.to(charged)
    # At such a distance the surrogate is negligible; the square of an infinite one would give NaN.
    limit = _SQUARED[charged]
    finite_a = a.clamp(-limit, limit)
    difference, fires = torch.sub(finite_a, threshold), torch.gt(a, silent)
    # With few tokens the time goes into fetching torch's code from memory, and some operations have much of it. With
    # `addcdiv_` and `where` in place of the last three, a training with one token took 170 us for 155 at width 64, and
    # LoRA's 122. Comparing with a Python number takes 4 us more than with a tensor, a call through `torch.ops` 20.
    if straight_through:
        distance = torch.addcmul(scalar(1.0, charged), difference, difference, value=(c / tau) ** 2)
        grad_a = torch.where(fires, g, torch.div(g, distance))
    else:
        nearest = scalar(2 * tau / surrogate_alpha, charged)
        distance = torch.addcmul(nearest, difference, difference, value=2 * c**2 / (surrogate_alpha * tau))
        grad_a = torch.div(finite_a, distance).add_(fires).mul_(g)
    return grad_a if dtype is charged else grad_a.to(dtype)


@functools.lru_cache(maxsize=4096)
def scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A tensor `()`, which an operation takes faster than a Python number."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")  # whatever the default device is


def _greatest_silent(v_threshold: float, tau: float, dtype: torch.dtype) -> float:
    """The greatest `a` of a dtype that stays silent: `a / tau >= v_threshold` is false.

    The division by a positive tau is monotone in floating point, so all above fire and all below do not. If everything
    fires the answer is NaN: no `a <= NaN` is true.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    mask, (tau_, threshold) = torch.iinfo(bits).max, (scalar(value, torch.float32) for value in (tau, v_threshold))

    # Each floating-point number by its place in their order; the place of 0 is 0.
    def number(place: Tensor) -> Tensor:
        return torch.where(place < 0, place ^ mask, place).view(dtype)

    def fires(places: list[int]) -> list[bool]:
        a = number(torch.tensor(places, dtype=bits, device="cpu"))
        return ((a.float() if dtype in _HALF else a) / tau_ >= threshold).tolist()

    of_bits = torch.tensor([-math.inf, tau * v_threshold, math.inf], dtype=dtype, device="cpu").view(bits)
    lowest, about, highest = torch.where(of_bits < 0, of_bits ^ mask, of_bits).tolist()
    silent, firing, places = lowest - 1, highest + 1, [lowest, *range(about - _NEAR, about + _NEAR + 1), highest]
    while firing - silent > 1:
        places = [place for place in places if silent < place < firing]
        fired = fires(places)
        silent = max((place for place, f in zip(places, fired, strict=True) if not f), default=silent)
        firing = min((place for place, f in zip(places, fired, strict=True) if f), default=firing)
        step = max(1, (firing - silent) // _PARTS)
        places = list(range(silent + step, firing, step))
    return math.nan if silent < lowest else number(torch.tensor(silent, dtype=bits, device="cpu")).item()
