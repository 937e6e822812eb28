"""Many adapters on one model: PEFT's ways to add, switch, mix, swap and delete them, and those of transformers."""

import copy

import pytest
import torch
from conftest import spiking, takes_adapters, tiny_gpt2, tiny_llama, tiny_opt
from peft import (
    AutoPeftModelForCausalLM,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import (
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from transformers import AutoModelForCausalLM

from spikelora import SpikeLoraConfig, SpikeLoraError
from spikelora.method.gate import SpikeGate

TOKENS = torch.arange(3, 45).view(3, 14)
NEVER, ALWAYS = 1e30, -1e30
ATTENTION = r".*attn\.\w*(proj|c_attn)"  # mixed batches reach what is called with the batch, an OPT's fc1 is not

works = pytest.mark.compatibility
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")


def fill(model, adapter, seed, v_threshold=None):
    """Random B and, where one is given, a threshold for one adapter, as a training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if f"lora_B.{adapter}." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
        if v_threshold is not None and f"lora_gate.{adapter}.v_threshold" in name:
            tensor.fill_(v_threshold)
    return model


def config(**options):
    return SpikeLoraConfig(**({"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options))


def logits(model, **options):
    with torch.no_grad():
        return model(TOKENS, **options).logits


def thresholds(model):
    return sorted({gate.v_threshold.item() for gate in model.modules() if isinstance(gate, SpikeGate)})


def two_adapters(make_base=tiny_opt, **options):
    """`first` of rank 4 and `second` of rank 2, with thresholds of their own."""
    base = make_base()
    torch.manual_seed(0)
    model = get_peft_model(base, config(**options), "first").eval()
    model.add_adapter("second", config(**(options | {"r": 2})))
    return fill(fill(model, "first", 1, 0.05), "second", 2, -0.02)


def save(folder, seed=1, base=None, v_threshold=0.07, **options):
    """The folder of a saved adapter, and the logits that it gives."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny_opt() if base is None else base, config(**options)).eval()
    fill(model, "default", seed, v_threshold).save_pretrained(folder)
    return folder, logits(model)


class TestSeveralActive:
    @works("Many adapters", "several active at once")
    def test_the_updates_of_both_add_up_in_each_layer(self):
        model = two_adapters()
        model.base_model.set_adapter(["first", "second"])
        layer = model.base_model.model.model.decoder.layers[0].fc1
        x = torch.randn(5, 32)
        expected = layer.base_layer(x)
        for name in ("first", "second"):
            a = layer.lora_A[name](x)
            gate = layer.lora_gate[name]
            expected = expected + layer.scaling[name] * layer.lora_B[name](a * (a / gate.tau >= gate.v_threshold))
        assert not torch.equal(gate.v_threshold, layer.lora_gate["first"].v_threshold)
        torch.testing.assert_close(layer(x), expected)

    @works("Many adapters", "several active at once")
    @pytest.mark.parametrize("make_base", [tiny_opt, tiny_gpt2])
    def test_one_that_never_fires_leaves_the_other(self, make_base):
        model = fill(two_adapters(make_base), "second", 2, NEVER)
        model.set_adapter("first")
        expected = logits(model)
        model.base_model.set_adapter(["first", "second"])
        torch.testing.assert_close(logits(model), expected)

    @works("Many adapters", "several active at once")
    def test_two_that_always_fire_are_two_of_lora(self):
        model, plain = two_adapters(), None
        for name in ("first", "second"):
            fill(model, name, 1, ALWAYS)
        plain = get_peft_model(tiny_opt(), LoraConfig(r=4, target_modules="all-linear"), "first").eval()
        plain.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_gate" not in k})
        model.base_model.set_adapter(["first", "second"])
        plain.base_model.set_adapter(["first", "second"])
        torch.testing.assert_close(logits(model), logits(plain))


@works("Many adapters", "mixed batches, `adapter_names=[...]`")
@pytest.mark.parametrize("make_base", [tiny_opt, tiny_gpt2])
class TestMixedBatches:
    def test_each_row_has_its_adapter(self, make_base):
        model = two_adapters(make_base, target_modules=ATTENTION)
        alone = {}
        for name in ("first", "second"):
            model.set_adapter(name)
            alone[name] = logits(model)
        mixed = logits(model, adapter_names=["second", "__base__", "first"])
        expected = torch.stack([alone["second"][0], logits(make_base())[1], alone["first"][2]])
        assert not torch.equal(alone["first"], alone["second"])
        torch.testing.assert_close(mixed, expected)

    def test_in_generate(self, make_base):
        model = two_adapters(make_base, target_modules=ATTENTION)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        mixed = model.generate(input_ids=TOKENS, adapter_names=["second", "__base__", "first"], **options)
        for row, name in ((0, "second"), (2, "first")):
            model.set_adapter(name)
            assert torch.equal(model.generate(input_ids=TOKENS, **options)[row], mixed[row])
        assert torch.equal(make_base().generate(input_ids=TOKENS, **options)[1], mixed[1])


class TestSwitching:
    @works("Many adapters", "`set_adapter`, `disable_adapter()`, `delete_adapter`")
    def test_switching_disabling_and_deleting(self):
        model, base = two_adapters(), logits(tiny_opt())
        first = logits(model)
        model.set_adapter("second")
        second = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), second)
        model.set_adapter("first")
        assert torch.equal(logits(model), first)
        assert not torch.equal(first, second)
        model.delete_adapter("second")
        assert torch.equal(logits(model), first)
        assert not [name for name in model.state_dict() if ".second." in name]

    @works("Many adapters", "`get_layer_status`, `get_model_status`")
    def test_the_status_names_what_is_there(self):
        model = two_adapters()
        status = get_model_status(model)
        assert (status.adapter_model_type, set(status.peft_types.values())) == ("SpikeLoraModel", {"SPIKELORA"})
        assert (status.num_adapter_layers, status.active_adapters) == (12, ["first"])
        assert status.available_adapters == ["first", "second"]
        assert status.merged_adapters == []
        # A and B of the active adapter; neither those of the other nor the fixed neurons
        assert status.trainable_params == sum(
            p.numel() for n, p in model.named_parameters() if "lora_A.first." in n or "lora_B.first." in n
        )
        layers = get_layer_status(model)
        assert {layer.module_type for layer in layers} == {"lora.Linear"}
        assert all(layer.enabled and layer.active_adapters == ["first"] for layer in layers)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
