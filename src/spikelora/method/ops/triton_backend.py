"""The adapter's products as Triton kernels: they contain the gate, and `gated` is never written to memory.

Three kernels over tokens N, features M and ranks r, two of them for a forward and three for a backward:

- `_contract_features`: partial sums of `x @ W.T`, one for each span of the features, so that few tokens fill a GPU.
- `_expand_add`: adds the partial sums up, takes them through the gate or its backward, and adds their product into y.
- `_contract_tokens`: the gradients of both matrices in one launch, in spans of tokens where there are many.

Sums are added in a fixed order and nothing is added atomically, so training can be repeated to the bit. One file of
more than 300 lines, because the kernels share their launches' code: sizes of blocks, precision, and the first test of a
device.
"""

import functools
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from spikelora.errors import SpikeLoraError

# Block sizes are fixed rather than tuned: other sizes would change the order of summation.
BLOCK = 64
SMALL_BLOCK = 16  # the smallest that tl.dot takes
WIDE_BLOCK = 128  # features that one program adds into, after it has gathered the partial sums of its tokens
# A contracting kernel gets about this many programs; its sum is cut into spans no shorter than MIN_SPAN.
PROGRAMS = 256
MIN_SPAN = 256
MAX_SPANS = 16
_CAPABILITY = 8, 0


