"""Small random models of each family: default targets, no gate passed by, one training step, a reload, the meter."""

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import spiking
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_DEFAULTS
from torch import Tensor, nn

from spikelora import SparsityMeter, SpikeLoraConfig, SpikeLoraError, calibrate_thresholds

NEVER, ALWAYS = 1e30, -1e30
TOKENS = {"vocab_size": 50, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = TOKENS | SIZES | {"max_position_embeddings": 32}
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
IMAGE = SIZES | {"image_size": 8, "patch_size": 4, "num_channels": 1}
GPT2 = TOKENS | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = TOKENS | {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 2}
BART = TOKENS | {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": 2}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16}
DEBERTA = TEXT | {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
DEBERTA |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}
CLIP = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


IDS = (draw(2, 7).abs() * 12).long() + 3  # beyond the special tokens
LABELLED = {"input_ids": IDS, "labels": IDS}


class Recurrent(nn.Module):
    """A recurrent network of LIF neurons: as in SpikeGPT, the linear layers between them see spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.inward = nn.Linear(16, 24)
        self.recurrent = nn.Linear(24, 24)
        self.outward = nn.Linear(24, 50)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(input_ids)  # (B, T, 16)
        membrane = spikes = x.new_zeros(len(x), 24)
        logits = []
        for step in x.unbind(1):
            membrane = membrane / 2 + self.inward(step) + self.recurrent(spikes)
            soft = torch.sigmoid(4 * (membrane - 0.5))  # the surrogate: its gradient in place of the step's
            spikes = (membrane >= 0.5).float() + (soft - soft.detach())
            membrane = membrane * (1 - spikes.detach())
            logits.append(self.outward(spikes))
        logits = torch.stack(logits, 1)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class Family(NamedTuple):
    model: str
    config: dict
    defaults: str | None  # what LoRA targets where it is not told; None where it has to be told
    targets: str | list[str] = "all-linear"
    inputs: dict[str, Tensor] = LABELLED
    padded: tuple[str, ...] = ("input_ids",)  # the inputs that have an attention mask
    beside: tuple[str, ...] = ()  # modules that also see rows which are no tokens

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        if self.model == "Recurrent":
            return Recurrent()
        model = getattr(transformers, self.model)
        return model(model.config_class(**deepcopy(self.config))).eval()


FAMILIES = {
    "GPT-2": Family("GPT2LMHeadModel", GPT2, "c_attn"),
    "OPT": Family("OPTForCausalLM", TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 8}, "q_proj v_proj"),
    "Llama": Family("LlamaForCausalLM", GROUPED, "q_proj v_proj"),
    "Mistral": Family("MistralForCausalLM", GROUPED, "q_proj v_proj"),
    "Qwen3": Family("Qwen3ForCausalLM", GROUPED, "q_proj v_proj"),
    "Gemma": Family("GemmaForCausalLM", GROUPED, "q_proj v_proj"),
    "Phi": Family("PhiForCausalLM", TEXT, "q_proj v_proj fc1 fc2"),
    "Falcon": Family("FalconForCausalLM", TEXT, "query_key_value"),
    "GPT-NeoX": Family("GPTNeoXForCausalLM", TEXT, "query_key_value"),
    "Mamba": Family("MambaForCausalLM", TEXT | {"state_size": 4, "time_step_rank": 2}, None, ["in_proj"]),
    "RWKV": Family("RwkvForCausalLM", TOKENS | SIZES, "key value receptance output", padded=()),
    "Mixtral": Family(
        "MixtralForCausalLM", GROUPED | {"num_local_experts": 4}, "q_proj v_proj", r".*\.self_attn\.\w_proj"
    ),
    "T5": Family("T5ForConditionalGeneration", T5, "q v", padded=("input_ids", "decoder_input_ids")),
    "BART": Family(
        "BartForConditionalGeneration",
        BART | {"max_position_embeddings": 32},
        "q_proj v_proj",
        padded=("input_ids", "decoder_input_ids"),
    ),
    "BERT": Family("BertForMaskedLM", TEXT, "query value"),
    "RoBERTa": Family("RobertaForMaskedLM", TEXT, "query value"),
    "DeBERTa-v3": Family("DebertaV2ForMaskedLM", DEBERTA, "query_proj value_proj", beside=("query_proj", "key_proj")),
    "ModernBERT": Family("ModernBertForMaskedLM", TEXT | {"cls_token_id": 2, "sep_token_id": 2}, None),
    "ViT": Family(
        "ViTForImageClassification",
        IMAGE,
        None,
        inputs={"pixel_values": draw(2, 1, 8, 8), "labels": torch.tensor([0, 1])},
        padded=(),
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        WHISPER,
        None,
        inputs={"input_features": draw(2, 8, 12), "labels": IDS},
        padded=("decoder_input_ids",),
    ),
    "CLIP": Family(
        "CLIPModel", CLIP, None, inputs={"input_ids": IDS, "pixel_values": draw(2, 1, 8, 8), "return_loss": True}
    ),
    "a recurrent network of LIF neurons": Family("Recurrent", {}, None, ["inward", "recurrent", "outward"], padded=()),
}
NOTES = {
    "Mamba": "on `in_proj`; its kernels read the weights of the other layers without calling them",
    "RWKV": "set `rescale_every=0`; else, with more layers than `rescale_every`, an evaluation is wrong, as with LoRA",
    "Mixtral": "on the attention; its experts and its router are not linear layers",
}


def families(choose: Callable[[Family], object] = bool) -> pytest.MarkDecorator:
    marked = [
        pytest.param(
            family,
            id=name,
            marks=pytest.mark.compatibility("Architectures", name, **({"note": NOTES[name]} if name in NOTES else {})),
        )
        for name, family in FAMILIES.items()
        if choose(family)
    ]
    return pytest.mark.parametrize("family", marked)


pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # transformers 5.17
]


def adapted(family: Family, **options) -> PeftModel:
    """The family's base with adapters that do something."""
    return spiking(family.base(), **({"target_modules": family.targets, "v_threshold": 0.0} | options)).eval()


# Where the base's parameters have gradients, attention takes another kernel than where they are frozen.
@torch.no_grad()
def logits(model: nn.Module, family: Family) -> Tensor:
    return model(**family.inputs)[1]


@families(lambda family: family.defaults)
def test_the_default_targets_are_those_of_lora(family):
    defaults = family.defaults.split()
    assert set(LORA_DEFAULTS[family.base().config.model_type]) == set(defaults)
    expected = get_peft_model(family.base(), LoraConfig(target_modules=defaults)).base_model.targeted_module_names
    assert get_peft_model(family.base(), SpikeLoraConfig()).base_model.targeted_module_names == expected


@families(lambda family: not family.defaults)
@pytest.mark.parametrize("config", [LoraConfig, SpikeLoraConfig])
def test_targets_have_to_be_given_where_lora_has_none(family, config):
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(family.base(), config())


@families()
def test_a_gate_that_never_fires_gives_the_base(family):
    assert torch.equal(logits(adapted(family, v_threshold=NEVER), family), logits(family.base(), family))


@families()
def test_a_gate_that_always_fires_gives_lora(family):
    model = adapted(family, v_threshold=ALWAYS)
    lora = get_peft_model(family.base(), LoraConfig(r=4, target_modules=family.targets)).eval()
    start = logits(lora, family)
    tensors = {name: value for name, value in model.state_dict().items() if ".lora_gate." not in name}
    assert tensors.keys() == lora.state_dict().keys()
    lora.load_state_dict(tensors)
    expected = logits(lora, family)
    assert (expected - start).abs().max() > 0.05
    torch.testing.assert_close(logits(model, family), expected, rtol=0, atol=1e-5)


@families()
def test_a_step_lowers_the_loss_and_moves_the_adapters_and_nothing_else(family):
    torch.manual_seed(0)
    model = get_peft_model(family.base(), SpikeLoraConfig(r=4, target_modules=family.targets)).eval()
    calibrate_thresholds(model, [family.inputs], target_sparsity=0.25)  # so that every gate fires where it matters
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = model(**family.inputs)[0].item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(**family.inputs)[0].backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert model.eval()(**family.inputs)[0].item() < loss

    optimizer.zero_grad()  # A has no gradient in the first step, as B starts at 0
    model.train()(**family.inputs)[0].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == changed


@families()
def test_what_is_loaded_is_what_was_saved(family, tmp_path):
    model = adapted(family)
    model.save_pretrained(tmp_path)
    expected = logits(model, family)
    assert not torch.equal(expected, logits(family.base(), family))
    assert torch.equal(logits(PeftModel.from_pretrained(family.base(), tmp_path), family), expected)
    if isinstance(base := family.base(), transformers.PreTrainedModel):
        base.load_adapter(str(tmp_path))  # transformers' own loader, which converts weights by the architecture
        assert torch.equal(logits(base, family), expected)


@torch.no_grad()
def tokens(model: nn.Module, **inputs: Tensor) -> dict[str, int]:
    with SparsityMeter(model) as meter:
        model(**inputs)
    return {name: module.tokens for name, module in meter.report().modules.items()}


@families()
def test_the_meter_sees_every_gate(family):
    assert 0 not in tokens(adapted(family), **family.inputs).values()


@families(lambda family: family.padded)
def test_the_meter_counts_a_padded_row_as_it_would_alone(family):
    model = adapted(family)
    inputs = {name: value for name, value in family.inputs.items() if isinstance(value, Tensor) and name != "labels"}
    inputs |= dict.fromkeys(family.padded, IDS)
    lengths = dict(zip(family.padded, ([7, 4], [5, 7]), strict=False))
    masks = {
        name.replace("input_ids", "attention_mask"): (torch.arange(7) < torch.tensor(n)[:, None]).long()
        for name, n in lengths.items()
    }
    together = tokens(model, **inputs, **masks)
    alone = [
        tokens(model, **{name: value[[row], : lengths.get(name, [None] * 2)[row]] for name, value in inputs.items()})
        for row in range(2)
    ]
    for name in together:
        if not name.endswith(family.beside or "?"):
            assert together[name] == alone[0][name] + alone[1][name], name


def test_a_layer_that_is_called_at_every_time_step_is_counted_at_every_one():
    family = FAMILIES["a recurrent network of LIF neurons"]
    assert tokens(adapted(family), **family.inputs) == dict.fromkeys(family.targets, IDS.numel())


class TestMixtureOfExperts:
    @pytest.mark.compatibility("Architectures", "Mixtral's router and experts", refused="they are stacked parameters")
    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (["w1", "w2", "w3"], "not found in the base model"),
            (["gate_up_proj", "down_proj"], "not found in the base model"),
            (["experts"], r"`.*mlp\.experts` is a MixtralExperts"),
            (["q_proj", "gate"], r"`.*mlp\.gate` is a MixtralTopKRouter"),
        ],
    )
    def test_experts_and_router_are_refused(self, targets, message):
        with pytest.raises(SpikeLoraError, match=message):
            get_peft_model(FAMILIES["Mixtral"].base(), SpikeLoraConfig(target_modules=targets))

    @pytest.mark.parametrize(
        ("targets", "rest"),
        [
            ("all-linear", r"`down_proj`, `gate\.weight`, `gate_up_proj`\. No gate"),
            (["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"], r"`down_proj`, `gate_up_proj`\. No gate"),
        ],
    )
    def test_the_attention_is_adapted_and_a_warning_names_the_rest(self, targets, rest):
        with pytest.warns(RuntimeWarning, match=rest):
            model = adapted(FAMILIES["Mixtral"], target_modules=targets)
        names = model.base_model.targeted_module_names
        assert names == adapted(FAMILIES["Mixtral"]).base_model.targeted_module_names
        assert len(names) == 8