class TestTransformersMixin:
    """`model.add_adapter` and what goes with it, on the model itself, without a `PeftModel`."""

    @works("Many adapters", "transformers: `add_adapter`, `set_adapter`, `disable_adapters`, `delete_adapter`")
    @pytest.mark.parametrize("make_base", [tiny_opt, tiny_gpt2])
    @takes_adapters
    def test_adapters_come_and_go(self, make_base):
        model, base = make_base(), logits(make_base())
        torch.manual_seed(0)
        model.add_adapter(config(), "first")
        model.add_adapter(config(r=2), "second")
        fill(fill(model, "first", 1, 0.05), "second", 2, -0.02)
        expected = two_adapters(make_base)
        assert model.active_adapters() == ["second"]
        for name in ("first", "second"):
            model.set_adapter(name)
            expected.set_adapter(name)
            torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)
        second = logits(model)
        model.disable_adapters()
        assert torch.equal(logits(model), base)
        model.enable_adapters()
        assert torch.equal(logits(model), second)
        model.set_adapter(["first", "second"])
        expected.base_model.set_adapter(["first", "second"])
        torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)
        model.set_adapter("second")
        model.delete_adapter("first")
        assert torch.equal(logits(model), second)
        model.delete_adapter("second")
        assert torch.equal(logits(model), base)
        assert not [name for name in model.state_dict() if "lora_" in name]

    @works("Many adapters", "transformers: `add_adapter`, `set_adapter`, `disable_adapters`, `delete_adapter`")
    @takes_adapters
    def test_fixed_thresholds_stay_fixed_and_exact(self):
        model = tiny_opt().to(torch.bfloat16)
        model.add_adapter(config(v_threshold=0.1), "first")
        model.add_adapter(config(v_threshold=0.3), "second")
        for name in ("first", "second", ["first", "second"]):
            model.set_adapter(name)
            assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_gate" in n)
        assert thresholds(model) == [torch.tensor(0.1).item(), torch.tensor(0.3).item()]

    @works("Many adapters", "transformers: `load_adapter`, `save_pretrained`, `from_pretrained`")
    @takes_adapters
    def test_saved_by_one_loaded_by_the_other(self, tmp_path):
        tiny_opt().save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.add_adapter(config())
        expected = logits(fill(model, "default", 1, 0.07).eval())
        model.save_pretrained(tmp_path / "adapter")
        assert not torch.equal(expected, logits(tiny_opt()))
        by_peft = PeftModel.from_pretrained(tiny_opt(), tmp_path / "adapter")
        by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        second = tiny_opt()
        second.add_adapter(config(r=2), "other")
        second.load_adapter(str(tmp_path / "adapter"), "default")
        second.set_adapter("default")
        for loaded in (by_peft, by_transformers, second):
            assert torch.equal(logits(loaded.eval()), expected)
            assert torch.tensor(0.07).item() in thresholds(loaded)

    @works("Many adapters", "transformers: `load_adapter` from tensors in memory")
    def test_a_state_dict_in_memory(self, tmp_path):
        folder, expected = save(tmp_path)
        tensors = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_opt(), folder))
        model = tiny_opt()
        model.load_adapter(adapter_state_dict=tensors, peft_config=config())
        assert torch.equal(logits(model), expected)


