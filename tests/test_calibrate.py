"""Calibration: thresholds are quantiles of each module's own activations, and nothing changes if it fails."""

import copy

import pytest
import torch
from conftest import spiking as trained
from conftest import tiny_llama, tiny_opt
from peft import get_peft_model
from torch import nn

from spikelora import SparsityMeter, SpikeLoraConfig, SpikeLoraError, calibrate_thresholds
from spikelora.sparsity import calibration
from spikelora.sparsity.observe import gates

TOKENS = torch.randint(3, 100, (24, 16), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": part} for part in TOKENS.split(4)]


def spiking(base, **options):
    torch.manual_seed(0)
    return get_peft_model(base, SpikeLoraConfig(**({"target_modules": "all-linear"} | options)))


def one_layer(A, **options):
    """One layer whose keyword argument is `input`, with the given A; tau is 2."""
    model = spiking(nn.Sequential(nn.Linear(A.shape[1], 2)), r=A.shape[0], target_modules=["0"], **options)
    model.base_model.model[0].lora_A["default"].weight.data = A
    return model


def thresholds(model):
    return {gated.module: gated.gate.v_threshold.item() for gated in gates(model)}


def test_the_quantile_of_known_activations():
    model = one_layer(torch.eye(2))
    x = torch.tensor([[k, 10.0 + k] for k in range(10)])  # v is 0 to 4.5 and 5 to 9.5 in steps of 0.5

    assert calibrate_thresholds(model, [{"input": x}], 0.75) == {"0": 7.5}
    with SparsityMeter(model) as meter:
        model(x)
    assert meter.report().sparsity == 0.75


@pytest.mark.parametrize("target", [0.5, 0.9, 0.97])
def test_every_module_meets_the_target(target):
    model = spiking(tiny_opt(), r=8)
    model.train()
    found = calibrate_thresholds(model, iter(BATCHES), target)

    assert model.training
    assert found == thresholds(model)
    assert len(set(found.values())) == len(found) == 12
    with SparsityMeter(model) as meter:
        for batch in BATCHES:
            model(**batch)
    assert {round(m.sparsity, 3) for m in meter.report().modules.values()} == {target}


def test_the_adapter_meets_the_target_and_modules_find_their_own_shares():
    model = spiking(tiny_opt(), r=8)
    found = calibrate_thresholds(model, BATCHES, 0.8, target_scope="adapter")

    assert found == thresholds(model)
    with SparsityMeter(model) as meter:
        for batch in BATCHES:
            model(**batch)
    report = meter.report()
    assert report.sparsity == found.sparsity == pytest.approx(0.8, abs=0.005)
    assert {name: m.sparsity for name, m in report.modules.items()} == pytest.approx(
        {name: 0.8 + off for name, off in found.off.items()}
    )
    assert max(found.off.values()) - min(found.off.values()) > 0.1
    assert max(m.sparsity for m in report.modules.values()) <= 0.98 + 1e-3  # a tenth of 0.2 fires in each


def test_an_adapter_that_misses_its_target_is_named(monkeypatch):
    monkeypatch.setattr(calibration, "_MAX_ROUNDS", 1)
    model = trained(tiny_opt(), lora_alpha=500)
    with pytest.warns(
        RuntimeWarning, match=r"After 1 rounds these are still off the target 0\.9: adapter 'default' by"
    ):
        calibrate_thresholds(model, BATCHES, 0.9, target_scope="adapter")


def test_padding_is_left_out():
    model, mask = spiking(tiny_opt()), torch.ones_like(TOKENS)
    mask[::2, 5:] = 0
    found = calibrate_thresholds(model, [{"input_ids": TOKENS, "attention_mask": mask}], 0.8)
    garbage = torch.where(mask.bool(), TOKENS, 50)

    assert calibrate_thresholds(model, [{"input_ids": garbage, "attention_mask": mask}], 0.8) == pytest.approx(found)
    assert calibrate_thresholds(model, [{"input_ids": TOKENS}], 0.8) != pytest.approx(found)


def test_texts_packed_in_one_row_count_as_each_does_alone():
    texts = [torch.arange(3, 12), torch.arange(20, 25), torch.arange(40, 54)]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    packed = [{"input_ids": torch.cat(texts)[None], "position_ids": positions}]
    model = trained(tiny_llama(), v_threshold=0.02)
    together = calibrate_thresholds(model, packed, 0.8)
    assert model.config.use_cache
    alone = calibrate_thresholds(trained(tiny_llama(), v_threshold=0.02), [{"input_ids": t[None]} for t in texts], 0.8)
    assert together == pytest.approx(alone, abs=1e-6)


def test_a_dead_adapter_comes_to_life():
    model = spiking(tiny_opt(), v_threshold=1e6)
    calibrate_thresholds(model, BATCHES, 0.9)
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()

    assert all(gated.layer.lora_B["default"].weight.grad.any() for gated in gates(model))


def test_only_active_adapters_are_calibrated():
    model = spiking(tiny_opt())
    model.add_adapter("other", SpikeLoraConfig(target_modules=["fc1"]))
    model.set_adapter("other")
    found = calibrate_thresholds(model, BATCHES, 0.9)

    assert set(found) == {"model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"}
    assert all(g.gate.v_threshold.item() == pytest.approx(0.1) for g in gates(model) if g.adapter == "default")


class Router(nn.Module):
    """Never uses its second layer."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_a_module_that_no_data_reaches_keeps_its_threshold():
    model = spiking(Router(), target_modules=["used", "unused"])
    with pytest.warns(RuntimeWarning, match="reached unused:"):
        found = calibrate_thresholds(model, [{"x": torch.randn(100, 4)}], 0.9)
    assert set(found) == {"used"}


@pytest.mark.parametrize("target", [0, 1, -0.1, 1.5, float("nan"), True, "0.9", None])
def test_a_target_out_of_range(target):
    with pytest.raises(SpikeLoraError, match="`target_sparsity` must be a share"):
        calibrate_thresholds(spiking(tiny_opt()), BATCHES, target)
    if target is not None:
        with pytest.raises(SpikeLoraError, match="`target_sparsity` must be a share"):
            SpikeLoraConfig(target_sparsity=target)


def silence(n):
    return [{"input_ids": TOKENS[:n], "attention_mask": torch.zeros_like(TOKENS[:n])}]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "`batches` is empty"),
        (silence(4), "has no token"),
        ([{"input_ids": TOKENS[:, :0]}], "has no token"),
        ([TOKENS], "keyword arguments.*got a Tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_batches_change_nothing(batches, message):
    model = spiking(tiny_opt())
    before, training = thresholds(model), model.training
    with pytest.raises(SpikeLoraError, match=message):
        calibrate_thresholds(model, batches)
    assert thresholds(model) == before
    assert model.training is training
    assert not any(gated.gate.observers for gated in gates(model))


@pytest.mark.parametrize("r", [2, 8])  # with eight values the share of 7/8 would be near
def test_constant_activations_have_no_threshold(r):
    model = one_layer(torch.arange(1.0, 2 * r + 1).view(r, 2))
    with pytest.raises(SpikeLoraError, match=r"near 0.9 in `0` \(nearest: none\): its activations are .*constant"):
        calibrate_thresholds(model, [{"input": torch.ones(50, 2)}], 0.9)
    assert thresholds(model) == {"0": pytest.approx(0.1)}


def test_activations_that_repeat_too_often_have_no_threshold():
    model = one_layer(torch.eye(2))
    x = torch.ones(50, 2)
    x[:2] = torch.tensor([[2.0], [3.0]])
    with pytest.raises(SpikeLoraError, match=r"near 0.7 in `0` \(nearest: 0.96\)"):
        calibrate_thresholds(model, [{"input": x}], 0.7)


def test_a_trained_adapter_settles_in_rounds(monkeypatch):
    model = trained(tiny_opt(), r=8, lora_alpha=64)

    def furthest():
        with SparsityMeter(model) as meter:
            for batch in BATCHES:
                model(**batch)
        return max(abs(module.sparsity - 0.9) for module in meter.report().modules.values())

    with monkeypatch.context() as once:
        once.setattr(calibration, "_MAX_ROUNDS", 1)
        with pytest.warns(RuntimeWarning, match=r"still off the target 0\.9: .*fc2` by \+0\.\d{3}"):
            found = calibrate_thresholds(model, BATCHES)
    assert found.rounds == 1
    assert furthest() > 0.05
    assert furthest() == pytest.approx(max(map(abs, found.off.values())))
    found = calibrate_thresholds(model, iter(BATCHES))
    assert found == thresholds(model)
    assert 1 < found.rounds < 8
    assert furthest() <= 0.03
    assert furthest() == pytest.approx(max(map(abs, found.off.values())))
    assert found.sparsity == pytest.approx(0.9, abs=0.02)


def test_an_adapter_that_does_nothing_yet_takes_one_round():
    found = calibrate_thresholds(spiking(tiny_opt()), BATCHES, 0.7)
    assert found.rounds == 1
    assert max(map(abs, found.off.values())) < 1e-3


def test_an_error_in_a_later_round_changes_nothing(monkeypatch):
    model = trained(tiny_opt(), r=8, lora_alpha=64)
    before, find, calls = thresholds(model), calibration._thresholds, []

    def fail_later(*args):
        calls.append(thresholds(model))
        if len(calls) == 2:
            raise SpikeLoraError("none near")
        return find(*args)

    monkeypatch.setattr(calibration, "_thresholds", fail_later)
    with pytest.raises(SpikeLoraError, match="none near"):
        calibrate_thresholds(model, BATCHES)
    assert calls[1] != before
    assert thresholds(model) == before


def test_one_token_is_not_constant():
    model = one_layer(torch.eye(2))
    assert calibrate_thresholds(model, [{"input": torch.tensor([[1.0, 2.0]])}], 0.5) == {"0": 1.0}


def test_an_error_in_the_middle_changes_nothing():
    def batches():
        yield BATCHES[0]
        raise OSError("the disk is gone")

    model = spiking(tiny_opt())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OSError, match="disk"):
        calibrate_thresholds(model, batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_spiking_adapter():
    with pytest.raises(SpikeLoraError, match="no spiking adapter"):
        calibrate_thresholds(tiny_opt(), BATCHES)


@pytest.mark.parametrize(("value", "share"), [(torch.nan, 1.0), (torch.inf, 0.2)])
def test_activations_that_are_no_numbers_have_no_threshold(value, share):
    model, x = one_layer(torch.eye(1)), torch.randn(100, 1)
    x[: round(share * 100)] = value
    with pytest.raises(SpikeLoraError, match=r"near 0\.9 in `0`"):
        calibrate_thresholds(model, [{"input": x}], 0.9)
    assert thresholds(model) == {"0": pytest.approx(0.1)}


class Experts(Router):
    """Calls its second layer without any token."""

    def forward(self, x):
        return self.used(x) + self.unused(x[:0]).sum()


def test_a_module_that_runs_without_tokens_keeps_its_threshold():
    model = spiking(Experts(), target_modules=["used", "unused"])
    with pytest.warns(RuntimeWarning, match="reached unused:"):
        found = calibrate_thresholds(model, [{"x": torch.randn(100, 4)}], 0.9)
    assert set(found) == {"used"}
