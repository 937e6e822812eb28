"""The gated linear layer as one autograd function: base and adapter together, or the adapter alone.

`y = base(x) + scaling * gated @ B.T`, `gated = a * (a / tau >= v_threshold)`, `a = dropout(x) @ A.T`. What PEFT's LoRA
pays beside its two products is memory traffic: three temporaries of the output's size forward, one of the input's size
backward. Here the products are added into the base's own output and input gradient, and the backward is closed-form
from `x`, `a` and the dropout's mask.
"""

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikelora.ops import torch_backend

_MAX_TRITON_RANK = 256  # up to here the kernels are tested
_COLUMNS = 256  # of a weight, transposed at a time


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
    scaling: float
    dropout: float
    observers: tuple[Callable[[Tensor], None], ...] = ()


def spike_linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """A frozen linear layer and its adapter: `y = x @ weight.T + bias + scaling * gated @ B.T`.

    Args:
        x: input `(..., in)`, in the dtype of `weight` or under autocast.
        weight: `(out, in)` with any strides; it gets no gradient.
        bias: `(out,)` or None.
        adapter: the adapter.

    Returns:
        `y (..., out)`, in the dtype that the linear layer alone would give.
    """
    x, adapter = _as_autocast(x, adapter)
    # Flattened outside of the autograd function: an output that is a view of its own could not be changed in place.
    tokens = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        y: Tensor = _SpikeLinear.apply(tokens, weight, bias, *adapter)
    else:
        y = _linear(tokens, weight, bias)
        _add_adapter_(y, tokens, adapter)
    return y.view(*x.shape[:-1], y.shape[-1])


def spike_branch(y: Tensor, x: Tensor, adapter: Adapter, in_place: bool) -> Tensor:
    """The adapter alone, beside a layer that has run already: `y + scaling * gated @ B.T`.

    Args:
        y: output of the layer, `(..., out)`.
        x: its input, `(..., in)`.
        adapter: the adapter.
        in_place: add into `y`; only where nobody else holds `y` and autograd has not saved it.

    Returns:
        `(..., out)` in the dtype of `y`.
    """
    x, adapter = _as_autocast(x, adapter)
    tokens = x.reshape(-1, x.shape[-1])
    in_place = in_place and y.is_contiguous()
    if torch.is_grad_enabled():
        # Autograd takes a detour for a view that a function changes; a compiler cannot trace such a function.
        in_place = in_place and not torch.compiler.is_compiling() and not y._is_view()
        out: Tensor = _SpikeBranch.apply(y, in_place, tokens, *adapter)
    else:
        out = y if in_place else y.clone(memory_format=torch.contiguous_format)
        _add_adapter_(out.view(-1, out.shape[-1]), tokens, adapter)
    return out


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    # Not by `torch.amp.is_autocast_available`, which torch 2.11 cannot compile; meta tensors alone have no autocast.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


class _SpikeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *adapter):
        y = _linear(x, weight, bias)
        _save(ctx, x, *_add_adapter_(y, x, Adapter(*adapter)), adapter, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        need_x, _, need_bias, *needs = ctx.needs_input_grad
        *saved, weight = ctx.saved_tensors
        with _without_autocast(grad_y):
            grad_x = _linear_backward(grad_y, weight) if need_x else None
            grads = _adapter_backward(ctx, grad_y, grad_x, saved, needs)
            grad_bias = grad_y.sum(0) if need_bias else None
        return grad_x, None, grad_bias, *grads


class _SpikeBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, in_place, x, *adapter):
        if in_place:
            ctx.mark_dirty(y)
        else:
            y = y.clone(memory_format=torch.contiguous_format)
        _save(ctx, x, *_add_adapter_(y.view(-1, y.shape[-1]), x, Adapter(*adapter)), adapter)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        _, _, need_x, *needs = ctx.needs_input_grad
        saved = ctx.saved_tensors
        with _without_autocast(grad_y):
            tokens = grad_y.reshape(-1, grad_y.shape[-1])
            in_features = saved[3].shape[1]
            grad_x = grad_y.new_zeros(tokens.shape[0], in_features, dtype=ctx.x_dtype) if need_x else None
            grads = _adapter_backward(ctx, tokens, grad_x, saved, needs)
        return grad_y, None, grad_x, *grads


