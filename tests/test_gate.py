import copy
import pickle

import pytest
import torch

from spikelora.method.gate import SpikeGate
from spikelora.method.neuron import spike_gate
from spikelora.method.parameters import MIN_TAU

A = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def make_gate(v_threshold=0.1, tau=2.0, surrogate_alpha=2.0, learn_threshold=False, learn_tau=False):
    return SpikeGate(v_threshold, tau, surrogate_alpha, learn_threshold, learn_tau)


def step(gate, sign, lr):
    """One step of SGD on `sign * sum(gate(A))`; +1 raises tau, -1 lowers it. Returns the gradient of tau."""
    gate.zero_grad()
    optimizer = torch.optim.SGD([gate.tau], lr=lr)
    (sign * gate(A.relu()).sum()).backward()
    optimizer.step()
    return gate.tau.grad.item()


def test_state_dict_holds_the_two_tensors():
    state = make_gate(0.1, 3.0).state_dict()

    assert set(state) == {"v_threshold", "tau"}
    assert torch.equal(state["v_threshold"], torch.tensor([0.1]))
    assert torch.equal(state["tau"], torch.tensor([3.0]))


@pytest.mark.parametrize(
    "cast",
    [
        lambda gate: gate.half(),
        lambda gate: gate.to(torch.bfloat16),
        lambda gate: gate.double(),
        lambda gate: gate.to(device="cpu", dtype=torch.float16),
        lambda gate: torch.nn.Sequential(gate, torch.nn.Linear(2, 2)).to(torch.bfloat16)[0],
    ],
    ids=["half", "bfloat16", "double", "device and dtype", "inside a model"],
)
def test_a_cast_leaves_float32_and_the_exact_value(cast):
    gate = cast(make_gate(0.1, 1.3, learn_threshold=True))

    assert torch.equal(gate.v_threshold, torch.tensor([0.1]))
    assert torch.equal(gate.tau, torch.tensor([1.3]))
    assert (gate.v_threshold.requires_grad, gate.tau.requires_grad) == (True, False)


@pytest.mark.parametrize("arguments", [("meta",), ("meta", torch.bfloat16)], ids=["device", "device and dtype"])
def test_a_move_moves(arguments):
    gate = make_gate().to(*arguments)

    assert [(t.device.type, t.dtype) for t in gate.buffers()] == [("meta", torch.float32)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_forward_is_the_gate_of_the_neuron(dtype):
    a = A.to(dtype)

    gated = make_gate(0.25, 1.5, 4.0)(a)

    assert gated.dtype == dtype
    assert torch.equal(gated, spike_gate(a, 0.25, 1.5, 4.0))
    assert 0 < gated.count_nonzero() < gated.numel()


def test_the_width_of_the_surrogate_reaches_the_gradient():
    a = torch.tensor([0.2], requires_grad=True)

    make_gate(0.1, 2.0, surrogate_alpha=6.0)(a).sum().backward()

    # On the threshold: 1 + a * (alpha / 2) / tau.
    assert a.grad.item() == pytest.approx(1 + 0.2 * 3 / 2)


def test_spikes():
    gate = make_gate(0.5, 2.0)

    spikes = gate.spikes(torch.tensor([[1.0, 0.9], [-2.0, 1.1]]))

    assert spikes.dtype == torch.bool
    assert spikes.tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("learn_threshold", [False, True])
@pytest.mark.parametrize("learn_tau", [False, True])
def test_only_what_is_learned_is_a_parameter(learn_threshold, learn_tau):
    gate = make_gate(learn_threshold=learn_threshold, learn_tau=learn_tau)
    learned = {name for name, is_learned in (("v_threshold", learn_threshold), ("tau", learn_tau)) if is_learned}

    assert dict(gate.named_parameters()).keys() == learned
    assert dict(gate.named_buffers()).keys() == {"v_threshold", "tau"} - learned
    assert gate.state_dict().keys() == {"v_threshold", "tau"}
    gate.requires_grad_(True)  # as PEFT does for an active adapter
    assert {name for name in ("v_threshold", "tau") if getattr(gate, name).requires_grad} == learned


@pytest.mark.parametrize("tau", [2.0, 1.25, MIN_TAU + 2**-23])
def test_learned_tau_has_the_gradient_of_the_neuron(tau):
    gate = make_gate(tau=tau, learn_threshold=True, learn_tau=True)
    v_threshold, free_tau = torch.tensor([0.1], requires_grad=True), torch.tensor([tau], requires_grad=True)

    gate(A).sum().backward()
    spike_gate(A, v_threshold, free_tau, 2.0).sum().backward()

    assert free_tau.grad != 0
    assert torch.equal(gate.tau.grad, free_tau.grad)
    assert torch.equal(gate.v_threshold.grad, v_threshold.grad)


def test_learned_tau_stays_above_one():
    gate = make_gate(tau=2.0, learn_tau=True)

    step(gate, -1, lr=1e6)

    assert gate.tau < -1000
    assert torch.equal(gate(A), spike_gate(A, 0.1, MIN_TAU, 2.0))
    assert torch.equal(gate.spikes(A), A / MIN_TAU >= 0.1)
    saved = gate.state_dict()["tau"]
    assert saved.item() == MIN_TAU > 1
    assert not saved.requires_grad


def test_learned_tau_below_its_floor_reloads_to_the_same_gate():
    gate = make_gate(tau=2.0, learn_tau=True)
    step(gate, -1, lr=1e6)
    # Negative values too: at the stored, negative tau it is they that would fire.
    a = torch.linspace(-1, 1, 201)

    reloaded = make_gate(tau=5.0, learn_tau=True)
    reloaded.load_state_dict(gate.state_dict())

    assert torch.equal(reloaded(a), gate(a))
    assert not torch.equal(make_gate(tau=5.0)(a), gate(a))


def test_learned_tau_leaves_its_floor_upward_only():
    gate = make_gate(tau=1.5, learn_tau=True)
    step(gate, -1, lr=10.0)
    floored = gate.tau.item()
    assert floored < 1

    assert step(gate, -1, lr=10.0) == 0
    assert gate.tau.item() == floored

    assert step(gate, +1, lr=100.0) < 0
    assert gate.tau > 1
    assert torch.equal(gate(A), spike_gate(A, 0.1, gate.tau.item(), 2.0))


def test_state_dict_with_keep_vars_gives_the_parameters():
    gate = make_gate(learn_tau=True)

    assert gate.state_dict(keep_vars=True)["tau"] is gate.tau


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda gate: pickle.loads(pickle.dumps(gate))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_everything(duplicate):
    gate = make_gate(0.3, 1.7, 4.0, learn_threshold=True, learn_tau=False)

    twin = duplicate(gate)

    assert repr(twin) == repr(gate)
    assert (twin.surrogate_alpha, twin.learn_threshold, twin.learn_tau) == (4.0, True, False)
    assert (twin.v_threshold.requires_grad, twin.tau.requires_grad) == (True, False)
    assert torch.equal(twin(A), gate(A))
    with torch.no_grad():
        twin.v_threshold.fill_(9.0)
    assert gate.v_threshold.item() == pytest.approx(0.3)
