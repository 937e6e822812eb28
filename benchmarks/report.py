"""Tables of a run: as CSV files with machine and versions, and as tables to read."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import spikelora

from .events import break_even
from .models import BASE, LORA, METHODS, OURS
from .one_layer import PLAIN

LEFT = {"model", "dtype", "method", "goal", "", "note", "what", "what runs"}
CELL = ["style", "hidden", "layers", "r", "dtype", "batch", "length"]


def environment(device: torch.device) -> dict[str, object]:
    """Machine and versions; no name of a host or a user."""
    packages = {name: version(name) for name in ("torch", "peft", "transformers", "spikingjelly")}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **packages,
        "spikelora": spikelora.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(tables: dict[str, pd.DataFrame], goals: pd.DataFrame, machine: dict[str, object], folder: Path) -> None:
    """One CSV file per table. Goals judged by tables that are not in this run stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.assign(**machine).to_csv(folder / f"{name}.csv", index=False, float_format="%.9g")
    path = folder / "goals.csv"
    if goals.empty:
        return
    goals = goals.assign(**machine)
    if path.exists():
        before = pd.read_csv(path)
        goals = pd.concat([before[~before["table"].isin(tables)], goals])
    goals.to_csv(path, index=False, float_format="%.9g")


def show(tables: dict[str, pd.DataFrame], goals: pd.DataFrame, machine: dict[str, object], console: Console) -> None:
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), soft_wrap=True)
    _doubt(tables, machine, console)
    for name, table in tables.items():
        for title, lines in SHOWN[name](table).items():
            _print(console, title, lines)
    if not goals.empty:
        _print(console, "Goals, by the median", _goals(goals))


def _doubt(tables: dict[str, pd.DataFrame], machine: dict[str, object], console: Console) -> None:
    """Whole models keep all threads busy; if they did not, something else had the cores."""
    if "whole_model" not in tables or machine["device"] != _cpu_name():
        return
    busy = tables["whole_model"]["busy_cores"].median()
    if busy < 0.75 * torch.get_num_threads():
        console.print(f"Doubtful figures: {torch.get_num_threads()} threads had {busy:.1f} cores. What else runs here?")


def _print(console: Console, title: str, lines: pd.DataFrame) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in lines.columns:
        table.add_column(column, justify="left" if column in LEFT else "right", no_wrap=column != "note")
    for line in lines.itertuples(index=False):
        table.add_row(*map(str, line))
    console.print(table)


def _with_quartiles(row: pd.Series, name: str, scale: float = 1.0, digits: int = 2) -> str:
    middle, lower, upper = (f"{row[name + q] * scale:.{digits}f}" for q in ("", "_q25", "_q75"))
    return f"{middle} [{lower}, {upper}]"


def _side_by_side(table: pd.DataFrame, keys: list[str], methods: tuple[str, ...]) -> pd.DataFrame:
    """A line per cell and quantity: milliseconds of each method, then ratios of ours."""
    lines = []
    for values, group in table.groupby(keys, sort=False):
        rows = group.set_index("method")
        line = dict(zip(keys, values, strict=True))
        line |= {m: f"{rows.loc[m, 'seconds'] * 1e3:.4g}" for m in methods}
        ours = rows.loc[OURS]
        line |= {"/ LoRA": _with_quartiles(ours, "to_lora")}
        if "to_transcription" in ours:
            line |= {"/ transcription": _with_quartiles(ours, "to_transcription")}
        share = _with_quartiles(ours, "overhead_share")
        lines.append(line | {"overhead / LoRA's": share if ours["lora_overhead_clear"] else "LoRA's is noise"})
    return pd.DataFrame(lines)


