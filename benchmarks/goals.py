"""The project's goals, and whether the figures of a run reach them."""

from typing import Any, NamedTuple

import pandas as pd
import torch

from .import_time import DIFFERENCE
from .models import OURS
from .sparsity import UP
from .whole_model import DECODE, INFERENCE, TRAINING


class Goal(NamedTuple):
    """An upper limit for one column, in the one row of a table that has these values."""

    text: str
    limit: float
    table: str
    column: str
    where: dict[str, Any]


def goals(device: torch.device) -> list[Goal]:
    return _on_cuda() if device.type == "cuda" else _on_cpu()


def _on_cpu() -> list[Goal]:
    goals = []
    for style, step in (("OPT", 0.92), ("Llama", 0.95)):
        model = {"style": style, "hidden": 1024, "layers": 3, "r": 8, "dtype": "float32", "method": OURS}
        training, inference = model | {"quantity": TRAINING}, model | {"quantity": INFERENCE}
        decode, half = model | {"quantity": DECODE}, model | {"dtype": "bfloat16"}
        goals += [
            Goal(f"{style}: training step / LoRA's", step, "whole_model", "to_lora", training),
            Goal(f"{style}: training step, overhead / LoRA's", 0.5, "whole_model", "overhead_share", training),
            Goal(f"{style}: inference, overhead / LoRA's", 0.75, "whole_model", "overhead_share", inference),
            Goal(f"{style}: decode / LoRA's", 1.0, "whole_model", "to_lora", decode),
            Goal(f"{style}: decode, overhead / LoRA's", 1.0, "whole_model", "overhead_share", decode),
            Goal(f"{style}: training step / transcription's", 0.88, "whole_model", "to_transcription", training),
            Goal(f"{style}: peak memory of a step / LoRA's", 1.0, "memory", "peak_to_lora", model),
            Goal(f"{style}: peak memory of a step / LoRA's, bfloat16", 0.85, "memory", "peak_to_lora", half),
        ]
    small = {"hidden": 768, "layers": 1, "dtype": "bfloat16", "quantity": DECODE, "method": OURS}
    for style, r in (("OPT", 8), ("Llama", 64)):
        where = small | {"style": style, "r": r}
        goals.append(Goal(f"{style}: decode / LoRA's, bfloat16, r {r}", 1.05, "whole_model", "to_lora", where))
    layer = {"width": 1024, "r": 8, "quantity": TRAINING, "method": OURS}
    for tokens, limit in ((1, 1.15), (16, 1.05)):
        where = layer | {"tokens": tokens}
        goals.append(Goal(f"one layer trained, tokens: {tokens} / LoRA's", limit, "one_layer", "to_lora", where))
    up = {"quantity": UP, "method": OURS, "r": 8, "sparsity": 0.99}
    return [
        *goals,
        Goal("up-projection at 99 % sparsity / at 0 %, r 8", 0.45, "sparsity", "to_dense", up),
        Goal("import spikelora, more than import peft, ms", 50.0, "import_time", "milliseconds", {"what": DIFFERENCE}),
    ]


def _on_cuda() -> list[Goal]:
    goals = []
    for style, hidden in (("OPT", 1024), ("OPT", 2048), ("Llama", 2048), ("OPT", 4096), ("Llama", 4096)):
        model = {"style": style, "hidden": hidden, "r": 8, "dtype": "bfloat16", "method": OURS}
        training, name = model | {"quantity": TRAINING}, f"{style} {hidden}"
        inference, decode = model | {"quantity": INFERENCE}, model | {"quantity": DECODE}
        goals += [
            Goal(f"{name}: training step / LoRA's", 0.90, "whole_model", "to_lora", training),
            Goal(f"{name}: training step, overhead / LoRA's", 0.5, "whole_model", "overhead_share", training),
            Goal(f"{name}: inference / LoRA's", 0.95, "whole_model", "to_lora", inference),
            Goal(f"{name}: decode / LoRA's", 1.00, "whole_model", "to_lora", decode),
            Goal(f"{name}: peak memory of a step / LoRA's", 0.80, "memory", "peak_to_lora", model),
        ]
    return goals


def judge(goals: list[Goal], tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The goals for which these tables have a figure, each with figure, quartiles if any, and verdict."""
    rows = []
    for goal in goals:
        if goal.table not in tables:
            continue
        table = tables[goal.table]
        found = table[(table[list(goal.where)] == pd.Series(goal.where)).all(axis=1)]
        for row in found.to_dict("records"):
            rows.append({"table": goal.table, "goal": goal.text, "limit": goal.limit} | _verdict(goal, row))
    return pd.DataFrame(rows)


def _verdict(goal: Goal, row: dict[str, Any]) -> dict[str, Any]:
    measured = row[goal.column]
    lower, upper = (row.get(f"{goal.column}_{q}") for q in ("q25", "q75"))
    notes = []
    if goal.column == "overhead_share" and not row["lora_overhead_clear"]:
        notes.append("LoRA's overhead is within noise")
    if lower is not None and lower <= goal.limit < upper:
        notes.append("the limit is within the quartiles")
    verdict = "met" if measured <= goal.limit else "missed"
    return {"measured": measured, "q25": lower, "q75": upper, "verdict": verdict, "note": ", ".join(notes)}
