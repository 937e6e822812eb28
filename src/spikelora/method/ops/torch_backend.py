"""The adapter's products in plain torch, for every device; each reads its largest tensor once.

`x (N, in)`, `y (N, out)` and their gradients have the dtype of the base, `A (r, in)`, `B (out, r)`, `a (N, r)` that of
the adapter, which is float32 for a half-precision base. If the two differ, rows are cast to the adapter's dtype a block
at a time. That is as exact as PEFT's float32 copy of the whole, without the copy.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelora.method.ops.firing import firing, gate_backward, has_closed_form, scalar

# Elements of one block of rows: 1 MB in float32, which stays in the caches. On two CPU cores blocks of 64 to 256 rows
# of 1024 took the same time as a copy of the whole, and blocks of 16 rows 2.5 times as long.
_BLOCK = 2**18

# Skipping silent tokens reads and writes single rows of y; the dense product streams through all of it. Including the
# search for the firing tokens, the two break even at 24 % firing of 1024 tokens in width 1024, at 32 % in width 4096,
# and at 6 % of 128 tokens in width 1024 (benchmarks/events, two CPU cores, float32, r = 8).
_MAX_FIRING = 1 / 4
_MIN_ELEMENTS = 2**18

# The BLAS of a CPU is slow for products with only r columns. Measured on two cores with 512 tokens in float32:
# - With B copied to the layout of A, `grad_y @ B` takes 0.19 ms in place of 0.35 at r = 8 and width 1024, and 0.10 in
#   place of 0.37 at r = 4, but 0.25 in place of 0.22 at r = 12. For few tokens the copy is not worth it.
# - A sum over tokens is faster for some features at a time: at r = 8 and width 4096 it takes 0.57 to 0.72 ms in place
#   of 1.1 to 1.6, and at width 1024 0.15 to 0.19 in place of 0.20 to 0.27. With one thread it gains at width 4096
#   alone, in other dtypes nothing. (A whole layer's training gains 0.1 to 0.5 ms of 16 to 60.)
# - A product is added faster into the transposed result: `grad_x += grad_a @ A` takes 0.6 ms in place of 0.95 at r = 8
#   and width 4096, and 0.16 in place of 0.25 at width 1024.
_MAX_COPIED_RANK = 8
_FEATURES = 128
_MIN_TOKENS = 128

# The least and the greatest number that is finite.
_FINITE = {
    dtype: (torch.finfo(dtype).min, torch.finfo(dtype).max)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def add_adapter_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    v_threshold: Tensor,
    tau: Tensor,
    scale: float,
    scaling: float,
    need_a: bool = True,
) -> Tensor:
    """Add the adapter in place, `y (N, out) += scaling * gated @ B.T`; returns `a = scale * x (N, in) @ A.T`.

    `gated = a * (a / tau >= v_threshold)`.
    """
    # With few tokens each Python function called here costs as much as one of torch's operations.
    if x.dtype == A.dtype == y.dtype and scale == 1 and x.shape[0] < _MIN_TOKENS and y.numel() < _MIN_ELEMENTS:
        a = F.linear(x, A)
        number = firing(a, v_threshold, tau)
        if number is not None:
            y.addmm_(torch.threshold(a, number.silent, 0.0), B.t(), alpha=scaling)
            return a
    else:
        a = _contract(x, A.t(), scale)
    add_up_(y, a, B, v_threshold, tau, scaling)
    return a


def adapter_backward(
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
) -> tuple[Tensor | None, ...]:
    """Gradients of `add_adapter_` by A, B, v_threshold and tau; None for those that `needs` leaves out.

    Adds the gradient by x into `grad_x (N, in)` if it is given. With `grad_a` from `up_backward`:

        grad_A (r, in)   = scale * grad_a.T @ x
        grad_x (N, in)  += scale * grad_a @ A
    """
    grad_a, *grads = up_backward(grad_y, a, B, v_threshold, tau, surrogate_alpha, straight_through, scaling, *needs[1:])
    grad_A = _sum_over_tokens(x, grad_a, scale, transposed=True) if needs[0] and x is not None else None
    if grad_x is not None:
        _add_product_(grad_x, grad_a, A, scale)
    return grad_A, *grads


def add_up_(y: Tensor, a: Tensor, B: Tensor, v_threshold: Tensor, tau: Tensor, scaling: float) -> None:
    """`y += scaling * gated @ B.T` in place, `gated = a * (a / tau >= v_threshold)`."""
    number = firing(a, v_threshold, tau)
    if number is not None:
        gated = torch.threshold(a, number.silent, 0.0)  # a NaN stays visible: it is not `<= silent`
        spikes = a > number.silent if _is_searched(y) else None
    else:
        spikes = _charge(a, tau) >= v_threshold
        gated = _select(a, spikes)
    tokens = _firing_tokens(y, a, spikes) if spikes is not None and _is_searched(y) else None
    if tokens is None:
        _add_product_(y, gated, B.t(), scaling)
    elif tokens.shape[0]:
        rows = y.index_select(0, tokens)
        _add_product_(rows, gated.index_select(0, tokens), B.t(), scaling)
        y.index_copy_(0, tokens, rows)


def up_backward(
    grad_y: Tensor,
    a: Tensor,
    B: Tensor,
    v_threshold: Tensor,
    tau: Tensor,
    surrogate_alpha: float,
    straight_through: bool,
    scaling: float,
    need_B: bool,
    need_v_threshold: bool,
    need_tau: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `y = scaling * gated @ B.T` with respect to `a (N, r)`, `B (out, r)`, `v_threshold` and `tau`.

    With `g = scaling * grad_y @ B`, `u = a / tau - v_threshold`, the surrogate's `s'(u)` and the window's `w(u)`:

        grad_a           = g * (spikes + a * s'(u) / tau), straight through g * (spikes + (1 - spikes) * w(u))
        grad_B           = scaling * grad_y.T @ gated
        grad_v_threshold = -sum(g * a * s'(u))
        grad_tau         = -sum(g * a * s'(u) * a / tau ** 2)
    """
    g = _contract(grad_y, B, scaling)
    number = None if need_v_threshold or need_tau else firing(a, v_threshold, tau)
    if number is not None and has_closed_form(number, surrogate_alpha):
        gated = torch.threshold(a, number.silent, 0.0)
        grad_B = _sum_over_tokens(grad_y, gated, scaling) if need_B else None
        return gate_backward(g, a, number, surrogate_alpha, straight_through), grad_B, None, None
    v = _charge(a, tau)
    spikes = v >= v_threshold
    grad_B = _sum_over_tokens(grad_y, _select(a, spikes), scaling) if need_B else None
    # a * s'(u) goes to 0 as a goes to infinity: it is 0 for the largest finite a, whose u ** 2 overflows.
    c = math.pi / 2 * surrogate_alpha
    finite_a = a.to(v.dtype).clamp(*_FINITE[v.dtype])
    distance = (v - v_threshold).mul_(c).square_().add_(1)
    slope = (finite_a / distance).mul_(surrogate_alpha / 2)
    g = g.to(v.dtype)
    share = torch.where(spikes, 1, distance.reciprocal()) if straight_through else slope.div(tau).add_(spikes)
    grad_a = share.mul_(g).to(a.dtype)
    grad_v_threshold = grad_tau = None
    if need_v_threshold or need_tau:
        grad_v = slope.mul_(g)
        grad_v_threshold = -grad_v.sum().view(1) if need_v_threshold else None
        grad_tau = -(grad_v * finite_a / tau**2).sum().view(1) if need_tau else None
    return grad_a, grad_B, grad_v_threshold, grad_tau


