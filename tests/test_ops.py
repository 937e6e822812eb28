"""The fast functions of the gated layer against the oracle, by value: outputs and all gradients."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spikelora.method.neuron import spike_gate
from spikelora.method.ops import frozen, linear, torch_backend
from spikelora.method.ops.adapter import Adapter
from spikelora.method.ops.linear import spike_branch, spike_linear

ALPHA, SCALING = 2.0, 1.5
STRAIGHT_THROUGH = False
LEAVES = ("x", "bias", "A", "B", "v_threshold", "tau")


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Uninitialised memory holds NaN, so that a value which nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def tensors(tokens, features, out, r, dtype=torch.float32, adapter_dtype=None):
    """Operands of one layer by their symbols, with an adapter whose gate is open about half the time."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "x": randn(*tokens, features),
        "weight": randn(out, features) / math.sqrt(features),
        "bias": randn(out),
        "A": randn(r, features) / math.sqrt(features),
        "B": randn(out, r) / math.sqrt(r),
    }
    neuron = {"v_threshold": torch.tensor([0.1]), "tau": torch.tensor([2.0])}
    made = {name: t.to((adapter_dtype or dtype) if name in "AB" else dtype) for name, t in made.items()}
    return made | neuron


@pytest.fixture(params=[False, True], ids=["surrogate", "straight through"])
def straight_through(request, monkeypatch):
    """A test with both gradients of the gate."""
    monkeypatch.setattr(sys.modules[__name__], "STRAIGHT_THROUGH", request.param)


both_gradients = pytest.mark.usefixtures("straight_through")


def oracle(t, dropout_mask=None, kept=1.0):
    """The layer through the reference neuron, each product by itself, in the adapter's dtype as PEFT casts it."""
    x = t["x"].to(t["A"].dtype)
    if dropout_mask is not None:
        x = x * dropout_mask / kept
    gated = spike_gate(x @ t["A"].T, t["v_threshold"], t["tau"], ALPHA, STRAIGHT_THROUGH)
    base = F.linear(t["x"], t["weight"], t["bias"])
    return (base + SCALING * (gated @ t["B"].T)).to(base.dtype)


def adapter_of(t, dropout=0.0):
    return Adapter(t["A"], t["B"], t["v_threshold"], t["tau"], ALPHA, STRAIGHT_THROUGH, SCALING, dropout)


def fused(t, dropout=0.0):
    return spike_linear(t["x"], t["weight"], t["bias"], adapter_of(t, dropout))


def branch(t, dropout=0.0):
    return spike_branch(F.linear(t["x"], t["weight"], t["bias"]), t["x"], adapter_of(t, dropout), in_place=False)


def branch_in_place(t, dropout=0.0):
    return spike_branch(F.linear(t["x"], t["weight"], t["bias"]), t["x"], adapter_of(t, dropout), in_place=True)


def gate(a, v_threshold, tau):
    return torch_backend._select(a, torch_backend._charge(a, tau) >= v_threshold)


PATHS = [fused, branch, branch_in_place]


def run(function, t, leaves=LEAVES, **kwargs):
    """Output and gradients by symbol, of a weighted sum of the output."""
    t = {name: v.detach().requires_grad_() if name in leaves else v for name, v in t.items()}
    y = function(t, **kwargs)
    w = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, [t[name] for name in leaves], w) if leaves else ()
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def assert_same(actual, expected, rtol, atol):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol * scale, msg=lambda m, n=name: f"{n}: {m}")


@both_gradients
@pytest.mark.parametrize(
    ("tokens", "r"),
    [
        *(((33,), r) for r in (1, 7, 8, 63)),
        ((1,), 8),
        ((1,), 1),
        ((0,), 63),
        ((2, 5), 7),
        ((2, 0), 8),
        ((1, 1, 3), 8),
        ((), 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", PATHS)
def test_float32(path, tokens, r):
    t = tensors(tokens, 37, 20, r)
    expected = run(oracle, {name: v.double() for name, v in t.items()})
    expected = {name: v.float() for name, v in expected.items()}
    assert_same(run(path, t), expected, rtol=1e-5, atol=3e-6)


@both_gradients
@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 0), (3, 1, 2), (128,), (129,)], ids=str)
def test_few_tokens_with_fixed_numbers(tokens, monkeypatch):
    taken, inner = [], linear.UsualLinear.apply
    monkeypatch.setattr(linear.UsualLinear, "apply", lambda *operands: taken.append(operands) or inner(*operands))
    t, leaves = tensors(tokens, 37, 20, 8), ("x", "bias", "A", "B")
    expected = run(oracle, {name: v.double() for name, v in t.items()}, leaves)
    actual = run(fused, t, leaves)
    assert [number is not None for *_, number, _ in taken] == [math.prod(tokens) <= 128]
    assert_same(actual, {name: v.float() for name, v in expected.items()}, rtol=1e-5, atol=3e-6)


