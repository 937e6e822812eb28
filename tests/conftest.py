import functools
import gc
import os
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import torch
import transformers
from fresh import Fresh
from packaging.version import Version
from peft import PeftModel, get_peft_model
from processes import in_processes
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainingArguments,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from spikelora import SpikeLoraConfig

TOKENS = {"vocab_size": 100, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}


def tiny_opt() -> OPTForCausalLM:
    """A two-layer OPT without dropout whose targets are `nn.Linear`; the same weights on every call."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        **TOKENS,
    )
    return OPTForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """A two-layer GPT-2 without dropout whose targets are `Conv1D`; the same weights on every call."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **TOKENS
    )
    return GPT2LMHeadModel(config).eval()


def tiny_llama() -> LlamaForCausalLM:
    """A two-layer LLaMA, with gated MLPs, shared keys and values and an untied head; the same weights on every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **TOKENS,
    )
    return LlamaForCausalLM(config).eval()


def spiking(base: nn.Module, **options) -> PeftModel:
    """The base with adapters that do something, as PEFT starts with B = 0; by default rank 4 on all linear layers."""
    torch.manual_seed(0)
    model = get_peft_model(base, SpikeLoraConfig(**({"r": 4, "target_modules": "all-linear"} | options)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) / 4
    return model


# The files that take longest. They go first, as one that began last would keep one core busy while the others wait.
LONGEST = (
    *("triton", "finetuning", "fsdp", "export", "experiments", "architectures", "paths", "distributed", "adapters"),
    *("callbacks", "autoload", "trainers", "generation", "docs", "damage"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what the imports made stays to the end, and need not be gone through in each collection of garbage


# transformers 5.24 asks for a PEFT that is not out yet, in its own `add_adapter` and the like.
takes_adapters = pytest.mark.skipif(
    Version(MIN_PEFT_VERSION) > Version(peft.__version__),
    reason=f"transformers {transformers.__version__} asks for PEFT {MIN_PEFT_VERSION} in its own functions",
)

# As transformers 5.24 calls it in a model's arguments and results, and 5.17 to 5.23 did.
CACHE = next(name for name in ("cache", "past_key_values") if name in signature(OPTForCausalLM.forward).parameters)

# As transformers 5.23 calls it in its arguments, and 5.17 did.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


def enable_checkpointing(model: nn.Module, use_reentrant: bool) -> None:
    """By its name in transformers 5.23, or by that in 5.17."""
    new = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@pytest.fixture
def device() -> torch.device:
    """Where trainers, `device_map="auto"` and PEFT's loaders put what nobody places: the GPU, if there is one.

    Tests that take it are about devices, and run on both kinds of machine. They put their tensors on `model.device`.
    """
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@pytest.fixture(autouse=True)
def _trainers_on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `device` a test means the CPU: there its tensors are, and there two trainings agree to the bit."""
    if "device" not in request.fixturenames:
        prepare = TrainingArguments.__post_init__

        def prepare_for_the_cpu(arguments: TrainingArguments) -> None:
            arguments.use_cpu = True
            prepare(arguments)

        monkeypatch.setattr(TrainingArguments, "__post_init__", prepare_for_the_cpu)


@pytest.fixture(scope="module")
def once_in_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[int, list]]]:
    """For a function and numbers of processes its folder, and by number what it gave in each; each is run once."""

    @functools.cache
    def run(function: Callable[[Path], Any], *sizes: int) -> tuple[Path, dict[int, list]]:
        folder = tmp_path_factory.mktemp(function.__name__)
        return folder, dict(zip(sizes, in_processes(function, folder, *sizes), strict=True))

    return run


@pytest.fixture(scope="session")
def fresh() -> Iterator[Fresh]:
    """Runs code in a process that has not imported this package."""
    with Fresh() as run:
        yield run


@pytest.fixture
def opt() -> OPTForCausalLM:
    return tiny_opt()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    return tiny_gpt2()
