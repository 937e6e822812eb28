"""Base models and adapters for the tests of serving, made here; and what transformers answers with them."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from spikelora import SparsityMeter, SpikeLoraConfig

ROOT = Path(__file__).parents[2]
OPT = ROOT / "examples" / "spikelora_finetuning" / "model"
NEW_TOKENS = 20
PROMPTS = [
    "The",
    "The king said to the",
    "In the beginning there was a small house near the sea, and in it",
    "# Serving\n\n",
]


def tokens(prompts=PROMPTS):
    tokenizer = AutoTokenizer.from_pretrained(OPT)
    return [tokenizer(prompt).input_ids for prompt in prompts]


def decoder(folder: Path, family: str, **sizes: int) -> Path:
    """A two-layer model with packed q, k, v and gate, up in vLLM, keys and values shared by two heads each."""
    tokenizer = AutoTokenizer.from_pretrained(OPT)
    kind, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen": (Qwen2ForCausalLM, Qwen2Config)}[family]
    torch.manual_seed(0)
    model = kind(
        config(
            vocab_size=len(tokenizer),
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.1,
            tie_word_embeddings=False,
            **({"hidden_size": 128, "intermediate_size": 256} | sizes),
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text() -> torch.Tensor:
    """Tokens `(rows, 64)` of this project's own documents."""
    tokenizer = AutoTokenizer.from_pretrained(OPT)
    ids = [token for file in sorted((ROOT / "docs").glob("*.md")) for token in tokenizer(file.read_text()).input_ids]
    return torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)


def train(base: Path, folder: Path, config: LoraConfig, steps: int = 12) -> Path:
    """An adapter, trained on `text` for a few steps, in a folder."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = text()
    for step in range(steps):
        batch = batches[step * 4 : step * 4 + 4]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def sparsity(base: Path, folder: Path) -> float:
    """Share of silent activations of a spiking adapter on a little text."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    with torch.no_grad(), SparsityMeter(model) as meter:
        model(text()[-8:])
    return meter.report().sparsity


def without_gate(folder: Path, to: Path) -> Path:
    """The same A and B as a plain LoRA: what would be served if the gate were lost."""
    from safetensors.torch import load_file, save_file

    to.mkdir()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if ".lora_gate." not in k}, to / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    own = SpikeLoraConfig.__annotations__
    config = {k: v for k, v in config.items() if k not in own} | {"peft_type": "LORA"}
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


def answers(base: Path, adapter: Path | None, prompts, dtype=torch.float32) -> list[list[int]]:
    """The greedy tokens of transformers, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    return [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
