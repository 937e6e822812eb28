"""The training of a gated linear layer as it usually is, in few lines of Python.

`linear.py` has one function for every case. With few tokens or on a GPU each line of Python counts, because its code
and torch's have to come from memory again. Here there is no dropout, no observer and no learned number.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelora.method.composed import as_saved, is_differentiated_again
from spikelora.method.ops.adapter import Adapter, as_new, is_autocast, tokens_of, without_autocast
from spikelora.method.ops.second_backward import composed_backward


class UsualLinear(torch.autograd.Function):
    """`y = x @ weight.T + bias + scaling * gated @ B.T` as `linear.spike_linear`, with the products of `backend`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        adapter: Adapter,
        backend: Any,
    ) -> Tensor:
        tokens = x if x.dim() == 2 else tokens_of(x)
        y = F.linear(tokens, weight, bias)
        _, _, v_threshold, tau, _, _, scaling, _, _ = adapter
        a = backend.add_adapter_(y, tokens, A, B, v_threshold, tau, 1.0, scaling, True)
        ctx.adapter, ctx.backend = adapter, backend
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, a, A, B, weight)
        return y if tokens is x else as_new(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, a, A, B, weight = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B, _, _ = ctx.needs_input_grad
        _, _, v_threshold, tau, surrogate_alpha, straight_through, scaling, _, _ = ctx.adapter
        tokens = grad_y if grad_y.dim() == 2 else tokens_of(grad_y)
        needs, grad_bias = (need_A, need_B, False, False), tokens.sum(0) if need_bias else None
        if is_differentiated_again():
            saved = x, a, None, A, B, as_saved(v_threshold), as_saved(tau)
            grad_x, grad_A, grad_B, _, _ = composed_backward(grad_y, need_x, needs, saved, ctx.adapter[4:], weight)
            return grad_x, None, grad_bias, grad_A, grad_B, None, None
        if is_autocast(grad_y):
            with without_autocast(grad_y):
                return UsualLinear.backward(ctx, grad_y)
        grad_x = torch.mm(tokens, weight) if need_x else None
        grad_A, grad_B, _, _ = ctx.backend.adapter_backward(
            tokens, grad_x, tokens_of(x) if need_A else None, a, A, B, v_threshold, tau, surrogate_alpha,
            straight_through, 1.0, scaling, needs,
        )  # fmt: skip
        if grad_x is not None and tokens is not grad_y:
            grad_x = grad_x.view(*grad_y.shape[:-1], grad_x.shape[1])
        return grad_x, None, grad_bias, grad_A, grad_B, None, None