class TestHotswap:
    @works("Many adapters", "`hotswap_adapter`")
    def test_takes_the_thresholds_along(self, tmp_path):
        first, _ = save(tmp_path / "first", 1, v_threshold=0.2)
        second, expected = save(tmp_path / "second", 2, v_threshold=-0.03)
        model = PeftModel.from_pretrained(tiny_opt(), first)
        hotswap_adapter(model, second, "default", torch_device="cpu")
        assert torch.equal(logits(model), expected)
        assert thresholds(model) == [torch.tensor(-0.03).item()]

    @works("Many adapters", "`prepare_model_for_compiled_hotswap`")
    @pytest.mark.parametrize("rank", [2, 4, 8])
    def test_of_another_rank_after_padding(self, rank, tmp_path):
        first, before = save(tmp_path / "first", 1)
        second, after = save(tmp_path / "second", 2, r=rank, lora_alpha=12, v_threshold=-0.03)
        model = PeftModel.from_pretrained(tiny_opt(), first)
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch.testing.assert_close(logits(model), before)
        hotswap_adapter(model, second, "default", torch_device="cpu")
        torch.testing.assert_close(logits(model), after)

    @works("Many adapters", "`prepare_model_for_compiled_hotswap`")
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_once_compiled_a_swap_compiles_nothing(self, tmp_path):
        first, _ = save(tmp_path / "first", 1)
        second, after = save(tmp_path / "second", 2, r=4, lora_alpha=12, v_threshold=-0.03)
        model = PeftModel.from_pretrained(tiny_opt(), first)
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        model.base_model.model.compile(backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            logits(model)
            hotswap_adapter(model, second, "default", torch_device="cpu")
            torch.testing.assert_close(logits(model), after)

    @works("Many adapters", "`hotswap_adapter`")
    @pytest.mark.parametrize("rank", [2, 8])
    def test_of_another_rank_without_padding(self, rank, tmp_path):
        first, _ = save(tmp_path / "first", 1)
        second, expected = save(tmp_path / "second", 2, r=rank)
        model = PeftModel.from_pretrained(tiny_opt(), first)
        hotswap_adapter(model, second, "default", torch_device="cpu")
        torch.testing.assert_close(logits(model), expected)

    @works("Many adapters", "`hotswap_adapter`")
    @pytest.mark.parametrize("compiled", [False, True])
    def test_of_fewer_targets(self, compiled, tmp_path):
        first, _ = save(tmp_path / "first", 1)
        second, expected = save(tmp_path / "second", 2, target_modules=["q_proj", "fc1"], v_threshold=-0.03)
        model = PeftModel.from_pretrained(tiny_opt(), first, is_trainable=True)
        swapped = torch.compile(model, backend="eager") if compiled else model
        hotswap_adapter(swapped, second, "default", torch_device="cpu")
        torch.testing.assert_close(logits(model), expected)
        # Modules that the new adapter leaves alone keep a neuron that can be trained and saved.
        model(TOKENS, labels=TOKENS).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert thresholds(model) == [torch.tensor(value).item() for value in (-0.03, 0.07)]
        model.save_pretrained(tmp_path / "third")
        torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_opt(), tmp_path / "third")), expected)

    @works(
        "Many adapters",
        "transformers: `load_adapter(hotswap=True)`",
        refused="transformers swaps LORA only; delete and load, or swap in a `PeftModel`",
    )
    @pytest.mark.parametrize("enabled", [False, True])
    @takes_adapters
    def test_in_transformers_names_the_ways(self, enabled, tmp_path):
        first, before = save(tmp_path / "first", 1)
        second, expected = save(tmp_path / "second", 2)
        model = tiny_opt()
        if enabled:
            model.enable_peft_hotswap()
        model.load_adapter(str(first), "default")
        with pytest.raises(SpikeLoraError, match="Call `delete_adapter` and then `load_adapter`"):
            model.load_adapter(str(second), "default", hotswap="auto" if enabled else True)
        assert torch.equal(logits(model), before)
        model.delete_adapter("default")
        model.load_adapter(str(second), "default")
        assert torch.equal(logits(model), expected)

    @takes_adapters
    def test_in_transformers_of_another_method_says_what_it_said(self):
        model = tiny_opt()
        model.add_adapter(LoHaConfig(target_modules=["fc1"]), "default")
        with pytest.raises(ValueError, match="only supported for LoRA") as raised:
            model.load_adapter("somewhere", "default", hotswap=True)
        assert not isinstance(raised.value, SpikeLoraError)


