"""Pictures of a study, made from the lines of results alone."""

import math
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .paired import Difference, summary
from .store import Store
from .study import Cell, Study
from .tables import Lines, difference_to, figure, modules_of, of_cell, pairs_of, title_of
from .tasks import TASKS

_PANELS_IN_A_ROW = 6


def figures(study: Study, store: Store) -> dict[str, Figure]:
    """The pictures that a study asks for and has results for so far, by their file names."""
    lines = store.done(study.runs)
    made = {f"{study.name}-{kind}.png": _PICTURES[kind](study, lines) for kind in study.show if lines}
    return {name: picture for name, picture in made.items() if picture}


def plot(study: Study, store: Store, folder: Path) -> list[Path]:
    """Write the pictures of a study; returns their paths."""
    written = []
    for name, picture in figures(study, store).items():
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / name)
        # Without the date and the version of matplotlib, which would change the file.
        picture.savefig(written[-1], dpi=110, metadata={"Software": None})
    return written


def _swept(study: Study) -> str | None:
    """The numeric field that takes most values over the runs, other than the seed."""
    values: dict[str, set] = {}
    for run in study.runs:
        for name, value in run.config().items():
            if name != "seed" and isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(name, set()).add(value)
    swept = max(values, key=lambda name: len(values[name]))
    return swept if len(values[swept]) > 1 else None


def _sweep(study: Study, lines: Lines) -> Figure | None:
    """The first metric and the sparsity over the swept field, a line for each method; level for one without the
    field."""
    swept = _swept(study)
    if swept is None:
        return None
    made = Figure(figsize=(11, 4), layout="constrained")
    names = list(
        dict.fromkeys([study.compared(study.cells[0]), TASKS[study.runs[0].task].metrics[0], "sparsity", "loss"])
    )
    panels = made.subplots(1, len(names))
    for name, panel in zip(names, panels, strict=True):
        for n, (series, cells) in enumerate(_series(study, swept).items()):  # the same colour in all panels
            at = [(_value(cell, swept), _stats(cell, lines, name, study.part)) for cell in cells]
            at = [(x, s) for x, s in at if s is not None and not math.isnan(s.mean)]
            points = sorted(((x, s) for x, s in at if x is not None), key=lambda pair: pair[0])
            if points:
                xs, ss = zip(*points, strict=True)
                sd = [0 if math.isnan(s.sd) else s.sd for s in ss]
                style = {"marker": "o", "markersize": 4, "capsize": 2, "color": f"C{n}"}
                panel.errorbar(xs, [s.mean for s in ss], sd, label=series, **style)
            for _, level in (pair for pair in at if pair[0] is None):
                colour, label = (f"C{n}", f"{series} by default") if points else ("0.4", series)
                panel.axhline(level.mean, linestyle="--", color=colour, label=label)
        panel.set(xlabel=swept, title="held-out loss" if name == "loss" else name)
        panel.grid(alpha=0.3)
        if swept in ("learning_rate", "r", "train_rows"):
            panel.set_xscale("log", base=2 if swept == "r" else 10)
    panels[0].legend(fontsize=8)
    made.suptitle(f"{study.title}: means and standard deviations over seeds")
    return made


def _series(study: Study, swept: str) -> dict[str, list[Cell]]:
    """Groups of cells that differ only in the swept field."""
    found: dict[str, list[Cell]] = {}
    for cell in study.cells:
        where = [f"{name}={value}" for name, value in cell.point if name != swept]
        label = re.sub(rf" {swept}=\S+", "", cell.label)
        found.setdefault(" ".join([label, *where]), []).append(cell)
    return found


def _value(cell: Cell, swept: str) -> float | None:
    return cell.runs[0].config().get(swept)


def _stats(cell: Cell, lines: Lines, name: str, part: str) -> Any:
    found = of_cell(cell, lines)
    return summary([figure(line, name, part) for line in found.values()]) if found else None


