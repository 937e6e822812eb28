"""The gate for all of autograd: `torch.func`, forward-mode differentiation and a second backward.

The neuron and the fast paths have a backward of their own, which is for ordinary training only. Here the gate is
composed of torch's operations, which can be differentiated in every way and as often as asked.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is on; neither takes an autograd function of our own."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def composed_gate(
    a: Tensor,
    v_threshold: Tensor | float,
    tau: Tensor | float,
    surrogate_alpha: float,
    straight_through: bool = False,
) -> Tensor:
    """`gated = a * spikes` as in `neuron.spike_gate`, from torch's operations alone; these keep more for a backward.

    `spike(u)` is `[u >= 0]` in value and the surrogate's integral `atan(pi / 2 * alpha * u) / pi` in its derivatives. A
    straight-through estimator adds the integral of its window for `a`. The surrogate's integral is then for
    `v_threshold` and `tau` alone.
    """
    half, c = a.dtype in (torch.float16, torch.bfloat16), math.pi / 2 * surrogate_alpha
    is_finite = a.isfinite()
    finite_a = a.masked_fill(~is_finite, 0)
    charged = finite_a.float() if half else finite_a
    spikes = (a.float() if half else a) / tau >= v_threshold
    if straight_through:
        u = charged / _detached(tau) - _detached(v_threshold)
        window = torch.where(spikes, 0, torch.atan(c * u) * (_detached(tau) / c))
        by_numbers = charged.detach() * torch.atan(c * (charged.detach() / tau - v_threshold)) / math.pi
        product = finite_a * spikes + _derivative(window) + _derivative(by_numbers)
    else:
        product = finite_a * (spikes + _derivative(torch.atan(c * (charged / tau - v_threshold)) / math.pi))
    return torch.where(is_finite, product.to(a.dtype), torch.where(spikes | a.isnan(), a, 0))


def _derivative(integral: Tensor) -> Tensor:
    """A tensor that is 0 in value and has the derivatives of its argument."""
    return integral - integral.detach()


def _detached(number: Tensor | float) -> Tensor | float:
    return number.detach() if isinstance(number, Tensor) else number


def is_differentiated_again() -> bool:
    """Whether a backward that runs now has to be differentiable itself, as under `create_graph=True`."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def as_saved(number: Tensor) -> Tensor:
    """A neuron's number as a function saves it for its backward.

    DDP writes a module's buffers anew in every forward, with the same values. If two forwards come before a backward,
    autograd of torch 2.10 and 2.11 takes that for a change and raises. It does not check `data`.
    """
    return number if number.requires_grad or torch.compiler.is_compiling() else number.data


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Any], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` by the inputs that need one, differentiable if grad mode is on; else None."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # The backward is to stop at these views: one of the inputs may have been computed from another.
        inputs = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        needed = [t for t, need in zip(inputs, needs, strict=True) if need]
        output = function(*inputs)
    found = torch.autograd.grad(output, needed, grad, create_graph=create_graph, materialize_grads=True)
    of_needed = iter(found)
    return [next(of_needed) if need else None for need in needs]
