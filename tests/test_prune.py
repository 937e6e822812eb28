"""Pruning: ranks that never fire are removed; the others compute, save and load the same."""

import copy
import math
import re

import pytest
import torch
from conftest import spiking, tiny_opt
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn

from spikelora import SpikeLoraConfig, SpikeLoraError, prune_ranks
from spikelora.method.gate import SpikeGate
from spikelora.method.layers import Linear

TOKENS = torch.arange(3, 31).view(2, 14)
BATCHES = [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}]
EYE = torch.eye(4)


class Stack(nn.Module):
    """`x (N, 4)` through two layers whose names end alike; `idle` is never called."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})
        self.idle = nn.Linear(4, 4)

    def forward(self, x, attention_mask=None):
        return self.fc(x) + self.inner["fc"](x)


def by_hand(targets=("fc",), **options) -> PeftModel:
    """Rank i of each module sees feature i: `a = x`, and it fires where `x >= 1`."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(targets), "v_threshold": 0.5, "tau": 2.0} | options
    model = get_peft_model(Stack(), SpikeLoraConfig(**options)).eval()
    for module in model.modules():
        if isinstance(module, Linear):
            module.lora_A["default"].weight.data.copy_(EYE[: module.r["default"]])
            nn.init.normal_(module.lora_B["default"].weight)
    return model


def trained(base, **options) -> PeftModel:
    torch.manual_seed(0)
    options = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "v_threshold": 0.45} | options
    model = get_peft_model(base, SpikeLoraConfig(**options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def layers(model: nn.Module) -> dict[str, Linear]:
    return {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, Linear)}


def state(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Rank 1 fires at the first token, rank 3 at the second, at equality; ranks 0 and 2 never do.
X = torch.tensor([[0.9, 2.0, -3.0, 0.0], [0.5, 0.0, 0.2, 1.0]])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_by_hand(use_rslora):
    model = by_hand(use_rslora=use_rslora)
    layer = model.base_model.model.fc
    expected, B, scaling = model(X), layer.lora_B["default"].weight.clone(), layer.scaling["default"]

    assert prune_ranks(model, [{"x": X[:1]}, {"x": X[1:]}]) == {"fc": 2, "inner.fc": 2}
    assert torch.equal(layer.lora_A["default"].weight, EYE[[1, 3]])
    assert torch.equal(layer.lora_B["default"].weight, B[:, [1, 3]])
    assert (layer.lora_A["default"].out_features, layer.lora_B["default"].in_features) == (2, 2)
    assert layer.r["default"] == 2
    assert layer.scaling["default"] == scaling == (3 if use_rslora else 1.5)
    assert layer.lora_alpha["default"] == pytest.approx(3 * math.sqrt(2) if use_rslora else 3)
    assert all(p.requires_grad for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight))
    torch.testing.assert_close(model(X), expected)


def test_a_silent_module_keeps_one_rank_and_an_alive_one_all():
    model = by_hand(rank_pattern={"^fc": 1})
    for gate in [m for name, m in model.named_modules() if isinstance(m, SpikeGate) and "inner" in name]:
        gate.v_threshold.data.fill_(100)
    config = copy.deepcopy(model.peft_config["default"])
    expected = model(torch.ones(1, 4))

    assert prune_ranks(model, [{"x": torch.ones(1, 4)}]) == {"fc": 0, "inner.fc": 3}
    assert torch.equal(model.base_model.model.inner["fc"].lora_A["default"].weight, EYE[:1])
    assert torch.equal(model(torch.ones(1, 4)), expected)
    assert model.peft_config["default"].rank_pattern == {"^fc": 1, r"^inner\.fc": 1}
    assert config.alpha_pattern == {}
    assert model.peft_config["default"].alpha_pattern == {r"^inner\.fc": 1.5}


def test_padding_does_not_count():
    model = by_hand()
    x = torch.stack((X[0], torch.full((4,), 9.0))).unsqueeze(0)

    assert prune_ranks(model, [{"x": x, "attention_mask": torch.tensor([[1, 0]])}]) == {"fc": 3, "inner.fc": 3}


def test_modules_that_no_token_reached_stay():
    model = by_hand(targets=("fc", "idle"))
    idle = model.base_model.model.idle.lora_A["default"].weight

    with pytest.warns(RuntimeWarning, match="No calibration data reached idle: their ranks stay as they are"):
        removed = prune_ranks(model, [{"x": X}])
    assert removed == {"fc": 2, "inner.fc": 2}
    assert model.base_model.model.idle.lora_A["default"].weight is idle
    assert model.peft_config["default"].rank_pattern == {"^fc": 2, r"^inner\.fc": 2}


def test_only_active_adapters_are_pruned_even_with_a_shared_configuration():
    model = by_hand()
    model.add_adapter("other", model.peft_config["default"])
    before = {name: tensor for name, tensor in state(model).items() if ".other." in name}

    assert prune_ranks(model, [{"x": X}]) == {"fc": 2, "inner.fc": 2}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert model.peft_config["other"].rank_pattern == {}
    model.base_model.set_adapter(["default", "other"])
    for layer in layers(model).values():
        layer.lora_A["other"].weight.data.copy_(EYE)
    removed = prune_ranks(model, [{"x": X}])
    assert removed == {"fc.default": 0, "inner.fc.default": 0, "fc.other": 2, "inner.fc.other": 2}


def test_a_rank_that_gives_nan_is_no_silent_one():
    model = by_hand()
    x = torch.tensor([[1.0, math.nan, 0.0, 0.0]])

    assert prune_ranks(model, [{"x": x}]) == {"fc": 0, "inner.fc": 0}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_and_its_reload(use_rslora, dtype, tmp_path):
    patterns = {"rank_pattern": {"fc1": 6}, "alpha_pattern": {"[qk]_proj": 20}}
    model = trained(tiny_opt().to(dtype), use_rslora=use_rslora, **patterns)
    expected, scalings = model(**BATCHES[0]).logits, {n: m.scaling["default"] for n, m in layers(model).items()}
    ranks = {name: layer.r["default"] for name, layer in layers(model).items()}

    removed = prune_ranks(model, BATCHES)
    assert 0 < sum(removed.values()) < sum(ranks.values())
    assert len(set(removed.values())) > 2
    found = {name: layer.r["default"] for name, layer in layers(model).items()}
    assert found == {name: r - removed[name] for name, r in ranks.items()}
    assert {n: m.scaling["default"] for n, m in layers(model).items()} == scalings
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(model(**BATCHES[0]).logits, expected, rtol=0, atol=tolerance)
    assert prune_ranks(model, BATCHES) == dict.fromkeys(removed, 0)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_opt().to(dtype), tmp_path)
    assert {name: layer.r["default"] for name, layer in layers(loaded).items()} == found
    assert {n: m.scaling["default"] for n, m in layers(loaded).items()} == pytest.approx(scalings, rel=1e-15)
    assert torch.equal(loaded(**BATCHES[0]).logits, model(**BATCHES[0]).logits)


