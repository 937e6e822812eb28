"""The Triton backend against the oracle in Triton's interpreter, and compiled for GPUs that need not be there.

Triton decides when it is first imported whether it interprets, so each part runs in a process of its own, where pytest
collects functions of another name. By hand, with TRITON_INTERPRET=1 for `check_` and without for `compile_`:

    TRITON_INTERPRET=1 python -m pytest tests/test_triton.py -o python_functions=check_*
"""

import importlib
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spikelora import SpikeLoraError
from spikelora.method.neuron import spike_gate
from spikelora.method.ops import linear

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F32, BF16)]  # of the features, of the adapter
# Relative to float64, by the dtype of the result. The interpreter cuts to bfloat16 where a GPU rounds.
RTOL = {F32: 1e-5, F16: 1e-3, BF16: 8e-3}
ATOL = 1e-5
SUM_TOL = {"rtol": 1e-4, "atol": 1e-4}
SHARED_MEMORY = 101376  # bytes of a block on the smaller cards since sm_80; an A100 and an H100 have more
ALPHA, SCALE, SCALING = 1.5, 1.25, 0.75
STRAIGHT_THROUGH = False


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("prefix", "marked", "interpret"),
    [
        ("check_", "not slow", {"TRITON_INTERPRET": "1"}),
        ("compile_", "not slow", {}),
        pytest.param("compile_", "slow", {}, marks=pytest.mark.slow),
    ],
)
def test_in_a_process_of_its_own(prefix, marked, interpret, tmp_path):
    ours = {"TRITON_INTERPRET", "PYTEST_ADDOPTS"}
    env = {k: v for k, v in os.environ.items() if k not in ours} | interpret | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", __file__, "-o", f"python_functions={prefix}*", "-p", "no:cacheprovider"]
    command += ["-m", marked]
    # The interpreter of triton 3.6 makes numbers of arrays as NumPy deprecates it.
    command += ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning:triton.runtime.interpreter"]
    command += ["-W", "ignore:AnnAssign.__init__ missing:DeprecationWarning"]  # of triton's parser, on Python 3.13

    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])

    if done.returncode or not re.search(r"=== \d+ passed(, \d+ deselected)? in [^,]*===\n$", done.stdout):
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)


@pytest.fixture
def buffers(monkeypatch):
    """Buffers that the backend asks for, NaN before and after and, until written, within."""
    made, own = [], torch.Tensor.new_empty

    def new_empty(like, shape, *args, dtype=None, **kwargs):
        if args or kwargs:  # of the interpreter
            return own(like, shape, *args, dtype=dtype, **kwargs)
        memory = torch.full((math.prod(shape) + 512,), math.nan, dtype=dtype or like.dtype)
        made.append((memory, shape))
        return memory[256:-256].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield made
    for memory, shape in made:
        assert memory[:256].isnan().all(), f"written before a buffer {shape}"
        assert memory[-256:].isnan().all(), f"written after a buffer {shape}"


@pytest.fixture
def straight_through(request, monkeypatch):
    """One of the gate's two gradients for a test."""
    monkeypatch.setattr(sys.modules[__name__], "STRAIGHT_THROUGH", request.param)


both_gradients_too = pytest.mark.parametrize("straight_through", [False, True], indirect=True)


@pytest.fixture
def backend(buffers):
    """The backend in the interpreter; NumPy's warnings of overflow and NaN are not a GPU's."""
    module = importlib.import_module("spikelora.method.ops.triton_backend")
    assert type(module._expand_add).__name__ == "InterpretedFunction"
    with np.errstate(all="ignore"):
        yield module


def laid_out(values, layout="contiguous"):
    """The matrix as a view of that layout into memory that is NaN everywhere else."""
    if layout == "transposed":
        return laid_out(values.T).T
    rows, columns = values.shape
    step = 2 if layout == "strided" else 1
    memory = torch.full((rows + 2, columns * step + 3 * (step - 1)), math.nan, dtype=values.dtype)
    view = memory[1 : rows + 1, step - 1 :: step][:, :columns]
    return view.copy_(values)


def randn(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def numbers(*values):
    return [torch.tensor([value], dtype=F32) for value in values]


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL[dtype], atol=ATOL, equal_nan=True)