@both_gradients
@pytest.mark.parametrize(("n_tokens", "n_threads", "r"), [(128, 1, 8), (128, 2, 8), (256, 2, 1), (389, 3, 63)])
@pytest.mark.parametrize("path", PATHS)
def test_many_tokens_on_several_threads(path, n_tokens, n_threads, r, monkeypatch):
    split, inner = [], torch_backend._split_sum
    monkeypatch.setattr(torch_backend, "_split_sum", lambda x, c: split.append(x.shape) or inner(x, c))
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    t = tensors((n_tokens,), 384, 128, r)
    expected = {name: v.float() for name, v in run(oracle, {name: v.double() for name, v in t.items()}).items()}
    assert_same(run(path, t), expected, rtol=1e-5, atol=3e-6)
    assert split == ([(n_tokens, 128), (n_tokens, 384)] if n_threads > 1 else [])


@both_gradients
@pytest.mark.parametrize("path", PATHS)
def test_float64(path):
    t = tensors((40,), 30, 20, 8, torch.float64)
    assert_same(run(path, t), run(oracle, t), rtol=1e-12, atol=1e-12)


@both_gradients
@pytest.mark.parametrize(
    ("dtype", "tokens", "block"),
    [
        (torch.bfloat16, (1,), 2**18),
        (torch.float16, (0,), 100),
        (torch.bfloat16, (2, 60), 2**18),
        (torch.float16, (2, 60), 2**18),
        (torch.bfloat16, (2, 60), 100),
        (torch.float16, (2, 60), 100),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", PATHS)
def test_float32_adapter_beside_a_half_precision_base(path, dtype, tokens, block, monkeypatch):
    monkeypatch.setattr(torch_backend, "_BLOCK", block)  # of three rows, too
    t = tensors(tokens, 37, 20, 8, dtype, torch.float32)
    actual, expected = run(path, t), run(oracle, t)
    # The adapter's own gradients stay float32, from the same half-precision tensors; the rest is rounded once or twice.
    assert_same({n: actual[n] for n in "AB"}, {n: expected[n] for n in "AB"}, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    assert_same(actual, expected, rtol=2 * eps, atol=eps)


@both_gradients
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_half_precision_adapter(path, dtype):
    t = tensors((3, 40), 37, 20, 8, dtype)
    eps = torch.finfo(dtype).eps
    assert_same(run(path, t), run(oracle, t), rtol=4 * eps, atol=2 * eps)


@both_gradients
@pytest.mark.parametrize("path", PATHS)
def test_dropout_falls_once_on_the_input_and_its_mask_serves_the_backward(path):
    t = tensors((2, 9), 37, 20, 8)
    torch.manual_seed(3)
    kept = F.dropout(torch.ones(2, 9, 37), 0.3) > 0  # the same numbers as nn.Dropout draws for x
    assert 0.5 < kept.float().mean() < 0.9
    torch.manual_seed(3)
    actual = run(path, t, dropout=0.3)
    assert_same(actual, run(oracle, t, dropout_mask=kept, kept=0.7), rtol=1e-5, atol=3e-6)


@both_gradients
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_dropout_beside_a_half_precision_base_rounds_no_activation(path, dtype):
    t = tensors((2, 9), 37, 20, 8, dtype, torch.float32)
    torch.manual_seed(3)
    kept = F.dropout(torch.ones(2, 9, 37, dtype=dtype), 0.3) > 0
    torch.manual_seed(3)
    actual = run(path, t, dropout=0.3)
    expected = run(oracle, t, dropout_mask=kept, kept=0.7)
    own = ("A", "B", "v_threshold", "tau")
    assert_same({name: actual[name] for name in own}, {name: expected[name] for name in own}, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    assert_same(actual, expected, rtol=2 * eps, atol=2 * eps)


@both_gradients
@pytest.mark.parametrize("path", PATHS)
def test_without_a_bias_or_with_an_expanded_gradient(path):
    t = tensors((2, 5), 37, 20, 8) | {"bias": None}
    leaves = tuple(name for name in LEAVES if name != "bias")

    def summed(function):
        made = {name: v.detach().requires_grad_() if name in leaves else v for name, v in t.items()}
        return dict(zip(leaves, torch.autograd.grad(function(made).sum(), [made[n] for n in leaves]), strict=True))

    assert_same(summed(path), summed(oracle), rtol=1e-5, atol=1e-5)


@both_gradients
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t[:, :1].expand_as(t),
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    ],
    ids=["batch second", "strided", "expanded", "features first"],
)
@pytest.mark.parametrize("path", PATHS)
def test_memory_layout_does_not_matter(path, view):
    t = tensors((4, 6), 37, 20, 8)
    t["x"] = view(t["x"])
    assert not t["x"].is_contiguous()
    expected = run(oracle, t | {"x": t["x"].contiguous()})
    transposed = {name: t[name].T.contiguous().T for name in ("weight", "A", "B")}
    assert_same(run(path, t), expected, rtol=1e-5, atol=3e-6)
    assert_same(run(path, t | transposed), expected, rtol=1e-5, atol=3e-6)


@both_gradients
@pytest.mark.parametrize(
    ("needed", "dropout"),
    [
        *(((name,), 0.0) for name in LEAVES),
        *(((name,), 0.3) for name in ("x", "A", "tau")),  # the mask falls on x, and through A on the neuron
        ((), 0.3),
        (("A", "B"), 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", PATHS)
def test_each_gradient_by_itself(path, needed, dropout):
    t = tensors((2, 5), 37, 20, 8)
    torch.manual_seed(3)
    # Numbers that are not learned are computed with in another way, whose last digits differ.
    learned = not {"v_threshold", "tau"}.isdisjoint(needed)
    every = run(path, t, LEAVES if learned else ("x", "bias", "A", "B"), dropout=dropout)
    torch.manual_seed(3)
    some = run(path, t, needed, dropout=dropout)
    for name in some:
        torch.testing.assert_close(some[name], every[name], rtol=0, atol=0)


@both_gradients
@pytest.mark.parametrize("path", PATHS)
def test_values_exactly_on_the_threshold_fire(path):
    t = tensors((6,), 4, 20, 4) | {"v_threshold": torch.tensor([0.125])}
    t["A"] = torch.eye(4)
    at = torch.tensor(0.25)  # tau * v_threshold
    below, above = (torch.nextafter(at, torch.tensor(end)) for end in (-1.0, 1.0))
    t["x"] = torch.stack([at, below, above, -at]).expand(6, 4).contiguous()
    assert gate(t["x"], t["v_threshold"], t["tau"])[0].tolist() == [at, 0, above, 0]
    assert_same(run(path, t), run(oracle, t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_is_the_oracle_s_to_the_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.cat([torch.randn(500, 8, generator=generator), torch.tensor([[math.inf, -math.inf, math.nan, 0] * 2])])
    for v_threshold in (-0.2, 0.0, 0.1, 0.3):
        for tau in (1.25, 2.0, 3.0):
            neuron = torch.tensor([v_threshold]), torch.tensor([tau])
            expected = spike_gate(a.to(dtype), *neuron, ALPHA)
            actual = gate(a.to(dtype), *neuron)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_a_threshold_that_is_no_number_opens_no_gate():
    a = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert not gate(a, torch.tensor([math.nan]), torch.tensor([2.0])).any()


@both_gradients
def test_infinite_activations_leave_the_gradients_finite():
    a = torch.tensor([[1.0, -math.inf, 0.3, math.inf]])
    t = tensors((1,), 4, 20, 4)
    grads = torch_backend.up_backward(
        torch.ones(1, 20), a, t["B"], t["v_threshold"], t["tau"], ALPHA, STRAIGHT_THROUGH, SCALING, False, True, True
    )
    leaf, *neuron = (value.detach().requires_grad_() for value in (a, t["v_threshold"], t["tau"]))
    g = SCALING * torch.ones(1, 20) @ t["B"]
    expected = torch.autograd.grad(spike_gate(leaf, *neuron, ALPHA, STRAIGHT_THROUGH), (leaf, *neuron), g)
    assert all(grad.isfinite().all() for grad in expected)
    torch.testing.assert_close((grads[0], *grads[2:]), expected, rtol=1e-6, atol=1e-6)


class TestEvents:
    """Skipping tokens whose gates are all silent."""

    def sparse(self, share, tokens=600, out=500, r=8, dtype=torch.float32):
        """Activations of which the given share of tokens fires, and what they are added to."""
        generator = torch.Generator().manual_seed(0)
        a = torch.rand(tokens, r, generator=generator) + 0.3
        a[torch.randperm(tokens, generator=generator)[round(share * tokens) :]] *= -1
        B = torch.randn(out, r, generator=generator)
        return torch.randn(tokens, out, generator=generator).to(dtype), a, B

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.3, 0.9, 1.0])
    def test_equals_the_dense_product(self, share, dtype):
        y, a, B = self.sparse(share, dtype=dtype)
        neuron = torch.tensor([0.1]), torch.tensor([2.0])
        expected = (y.float() + SCALING * spike_gate(a, *neuron, ALPHA) @ B.T).to(dtype)
        torch_backend.add_up_(y, a, B, *neuron, SCALING)
        torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)

    @pytest.mark.parametrize(("share", "rows"), [(0.0, []), (0.2, [120]), (0.9, [600])])
    def test_only_firing_tokens_are_multiplied(self, share, rows, monkeypatch):
        multiplied = []
        add_product_ = torch_backend._add_product_
        monkeypatch.setattr(
            torch_backend, "_add_product_", lambda y, *args: (multiplied.append(len(y)), add_product_(y, *args))
        )
        y, a, B = self.sparse(share)
        torch_backend.add_up_(y, a, B, torch.tensor([0.1]), torch.tensor([2.0]), SCALING)
        assert multiplied == rows

    @pytest.mark.parametrize("r", [1, 7, 8, 64, 2048])
    def test_firing_tokens_of_any_rank(self, r):
        y, a, _ = self.sparse(0.2, r=r)
        a[0], a[1] = -1, torch.where(torch.arange(r) == r - 1, 1.0, -1.0)
        firing = torch_backend._firing_tokens(y, a, a > 0)
        assert firing.tolist() == (a > 0).any(1).nonzero().squeeze(1).tolist()
        assert 1 in firing
        assert 0 not in firing

    def test_a_token_with_a_nan_is_not_silent(self):
        y, a, B = self.sparse(0.1)
        silent = (a < 0).all(1).nonzero()[0]
        a[silent, 2] = math.nan
        torch_backend.add_up_(y, a, B, torch.tensor([0.1]), torch.tensor([2.0]), SCALING)
        assert y[silent].isnan().all()
        assert y.isnan().any(1).sum() == 1

    def test_small_products_are_not_searched(self):
        assert torch_backend._is_searched(self.sparse(0.0)[0])
        assert not torch_backend._is_searched(self.sparse(0.0, tokens=10)[0])


class Made(TorchDispatchMode):
    """Elements of each tensor with memory of its own that an operation makes."""

    def __init__(self):
        super().__init__()
        self.sizes, self.seen = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen |= {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        results = func(*args, **kwargs or {})
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.seen:
                self.sizes.append(result.numel())
        return results


@both_gradients
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str)
def test_nothing_of_the_output_s_size_is_made_beside_the_output(dtype, adapter_dtype, monkeypatch):
    monkeypatch.setattr(torch_backend, "_BLOCK", 2**10)
    t = tensors((2, 150), 37, 20, 8, dtype, adapter_dtype)
    t = {name: v.requires_grad_() if name in LEAVES else v for name, v in t.items()}
    with Made() as forward:
        y = fused(t)
    grad_y = torch.ones_like(y)
    with Made() as backward:
        y.backward(grad_y)
    assert [size for size in forward.sizes if size > 300 * 8] == [300 * 20]
    assert [size for size in backward.sizes if size > 300 * 8] == [300 * 37]


@both_gradients
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("path", PATHS)
def test_only_x_and_a_and_the_mask_are_saved(path, dropout):
    t = tensors((2, 9), 37, 20, 8, torch.bfloat16, torch.float32)
    t = {name: v.requires_grad_() if name in LEAVES else v for name, v in t.items()}
    known, saved = {v.data_ptr() for v in t.values()}, []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        path(t, dropout=dropout)
    new = [(tuple(s.shape), s.dtype) for s in saved if s.data_ptr() not in known]
    assert new == [((18, 8), torch.float32)] + [((18, 37), torch.bool)] * bool(dropout)


@both_gradients
def test_x_is_not_saved_for_a_frozen_adapter():
    t = tensors((2, 9), 37, 20, 8)
    t["x"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()), lambda tensor: None):
        fused(t)
    assert t["x"].data_ptr() not in saved


@both_gradients
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("path", PATHS)
def test_nothing_waits_for_the_device(path, dropout):
    # Tensors of the meta device have no values: reading one on the host raises, as it would wait on a GPU.
    t = {name: v.to("meta") for name, v in tensors((2, 600), 64, 128, 8, torch.bfloat16, torch.float32).items()}
    for read in (lambda: t["tau"].item(), lambda: t["x"].nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            read()
    results = run_without_values(path, t, dropout=dropout)
    assert [tuple(v.shape) for v in results.values()] == [(2, 600, 64), (128,), (8, 64), (128, 8), (1,), (1,)]


def run_without_values(function, t, **kwargs):
    t = {name: v.requires_grad_() if name in LEAVES else v for name, v in t.items()}
    grads = torch.autograd.grad(function(t, **kwargs).sum(), [t[name] for name in LEAVES])
    return dict(zip(LEAVES, grads, strict=True))


@both_gradients
@pytest.mark.parametrize("path", PATHS)
def test_autocast(path):
    t = tensors((3, 40), 37, 20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = run(path, t), run(autocast_oracle, t)
    assert actual["y"].dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    assert_same(actual, expected, rtol=4 * eps, atol=2 * eps)


def autocast_oracle(t):
    gated = spike_gate(F.linear(t["x"], t["A"]), t["v_threshold"], t["tau"], ALPHA, STRAIGHT_THROUGH)
    return F.linear(t["x"], t["weight"], t["bias"]) + SCALING * F.linear(gated, t["B"])


@both_gradients
@pytest.mark.parametrize("names", [LEAVES, LEAVES[:4]], ids=["learned", "fixed"])
def test_autocast_around_the_backward_alone_changes_nothing(names):
    t = tensors((3, 40), 37, 20, 8)
    leaves = [t[name].requires_grad_() for name in names]
    y = fused(t)
    expected = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_equal(torch.autograd.grad(y.sum(), leaves), expected)


def assert_all_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_triton_is_asked_for_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(linear, "_triton_backend", lambda: pytest.fail("asked"))
    assert linear._backend(torch.ones(1), torch.ones(8, 4)) is torch_backend


@pytest.mark.parametrize(
    ("dtype", "r", "works", "taken"),
    [
        (torch.float64, 8, True, False),
        (torch.float32, 257, True, False),
        (torch.float32, 256, False, False),
        (torch.float32, 256, True, True),
    ],
)
def test_what_triton_cannot_do_goes_through_torch(dtype, r, works, taken, monkeypatch):
    kernels = SimpleNamespace(works=lambda device, T, P, rank: works and (device.type, T, rank) == ("cuda", dtype, r))
    monkeypatch.setattr(linear, "_triton_backend", lambda: kernels)
    with FakeTensorMode():
        y, A = torch.empty(3, 4, dtype=dtype, device="cuda"), torch.empty(r, 4, device="cuda")
        assert linear._backend(y, A) is (kernels if taken else torch_backend)


def test_a_triton_that_cannot_be_imported_is_said_once(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "spikelora.method.ops.triton_backend", raising=False)
    monkeypatch.delattr("spikelora.method.ops.triton_backend", raising=False)
    linear._triton_backend.cache_clear()
    with FakeTensorMode():
        y, A = torch.empty(3, 4, device="cuda"), torch.empty(8, 4, device="cuda")
        with pytest.warns(RuntimeWarning, match="Triton cannot be imported: .* take plain torch"):
            backend = linear._backend(y, A)
        assert backend is linear._backend(y, A) is torch_backend
    linear._triton_backend.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [5, 300])
def test_a_cpu_without_a_product_in_half_precision(monkeypatch, dtype, width):
    generator = torch.Generator().manual_seed(0)
    grad_y, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 40), (40, width)))
    expected = (grad_y.double() @ weight.double()).to(dtype)
    for has_one in (True, False):
        monkeypatch.setattr(frozen, "_is_of_onednn", lambda dtype, has_one=has_one: has_one)
        assert frozen._is_slow(grad_y) is not has_one
        torch.testing.assert_close(frozen.product_backward(grad_y, weight), expected, rtol=1e-2, atol=1e-2)
