"""From LoRA to SpikeLoRA and back: what has to stay stays, and what is lost is reported."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import tiny_gpt2, tiny_opt
from peft import LoraConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import OPTConfig, OPTForSequenceClassification

from spikelora import (
    LoraApproximation,
    SparsityMeter,
    SpikeLoraConfig,
    SpikeLoraError,
    SpikeLoraModel,
    from_lora,
    to_lora,
)
from spikelora.method.gate import SpikeGate
from spikelora.method.layers import Linear

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 100, (6, 4, 20), generator=GENERATOR)
MASK = (torch.arange(20) < torch.tensor([20, 13, 20, 7])[:, None]).long()
BATCHES = [{"input_ids": ids, "attention_mask": MASK} for ids in IDS]
ALWAYS, NEVER = -1e30, 1e30


class One(nn.Module):
    """One linear layer, with an attention mask."""

    def __init__(self, n_in=3, n_out=5):
        super().__init__()
        self.fc = nn.Linear(n_in, n_out)

    def forward(self, x, attention_mask=None):
        return self.fc(x)


def adapted(base: nn.Module, config_class=LoraConfig, **options) -> PeftModel:
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": "all-linear"} | options
    if not isinstance(base, One):
        options = {"task_type": "CAUSAL_LM"} | options
    model = get_peft_model(base, config_class(**options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def one(config_class=LoraConfig, **options) -> PeftModel:
    """`a = x` for three ranks."""
    model = adapted(One(), config_class, **({"r": 3, "lora_alpha": 6, "target_modules": ["fc"]} | options))
    model.base_model.model.fc.lora_A["default"].weight.data.copy_(torch.eye(3))
    return model


def layers(model: nn.Module, kind=Linear) -> dict[str, Linear]:
    return {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, kind)}


def fingerprint(model: nn.Module) -> tuple:
    """All that a refusal has to leave as it was."""
    return (
        {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()},
        {name: (type(module), module.training) for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: copy.deepcopy(config) for name, config in getattr(model, "peft_config", {}).items()},
        getattr(model, "peft_type", None),
    )


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    tensors, *rest = before
    now, *rest_now = fingerprint(model)
    assert rest_now == rest
    assert now.keys() == tensors.keys()
    assert all(torch.equal(now[n][0], t) and now[n][1] == pointer for n, (t, pointer) in tensors.items())


def watched(model: nn.Module, batches=BATCHES) -> dict[str, torch.Tensor]:
    """Inputs `(N, in)` of every adapted module in float64, padding left out where the shape says so."""
    seen: dict[str, list] = {}

    def note(name, mask):
        def hook(module, args):
            x = args[0].flatten(0, -2)
            seen.setdefault(name, []).append(x[mask[0].flatten().bool()].double())

        return hook

    mask: list = [None]
    handles = [layer.register_forward_pre_hook(note(name, mask)) for name, layer in layers(model, LoraLinear).items()]
    with torch.no_grad():
        for batch in batches:
            mask[0] = batch["attention_mask"]
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(xs) for name, xs in seen.items()}


def update(layer, x: torch.Tensor, gated: bool) -> torch.Tensor:
    """`scaling * B gated`, or of `a`, in float64; the spikes from float32 as the layer has them."""
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    a = x.float() @ A.T
    if gated:
        gate = layer.lora_gate["default"]
        a = torch.where(a / gate.tau >= gate.v_threshold, a, 0)
    return layer.scaling["default"] * a.detach().double() @ B.double().T


class TestFromLora:
    def test_signs_by_hand(self, capsys):
        model = one()
        fc = model.base_model.model.fc
        B = fc.lora_B["default"].weight.detach().clone()
        # More often up, but the side below has the larger sum of squares: turned. Then one that stays, and one whose
        # padding alone says to turn.
        x = torch.tensor([[[1.0, 2.0, 3.0], [1.5, -1.0, -1.0], [-3.0, 0.0, 0.5], [9.0, -9.0, -9.0]]])
        mask = torch.tensor([[1, 1, 1, 0]])
        expected = fc.base_layer(x) + fc.scaling["default"] * x @ B.T

        converted = from_lora(model, ({"x": x, "attention_mask": mask} for _ in range(2)), 5 / 9)
        signs = torch.tensor([-1.0, 1.0, 1.0])
        assert converted is model
        assert torch.equal(fc.lora_A["default"].weight, torch.diag(signs))
        assert torch.equal(fc.lora_B["default"].weight, B * signs)
        # v = a / 2 of the tokens, sorted: -.75, -.5, -.5, -.5, 0 | .25, 1, 1.5, 1.5
        assert fc.lora_gate["default"].v_threshold.item() == 0.25
        fc.lora_gate["default"].v_threshold.data.fill_(ALWAYS)
        torch.testing.assert_close(model(x), expected)
        a = (x[0, :3] * signs).double()
        lost = (torch.where(a >= 0.5, 0, a) @ (B * signs).T.double()).square().sum()
        share = lost / (a @ (B * signs).T.double()).square().sum()
        assert capsys.readouterr().out.splitlines() == [
            "What gating loses of the update, E|dLoRA - dSpike|^2 / E|dLoRA|^2 on the calibration data:",
            f"  fc: {share:.4f} at sparsity 0.5556",
            f"  overall: {share:.4f} at sparsity 0.5556",
        ]

    @pytest.mark.parametrize("target", [0.5, 0.9])
    def test_what_is_printed_is_what_is_lost(self, target, capsys):
        model = from_lora(adapted(tiny_opt(), r=6, rank_pattern={"fc1": 3}, lora_alpha=5), BATCHES, target)
        with SparsityMeter(model) as meter:
            for batch in BATCHES:
                model(**batch)
        report = meter.report()
        assert report.sparsity == pytest.approx(target, abs=0.01)
        _, *lines = capsys.readouterr().out.splitlines()
        printed = {name: float(error) for name, error in (re.findall(r"([\w.]+): (\S+)", line)[0] for line in lines)}
        lost_overall = whole_overall = 0
        for name, x in watched(model).items():
            linear, spiking = (update(layers(model)[name], x, gated) for gated in (False, True))
            lost, whole = (linear - spiking).square().sum().item(), linear.square().sum().item()
            lost_overall, whole_overall = lost_overall + lost, whole_overall + whole
            assert printed[name] == pytest.approx(lost / whole, abs=2e-4)
        assert len(printed) == 13
        assert printed["overall"] == pytest.approx(lost_overall / whole_overall, abs=2e-4)
        assert 0 < printed["overall"] < 1

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
    @pytest.mark.parametrize("make_base", [tiny_opt, tiny_gpt2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_is_a_spiking_adapter_in_all_respects(self, make_base, dtype, tmp_path):
        patterns = {"rank_pattern": {"fc1": 3}, "alpha_pattern": {"fc2": 7}}
        options = {"lora_alpha": 5, "use_rslora": True, "lora_dropout": 0.25} | (
            patterns if make_base is tiny_opt else {}
        )
        plain = adapted(make_base().to(dtype), **options)
        expected = plain(**BATCHES[0]).logits
        before = {name: (m.r, m.scaling, m.lora_dropout) for name, m in layers(plain, LoraLinear).items()}
        before = copy.deepcopy(before)
        weights = {n: p.abs() for n, p in plain.named_parameters() if "lora_" in n}
        plain.train()
        model = from_lora(plain, BATCHES, 0.8)

        assert type(model.base_model) is SpikeLoraModel
        assert model.peft_type == model.peft_config["default"].peft_type == PeftType.SPIKELORA
        assert model.base_model.model.training
        found = layers(model)
        assert {name: (m.r, m.scaling) for name, m in found.items()} == {n: v[:2] for n, v in before.items()}
        assert all(m.lora_dropout["default"].p == 0.25 for m in found.values())
        assert all(torch.equal(p.abs(), weights[n]) for n, p in model.named_parameters() if n in weights)
        trained = {re.search(r"lora_\w+", name)[0] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"lora_A", "lora_B"}
        model.eval().save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SPIKELORA"
        loaded = PeftModel.from_pretrained(make_base().to(dtype), tmp_path)
        assert torch.equal(loaded(**BATCHES[0]).logits, model(**BATCHES[0]).logits)
        with torch.no_grad():
            for gate in [m for m in model.modules() if isinstance(m, SpikeGate)]:
                gate.v_threshold.fill_(ALWAYS)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
        torch.testing.assert_close(model(**BATCHES[0]).logits, expected, rtol=0, atol=tolerance)

    def test_a_low_target_loses_next_to_nothing(self, capsys):
        plain = adapted(tiny_opt())
        expected = plain(**BATCHES[0]).logits
        model = from_lora(plain, BATCHES, 1e-6)
        printed = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:]]
        assert max(printed) < 1e-4
        real = MASK.bool()  # nobody calibrated on padding
        torch.testing.assert_close(model(**BATCHES[0]).logits[real], expected[real], rtol=0, atol=1e-3)

    def test_the_head_of_a_classifier_stays(self):
        torch.manual_seed(0)
        config = OPTConfig(**(tiny_opt().config.to_dict() | {"num_labels": 3}))
        plain = adapted(OPTForSequenceClassification(config), task_type="SEQ_CLS")
        head = plain.base_model.model.score.modules_to_save["default"].weight
        nn.init.normal_(head)
        expected = head.detach().clone()
        model = from_lora(plain, BATCHES)
        assert torch.equal(get_peft_model_state_dict(model)["base_model.model.score.weight"], expected)
        assert head.requires_grad

    def test_a_module_that_no_token_reaches_keeps_an_open_gate(self):
        base = One()
        base.idle = nn.Linear(3, 3)
        plain = adapted(base, target_modules=["fc", "idle"])
        with pytest.warns(RuntimeWarning, match="No calibration data reached idle"):
            from_lora(plain, [{"x": torch.randn(50, 3, generator=GENERATOR)}])
        layer = plain.base_model.model.idle
        x = torch.randn(5, 3)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + update(layer, x.double(), False).float())

    @pytest.mark.parametrize(
        ("batches", "target", "message"),
        [
            ([], 0.9, "`batches` is empty"),
            ([{"x": torch.ones(1, 2, 3), "attention_mask": torch.zeros(1, 2)}], 0.9, "no token"),
            ([{"x": torch.ones(4, 3)}], 0.0, "`target_sparsity` must be"),
            ([{"x": torch.ones(4, 3)}], 1.0, "`target_sparsity` must be"),
            ([{"x": torch.ones(4, 3)}], 0.9, "No threshold gives a sparsity near 0.9"),
            ([{"x": -torch.rand(40, 3)}, {"x": torch.full((1, 3), math.inf)}], 0.9, "not finite"),
            ([{"x": -torch.rand(40, 3)}, {"y": 1}], 0.9, "y"),
        ],
    )
    def test_what_fails_leaves_the_lora_as_it_was(self, batches, target, message, capsys):
        model = one().train()
        before = fingerprint(model)
        with pytest.raises((SpikeLoraError, TypeError), match=re.escape(message)):
            from_lora(model, batches, target)
        assert_unchanged(model, before)
        assert type(model.base_model.model.fc) is LoraLinear
        assert "loses" not in capsys.readouterr().out

    def test_how_a_trained_lora_began_does_not_matter(self):
        model = adapted(One(), LoraConfig, r=2, target_modules=["fc"], init_lora_weights="orthogonal")
        from_lora(model, [{"x": torch.randn(40, 3)}], 0.5)
        assert model.peft_config["default"].init_lora_weights is True

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_dora": True}, "use_dora"),
            ({"lora_bias": True}, "lora_bias"),
            ({"init_lora_weights": "olora"}, "olora"),
        ],
    )
    def test_variants_are_refused(self, options, message):
        model = one(**options)
        before = fingerprint(model)
        with pytest.raises(SpikeLoraError, match=message):
            from_lora(model, [{"x": torch.ones(4, 3)}])
        assert_unchanged(model, before)

    def test_other_models_and_layers_are_refused(self):
        batches = [{"x": torch.ones(4, 3)}]
        several, merged = one(), one()
        several.add_adapter("other", LoraConfig(target_modules=["fc"]))
        merged.base_model.merge_adapter()
        attention = get_peft_model(nn.ModuleDict({"0": nn.MultiheadAttention(4, 2)}), LoraConfig(target_modules=["0"]))
        encoder = get_peft_model(nn.TransformerEncoderLayer(8, 2, 16), LoraConfig(target_modules=["linear1"]))
        for model, message in (
            (One(), "This One has no LoRA adapter"),
            (one(SpikeLoraConfig), "has no LoRA adapter"),
            (several, "the adapters 'default', 'other'"),
            (merged, "merged into `fc`"),
            (attention, "`0` is a MultiheadAttention"),
            (encoder, "`linear1` is read by its model"),
        ):
            before = fingerprint(model)
            with pytest.raises(SpikeLoraError, match=message):
                from_lora(model, batches)
            assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
class TestTiedLayers:
    message = r"`lm_head` and `model\.decoder\.embed_tokens` share their matrices by `ensure_weight_tying`"

    def tied(self, config_class):
        return adapted(tiny_opt(), config_class, target_modules=["embed_tokens"], ensure_weight_tying=True)

    def test_from_lora_refuses_them_and_leaves_the_model_as_it_was(self):
        model = self.tied(LoraConfig)
        before = fingerprint(model)
        with pytest.raises(SpikeLoraError, match=self.message):
            from_lora(model, BATCHES)
        assert_unchanged(model, before)

    def test_to_lora_refuses_them(self):
        with pytest.raises(SpikeLoraError, match=self.message):
            to_lora(self.tied(SpikeLoraConfig), BATCHES)


class TestToLora:
    def test_the_regression_is_numpy_s(self):
        model = one(SpikeLoraConfig, v_threshold=0.3)
        fc = model.base_model.model.fc
        x = torch.randn(3, 40, 3, generator=GENERATOR) @ torch.tensor([[1.0, 0.5, 0.2], [0, 1e-3, 0], [0, 0.4, 2]])
        mask = torch.ones(3, 40)
        mask[1, 20:] = 0
        x[1, 20:] = 50
        before = fingerprint(model.train())
        lora = to_lora(model, ({"x": x[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(3)))
        assert_unchanged(model, before)

        a = x[mask.bool()].numpy().astype(np.float64)
        gated = np.where(x[mask.bool()].numpy() / 2 >= np.float32(0.3), a, 0)
        solution = np.linalg.lstsq(a, gated, rcond=None)[0].T
        B = fc.lora_B["default"].weight.detach().numpy().astype(np.float64)
        np.testing.assert_allclose(
            lora.tensors["base_model.model.fc.lora_B.weight"].numpy(), B @ solution, rtol=1e-4, atol=1e-6
        )
        assert torch.equal(lora.tensors["base_model.model.fc.lora_A.weight"], torch.eye(3))
        assert lora.tensors.keys() == {f"base_model.model.fc.lora_{part}.weight" for part in "AB"}
        missed = gated @ B.T - a @ (B @ solution).T
        assert lora.errors == {"fc": pytest.approx((missed**2).sum() / ((gated @ B.T) ** 2).sum(), rel=1e-6)}
        assert 0.1 < lora.errors["fc"] < 0.9

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
    @pytest.mark.parametrize("make_base", [tiny_opt, tiny_gpt2])
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_a_gate_that_always_fires_loses_nothing(self, make_base, use_rslora, tmp_path):
        options = {"v_threshold": ALWAYS, "use_rslora": use_rslora, "lora_alpha": 5}
        model = adapted(make_base(), SpikeLoraConfig, **options)
        expected = model(**BATCHES[0]).logits
        lora = to_lora(model, BATCHES)
        assert lora.errors.keys() == layers(model).keys()
        assert max(lora.errors.values()) < 1e-10
        lora.save_pretrained(tmp_path / "new" / "folder")
        loaded = PeftModel.from_pretrained(make_base(), tmp_path / "new" / "folder")
        torch.testing.assert_close(loaded(**BATCHES[0]).logits, expected, rtol=0, atol=1e-5)
        merged = loaded.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_modules())
        torch.testing.assert_close(merged(**BATCHES[0]).logits, expected, rtol=0, atol=1e-5)

    def test_the_error_is_what_the_saved_adapter_misses(self, tmp_path):
        options = {"v_threshold": 0.1, "rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc2": 3}}
        model = adapted(tiny_opt(), SpikeLoraConfig, **options)
        lora = to_lora(model, BATCHES)
        lora.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_opt(), tmp_path)
        stock = layers(loaded, LoraLinear)
        assert {type(layer) for layer in stock.values()} == {LoraLinear}
        for name, x in watched(model).items():
            spiking, linear = update(layers(model)[name], x, True), update(stock[name], x, False)
            direct = (spiking - linear).square().sum() / spiking.square().sum()
            assert lora.errors[name] == pytest.approx(direct.item(), rel=1e-4)
        assert len(lora.errors) == 12

    def test_gaussian_inputs_need_no_other_a(self):
        model = one(SpikeLoraConfig, v_threshold=0.3)
        fc = model.base_model.model.fc
        A = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        fc.lora_A["default"].weight.data.copy_(A)
        x = torch.randn(100_000, 3, generator=GENERATOR)
        lora = to_lora(model, [{"x": x}])
        spiking = update(fc, x.double(), True)
        best = torch.linalg.lstsq(x.double(), spiking).solution
        error = ((spiking - x.double() @ best).square().sum() / spiking.square().sum()).item()
        assert lora.errors["fc"] == pytest.approx(error, rel=1e-3)
        # The rank that sees nothing gets no weight, where the covariance has no inverse.
        assert torch.equal(lora.tensors["base_model.model.fc.lora_B.weight"][:, 2], torch.zeros(5))

    def test_ranks_that_repeat_one_another(self):
        model = one(SpikeLoraConfig, v_threshold=ALWAYS)
        fc = model.base_model.model.fc
        fc.lora_A["default"].weight.data.copy_(torch.tensor([[1.0, 0.3, 0.7], [3.0, 0.9, 2.1], [1e-4, 2e-4, 0]]))
        x = torch.randn(500, 3, generator=GENERATOR)
        lora = to_lora(model, [{"x": x}])
        assert lora.errors["fc"] < 1e-10
        assert lora.tensors["base_model.model.fc.lora_B.weight"].abs().max() < 3

    def test_a_silent_module_and_one_that_no_token_reaches(self):
        base = One()
        base.idle = nn.Linear(3, 3)
        model = adapted(base, SpikeLoraConfig, target_modules=["fc", "idle"], v_threshold=NEVER)
        with pytest.warns(RuntimeWarning, match="No calibration data reached idle: their update is 0 in the LoRA"):
            lora = to_lora(model, [{"x": torch.randn(50, 3, generator=GENERATOR)}])
        assert lora.errors == {"fc": 0.0}
        for name in ("fc", "idle"):
            assert not lora.tensors[f"base_model.model.{name}.lora_B.weight"].any()

    def test_the_active_adapter_is_taken(self):
        model = one(SpikeLoraConfig, v_threshold=ALWAYS)
        model.add_adapter("other", SpikeLoraConfig(r=2, target_modules=["fc"], v_threshold=ALWAYS))
        model.set_adapter("other")
        nn.init.normal_(model.base_model.model.fc.lora_B["other"].weight)
        lora = to_lora(model, [{"x": torch.randn(50, 3, generator=GENERATOR)}])
        other = model.base_model.model.fc.lora_B["other"].weight
        torch.testing.assert_close(lora.tensors["base_model.model.fc.lora_B.weight"], other.detach())
        assert lora.config.r == 2
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(SpikeLoraError, match="2 adapters are active"):
            to_lora(model, [{"x": torch.ones(4, 3)}])

    def test_the_configuration_is_plain_lora_s(self):
        model = one(SpikeLoraConfig, v_threshold=0.3, rank_pattern={"^fc": 3}, init_lora_weights="gaussian")
        before = copy.deepcopy(model.peft_config["default"])
        config = to_lora(model, [{"x": torch.randn(50, 3, generator=GENERATOR)}]).config
        assert type(config) is LoraConfig
        assert config.peft_type == PeftType.LORA
        assert (config.r, config.lora_alpha, config.rank_pattern) == (3, 6, {"^fc": 3})
        assert (config.inference_mode, config.init_lora_weights) == (True, True)
        config.rank_pattern["x"] = 1
        assert model.peft_config["default"] == before

    def test_an_interrupted_write_leaves_nothing_to_load(self, tmp_path, monkeypatch):
        lora = to_lora(one(SpikeLoraConfig, v_threshold=0.3), [{"x": torch.randn(50, 3, generator=GENERATOR)}])
        lora.save_pretrained(tmp_path)

        def full(*args, **kwargs):
            raise OSError("no space left")

        monkeypatch.setattr("spikelora.conversion.lora.save_file", full)
        with pytest.raises(OSError, match="no space left"):
            lora.save_pretrained(tmp_path)
        assert not (tmp_path / "adapter_config.json").exists()
        assert isinstance(lora, LoraApproximation)

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], "`batches` is empty"),
            ([{"x": torch.ones(1, 2, 3), "attention_mask": torch.zeros(1, 2)}], "no token"),
            ([torch.ones(4, 3)], "keyword arguments"),
            ([{"x": torch.full((1, 3), math.inf)}], "`fc` are not finite"),
        ],
    )
    def test_bad_batches(self, batches, message):
        model = one(SpikeLoraConfig)
        before = fingerprint(model)
        with pytest.raises(SpikeLoraError, match=message):
            to_lora(model, batches)
        assert_unchanged(model, before)

    def test_models_without_spiking_adapters(self):
        for model in (One(), one()):
            with pytest.raises(SpikeLoraError, match="has no spiking adapter"):
                to_lora(model, [{"x": torch.ones(4, 3)}])

    def test_refused_merging_names_it(self):
        with pytest.raises(SpikeLoraError, match=r"`to_lora\(model, batches\)`"):
            one(SpikeLoraConfig).merge_and_unload()


def test_there_and_back_at_an_open_gate(capsys):
    plain = adapted(tiny_opt())
    expected = plain(**BATCHES[0]).logits
    model = from_lora(plain, BATCHES, 1e-6)
    loaded = adapted(tiny_opt())
    loaded.load_state_dict(
        {
            name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor
            for name, tensor in to_lora(model, BATCHES).tensors.items()
        },
        strict=False,
    )
    real = MASK.bool()
    torch.testing.assert_close(loaded(**BATCHES[0]).logits[real], expected[real], rtol=0, atol=1e-3)
