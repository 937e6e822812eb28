"""Whole models: training step, inference, decoding of a single token, and peak memory of a training step."""

from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain

import pandas as pd
import torch
from torch import Tensor

from .check import check_methods
from .job import Job, Row
from .measure import interleaved, overhead_is_clear, overhead_share, peak_memory, ratio, spread
from .models import BASE, LORA, METHODS, OURS, TRANSCRIPTION, VOCABULARY, Method, base_model, methods

TRAINING, INFERENCE, DECODE = "training step", "inference", "decode"
PROMPT, FEW = 64, 16


@dataclass(frozen=True)
class Cell:
    """One model, rank and type of the base, with tokens `(batch, length)`; a quantity with 0 rounds is left out."""

    style: str
    hidden: int
    layers: int
    r: int
    dtype: torch.dtype
    batch: int
    length: int
    rounds: int
    decode_rounds: int
    memory: bool = True
    methods: tuple[str, ...] = METHODS

    def keys(self) -> Row:
        keys = {k: v for k, v in asdict(self).items() if k not in ("rounds", "decode_rounds", "memory", "methods")}
        return keys | {"dtype": str(self.dtype).removeprefix("torch.")}


def jobs(device: torch.device, quick: bool) -> list[Job]:
    cells = _quick() if quick else _cuda() if device.type == "cuda" else _cpu()
    return [Job(" ".join(map(str, cell.keys().values())), partial(_run, cell, device)) for cell in cells]


def _quick() -> list[Cell]:
    return [Cell("OPT", 64, 2, 8, torch.float32, 2, 64, 3, 3), Cell("Llama", 64, 1, 64, torch.bfloat16, 1, 64, 2, 2)]


def _cpu() -> list[Cell]:
    float32, bfloat16, styles = torch.float32, torch.bfloat16, ("OPT", "Llama")
    headline = [Cell(style, 1024, 3, 8, float32, 2, 256, 25, 151) for style in styles]
    others = [Cell(style, 768, 3, 8, float32, 2, 256, 5, 15) for style in styles]
    high_rank = [Cell(style, 1024, 2, 64, float32, 2, 256, 5, 15) for style in styles]
    # Few tokens: on a CPU without a bfloat16 product torch's own takes a second for what float32 does in 20 ms.
    half = [Cell("OPT", 768, 1, 8, bfloat16, 1, 64, 3, 151), Cell("Llama", 768, 1, 64, bfloat16, 1, 64, 3, 151)]
    # Peak memory is exact without rounds, but needs about as many tokens as a training; LoRA's step takes 30 s here.
    memory = [Cell(style, 1024, 3, 8, bfloat16, 1, 256, 0, 0, True, (LORA, OURS)) for style in styles]
    return headline + others + high_rank + half + memory


def _cuda() -> list[Cell]:
    dtypes = (torch.bfloat16, torch.float32)
    return [
        Cell(style, hidden, 3, r, dtype, 4, 512, 21, 51)
        for dtype in dtypes
        for style in ("OPT", "Llama")
        for hidden in ((1024, 2048, 4096) if dtype is torch.bfloat16 else (1024,))
        for r in (8, 64)
    ]


def _run(cell: Cell, device: torch.device) -> dict[str, list[Row]]:
    models = methods(base_model(cell.style, cell.hidden, cell.layers, cell.dtype, device), cell.r, cell.methods)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (cell.batch, cell.length), generator=generator).to(device)
    prompt = tokens[:1, :PROMPT]
    # If only memory is measured, because time is short, the check is short as well.
    error = check_methods(models, tokens if cell.rounds else tokens[:, :FEW], prompt, cell.dtype)
    rows = {"whole_model": _times(cell, models, tokens, prompt, device, error)} if cell.rounds else {}
    if cell.memory:
        rows["memory"] = _memory(cell, models, tokens, device, error)
    return rows


def _times(
    cell: Cell, models: dict[str, Method], tokens: Tensor, prompt: Tensor, device: torch.device, error: float
) -> list[Row]:
    calls = {
        TRAINING: ({name: partial(m.training_step, tokens) for name, m in models.items()}, cell.rounds),
        INFERENCE: ({name: partial(m.infer, tokens) for name, m in models.items()}, cell.rounds),
        DECODE: ({name: m.decoder(prompt) for name, m in models.items()}, cell.decode_rounds),
    }
    rows = []
    for quantity, (by_method, rounds) in calls.items():
        times = interleaved(by_method, rounds, device)
        timed = 1 if quantity == DECODE else tokens.numel()
        keys = cell.keys() | {"quantity": quantity, "timed_tokens": timed}
        rows += [row | {"error": error} for row in time_rows(times, keys)]
    return rows


def time_rows(times: pd.DataFrame, keys: Row) -> list[Row]:
    """One row per method: seconds, ratios and the overhead over the base as a share of LoRA's, with quartiles."""
    clear = overhead_is_clear(times, BASE, LORA)
    rows = []
    for name in times.columns:
        row = keys | {"method": name, "rounds": len(times)} | spread(times[name], "seconds")
        for reference, column in ((BASE, "to_base"), (LORA, "to_lora"), (TRANSCRIPTION, "to_transcription")):
            if reference in times:
                row |= spread(ratio(times, name, reference), column)
        row |= spread(overhead_share(times, name, BASE, LORA), "overhead_share")
        rows.append(row | {"lora_overhead_clear": clear} | times.attrs)
    return rows


def _memory(cell: Cell, models: dict[str, Method], tokens: Tensor, device: torch.device, error: float) -> list[Row]:
    measured = {}
    for name, method in models.items():
        if not cell.rounds:
            method.training_step(tokens[:, :FEW])  # creates the optimiser's state
        method.reset()
        measured[name] = peak_memory(partial(method.training_step, tokens), _held(method), device)
    rows = []
    for name, memory in measured.items():
        row = cell.keys() | {"method": name, "held_mb": memory.held / 1e6, "added_mb": memory.added / 1e6}
        row |= {"peak_mb": memory.peak / 1e6, "peak_to_lora": memory.peak / measured[LORA].peak}
        row |= {"added_to_lora": memory.added / measured[LORA].added, "judged_by": "peak_to_lora"}
        rows.append(row | {"error": error})
    return rows


def _held(method: Method) -> list[Tensor]:
    """Weights, buffers, gradients and the optimiser's state."""
    tensors = list(chain(method.model.parameters(), method.model.buffers()))
    states = method.optimizer.state.values() if method.optimizer else ()
    states = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return tensors + states + [p.grad for p in tensors if p.grad is not None]
