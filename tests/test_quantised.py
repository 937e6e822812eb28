"""Linear layers that are quantised: trained for real where the library runs on a CPU, dispatched to elsewhere."""

import importlib
import pathlib
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from conftest import spiking, tiny_opt
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraModel, gptq
from peft.tuners.lora import model as peft_lora
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig
from trl import SFTConfig, SFTTrainer

from spikelora import SpikeLoraConfig, SpikeLoraError
from spikelora.method import layers
from spikelora.method.paths import Path

NEVER, ALWAYS = 1e30, -1e30
TOKENIZER = pathlib.Path(__file__).parents[1] / "examples" / "spikelora_finetuning" / "model"
TOKENS = torch.arange(3, 31).view(2, 14)


def four_bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def eight_bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def compatible(feature: str, **options):
    return pytest.mark.compatibility("Layers", feature, **options)


NOT_PACKED = "on CPUs with AVX512-BF16 where `support_avx512bf16_for_cpu` of the layers is off, as in the example"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_opt().save_pretrained(folder)
    return folder


def quantised(folder, make_config) -> nn.Module:
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=make_config(), device_map="cpu", dtype=torch.float32
    )
    for module in base.modules():
        # On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights that are evaluated: small ones not at all, and none
        # can be trained afterwards.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base.eval()


# Warnings of bitsandbytes, which computes 8-bit layers in float16, and of transformers and torch about torchao.
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("make_config", "layer_type"),
    [
        pytest.param(four_bit, "Linear4bit", marks=compatible("bitsandbytes, 4 bits", note=NOT_PACKED), id="4bit"),
        pytest.param(eight_bit, "Linear8bitLt", marks=compatible("bitsandbytes, 8 bits"), id="8bit"),
        pytest.param(torchao_int8, "TorchaoLoraLinear", marks=compatible("torchao, int8 weights"), id="torchao"),
    ],
)
class TestTrainedForReal:
    def test_a_gate_that_never_fires_gives_the_base(self, folder, make_config, layer_type):
        base = quantised(folder, make_config)
        expected = base(TOKENS).logits
        model = spiking(base, v_threshold=NEVER).eval()
        layer = model.base_model.model.model.decoder.layers[0].fc1
        assert type(layer) is getattr(layers, layer_type)
        assert layer.path(torch.ones(2, 32)).path is Path.BRANCH
        assert torch.equal(model(TOKENS).logits, expected)

    @pytest.mark.parametrize("mixed", [{}, {"adapter_names": ["default", "__base__"]}], ids=["one", "mixed"])
    def test_a_gate_that_always_fires_gives_lora(self, folder, make_config, layer_type, mixed):
        targets = r".*self_attn\.\w+"  # fc1 sees batch and time as one, which mixed batches do not support
        base = quantised(folder, make_config)
        unadapted = base(TOKENS).logits
        model = spiking(base, v_threshold=ALWAYS, target_modules=targets).eval()
        lora = get_peft_model(quantised(folder, make_config), LoraConfig(r=4, target_modules=targets)).eval()
        values = model.state_dict()
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if "lora_" in name:
                    parameter.copy_(values[name])
        with torch.no_grad():  # mixed batches are for inference
            expected, actual = lora(TOKENS, **mixed).logits, model(TOKENS, **mixed).logits
        assert (expected[0] - unadapted[0]).abs().max() > 0.1
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

    def test_training_lowers_the_loss_and_reloads(self, folder, make_config, layer_type, tmp_path):
        base = prepare_model_for_kbit_training(
            quantised(folder, make_config), gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        config = SpikeLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
        losses = []
        for _ in range(6):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0] - 0.2
        model.eval().save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(quantised(folder, make_config), tmp_path).eval()
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.compatibility("Trainers", "TRL's SFTTrainer on a 4-bit base, learned neurons")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_learned_neurons_stay_float32_in_trl(folder, tmp_path):
    """TRL casts all that is trained on a quantised base to bfloat16 when its trainer is made."""
    rows = Dataset.from_dict({"input_ids": TOKENS.tolist() * 4})
    arguments = SFTConfig(
        output_dir=tmp_path,
        max_steps=3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        learning_rate=1e-2,
        gradient_checkpointing=False,
    )
    config = SpikeLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", learn_threshold=True)
    base = quantised(folder, four_bit)
    trainer = SFTTrainer(
        base,
        arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        peft_config=config,
    )
    layer = trainer.model.base_model.model.model.decoder.layers[0].fc1
    gate, A = layer.lora_gate["default"], layer.lora_A["default"].weight
    assert A.dtype == torch.bfloat16
    trainer.train()
    assert gate.v_threshold.dtype == torch.float32
    assert gate.v_threshold.item() not in (pytest.approx(0.1, abs=1e-6), torch.tensor(0.1).bfloat16().item())


