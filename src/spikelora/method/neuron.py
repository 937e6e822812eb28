"""The neuron of SpikeLoRA in plain torch, one LIF charge step from rest: the reference for every faster path.

Source: de Jong, Bosman, Schreuder, "SpikeLoRA", 2025. `v_threshold` and `tau` may be any tensors that broadcast.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spikelora.method.composed import as_saved, composed_gate, gradients, is_differentiated_again, is_transformed


def charge(a: Tensor, tau: Tensor | float) -> Tensor:
    """Membrane potential after one step from rest: `v = a / tau`, from `v_rest + (a - (v_rest - v_reset)) / tau`.

    Shaped like `a`. It is float32 if `a` is float16 or bfloat16, so that no spike depends on their rounding.
    """
    return (a.float() if a.dtype in (torch.float16, torch.bfloat16) else a) / tau


def atan_surrogate(u: Tensor, surrogate_alpha: float) -> Tensor:
    """Surrogate derivative of the spike at `u = v - v_threshold`, with `alpha = surrogate_alpha` > 0.

    `s'(u) = (alpha / 2) / (1 + (pi / 2 * alpha * u) ** 2)`, shaped like `u`.
    """
    return (surrogate_alpha / 2) / (1 + (math.pi / 2 * surrogate_alpha * u) ** 2)


def straight_through_window(u: Tensor, surrogate_alpha: float) -> Tensor:
    """Share of a gradient that passes a silent neuron at `u = v - v_threshold` < 0, with `alpha = surrogate_alpha` > 0.

    `w(u) = 1 / (1 + (pi / 2 * alpha * u) ** 2)`, shaped like `u`: 1 at the threshold, with the shape of `s'`.
    """
    return 1 / (1 + (math.pi / 2 * surrogate_alpha * u) ** 2)


def spike_gate(
    a: Tensor,
    v_threshold: Tensor | float,
    tau: Tensor | float,
    surrogate_alpha: float,
    straight_through: bool = False,
) -> Tensor:
    """Gate a low-rank activation by its own spikes: `gated = a * spikes`, `spikes = a / tau >= v_threshold`.

    It fires at equality. The backward uses the ATan surrogate as the derivative of the spike, with
    `u = v - v_threshold`:

        d gated / d a           = spikes + a * s'(u) / tau
        d gated / d v_threshold = -a * s'(u)
        d gated / d tau         = -a * s'(u) * a / tau ** 2

    For a < 0 the second term of the first line has the wrong sign: it moves `a` down where more of it is wanted.
    `straight_through` replaces the first line by a straight-through estimator (Bengio et al., arXiv 1308.3432), in a
    window below the threshold:

        d gated / d a           = spikes + (1 - spikes) * w(u)

    Higher derivatives are those of `a * spike(u)`, with `s'` as the derivative of `spike` each time. With
    `straight_through` each line is differentiated by its own variable alone.

    Args:
        a: low-rank activation `(..., r)`, dimensionless.
        v_threshold: firing threshold in the units of `v`.
        tau: membrane time constant in steps, > 1.
        surrogate_alpha: sharpness of the surrogate and of the window, > 0; the larger, the narrower.
        straight_through: whether `a` gets the gradient of the straight-through estimator.

    Returns:
        `gated (..., r)` in the dtype of `a`: graded values, not bits.
    """
    gate = composed_gate if is_transformed() else _SpikeGate.apply
    gated: Tensor = gate(a, v_threshold, tau, surrogate_alpha, straight_through)
    return gated


class _SpikeGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, v_threshold: Tensor, tau: Tensor, surrogate_alpha: float, straight_through: bool
    ) -> Tensor:
        ctx.surrogate_alpha, ctx.straight_through = surrogate_alpha, straight_through
        ctx.numbers = [None if isinstance(t, Tensor) else t for t in (v_threshold, tau)]
        ctx.save_for_backward(a, *(as_saved(t) if isinstance(t, Tensor) else None for t in (v_threshold, tau)))
        spikes = charge(a, tau) >= v_threshold
        # Selected, not multiplied: -inf * 0 would be NaN. A NaN of `a` itself stays visible.
        return torch.where(spikes | a.isnan(), a, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, *tensors = ctx.saved_tensors
        v_threshold, tau = (t if n is None else n for t, n in zip(tensors, ctx.numbers, strict=True))
        if is_differentiated_again():
            gate = partial(composed_gate, surrogate_alpha=ctx.surrogate_alpha, straight_through=ctx.straight_through)
            return *gradients(gate, (a, v_threshold, tau), ctx.needs_input_grad[:3], grad), None, None
        v = charge(a, tau)
        spikes = v >= v_threshold
        # As a goes to infinity, a * s'(u) goes to 0; computed as inf * 0 it would be NaN.
        finite_a = a.to(v.dtype).masked_fill(a.isinf(), 0)
        grad_v = grad * finite_a * atan_surrogate(v - v_threshold, ctx.surrogate_alpha)
        grad_a = grad_v_threshold = grad_tau = None
        if ctx.needs_input_grad[0]:
            if ctx.straight_through:
                window = straight_through_window(v - v_threshold, ctx.surrogate_alpha)
                grad_a = (grad * torch.where(spikes, 1, window)).to(a.dtype)
            else:
                grad_a = (grad * spikes + grad_v / tau).to(a.dtype)
        if ctx.needs_input_grad[1]:
            grad_v_threshold = -grad_v.sum_to_size(v_threshold.shape).to(v_threshold.dtype)
        if ctx.needs_input_grad[2]:
            grad_tau = -(grad_v * finite_a / tau**2).sum_to_size(tau.shape).to(tau.dtype)
        return grad_a, grad_v_threshold, grad_tau, None, None