def test_a_key_matches_its_module_alone():
    model = by_hand(rank_pattern={r".*fc": 4, "[a-z.]+": 4})
    prune_ranks(model, [{"x": X}])
    pattern = model.peft_config["default"].rank_pattern

    assert pattern == {"^fc": 2, r"^inner\.fc": 2}
    assert get_pattern_key(pattern, "fc") == "^fc"
    assert get_pattern_key(pattern, "inner.fc") == r"^inner\.fc"
    for other in ("a.fc", "a.inner.fc", "innerxfc", "fc.fc"):
        assert get_pattern_key(pattern, other) == other


def test_training_goes_on():
    model = by_hand().train()
    prune_ranks(model, [{"x": X}])
    layer = model.base_model.model.fc
    assert model.training
    assert layer.training

    model(X).sum().backward()
    assert layer.lora_A["default"].weight.grad.shape == (2, 4)
    assert layer.lora_B["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "`batches` is empty"),
        ([{"x": torch.empty(0, 4)}], "no token"),
        ([{"x": X[None], "attention_mask": torch.zeros(1, 2)}], "no token"),
        ([{"x": X}, X], "keyword arguments"),
    ],
)
def test_bad_batches_leave_the_model_as_it_was(batches, message):
    model = by_hand()
    before, config = state(model), copy.deepcopy(model.peft_config["default"])

    with pytest.raises(SpikeLoraError, match=re.escape(message)):
        prune_ranks(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.peft_config["default"] == config


def test_models_without_spiking_adapters_or_configurations():
    with pytest.raises(SpikeLoraError, match="has no spiking adapter"):
        prune_ranks(get_peft_model(Stack(), LoraConfig(target_modules=["fc"])), [{"x": X}])
    with pytest.raises(SpikeLoraError, match="no `peft_config`"):
        prune_ranks(nn.Sequential(by_hand().base_model.model.fc), [{"input": X}])


def test_tied_layers_keep_their_ranks(opt):
    model = spiking(opt, target_modules=["embed_tokens"], ensure_weight_tying=True, v_threshold=1e30)
    assert set(prune_ranks(model, [{"input_ids": torch.arange(3, 17).view(2, 7)}]).values()) == {0}
