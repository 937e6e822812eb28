"""The ledger of operations, against counts by hand."""

import json
import math

import pytest
import torch
from conftest import tiny_gpt2, tiny_opt
from peft import get_peft_model
from torch import nn

from spikelora import Ledger, SparsityMeter, SpikeLoraConfig, SpikeLoraError, operations

# Three tokens whose first two features are `a`, as A is the identity; tau is 2, so that v is half of each, and
# the threshold 1. Rank 0 spikes at two tokens, rank 1 at one, the last token is silent: 3 of 6 elements, 2 of 3 tokens.
X = torch.tensor([[2.0, 3.0, 9.0], [2.5, 1.0, 9.0], [-5.0, 1.9, 9.0]])


class Two(nn.Module):
    """A layer that runs and one that does not, `in = 3`, `out = 5`."""

    def __init__(self, out_features=5):
        super().__init__()
        self.up = nn.Linear(3, out_features)
        self.idle = nn.Linear(3, out_features)

    def forward(self, x):
        return self.up(x)


def spiking(base=None, adapters=("default",), **options):
    options = {"r": 2, "target_modules": ["up", "idle"], "v_threshold": 1.0} | options
    model = None
    for name in adapters:
        config = SpikeLoraConfig(**options)
        if model is None:
            model = get_peft_model(base or Two(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = torch.eye(*parameter.shape)
    return model.eval()


def measure(model, x=X):
    with SparsityMeter(model) as meter, torch.no_grad():
        model(x)
    return meter.report()


@pytest.fixture
def model():
    return spiking()


def counts(operations):
    return [
        operations.macs,
        operations.multiplications,
        operations.additions,
        operations.comparisons,
        operations.divisions,
        operations.weight_words,
        operations.activation_words,
    ]


def test_a_module_counted_by_hand(model):
    module = operations(model, measure(model)).modules["up"]

    assert (module.module, module.adapter) == ("up", "default")
    assert (module.in_features, module.out_features, module.r, module.firing_share) == (3, 5, 2, 0.5)
    # MACs, multiplications, additions, comparisons, divisions, words of weights and of activations.
    assert counts(module.base) == [15, 0, 0, 0, 0, 15, 8]
    assert counts(module.lora_merged) == [0, 0, 0, 0, 0, 0, 0]
    # A 6 and B 10; scaling and sum 5 outputs; x 3, a written and read 4, y read and written 10.
    assert counts(module.lora_unmerged) == [16, 5, 5, 0, 0, 16, 17]
    # The gate: three operations on each of 2 ranks, two numbers read.
    assert counts(module.dense) == [16, 7, 5, 2, 2, 18, 17]
    # B at half of the elements; its outputs at two of three tokens.
    expected = [6 + 5, 10 / 3 + 2, 10 / 3, 2, 2, 6 + 5 + 2, 3 + 4 + 20 / 3]
    assert counts(module.effective) == pytest.approx(expected, rel=1e-15)


def test_energy_counted_by_hand(model):
    module = operations(model, measure(model)).modules["up"]

    assert module.base.energy == pytest.approx(15 * 4.6 + 15 * 640 + 8 * 5)
    assert module.lora_merged.energy == 0
    assert module.lora_unmerged.energy == pytest.approx(16 * 4.6 + 5 * 3.7 + 5 * 0.9 + 16 * 640 + 17 * 5)
    assert module.dense.energy == pytest.approx(16 * 4.6 + 9 * 3.7 + 7 * 0.9 + 18 * 640 + 17 * 5)
    effective = 11 * 4.6 + (16 / 3 + 2) * 3.7 + (10 / 3 + 2) * 0.9 + 13 * 640 + (7 + 20 / 3) * 5
    assert module.effective.energy == pytest.approx(effective)


def test_weights_read_once_for_several_tokens(model):
    ledger = operations(model, measure(model), tokens_per_pass=2, weight_pj=1.0, activation_pj=0.5)
    module = ledger.modules["up"]

    assert (ledger.tokens_per_pass, ledger.weight_pj, ledger.activation_pj) == (2, 1.0, 0.5)
    assert [module.base.weight_words, module.lora_unmerged.weight_words, module.dense.weight_words] == [7.5, 8, 9]
    # A column of B is needed if either of two tokens spikes: 1 - 1/9 and 1 - 4/9 of the time.
    assert module.effective.weight_words == pytest.approx((6 + (8 / 9 + 5 / 9) * 5 + 2) / 2)
    assert module.effective.macs == pytest.approx(11)
    assert module.base.energy == pytest.approx(15 * 4.6 + 7.5 * 1 + 8 * 0.5)


@pytest.mark.parametrize(("v_threshold", "share"), [(-1e9, 1.0), (1e9, 0.0)])
def test_gates_that_always_or_never_open(v_threshold, share):
    model = spiking(v_threshold=v_threshold)
    module = operations(model, measure(model)).modules["up"]

    assert module.firing_share == share
    if share:
        assert module.effective == module.dense
    else:
        assert counts(module.effective) == [6, 2, 0, 2, 2, 8, 7]


def test_a_module_without_tokens_is_left_out_and_named(model):
    report = measure(model)
    ledger = operations(model, report)

    assert math.isnan(report.modules["idle"].sparsity)
    assert list(ledger.modules) == ["up"]
    assert ledger.left_out == ("idle",)
    assert str(ledger).splitlines()[-1] == "Left out, as they were not reached or are not linear: idle."


def test_the_total_is_the_sum_over_modules():
    model = get_peft_model(tiny_opt(), SpikeLoraConfig(r=4, target_modules=["q_proj", "fc1", "fc2"]))
    with SparsityMeter(model) as meter:
        model(input_ids=torch.arange(3, 31).view(2, 14))
    ledger = operations(model, meter.report())

    assert len(ledger.modules) == 6
    assert ledger.left_out == ()
    assert ledger.base.macs == 2 * (32 * 32 + 32 * 64 + 64 * 32)
    assert ledger.lora_unmerged.macs == 2 * 4 * (64 + 96 + 96)
    assert ledger.effective.macs == pytest.approx(
        sum(4 * m.in_features + 4 * m.firing_share * m.out_features for m in ledger.modules.values())
    )
    assert ledger.effective.energy == pytest.approx(sum(m.effective.energy for m in ledger.modules.values()))
    assert 0 < ledger.effective.macs < ledger.dense.macs == ledger.lora_unmerged.macs


def test_the_base_of_several_adapters_counts_once():
    model = spiking(adapters=("one", "two"))
    model.base_model.set_adapter(["one", "two"])
    ledger = operations(model, measure(model))

    assert list(ledger.modules) == ["up.one", "up.two"]
    assert ledger.left_out == ("idle.one", "idle.two")
    assert ledger.base.macs == 15
    assert ledger.lora_unmerged.macs == 32


def test_the_sides_of_a_transposed_layer():
    model = get_peft_model(tiny_gpt2(), SpikeLoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    with SparsityMeter(model) as meter:
        model(input_ids=torch.arange(3, 31).view(2, 14))
    module = operations(model, meter.report()).modules["transformer.h.0.attn.c_attn"]

    assert (module.in_features, module.out_features) == (32, 96)
    assert module.lora_unmerged.macs == 4 * (32 + 96)


def test_verdict_where_it_is_cheaper(model):
    ledger = operations(model, measure(model))

    lora = 16 * 4.6 + 5 * 3.7 + 5 * 0.9 + 16 * 640 + 17 * 5
    effective = 11 * 4.6 + (16 / 3 + 2) * 3.7 + (10 / 3 + 2) * 0.9 + 13 * 640 + (7 + 20 / 3) * 5
    base = 15 * 4.6 + 15 * 640 + 8 * 5
    assert ledger.saving == pytest.approx(1 - effective / lora)
    assert ledger.verdict == (
        f"If all that is silent is skipped, SpikeLoRA adds {100 * (1 - effective / lora):.3g}% less energy per token "
        "to the base than unmerged LoRA, and 31.2% fewer multiply-accumulates. With the base included it takes "
        f"{100 * (1 - (base + effective) / (base + lora)):.3g}% less energy. A is dense: it alone is 37.5% of LoRA's "
        "multiply-accumulates, which no sparsity saves. Computed in full, SpikeLoRA adds 12.4% more energy than "
        "unmerged LoRA. It is never cheaper than merged LoRA, which adds nothing to the base."
    )


def test_verdict_where_it_costs_more():
    model = spiking(v_threshold=-1e9)
    ledger = operations(model, measure(model))

    assert ledger.saving < 0
    assert f"SpikeLoRA adds {-100 * ledger.saving:.3g}% more energy per token" in ledger.verdict
    assert "and no fewer multiply-accumulates" in ledger.verdict


def test_as_dict_table_and_text(model):
    ledger = operations(model, measure(model))
    as_dict = json.loads(json.dumps(ledger.to_dict()))
    table = ledger.to_pandas()

    assert isinstance(ledger, Ledger)
    assert as_dict["modules"]["up"]["effective"]["macs"] == 11
    assert as_dict["effective"] == as_dict["modules"]["up"]["effective"]
    assert (as_dict["left_out"], as_dict["verdict"]) == (["idle"], ledger.verdict)
    assert table.loc[0, ["module", "r", "base.macs", "dense.divisions"]].tolist() == ["up", 2, 15, 2]
    lines = str(ledger).splitlines()
    assert lines[0].split() == ["base", "lora_merged", "lora_unmerged", "dense", "effective"]
    assert lines[1].split() == ["up", "r=2", "fires", "50.0%", "MACs", "15.0", "0.0", "16.0", "16.0", "11.0"]
    assert lines[2].split() == ["nJ", "9.7", "0.0", "10.4", "11.7", "8.5"]
    assert lines[3].split()[:4] == ["all", "modules", "MACs", "15.0"]
    assert lines[6] == ledger.verdict
    assert len({len(line) for line in lines[:5]}) == 1


@pytest.mark.parametrize("other", [{"target_modules": ["idle"]}, {"r": 1}])
def test_a_report_of_another_model_is_refused(model, other):
    with pytest.raises(SpikeLoraError, match=r"no adapter `default` of rank 2 on `(up|idle)`. Measure it with"):
        operations(spiking(**other), measure(model))


def test_a_report_without_tokens_is_refused(model):
    with pytest.raises(SpikeLoraError, match=r"`report` has no token of a linear layer\. Run the model"):
        operations(model, SparsityMeter(model).report())


def test_a_model_without_adapters_is_refused(model):
    with pytest.raises(SpikeLoraError, match="has no spiking adapter"):
        operations(Two(), measure(model))


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens_per_pass", 0), ("tokens_per_pass", 1.5), ("tokens_per_pass", True)]
    + [(name, value) for name in ("weight_pj", "activation_pj") for value in (-1.0, math.inf, math.nan)],
)
def test_numbers_out_of_range_are_refused(model, name, value):
    with pytest.raises(SpikeLoraError, match=f"`{name}` must be"):
        operations(model, measure(model), **{name: value})
