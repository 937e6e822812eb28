"""Random models in place of those that PEFT's tests download, in a cache of the hub that offline mode reads.

Each repository has the model class of the one that it replaces, and its sizes if a test needs them. The weights are
random, so a test that compares with known numbers fails with LoRA as well and is not part of the comparison.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
ATTENTION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
# Larger weights than usual, as the tests assert that an adapter on two small layers changes the output, and another
# padding, as its embedding is zero and the tests' inputs consist of tokens 1 and 2.
DECODER = (
    ATTENTION
    | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1}
    | {"num_key_value_heads": 4, "vocab_size": 2000, "max_position_embeddings": 512}
)
ENCODER = ATTENTION | {"vocab_size": 1124, "max_position_embeddings": 512}
MOE = DECODER | {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 8}
# A model with as many tokens as the tokenizer, whose adapters add some.
SMALL_VOCABULARY = "spikelora-internal-testing/tiny-random-OPTForCausalLM-small-vocab"
OPT = "peft-internal-testing/tiny-random-OPTForCausalLM"
BERT = "hf-internal-testing/tiny-random-BertModel"
T5 = "peft-internal-testing/tiny-random-t5"
WHISPER = "spikelora-internal-testing/tiny-random-WhisperForConditionalGeneration"


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """A byte-level tokenizer of 260 tokens."""
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges=[], unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), vocabulary, strict=False))
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def opt(**sizes: Any) -> hf.OPTConfig:
    small = {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 5, "num_attention_heads": 4}
    return hf.OPTConfig(**small | {"ffn_dim": 4, "vocab_size": 50265, "max_position_embeddings": 100} | TOKENS | sizes)


def gpt2(**sizes: Any) -> hf.GPT2Config:
    small = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512, "vocab_size": 1024}
    return hf.GPT2Config(**small | TOKENS | sizes)


def t5() -> hf.T5Config:
    small = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "vocab_size": 1103}
    return hf.T5Config(**small, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)


def bart() -> hf.BartConfig:
    ends = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return hf.BartConfig(**ends, **heads, d_model=16, vocab_size=1024, max_position_embeddings=100, **TOKENS)


def gemma3() -> hf.Gemma3TextConfig:
    return hf.Gemma3TextConfig(**DECODER | {"head_dim": 8, "sliding_window": 32})


def clip_text(**sizes: Any) -> dict[str, Any]:
    return ATTENTION | TOKENS | {"vocab_size": 1000, "max_position_embeddings": 77, "projection_dim": 16} | sizes


def llava() -> hf.LlavaConfig:
    vision = hf.CLIPVisionConfig(**ATTENTION, image_size=30, patch_size=15, projection_dim=16)
    return hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**DECODER), image_token_index=3)


def qwen_vl() -> hf.Qwen2_5_VLConfig:
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 32, "out_hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "type": "default"}
    return hf.Qwen2_5_VLConfig(text_config=DECODER | {"rope_parameters": rope}, vision_config=vision)


def whisper() -> hf.WhisperConfig:
    ends = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return hf.WhisperConfig(**ends, **heads, d_model=16, vocab_size=1000, **TOKENS, decoder_start_token_id=2)


def bloom() -> hf.BloomConfig:
    return hf.BloomConfig(hidden_size=32, n_layer=5, n_head=4, vocab_size=1024, **TOKENS)


def deberta(version: type[hf.PreTrainedConfig]) -> hf.PreTrainedConfig:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    return version(**ENCODER, **relative, max_relative_positions=32)


def mamba() -> hf.FalconMambaConfig:
    return hf.FalconMambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=1000, **TOKENS)


def nemotron() -> hf.NemotronHConfig:
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 2, "chunk_size": 16}
    small = DECODER | {"num_hidden_layers": 3, "head_dim": 8}
    return hf.NemotronHConfig(**small, **mamba, layers_block_type=["mamba", "attention", "moe"])


def llama4() -> hf.Llama4TextConfig:
    return hf.Llama4TextConfig(**DECODER | {"head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 4})


def stable_diffusion() -> diffusers.StableDiffusionPipeline:
    """A pipeline without a safety checker."""
    torch.manual_seed(0)
    characters = pre_tokenizers.ByteLevel.alphabet()
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    unet = diffusers.UNet2DConditionModel(
        **blocks,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=32,
        cross_attention_dim=32,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 64],
        latent_channels=4,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=hf.CLIPTextModel(hf.CLIPTextConfig(**clip_text(hidden_size=32))),
        tokenizer=hf.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        unet=unet,
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def resnet() -> hf.ResNetConfig:
    return hf.ResNetConfig(embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], num_labels=3)


# The repository's name, the class of its model and what makes its configuration.
MODELS: dict[str, tuple[type[hf.PreTrainedModel], Callable[[], hf.PreTrainedConfig]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (hf.OPTForCausalLM, opt),
    # Some tests know its sizes.
    "peft-internal-testing/opt-125m": (hf.OPTForCausalLM, hf.OPTConfig),
    "peft-internal-testing/tiny-random-gpt2": (hf.GPT2LMHeadModel, gpt2),
    "hf-internal-testing/tiny-random-gpt2": (hf.GPT2LMHeadModel, gpt2),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (hf.GPT2LMHeadModel, gpt2),
    "gpt2": (hf.GPT2LMHeadModel, gpt2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        hf.GPTJForCausalLM,
        lambda: hf.GPTJConfig(
            n_embd=32,
            n_layer=5,
            n_head=4,
            n_positions=512,
            rotary_dim=4,
            initializer_range=0.1,
            vocab_size=1000,
            **TOKENS,
        ),
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        hf.GPTNeoXForCausalLM,
        lambda: hf.GPTNeoXConfig(**ATTENTION, vocab_size=1024, **TOKENS),
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (hf.BloomForCausalLM, bloom),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**DECODER)),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**DECODER)),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**DECODER)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (hf.MistralForCausalLM, lambda: hf.MistralConfig(**DECODER)),
    "peft-internal-testing/tiny-dummy-qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**DECODER)),
    "Qwen/Qwen2-0.5B": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**DECODER)),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**DECODER, head_dim=8)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (hf.Gemma3ForCausalLM, gemma3),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (hf.Llama4ForCausalLM, llama4),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        hf.GptOssForCausalLM,
        lambda: hf.GptOssConfig(**DECODER, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    ),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        hf.Qwen3MoeForCausalLM,
        lambda: hf.Qwen3MoeConfig(**MOE, num_experts=4),
    ),
    "hf-internal-testing/tiny-qwen3-moe": (hf.Qwen3MoeForCausalLM, lambda: hf.Qwen3MoeConfig(**MOE, num_experts=4)),
    "hf-internal-testing/Mixtral-tiny": (
        hf.MixtralForCausalLM,
        lambda: hf.MixtralConfig(**DECODER, num_local_experts=4),
    ),
    "tiiuae/falcon-mamba-tiny-dev": (hf.FalconMambaForCausalLM, mamba),
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": (hf.NemotronHForCausalLM, nemotron),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (hf.T5ForConditionalGeneration, t5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (hf.T5ForConditionalGeneration, t5),
    "peft-internal-testing/tiny-random-t5": (hf.T5ForConditionalGeneration, t5),
    "google/flan-t5-small": (hf.T5ForConditionalGeneration, t5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (hf.BartForConditionalGeneration, bart),
    "peft-internal-testing/tiny-random-BertModel": (hf.BertForPreTraining, lambda: hf.BertConfig(**ENCODER)),
    "hf-internal-testing/tiny-random-BertModel": (hf.BertForPreTraining, lambda: hf.BertConfig(**ENCODER)),
    SMALL_VOCABULARY: (hf.OPTForCausalLM, lambda: opt(vocab_size=len(tokenizer()))),
    WHISPER: (hf.WhisperForConditionalGeneration, whisper),
    "bert-base-uncased": (hf.BertForPreTraining, lambda: hf.BertConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        hf.BertForSequenceClassification,
        lambda: hf.BertConfig(**ENCODER),
    ),
    "peft-internal-testing/tiny-random-RobertaModel": (hf.RobertaModel, lambda: hf.RobertaConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        hf.RobertaForSequenceClassification,
        lambda: hf.RobertaConfig(**ENCODER),
    ),
    "peft-internal-testing/tiny-random-DebertaModel": (hf.DebertaModel, lambda: deberta(hf.DebertaConfig)),
    "peft-internal-testing/tiny-random-DebertaV2Model": (hf.DebertaV2Model, lambda: deberta(hf.DebertaV2Config)),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        hf.LlamaForSequenceClassification,
        lambda: hf.LlamaConfig(**DECODER),
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        hf.CLIPTextModelWithProjection,
        lambda: hf.CLIPTextConfig(**clip_text()),
    ),
    "peft-internal-testing/tiny-LlavaForConditionalGeneration": (hf.LlavaForConditionalGeneration, llava),
    "hf-internal-testing/tiny-random-LlavaForConditionalGeneration": (hf.LlavaForConditionalGeneration, llava),
    "trl-internal-testing/tiny-Qwen2_5_VLForConditionalGeneration": (hf.Qwen2_5_VLForConditionalGeneration, qwen_vl),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (hf.ResNetForImageClassification, resnet),
}
# Other revisions, with other weights.
REVISIONS = {"peft-internal-testing/tiny-random-BertModel": ["v2.0.0"]}
# The repository's name, its revision, the model that it adapts, as what, and the options of its configuration.
ADAPTERS: list[tuple[str, str, str, type, dict[str, Any]]] = [
    ("tiny-OPTForCausalLM-lora", "main", OPT, hf.AutoModelForCausalLM, {"task_type": "CAUSAL_LM"}),
    ("tiny-opt-lora-revision", "test", OPT, hf.AutoModelForCausalLM, {"task_type": "CAUSAL_LM"}),
    ("tiny_T5ForSeq2SeqLM-lora", "main", T5, hf.AutoModelForSeq2SeqLM, {"task_type": "SEQ_2_SEQ_LM"}),
    (
        "tiny_OPTForSequenceClassification-lora",
        "main",
        OPT,
        hf.AutoModelForSequenceClassification,
        {"task_type": "SEQ_CLS"},
    ),
    (
        "tiny_GPT2ForTokenClassification-lora",
        "main",
        "gpt2",
        hf.AutoModelForTokenClassification,
        {"task_type": "TOKEN_CLS"},
    ),
    ("tiny_OPTForQuestionAnswering-lora", "main", OPT, hf.AutoModelForQuestionAnswering, {"task_type": "QUESTION_ANS"}),
    ("tiny_OPTForFeatureExtraction-lora", "main", OPT, hf.AutoModel, {"task_type": "FEATURE_EXTRACTION"}),
    (
        "tiny_WhisperForConditionalGeneration-lora",
        "main",
        WHISPER,
        hf.WhisperForConditionalGeneration,
        {"target_modules": ["q_proj", "v_proj"]},
    ),
    ("gpt2-lora-random", "main", "gpt2", hf.AutoModelForCausalLM, {"task_type": "CAUSAL_LM"}),
    (
        "opt-125m-dummy-lora",
        "main",
        "peft-internal-testing/opt-125m",
        hf.AutoModelForCausalLM,
        {"task_type": "CAUSAL_LM"},
    ),
    ("tiny-random-BertModel-lora", "v1.2.3", BERT, hf.AutoModelForCausalLM, {"task_type": "CAUSAL_LM"}),
    (
        "tiny-random-OPTForCausalLM-extended-vocab",
        "main",
        SMALL_VOCABULARY,
        hf.AutoModelForCausalLM,
        {"task_type": "CAUSAL_LM"},
    ),
    ("opt-tokenizer-revision", "my-revision", SMALL_VOCABULARY, hf.AutoModelForCausalLM, {"task_type": "CAUSAL_LM"}),
]


def snapshot(root: Path, repository: str, revision: str = "main") -> Path:
    """The empty folder of a revision, where the hub's cache has it."""
    folder = root / "hub" / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def build(root: Path) -> None:
    """Make all repositories below a folder, which is `HF_HOME`; adapters are those of `peft.LoraConfig`."""
    for repository, (model_class, make_config) in MODELS.items():
        for seed, revision in enumerate(["main", *REVISIONS.get(repository, [])]):
            folder = snapshot(root, repository, revision)
            torch.manual_seed(seed)
            model_class(make_config()).save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            if make_config is resnet:
                hf.CLIPImageProcessor().save_pretrained(folder)
    stable_diffusion().save_pretrained(snapshot(root, "hf-internal-testing/tiny-sd-pipe"))
    for name, revision, base, auto_class, options in ADAPTERS:
        _adapter(root, f"peft-internal-testing/{name}", revision, base, auto_class, options)


def _adapter(root: Path, repository: str, revision: str, base: str, auto_class: type, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, folder = auto_class.from_pretrained(base), snapshot(root, repository, revision)
    if base == SMALL_VOCABULARY:
        larger = tokenizer()
        larger.add_tokens(["<one>", "<more>"])
        larger.save_pretrained(folder)
        model.resize_token_embeddings(len(larger))
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options, init_lora_weights=False))
    adapted.save_pretrained(folder, save_embedding_layers=base == SMALL_VOCABULARY)


if __name__ == "__main__":
    if sys.argv[1] == "spikelora":
        from spikelora import SpikeLoraConfig

        peft.LoraConfig = SpikeLoraConfig
    build(Path(os.environ["HF_HOME"]))