def _modules(study: Study, lines: Lines) -> Figure | None:
    """Heat maps of the sparsity, layers by kinds of module, a mean over seeds."""
    grids = {}
    for cell in study.cells:
        shares: dict[tuple[str, str], list[float]] = {}
        for module in modules_of(cell, lines):
            shares.setdefault((module["layer"], module["kind"]), []).append(module["sparsity"])
        if shares:
            grids[", ".join([cell.label, *(f"{n} {v}" for n, v in cell.point)])] = shares
    if not grids:
        return None
    columns = min(len(grids), _PANELS_IN_A_ROW)
    rows = math.ceil(len(grids) / columns)
    made = Figure(figsize=(1 + 3.2 * columns, 4 * rows), layout="constrained")
    panels = made.subplots(rows, columns, squeeze=False)
    for empty in panels.flat[len(grids) :]:
        empty.set_visible(False)
    for panel, (title, shares) in zip(panels.flat, grids.items(), strict=False):
        layers = sorted({layer for layer, _ in shares}, key=lambda layer: (len(layer), layer))  # 2 before 10
        kinds = list(dict.fromkeys(kind for _, kind in shares))
        grid = [[np.mean(shares.get((layer, kind), [math.nan])) for kind in kinds] for layer in layers]
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set_xticks(range(len(kinds)), kinds, rotation=90, fontsize=7)
        panel.set_yticks(range(len(layers)), [layer.rpartition(".")[2] or "none" for layer in layers], fontsize=7)
        panel.set_title(textwrap.fill(title, 34), fontsize=8)
    for row in panels:
        row[0].set_ylabel("layer")
    made.colorbar(image, ax=panels, label="share of silent activations")
    made.suptitle(study.title)
    return made


def _gradients(study: Study, lines: Lines) -> Figure | None:
    """Norms of the modules' gradients under each method against those under LoRA, in the first pair."""
    made = Figure(figsize=(9, 4.2), layout="constrained")
    panels = made.subplots(1, 2)
    for part, panel in zip("AB", panels, strict=True):
        for cell in [cell for cell in study.cells if not cell.is_baseline]:
            pair = next(iter(pairs_of(cell, study, lines).values()), None)
            if pair is None:
                continue
            y, x = (line["result"]["gradient_norms"][part]["by_module"] for line in pair)
            shared = [name for name in x if x[name] > 0 and y.get(name, 0) > 0]
            panel.plot([x[n] for n in shared], [y[n] for n in shared], ".", label=cell.label)
        panel.set(title=f"gradient of {part}", xlabel="LoRA", ylabel="the other method", xscale="log", yscale="log")
        if not panel.lines:
            return None
        limits = [min(panel.get_xlim()[0], panel.get_ylim()[0]), max(panel.get_xlim()[1], panel.get_ylim()[1])]
        panel.plot(limits, limits, color="0.6", linewidth=1)
    panels[0].legend(fontsize=7)
    made.suptitle(study.title)
    return made


def _history(study: Study, lines: Lines) -> Figure | None:
    """Held-out loss and loss in training, epoch by epoch, means over seeds."""
    made = Figure(figsize=(9, 4), layout="constrained")
    panels = made.subplots(1, 2, sharex=True)
    for cell in study.cells:
        histories = [line["result"]["history"] for line in of_cell(cell, lines).values()]
        if not histories:
            continue
        label = ", ".join([cell.label, *(f"{n} {v}" for n, v in cell.point)])
        for name, panel in zip(("train_loss", "loss"), panels, strict=True):
            means = np.mean([[epoch[name] for epoch in history] for history in histories], 0)
            panel.plot(range(1, len(means) + 1), means, marker=".", label=label)
    for title, panel in zip(("loss in training", "held-out loss"), panels, strict=True):
        panel.set(title=title, xlabel="epoch")
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=7)
    made.suptitle(study.title)
    return made


def _frontier(study: Study, lines: Lines) -> Figure | None:
    """The loss compared with LoRA over the sparsity: a line for cells that differ only by threshold or target."""
    name = study.compared(study.cells[0])
    made = Figure(figsize=(8, 4.5), layout="constrained")
    panel = made.subplots()
    panel.axhline(0, color="0.3", linewidth=1, label="lora")
    recipes: dict[str, list[tuple[float, Difference]]] = {}
    for cell in study.cells:
        lost = difference_to(cell, study, lines, "lora")
        sparsity = _stats(cell, lines, "sparsity", study.part)
        if lost and not math.isnan(sparsity.mean):
            label = re.sub(r" (v_threshold|target_sparsity)=\S+", "", cell.label)
            recipes.setdefault(label, []).append((sparsity.mean, lost))
        elif lost:
            panel.axhline(lost.mean, color="0.6", linewidth=1, linestyle="--", label=cell.label)
    if not recipes:
        return None
    for label, points in recipes.items():
        xs, lost = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        spread = [0 if math.isnan(d.low) else d.mean - d.low for d in lost]
        panel.errorbar(xs, [d.mean for d in lost], spread, marker="o", markersize=4, capsize=2, label=label)
    panel.set(xlabel="share of silent activations", ylabel=f"{title_of(name, study.part)}, difference to LoRA")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    made.suptitle(f"{study.title}: means and 95 % intervals of differences paired by seed", fontsize=10)
    return made


_PICTURES = {"sweep": _sweep, "modules": _modules, "gradients": _gradients, "history": _history, "frontier": _frontier}
