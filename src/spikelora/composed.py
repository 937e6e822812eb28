"""The gate for all of autograd: `torch.func`, forward-mode differentiation and a second backward.

The neuron and the fast paths have a backward of their own for an ordinary training, which takes part in none of these.
Here the gate is composed of torch's operations, which differentiate in every way and as often as asked.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is on, which take no function of our own."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def composed_gate(a: Tensor, v_threshold: Tensor | float, tau: Tensor | float, surrogate_alpha: float) -> Tensor:
    """`gated = a * spikes` by operations of torch alone, as `neuron.spike_gate` has it; they keep more for a backward.

    `spike(u)` is `[u >= 0]` in value and the surrogate's integral `atan(pi / 2 * alpha * u) / pi` in its derivatives.
    """
    v = (a.float() if a.dtype in (torch.float16, torch.bfloat16) else a) / tau
    spikes = v >= v_threshold
    integral = torch.atan(math.pi / 2 * surrogate_alpha * (v - v_threshold)) / math.pi
    spike = spikes + (integral - integral.detach())
    is_finite = a.isfinite()
    product = (a.masked_fill(~is_finite, 0) * spike).to(a.dtype)
    return torch.where(is_finite, product, torch.where(spikes | a.isnan(), a, 0))


def is_differentiated_again() -> bool:
    """Whether a backward that runs now has to be differentiable itself, as under `create_graph=True`."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients(output: Tensor, inputs: Sequence, needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """The gradients of `output` by those inputs that need one, differentiable themselves; None for the others."""
    needed = [t for t, need in zip(inputs, needs, strict=False) if need]
    found = iter(torch.autograd.grad(output, needed, grad, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for _, need in zip(inputs, needs, strict=False)]
