"""The products of a spiking adapter as Triton kernels: the gate happens inside them and no `gated` reaches memory.

The five products have three shapes, hence three kernels over tokens N, features M and ranks r. Two of them contract a
long axis: the axis is cut into spans so that a few tokens still fill a GPU, every span has its own partial sum, and a
fourth kernel adds these in a fixed order. Nothing is added atomically, so that training can be repeated to the bit.
"""

import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

# Block sizes are fixed rather than tuned: another choice would be another order of summation.
BLOCK = 64
SMALL_BLOCK = 16  # the smallest that tl.dot takes
# A kernel that contracts gets about so many programs, by cutting into spans no shorter than MIN_SPAN.
PROGRAMS = 256
MIN_SPAN = 256


def can_start() -> bool:
    """Whether Triton can start here; where it cannot, a warning says why."""
    try:
        driver.active.get_current_target()  # compiles a part of Triton, for which many an image has no compiler
    except Exception as error:
        warnings.warn(
            f"Triton cannot start, so that adapters take plain torch, which is slower: {error}. It needs a C compiler "
            "(`CC`, or gcc on the path) and Python's headers.",
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

    The product tells the compiler that they begin at a multiple of SIZE, without which it loads element by element.
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
def _gate_backward(grad, a, v_threshold, tau, surrogate_alpha):
    """Gradients of `a` and `v` from the one of `gated`, and the finite part of `a`."""
    HALF_PI: tl.constexpr = 1.5707963267948966
    v = _charge(a, tau)
    slope = HALF_PI * surrogate_alpha * (v - v_threshold)
    # As a goes to infinity a * s'(u) goes to 0, which inf * 0 would miss.
    finite_a = tl.where(tl.abs(a) == float("inf"), 0.0, a)
    grad_v = grad * finite_a * (0.5 * surrogate_alpha / (1 + slope * slope))
    grad_a = grad * (v >= v_threshold).to(tl.float32) + grad_v / tau
    return grad_a, grad_v, finite_a


@triton.jit(do_not_specialize=["n_tokens", "span"])
def _contract_features(
    x, x_n, x_m, W, w_r, w_m, partials, n_tokens, n_features, rank, span,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
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


@triton.jit(do_not_specialize=["n_tokens"])
def _expand_add(
    y, y_n, y_m, a, a_n, a_r, W, w_r, w_m, v_threshold, tau, scaling, n_tokens, n_features, rank,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`y (N, M) += scaling * a (N, r) @ W (r, M)`, with `a` gated where a neuron is given."""
    tokens = _block(tl.program_id(0), BLOCK_N)
    features = _block(tl.program_id(1), BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(tl.cdiv(rank, BLOCK_R)):
        ranks = _block(block, BLOCK_R)
        a_tile = _load(a, tokens, ranks, n_tokens, rank, a_n, a_r)
        if tau is not None:
            a_tile = _gate(a_tile, tl.load(v_threshold), tl.load(tau))
        W_tile = _load(W, ranks, features, rank, n_features, w_r, w_m)
        total = tl.dot(a_tile, W_tile, total, input_precision=PRECISION)
    y_tile = _load(y, tokens, features, n_tokens, n_features, y_n, y_m)
    _store(y, y_tile + scaling * total, tokens, features, n_tokens, n_features, y_n, y_m)


@triton.jit(do_not_specialize=["n_tokens", "span"])
def _contract_tokens(
    x, x_n, x_m, a, a_n, a_r, partials, v_threshold, tau, n_tokens, n_features, rank, span,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`partials[s] (M, r) = x (N, M).T @ a (N, r)` over the tokens of span s, `a` gated where a neuron is given."""
    rank_blocks = tl.cdiv(rank, BLOCK_R)
    features = _block(tl.program_id(0) // rank_blocks, BLOCK_M)
    ranks = _block(tl.program_id(0) % rank_blocks, BLOCK_R)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for block in range(split * span, min((split + 1) * span, tl.cdiv(n_tokens, BLOCK_N))):
        tokens = _block(block, BLOCK_N)
        a_tile = _load(a, tokens, ranks, n_tokens, rank, a_n, a_r)
        if tau is not None:
            a_tile = _gate(a_tile, tl.load(v_threshold), tl.load(tau))
        x_tile = _load(x, features, tokens, n_features, n_tokens, x_m, x_n)
        total = tl.dot(x_tile, a_tile, total, input_precision=PRECISION)
    partials += tl.cast(split, tl.int64) * n_features * rank
    _store(partials, total, features, ranks, n_features, rank, rank, 1)


@triton.jit(do_not_specialize=["n_rows", "splits"])
def _add_partials(
    partials, splits, scaling, out, out_n, out_r, a, a_n, a_r, v_threshold, tau, surrogate_alpha, sums, n_rows, rank,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`out (rows, r) = scaling * sum_s partials[s] (rows, r)`, taken through the gate's backward where `a` is given.

    `sums (2, programs)` get this program's share of the gradients of v_threshold and tau.
    """
    rank_blocks = tl.cdiv(rank, BLOCK_R)
    rows = _block(tl.program_id(0) // rank_blocks, BLOCK_N)
    ranks = _block(tl.program_id(0) % rank_blocks, BLOCK_R)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for split in range(splits):
        partial = partials + tl.cast(split, tl.int64) * n_rows * rank
        total += _load(partial, rows, ranks, n_rows, rank, rank, 1)
    total = scaling * total
    if a is not None:
        tau_value = tl.load(tau)
        a_tile = _load(a, rows, ranks, n_rows, rank, a_n, a_r)
        total, grad_v, finite_a = _gate_backward(total, a_tile, tl.load(v_threshold), tau_value, surrogate_alpha)
        if sums is not None:
            tl.store(sums + tl.program_id(0), -tl.sum(grad_v))
            tl.store(sums + tl.num_programs(0) + tl.program_id(0), -tl.sum(grad_v * finite_a) / (tau_value * tau_value))
    _store(out, total, rows, ranks, n_rows, rank, out_n, out_r)


def _blocks(n_tokens: int, rank: int) -> tuple[int, int]:
    """Sizes of the blocks of tokens and of ranks."""
    size = min(BLOCK, max(SMALL_BLOCK, triton.next_power_of_2(rank)))
    return SMALL_BLOCK if n_tokens <= SMALL_BLOCK else BLOCK, size


def _spans(length: int, block: int, programs: int) -> tuple[int, int]:
    """Number of the spans that `length` is cut into where each takes `programs` of them, and their length in blocks."""
    splits = max(1, min(triton.cdiv(PROGRAMS, max(programs, 1)), triton.cdiv(length, MIN_SPAN)))
    span = max(1, triton.cdiv(triton.cdiv(length, splits), block))
    return max(1, triton.cdiv(length, span * block)), span


def _precision(left: Tensor, right: Tensor) -> str:
    """How `tl.dot` takes float32 tiles that were loaded from `left` and `right`, so that it loses next to nothing.

    The host hands it over, as triton 3.6 takes no string back from a jitted function.
    """
    # Three products of TF32 parts are nearly float32, and on tensor cores; one TF32 holds any float16 or bfloat16.
    return "tf32x3" if torch.float32 in (left.dtype, right.dtype) else "tf32"


def _features_to_ranks(x: Tensor, W: Tensor) -> Tensor:
    """Partial sums `(splits, N, r)` in float32 of `x (N, M) @ W (r, M).T`."""
    (n_tokens, n_features), rank = x.shape, W.shape[0]
    block_n, block_r = _blocks(n_tokens, rank)
    programs = triton.cdiv(n_tokens, block_n) * triton.cdiv(rank, block_r)
    splits, span = _spans(n_features, BLOCK, programs)
    partials = torch.empty((splits, n_tokens, rank), dtype=torch.float32, device=x.device)
    _contract_features[(programs, splits)](
        x, *x.stride(), W, *W.stride(), partials, n_tokens, n_features, rank, span,
        BLOCK_N=block_n, BLOCK_M=BLOCK, BLOCK_R=block_r, PRECISION=_precision(x, W),
    )  # fmt: skip
    return partials


def _expand_add_(
    y: Tensor, a: Tensor, W: Tensor, v_threshold: Tensor | None, tau: Tensor | None, scaling: float
) -> None:
    """`y (N, M) += scaling * a (N, r) @ W (r, M)` in place, `a` gated where a neuron is given."""
    (n_tokens, n_features), rank = y.shape, a.shape[1]
    block_n, block_r = _blocks(n_tokens, rank)
    _expand_add[(triton.cdiv(n_tokens, block_n), triton.cdiv(n_features, BLOCK))](
        y, *y.stride(), a, *a.stride(), W, *W.stride(), v_threshold, tau, scaling, n_tokens, n_features, rank,
        BLOCK_N=block_n, BLOCK_M=BLOCK, BLOCK_R=block_r, PRECISION=_precision(a, W),
        num_stages=1,  # most ranks are one block: there is nothing to load ahead
    )  # fmt: skip


def _tokens_to_weight(
    x: Tensor, a: Tensor, v_threshold: Tensor | None, tau: Tensor | None, scaling: float, out: Tensor
) -> None:
    """`out (M, r) = scaling * x (N, M).T @ a (N, r)`, `a` gated where a neuron is given."""
    (n_tokens, n_features), rank = x.shape, a.shape[1]
    block_n, block_r = _blocks(n_tokens, rank)
    programs = triton.cdiv(n_features, BLOCK) * triton.cdiv(rank, block_r)
    splits, span = _spans(n_tokens, block_n, programs)
    partials = torch.empty((splits, n_features, rank), dtype=torch.float32, device=x.device)
    _contract_tokens[(programs, splits)](
        x, *x.stride(), a, *a.stride(), partials, v_threshold, tau, n_tokens, n_features, rank, span,
        BLOCK_N=block_n, BLOCK_M=BLOCK, BLOCK_R=block_r, PRECISION=_precision(x, a),
    )  # fmt: skip
    _sum_partials(partials, scaling, out)


def _sum_partials(
    partials: Tensor,
    scaling: float,
    out: Tensor,
    neuron: tuple[Tensor, Tensor, Tensor, float] | None = None,
    need_sums: bool = False,
) -> Tensor | None:
    """`out (rows, r) = scaling * partials.sum(0)`, taken through the gate's backward where a neuron is given.

    Returns, if needed, `sums (2, programs)`: their sums over programs are the gradients of v_threshold and tau.
    """
    splits, n_rows, rank = partials.shape
    block_n, block_r = _blocks(n_rows, rank)
    programs = triton.cdiv(n_rows, block_n) * triton.cdiv(rank, block_r)
    sums = torch.empty((2, programs), dtype=torch.float32, device=out.device) if need_sums else None
    a, v_threshold, tau, surrogate_alpha = neuron or (None, None, None, 0.0)
    _add_partials[(programs,)](
        partials, splits, scaling, out, *out.stride(), a, *(a.stride() if a is not None else (0, 0)),
        v_threshold, tau, surrogate_alpha, sums, n_rows, rank, BLOCK_N=block_n, BLOCK_R=block_r,
    )  # fmt: skip
    return sums


def down(x: Tensor, A: Tensor) -> Tensor:
    """Low-rank activation `a (N, r) = x (N, in) @ A (r, in).T`, in the dtype of A."""
    with torch.cuda.device_of(x):
        a = torch.empty((x.shape[0], A.shape[0]), dtype=A.dtype, device=x.device)
        _sum_partials(_features_to_ranks(x, A), 1.0, a)
    return a


def add_up_(y: Tensor, a: Tensor, B: Tensor, v_threshold: Tensor, tau: Tensor, scaling: float) -> None:
    """Add the gated update in place, `y (N, out) += scaling * gated @ B (out, r).T`.

    `gated = a (N, r)` where `a / tau >= v_threshold`, compared in float32, and 0 elsewhere.
    """
    with torch.cuda.device_of(y):
        _expand_add_(y, a, B.T, v_threshold, tau, scaling)


def up_backward(
    grad_y: Tensor,
    a: Tensor,
    B: Tensor,
    v_threshold: Tensor,
    tau: Tensor,
    surrogate_alpha: float,
    scaling: float,
    need_B: bool,
    need_v_threshold: bool,
    need_tau: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `add_up_`, with the ATan surrogate `s'(u)` at `u = a / tau - v_threshold` for the step's derivative.

    With `g = scaling * grad_y (N, out) @ B (out, r)` and `grad_v = g * a * s'(u)`:

        grad_a (N, r)          = g * spikes + grad_v / tau
        grad_B (out, r)        = scaling * grad_y.T @ gated
        grad_v_threshold (1,)  = -sum(grad_v)
        grad_tau (1,)          = -sum(grad_v * a / tau ** 2)
    """
    grad_B = grad_v_threshold = grad_tau = None
    with torch.cuda.device_of(grad_y):
        grad_a = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        neuron = (a, v_threshold, tau, surrogate_alpha)
        sums = _sum_partials(_features_to_ranks(grad_y, B.T), scaling, grad_a, neuron, need_v_threshold or need_tau)
        if need_B:
            grad_B = torch.empty(B.shape, dtype=B.dtype, device=B.device)
            _tokens_to_weight(grad_y, a, v_threshold, tau, scaling, grad_B)
        if sums is not None and need_v_threshold:
            grad_v_threshold = sums[0].sum(0, keepdim=True)
        if sums is not None and need_tau:
            grad_tau = sums[1].sum(0, keepdim=True)
    return grad_a, grad_B, grad_v_threshold, grad_tau


def down_backward_A(grad_a: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weight of `down`: `grad_A (r, in) = grad_a (N, r).T @ x (N, in)`, in the dtype of grad_a."""
    with torch.cuda.device_of(x):
        grad_A = torch.empty((grad_a.shape[1], x.shape[1]), dtype=grad_a.dtype, device=x.device)
        _tokens_to_weight(x, grad_a, None, None, 1.0, grad_A.T)
    return grad_A


def add_down_backward_x_(grad_x: Tensor, grad_a: Tensor, A: Tensor) -> None:
    """Add the gradient of the input of `down` in place: `grad_x (N, in) += grad_a (N, r) @ A (r, in)`."""
    with torch.cuda.device_of(grad_x):
        _expand_add_(grad_x, grad_a, A, None, None, 1.0)