@functools.cache
def works(device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype, rank: int) -> bool:
    """Whether the kernels compile and start on a device, tried once for such a layer; if not, a warning says why."""
    n_tokens, features = BLOCK + 1, 2 * BLOCK
    try:
        if device.type == "cuda" and (has := torch.cuda.get_device_capability(device)) < _CAPABILITY:
            # Triton compiles for some of them, but to products without tensor cores for these precisions.
            raise RuntimeError(f"its compute capability is {has[0]}.{has[1]}")
        with torch.no_grad():
            x, y = (torch.zeros(n_tokens, features, dtype=dtype, device=device) for _ in range(2))
            A = torch.zeros(rank, features, dtype=adapter_dtype, device=device)
            B = torch.zeros(features, rank, dtype=adapter_dtype, device=device)
            v_threshold = tau = torch.ones(1, device=device)
            a = add_adapter_(y, x, A, B, v_threshold, tau, 1.0, 1.0, True)
            assert a is not None
            adapter_backward(y, x, x, a, A, B, v_threshold, tau, 1.0, False, 1.0, 1.0, (True,) * 4)
    except torch.cuda.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as error:  # of Triton, its compiler or the driver, which have no common class
        warnings.warn(
            f"Triton's kernels do not run on {device} for {dtype} at rank {rank}: adapters take plain torch, "
            f"which is slower ({type(error).__name__}: {error}). They need a GPU of compute capability 8.0 or newer, a "
            "C compiler (`CC`, or gcc on the path) and Python's headers.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@triton.jit
def _load(pointer, rows, columns, n_rows, n_columns, row_stride, column_stride):
    """The tile (rows, columns) in float32, zero outside of the matrix."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    pointers = pointer + rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, tile, rows, columns, n_rows, n_columns, row_stride, column_stride):
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    pointers = pointer + rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _block(index, SIZE: tl.constexpr):
    """Indices of one block, in 64 bits because they are multiplied by strides.

    The product tells the compiler that they begin at a multiple of SIZE. Otherwise it would load element by element.
    """
    return tl.cast(index, tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def _charge(a, tau):
    # Spikes are decided at equality, and `/` on a GPU is an approximation that may miss it by an ulp or two.
    return tl.math.div_rn(a, tau)


@triton.jit
def _gate(a, v_threshold, tau):
    """`gated`, selected and not multiplied: -inf * 0 would be NaN. A NaN of `a` itself stays visible."""
    return tl.where((_charge(a, tau) >= v_threshold) | (a != a), a, 0.0)


@triton.jit
def _gate_backward(grad, a, v_threshold, tau, surrogate_alpha, STRAIGHT: tl.constexpr):
    """Gradients of `a` and `v` from the one of `gated`, and the finite part of `a`."""
    HALF_PI: tl.constexpr = 1.5707963267948966
    v = _charge(a, tau)
    slope = HALF_PI * surrogate_alpha * (v - v_threshold)
    # As a goes to infinity a * s'(u) goes to 0, which inf * 0 would miss.
    finite_a = tl.where(tl.abs(a) == float("inf"), 0.0, a)
    grad_v = grad * finite_a * (0.5 * surrogate_alpha / (1 + slope * slope))
    if STRAIGHT:
        grad_a = grad * tl.where(v >= v_threshold, 1.0, 1 / (1 + slope * slope))
    else:
        grad_a = grad * (v >= v_threshold).to(tl.float32) + grad_v / tau
    return grad_a, grad_v, finite_a


@triton.jit(do_not_specialize=["n_tokens", "span"])
def _contract_features(
    x, W, partials, x_n, x_m, w_r, w_m, n_features, rank, n_tokens, span,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`partials[s] (N, r) = x (N, M) @ W (r, M).T` over the features of span s."""
    # The rank blocks of one block of tokens are neighbours, so that they find x in the cache.
    rank_blocks = tl.cdiv(rank, BLOCK_R)
    tokens = _block(tl.program_id(0) // rank_blocks, BLOCK_N)
    ranks = _block(tl.program_id(0) % rank_blocks, BLOCK_R)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for block in range(split * span, min((split + 1) * span, tl.cdiv(n_features, BLOCK_M))):
        features = _block(block, BLOCK_M)
        x_tile = _load(x, tokens, features, n_tokens, n_features, x_n, x_m)
        W_tile = _load(W, features, ranks, n_features, rank, w_m, w_r)
        total = tl.dot(x_tile, W_tile, total, input_precision=PRECISION)
    partials += tl.cast(split, tl.int64) * n_tokens * rank
    _store(partials, total, tokens, ranks, n_tokens, rank, rank, 1)


@triton.jit(do_not_specialize=["n_tokens", "splits"])
def _expand_add(
    y, partials, out, a, W, v_threshold, tau, sums, y_n, y_m, w_r, w_m, n_features, rank, n_tokens, splits,
    scale, scaling, surrogate_alpha,
    BACKWARD: tl.constexpr, STRAIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`y (N, M) += scaling * c (N, r) @ W (r, M)`, with `c` made of `total = scale * sum_s partials[s] (N, r)`.

    In the forward `total` is the low-rank activation, which goes to `out` if that is given, and `c` is gated. In the
    backward `total` is the gradient of `gated`, and `c` is that of `a`, which goes to `out`. If
    `sums (2, blocks of tokens and of ranks)` is given, it gets the shares of the gradients of v_threshold and tau.
    """
    tokens = _block(tl.program_id(0), BLOCK_N)
    features = _block(tl.program_id(1), BLOCK_M)
    rank_blocks = tl.cdiv(rank, BLOCK_R)
    threshold_value, tau_value = tl.load(v_threshold), tl.load(tau)
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(rank_blocks):
        ranks = _block(block, BLOCK_R)
        c = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for split in range(splits):
            partial = partials + tl.cast(split, tl.int64) * n_tokens * rank
            c += _load(partial, tokens, ranks, n_tokens, rank, rank, 1)
        c = scale * c
        if BACKWARD:
            a_tile = _load(a, tokens, ranks, n_tokens, rank, rank, 1)
            c, grad_v, finite_a = _gate_backward(c, a_tile, threshold_value, tau_value, surrogate_alpha, STRAIGHT)
            if sums is not None:  # noqa: SIM102 - known when compiled, the condition within is not
                if tl.program_id(1) == 0:
                    place = sums + tl.program_id(0) * rank_blocks + block
                    tl.store(place, -tl.sum(grad_v))
                    place += tl.num_programs(0) * rank_blocks
                    tl.store(place, -tl.sum(grad_v * finite_a) / (tau_value * tau_value))
        # Rounded to the dtype in which it is kept, before it is compared and multiplied.
        c = c.to(W.dtype.element_ty).to(tl.float32)
        if out is not None:  # noqa: SIM102
            if tl.program_id(1) == 0:
                _store(out, c, tokens, ranks, n_tokens, rank, rank, 1)
        if not BACKWARD:
            c = _gate(c, threshold_value, tau_value)
        W_tile = _load(W, ranks, features, rank, n_features, w_r, w_m)
        product = tl.dot(c, W_tile, product, input_precision=PRECISION)
    y_tile = _load(y, tokens, features, n_tokens, n_features, y_n, y_m)
    _store(y, y_tile + scaling * product, tokens, features, n_tokens, n_features, y_n, y_m)


@triton.jit
def _token_sum(
    x, c, out, v_threshold, tau, x_n, x_m, out_m, out_r, n_tokens, n_features, rank, span, index, scaling,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of `out[s] (M, r) = scaling * x (N, M).T @ c (N, r)` over the tokens of span s, `c` gated if asked."""
    rank_blocks = tl.cdiv(rank, BLOCK_R)
    features = _block(index // rank_blocks, BLOCK_M)
    ranks = _block(index % rank_blocks, BLOCK_R)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for block in range(split * span, min((split + 1) * span, tl.cdiv(n_tokens, BLOCK_N))):
        tokens = _block(block, BLOCK_N)
        c_tile = _load(c, tokens, ranks, n_tokens, rank, rank, 1)
        if GATED:
            c_tile = _gate(c_tile, tl.load(v_threshold), tl.load(tau))
        x_tile = _load(x, features, tokens, n_features, n_tokens, x_m, x_n)
        total = tl.dot(x_tile, c_tile, total, input_precision=PRECISION)
    out += tl.cast(split, tl.int64) * n_features * rank
    _store(out, scaling * total, features, ranks, n_features, rank, out_m, out_r)


@triton.jit(do_not_specialize=["n_tokens", "span"])
def _contract_tokens(
    x, grad_a, grad_A, grad_y, a, grad_B, v_threshold, tau, x_n, x_m, y_n, y_m, in_features, out_features, rank,
    n_tokens, span, scale, scaling,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION_A: tl.constexpr,
    PRECISION_B: tl.constexpr,
):  # fmt: skip
    """`grad_A[s] (r, in) = scale * grad_a.T @ x` and `grad_B[s] (out, r) = scaling * grad_y.T @ gated`, of span s.

    Each is computed if it is given; the programs of the first come before those of the second.
    """
    index = tl.program_id(0)
    blocks_A = 0
    if grad_A is not None:
        blocks_A = tl.cdiv(in_features, BLOCK_M) * tl.cdiv(rank, BLOCK_R)
        if index < blocks_A:
            _token_sum(
                x, grad_a, grad_A, v_threshold, tau, x_n, x_m, 1, in_features, n_tokens, in_features, rank, span, index,
                scale, False, BLOCK_N, BLOCK_M, BLOCK_R, PRECISION_A,
            )  # fmt: skip
    if grad_B is not None:  # noqa: SIM102
        if index >= blocks_A:
            _token_sum(
                grad_y, a, grad_B, v_threshold, tau, y_n, y_m, rank, 1, n_tokens, out_features, rank, span,
                index - blocks_A, scaling, True, BLOCK_N, BLOCK_M, BLOCK_R, PRECISION_B,
            )  # fmt: skip


def add_adapter_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, v_threshold: Tensor, tau: Tensor, scale: float, scaling: float,
    need_a: bool,
) -> Tensor | None:  # fmt: skip
    """Add the adapter in place, `y (N, out) += scaling * gated @ B.T`; returns `a = scale * x (N, in) @ A.T` if needed.

    `A (r, in)` and `B (out, r)` have one dtype, which is that of `a (N, r)`; `gated` is `a` where
    `a / tau >= v_threshold`, compared in float32, and 0 elsewhere.
    """
    if not y.get_device() == A.get_device() == B.get_device() == v_threshold.get_device() == tau.get_device():
        # A kernel that reads the memory of another device ends the process.
        devices = " and ".join(sorted({str(t.device) for t in (y, A, B, v_threshold, tau)}))
        raise SpikeLoraError(f"A layer and its adapter are on {devices}. Put the whole model on one device.")
    with _on_device_of(y):
        a = A.new_empty((x.shape[0], A.shape[0])) if need_a else None
        partials = _partial_sums(x, A, A.shape[0], A.stride())
        _expand_add_(y, partials, a, None, B, B.stride()[::-1], v_threshold, tau, None, scale, scaling, 0.0, False)
    return a


def adapter_backward(
    grad_y: Tensor, grad_x: Tensor | None, x: Tensor | None, a: Tensor, A: Tensor, B: Tensor, v_threshold: Tensor,
    tau: Tensor, surrogate_alpha: float, straight_through: bool, scale: float, scaling: float, needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of `add_adapter_` by A, B, v_threshold and tau; None for those that `needs` leaves out.

    Adds the gradient by x into `grad_x (N, in)` if it is given. With the ATan surrogate `s'(u)` at
    `u = a / tau - v_threshold`, `g = scaling * grad_y (N, out) @ B` and `grad_v = g * a * s'(u)`:

        grad_a (N, r)          = g * spikes + grad_v / tau, straight through g * (spikes + (1 - spikes) * w(u))
        grad_x (N, in)        += scale * grad_a @ A
        grad_A (r, in)         = scale * grad_a.T @ x
        grad_B (out, r)        = scaling * grad_y.T @ gated
        grad_v_threshold (1,)  = -sum(grad_v)
        grad_tau (1,)          = -sum(grad_v * a / tau ** 2)
    """
    need_A, need_B, need_v_threshold, need_tau = needs
    grad_A = grad_B = grad_a = sums = None
    a = a.contiguous()
    with _on_device_of(grad_y):
        if need_v_threshold or need_tau:
            blocks = [_cdiv(size, block) for size, block in zip(a.shape, _blocks(*a.shape), strict=True)]
            sums = v_threshold.new_empty((2, blocks[0] * blocks[1]))
        if need_A or grad_x is not None or sums is not None:
            grad_a = a.new_empty(a.shape)
            partials = _partial_sums(grad_y, B, B.shape[1], B.stride()[::-1])
            y = grad_a[:, :0] if grad_x is None else grad_x  # no columns if nobody needs the product
            neuron = v_threshold, tau, sums
            _expand_add_(
                y, partials, grad_a, a, A, A.stride(), *neuron, scaling, scale, surrogate_alpha, straight_through
            )
        if need_A or need_B:
            x = x if need_A else None
            grad_A, grad_B = _token_sums(x, grad_a, grad_y, a, need_B, v_threshold, tau, scale, scaling)
    if sums is None:
        return grad_A, grad_B, None, None
    totals = sums.sum(1, keepdim=True)
    return grad_A, grad_B, totals[0] if need_v_threshold else None, totals[1] if need_tau else None


def _partial_sums(x: Tensor, W: Tensor, rank: int, w_strides: tuple[int, ...]) -> Tensor:
    """Partial sums `(splits, N, r)` in float32 of `x (N, M) @ W (r, M).T`, W by its strides in that order."""
    n_tokens, n_features = x.shape
    grid, span, constants = _features_by_spans(n_tokens, n_features, rank, x.dtype, W.dtype)
    partials = x.new_empty((grid[1], n_tokens, rank), dtype=torch.float32)
    _start(
        _contract_features, grid, (x, W, partials), (*x.stride(), *w_strides, n_features, rank), (n_tokens, span),
        constants, (x.dtype, W.dtype),
        num_stages=_stages(x.dtype, W.dtype),
    )  # fmt: skip
    return partials


def _expand_add_(
    y: Tensor, partials: Tensor, out: Tensor | None, a: Tensor | None, W: Tensor, w_strides: tuple[int, ...],
    v_threshold: Tensor, tau: Tensor, sums: Tensor | None, scale: float, scaling: float, surrogate_alpha: float,
    straight_through: bool,
) -> None:  # fmt: skip
    """`y (N, M) += scaling * c @ W (r, M)` in place, `c` as `_expand_add` makes it: backward if `a` is given."""
    (n_tokens, n_features), (splits, _, rank) = y.shape, partials.shape
    grid, constants = _tokens_by_features(n_tokens, n_features, rank, a is not None, straight_through, W.dtype)
    _start(
        _expand_add, grid, (y, partials, out, a, W, v_threshold, tau, sums),
        (*y.stride(), *w_strides, n_features, rank),
        (n_tokens, splits, float(scale), float(scaling), float(surrogate_alpha)), constants,
        (y.dtype, W.dtype, out is None, sums is None),
        num_stages=1,  # most ranks are one block: there is nothing to load ahead
    )  # fmt: skip


def _token_sums(
    x: Tensor | None, grad_a: Tensor | None, grad_y: Tensor, a: Tensor, need_B: bool, v_threshold: Tensor, tau: Tensor,
    scale: float, scaling: float,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """`grad_A (r, in)` if x is given, and `grad_B (out, r)` if needed."""
    (n_tokens, out_features), rank = grad_y.shape, a.shape[1]
    (in_features, x_dtype, strides) = (0, a.dtype, (0, 0)) if x is None else (x.shape[1], x.dtype, x.stride())
    columns = in_features, out_features if need_B else 0
    grid, span, constants = _tokens_by_spans(n_tokens, columns, rank, x_dtype, grad_y.dtype, a.dtype)
    # Split sums are added up by torch, in float32.
    dtype, splits = (a.dtype, ()) if grid[1] == 1 else (torch.float32, (grid[1],))
    A = a.new_empty((*splits, rank, in_features), dtype=dtype) if x is not None else None
    B = a.new_empty((*splits, out_features, rank), dtype=dtype) if need_B else None
    _start(
        _contract_tokens, grid, (x, grad_a, A, grad_y, a, B, v_threshold, tau),
        (*strides, *grad_y.stride(), in_features, out_features, rank),
        (n_tokens, span, float(scale), float(scaling)), constants,
        (x_dtype, grad_y.dtype, a.dtype, dtype, A is None, B is None, grad_a is None),
        num_stages=min(_stages(x_dtype, a.dtype), _stages(grad_y.dtype, a.dtype)),
    )  # fmt: skip
    if splits:
        A = None if A is None else A.sum(0).to(a.dtype)
        B = None if B is None else B.sum(0).to(a.dtype)
    return A, B


_compiled: dict[tuple[Any, ...], Any] = {}


def _start(
    kernel: Any, grid: tuple[int, int], tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...],
    numbers: tuple[Any, ...], constants: tuple[Any, ...], kinds: tuple[Any, ...], **options: int,
) -> None:  # fmt: skip
    """Launch a kernel on the current device.

    Triton's own launch looks at every argument to find the compiled kernel, which takes longer than most kernels run.
    Here the compiled kernel is kept by all that it depends on: the `sizes`, for which a kernel is specialised, the
    constants, and the `kinds` of the tensors, which are their dtypes and which of them are None. It does not depend on
    the `numbers`, whose types are always the same. Pointers that are not aligned to 16 bytes are rare; they take
    Triton's own launch.
    """
    if not isinstance(kernel, triton.JITFunction):  # it is interpreted
        kernel[grid](*tensors, *sizes, *numbers, *constants)
        return
    pointers: list[int | None] = []
    bits, device = 0, -1
    for tensor in tensors:
        if tensor is None:
            pointers.append(None)
        else:
            pointer = tensor.data_ptr()
            pointers.append(pointer)
            bits |= pointer
            if device < 0:
                device = tensor.get_device()
    key = (kernel.fn, device, sizes, constants, kinds)
    found = None if bits % 16 else _compiled.get(key)
    if found is None:
        made = kernel[grid](*tensors, *sizes, *numbers, *constants, **options)
        if not bits % 16:
            _compiled[key] = made.run, made.function, made.packed_metadata, made  # triton 3.8 unloads what is freed
        return
    run, function, metadata, _ = found
    stream = driver.active.get_current_stream(device)
    run(*grid, 1, stream, function, metadata, None, None, None, *pointers, *sizes, *numbers, *constants)


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which the device of x is the current one; checking first is faster than entering one."""
    return nullcontext() if not x.is_cuda or x.get_device() == torch.cuda.current_device() else torch.cuda.device_of(x)


# How a launch is cut into programs, and its constants, by its sizes. The same few sizes come again and again.
@functools.lru_cache(maxsize=4096)
def _features_by_spans(
    n_tokens: int, n_features: int, rank: int, left: torch.dtype, right: torch.dtype
) -> tuple[tuple[int, int], int, tuple[Any, ...]]:
    block_n, block_r = _blocks(n_tokens, rank)
    programs = _cdiv(n_tokens, block_n) * _cdiv(rank, block_r)
    splits, span = _spans(n_features, BLOCK, programs)
    return (programs, splits), span, (block_n, BLOCK, block_r, _precision(left, right))


@functools.lru_cache(maxsize=4096)
def _tokens_by_features(
    n_tokens: int, n_features: int, rank: int, backward: bool, straight_through: bool, dtype: torch.dtype
) -> tuple[tuple[int, int], tuple[Any, ...]]:
    block_n, block_r = _blocks(n_tokens, rank)
    grid = _cdiv(n_tokens, block_n), max(1, _cdiv(n_features, WIDE_BLOCK))  # `out` is written even without features
    return grid, (backward, straight_through, block_n, WIDE_BLOCK, block_r, _precision(dtype, dtype))


@functools.lru_cache(maxsize=4096)
def _tokens_by_spans(
    n_tokens: int, columns: tuple[int, int], rank: int, x: torch.dtype, y: torch.dtype, a: torch.dtype
) -> tuple[tuple[int, int], int, tuple[Any, ...]]:
    block_n, block_r = _blocks(n_tokens, rank)
    programs = (_cdiv(columns[0], BLOCK) + _cdiv(columns[1], BLOCK)) * _cdiv(rank, block_r)
    splits, span = _spans(n_tokens, block_n, programs)
    return (programs, splits), span, (block_n, BLOCK, block_r, _precision(x, a), _precision(y, a))


def _precision(left: torch.dtype, right: torch.dtype) -> str:
    """The `input_precision` of `tl.dot` for float32 tiles from such tensors, at which it loses next to nothing.

    The host passes it on, because in triton 3.6 a jitted function cannot return a string.
    """
    # Three products of TF32 parts are nearly float32, and run on tensor cores; one TF32 holds any float16 or bfloat16.
    return "tf32x3" if torch.float32 in (left, right) else "tf32"


def _stages(left: torch.dtype, right: torch.dtype) -> int:
    """How many blocks are loaded ahead: three, or two if both are float32, for which triton 3.8 takes more memory.

    Three took 112 KB there at rank 64; a block has 99 KB on cards of compute capability 8.6 and 8.9.
    """
    return 2 if left == right == torch.float32 else 3


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)


def _blocks(n_tokens: int, rank: int) -> tuple[int, int]:
    """Sizes of the blocks of tokens and of ranks."""
    size = min(BLOCK, max(SMALL_BLOCK, 1 << (rank - 1).bit_length()))
    return SMALL_BLOCK if n_tokens <= SMALL_BLOCK else BLOCK, size


def _spans(length: int, block: int, programs: int) -> tuple[int, int]:
    """How many spans `length` is cut into if each span takes `programs` programs, and their length in blocks."""
    splits = max(1, min(_cdiv(PROGRAMS, max(programs, 1)), _cdiv(length, MIN_SPAN), MAX_SPANS))
    span = max(1, _cdiv(_cdiv(length, splits), block))
    return max(1, _cdiv(length, span * block)), span
