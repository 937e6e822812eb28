"""The training of a gated linear layer as it usually is, in few lines of Python.

`linear.py` has one function for every case. Each line of Python counts there, because its code and torch's have to
come from memory again. Here there is no dropout and no learned number.
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelora.method.composed import as_saved
from spikelora.method.ops.adapter import Adapter, as_new, tokens_of, without_autocast
from spikelora.method.ops.firing import Firing, firing, gate_backward, has_closed_form
from spikelora.method.ops.frozen import product, product_backward
from spikelora.method.ops.second_backward import composed_backward, is_batched, stand_in
from spikelora.method.ops.torch_backend import scaled_product

_MAX_TOKENS = 128


def firing_of_few(x: Tensor, adapter: Adapter) -> Firing | None:
    """What gates `x (..., in) @ A.T`, or None if `x` has many tokens or is not float32 on a CPU as A is."""
    A, _, v_threshold, tau, surrogate_alpha, _, _, _, _ = adapter
    if x.numel() > _MAX_TOKENS * x.shape[-1] or not x.dtype is A.dtype is torch.float32:
        return None
    number = firing(x, v_threshold, tau)
    return number if number is not None and has_closed_form(number, surrogate_alpha) else None


class UsualLinear(torch.autograd.Function):
    """`y = x @ weight.T + bias + scaling * gated @ B.T` as `linear.spike_linear`.

    The adapter's products are those of `backend`, or with `number = firing_of_few(x, adapter)` torch's own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        adapter: Adapter,
        number: Firing | None,
        backend: ModuleType,
    ) -> Tensor:
        _, _, v_threshold, tau, _, _, scaling, _, observers = adapter
        tokens = x if x.dim() == 2 else tokens_of(x)
        # Two calls that the usual case does not need are written out here and in the backward.
        y = F.linear(tokens, weight, bias) if weight.dtype is x.dtype else product(tokens, weight, bias)
        if number is None:
            a, gated = backend.add_adapter_(y, tokens, A, B, v_threshold, tau, 1.0, scaling, True), None
        else:
            a = F.linear(tokens, A)
            gated = torch.threshold(a, number.silent, 0.0)
            y.addmm_(gated, B.t(), alpha=scaling)
        for observe in observers:
            observe(a)
        ctx.adapter, ctx.number, ctx.backend = adapter, number, backend
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else stand_in(x), a, gated, A, B, weight)
        return y if tokens is x else as_new(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, a, gated, A, B, weight = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B, _, _, _ = ctx.needs_input_grad
        _, _, v_threshold, tau, surrogate_alpha, straight_through, scaling, _, _ = ctx.adapter
        tokens = grad_y if grad_y.dim() == 2 else tokens_of(grad_y)
        grad_bias, needs = tokens.sum(0) if need_bias else None, (need_A, need_B, False, False)
        if torch.is_grad_enabled() or is_batched(grad_y):
            saved = x, a, None, A, B, as_saved(v_threshold), as_saved(tau)
            grad_x, grad_A, grad_B, _, _ = composed_backward(grad_y, need_x, needs, saved, ctx.adapter[4:], weight)
            return grad_x, None, grad_bias, grad_A, grad_B, None, None, None
        if torch.is_autocast_enabled(grad_y.device.type):
            with without_autocast(grad_y):
                return UsualLinear.backward(ctx, grad_y)
        x = tokens_of(x) if need_A else None
        if ctx.number is None:
            grad_x = product_backward(tokens, weight) if need_x else None
            grad_A, grad_B, _, _ = ctx.backend.adapter_backward(
                tokens, grad_x, x, a, A, B, v_threshold, tau, surrogate_alpha, straight_through, 1.0, scaling, needs
            )
        else:
            grad_a = gate_backward(scaled_product(tokens, B, scaling), a, ctx.number, surrogate_alpha, straight_through)
            grad_A = None if x is None else torch.mm(grad_a.t(), x)
            grad_B = scaled_product(tokens.t(), gated, scaling) if need_B else None
            # The weight comes last: reading it drives out of the caches what the lines above have in common.
            grad_x = torch.mm(tokens, weight).addmm_(grad_a, A) if need_x else None
        if grad_x is not None and tokens is not grad_y:
            grad_x = grad_x.view(*grad_y.shape[:-1], grad_x.shape[1])
        return grad_x, None, grad_bias, grad_A, grad_B, None, None, None
