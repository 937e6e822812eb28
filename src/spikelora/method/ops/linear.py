"""The gated linear layer as one autograd function: base and adapter together, or the adapter alone.

`y = base(x) + scaling * gated @ B.T`, `gated = a * (a / tau >= v_threshold)`, `a = dropout(x) @ A.T`. Besides its two
products PEFT's LoRA pays for memory traffic: three temporaries of the output's size forward, one of the input's size
backward. Here the products are added into the base's own output and input gradient, and the backward is closed-form
from `x`, `a` and the dropout's mask.
"""

import functools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spikelora.method.composed import as_saved
from spikelora.method.ops import torch_backend
from spikelora.method.ops.adapter import Adapter, as_new, is_autocast, scale_of, tokens_of, without_autocast
from spikelora.method.ops.frozen import product, product_backward
from spikelora.method.ops.second_backward import composed_backward, is_composed, stand_in
from spikelora.method.ops.usual import UsualLinear, firing_of_few

_MAX_TRITON_RANK = 256  # the kernels are tested up to this rank


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
    if is_autocast(x):
        x, adapter = _as_autocast(x, adapter)
    A, B, v_threshold, tau, _, _, scaling, dropout, observers = adapter
    if torch.is_grad_enabled():
        # With one token of width 64 UsualLinear takes 1.2 to 1.3 times LoRA's time, _SpikeLinear 1.5 (float32, r = 8,
        # AMD EPYC). Of the host's part with Triton's kernels they take 0.97 and 1.03.
        if not (dropout or v_threshold.requires_grad or tau.requires_grad or torch.compiler.is_compiling()):
            y: Tensor = UsualLinear.apply(x, weight, bias, A, B, adapter, firing_of_few(x, adapter), _backend(x, A))
            return y
        y = _SpikeLinear.apply(x, weight, bias, *adapter)
        return y
    y = product(x, weight, bias).contiguous()
    tokens, out = tokens_of(x), y.view(-1, y.shape[-1])
    if dropout or observers:
        _add_adapter_(out, tokens, adapter, need_a=False)
    else:
        _backend(y, A).add_adapter_(out, tokens, A, B, v_threshold, tau, 1.0, scaling, False)
    return y


def spike_branch(y: Tensor, x: Tensor, adapter: Adapter, in_place: bool) -> Tensor:
    """The adapter alone, for a layer that has run already: `y + scaling * gated @ B.T`.

    Args:
        y: output of the layer, `(..., out)`.
        x: its input, `(..., in)`.
        adapter: the adapter.
        in_place: add into `y`; only if nobody else holds `y` and autograd has not saved it.

    Returns:
        `(..., out)` in the dtype of `y`.
    """
    if is_autocast(x):
        x, adapter = _as_autocast(x, adapter)
    in_place = in_place and y.is_contiguous()
    if torch.is_grad_enabled():
        # Autograd is slow if a function changes a view, and a compiler cannot trace such a function.
        in_place = in_place and not torch.compiler.is_compiling() and not y._is_view()
        out: Tensor = _SpikeBranch.apply(y, in_place, x, *adapter)
        return out
    out = y if in_place else y.clone(memory_format=torch.contiguous_format)
    _add_adapter_(tokens_of(out), tokens_of(x), adapter, need_a=False)
    return out


class _SpikeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        v_threshold: Tensor,
        tau: Tensor,
        *numbers: Any,
    ) -> Tensor:
        tokens = tokens_of(x)
        y = product(tokens, weight, bias)
        a, mask = _add_adapter_(y, tokens, Adapter(A, B, v_threshold, tau, *numbers), need_a=True)
        ctx.numbers = numbers
        neuron = as_saved(v_threshold), as_saved(tau)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else stand_in(x), a, mask, A, B, *neuron, weight)
        return y if tokens is x and not torch.compiler.is_compiling() else as_new(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, need_bias, *needs = ctx.needs_input_grad[:7]
        *saved, weight = ctx.saved_tensors
        if is_composed(grad_y):
            composed = composed_backward(grad_y, need_x, needs, saved, ctx.numbers, weight)
            grad_bias = tokens_of(grad_y).sum(0) if need_bias else None
            return composed[0], None, grad_bias, *composed[1:], *(None,) * 5
        with without_autocast(grad_y):
            tokens = tokens_of(grad_y)
            grad_x = product_backward(tokens, weight) if need_x else None
            grads = _adapter_backward(tokens, grad_x, saved, ctx.numbers, needs)
            grad_bias = tokens.sum(0) if need_bias else None
        if grad_x is not None and tokens is not grad_y:
            grad_x = grad_x.view(*grad_y.shape[:-1], grad_x.shape[1])
        return grad_x, None, grad_bias, *grads, *(None,) * 5


class _SpikeBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        in_place: bool,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        v_threshold: Tensor,
        tau: Tensor,
        *numbers: Any,
    ) -> Tensor:
        if in_place:
            ctx.mark_dirty(y)
        else:
            y = y.clone(memory_format=torch.contiguous_format)
        a, mask = _add_adapter_(tokens_of(y), tokens_of(x), Adapter(A, B, v_threshold, tau, *numbers), need_a=True)
        ctx.numbers, ctx.x_dtype = numbers, x.dtype
        neuron = as_saved(v_threshold), as_saved(tau)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else stand_in(x), a, mask, A, B, *neuron)
        return as_new(y, x) if torch.compiler.is_compiling() else y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        _, _, need_x, *needs = ctx.needs_input_grad[:7]
        saved = ctx.saved_tensors
        if is_composed(grad_y):
            return grad_y, None, *composed_backward(grad_y, need_x, needs, saved, ctx.numbers), *(None,) * 5
        with without_autocast(grad_y):
            tokens, grad_x = tokens_of(grad_y), None
            if need_x:
                grad_x = tokens.new_zeros(tokens.shape[0], saved[3].shape[1], dtype=ctx.x_dtype)
            grads = _adapter_backward(tokens, grad_x, saved, ctx.numbers, needs)
        if grad_x is not None and tokens is not grad_y:
            grad_x = grad_x.view(*grad_y.shape[:-1], grad_x.shape[1])
        return grad_y, None, grad_x, *grads, *(None,) * 5