def _as_autocast(x: Tensor, adapter: Adapter) -> tuple[Tensor, Adapter]:
    """What autocast makes of the operands, where it is on: casts that autograd sees."""
    if not is_autocast(x):
        return x, adapter
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), adapter._replace(A=adapter.A.to(dtype), B=adapter.B.to(dtype))


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """The backward has the dtypes of the forward, even where autocast is on around it."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`; under autocast the weight is cast here and again backward, and no copy of it is kept."""
    if weight.dtype != x.dtype:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)


def _linear_backward(grad_y: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(grad_y.dtype)
    is_half = grad_y.dtype in (torch.float16, torch.bfloat16)
    if not (grad_y.is_cpu and is_half) or torch.compiler.is_compiling():
        return torch.mm(grad_y, weight)
    # Where the CPU has no half-precision product, torch's own wants the summed index contiguous in both: with AVX2 and
    # 512 tokens of 1024 features, 52 ms in place of 1.1 s. A part at a time, so that the copies stay small.
    grad_x = grad_y.new_empty(grad_y.shape[0], weight.shape[1])
    for part, out in zip(weight.split(_COLUMNS, dim=1), grad_x.split(_COLUMNS, dim=1), strict=True):
        torch.mm(grad_y, part.t().contiguous().t(), out=out)
    return grad_x


def _add_adapter_(y: Tensor, x: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor | None]:
    """Add the adapter's part into `y (N, out)`; returns `a (N, r)` and, where there is dropout, its mask `(N, in)`."""
    backend, mask = _backend(y, adapter.A), None
    if not adapter.dropout:
        a = backend.down(x, adapter.A)
    else:
        dropped, mask = torch.native_dropout(x, adapter.dropout, True)
        if x.dtype == adapter.A.dtype:
            a = backend.down(dropped, adapter.A)
        else:  # what PEFT drops out is a float32 copy; `x / (1 - dropout)` would be rounded here, and moves spikes
            a = backend.down(x * mask, adapter.A).mul_(_kept(adapter.dropout))
    for observe in adapter.observers:
        observe(a)
    backend.add_up_(y, a, adapter.B, adapter.v_threshold, adapter.tau, adapter.scaling)
    return a, mask


def _save(ctx, x: Tensor, a: Tensor, mask: Tensor | None, adapter: tuple, *more: Tensor) -> None:
    A, B, v_threshold, tau, *ctx.numbers, _ = adapter
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, a, mask, A, B, v_threshold, tau, *more)


def _adapter_backward(ctx, grad_y: Tensor, grad_x: Tensor | None, saved: tuple, needs: list[bool]) -> tuple:
    """Gradients of the fields of `Adapter`; adds the adapter's part into `grad_x (N, in)` where it is given."""
    x, a, mask, A, B, v_threshold, tau = saved
    surrogate_alpha, scaling, dropout = ctx.numbers
    backend = _backend(grad_y, A)
    grad_a, *grads = backend.up_backward(grad_y, a, B, v_threshold, tau, surrogate_alpha, scaling, *needs[1:4])
    if mask is not None:
        grad_a = grad_a.mul_(_kept(dropout))
    grad_A = None
    if needs[0]:
        grad_A = backend.down_backward_A(grad_a, x if mask is None else x * mask)
    if grad_x is not None and mask is None:
        backend.add_down_backward_x_(grad_x, grad_a, A)
    elif grad_x is not None:
        part = torch.zeros_like(grad_x)
        backend.add_down_backward_x_(part, grad_a, A)
        grad_x.addcmul_(part, mask)
    return grad_A, *grads, None, None, None, None


def _kept(dropout: float) -> float:
    """What dropout multiplies by where it does not drop: it stands at `a`, which is smaller than `x`."""
    return 1 / (1 - dropout)


def _backend(y: Tensor, A: Tensor) -> ModuleType:
    """Triton's kernels on CUDA, plain torch elsewhere and for a compiler, which makes kernels of its own."""
    if not y.is_cuda or torch.compiler.is_compiling() or not _has_triton():
        return torch_backend
    if y.dtype == torch.float64 or A.shape[0] > _MAX_TRITON_RANK:
        return torch_backend
    from spikelora.ops import triton_backend

    return triton_backend


@functools.cache
def _has_triton() -> bool:
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    from spikelora.ops import triton_backend

    return triton_backend.can_start()