class TestOptions:
    @works("Many adapters", "`AutoPeftModelForCausalLM`")
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_auto_models(self, low_cpu_mem_usage, tmp_path):
        tiny_opt().save_pretrained(tmp_path / "base")
        folder, expected = save(tmp_path / "adapter", base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
        model = AutoPeftModelForCausalLM.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(model), expected)

    @works("Many adapters", "`low_cpu_mem_usage`")
    def test_low_cpu_mem_usage_for_a_second_adapter(self, tmp_path):
        folder, expected = save(tmp_path)
        model = get_peft_model(tiny_opt(), config(r=2), low_cpu_mem_usage=True)
        # Said, as PEFT moves no adapter beside one on the meta device: `test_devices.py`.
        model.load_adapter(folder, "second", low_cpu_mem_usage=True, torch_device="cpu")
        model.set_adapter("second")
        assert torch.equal(logits(model.eval()), expected)

    @works("Many adapters", "`low_cpu_mem_usage`")
    def test_injected_on_the_meta_device_and_filled_by_hand(self, tmp_path):
        folder, expected = save(tmp_path)
        tensors = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_opt(), folder))
        model = inject_adapter_in_model(config(), tiny_opt(), low_cpu_mem_usage=True)
        assert all(p.is_meta for n, p in model.named_parameters() if "lora_" in n)
        set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
        assert torch.equal(logits(model), expected)

    @works("Many adapters", "`inject_adapter_in_model`")
    def test_injected_into_a_plain_module(self):
        model = inject_adapter_in_model(config(), tiny_opt())
        expected = spiking(tiny_opt())
        model.load_state_dict({k.removeprefix("base_model.model."): v for k, v in expected.state_dict().items()})
        assert torch.equal(logits(model), logits(expected))