class Small(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(8, 8)  # PEFT asks a model's parameters for their device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def check_layer(make_layer, layer_type: str) -> None:
    """The two differential tests on a single layer, with one adapter and in a mixed batch."""
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    base = make_layer()(x)
    for mixed in ({}, {"adapter_names": ["default", "__base__", "default"]}):
        silent = spiking(Small(make_layer()), target_modules=["layer"], v_threshold=NEVER).eval()
        assert type(silent.base_model.model.layer) is getattr(layers, layer_type)
        assert torch.equal(silent(x, **mixed), base)
        layer = (loud := spiking(Small(make_layer()), target_modules=["layer"], v_threshold=ALWAYS)).eval().base_model
        A, B = layer.model.layer.low_rank("default")
        expected = base + x @ A.T @ B.T * 2
        if mixed:
            expected[1] = base[1]
        torch.testing.assert_close(loud(x, **mixed), expected, rtol=0, atol=1e-5)


def stand_in(monkeypatch, module: str, layer_type: type) -> None:
    """Put a module with one class where an import finds it."""
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        name = ".".join(parts[:n])
        made = types.ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        setattr(made, layer_type.__name__, layer_type)
        monkeypatch.setitem(sys.modules, name, made)


@compatible("HQQ")
def test_hqq():
    quantize = pytest.importorskip("hqq.core.quantize")

    def make_layer():
        torch.manual_seed(0)
        settings = quantize.BaseQuantizeConfig(nbits=4, group_size=16)
        return quantize.HQQLinear(nn.Linear(16, 8), settings, compute_dtype=torch.float32, device="cpu")

    check_layer(make_layer, "HqqLoraLinear")


@pytest.mark.compatibility("Layers", "GPTQ", note="on a stand-in for the base layer, as GPTQModel was not installed")
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_gptq(monkeypatch):
    class BaseQuantLinear(nn.Module):
        in_features, out_features = 16, 8

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("qweight", torch.randint(-9, 9, (8, 16), dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.qweight.T.to(x.dtype) / 9

    monkeypatch.setattr(gptq, "is_gptqmodel_available", lambda: True)
    # Others would ask for the version of the library.
    monkeypatch.setattr(peft_lora, "dispatch_awq", lambda *args, **kwargs: None)
    monkeypatch.setattr("peft.utils.other.is_gptqmodel_available", lambda: False)
    stand_in(monkeypatch, "gptqmodel.nn_modules.qlinear", BaseQuantLinear)
    check_layer(BaseQuantLinear, "GPTQLoraLinear")


@pytest.mark.compatibility("Layers", "INC", note="on a stand-in for the base layer, as it needs Gaudi hardware")
def test_inc(monkeypatch):
    class PatchedLinear(nn.Linear):
        pass

    stand_in(monkeypatch, "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules", PatchedLinear)
    # PEFT defines the class where the library is there when PEFT is imported.
    monkeypatch.setattr("peft.import_utils.is_inc_available", lambda: True)
    inc = importlib.import_module("peft.tuners.lora.inc")
    try:
        importlib.reload(inc)
        monkeypatch.setattr(peft_lora, "dispatch_inc", inc.dispatch_inc)

        def make_layer():
            torch.manual_seed(0)
            return PatchedLinear(16, 8)

        check_layer(make_layer, "IncLoraLinear")
    finally:
        monkeypatch.undo()
        vars(layers).pop("IncLoraLinear", None)
        del inc.IncLoraLinear
        importlib.reload(inc)


UNGATED = {
    "AWQ": ("awq", "AwqLoraLinear", "dispatch_awq"),
    "AQLM": ("aqlm", "AqlmLoraLinear", "dispatch_aqlm"),
    "EETQ": ("eetq", "EetqLoraLinear", "dispatch_eetq"),
    "Transformer Engine": ("te", "TeLinear", "dispatch_transformer_engine"),
    "Megatron": ("tp_layer", "LoraParallelLinear", "dispatch_megatron"),
}


@pytest.mark.parametrize(
    ("module", "name", "dispatcher"),
    [
        pytest.param(
            *names, marks=pytest.mark.compatibility("Layers", feature, refused="its layer never asks for a gate")
        )
        for feature, names in UNGATED.items()
    ],
)
def test_layers_that_never_ask_for_the_gate_are_refused(monkeypatch, module, name, dispatcher):
    module = f"peft.tuners.lora.{module}"
    # Without its library PEFT does not define each of them.
    made = getattr(importlib.import_module(module), name, type(name, (nn.Module, LoraLayer), {"__module__": module}))
    monkeypatch.setattr(peft_lora, dispatcher, lambda target, *args, **kwargs: made.__new__(made))
    model = Small(nn.Linear(16, 8))
    with pytest.raises(SpikeLoraError, match="`layer` is a Linear, on which SpikeLoRA is not supported"):
        get_peft_model(model, SpikeLoraConfig(target_modules=["layer"]))
    assert type(model.layer) is nn.Linear


def test_the_dispatchers_are_those_that_peft_asks():
    asked = LoraModel._create_new_module.__code__.co_names
    assert {dispatcher for _, _, dispatcher in UNGATED.values()} | {"dispatch_gptq", "dispatch_inc"} <= set(asked)


def test_a_disabled_adapter_on_gptq_in_a_mixed_batch(monkeypatch):
    class Base(nn.Linear):
        pass

    layer = spiking(Small(Base(16, 8)), target_modules=["layer"]).base_model.model.layer
    layer.__class__ = layers.GPTQLoraLinear
    layer.quant_linear_module = layer.base_layer
    layer.enable_adapters(False)
    x = torch.ones(2, 16)
    assert torch.equal(layer(x, adapter_names=["default", "__base__"]), layer.base_layer(x))