def _charge(a: Tensor, tau: Tensor) -> Tensor:
    """`v = a / tau`, in float32 where `a` has half precision."""
    return (a.float() if a.dtype in (torch.float16, torch.bfloat16) else a) / tau


def _select(a: Tensor, spikes: Tensor) -> Tensor:
    """`a` where it spikes and 0 elsewhere; a NaN of `a` stays visible."""
    # A product takes half as long as torch.where on a CPU; -inf is made finite first, as -inf * 0 would be NaN.
    return a.clamp(min=_FINITE[a.dtype][0]).mul_(spikes)


def _blocks(x: Tensor) -> list[slice]:
    """Slices of the rows of `x (N, features)`; a compiler gets the whole, as it fuses the cast."""
    n_rows = x.shape[0]
    size = n_rows if torch.compiler.is_compiling() else _BLOCK // max(1, x.shape[1])
    if n_rows <= max(1, size):
        return [slice(None)]
    return [slice(start, start + size) for start in range(0, n_rows, max(1, size))]


def _is_searched(y: Tensor) -> bool:
    """Whether skipping silent tokens can pay."""
    # On other devices the count would wait for the device; a compiler would break its graph at it.
    return y.numel() >= _MIN_ELEMENTS and y.is_cpu and not torch.compiler.is_compiling()


