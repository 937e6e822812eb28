"""The backward of the fast paths by torch's own rules, where it is differentiated itself or runs for many at once."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from spikelora.method.composed import composed_gate, gradients
from spikelora.method.ops.adapter import scale_of, without_autocast


def is_composed(grad_y: Tensor) -> bool:
    """Whether a backward is that of `composed_backward`.

    It is if it is differentiated itself, as under `create_graph=True`, or if `is_grads_batched` or `torch.vmap` run it
    for many gradients at once, for which operations in place have no rule.
    """
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_batched(grad_y))


def is_batched(grad_y: Tensor) -> bool:
    """Whether it stands for many gradients."""
    return is_legacy_batchedtensor(grad_y) or is_batchedtensor(grad_y)


def composed_backward(
    grad_y: Tensor,
    need_x: bool,
    needs: Sequence[bool],
    saved: Sequence[Any],
    numbers: tuple[Any, ...],
    weight: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the input, A, B, v_threshold and tau by torch's own rules.

    `saved` begins with the input, or with `stand_in` of it if A gets no gradient.
    """
    x, known_a, mask, A, B, v_threshold, tau = saved
    surrogate_alpha, straight_through, scaling, dropout, _ = numbers

    def forward(x: Tensor | None, A: Tensor, B: Tensor, v_threshold: Tensor, tau: Tensor) -> Tensor:
        a = known_a
        if x is not None:
            dropped = (x if mask is None else x * mask.view(x.shape) * scale_of(dropout)).to(A.dtype)
            a = F.linear(dropped, A) if needs[0] else _Known.apply(dropped, A, known_a)
        gated = composed_gate(a.view(*grad_y.shape[:-1], -1), v_threshold, tau, surrogate_alpha, straight_through)
        y = (F.linear(gated, B) * scaling).to(grad_y.dtype)
        return y if weight is None or x is None else y + F.linear(x, weight.to(x.dtype))

    with without_autocast(grad_y):
        return tuple(gradients(forward, (x, A, B, v_threshold, tau), (need_x, *needs), grad_y))


def stand_in(x: Tensor) -> Tensor | None:
    """What stands for `x (..., in)` in a second backward if A is frozen: the way to it, without its memory."""
    if not x.requires_grad or torch.compiler.is_compiling():
        return None
    with torch.enable_grad():
        way: Tensor = _Way.apply(x)
        return way


class _Way(torch.autograd.Function):
    """A tensor of the shape of `x` that has one number in memory, and passes its gradient on to `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Known(torch.autograd.Function):
    """`a = x @ A.T` where `a` is known and `x` is a stand-in, by which the gradient goes through A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(A)
        return a.view(*x.shape[:-1], -1).clone()

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor) -> tuple[Tensor | None, ...]:
        (A,) = ctx.saved_tensors
        return grad_a @ A, None, None
