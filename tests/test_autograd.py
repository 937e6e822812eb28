"""All of autograd: `torch.func`, forward mode and a second backward give what the ordinary backward gives."""

from contextlib import nullcontext

import pytest
import torch
from conftest import spiking, tiny_opt
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from spikelora.method.composed import composed_gate
from spikelora.method.neuron import atan_surrogate, spike_gate, straight_through_window
from spikelora.method.paths import Path, force_path

# What torch makes the derivatives of forward mode of.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated")

X = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(3, 33).view(3, 10)
BASES = {
    "linear": (lambda: nn.Linear(6, 5), X),
    "embedding": (lambda: nn.Embedding(9, 5), torch.arange(15).view(5, 3) % 9),
    "convolution": (lambda: nn.Conv1d(3, 5, 3), X),
}
LEARNED = {"learn_threshold": True, "learn_tau": True}
STRAIGHT = LEARNED | {"surrogate": "straight_through"}
OPTIONS = {"fixed": {}, "learned": LEARNED, "straight through": STRAIGHT}
CASES = [pytest.param(base, options, id=f"{base} {options}") for base in BASES for options in OPTIONS]


def layer_of(base, options, **others):
    make, x = BASES[base]
    torch.manual_seed(0)
    model = spiking(nn.Sequential(make()), target_modules=["0"], v_threshold=0.05, **OPTIONS[options], **others)
    for name, p in model.named_parameters():
        if "lora_embedding_B" in name:
            nn.init.normal_(p)
    return model.base_model.model, x


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model, parameters, x):
    return functional_call(model, parameters, (x,)).sin().mean()


def ordinary(model, x):
    found = trained(model)
    return dict(zip(found, torch.autograd.grad(model(x).sin().mean(), list(found.values())), strict=True))


@pytest.mark.compatibility("Reliability", "`torch.func`")
@pytest.mark.parametrize(("base", "options"), CASES)
class TestFunctional:
    def test_grad(self, base, options):
        model, x = layer_of(base, options)
        actual = grad(lambda parameters: loss_of(model, parameters, x))(trained(model))
        torch.testing.assert_close(actual, ordinary(model, x), rtol=1e-5, atol=1e-6)
        assert all(value.abs().max() > 0 for value in actual.values())

    def test_gradients_by_sample_add_up(self, base, options):
        model, x = layer_of(base, options)
        by_sample = vmap(grad(lambda parameters, row: loss_of(model, parameters, row[None])), (None, 0))
        means = {name: value.mean(0) for name, value in by_sample(trained(model), x).items()}
        torch.testing.assert_close(means, ordinary(model, x), rtol=1e-4, atol=1e-6)

    def test_jvp_and_forward_mode(self, base, options):
        model, x = layer_of(base, options)
        found = {name: p.detach() for name, p in trained(model).items()}
        generator = torch.Generator().manual_seed(1)
        tangents = {name: torch.randn(p.shape, generator=generator) for name, p in found.items()}
        expected = sum((value * tangents[name]).sum() for name, value in ordinary(model, x).items())
        _, tangent = jvp(lambda parameters: loss_of(model, parameters, x), (found,), (tangents,))
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-6)
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(p, tangents[name]) for name, p in found.items()}
            tangent = forward_ad.unpack_dual(loss_of(model, duals, x)).tangent
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.compatibility("Reliability", "a second backward")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("base", "path"), [*((base, None) for base in BASES), *(("linear", path) for path in Path)])
def test_hessian_and_a_second_backward(base, path, options):
    model, x = layer_of(base, options)
    found = trained(model)
    expected = hessian(lambda parameters: loss_of(model, parameters, x))(found)
    with force_path(path) if path else nullcontext():
        first = torch.autograd.grad(model(x).sin().mean(), list(found.values()), create_graph=True)
    torch.testing.assert_close(dict(zip(found, first, strict=True)), ordinary(model, x), rtol=1e-4, atol=1e-6)
    weights = [torch.randn(g.shape, generator=torch.Generator().manual_seed(2)) for g in first]
    total = sum((g * w).sum() for g, w in zip(first, weights, strict=True))
    actual = torch.autograd.grad(total, list(found.values()))
    for name, value in zip(found, actual, strict=True):
        rows = [(expected[name][other] * w).flatten(-w.dim()).sum(-1) for other, w in zip(found, weights, strict=True)]
        torch.testing.assert_close(value, sum(rows), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("path", Path)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_second_backward_goes_through_is_the_first(path, dtype):
    """Of a layer with dropout in the middle, input and bias among what has a gradient."""
    torch.manual_seed(0)
    base = nn.Linear(6, 5).to(dtype)
    model = spiking(nn.Sequential(base), target_modules=["0"], v_threshold=0.05, lora_dropout=0.3).train()
    base.bias.requires_grad_()
    x = X.clone().to(dtype).requires_grad_()
    leaves = [x, *trained(model).values()]
    results = []
    for create_graph in (False, True):
        torch.manual_seed(1)
        with force_path(path):
            y = model.base_model.model(x).float().sin().mean()
        results.append(torch.autograd.grad(y, leaves, create_graph=create_graph))
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-3}
    for once, again in zip(*results, strict=True):
        torch.testing.assert_close(again, once, **tolerance)
    assert all(g.requires_grad for g in results[1])
    # The gradient of the input alone depends on A as well, as in a gradient penalty.
    (alone,) = torch.autograd.grad(y, [x], create_graph=True)
    penalties = [torch.autograd.grad(g.square().sum(), leaves, retain_graph=True) for g in (results[1][0], alone)]
    torch.testing.assert_close(*penalties, **tolerance)
    assert all(g.abs().max() > 0 for g in penalties[1][1:])


