"""The training of a gated linear layer with few tokens, where Python is what costs most.

`linear.py` has one function for every case. With few tokens each line of Python costs as much as an operation, as its
code and torch's come from memory again. At r 8 in float32 on one core of a Xeon with AMX, a training with one token
takes 1.23 times LoRA's time here and 1.42 there at width 64, 1.01 and 1.08 at 1024; at 128 tokens they are even.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelora.method.composed import as_saved, is_differentiated_again
from spikelora.method.ops.adapter import Adapter, as_new, is_autocast, tokens_of, without_autocast
from spikelora.method.ops.firing import Firing, firing, gate_backward, has_closed_form
from spikelora.method.ops.second_backward import composed_backward

_MAX_TOKENS = 128


def firing_of_few(x: Tensor, weight: Tensor, adapter: Adapter) -> Firing | None:
    """What gates the activations of `x (..., in)`, or None if there are many or the function here does not apply."""
    A, _, v_threshold, tau, surrogate_alpha, _, _, dropout, observers = adapter
    # A compiler comes first: it would compile anew for more tokens.
    if torch.compiler.is_compiling() or dropout or observers or x.numel() > _MAX_TOKENS * x.shape[-1]:
        return None
    if not x.dtype is weight.dtype is A.dtype is torch.float32:
        return None
    number = firing(x, v_threshold, tau)
    return number if number is not None and has_closed_form(number, surrogate_alpha) else None


def linear_of_few(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter, number: Firing) -> Tensor:
    """`y = x @ weight.T + bias + scaling * gated @ B.T` as `linear.spike_linear`, with `number` of `firing_of_few`."""
    y: Tensor = _LinearOfFew.apply(x, weight, bias, adapter.A, adapter.B, adapter, number)
    return y


class _LinearOfFew(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        adapter: Adapter,
        number: Firing,
    ) -> Tensor:
        tokens = x if x.dim() == 2 else tokens_of(x)
        y, a = F.linear(tokens, weight, bias), F.linear(tokens, A)
        y.addmm_(torch.threshold(a, number.silent, 0.0), B.t(), alpha=adapter.scaling)
        ctx.adapter, ctx.number = adapter, number
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, a, A, B, weight)
        return y if tokens is x else as_new(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (x, a, A, B, weight), adapter = ctx.saved_tensors, ctx.adapter
        need_x, _, need_bias, need_A, need_B, _, _ = ctx.needs_input_grad
        tokens = grad_y if grad_y.dim() == 2 else tokens_of(grad_y)
        grad_bias = tokens.sum(0) if need_bias else None
        if is_differentiated_again():
            saved = x, a, None, A, B, as_saved(adapter.v_threshold), as_saved(adapter.tau)
            needs = [need_A, need_B, False, False]
            grad_x, grad_A, grad_B, _, _ = composed_backward(grad_y, need_x, needs, saved, adapter[4:], weight)
            return grad_x, None, grad_bias, grad_A, grad_B, None, None
        if is_autocast(grad_y):
            with without_autocast(grad_y):
                return _LinearOfFew.backward(ctx, grad_y)
        _, _, _, _, surrogate_alpha, straight_through, scaling, _, _ = adapter
        scaled = tokens if scaling == 1 else torch.mul(tokens, scaling)
        grad_a = gate_backward(torch.mm(scaled, B), a, ctx.number, surrogate_alpha, straight_through)
        grad_A = torch.mm(grad_a.t(), tokens_of(x)) if need_A else None
        grad_B = torch.mm(scaled.t(), torch.threshold(a, ctx.number.silent, 0.0)) if need_B else None
        grad_x = torch.mm(tokens, weight).addmm_(grad_a, A) if need_x else None
        if grad_x is not None and tokens is not grad_y:
            grad_x = grad_x.view(*grad_y.shape[:-1], grad_x.shape[1])
        return grad_x, None, grad_bias, grad_A, grad_B, None, None