def reference(a, y, B, v_threshold, tau, grad_y):
    """`y` after the update, and the gradients of a, B, v_threshold and tau, through the oracle in float64."""
    a, B, v_threshold, tau = leaves = [t.double().requires_grad_() for t in (a, B, v_threshold, tau)]
    update = SCALING * spike_gate(a, v_threshold, tau, ALPHA, STRAIGHT_THROUGH) @ B.T
    return y.double() + update.detach(), torch.autograd.grad(update, leaves, grad_y.double())


def backward(backend, *arguments):
    """What `adapter_backward` returns, and the gradient of a that it computes on the way."""
    expand_add_, made = backend._expand_add_, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_expand_add_", lambda *args: (expand_add_(*args), made.append(args[2])))
        grads = backend.adapter_backward(*arguments)
    return grads, made[0]


def assert_backend(backend, x, A, y, B, v_threshold, tau, grad_y, grad_x):
    """A forward and a backward agree with the oracle, each at the values that the backend itself gave it."""
    T, P, neuron = y.dtype, A.dtype, (v_threshold, tau)
    outside = y._base.isnan().sum() - y.isnan().sum()
    y_before, grad_x_before = y.clone(), grad_x.clone()

    a = backend.add_adapter_(y, x, A, B, *neuron, SCALE, SCALING, True)
    assert_close(a, SCALE * x.double() @ A.double().T, P)
    expected, gradients = reference(a, y_before, B, *neuron, grad_y)
    assert_close(y, expected, T)
    assert y._base.isnan().sum() - y.isnan().sum() == outside

    grads, grad_a = backward(
        backend, grad_y, grad_x, x, a, A, B, *neuron, ALPHA, STRAIGHT_THROUGH, SCALE, SCALING, (True,) * 4
    )
    assert_close(grad_a, gradients[0], P)
    assert_close(grad_x, grad_x_before.double() + SCALE * grad_a.double() @ A.double(), T)
    assert_close(grads[0], SCALE * grad_a.double().T @ x.double(), P)
    assert_close(grads[1], gradients[1], P)
    for actual, wanted in zip(grads[2:], gradients[2:], strict=True):
        assert actual.dtype == F32
        torch.testing.assert_close(actual.double(), wanted, equal_nan=True, **SUM_TOL)


def operands(T, P, n, n_in, n_out, r, layout="contiguous"):
    """x, A, y, B, v_threshold, tau, grad_y and grad_x."""
    shapes = [(n, n_in, T, 1), (r, n_in, P, 8), (n, n_out, T, 1), (n_out, r, P, 8)]
    x, A, y, B = (laid_out(randn(*s, seed=i, dtype=d) / by, layout) for i, (*s, d, by) in enumerate(shapes))
    grad_y, grad_x = (laid_out(randn(n, m, seed=4 + m, dtype=T), layout) for m in (n_out, n_in))
    return x, A, y, B, *numbers(0.1, 1.7), grad_y, grad_x


@pytest.mark.parametrize(
    ("T", "P", "layout", "straight_through"),
    [  # each gradient with each pair of types and with each layout
        (*dtypes, layout, (i + j) % 2 == 1)
        for i, dtypes in enumerate(DTYPES)
        for j, layout in enumerate(["contiguous", "transposed", "strided"])
    ],
    indirect=["straight_through"],
)
def check_dtypes_and_layouts(backend, T, P, layout, straight_through):
    assert_backend(backend, *operands(T, P, 5, 33, 100, 7, layout))


@pytest.mark.parametrize(
    ("T", "P", "n", "n_in", "n_out", "r"),
    [
        (F32, F32, 0, 33, 100, 8),
        (F32, F32, 1, 100, 33, 1),
        (BF16, F32, 1, 300, 300, 8),
        (F32, F32, 17, 64, 64, 63),
        (BF16, F32, 17, 64, 64, 63),
        (BF16, F32, 130, 300, 100, 64),
        (F32, F32, 130, 33, 300, 256),
    ],
)
def check_sizes(backend, T, P, n, n_in, n_out, r):
    assert_backend(backend, *operands(T, P, n, n_in, n_out, r))