@pytest.mark.parametrize("path", Path)
def test_a_layer_that_feeds_itself(path):
    """The way back through a layer's input is walked once, by autograd, and not a second time within the layer."""
    torch.manual_seed(0)
    model = spiking(nn.Sequential(nn.Linear(6, 6)), target_modules=["0"], v_threshold=0.05, **OPTIONS["learned"])
    layer, leaves, results = model.base_model.model, list(trained(model).values()), []
    for create_graph in (False, True):
        with force_path(path):
            y = layer(layer(X).sin()).sin().sum()
        results.append(torch.autograd.grad(y, leaves, create_graph=create_graph))
    for once, again in zip(*results, strict=True):
        torch.testing.assert_close(again, once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("frozen", ["lora_A", "lora_"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("path", Path)
def test_a_second_backward_through_a_frozen_adapter(path, dropout, frozen, options):
    """Its fast paths do not keep the input; two layers, one of which gets an input without a gradient."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    dropped = OPTIONS[options] | {"lora_dropout": dropout}
    model = spiking(base, target_modules=["0", "1"], v_threshold=0.05, **dropped).train()
    for name, p in model.named_parameters():
        p.requires_grad_("base_layer" not in name and frozen not in name)
    x, results = X.clone().requires_grad_(frozen == "lora_"), []
    leaves = [*trained(model).values(), *([x] if x.requires_grad else [])]
    for taken in (path, Path.PLAIN):
        torch.manual_seed(1)
        with force_path(taken):
            y = model.base_model.model(x).sin().mean()
        first = torch.autograd.grad(y, leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-6)
    assert all(g.abs().max() > 0 for g in results[0])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("base", "path"), [*((base, None) for base in BASES), *(("linear", path) for path in Path)])
@pytest.mark.parametrize("n_rows", [2, 200])
def test_many_backwards_at_once(base, path, options, n_rows):
    model, x = layer_of(base, options)
    x, leaves = x.repeat(n_rows, 1, *[1] * (x.dim() - 2)), list(trained(model).values())
    with force_path(path) if path else nullcontext():
        y = model(x).sin().flatten()[:3]
    expected = [torch.autograd.grad(value, leaves, retain_graph=True) for value in y]
    expected = [torch.stack(rows) for rows in zip(*expected, strict=True)]
    batched = torch.autograd.grad(y, leaves, torch.eye(3), is_grads_batched=True, retain_graph=True)
    mapped = vmap(lambda row: torch.autograd.grad(y, leaves, row, retain_graph=True))(torch.eye(3))
    for found in (batched, mapped):
        torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-6)
        assert not any(g.requires_grad for g in found)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_composed_gate_is_the_gate(dtype, straight_through):
    a = torch.randn(200, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    a[0, :3] = torch.tensor([torch.inf, -torch.inf, 0.2])
    w = torch.randn(a.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    v_threshold, tau = torch.tensor([0.1]), torch.tensor([2.0])
    results = []
    for gate in (spike_gate, composed_gate):
        leaves = [t.clone().requires_grad_() for t in (a, v_threshold, tau)]
        gated = gate(*leaves, 2.0, straight_through)
        (gated.masked_fill(gated.isinf(), 0) * w).sum().backward()
        results.append((gated, *(leaf.grad for leaf in leaves)))
    for composed, expected in zip(results[1], results[0], strict=True):
        tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 0.02
        torch.testing.assert_close(composed, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(results[0][0], results[1][0])
    assert all(gradient.isfinite().all() for gradient in results[0][1:])
    nan = torch.full((2,), torch.nan, dtype=dtype)
    assert composed_gate(nan, v_threshold, tau, 2.0, straight_through).isnan().all()


def test_a_second_derivative_is_that_of_the_surrogate():
    """`d2 gated / d a2 = 2 * s'(u) / tau + a * s''(u) / tau ** 2`, `s''` by finite differences of `s'`."""
    a = torch.linspace(-3, 3, 61, dtype=torch.float64).requires_grad_()
    v_threshold, tau, alpha, step = 0.1, 2.0, 2.0, 1e-5
    (first,) = torch.autograd.grad(spike_gate(a, v_threshold, tau, alpha).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    u = a.detach() / tau - v_threshold
    slope = (atan_surrogate(u + step, alpha) - atan_surrogate(u - step, alpha)) / (2 * step)
    torch.testing.assert_close(
        second, 2 * atan_surrogate(u, alpha) / tau + a.detach() * slope / tau**2, rtol=1e-6, atol=1e-6
    )


def test_a_second_derivative_straight_through_is_that_of_the_window():
    """`d2 gated / d a2 = (1 - spikes) * w'(u) / tau`, `w'` by finite differences of `w`."""
    a = torch.linspace(-3, 3, 61, dtype=torch.float64).requires_grad_()
    v_threshold, tau, alpha, step = 0.1, 2.0, 2.0, 1e-5
    (first,) = torch.autograd.grad(spike_gate(a, v_threshold, tau, alpha, True).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    u = a.detach() / tau - v_threshold
    slope = (straight_through_window(u + step, alpha) - straight_through_window(u - step, alpha)) / (2 * step)
    torch.testing.assert_close(second, torch.where(u < 0, slope, 0) / tau, rtol=1e-6, atol=1e-6)


def test_per_sample_gradients_of_a_model():
    model = spiking(tiny_opt(), v_threshold=0.03, learn_threshold=True)
    model.set_attn_implementation("eager")
    found = trained(model)

    def loss(parameters, ids):
        return functional_call(model, parameters, kwargs={"input_ids": ids[None], "use_cache": False}).logits.mean()

    by_sample = vmap(grad(loss), (None, 0))(found, IDS)
    expected = torch.autograd.grad(model(IDS, use_cache=False).logits.mean(), list(found.values()))
    for name, value in zip(found, expected, strict=True):
        torch.testing.assert_close(by_sample[name].mean(0), value, rtol=1e-3, atol=1e-6)


def test_jacobian_by_the_input():
    model, x = layer_of("linear", "fixed")
    leaf = x[0, :1].clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(model(leaf)[0, i], leaf)[0] for i in range(5)])
    torch.testing.assert_close(jacrev(model)(leaf.detach())[0], expected, rtol=1e-4, atol=1e-6)
