"""Text for calibration: files of it as batches of a model's keyword arguments."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spikelora.errors import SpikeLoraError

SUFFIXES = (".txt", ".jsonl")


def text_batches(
    path: Path, tokenizer: Any, text_field: str = "text", batch_size: int = 8, cutoff_len: int = 256
) -> Iterator[dict[str, Any]]:
    """The texts of a file in its order, tokenised and padded to the longest of each batch.

    Args:
        path: a .txt file, whose paragraphs are texts, or a .jsonl file with an object on each line.
        tokenizer: the base model's, of transformers.
        text_field: where an object of a .jsonl file has its text.
        batch_size: texts of a batch.
        cutoff_len: tokens of a text; longer texts are cut.

    Returns:
        Batches of `input_ids` and `attention_mask`, both `(batch, tokens)`.

    Raises:
        SpikeLoraError: for a file that is not text, has no text, or lacks the field in a line.
    """
    texts = _texts(path, text_field)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise SpikeLoraError(
            f"The tokenizer {tokenizer.name_or_path} has no token to pad with. Give it a `pad_token`, and save it."
        )
    names = ["input_ids", "attention_mask"]
    for start in range(0, len(texts), batch_size):
        rows = texts[start : start + batch_size]
        made = tokenizer(rows, padding=True, truncation=True, max_length=cutoff_len, return_tensors="pt")
        yield {name: made[name] for name in names}


def _texts(path: Path, text_field: str) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpikeLoraError(
            f"{path} cannot be read as text in UTF-8 ({error}). Save it so, or give another file."
        ) from error
    if path.suffix == ".jsonl":
        # Not splitlines: it would also split at other characters that a JSON string may contain.
        lines = enumerate(content.split("\n"), start=1)
        found = [_field(path, number, line, text_field) for number, line in lines if line.strip()]
    else:
        found = re.split(r"\n\s*\n", content)
    texts = [text for text in found if text.strip()]
    if not texts:
        raise SpikeLoraError(f"{path} has no text. Give a file with some, such as a part of the training data.")
    return texts


def _field(path: Path, number: int, line: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SpikeLoraError(f"{path}, line {number} is not JSON ({error}). Give one object per line.") from error
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise SpikeLoraError(
            f"{path}, line {number} has no text under {text_field!r}. Name the field that has it with --text_field."
        )
    return text