@pytest.mark.parametrize(("length", "splits"), [(1, 1), (256, 1), (257, 2), (600, 3)])
def check_sums_that_are_split(backend, buffers, length, splits):
    """Sums over features, of which a forward and a backward have one each, and over tokens."""
    assert_backend(backend, *operands(F32, F32, 3, length, length, 9))
    assert [shape[0] for _, shape in buffers if len(shape) == 3] == [splits, splits]
    buffers.clear()
    assert_backend(backend, *operands(F32, F32, length, 3, 5, 9))
    assert [shape[0] for _, shape in buffers if len(shape) == 3] == [1, 1] + 2 * [splits] * (splits > 1)


def train(steps, dropout, learned):
    """Loss at each step of a training of two layers, through whatever the autograd functions are made of."""
    weights = [randn(20, 33, seed=0, dtype=BF16) / 6, randn(9, 20, seed=1, dtype=BF16) / 4]
    adapters = [[randn(7, w.shape[1], seed=2, dtype=F32) / 4, torch.zeros(len(w), 7)] for w in weights]
    neurons = [numbers(0.05, 2.0) for _ in weights]
    trained = [*adapters, *neurons] if learned else adapters
    leaves = [t.requires_grad_() for of_layer in trained for t in of_layer]
    optimizer = torch.optim.SGD(leaves, lr=0.3)
    x, target = randn(24, 33, seed=3, dtype=BF16), randn(24, 9, seed=4, dtype=F32)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        h = x
        for weight, adapter, neuron in zip(weights, adapters, neurons, strict=True):
            h = linear.spike_linear(
                h, weight, None, linear.Adapter(*adapter, *neuron, ALPHA, STRAIGHT_THROUGH, SCALING, dropout)
            ).tanh()
        loss = (h.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("dropout", "learned", "straight_through"),
    [(0.2, True, False), (0.0, True, True), (0.0, False, False), (0.0, False, True)],
    indirect=["straight_through"],
)
def check_training_gives_the_losses_of_the_torch_backend(backend, dropout, learned, straight_through, monkeypatch):
    expected = train(12, dropout, learned)
    monkeypatch.setattr(linear, "_backend", lambda y, A: backend)
    losses = train(12, dropout, learned)

    assert expected[-1] < 0.95 * expected[0]
    # In bfloat16, which the interpreter cuts where torch rounds.
    assert losses == pytest.approx(expected, abs=1e-2)


def read_gate(backend, a, v_threshold, tau):
    """What reaches an identity for B, from an identity for A: the gated values."""
    y = torch.zeros(a.shape)
    backend.add_adapter_(y, a, torch.eye(a.shape[1], dtype=a.dtype), torch.eye(a.shape[1], dtype=a.dtype), v_threshold,
                         tau, 1.0, 1.0, False)  # fmt: skip
    return y


def assert_given(backend, y, a, B, v_threshold, tau, grad_y):
    """The same for an `a` as it is, of which no product with anything is asked."""
    neuron, nothing = (v_threshold, tau), torch.zeros(a.shape[1], 0, dtype=a.dtype)
    expected, gradients = reference(a, y, B, *neuron, grad_y)
    backend._expand_add_(y, a.float()[None], None, None, B, B.stride()[::-1], *neuron, None, 1.0, SCALING, 0.0, False)
    assert_close(y, expected, y.dtype)
    (_, *grads), grad_a = backward(
        backend,
        grad_y,
        None,
        None,
        a,
        nothing,
        B,
        *neuron,
        ALPHA,
        STRAIGHT_THROUGH,
        1.0,
        SCALING,
        (False, True, True, True),
    )
    assert_close(grad_a, gradients[0], a.dtype)
    assert_close(grads[0], gradients[1], a.dtype)
    for actual, wanted in zip(grads[1:], gradients[2:], strict=True):
        torch.testing.assert_close(actual.double(), wanted, equal_nan=True, **SUM_TOL)


def check_fires_at_equality(backend):
    a = torch.tensor([[0.25, -0.25, 0.125, 0.5], [math.nextafter(0.25, 0.0) - 1e-8, 0.25, 0.26, 0.0]])
    v_threshold, tau = numbers(0.125, 2.0)

    assert torch.equal(read_gate(backend, a, v_threshold, tau), a * torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]))
    assert_given(backend, torch.zeros(2, 3), a, randn(3, 4, seed=0, dtype=F32), v_threshold, tau, torch.ones(2, 3))


