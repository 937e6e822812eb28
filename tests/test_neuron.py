"""The neuron against spikingjelly, against autograd through an independent formula, and against golden vectors."""

import json
import math
from pathlib import Path

import pytest
import torch

from spikelora.method.neuron import atan_surrogate, charge, spike_gate

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gate.json").read_text())["cases"]
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def spikingjelly_gate():
    """`a * spike` and the spikes, where `spike` is one step of spikingjelly's LIF neuron from rest."""
    from spikingjelly.activation_based import neuron, surrogate

    def gate(a, v_threshold, tau, surrogate_alpha=2.0):
        node = neuron.LIFNode(
            tau,
            v_threshold=v_threshold,
            surrogate_function=surrogate.ATan(alpha=surrogate_alpha),
            detach_reset=True,
            step_mode="s",
        )
        node.reset()
        spikes = node(a)
        return a * spikes, spikes

    return gate


def straight_through_gate(a, v_threshold, tau, surrogate_alpha):
    """`a` times a step whose derivative autograd takes from the primitive of the surrogate, `atan(pi/2*alpha*u)/pi`."""
    u = a / tau - v_threshold
    primitive = torch.atan(math.pi / 2 * surrogate_alpha * u) / math.pi
    return a * ((u >= 0).to(a.dtype) + primitive - primitive.detach())


def gradients(gate, a, w, *leaves):
    """Output of `gate(a, *leaves)` and the gradients of `sum(output * w)` with respect to `a` and each leaf."""
    a, *leaves = (tensor.detach().clone().requires_grad_() for tensor in (a, *leaves))
    gated = gate(a, *leaves)
    return gated.detach(), torch.autograd.grad((gated * w).sum(), (a, *leaves))


