"""One number in place of the neuron's comparison: the same activations fire, to the last bit."""

import math
import random

import pytest
import torch

from spikelora.method.neuron import spike_gate
from spikelora.method.ops import torch_backend
from spikelora.method.ops.firing import _firing, firing, scalar

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, -1e-45, 1e-38, 65504.0, 70000.0, -70000.0]
TAUS = [1.0000001192092896, 1.7, 2.0, 3.0, 1e30]


def neighbours(centre, count=6):
    """A tensor's numbers and as many below and above each."""
    found = [centre]
    for end in (-math.inf, math.inf):
        numbers = centre
        for _ in range(count):
            numbers = torch.nextafter(numbers, torch.full_like(numbers, end))
            found.append(numbers)
    return torch.cat(found)


def thresholds():
    chosen = random.Random(0)
    drawn = [chosen.gauss(0, scale) for scale in (1e-3, 1, 100) for _ in range(30)]
    return [(threshold, tau) for threshold in SPECIAL + drawn for tau in (*TAUS, chosen.uniform(1.01, 5))]


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_fires_where_the_oracle_fires(dtype):
    for threshold, tau in thresholds():
        v_threshold, tau_ = torch.tensor([threshold]), torch.tensor([tau])
        number = firing(torch.zeros(1, 1, dtype=dtype), v_threshold, tau_)
        centres = torch.tensor([threshold * tau, number.silent], dtype=F64).to(dtype)
        others = torch.tensor([-math.inf, math.inf, math.nan, 0.0, -0.0, 1.0, -1.0], dtype=dtype)
        a = torch.cat([neighbours(centres), others])
        gated = torch.threshold(a, number.silent, 0.0)
        expected = spike_gate(a, v_threshold, tau_, 2.0)
        torch.testing.assert_close(gated, expected, rtol=0, atol=0, equal_nan=True, msg=f"{threshold}, {tau}")


def test_there_is_none_where_reading_it_costs():
    a, v_threshold, tau = torch.zeros(1, 1), torch.tensor([0.1]), torch.tensor([2.0])
    assert firing(a, v_threshold, tau) is not None
    assert firing(a.to("meta"), v_threshold, tau) is None
    assert firing(a, v_threshold.clone().requires_grad_(), tau) is None
    assert firing(a, v_threshold, tau.clone().requires_grad_()) is None
    compiled = torch.compile(lambda a: a if firing(a, v_threshold, tau) is None else a + 1, backend="eager")
    assert torch.equal(compiled(a), a)


@pytest.mark.parametrize("change", ["copy_", "data", "numpy"])
def test_a_change_of_the_threshold_is_seen_however_it_is_made(change):
    a, v_threshold, tau = torch.tensor([[0.3, 1.5]]), torch.tensor([0.1]), torch.tensor([2.0])
    assert firing(a, v_threshold, tau).silent < 0.3
    if change == "copy_":
        v_threshold.copy_(torch.tensor([0.5]))
    elif change == "data":
        v_threshold.data.fill_(0.5)
    else:
        v_threshold.numpy()[0] = 0.5
    assert 0.3 < firing(a, v_threshold, tau).silent < 1.5


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("threshold", [0.1, -0.4, 0.0, 1e30, -1e30])
@pytest.mark.parametrize("straight_through", [False, True])
def test_the_gradient_is_the_oracle_s(dtype, threshold, straight_through):
    v_threshold, tau = torch.tensor([threshold]), torch.tensor([1.7])
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20, 8, generator=generator).to(dtype)
    a[0, :6] = torch.tensor([-math.inf, math.inf, 0.0, -0.0, 1e17, -1e17], dtype=dtype)
    a[1, 0] = 2e30
    grad_y, B = torch.randn(20, 5, generator=generator).to(dtype), torch.randn(5, 8, generator=generator).to(dtype)

    numbers = B, v_threshold, tau, 1.5, straight_through, 0.75, True, False, False
    grad_a, grad_B, *_ = torch_backend.up_backward(grad_y, a, *numbers)

    leaf = a.double().requires_grad_()
    gated = spike_gate(leaf, v_threshold, tau, 1.5, straight_through)
    (expected,) = torch.autograd.grad(gated, leaf, 0.75 * grad_y.double() @ B.double())
    tolerance = {F32: 1e-5, F64: 1e-12, BF16: 2e-2}[dtype]
    torch.testing.assert_close(grad_a.double(), expected, rtol=tolerance, atol=tolerance)
    finite = gated.detach()[2:]  # the first rows make the sums infinite
    grad_B = torch_backend.up_backward(grad_y[2:], a[2:], *numbers)[1]
    torch.testing.assert_close(
        grad_B.double(), 0.75 * grad_y[2:].double().T @ finite, rtol=5 * tolerance, atol=5 * tolerance
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_is_no_matter(dtype):
    """Models are made under another default; what is found then is used for the rest of the process."""
    a, v_threshold, tau = torch.zeros(1), torch.tensor([0.1]), torch.tensor([2.0])
    expected = firing(a, v_threshold, tau).silent
    found = []
    for use in (lambda: torch.set_default_dtype(dtype), lambda: torch.set_default_device("meta")):
        _firing.cache_clear()
        scalar.cache_clear()
        try:
            use()
            found.append(firing(a, v_threshold, tau))
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    assert [number.silent for number in found] == [expected] * 2
    assert {number.threshold.device.type for number in found} == {"cpu"}


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize(
    ("threshold", "alpha"), [(-math.inf, 2.0), (1e20, 2.0), (-1e25, 2.0), (0.1, 1e-21), (0.1, 1e12)]
)
def test_gradients_at_extreme_numbers(threshold, alpha, straight_through):
    v_threshold, tau = torch.tensor([threshold]), torch.tensor([2.0])
    a, B = torch.tensor([[0.3, -1.5, 2e20, -2e20]]), torch.eye(4)
    leaf = a.double().requires_grad_()
    (expected,) = torch.autograd.grad(
        spike_gate(leaf, v_threshold, tau, alpha, straight_through), leaf, torch.ones(1, 4, dtype=F64)
    )
    arguments = B, v_threshold, tau, alpha, straight_through, 1.0, False, False, False
    grad_a = torch_backend.up_backward(torch.ones(1, 4), a, *arguments)[0]
    torch.testing.assert_close(grad_a.double(), expected, rtol=1e-4, atol=1e-4)
