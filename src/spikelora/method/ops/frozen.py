"""The frozen base layer's own product, and its gradient by the input."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_COLUMNS = 256  # of a weight, transposed at a time


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`; under autocast the weight is cast here and in the backward, and no copy is kept."""
    if weight.dtype != x.dtype:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)


def product_backward(grad_y: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype != grad_y.dtype:
        weight = weight.to(grad_y.dtype)
    if not _is_slow(grad_y):
        return torch.mm(grad_y, weight)
    # On a CPU without a half-precision product, torch's own is fast only if the summed index is contiguous in both:
    # with AVX2 and 512 tokens of 1024 features it then takes 52 ms in place of 1.1 s. (With AMX it takes 0.6 ms as it
    # is, and 2.5 ms this way.) One part at a time keeps the copies small.
    grad_x = grad_y.new_empty(grad_y.shape[0], weight.shape[1])
    for part, out in zip(weight.split(_COLUMNS, dim=1), grad_x.split(_COLUMNS, dim=1), strict=True):
        torch.mm(grad_y, part.t().contiguous().t(), out=out)
    return grad_x


def _is_slow(grad_y: Tensor) -> bool:
    """Whether torch's own product would be slow here."""
    is_half = grad_y.dtype in (torch.float16, torch.bfloat16)
    return is_half and grad_y.is_cpu and not torch.compiler.is_compiling() and not _is_of_onednn(grad_y.dtype)


@functools.cache
def _is_of_onednn(dtype: torch.dtype) -> bool:
    """Whether torch uses oneDNN for half-precision matrix products on this CPU, by torch's own test."""
    if not torch.backends.mkldnn.is_available():
        return False
    name = "_is_mkldnn_bf16_supported" if dtype is torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return getattr(torch.ops.mkldnn, name)()
