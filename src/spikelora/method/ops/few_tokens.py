"""The adapter's products in plain torch for few tokens on a CPU, with nothing that pays only for many."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelora.method.ops.firing import Firing, firing, gate_backward, has_closed_form

_MAX_TOKENS = 128


class FewTokens(NamedTuple):
    """What `torch_backend` does, for tensors of one dtype and a neuron with fixed numbers, given as `number`."""

    number: Firing

    def add_adapter_(
        self,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        v_threshold: Tensor,
        tau: Tensor,
        scale: float,
        scaling: float,
        need_a: bool,
    ) -> Tensor:
        """`y (N, out) += scaling * gated @ B.T` in place; returns `a (N, r)`. `scale` is 1."""
        a = F.linear(x, A)
        y.addmm_(torch.threshold(a, self.number.silent, 0.0), B.t(), alpha=scaling)
        return a

    def adapter_backward(
        self,
        grad_y: Tensor,
        grad_x: Tensor | None,
        x: Tensor | None,
        a: Tensor,
        A: Tensor,
        B: Tensor,
        v_threshold: Tensor,
        tau: Tensor,
        surrogate_alpha: float,
        straight_through: bool,
        scale: float,
        scaling: float,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients by A and B; adds the one by x into `grad_x (N, in)`, see `torch_backend.adapter_backward`."""
        scaled = grad_y if scaling == 1 else torch.mul(grad_y, scaling)
        grad_a = gate_backward(torch.mm(scaled, B), a, self.number, surrogate_alpha, straight_through)
        grad_A = torch.mm(grad_a.t(), x) if needs[0] and x is not None else None
        grad_B = torch.mm(scaled.t(), torch.threshold(a, self.number.silent, 0.0)) if needs[1] else None
        if grad_x is not None:
            grad_x.addmm_(grad_a, A)
        return grad_A, grad_B, None, None


def few_tokens(x: Tensor, A: Tensor, v_threshold: Tensor, tau: Tensor, surrogate_alpha: float) -> FewTokens | None:
    """The products for `x (..., in)`, or None if it has many tokens or is not float32 on a CPU as A is."""
    if x.numel() > _MAX_TOKENS * x.shape[-1] or not x.dtype is A.dtype is torch.float32:
        return None
    number = firing(x, v_threshold, tau)
    return FewTokens(number) if number is not None and has_closed_form(number, surrogate_alpha) else None
