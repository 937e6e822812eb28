"""What a run of `spikelora_finetuning.py` has reached: figures and tables."""

import math
import resource
import sys
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from options import Options
from spikelora import Ledger, SparsityMeter, SpikeLoraConfig

console = Console()


@torch.no_grad()
def measure(model: PeftModel, rows: Dataset, collator, options: Options, title: str) -> dict:
    """Loss, perplexity and, for a spiking adapter, the sparsity over all tokens of `rows`, without padding."""
    model.eval()
    loss, tokens = 0.0, 0
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
            tokens += (labels != -100).sum().item()
    figures = {"loss": loss / tokens, "perplexity": math.exp(loss / tokens), "tokens": tokens}
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


def as_lora(options: Options, ledger: Ledger) -> Options:
    """The flags for LoRA with the operations that the spiking adapter needs where silence is skipped, scaled alike."""
    share = ledger.effective.macs / ledger.lora_unmerged.macs
    r = max(1, round(options.lora_r * share))
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