@pytest.mark.parametrize("P", [F32, F16, BF16])
@pytest.mark.parametrize(("threshold", "tau"), [(0.1, 1.7), (0.3, 3.0), (-0.7, 1.1), (5.0, 1.3)])
def check_compares_as_the_oracle_does(backend, P, threshold, tau):
    """Values a few ulps around the threshold, where v is rounded."""
    v_threshold, tau = numbers(threshold, tau)
    at = (v_threshold * tau).to(P)
    below, above = [at], [at]
    for _ in range(8):
        below.append(torch.nextafter(below[-1], torch.full_like(at, -math.inf)))
        above.append(torch.nextafter(above[-1], torch.full_like(at, math.inf)))
    a = torch.cat([*below, *above]).reshape(1, -1)

    assert torch.equal(
        read_gate(backend, a, v_threshold, tau), spike_gate(a, v_threshold, tau, ALPHA, STRAIGHT_THROUGH).float()
    )


@pytest.mark.parametrize("P", [F32, BF16])
@pytest.mark.parametrize("threshold", [0.2, -math.inf, math.inf, math.nan])
def check_infinity_and_nan(backend, P, threshold):
    a = randn(5, 7, seed=0, dtype=P)
    a[0, 0], a[1, 1], a[2, 2] = -math.inf, math.inf, math.nan
    y, B, grad_y = randn(5, 6, seed=1, dtype=P), randn(6, 7, seed=2, dtype=P), randn(5, 6, seed=3, dtype=P)

    grad_y[3, 0] = math.inf

    assert_given(backend, y, a, B, *numbers(threshold, 2.0), grad_y)


def check_minus_infinity_is_silent(backend):
    y, partials, B = torch.zeros(1, 1), torch.full((1, 1, 1), -math.inf), torch.ones(1, 1)
    backend._expand_add_(y, partials, None, None, B, (1, 1), *numbers(0.5, 2.0), None, 1.0, 1.0, 0.0, False)
    assert torch.equal(y, torch.zeros(1, 1))


@both_gradients_too
def check_infinite_gradient_does_not_meet_the_padding(backend, straight_through):
    a, A, B, grad_y = torch.ones(2, 3), torch.ones(3, 5), torch.ones(4, 3), torch.ones(2, 4)
    grad_y[0, 0] = math.inf
    needs = (False, False, True, True)
    grads = backend.adapter_backward(
        grad_y, None, None, a, A, B, *numbers(0.5, 2.0), ALPHA, STRAIGHT_THROUGH, SCALE, SCALING, needs
    )

    assert grads[:2] == (None, None)
    assert torch.equal(torch.cat(grads[2:]), torch.full((2,), -math.inf))


@both_gradients_too
@pytest.mark.parametrize(("needs", "need_x"), [([i == j for i in range(4)], j % 2 == 0) for j in range(5)])
def check_computes_what_is_needed(backend, needs, need_x, straight_through):
    x, A, y, B, v_threshold, tau, grad_y, grad_x = operands(F32, F32, 3, 6, 5, 4)
    inputs = (A, B, v_threshold, tau)
    a = backend.add_adapter_(y, x, *inputs, SCALE, SCALING, True)
    grad_a, *gradients = reference(a, y, B, v_threshold, tau, grad_y)[1]
    expected = SCALE * grad_a.T @ x.double(), *gradients
    before = grad_x.clone()

    actual = backend.adapter_backward(
        grad_y,
        grad_x if need_x else None,
        x if needs[0] else None,
        a,
        *inputs,
        ALPHA,
        STRAIGHT_THROUGH,
        SCALE,
        SCALING,
        needs,
    )
    assert_close(grad_x, before.double() + (SCALE * grad_a @ A.double() if need_x else 0), F32)
    for gradient, wanted, needed in zip(actual, expected, needs, strict=True):
        if needed:
            torch.testing.assert_close(gradient.double(), wanted, **SUM_TOL)
        else:
            assert gradient is None


def check_keeps_no_activation_that_nobody_needs(backend):
    x, A, y, B, *neuron, _, _ = operands(F32, F32, 3, 6, 5, 4)
    again = y.clone()
    assert backend.add_adapter_(y, x, A, B, *neuron, SCALE, SCALING, False) is None
    backend.add_adapter_(again, x, A, B, *neuron, SCALE, SCALING, True)
    assert torch.equal(y, again)