def _firing_tokens(y: Tensor, a: Tensor, spikes: Tensor) -> Tensor | None:
    """Indices of the tokens with a spike, if skipping the others pays, else None."""
    # Eight ranks at a time as one integer: up to 2040 ranks its sum never carries. It takes half the time of any().
    r = spikes.shape[1]
    counts = spikes.view(torch.int64).sum(1) if r % 8 == 0 and r <= 2040 else spikes.any(1)
    tokens = counts.nonzero().squeeze(1)
    if tokens.shape[0] > _MAX_FIRING * y.shape[0] or a.sum().isnan():  # a NaN never spikes, but has to be seen
        return None
    return tokens


def scaled_product(c: Tensor, W: Tensor, scale: float) -> Tensor:
    """`scale * c @ W` as one operation."""
    if scale == 1:
        return torch.mm(c, W)
    nothing = scalar(0.0, c.dtype) if c.is_cpu and not torch.compiler.is_compiling() else c.new_empty(())
    return torch.addmm(nothing, c, W, beta=0, alpha=scale)


def _contract(x: Tensor, W: Tensor, scale: float) -> Tensor:
    """`scale * x (N, features) @ W (features, r)`, in the dtype of `W`."""
    if x.shape[0] >= _MIN_TOKENS and W.shape[1] <= _MAX_COPIED_RANK and x.is_cpu:
        W = W.t().contiguous().t()
    if x.dtype == W.dtype:
        return scaled_product(x, W, scale)
    blocks = _blocks(x)
    if len(blocks) == 1:
        return scaled_product(x.to(W.dtype), W, scale)
    a = W.new_empty(x.shape[0], W.shape[1])
    for rows in blocks:
        torch.addmm(a[rows], x[rows].to(W.dtype), W, beta=0, alpha=scale, out=a[rows])
    return a


def _add_product_(y: Tensor, c: Tensor, W: Tensor, scale: float) -> None:
    """`y (N, features) += scale * c (N, r) @ W (r, features)`."""
    if y.dtype == c.dtype:
        if y.shape[0] < _MIN_TOKENS or not y.is_cpu or torch.compiler.is_compiling():
            y.addmm_(c, W, alpha=scale)
        else:
            y.t().addmm_(W.t(), c.t(), alpha=scale)
        return
    blocks = _blocks(y)
    if len(blocks) == 1:
        y.add_(torch.mm(c, W), alpha=scale)
        return
    for rows in blocks:
        y[rows] = y[rows].to(c.dtype).addmm_(c[rows], W, alpha=scale)


def _sum_over_tokens(x: Tensor, c: Tensor, scale: float, transposed: bool = False) -> Tensor:
    """`scale * x.T @ c`, `(features, r)` in the dtype of `c (N, r)`, or the same transposed."""
    if c.shape[0] < _MIN_TOKENS or not c.is_cpu:
        # In the layout that is wanted: autograd would copy a transposed view when it accumulates gradients.
        x = x.to(c.dtype)
        return scaled_product(c.t(), x, scale) if transposed else scaled_product(x.t(), c, scale)
    total = _sum_over_many(x, c)
    if scale != 1:
        total.mul_(scale)
    return total if transposed else total.t()


def _sum_over_many(x: Tensor, c: Tensor) -> Tensor:
    """`c.T @ x`, `(r, features)`; at r = 8 `x.T @ c` takes 6 times as long on a CPU."""
    if x.dtype == c.dtype:
        return _split_sum(x, c) if _is_split(x) else torch.mm(c.t(), x)
    total = c.new_zeros(c.shape[1], x.shape[1])
    for rows in _blocks(x):
        total.addmm_(c[rows].t(), x[rows].to(c.dtype))
    return total


def _is_split(x: Tensor) -> bool:
    if not x.is_cpu or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return torch.get_num_threads() > 1 and x.shape[1] % _FEATURES == 0


def _split_sum(x: Tensor, c: Tensor) -> Tensor:
    """`c.T @ x`, `_FEATURES` of the features at a time."""
    parts = x.view(x.shape[0], x.shape[1] // _FEATURES, _FEATURES).transpose(0, 1)
    return torch.bmm(c.t().expand(parts.shape[0], -1, -1), parts).transpose(0, 1).reshape(c.shape[1], x.shape[1])
