"""The backward of the fast paths where it is differentiated itself, as under `create_graph=True`."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from spikelora.errors import SpikeLoraError
from spikelora.method.composed import composed_gate, gradients
from spikelora.method.ops.adapter import scale_of, without_autocast


def composed_backward(
    grad_y: Tensor,
    need_x: bool,
    needs: Sequence[bool],
    saved: Sequence[Any],
    numbers: tuple[Any, ...],
    weight: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the input, A, B, v_threshold and tau by torch's own rules, for a second backward."""
    x, _, mask, A, B, v_threshold, tau = saved
    surrogate_alpha, straight_through, scaling, dropout, _ = numbers
    if x is None:
        raise SpikeLoraError(
            "A second backward needs the input of each spiking layer, which is not kept if `lora_A` is frozen. "
            "Train `lora_A` as well, or take the plain path with `with force_path(Path.PLAIN)`."
        )

    def forward(x: Tensor, A: Tensor, B: Tensor, v_threshold: Tensor, tau: Tensor) -> Tensor:
        dropped = x if mask is None else x * mask.view(x.shape) * scale_of(dropout)
        gated = composed_gate(F.linear(dropped.to(A.dtype), A), v_threshold, tau, surrogate_alpha, straight_through)
        y = (F.linear(gated, B) * scaling).to(grad_y.dtype)
        return y if weight is None else y + F.linear(x, weight.to(x.dtype))

    with without_autocast(grad_y):
        return tuple(gradients(forward, (x, A, B, v_threshold, tau), (need_x, *needs), grad_y))