@pytest.mark.compatibility(
    "Architectures", "Mamba's `out_proj`", refused="its kernels read it, so the gate would not run"
)
@pytest.mark.parametrize("targets", [["out_proj"], "all-linear"])
@pytest.mark.parametrize("config", [LoraConfig, SpikeLoraConfig])
def test_what_the_kernels_of_mamba_read_is_refused_as_it_is_for_lora(config, targets):
    with pytest.raises(ValueError, match=r"is incompatible with Mamba|is read by its model, not called"):
        get_peft_model(FAMILIES["Mamba"].base(), config(target_modules=targets))


@torch.no_grad()
@pytest.mark.parametrize("config", [LoraConfig, SpikeLoraConfig])
def test_rwkv_evaluates_as_it_trains_only_where_it_rescales_nothing(config):
    """In evaluation it halves the base's weights every `rescale_every` layers, and not what adapters add to them."""
    family = FAMILIES["RWKV"]
    for rescale_every in (0, 1):
        base = family._replace(config=family.config | {"rescale_every": rescale_every}).base()
        torch.manual_seed(0)
        model = get_peft_model(base, config(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.25)
        gap = (logits(model.train(), family) - logits(model.eval(), family)).abs().max()
        assert gap > 0.05 if rescale_every else gap == 0
