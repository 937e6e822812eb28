"""Embeddings and convolutions: LoRA's layers with the gate between their A and their B."""

import copy

import pytest
import torch
from conftest import spiking, tiny_opt
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from spikelora import SparsityMeter, SpikeLoraConfig, SpikeLoraError, from_lora, operations, prune_ranks, to_lora
from spikelora.method.layers import Conv1d, Embedding

NEVER, ALWAYS = 1e30, -1e30


class Net(nn.Module):
    """One layer to adapt, and one behind it, whose output is the logits."""

    def __init__(self, layer: nn.Module, out_features: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(out_features, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return self.head(y.flatten(2).mean(2) if y.dim() > 2 and not isinstance(x, torch.LongTensor) else y)


class Scaled(nn.Embedding):
    """An embedding that multiplies in its forward, as Gemma's does."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.embed_scale = torch.tensor(3.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


IDS = torch.arange(12).view(3, 4)
LAYERS = {
    "nn.Embedding": (lambda: nn.Embedding(20, 8), IDS),
    "nn.Embedding, scaled in its forward": (lambda: Scaled(20, 8), IDS),
    "nn.Conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), numbers(3, 6, 10)),
    "nn.Conv1d, groups": (lambda: nn.Conv1d(6, 8, 3, groups=2), numbers(3, 6, 10)),
    "nn.Conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2), numbers(3, 6, 7, 7)),
    "nn.Conv2d, groups": (lambda: nn.Conv2d(4, 8, 3, groups=4), numbers(3, 4, 7, 7)),
    "nn.Conv3d": (lambda: nn.Conv3d(2, 8, 2), numbers(3, 2, 4, 4, 4)),
}


def net(name: str) -> Net:
    torch.manual_seed(0)
    return Net(LAYERS[name][0](), 8).eval()


def adapted(name: str, **options) -> PeftModel:
    return spiking(net(name), **({"target_modules": ["layer"]} | options)).eval()


def with_other_b(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_B" in key or "lora_embedding_B" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return model


every_layer = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.compatibility("Layers", name)) for name in LAYERS]
)
groups_warn = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")


@groups_warn
@every_layer
@pytest.mark.parametrize("mixed", [{}, {"adapter_names": ["default", "__base__", "default"]}], ids=["one", "mixed"])
class TestDifferential:
    def test_a_gate_that_never_fires_gives_the_base(self, name, mixed):
        x = LAYERS[name][1]
        assert torch.equal(with_other_b(adapted(name, v_threshold=NEVER))(x, **mixed), net(name)(x))

    def test_a_gate_that_always_fires_gives_lora(self, name, mixed):
        x = LAYERS[name][1]
        model = with_other_b(adapted(name, v_threshold=ALWAYS))
        lora = get_peft_model(net(name), LoraConfig(r=4, target_modules=["layer"])).eval()
        values = model.state_dict()
        lora.load_state_dict({key: values[key] for key in lora.state_dict()})
        expected = lora(x, **mixed)
        assert not torch.equal(expected, net(name)(x))
        torch.testing.assert_close(model(x, **mixed), expected, rtol=0, atol=1e-6)


@groups_warn
@every_layer
def test_a_new_adapter_changes_nothing_and_learns(name):
    x = LAYERS[name][1]
    torch.manual_seed(1)
    model = get_peft_model(net(name), SpikeLoraConfig(r=4, target_modules=["layer"]))
    assert torch.equal(model(x), net(name)(x))
    layer = model.base_model.model.layer
    A, B = layer.low_rank("default")
    assert A.any()
    assert not B.any()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
    losses, before = [], A.detach().clone()
    for _ in range(3):
        loss = model(x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert B.any()
    assert not torch.equal(A, before)
    assert layer.neuron("default") == pytest.approx({"r": 4, "v_threshold": 0.1, "tau": 2.0})


@groups_warn
@every_layer
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reload_is_equal_to_the_bit(name, low_cpu_mem_usage, tmp_path):
    x = LAYERS[name][1]
    model = with_other_b(adapted(name, v_threshold=0.2, tau=1.5))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(loaded(x), model(x))
    assert not torch.equal(loaded(x), net(name)(x))


@groups_warn
@every_layer
def test_the_meter_counts_what_passes(name):
    x = LAYERS[name][1]
    model = with_other_b(adapted(name))
    layer = model.base_model.model.layer
    with SparsityMeter(model) as meter:
        model(x)
    if isinstance(layer, Embedding):
        a = layer.lora_embedding_A["default"].T[x]
    else:
        a = layer.lora_A["default"](x).movedim(1, -1)
    report = meter.report()
    assert report.tokens == a[..., 0].numel()
    assert report.sparsity == pytest.approx((a / 2 < 0.1).float().mean().item())


def test_an_embedding_s_padding_is_masked():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Embedding(20, 8)

        def forward(self, input_ids, attention_mask):
            return self.layer(input_ids)

    model = spiking(Model(), target_modules=["layer"])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    with SparsityMeter(model) as meter:
        model(input_ids=IDS, attention_mask=mask)
    assert meter.report().tokens == mask.sum()


def test_a_convolution_s_positions_are_no_tokens_of_the_mask():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(4, 8, 1)

        def forward(self, x, attention_mask):
            return self.layer(x)

    model = spiking(Model(), target_modules=["layer"])
    with SparsityMeter(model) as meter:  # as many channels as the mask has tokens
        model(numbers(3, 4, 10), attention_mask=torch.zeros(3, 4))
    assert meter.report().tokens == 30


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", ["nn.Embedding", "nn.Conv1d", "nn.Conv2d"])
def test_ranks_are_pruned(name, use_rslora, tmp_path):
    x = LAYERS[name][1]
    model = with_other_b(adapted(name, r=8, v_threshold=0.6, use_rslora=use_rslora))
    layer = model.base_model.model.layer
    with torch.no_grad():
        layer.low_rank("default")[0][2:5] = 0.0
    expected, scaling = model(x), layer.scaling["default"]
    removed = prune_ranks(model, [{"x": x}])["layer"]
    assert removed >= 3
    assert layer.r["default"] == len(layer.low_rank("default")[0]) == 8 - removed
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(name), tmp_path).eval()
    assert torch.equal(loaded(x), model(x))
    assert loaded.base_model.model.layer.scaling["default"] == pytest.approx(scaling)


@groups_warn
def test_a_convolution_with_groups_keeps_its_ranks():
    model = adapted("nn.Conv1d, groups", v_threshold=NEVER)
    assert prune_ranks(model, [{"x": LAYERS["nn.Conv1d, groups"][1]}]) == {"layer": 0}


@pytest.mark.parametrize("name", ["nn.Embedding", "nn.Conv1d", "nn.Conv2d", "nn.Conv3d"])
def test_from_lora_and_back(name, capsys):
    x = LAYERS[name][1]
    lora = get_peft_model(net(name), LoraConfig(r=4, target_modules=["layer"])).eval()
    generator = torch.Generator().manual_seed(4)
    for key, parameter in lora.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    expected, plain_type = lora(x), type(lora.base_model.model.layer)
    model = from_lora(copy.deepcopy(lora), [{"x": x}], 0.5)
    assert type(model.base_model.model.layer).__mro__[-6:] == plain_type.__mro__[-6:]
    assert "overall" in capsys.readouterr().out
    assert not torch.equal(model(x), expected)
    model.base_model.model.layer.lora_gate["default"].v_threshold.data.fill_(ALWAYS)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)  # turned signs alone change nothing
    back = to_lora(model, [{"x": x}])  # of an open gate the regression is the identity
    assert back.errors["layer"] == pytest.approx(0, abs=1e-9)
    for key, value in lora.state_dict().items():
        if "lora_B" in key or "lora_embedding_B" in key:
            (saved,) = (v for k, v in back.tensors.items() if "_B" in k)
            torch.testing.assert_close(saved.abs(), value.abs(), rtol=0, atol=1e-5)


@groups_warn
def test_groups_are_not_turned_into_lora_or_back():
    x = {"x": LAYERS["nn.Conv1d, groups"][1]}
    with pytest.raises(SpikeLoraError, match="`layer` is a convolution with groups"):
        to_lora(adapted("nn.Conv1d, groups"), [x])
    lora = get_peft_model(net("nn.Conv1d, groups"), LoraConfig(r=4, target_modules=["layer"]))
    with pytest.raises(SpikeLoraError, match="`layer` is a convolution with groups"):
        from_lora(lora, [x])


def test_the_account_leaves_out_what_is_no_linear_layer():
    model = adapted("nn.Conv1d", target_modules=["layer", "head"])
    with SparsityMeter(model) as meter:
        model(LAYERS["nn.Conv1d"][1])
    ledger = operations(model, meter.report())
    assert list(ledger.modules) == ["head"]
    assert ledger.left_out == ("layer",)
    assert "are not linear: layer" in str(ledger)


def test_peft_s_names_stay():
    model = adapted("nn.Conv1d")
    assert repr(model.base_model.model.layer).startswith("lora.Conv1d(")
    assert isinstance(model.base_model.model.layer, Conv1d)
    assert not model.base_model.model.layer.supports_lora_conversion()


@pytest.mark.parametrize("act", [lambda m: m.merge_and_unload(), lambda m: m.base_model.model.layer.merge()])
@pytest.mark.parametrize("name", ["nn.Embedding", "nn.Conv2d"])
def test_merging_is_refused(name, act):
    with pytest.raises(SpikeLoraError, match="cannot be merged"):
        act(adapted(name))


def test_a_convolution_takes_an_input_without_a_batch():
    x = LAYERS["nn.Conv1d"][1]
    layer = with_other_b(adapted("nn.Conv1d")).base_model.model.layer
    torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=0, atol=1e-6)


@pytest.mark.compatibility("Many adapters", "`ensure_weight_tying` with an embedding as a target")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_tied_head_shares_the_embedding_s_matrices_turned_round(tmp_path):
    ids = torch.arange(3, 31).view(2, 14)
    options = {"r": 4, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(tiny_opt(), SpikeLoraConfig(**options))
    (A, B), (head_A, head_B) = (
        layer.low_rank("default")
        for layer in (model.base_model.model.model.decoder.embed_tokens, model.base_model.model.lm_head)
    )
    assert torch.equal(model(ids).logits, tiny_opt()(ids).logits)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert A.any()
    assert B.any()
    assert torch.equal(head_A, B.T)
    assert torch.equal(head_B, A.T)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_opt(), tmp_path)(ids).logits, model(ids).logits)
