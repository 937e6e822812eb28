"""What a run of `spikelora_finetuning.py` has reached: figures and tables."""

import math
import os
import re
import resource
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProgressCallback

from options import Options
from spikelora import Ledger, SparsityMeter, SpikeLoraConfig

console = Console()


class FiguresInBar(ProgressCallback):
    """The Trainer's bar, with the figures of its last logs at its end and not as a dict for each."""

    SHOWN: ClassVar = {"loss": "loss", "eval_loss": "held-out loss", "sparsity": "silent"}

    def on_train_begin(self, *args, **kwargs):
        super().on_train_begin(*args, **kwargs)
        self.figures: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:  # in the first process alone
            self.figures |= {shown: f"{logs[key]:.2f}" for key, shown in self.SHOWN.items() if key in logs}
            self.training_bar.set_postfix(self.figures)


@torch.no_grad()
def measure(model: PeftModel, rows: Dataset, collator, options: Options, title: str) -> dict:
    """Loss, perplexity, the share of tokens guessed and, for a spiking adapter, the sparsity; without padding."""
    model.eval()
    loss, right, tokens = 0.0, 0, 0
    is_spiking = isinstance(model.peft_config["default"], SpikeLoraConfig)
    is_first = PartialState().is_main_process
    meter = SparsityMeter(model) if is_spiking else None
    batches = DataLoader(rows, options.batch_size, collate_fn=collator)
    # All processes run all rows, as a sharded model needs them together, and the first one counts.
    with meter if meter and is_first else nullcontext():
        for loaded in tqdm(batches, desc=title, leave=False, disable=not is_first):
            batch = {key: value.to(model.device) for key, value in loaded.items()}
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]
            loss += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            right += (logits.argmax(-1) == labels).sum().item()
            tokens += (labels != -100).sum().item()
    figures = {"loss": loss / tokens, "perplexity": math.exp(loss / tokens), "guessed": right / tokens}
    figures["tokens"] = tokens
    if meter:
        report = meter.report()
        never_called = [name for name, module in report.modules.items() if not module.tokens]
        if never_called:
            sys.exit(f"the model never calls {never_called}, so no adapter can work there; name other targets")
        figures["sparsity"] = report.sparsity
        figures["silent_tokens"] = report.silent_tokens
        figures["zero_threshold_sparsity"] = report.zero_threshold_sparsity
        figures["sparsity_by_kind"] = {kind: shares.sparsity for kind, shares in report.kinds.items()}
        figures["sparsity_by_module"] = {name: module.sparsity for name, module in report.modules.items()}
        figures["report"] = report
    return figures


def show_example(tokenizer, row: dict, before: torch.Tensor, after: torch.Tensor) -> None:
    """What the adapter changes in one text: the first places where either the base or it guesses the next token.

    Places without a letter or a digit are left out; what was lost is shown as what was won.
    """
    labels = torch.tensor(row["labels"][1:], device=after.device)
    guesses = [logits[0, :-1].argmax(-1) for logits in (before, after)]
    was, now = (guess == labels for guess in guesses)
    console.print(
        f"The first held-out text has {(labels != -100).sum()} tokens, words or pieces of words. {was.sum()} of them "
        f"were guessed before, {now.sum()} are now. Some where that differs, the right guess in green:"
    )
    table = Table()
    table.add_column("the text so far", justify="right", no_wrap=True)
    for heading in ("goes on with", "guess before", "guess now"):
        table.add_column(heading)
    told = [place for place in (was != now).nonzero()[:, 0] if re.search(r"\w", tokenizer.decode(labels[place]))]
    for place in told[:6]:
        so_far = tokenizer.decode(row["input_ids"][max(0, place - 11) : place + 1])
        pieces = [tokenizer.decode(token[place]) for token in (labels, *guesses)]
        colours = [None, *("green" if right[place] else None for right in (was, now))]
        cells = [Text(repr(piece), style=colour or "") for piece, colour in zip(pieces, colours, strict=True)]
        table.add_row(Text(" ".join(so_far.split())[-30:]), *cells)
    console.print(table)


def warn_of_silence(figures: dict, when: str) -> None:
    silent = [name for name, sparsity in figures["sparsity_by_module"].items() if sparsity == 1]
    if silent:
        console.print(
            f"[yellow]{len(silent)} of {len(figures['sparsity_by_module'])} modules never fire {when}, and learn "
            f"nothing while they are silent: {', '.join(silent[:4])}{', ...' if len(silent) > 4 else ''}. Lower "
            "--v_threshold."
        )


def peak_memory() -> float:
    """Peak memory in MB: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def rank_of_lora(r: int, ledger: Ledger) -> int:
    """The rank of LoRA with the operations that a spiking adapter of rank `r` needs where silence is skipped."""
    return max(1, round(r * ledger.effective.macs / ledger.lora_unmerged.macs))


def as_lora(options: Options, ledger: Ledger) -> Options:
    """The flags for LoRA with the operations that the spiking adapter needs where silence is skipped, scaled alike."""
    r = rank_of_lora(options.lora_r, ledger)
    alike = (r / options.lora_r) ** (0.5 if options.use_rslora else 1)
    return replace(options, lora_r=r, lora_alpha=max(1, round(options.lora_alpha * alike)))


def show(metrics: dict) -> None:
    table = Table(title=f"Held-out text; recipe: {metrics['recipe']}")
    methods = [name for name in ("spikelora", "lora") if name in metrics]
    for heading in ("", "before", *({"spikelora": "SpikeLoRA", "lora": "LoRA"}[name] for name in methods)):
        table.add_column(heading, justify="right" if heading else "left")
    after = [metrics[name] for name in methods]

    def row(label: str, key: str, form: str, before: bool = False) -> None:
        table.add_row(
            label,
            format(metrics["before"][key], form) if before else "",
            *(format(figures[key], form) if key in figures else "" for figures in after),
        )

    row("loss", "loss", ".4f", before=True)
    row("perplexity", "perplexity", ".2f", before=True)
    row("next token guessed", "guessed", ".1%", before=True)
    row("rank", "r", "d")
    row("trainable parameters", "trainable_parameters", ",d")
    row("operations / token", "operations", ",.0f")
    row("training tokens / s", "tokens_per_second", ",.0f")
    row("peak memory, MB", "peak_memory_mb", ",.0f")
    row("sparsity", "sparsity", ".1%", before=True)
    for kind, sparsity in after[0]["sparsity_by_kind"].items():
        table.add_row(f"  {kind}", f"{metrics['before']['sparsity_by_kind'][kind]:.1%}", f"{sparsity:.1%}")
    row("tokens without a spike", "silent_tokens", ".1%", before=True)
    row("sparsity at threshold 0", "zero_threshold_sparsity", ".1%", before=True)
    console.print(table)
    beside = f", with LoRA of as many operations {after[1]['guessed']:.1%}" if "lora" in metrics else ""
    console.print(
        f"The base guesses {metrics['before']['guessed']:.1%} of the next tokens, with SpikeLoRA "
        f"{after[0]['guessed']:.1%}{beside}. {after[0]['sparsity']:.0%} of SpikeLoRA's activations are silent.\n"
    )


def next_step(folder: Path) -> str:
    """What to type next, as this machine finds the command."""
    command = "spikelora" if shutil.which("spikelora") else os.path.relpath(Path(sys.executable).with_name("spikelora"))
    return f"Next, a page of it for your browser: {command} report {folder}"