class TestWhatElseIsTrained:
    """What a configuration trains beside A and B is trained, saved and loaded with the adapter; neurons are not."""

    def check(self, tmp_path, make_base, trained, **options):
        """Train a step, compare with what is saved; return names of what was trained beside A and B."""
        model = spiking(make_base(), task_type="CAUSAL_LM", v_threshold=0.05, **options)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model(TOKENS, labels=TOKENS).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5).step()
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert not any("lora_gate" in name for name in moved)
        beside = {name.removeprefix("base_model.model.") for name in moved if "lora_" not in name}
        assert any("lora_A" in name for name in moved)
        assert trained(beside), beside
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_base(), tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        assert not torch.equal(logits(loaded), logits(spiking(make_base(), v_threshold=0.05, **options)))
        return model

    @works("Many adapters", '`bias="all"`, `bias="lora_only"`')
    @pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning")
    @pytest.mark.parametrize(("bias", "extent"), [("all", 8), ("lora_only", 1)])
    def test_biases(self, bias, extent, tmp_path):
        model = self.check(
            tmp_path, tiny_opt, lambda names: all(n.endswith("bias") for n in names), bias=bias, target_modules=["fc1"]
        )
        n_layers = 2
        trained = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
        assert len(trained) == n_layers * extent + (bias == "all")  # and the last layer norm's

    @works("Many adapters", "`modules_to_save`")
    def test_whole_modules(self, tmp_path):
        model = self.check(
            tmp_path,
            tiny_opt,
            lambda names: {name.partition(".modules_to_save")[0].rpartition(".")[2] for name in names} == {"fc1"},
            target_modules=["q_proj"],
            modules_to_save=["fc1"],
        )
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_opt()))

    @works("Many adapters", "`trainable_token_indices`")
    @pytest.mark.parametrize("make_base", [tiny_opt, tiny_gpt2])
    def test_single_tokens(self, make_base, tmp_path):
        self.check(
            tmp_path,
            make_base,
            lambda names: names and all("trainable_tokens_delta" in name for name in names),
            trainable_token_indices=[5, 7],
        )

    @works("Many adapters", "tied weights")
    def test_tied_embeddings_trained_as_a_whole(self, tmp_path):
        model = self.check(
            tmp_path,
            tiny_opt,
            lambda names: any("embed_tokens.modules_to_save" in name for name in names),
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        )
        base = model.base_model.model
        tied = base.model.decoder.embed_tokens.modules_to_save["default"].weight
        assert base.lm_head.modules_to_save["default"].weight is tied

    @works("Many adapters", "tied weights")
    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
    def test_a_tied_head_as_a_target(self, tmp_path):
        model = self.check(tmp_path, tiny_opt, lambda names: not names, target_modules=["q_proj", "lm_head"])
        silent = spiking(tiny_opt(), v_threshold=NEVER, target_modules=["q_proj", "lm_head"])
        assert torch.equal(logits(silent), logits(tiny_opt()))
        assert model.base_model.model.lm_head.base_layer.weight is model.get_input_embeddings().weight

    @works("Many adapters", "`layer_replication`")
    def test_replicated_layers_have_neurons_of_their_own(self, tmp_path):
        model = self.check(tmp_path, tiny_llama, lambda names: not names, layer_replication=[[0, 2], [1, 2]])
        layers = model.base_model.model.model.layers
        assert len(layers) == 3
        first, copied = (layer.mlp.up_proj for layer in layers[1:])
        assert first.base_layer.weight.data_ptr() == copied.base_layer.weight.data_ptr()
        assert first.lora_gate["default"].v_threshold is not copied.lora_gate["default"].v_threshold


