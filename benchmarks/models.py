"""The models that are timed: two architectures built from their configurations, four methods on copies of one base."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from spikelora import SpikeLoraConfig

BASE, LORA, TRANSCRIPTION, OURS = "base", "LoRA", "transcription", "SpikeLoRA"
METHODS = (BASE, LORA, TRANSCRIPTION, OURS)
V_THRESHOLD, TAU, SURROGATE_ALPHA = 0.1, 2.0, 2.0
# Small, so that the head, which no method adapts, does not outweigh the layers that are compared.
VOCABULARY = 1024
POSITIONS = 2048
# As transformers 5.24 calls it in its arguments and results, and 5.17 to 5.23 did.
CACHE = next(name for name in ("cache", "past_key_values") if name in signature(OPTForCausalLM.forward).parameters)


class SpikingjellyVariant(LoraVariant):
    """The method as it is written down: PEFT's LoRA with spikingjelly's neuron between A and B."""

    @staticmethod
    def forward(module: LoraLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        a = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        spike = module.neuron(a)
        return result + module.lora_B[active_adapter](a * spike) * module.scaling[active_adapter]


def add_spikingjelly(layer: LoraLinear, v_threshold: float = V_THRESHOLD) -> None:
    """Turn one layer of PEFT's LoRA into a layer of the transcription."""
    from spikingjelly.activation_based import neuron, surrogate  # imported here, because `make gpu` does without it

    layer.neuron = neuron.LIFNode(
        tau=TAU,
        v_threshold=v_threshold,
        surrogate_function=surrogate.ATan(alpha=SURROGATE_ALPHA),
        detach_reset=True,
        step_mode="s",
    )
    layer.lora_variant["default"] = SpikingjellyVariant()


def base_model(style: str, hidden: int, layers: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of the style "OPT" or "Llama" with random weights and no dropout; the same on every call."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "attention_dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    if style == "OPT":
        config = OPTConfig(ffn_dim=4 * hidden, word_embed_proj_dim=hidden, dropout=0.0, **shape)
        model = OPTForCausalLM(config)
    else:
        # Llama's own ratio, 11008 to 4096.
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=hidden * 43 // 16, **shape))
    return model.to(device=device, dtype=dtype)


@dataclass
class Method:
    """One method on its own model: its training step, forward and single-token decode."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = field(init=False)

    def __post_init__(self) -> None:
        trained = self.trained().values()
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def loss(self, tokens: Tensor) -> Tensor:
        self.reset()
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def training_step(self, tokens: Tensor) -> None:
        self.loss(tokens).backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.inference_mode()
    def infer(self, tokens: Tensor) -> Tensor:
        self.reset()
        return self.model(input_ids=tokens, use_cache=False).logits

    def decoder(self, prompt: Tensor) -> Callable[[], Tensor]:
        """A function that decodes one token after the prompt; each call starts from the same cache."""
        with torch.inference_mode():
            self.reset()
            cache = self.model(input_ids=prompt, use_cache=True)[CACHE]

        @torch.inference_mode()
        def decode() -> Tensor:
            self.reset()
            logits = self.model(input_ids=prompt[:, -1:], use_cache=True, **{CACHE: cache}).logits
            cache.crop(-1)
            return logits

        return decode

    def reset(self) -> None:
        if self.name == TRANSCRIPTION:
            from spikingjelly.activation_based import functional

            functional.reset_net(self.model)


def methods(base: PreTrainedModel, r: int, names: tuple[str, ...] = METHODS) -> dict[str, Method]:
    """The methods on copies of one base, with the same A and the same B, which is not 0."""
    return {name: _method(name, copy.deepcopy(base), r) for name in names}


def _method(name: str, model: nn.Module, r: int) -> Method:
    if name == BASE:
        model.requires_grad_(False)
    else:
        options = lora_options(r)
        config = SpikeLoraConfig(v_threshold=V_THRESHOLD, **options) if name == OURS else LoraConfig(**options)
        model = get_peft_model(model, config)
        fill_adapters(model)
    if name == TRANSCRIPTION:
        for layer in [m for m in model.modules() if isinstance(m, LoraLinear)]:
            add_spikingjelly(layer)
    # Usually for gradient checkpointing; here it makes input gradients run through all layers of the base as well.
    model.enable_input_require_grads()
    return Method(name, model.train())


def lora_options(r: int) -> dict:
    """The options that LoRA and SpikeLoRA share: the paper's settings."""
    return {
        "r": r,
        "lora_alpha": 2 * r,
        "lora_dropout": 0.0,
        "use_rslora": True,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }


@torch.no_grad()
def fill_adapters(model: nn.Module) -> None:
    """Give A and B the same numbers for every method; with PEFT's B = 0 nothing would reach A or be worth a check."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            scale = p.shape[1] ** -0.5 if ".lora_A." in name else 0.02
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
