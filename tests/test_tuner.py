"""The layers and the model: that the gate is there, everywhere and always."""

import copy
import re
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from conftest import enable_checkpointing, tiny_gpt2, tiny_opt
from peft import EvaConfig, LoraConfig, LoraModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners import lora
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    WavLMConfig,
    WavLMModel,
)

from spikelora import SpikeLoraConfig, SpikeLoraError, SpikeLoraModel
from spikelora.method.gate import SpikeGate
from spikelora.method.layers import SpikingLayer
from spikelora.method.paths import Path as LayerPath
from spikelora.method.paths import force_path
from spikelora.peft.read_not_called import _READ_NOT_CALLED

NEVER, ALWAYS = 1e30, -1e30
TOKENS = torch.arange(3, 31).view(2, 14)


def with_random_b(model: nn.Module) -> nn.Module:
    """PEFT starts B at 0; a test that compares outputs needs an adapter that does something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) / 4
    return model


def spiking(base: nn.Module, **options) -> PeftModel:
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    torch.manual_seed(0)
    return with_random_b(get_peft_model(base, SpikeLoraConfig(**options))).eval()


def plain(base: nn.Module, **options) -> PeftModel:
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    torch.manual_seed(0)
    return with_random_b(get_peft_model(base, LoraConfig(**options))).eval()


def gates(model: nn.Module) -> list[SpikeGate]:
    return [module for module in model.modules() if isinstance(module, SpikeGate)]


def spiking_layers(model: nn.Module) -> list[SpikingLayer]:
    return [module for module in model.modules() if isinstance(module, SpikingLayer)]


BASES = [pytest.param(tiny_opt, id="Linear"), pytest.param(tiny_gpt2, id="Conv1D")]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("make_base", BASES)
# OPT flattens batch and time before fc1, which PEFT's mixed batches do not support.
@pytest.mark.parametrize(
    ("mixed", "targets"),
    [({}, "all-linear"), ({"adapter_names": ["default", "__base__"]}, r".*attn\.\w*(proj|c_attn)")],
)
class TestDifferential:
    """The two tests that find every path on which the gate is lost."""

    def test_a_gate_that_never_fires_gives_the_base(self, make_base, mixed, targets):
        model = spiking(make_base(), v_threshold=NEVER, target_modules=targets)
        assert torch.equal(model(TOKENS, **mixed).logits, make_base()(TOKENS).logits)

    def test_a_gate_that_always_fires_gives_lora(self, make_base, mixed, targets):
        expected = plain(make_base(), target_modules=targets)(TOKENS, **mixed).logits
        assert not torch.equal(expected, make_base()(TOKENS).logits)
        actual = spiking(make_base(), v_threshold=ALWAYS, target_modules=targets)(TOKENS, **mixed).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_computes_the_formula(use_rslora, dtype):
    base = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    model = spiking(base, target_modules=["0"], task_type=None, lora_alpha=3, use_rslora=use_rslora, v_threshold=0.2)
    layer = model.base_model.model[0]
    x = torch.randn(2, 7, 6).to(dtype)

    a = layer.lora_A["default"](x.float())
    gated = a * (a / 2.0 >= 0.2)
    scaling = 3 / (4**0.5 if use_rslora else 4)
    expected = layer.base_layer(x) + scaling * gated @ layer.lora_B["default"].weight.T

    assert 0 < (gated == 0).float().mean() < 1
    torch.testing.assert_close(layer(x), expected.to(dtype))


def test_dropout_falls_once_on_the_input():
    model = spiking(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], task_type=None, lora_dropout=0.5)
    layer = model.train().base_model.model[0]
    x = torch.randn(3, 6)
    torch.manual_seed(3)
    a = layer.lora_A["default"](nn.functional.dropout(x, 0.5))
    expected = layer.base_layer(x) + layer.scaling["default"] * layer.lora_B["default"](a * (a / 2 >= 0.1))
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), expected)


def test_training_moves_only_the_adapter_and_lowers_the_loss(opt):
    torch.manual_seed(0)
    model = get_peft_model(opt, SpikeLoraConfig(target_modules="all-linear", v_threshold=0.05, task_type="CAUSAL_LM"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert losses[-1] < losses[0] - 0.5
    assert {re.search(r"lora_\w+", name)[0] for name in changed} == {"lora_A", "lora_B"}


class TestFixedNeuron:
    """`learn_threshold=False` must stay false; the obvious builds train it all the same."""

    def frozen(self, model) -> bool:
        numbers = [number for gate in gates(model) for number in (gate.v_threshold, gate.tau)]
        return len(numbers) >= 24 and not any(isinstance(n, nn.Parameter) or n.requires_grad for n in numbers)

    def test_through_everything_that_touches_requires_grad(self, opt):
        model = spiking(opt.to(torch.bfloat16))
        model.add_adapter("other", SpikeLoraConfig(r=2, target_modules="all-linear"))
        for act in (
            model.train,
            lambda: model.set_adapter("other"),
            lambda: model.set_adapter("default"),
            lambda: model.set_requires_grad(["default", "other"]),
            lambda: model.base_model.set_adapter(["default", "other"]),
            model.base_model.disable_adapter_layers,
            model.base_model.enable_adapter_layers,
            lambda: model.delete_adapter("other"),
        ):
            act()
            assert self.frozen(model)
        assert any(p.requires_grad for p in model.parameters())

    def test_is_exact_beside_a_bfloat16_base(self, opt):
        model = spiking(opt.to(torch.bfloat16), v_threshold=0.1).to(torch.bfloat16)
        values = {(gate.v_threshold.item(), gate.v_threshold.dtype) for gate in gates(model)}
        assert values == {(torch.tensor(0.1).item(), torch.float32)}

    def test_dpo_reference_copy_gates_the_same(self, opt):
        model = spiking(opt, v_threshold=0.03)
        for gate in gates(model):  # as after training with learned thresholds
            gate.v_threshold.data += 0.02
        model.add_adapter("ref", model.peft_config["default"])
        # What TRL's DPOTrainer does for the reference of a trained adapter.
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
        expected = model(TOKENS).logits
        model.set_adapter("ref")
        assert torch.equal(model(TOKENS).logits, expected)
        assert self.frozen(model)

    @pytest.mark.parametrize("way", ["mixed batch", "saving", "looked at before", "cast"])
    def test_a_copy_by_parameters_however_it_is_used(self, way, opt, tmp_path):
        model = spiking(opt, v_threshold=0.03, target_modules=["q_proj", "v_proj"])
        for gate in gates(model):
            gate.v_threshold.fill_(0.05)
        model.add_adapter("ref", model.peft_config["default"])
        if way == "looked at before":
            model.set_adapter("ref")
            model.set_adapter("default")
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
                if way == "cast":  # as TRL does on quantised bases, of what is trained
                    parameter.data = parameter.data.bfloat16()
        if way == "mixed batch":
            assert torch.equal(model(TOKENS, adapter_names=["ref", "ref"]).logits, model(TOKENS).logits)
        elif way == "saving":
            model.save_pretrained(tmp_path, selected_adapters=["ref"])
            tensors = load_file(tmp_path / "ref" / "adapter_model.safetensors")
            assert {t.item() for n, t in tensors.items() if "threshold" in n} == {torch.tensor(0.05).item()}
        else:
            model.set_adapter("ref")
        values = {layer.lora_gate["ref"].v_threshold.item() for layer in spiking_layers(model)}
        assert values == {torch.tensor(0.05).item()}

    def test_another_adapter_of_the_same_configuration_begins_as_configured(self, opt):
        model = spiking(opt, v_threshold=0.03)
        for gate in gates(model):
            gate.v_threshold.fill_(0.5)
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        assert not any(layer.lora_gate["other"].v_threshold.item() == 0.5 for layer in spiking_layers(model))
        values = {layer.lora_gate["other"].v_threshold.item() for layer in spiking_layers(model)}
        assert values == {torch.tensor(0.03).item()}

    def test_training_all_that_there_is(self, opt):
        model = spiking(opt, v_threshold=0.03, learn_tau=True).train()
        before = [gate.v_threshold.clone() for gate in gates(model)]
        for p in model.parameters():
            p.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(10):
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(gate.v_threshold, b) for gate, b in zip(gates(model), before, strict=True))
        assert all(gate.tau.item() != 2 for gate in gates(model))

    def test_peft_says_that_all_of_an_adapter_is_trained(self, opt):
        status = spiking(opt).get_model_status()
        assert status.requires_grad == {"default": True}
        assert status.devices == {"default": ["cpu"]}

    @pytest.mark.parametrize(
        "make",
        [
            lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.05),
            lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.05, loraplus_lr_ratio=4),
        ],
        ids=["LoRA-FA", "LoRA+"],
    )
    def test_peft_s_own_optimizers_step(self, make, opt):
        model = spiking(opt, v_threshold=0.03).train()
        optimizer, losses = make(model), []
        for _ in range(5):
            losses.append(model(TOKENS, labels=TOKENS).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
        assert {gate.v_threshold.item() for gate in gates(model)} == {torch.tensor(0.03).item()}

    def test_averages_of_the_parameters(self, opt):
        """As torch and accelerate keep them in a copy of the model, and diffusers in a list of tensors."""
        model = spiking(opt, v_threshold=0.03)
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0))
        for gate in gates(model):  # as `SparsityControlCallback` does
            gate.v_threshold.fill_(-0.02)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data += 0.05
        shadow = [p.detach().clone() for p in model.parameters()]
        expected = model(TOKENS).logits
        average.update_parameters(model)  # it has seen one, and takes all of the second
        average.update_parameters(model)
        for p in model.parameters():
            p.data += 0.1
        for p, kept in zip(model.parameters(), shadow, strict=True):
            p.data.copy_(kept)
        assert torch.equal(average(TOKENS).logits, expected)
        assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize(("learn_threshold", "learn_tau"), [(True, False), (False, True), (True, True)])
def test_learned_neuron_trains_and_is_one_number_per_module(opt, learn_threshold, learn_tau):
    model = spiking(opt, v_threshold=0.05, learn_threshold=learn_threshold, learn_tau=learn_tau).train()
    model.set_adapter("default")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    for gate in gates(model):
        assert (gate.v_threshold.item() != torch.tensor(0.05).item()) == learn_threshold
        assert (gate.tau.item() != 2.0) == learn_tau
        assert gate.v_threshold.shape == gate.tau.shape == (1,)


def test_patterns_match_as_peft_matches_ranks(opt):
    patterns = {"fc1": 0.3, r"layers\.1\.self_attn\..*": 0.5, "model.decoder.layers.0.fc2": -1.0}
    model = spiking(opt, threshold_pattern=patterns, rank_pattern={"fc1": 2}, alpha_pattern={"fc1": 7})
    layers = model.base_model.model.model.decoder.layers
    found = {
        name: round(layer.lora_gate["default"].v_threshold.item(), 6)
        for name, layer in layers.named_modules()
        if isinstance(layer, lora.Linear)
    }
    assert found["0.fc1"] == found["1.fc1"] == 0.3
    assert found["1.self_attn.q_proj"] == found["1.self_attn.out_proj"] == 0.5
    assert found["0.fc2"] == -1
    assert found["1.fc2"] == found["0.self_attn.q_proj"] == 0.1
    assert (layers[0].fc1.r["default"], layers[0].fc1.scaling["default"]) == (2, 3.5)


def test_a_pattern_without_a_module_is_said(opt):
    with pytest.warns(RuntimeWarning, match=r"threshold_pattern keys did not match any targeted module: \['nowhere'\]"):
        spiking(opt, threshold_pattern={"nowhere": 0.3, "fc1": 0.2})


def test_targets_default_as_loras_do(opt):
    def targets(config):
        return set(get_peft_model(copy.deepcopy(opt), config).base_model.targeted_module_names)

    assert targets(SpikeLoraConfig()) == targets(LoraConfig())
    chosen = {"target_modules": ["q_proj", "fc2"], "layers_to_transform": [1]}
    assert targets(SpikeLoraConfig(**chosen)) == targets(LoraConfig(**chosen))
    chosen = {"target_modules": r".*\.0\..*v_proj"}
    assert targets(SpikeLoraConfig(**chosen)) == targets(LoraConfig(**chosen))
    assert len(targets(SpikeLoraConfig(**chosen))) == 1


def test_modules_to_save_train_beside_the_adapter(opt):
    model = spiking(opt, target_modules=["q_proj"], modules_to_save=["fc1"])
    trained = {name.rpartition(".modules_to_save")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert sum("fc1" in name for name in trained) == 2


class TestSeveralAdapters:
    def test_each_has_its_own_gate(self, opt):
        base_logits = copy.deepcopy(opt)(TOKENS).logits
        targets = r".*self_attn\.\w+"
        model = spiking(opt, v_threshold=ALWAYS, target_modules=targets)
        model.add_adapter("silent", SpikeLoraConfig(r=2, target_modules=targets, v_threshold=NEVER))
        with_random_b(model)
        loud = model(TOKENS).logits
        model.set_adapter("silent")
        assert torch.equal(model(TOKENS).logits, base_logits)
        mixed = model(TOKENS, adapter_names=["silent", "default"]).logits
        torch.testing.assert_close(mixed[0], base_logits[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(mixed[1], loud[1], rtol=0, atol=1e-6)
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, base_logits)

    def test_deleting_one_leaves_nothing_of_it(self, opt):
        model = spiking(opt)
        expected = model(TOKENS).logits
        model.add_adapter("other", SpikeLoraConfig(r=2, target_modules="all-linear"))
        model.set_adapter("other")
        with pytest.warns(UserWarning, match="Adapter other was active which is now deleted"):
            model.delete_adapter("other")
        assert not [name for name in model.state_dict() if "other" in name]
        assert torch.equal(model(TOKENS).logits, expected)

    def test_a_lora_adapter_is_refused_beside_it(self, opt):
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            spiking(opt).add_adapter("plain", LoraConfig(target_modules="all-linear"))


class TestRefused:
    @pytest.mark.parametrize(
        "module",
        [
            nn.MultiheadAttention(4, 2),
            nn.LayerNorm(4),
            nn.Bilinear(4, 4, 4),
        ],
        ids=lambda module: type(module).__name__,
    )
    def test_other_layers_by_name(self, module):
        model = nn.ModuleDict({"good": nn.Linear(4, 4), "inner": nn.ModuleDict({"other": module})})
        before = copy.deepcopy(model)
        with pytest.raises(SpikeLoraError, match=rf"`inner\.other` is a {type(module).__name__}"):
            get_peft_model(model, SpikeLoraConfig(target_modules=["good", "other"]))
        assert repr(model) == repr(before)
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]

    def test_the_projection_that_attention_never_calls(self):
        with pytest.raises(SpikeLoraError, match="out_proj"):
            get_peft_model(nn.MultiheadAttention(4, 2), SpikeLoraConfig(target_modules=["out_proj"]))

    @pytest.mark.parametrize("training", [True, False])
    def test_the_layers_that_a_transformer_encoder_reads(self, training):
        model = nn.TransformerEncoderLayer(8, 2, 16).train(training)
        with pytest.raises(SpikeLoraError, match="`linear1` is read by its model, not called"):
            get_peft_model(model, SpikeLoraConfig(target_modules=["linear1"]))

    @pytest.mark.parametrize("target", ["conv1d", "dt_proj", "x_proj"])
    def test_what_mamba_reads(self, target):
        config = MambaConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, state_size=4, time_step_rank=2)
        with pytest.raises(SpikeLoraError, match=rf"`.*mixer\.{target}` is read by its model, not called"):
            get_peft_model(MambaForCausalLM(config), SpikeLoraConfig(target_modules=[target]))

    def test_targets_that_match_nothing(self, opt):
        with pytest.raises(SpikeLoraError, match="nowhere") as raised:
            spiking(opt, target_modules=["nowhere"])
        assert isinstance(raised.value, NoMatchingPeftModuleError)

    @pytest.mark.parametrize(
        "act",
        [
            lambda m: m.merge_and_unload(),
            lambda m: m.base_model.merge_adapter(),
            lambda m: m.base_model.model.model.decoder.layers[0].fc1.merge(),
            lambda m: m.base_model.model.model.decoder.layers[0].fc1.get_delta_weight("default"),
            lambda m: m.base_model.add_weighted_adapter(["default"], [1.0], "sum"),
            lambda m: m.base_model.subtract_mutated_init({}, "default"),
        ],
    )
    def test_merging_leaves_the_model_as_it_was(self, opt, act):
        model = spiking(opt)
        expected = model(TOKENS).logits
        with pytest.raises(SpikeLoraError, match="cannot be merged"):
            act(model)
        assert list(model.peft_config) == ["default"]
        assert torch.equal(model(TOKENS).logits, expected)

    def test_saving_as_a_mutated_lora(self, opt, tmp_path):
        with pytest.raises(SpikeLoraError, match="cannot be merged"):
            spiking(opt).save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "b"))

    def test_conversion_to_lora(self, opt):
        assert not spiking(opt).supports_lora_conversion()

    def test_peft_alone_builds_no_ungated_layers(self, opt):
        with pytest.raises(ValueError, match="variant"):
            LoraModel(opt, SpikeLoraConfig(target_modules="all-linear"), "default")

    def test_a_plain_config_for_the_spiking_model(self, opt):
        with pytest.raises(SpikeLoraError, match="LoraConfig"):
            SpikeLoraModel(opt, LoraConfig(target_modules="all-linear"), "default")

    def test_a_plain_adapter_injected_into_spiking_layers(self, opt):
        model = inject_adapter_in_model(SpikeLoraConfig(target_modules="all-linear"), opt)
        with pytest.warns(UserWarning, match="Already found"), pytest.raises(SpikeLoraError, match="a LoraConfig"):
            inject_adapter_in_model(LoraConfig(target_modules="all-linear"), model, "plain")


def test_unloading_gives_the_base_back(opt):
    expected = copy.deepcopy(opt)(TOKENS).logits
    assert torch.equal(spiking(opt).unload()(TOKENS).logits, expected)


def test_what_is_printed_has_rank_threshold_and_tau(opt, capsys):
    model = spiking(opt, r=4, v_threshold=0.25, tau=3, threshold_pattern={"fc1": 0.5})
    assert "default: r=4, v_threshold=0.5, tau=3" in repr(model.base_model.model.model.decoder.layers[0].fc1)
    model.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("trainable params: ")
    assert second == "spiking adapter 'default' on 12 modules || r: 4 || v_threshold: 0.25 to 0.5 || tau: 3"


def test_the_repr_says_what_is_learned(opt):
    model = spiking(opt, learn_tau=True)
    assert "default: r=4, v_threshold=0.1, tau=2 (learned)" in repr(model.base_model.model.model.decoder.layers[0].fc1)


def test_a_lora_model_prints_as_before(opt, capsys):
    plain(opt).print_trainable_parameters()
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")
def test_eva_builds_the_layers_anew_with_their_gates(opt):
    model = spiking(opt, init_lora_weights="eva", eva_config=EvaConfig(), threshold_pattern={"fc1": 0.3})
    layer = model.base_model.model.model.decoder.layers[0].fc1
    layer.update_layer("default", 6, lora_alpha=6, config=model.peft_config["default"])
    assert layer.lora_gate["default"].v_threshold.item() == torch.tensor(0.3).item()
    assert layer.lora_A["default"].out_features == 6


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = spiking(tiny_opt(), v_threshold=0.05, learn_threshold=True, learn_tau=True).train()
        if checkpointed:
            model.enable_input_require_grads()
            enable_checkpointing(model, use_reentrant)
        model(TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert expected.keys() == actual.keys()
    assert len(expected) == 12 * 4
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=0, msg=name)


def test_the_surrogate_reaches_every_gate(opt):
    """And the gradient with it, on the path that a layer chooses and on the plain one."""
    x, gradients = torch.arange(3, 31).view(2, 14), []
    for surrogate in ("atan", "straight_through"):
        torch.manual_seed(0)
        model = spiking(copy.deepcopy(opt), surrogate=surrogate, init_lora_weights=False)
        assert {gate.straight_through for gate in gates(model)} == {surrogate == "straight_through"}
        for path in (None, LayerPath.PLAIN):
            model.zero_grad()
            with nullcontext() if path is None else force_path(path):
                model(x).logits.square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_A" in n]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gradients[2], gradients[3], rtol=1e-3, atol=1e-6)
    assert (gradients[0] - gradients[2]).abs().max() > 1e-4


def test_the_width_of_the_surrogate_reaches_every_gate(opt):
    assert {gate.surrogate_alpha for gate in gates(spiking(opt, surrogate_alpha=5.0))} == {5.0}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_the_configuration_says_how_conv1d_stores_its_weight(gpt2):
    assert spiking(gpt2).peft_config["default"].fan_in_fan_out


def test_what_is_printed_while_weights_are_on_the_meta_device(opt, capsys):
    model = get_peft_model(opt, SpikeLoraConfig(target_modules=["fc1"]), low_cpu_mem_usage=True)
    assert "default: r=8, v_threshold=nan, tau=nan" in repr(model)
    model.print_trainable_parameters()
    assert "spiking adapter 'default' on 2 modules || r: 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make_base", "target"),
    [
        (
            lambda: MobileBertForMaskedLM(
                MobileBertConfig(
                    vocab_size=50,
                    hidden_size=16,
                    embedding_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=16,
                    intra_bottleneck_size=8,
                )
            ),
            "predictions.dense",
        ),
        (
            lambda: WavLMModel(
                WavLMConfig(
                    hidden_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=16,
                    conv_dim=(8,),
                    conv_kernel=(2,),
                    conv_stride=(2,),
                    num_conv_pos_embeddings=4,
                    num_conv_pos_embedding_groups=2,
                )
            ),
            "k_proj",
        ),
    ],
    ids=["mobilebert", "wavlm"],
)
@pytest.mark.parametrize("wrap", [lambda base: base, lambda base: nn.ModuleDict({"encoder": base})])
def test_the_layers_that_other_models_read(make_base, target, wrap):
    with pytest.raises(SpikeLoraError, match=rf"`.*{target}` is read by its model, not called"):
        get_peft_model(wrap(make_base()), SpikeLoraConfig(target_modules=[target]))


def test_the_modules_that_are_read_are_there():
    """By their names in the sources of transformers, in the version that the table was made for."""
    if version("transformers") < "5.23":
        pytest.skip("some of these models came with transformers 5.23")
    models = Path(transformers.__file__).parent / "models"
    source = "\n".join(path.read_text() for path in models.glob("*/modeling_*.py"))
    classes = re.split(r"^class (?=\w+\()", source, flags=re.M)
    for name, modules in _READ_NOT_CALLED.items():
        if hasattr(nn, name):
            continue
        body = "".join(text for text in classes if text.startswith(f"{name}("))
        assert not [module for module in modules if f"self.{module} =" not in body], name


def test_other_errors_of_peft_stay_what_they_are(opt, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("something else")

    monkeypatch.setattr(LoraModel, "_create_new_module", fail)
    with pytest.raises(ValueError, match="something else") as raised:
        spiking(opt)
    assert not isinstance(raised.value, SpikeLoraError)


@pytest.mark.parametrize("symbol", ["v_threshold", "tau"])
def test_a_neuron_of_which_one_tensor_was_cast(opt, symbol):
    model = spiking(opt)
    tensor = getattr(gates(model)[3], symbol)
    tensor.data = tensor.data.bfloat16()
    with pytest.raises(SpikeLoraError, match="have to stay float32"):
        model(TOKENS)


def test_every_adapter_is_printed(opt, capsys):
    model = spiking(opt)
    model.add_adapter("other", SpikeLoraConfig(r=2, target_modules=["fc1"], v_threshold=0.5))
    model.print_trainable_parameters()
    assert capsys.readouterr().out.splitlines()[1:] == [
        "spiking adapter 'default' on 12 modules || r: 4 || v_threshold: 0.1 || tau: 2",
        "spiking adapter 'other' on 2 modules || r: 2 || v_threshold: 0.5 || tau: 2",
    ]


def test_a_second_gate_goes_to_the_device_of_its_a(opt, monkeypatch):
    model, moved = spiking(opt, target_modules=["fc1"]), []
    monkeypatch.setattr(SpikeGate, "to", lambda gate, device: moved.append(device) or gate)
    model.add_adapter("other", SpikeLoraConfig(target_modules=["fc1"]))
    assert len(moved) >= 2
    assert set(moved) == {torch.device("cpu")}


class ReadsIts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 4)
        self.called = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x.to(self.called.weight.dtype)) @ self.read.weight


def test_a_module_that_its_model_seems_to_read_is_warned_of():
    with pytest.warns(RuntimeWarning, match="The source of ReadsIts reads target module `read` and never calls it"):
        get_peft_model(ReadsIts(), SpikeLoraConfig(target_modules=["read", "called"]))
    get_peft_model(ReadsIts(), SpikeLoraConfig(target_modules=["called"]))


class HandsItselfOn(ReadsIts):
    """As the attention of diffusers does, whose processor calls its layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(
            self,
            x,
        )

    def processor(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module.read(x)


class HandsAnotherOn(ReadsIts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(x) @ self.read.weight

    def processor(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_module_that_is_handed_to_a_processor_is_not_warned_of():
    get_peft_model(HandsItselfOn(), SpikeLoraConfig(target_modules=["read"]))
    with pytest.warns(RuntimeWarning, match="The source of HandsAnotherOn reads target module `read`"):
        get_peft_model(HandsAnotherOn(), SpikeLoraConfig(target_modules=["read"]))