@pytest.fixture
def launches(request, monkeypatch):
    """Launches of kernels as `(arguments, compiled kernel)`, compiled for an architecture, or sm_80, and not run."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_device(self):
            return architecture  # Triton keeps kernels by device

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", architecture, 32)

    architecture = getattr(request, "param", 80)
    compile_and_run, launched = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = compile_and_run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((dict(zip(self.arg_names, args, strict=False)), kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    # What would load a kernel onto a GPU.
    monkeypatch.setattr(CompiledKernel, "run", lambda *args: None)
    monkeypatch.setattr(importlib.import_module("spikelora.method.ops.triton_backend"), "_compiled", {})
    driver.set_active(Driver())
    return launched


# Each compiles for three seconds; not marked slow is one of each architecture and each layout.
@pytest.mark.parametrize(
    ("launches", "T", "P", "n", "r", "layout"),
    [  # what needs most shared memory, for each architecture
        (80, F32, F32, 4096, 256, "contiguous"),
        pytest.param(90, F32, F32, 4096, 256, "contiguous", marks=pytest.mark.slow),
        pytest.param(100, F32, F32, 4096, 256, "contiguous", marks=pytest.mark.slow),
        pytest.param(80, F32, F32, 1, 8, "contiguous", marks=pytest.mark.slow),
        pytest.param(90, F32, F32, 4096, 64, "contiguous", marks=pytest.mark.slow),
        pytest.param(100, F16, F16, 4096, 8, "contiguous", marks=pytest.mark.slow),
        pytest.param(80, BF16, BF16, 4096, 64, "contiguous", marks=pytest.mark.slow),
        (90, BF16, F32, 4096, 64, "contiguous"),
        (100, BF16, F32, 4096, 8, "transposed"),
    ],
    indirect=["launches"],
)
def compile_what_is_launched(launches, T, P, n, r, layout):
    backend = importlib.import_module("spikelora.method.ops.triton_backend")
    x, y = torch.empty(n, 512, dtype=T), torch.empty(n, 384, dtype=T)
    A, B = torch.empty(r, 512, dtype=P), torch.empty(384, r, dtype=P)
    if layout == "transposed":
        x, y, A, B = (t.T.contiguous().T for t in (x, y, A, B))
    v_threshold, tau = numbers(0.1, 2.0)

    a = backend.add_adapter_(y, x, A, B, v_threshold, tau, SCALE, SCALING, True)
    backend.adapter_backward(y, x, x, a, A, B, v_threshold, tau, ALPHA, STRAIGHT_THROUGH, SCALE, SCALING, (True,) * 4)

    assert len(launches) == 5
    for arguments, kernel in launches:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_MEMORY, kernel.metadata.name
        # The charge must be the division that rounds correctly, not the one that `/` gives.
        assert ("div.rn.f32" in kernel.asm["ptx"]) == (arguments.get("tau") is not None), kernel.metadata.name
        if P == F32 and layout == "contiguous":  # half-precision features are read by the vector, not one by one
            assert "ld.global.b16" not in kernel.asm["ptx"], kernel.metadata.name


@pytest.mark.parametrize(
    ("needed", "straight_through"),
    [
        pytest.param("A", False, marks=pytest.mark.slow),
        pytest.param("B", True, marks=pytest.mark.slow),
        ("neuron", False),
        ("neuron", True),
    ],
    indirect=["straight_through"],
)
def compile_what_is_needed(launches, needed, straight_through):
    """What is None is known to the compiler, and what depends on it is left out of a kernel."""
    backend = importlib.import_module("spikelora.method.ops.triton_backend")
    x, A, y, B, *neuron, grad_y, grad_x = operands(BF16, F32, 20, 64, 96, 8)
    assert backend.add_adapter_(y, x, A, B, *neuron, SCALE, SCALING, False) is None
    a, needs = torch.zeros(20, 8), (needed == "A", needed == "B", needed == "neuron", needed == "neuron")
    for of_x in (grad_x, None):
        backend.adapter_backward(grad_y, of_x, x, a, A, B, *neuron, ALPHA, STRAIGHT_THROUGH, SCALE, SCALING, needs)

    names = [kernel.metadata.name for _, kernel in launches]
    assert names[:2] == ["_contract_features", "_expand_add"]
    assert ("_contract_tokens" in names) == (needed != "neuron")
    assert all(kernel.asm["cubin"] for _, kernel in launches)


def compile_once_and_start_again(launches, monkeypatch):
    """What was compiled is started directly, with the arguments and the grid of Triton's own way in."""
    backend = importlib.import_module("spikelora.method.ops.triton_backend")
    x, A, y, B, *neuron, grad_y, grad_x = operands(BF16, F32, 70, 64, 96, 8)
    # At the start of their memory, as `laid_out` puts them a row behind it.
    x, A, y, B, grad_y, grad_x = (t.clone() for t in (x, A, y, B, grad_y, grad_x))

    def step():
        a = backend.add_adapter_(y, x, A, B, *neuron, SCALE, SCALING, True)
        backend.adapter_backward(
            grad_y, grad_x, x, a, A, B, *neuron, ALPHA, STRAIGHT_THROUGH, SCALE, SCALING, (True,) * 4
        )

    step()
    first = [list(arguments.values()) for arguments, _ in launches]
    assert len(first) == len(backend._compiled) == 5
    started = []
    for key in backend._compiled:
        backend._compiled[key] = (lambda *args: started.append(args), "function", "packed", None)
    step()
    assert len(launches) == 5
    for call, expected in zip(started, first, strict=True):
        grid, rest, arguments = call[:3], call[3:9], call[9:]
        assert rest == (0, "function", "packed", None, None, None)  # the stream, and no hooks
        assert all(isinstance(size, int) and size > 0 for size in grid)
        assert len(arguments) == len(expected)
        for actual, wanted in zip(arguments, expected, strict=True):
            assert isinstance(actual, int) if isinstance(wanted, torch.Tensor) else actual == wanted

    # Another number of tokens is no other kernel; a pointer between two of 16 bytes goes Triton's way.
    x, y, grad_y, grad_x = (t[:40] for t in (x, y, grad_y, grad_x))
    step()
    assert len(launches) == 5
    x = torch.zeros(41 * 64 + 1, dtype=BF16)[1:].view(41, 64)[:40]
    step()
    assert len(launches) == 7

    # A pointer into the memory of another device would end the process.
    n_started = len(started)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: int(tensor is B))
    with pytest.raises(SpikeLoraError, match="Put the whole model on one device"):
        step()
    assert len(started) == n_started


