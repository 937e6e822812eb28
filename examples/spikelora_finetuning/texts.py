"""The text that `spikelora_finetuning.py` trains on, in rows of tokens."""

import math
import platform
import re
import sys
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoConfig, AutoTokenizer

from options import Options, is_local

READERS = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".parquet": Dataset.from_parquet,
    ".txt": partial(Dataset.from_text, sample_by="paragraph"),
}


def python_reference() -> Dataset:
    """Python's language reference as every Python ships it, in passages of about 2,000 characters.

    The topics contain each other. A paragraph is taken only where it first occurs, so none of the held-out text is also
    trained on.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    passages, passage = [], ""
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                passage += paragraph.strip("\n") + "\n\n"
            if len(passage) > 2000:
                passages.append(passage)
                passage = ""
    print(
        f"Text: the language reference of Python {platform.python_version()} (pydoc_data.topics), "
        f"{sum(map(len, passages)):,} characters in {len(passages)} passages"
    )
    return Dataset.from_list([{"text": text} for text in passages])


def load_tokenizer(options: Options):
    source = options.source
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        positions = getattr(AutoConfig.from_pretrained(source), "max_position_embeddings", None) or math.inf
    except (OSError, ValueError) as error:
        sys.exit(f"--base_model {source} cannot be read: {error}")
    if options.cutoff_len > positions:
        sys.exit(f"--cutoff_len {options.cutoff_len} is more than the {positions} positions of {source}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_rows(options: Options) -> Dataset:
    if options.data_path is None:
        return python_reference()
    path = Path(options.data_path)
    try:
        if path.is_dir():
            rows = load_from_disk(path)
        elif path.suffix in READERS or is_local(options.data_path):
            if not path.is_file():
                raise FileNotFoundError("no such file")
            if not path.stat().st_size:
                raise EOFError("the file is empty")
            rows = READERS[path.suffix](str(path))
        else:
            rows = load_dataset(options.data_path, split="train")
    except Exception as error:  # each reader has errors of its own
        sys.exit(f"--data_path {options.data_path} cannot be read: {type(error).__name__}: {error}")
    if isinstance(rows, DatasetDict):
        if "train" not in rows:
            sys.exit(f"--data_path {options.data_path} has no split `train`, only {sorted(rows)}")
        rows = rows["train"]
    if len(rows) < 2:
        sys.exit(f"--data_path {options.data_path} has {len(rows)} rows; at least 2 are needed, to train and to test")
    return rows


def tokenize(rows: Dataset, tokenizer, options: Options) -> Dataset:
    """Rows of `input_ids` and `labels`, at most `cutoff_len` tokens each."""
    columns = set(rows.column_names)
    end = tokenizer.eos_token or ""

    def instruction(row: dict) -> list[tuple[list[int], list[int]]]:
        prompt = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "") + "\n### Answer:\n"
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = tokenizer(row["output"] + end, add_special_tokens=False)["input_ids"]
        ids, labels = prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids
        return [(ids[: options.cutoff_len], labels[: options.cutoff_len])]

    def text(row: dict) -> list[tuple[list[int], list[int]]]:
        ids = tokenizer(row[options.text_field] + end, verbose=False)["input_ids"]
        windows = [ids[start : start + options.cutoff_len] for start in range(0, len(ids), options.cutoff_len)]
        return [(window, window) for window in windows]

    if options.text_field in columns:
        to_rows, needed = text, [options.text_field]
    elif {"instruction", "output"} <= columns:
        to_rows, needed = instruction, ["instruction", "output"]
    else:
        sys.exit(
            f"the rows have the columns {sorted(columns)}, but neither --text_field {options.text_field} nor "
            "instruction and output"
        )

    def batch_to_rows(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        made = []
        for position, index in enumerate(indices):
            row = {name: values[position] for name, values in batch.items()}
            for name in needed:
                if not isinstance(row[name], str):
                    sys.exit(f"row {index} has no text in the column {name}, but {row[name]!r}")
            made += to_rows(row)
        # A row without a label after its first token teaches nothing.
        made = [(ids, labels) for ids, labels in made if any(label != -100 for label in labels[1:])]
        return {"input_ids": [ids for ids, _ in made], "labels": [labels for _, labels in made]}

    made = rows.map(
        batch_to_rows,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        keep_in_memory=True,
        desc="tokenising",
    )
    if not len(made):
        sys.exit("no row has a token to learn from: they are empty, or --cutoff_len ends before the answers")
    return made


def split(rows: Dataset, options: Options) -> tuple[Dataset, Dataset]:
    size = options.val_set_size if options.val_set_size < 1 else int(options.val_set_size)
    held_out = max(1, round(size * len(rows))) if size < 1 else size
    if held_out >= len(rows):
        sys.exit(f"--val_set_size {options.val_set_size} leaves none of the {len(rows)} rows to train on")
    parts = rows.train_test_split(test_size=held_out, seed=options.seed)
    return parts["train"], parts["test"]
