"""What the functions of a gated layer share: the operands of an adapter, and the shapes that autograd wants."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Adapter(NamedTuple):
    """The tensors and numbers of one adapter in one layer.

    `A (r, in)` and `B (out, r)` share a dtype, `v_threshold (1,)` and `tau (1,)` are float32, and `dropout` is the
    probability in force now: 0 in evaluation. `observers` are called with `a (N, r)`.
    """

    A: Tensor
    B: Tensor
    v_threshold: Tensor
    tau: Tensor
    surrogate_alpha: float
    straight_through: bool
    scaling: float
    dropout: float
    observers: tuple[Callable[[Tensor], None], ...] = ()


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    # torch 2.11 cannot compile `torch.amp.is_autocast_available`; only meta tensors have no autocast.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A backward with the dtypes of the forward, even if autocast is on around it."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def scale_of(dropout: float) -> float:
    """The factor of dropout for what it keeps; it is applied to `a`, which is smaller than `x`."""
    return 1 / (1 - dropout)


def as_new(y: Tensor, x: Tensor) -> Tensor:
    """`y` with the leading dimensions of `x`, for an autograd function to return.

    It must not be a view, or the layers above could not change it in place. For a compiler it must not be a tensor that
    was changed in place either: torch 2.11 would then train A and B with gradients of zero, without an error.
    """
    unsafe_view: Tensor = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
    return unsafe_view


def tokens_of(x: Tensor) -> Tensor:
    """`x (..., features)` as `(N, features)`; `x` itself if it has that shape, as every view costs an autograd node."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