def around_threshold(v_threshold, tau, dtype):
    """Random values, and values from two ulps below to two above `tau * v_threshold`, with their negatives."""
    at = torch.tensor([v_threshold], dtype=dtype) * tau
    below, above = (torch.nextafter(at, torch.full_like(at, end)) for end in (-math.inf, math.inf))
    lower, upper = (torch.nextafter(t, torch.full_like(t, end)) for t, end in ((below, -math.inf), (above, math.inf)))
    edge = torch.cat([lower, below, at, above, upper])
    random = torch.randn(54, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.cat([edge, -edge, random]).reshape(8, 8)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("tau", [2.0, 3.0, 1.25])
@pytest.mark.parametrize("v_threshold", [0.0, 0.1, 0.5, 1.0, 2.0])
def test_equals_spikingjelly(spikingjelly_gate, v_threshold, tau, dtype, tolerance):
    a = around_threshold(v_threshold, tau, dtype)
    w = torch.randn(a.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected_spikes = spikingjelly_gate(a, v_threshold, tau)[1].bool()
    expected, (expected_grad,) = gradients(lambda a: spikingjelly_gate(a, v_threshold, tau)[0], a, w)

    gated, (grad,) = gradients(lambda a: spike_gate(a, v_threshold, tau, 2.0), a, w)

    v = charge(a, tau)
    # In float64 no multiple of 0.1 divided by 3 meets 0.1 itself; equality has its own test below.
    assert (v - v_threshold).abs().min() <= torch.finfo(dtype).eps * v_threshold
    assert torch.equal(v >= v_threshold, expected_spikes)
    assert torch.equal(gated, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("v_threshold", [0.125, 0.5, 1.0, 2.0, -0.5])
def test_fires_at_equality(v_threshold, dtype):
    # tau = 2 only shifts the exponent: these are the threshold and its neighbours in the dtype.
    at = torch.tensor(2 * v_threshold, dtype=dtype)
    below = torch.nextafter(at, torch.tensor(-4.0, dtype=dtype))
    a = torch.stack([at, below])

    assert (charge(a, 2.0) >= v_threshold).tolist() == [True, False]
    assert spike_gate(a, v_threshold, 2.0, 2.0).tolist() == [at.item(), 0]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tau", [2.0, 3.0, 1.25])
@pytest.mark.parametrize("v_threshold", [0.0, 0.1, 0.5, 1.0, 2.0])
def test_half_precision_equals_spikingjelly_in_float32(spikingjelly_gate, v_threshold, tau, dtype):
    a = around_threshold(v_threshold, tau, dtype)
    w = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected_spikes = spikingjelly_gate(a.float(), v_threshold, tau)[1].bool()
    expected, (expected_grad,) = gradients(lambda a: spikingjelly_gate(a, v_threshold, tau)[0], a.float(), w.float())

    gated, (grad,) = gradients(lambda a: spike_gate(a, v_threshold, tau, 2.0), a, w)

    assert torch.equal(charge(a, tau) >= v_threshold, expected_spikes)
    assert gated.dtype == grad.dtype == dtype
    assert torch.equal(gated, expected.to(dtype))
    # The float32 result, rounded once: half an ulp.
    torch.testing.assert_close(grad.float(), expected_grad, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)


@pytest.mark.parametrize(("dtype", "value"), [(torch.bfloat16, 1.0), (torch.float16, 5.0)], ids=str)
def test_half_precision_is_compared_in_float32(dtype, value):
    a = torch.tensor([value], dtype=dtype)
    # In half precision a / 3 rounds up onto this threshold and would fire; in float32 it stays below.
    v_threshold = (a / 3).item()
    assert v_threshold > value / 3

    assert charge(a, 3.0).dtype == torch.float32
    assert spike_gate(a, v_threshold, 3.0, 2.0).item() == 0
    assert spike_gate(a, torch.tensor([v_threshold]), torch.tensor([3.0]), 2.0).item() == 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_vectors(case, dtype, tolerance):
    a, w, spikes, gated, grad_a = (
        torch.tensor(case[key], dtype=dtype).reshape(case["shape"]) for key in ("a", "w", "spikes", "gated", "grad_a")
    )
    v_threshold, tau, surrogate_alpha = case["v_threshold"], case["tau"], case["surrogate_alpha"]

    actual, (grad,) = gradients(lambda a: spike_gate(a, v_threshold, tau, surrogate_alpha), a, w)

    actual_spikes = charge(a, tau) >= v_threshold
    assert torch.equal(actual_spikes, spikes.bool())
    assert 1 - actual_spikes.double().mean().item() == pytest.approx(case["sparsity"], abs=1e-12)
    assert torch.equal(actual, gated)
    torch.testing.assert_close(grad, grad_a, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(1,), (7,)], ids=["one threshold", "one per unit"])
@pytest.mark.parametrize("surrogate_alpha", [1.0, 2.0, 10.0])
def test_learned_neuron_has_the_gradients_of_the_surrogate(surrogate_alpha, shape):
    generator = torch.Generator().manual_seed(0)
    a, w = torch.randn(2, 5, 3, 7, dtype=torch.float64, generator=generator)
    v_threshold = torch.rand(shape, dtype=torch.float64, generator=generator)
    tau = 1.5 + torch.rand(shape, dtype=torch.float64, generator=generator)

    expected, expected_grads = gradients(
        lambda *args: straight_through_gate(*args, surrogate_alpha), a, w, v_threshold, tau
    )
    gated, grads = gradients(lambda *args: spike_gate(*args, surrogate_alpha), a, w, v_threshold, tau)

    torch.testing.assert_close(gated, expected, rtol=0, atol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_gradients_worked_by_hand():
    # v = 0.5 and -0.5, u = 0 and -1, s'(0) = 1, s'(-1) = 1 / (1 + pi ** 2).
    s = 1 / (1 + math.pi**2)
    a, w = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 10.0])

    gated, (grad_a, grad_v_threshold, grad_tau) = gradients(
        lambda *args: spike_gate(*args, 2.0), a, w, torch.tensor([0.5]), torch.tensor([2.0])
    )

    assert gated.tolist() == [1, 0]
    assert grad_a.tolist() == pytest.approx([1 + 1 / 2, 10 * -s / 2], abs=1e-6)
    assert grad_v_threshold.tolist() == pytest.approx([-1 + 10 * s], abs=1e-6)
    assert grad_tau.tolist() == pytest.approx([-(1 + 10 * s) / 4], abs=1e-6)


def test_straight_through_gradients_worked_by_hand():
    # v = 0.5, -0.5 and 0.25; u = 0, -1 and -0.25: the first fires, and w(-1) = s'(-1), w(-0.25) = 1 / (1 + pi**2 / 16).
    s = 1 / (1 + math.pi**2)
    a, w = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([1.0, 10.0, 2.0])

    gated, (grad_a, *of_neuron) = gradients(
        lambda *args: spike_gate(*args, 2.0, True), a, w, torch.tensor([0.5]), torch.tensor([2.0])
    )
    _, (_, *of_surrogate) = gradients(
        lambda *args: spike_gate(*args, 2.0), a, w, torch.tensor([0.5]), torch.tensor([2.0])
    )

    assert gated.tolist() == [1, 0, 0]
    assert grad_a.tolist() == pytest.approx([1, 10 * s, 2 / (1 + math.pi**2 / 16)], abs=1e-6)
    assert of_neuron == of_surrogate


def test_straight_through_values_that_are_not_finite():
    a = torch.tensor([-math.inf, math.inf, math.nan])

    gated, (grad,) = gradients(lambda a: spike_gate(a, 0.1, 2.0, 2.0, True), a, torch.ones_like(a))

    torch.testing.assert_close(gated, torch.tensor([0, math.inf, math.nan]), equal_nan=True)
    torch.testing.assert_close(grad, torch.tensor([0, 1, math.nan]), equal_nan=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_learned_neuron_keeps_float32_beside_half_precision(dtype):
    a = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    w = torch.ones_like(a)
    neuron = torch.tensor([0.1]), torch.tensor([2.0])
    expected, expected_grads = gradients(lambda *args: spike_gate(*args, 2.0), a.float(), w.float(), *neuron)

    gated, grads = gradients(lambda *args: spike_gate(*args, 2.0), a, w, *neuron)

    assert torch.equal(gated, expected.to(dtype))
    assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]
    # Summed in float32: in half precision the sum would be off by more than a part in a thousand.
    torch.testing.assert_close(grads[1:], expected_grads[1:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("v_threshold", [0.1, -0.1])
def test_values_that_are_not_finite(v_threshold, dtype):
    a = torch.tensor([-math.inf, math.inf, math.nan], dtype=dtype)

    gated, (grad,) = gradients(lambda a: spike_gate(a, v_threshold, 2.0, 2.0), a, torch.ones_like(a))

    torch.testing.assert_close(gated, torch.tensor([0, math.inf, math.nan], dtype=dtype), equal_nan=True)
    torch.testing.assert_close(grad, torch.tensor([0, 1, math.nan], dtype=dtype), equal_nan=True)


def test_infinite_values_leave_the_neuron_s_gradients_alone():
    a = torch.tensor([1.0, -1.0, math.inf, -math.inf])
    neuron = torch.tensor([0.1]), torch.tensor([2.0])

    _, grads = gradients(lambda *args: spike_gate(*args, 2.0), a, torch.ones(4), *neuron)
    _, expected = gradients(lambda *args: spike_gate(*args, 2.0), a[:2], torch.ones(2), *neuron)

    assert grads[1:] == expected[1:]


@pytest.mark.parametrize("r", [1, 7, 63])
@pytest.mark.parametrize("tokens", [(), (1,), (0,), (5,), (2, 0), (2, 3)], ids=str)
def test_shapes(tokens, r):
    a, w = torch.randn(2, *tokens, r, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    neuron = torch.tensor([0.1]).double(), torch.tensor([2.0]).double()

    expected, expected_grads = gradients(lambda *args: straight_through_gate(*args, 2.0), a, w, *neuron)
    gated, grads = gradients(lambda *args: spike_gate(*args, 2.0), a, w, *neuron)

    assert gated.shape == a.shape
    torch.testing.assert_close(gated, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "view",
    [lambda t: t.transpose(0, 1), lambda t: t[:, ::2], lambda t: t.select(0, 1).expand(3, 8), lambda t: t.flip(0)],
    ids=["transposed", "strided", "expanded", "flipped"],
)
def test_memory_layout_does_not_matter(view):
    base, w = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    expected, (expected_grad,) = gradients(
        lambda a: spike_gate(view(a).contiguous(), 0.1, 2.0, 2.0), base, view(w).contiguous()
    )

    gated, (grad,) = gradients(lambda a: spike_gate(view(a), 0.1, 2.0, 2.0), base, view(w))

    assert torch.equal(gated, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("surrogate_alpha", [0.5, 2.0, 10.0])
def test_surrogate_by_value(surrogate_alpha):
    # At 2 / (pi * alpha) the bell has half its height.
    half_width = 2 / (math.pi * surrogate_alpha)
    u = torch.tensor([0.0, half_width, -half_width, 3 * half_width, 1e200], dtype=torch.float64)
    height = surrogate_alpha / 2

    expected = torch.tensor([height, height / 2, height / 2, height / 10, 0], dtype=torch.float64)

    torch.testing.assert_close(atan_surrogate(u, surrogate_alpha), expected, rtol=1e-12, atol=0)


def test_surrogate_of_the_paper_at_one():
    assert atan_surrogate(torch.tensor(1.0), 2.0).item() == pytest.approx(0.0919994, abs=1e-6)