@pytest.mark.parametrize(
    "rank", [pytest.param(1, marks=pytest.mark.slow), 8, pytest.param(256, marks=pytest.mark.slow)]
)
def compile_and_work(launches, rank):
    backend = importlib.import_module("spikelora.method.ops.triton_backend")
    assert backend.works.__wrapped__(torch.device("cpu"), BF16, F32, rank)
    assert len(launches) == 5


def compile_nothing_where_triton_cannot_start(monkeypatch):
    from triton.runtime import driver

    class Driver:
        def get_current_device(self):  # which compiles a part of Triton
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(driver, "_active", Driver())
    backend = importlib.import_module("spikelora.method.ops.triton_backend")
    with pytest.warns(RuntimeWarning, match="take plain torch, which is slower .*: Failed to find C compiler"):
        assert not backend.works.__wrapped__(torch.device("cpu"), F32, F32, 8)


@pytest.mark.parametrize("kernel", ["_contract_features", "_expand_add", "_contract_tokens"])
def compile_nothing_where_a_kernel_needs_too_much(launches, kernel, monkeypatch):
    from triton.runtime.errors import OutOfResources

    backend = importlib.import_module("spikelora.method.ops.triton_backend")
    run = type(getattr(backend, kernel)).run

    def out_of_resources(self, *args, **kwargs):
        if self is getattr(backend, kernel):
            raise OutOfResources(300000, SHARED_MEMORY, "shared memory")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(getattr(backend, kernel)), "run", out_of_resources)
    with pytest.warns(RuntimeWarning, match="do not run on cpu for torch.bfloat16 at rank 8.*shared memory"):
        assert not backend.works.__wrapped__(torch.device("cpu"), BF16, F32, 8)


def compile_nothing_for_a_gpu_that_is_too_old(monkeypatch):
    backend = importlib.import_module("spikelora.method.ops.triton_backend")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"compute capability is 7\.5.*compute capability 8\.0 or newer"):
        assert not backend.works.__wrapped__(torch.device("cuda"), F32, F32, 8)


def check_works(backend):
    assert backend.works.__wrapped__(torch.device("cpu"), BF16, F32, 8)