class TestOtherMethods:
    PROMPTS = (
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    )

    @works("Many adapters", "prompt learning in the same `PeftModel`", refused="PEFT takes one method per model")
    @pytest.mark.parametrize("prompts", PROMPTS, ids=lambda config: config.peft_type.value)
    def test_prompts_in_the_same_model(self, prompts):
        model = spiking(tiny_opt())
        expected = logits(model)
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.add_adapter("prompts", prompts)
        assert torch.equal(logits(model), expected)
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            get_peft_model(tiny_opt(), copy.deepcopy(prompts)).add_adapter("spiking", config())

    @works("Many adapters", "prompt learning around a model with an adapter put on by `add_adapter`")
    @pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
    @pytest.mark.parametrize("prompts", PROMPTS, ids=lambda config: config.peft_type.value)
    @takes_adapters
    def test_prompts_around_a_spiking_model(self, prompts):
        def around(base, v_threshold=None):
            if v_threshold is not None:
                base.add_adapter(config())
                fill(base, "default", 1, v_threshold)
            torch.manual_seed(0)
            return get_peft_model(base, copy.deepcopy(prompts)).eval()

        alone, silent, fires = around(tiny_opt()), around(tiny_opt(), NEVER), around(tiny_opt(), 0.05)
        for model in (silent, fires):
            model.prompt_encoder.load_state_dict(alone.prompt_encoder.state_dict())
        assert torch.equal(logits(silent), logits(alone))
        assert not torch.equal(logits(fires), logits(alone))
        trained = {name for name, p in fires.named_parameters() if p.requires_grad}
        assert all(name.startswith("prompt_encoder") for name in trained)

    @works("Many adapters", "`PeftMixedModel`", refused="its layers would not gate; one method per model")
    def test_a_mixed_model(self):
        with pytest.raises(ValueError, match="SPIKELORA"):
            get_peft_model(tiny_opt(), config(), mixed=True)


@pytest.mark.filterwarnings("ignore:Adapter name 'lora' should not be contained:UserWarning")
@pytest.mark.parametrize("swapped", ["default", "one", "lora"])
def test_a_swap_leaves_adapters_of_similar_names_alone(swapped, tmp_path):
    """PEFT sets to 0 what the new adapter has not, among all tensors whose names contain the adapter's name."""
    other = f"{swapped}_2"
    spiking(tiny_opt(), v_threshold=0.4).save_pretrained(tmp_path)
    model = get_peft_model(tiny_opt(), SpikeLoraConfig(r=4, target_modules="all-linear"), swapped)
    model.add_adapter(other, SpikeLoraConfig(r=4, target_modules="all-linear", v_threshold=0.2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) / 4
    before = {name: value.clone() for name, value in model.state_dict().items() if f".{other}." in name}
    hotswap_adapter(model, tmp_path, swapped, torch_device="cpu")
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {v.item() for name, v in after.items() if f".{swapped}.v_threshold" in name} == {torch.tensor(0.4).item()}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_swap_of_embeddings_is_refused_before_anything_changes(tmp_path):
    options = {"target_modules": ["embed_tokens", "fc1"]}
    spiking(tiny_opt(), v_threshold=0.4, **options).save_pretrained(tmp_path, save_embedding_layers=False)
    model = spiking(tiny_opt(), **options)
    before = logits(model)
    with pytest.raises(SpikeLoraError, match="does not find the layers of embeddings"):
        hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["0", "layers", "decoder", "fc1"])
def test_an_adapter_may_have_the_name_of_a_module(name, tmp_path):
    expected = logits(model := spiking(tiny_opt()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_opt(), tmp_path)
    loaded.load_adapter(tmp_path, name)
    loaded.set_adapter(name)
    assert torch.equal(logits(loaded), expected)
    base = tiny_opt()
    base.load_adapter(str(tmp_path), adapter_name=name)
    assert torch.equal(logits(base), expected)