def _whole_model(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    table = table.assign(
        model=table["style"] + " " + table["hidden"].astype(str) + "x" + table["layers"].astype(str),
        tokens=table["timed_tokens"],
    )
    return {
        f"Whole model, {quantity}: ms, and {OURS}'s ratios within a round; medians [quartiles]": _side_by_side(
            group, ["model", "r", "dtype", "tokens"], METHODS
        )
        for quantity, group in table.groupby("quantity", sort=False)
    }


def _memory(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    lines = []
    for values, group in table.groupby(CELL, sort=False):
        rows = group.set_index("method")
        line = dict(zip(CELL, values, strict=True))
        line |= {name: f"{rows.loc[name, 'peak_mb']:.1f}" if name in rows.index else "" for name in METHODS}
        ours = rows.loc[OURS]
        line |= {"/ LoRA": f"{ours['peak_to_lora']:.3f}", "/ LoRA, without weights": f"{ours['added_to_lora']:.3f}"}
        lines.append(line)
    title = f"Peak memory of a training step: MB that live, and {OURS}'s ratios"
    return {title: pd.DataFrame(lines).rename(columns={"style": "model"})}


def _one_layer(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {
        f"One linear layer, {quantity}: ms, and {OURS}'s ratios within a round; medians [quartiles]": _side_by_side(
            group, ["tokens", "width", "r"], (BASE, LORA, PLAIN, OURS)
        )
        for quantity, group in table.groupby("quantity", sort=False)
    }


def _sparsity(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    tables = {}
    for (quantity, tokens, width), group in table.groupby(["quantity", "tokens", "width"], sort=False):
        lines = pd.DataFrame(
            {
                "r": group["r"],
                "method": group["method"],
                "silent elements": group["sparsity"].map(lambda s: "" if pd.isna(s) else f"{s:.0%}"),
                "firing tokens": group["firing_tokens"].map(lambda s: "" if pd.isna(s) else f"{s:.1%}"),
                "microseconds": group.apply(_with_quartiles, axis=1, args=("seconds", 1e6, 0)),
                "/ at 0 %": group.apply(_with_quartiles, axis=1, args=("to_dense",)),
                "/ LoRA": group.apply(_with_quartiles, axis=1, args=("to_lora",)),
            }
        )
        tables[f"Cost against sparsity: {quantity}, {tokens} tokens, width {width}"] = lines
    return tables


def _events(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    keys = ["tokens", "width", "r", "elements"]
    lines = table[keys].assign(
        **{
            "firing tokens": table["firing_tokens"].map("{:.0%}".format),
            "dense, us": table["dense_seconds"].map(lambda s: f"{s * 1e6:.0f}"),
            "event-driven, us": table["event_driven_seconds"].map(lambda s: f"{s * 1e6:.0f}"),
            "event-driven / dense": table.apply(_with_quartiles, axis=1, args=("to_dense",)),
        }
    )
    even = []
    for values, group in table.groupby(["varied", *keys], sort=False):
        if (group["varied"] == "share").all():
            share = break_even(list(group["firing_tokens"]), list(group["to_dense"]))
            limit = f"{group['max_firing'].iloc[0]:.2f}"
            even.append(
                dict(zip(keys, values[1:], strict=True)) | {"break-even share": f"{share:.2f}", "_MAX_FIRING": limit}
            )
    few = f"Skipping silent tokens, each way forced (_MIN_ELEMENTS is {table['min_elements'].iloc[0]})"
    return {few: lines, "Share of firing tokens up to which skipping pays": pd.DataFrame(even)}


def _host(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    lines = []
    for values, group in table.groupby(["way", "kind", "dtype", "quantity"], sort=False):
        rows = group.set_index("method")
        line = dict(zip(("what runs", "training", "dtype", "what"), values, strict=True))
        for name in (BASE, LORA, OURS):
            line[name] = f"{rows.loc[name, 'launches']} / {rows.loc[name, 'seconds'] * 1e6:.0f}"
        lines.append(line | {"time / LoRA's": _with_quartiles(rows.loc[OURS], "to_lora")})
    return {"The host's part of one layer, one token: launches / microseconds": pd.DataFrame(lines)}


def _import_time(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    milliseconds = table.apply(_with_quartiles, axis=1, args=("milliseconds", 1.0, 0))
    return {"Import, fresh processes": pd.DataFrame({"what": table["what"], "ms": milliseconds})}


def _measured(goal: pd.Series) -> str:
    """The figure with enough digits for the verdict to be visible."""
    short = f"{goal['measured']:.4g}"
    return f"{goal['measured']:.10g}" if (float(short) <= goal["limit"]) != (goal["verdict"] == "met") else short


def _goals(goals: pd.DataFrame) -> pd.DataFrame:
    quartiles = goals.apply(lambda g: "" if pd.isna(g["q25"]) else f"[{g['q25']:.3g}, {g['q75']:.3g}]", axis=1)
    shown = {"goal": goals["goal"], "at most": goals["limit"].map("{:g}".format)}
    shown |= {"measured": goals.apply(_measured, axis=1), "quartiles": quartiles}
    return pd.DataFrame(shown | {"": goals["verdict"], "note": goals["note"]})


SHOWN = {
    "whole_model": _whole_model,
    "memory": _memory,
    "one_layer": _one_layer,
    "sparsity": _sparsity,
    "events": _events,
    "host": _host,
    "import_time": _import_time,
}