def _as_autocast(x: Tensor, adapter: Adapter) -> tuple[Tensor, Adapter]:
    """The operands as autocast would cast them, with casts that autograd sees."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), Adapter(adapter.A.to(dtype), adapter.B.to(dtype), *adapter[2:])


def _add_adapter_(y: Tensor, x: Tensor, adapter: Adapter, need_a: bool) -> tuple[Tensor | None, Tensor | None]:
    """Add the adapter's part into `y (N, out)`; return `a (N, r)` if needed, and dropout's mask `(N, in)` if any."""
    A, B, v_threshold, tau, _, _, scaling, dropout, observers = adapter
    mask, scale = None, 1.0
    if dropout:
        dropped, mask = torch.native_dropout(x, dropout, True)
        if x.dtype == A.dtype:
            x = dropped
        else:  # PEFT drops out in a float32 copy; here `x / (1 - dropout)` would be rounded, which moves spikes
            x, scale = x * mask, scale_of(dropout)
    need_a = need_a or bool(observers)
    a = _backend(y, A).add_adapter_(y, x, A, B, v_threshold, tau, scale, scaling, need_a)
    for observe in observers:
        observe(a)
    return a, mask


def _adapter_backward(
    grad_y: Tensor, grad_x: Tensor | None, saved: Sequence[Tensor], numbers: tuple[Any, ...], needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of `A`, `B`, `v_threshold` and `tau`; adds the adapter's part into `grad_x (N, in)` if given."""
    x, a, mask, A, B, v_threshold, tau = saved
    surrogate_alpha, straight_through, scaling, dropout, _ = numbers
    tokens, part, scale = tokens_of(x) if needs[0] else None, grad_x, 1.0
    if mask is not None:
        tokens = None if tokens is None else tokens * mask
        part, scale = None if grad_x is None else torch.zeros_like(grad_x), scale_of(dropout)
    grads: tuple[Tensor | None, ...] = _backend(grad_y, A).adapter_backward(
        grad_y, part, tokens, a, A, B, v_threshold, tau, surrogate_alpha, straight_through, scale, scaling, needs
    )
    if grad_x is not None and part is not None and mask is not None:
        grad_x.addcmul_(part, mask)
    return grads


def _backend(y: Tensor, A: Tensor) -> ModuleType:
    """Triton's kernels on CUDA, plain torch elsewhere and for a compiler, which makes kernels of its own.

    The kernels are taken at every size. If the GPU waits for the host, the number of launches decides: with the base's
    own they are 3 in a forward and 7 in a training step, or 9 with more than 256 tokens, and 4 and 16 in plain torch
    (`make bench ARGS="--only host"`).
    """
    if not y.is_cuda or torch.compiler.is_compiling() or y.dtype == torch.float64 or A.shape[0] > _MAX_TRITON_RANK:
        return torch_backend
    kernels = _triton_backend()
    return kernels if kernels is not None and kernels.works(y.device, y.dtype, A.dtype, A.shape[0]) else torch_backend


@functools.cache
def _triton_backend() -> ModuleType | None:
    if torch.version.cuda is None:
        return None
    try:
        from spikelora.method.ops import triton_backend
    except Exception as error:  # it may be absent, or broken in any way
        warnings.warn(
            f"Triton cannot be imported: adapters on CUDA take plain torch, which is slower ({type(error).__name__}: "
            f"{error}). Install the triton that belongs to this torch.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return triton_backend
