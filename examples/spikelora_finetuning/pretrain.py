"""Pre-train the small language model that `spikelora_finetuning.py` uses when no `--base_model` is given.

    python examples/spikelora_finetuning/pretrain.py --output_dir model

The text is what every Python ships: the docstrings and the source of the standard library, without its tests and
without `pydoc_data`, which the fine-tuning keeps for itself. Its wording differs from one Python version to the next,
so the weights are shipped beside this script and need not be rebuilt.
"""

import ast
import hashlib
import json
import platform
import re
import sysconfig
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    HfArgumentParser,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

SKIPPED_FOLDERS = {"__pycache__", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}


@dataclass
class Options:
    output_dir: str = field(default="model", metadata={"help": "where the model and its tokenizer go"})
    max_steps: int = field(default=1800, metadata={"help": "optimiser steps of 16 x 256 tokens"})
    vocab_size: int = field(default=2048, metadata={"help": "tokens of the byte-level BPE"})
    docstring_copies: int = field(default=3, metadata={"help": "docstrings are prose, and rarer than code"})
    seed: int = 0


def paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


def standard_library() -> tuple[list[str], list[str]]:
    """The docstrings and the sources of the standard library, less every paragraph that the fine-tuning text has."""
    kept_for_finetuning = {" ".join(part.split()) for text in topics.values() for part in paragraphs(text)}

    def cleaned(text: str) -> str:
        return "\n\n".join(part for part in paragraphs(text) if " ".join(part.split()) not in kept_for_finetuning)

    docstrings, sources = [], []
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        source = path.read_text(encoding="utf-8", errors="ignore")
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
        docstrings.append(cleaned("\n\n".join(text for text in found if text)))
        sources.append(cleaned(source))
    return docstrings, sources


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    set_seed(options.seed)
    docstrings, sources = standard_library()

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(docstrings + sources, vocab_size=options.vocab_size, special_tokens=["<pad>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="</s>"
    )
    texts = [text for text in docstrings * options.docstring_copies + sources if text]
    tokens = list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]))
    blocks = torch.tensor(tokens[: len(tokens) // 256 * 256]).view(-1, 256)
    print(f"{sum(map(len, docstrings)):,} characters of docstrings, {sum(map(len, sources)):,} of source")
    print(f"{len(tokens):,} tokens in {len(blocks):,} blocks, docstrings taken {options.docstring_copies} times")

    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            word_embed_proj_dim=192,
            ffn_dim=768,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=256,
            dropout=0.0,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters")
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.05,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=options.seed,
    )
    dataset = [{"input_ids": block, "labels": block} for block in blocks]
    result = Trainer(model=model, args=arguments, train_dataset=dataset).train()

    model.half().save_pretrained(options.output_dir)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(options.output_dir)
    record = {
        "python": platform.python_version(),
        "text_sha256": hashlib.sha256("".join(docstrings + sources).encode()).hexdigest(),
        "training_loss": result.training_loss,
        "seconds": round(result.metrics["train_runtime"]),
        **{name: value for name, value in vars(options).items() if name != "output_dir"},
    }
    (Path(options.output_dir) / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
