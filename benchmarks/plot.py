"""Pictures of a run, one per table."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .models import BASE, LORA, OURS, TRANSCRIPTION
from .one_layer import PLAIN
from .sparsity import UP
from .whole_model import DECODE, INFERENCE, TRAINING

BARS = "medians of paired rounds, bars from quartile to quartile"
STYLES = {
    BASE: {"color": "0.55", "marker": "s"},
    TRANSCRIPTION: {"color": "tab:orange", "marker": "^"},
    PLAIN: {"color": "tab:orange", "marker": "^"},
    OURS: {"color": "tab:red", "marker": "o"},
}


def plot(tables: dict[str, pd.DataFrame], machine: dict[str, object], folder: Path) -> None:
    """Write `<table>.png` for each table that has a picture."""
    pictures = {"whole_model": _whole_model, "sparsity": _sparsity, "events": _events, "one_layer": _one_layer}
    for name in tables.keys() & pictures.keys():
        figure = pictures[name](tables)
        figure.supxlabel(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}", fontsize=8)
        figure.savefig(folder / f"{name}.png", dpi=120)


def _bars(rows: pd.DataFrame, column: str) -> list[pd.Series]:
    """Distances from the median to the quartiles."""
    return [rows[column] - rows[f"{column}_q25"], rows[f"{column}_q75"] - rows[column]]


def _like_lora(axes: Axes, vertical: bool) -> None:
    line = axes.axvline if vertical else axes.axhline
    line(1, color="tab:blue", linewidth=1, label=LORA)
    axes.grid(axis="x" if vertical else "both", alpha=0.3)


def _whole_model(tables: dict[str, pd.DataFrame]) -> Figure:
    times = tables["whole_model"].assign(cell=_cells(tables["whole_model"]))
    memory = tables["memory"].assign(cell=_cells(tables["memory"]))
    cells = list(dict.fromkeys([*times["cell"], *memory["cell"]]))
    figure = Figure(figsize=(15, 1.8 + 0.5 * len(cells)), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    methods = (BASE, TRANSCRIPTION, OURS)
    for panel, quantity in zip(panels, (TRAINING, INFERENCE, DECODE), strict=False):
        for method in methods:
            rows = times[(times["quantity"] == quantity) & (times["method"] == method)]
            at, bars = rows["cell"].map(cells.index), _bars(rows, "to_lora")
            panel.errorbar(rows["to_lora"], at, xerr=bars, linestyle="", capsize=2, label=method, **STYLES[method])
        panel.set(title=quantity, xlabel="time / LoRA's")
    for method in methods:
        rows = memory[memory["method"] == method]
        at = rows["cell"].map(cells.index)
        panels[-1].plot(rows["peak_to_lora"], at, linestyle="", label=method, **STYLES[method])
    panels[-1].set(title="peak memory of a training step", xlabel="bytes / LoRA's")
    for panel in panels:
        _like_lora(panel, vertical=True)
    panels[0].set_yticks(range(len(cells)), cells)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8)
    figure.suptitle(f"Whole models: {BARS}")
    return figure


def _cells(table: pd.DataFrame) -> pd.Series:
    """A name for each row's model and sizes."""

    def name(row: pd.Series) -> str:
        tokens = row["batch"] * row["length"]
        return f"{row['style']} {row['hidden']} x {row['layers']}, r {row['r']}\n{row['dtype']}, {tokens} tokens"

    return table.apply(name, axis=1)


def _sparsity(tables: dict[str, pd.DataFrame]) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, (quantity, group) in zip(panels, tables["sparsity"].groupby("quantity", sort=False), strict=True):
        for (r, rows), color in zip(group.groupby("r"), ("tab:red", "tab:purple"), strict=False):
            rows = rows[rows["method"] == OURS]
            bars, style = _bars(rows, "to_lora"), {"marker": "o", "capsize": 2, "color": color}
            panel.errorbar(rows["sparsity"] * 100, rows["to_lora"], yerr=bars, label=f"{OURS}, r {r}", **style)
        sizes = f"{group['tokens'].iloc[0]} tokens, width {group['width'].iloc[0]}"
        panel.set(title=f"{quantity}, {sizes}", xlabel="silent elements, %", ylabel="time / LoRA's")
        _like_lora(panel, vertical=False)
        if quantity == UP:
            panel.set_ylim(bottom=0)
        panel.legend(fontsize=8)
    figure.suptitle(f"Cost against sparsity: {BARS}")
    return figure


def _events(tables: dict[str, pd.DataFrame]) -> Figure:
    table = tables["events"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (tokens, width, r), rows in table[table["varied"] == "share"].groupby(["tokens", "width", "r"], sort=False):
        bars, label = _bars(rows, "to_dense"), f"{tokens} tokens, width {width}, r {r}"
        axes.errorbar(rows["firing_tokens"] * 100, rows["to_dense"], yerr=bars, marker="o", capsize=2, label=label)
    axes.axhline(1, color="black", linewidth=1)
    limit = table["max_firing"].iloc[0] * 100
    axes.axvline(limit, color="0.5", linestyle="--", label=f"silent tokens are skipped up to {limit:.0f} %")
    axes.set(
        xlabel="firing tokens, %", ylabel="time of the up-projection / dense", title=f"Skipping silent tokens: {BARS}"
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _one_layer(tables: dict[str, pd.DataFrame]) -> Figure:
    table = tables["one_layer"]
    middle = table[["tokens", "width", "r"]].mode().iloc[0].to_dict()
    figure = Figure(figsize=(14, 8), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True)
    for line, quantity in zip(panels, (TRAINING, INFERENCE), strict=True):
        for panel, varied in zip(line, middle, strict=True):
            fixed = {name: value for name, value in middle.items() if name != varied}
            rows = table[(table["quantity"] == quantity) & (table[list(fixed)] == pd.Series(fixed)).all(axis=1)]
            for method in (BASE, PLAIN, OURS):
                one = rows[rows["method"] == method].sort_values(varied)
                bars = _bars(one, "to_lora")
                panel.errorbar(one[varied], one["to_lora"], yerr=bars, capsize=2, label=method, **STYLES[method])
            _like_lora(panel, vertical=False)
            panel.set_xscale("log", base=2)
            panel.set(xlabel=varied, title=f"{quantity}; " + ", ".join(f"{n} {v}" for n, v in fixed.items()))
        line[0].set_ylabel("time / LoRA's")
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(f"One linear layer: {BARS}")
    return figure
