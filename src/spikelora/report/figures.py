"""The figures of a report: grids by layer and kind of module, and curves as SVG that follows the page's colours."""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from spikelora.report.adapter import natural
from spikelora.sparsity.meter import places

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Placeholder for the colour of the page's text, for which matplotlib has no name.
_TEXT = "#010203"
_FAINT = "#010204"
# Each has a contrast of 3 or more with the light and the dark page.
_COLOURS = ("#3b8ed0", "#d9702b", "#3a9a49", "#b565c9", "#b08900", "#d64550")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", ":", "-.")
_MARKED = 24  # points of a curve that get a shape
_DPI = 72  # an SVG's unit is then a point

Curves = Mapping[tuple[str, str], Sequence[tuple[float, float]]]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Grid(Generic[Value]):
    """Values of modules, laid out by layer and by the module's place in it.

    Attributes:
        rows: labels of the layers, in order.
        columns: labels of the modules in a layer, in order.
        values: by row and column; a place without a module has no value.
        names: full names of the modules, by row and column.
    """

    rows: list[str]
    columns: list[str]
    values: dict[tuple[str, str], Value]
    names: dict[tuple[str, str], str]


def by_layer(values: Mapping[str, Value]) -> Grid[Value]:
    """Lay out values of modules by layer and kind; kinds that a layer has twice get their full name."""
    where = places(sorted(values, key=natural))
    counted = Counter(where.values())
    twice = {kind for (_, kind), count in counted.items() if count > 1}
    stacks = {layer.rpartition(".")[0] for layer, _ in where.values() if layer}

    def row(layer: str) -> str:
        if not layer:
            return "outside the layers"
        return layer.rpartition(".")[2] if len(stacks) == 1 else layer

    names = {
        (row(layer), name[len(layer) :].lstrip(".") if kind in twice else kind): name
        for name, (layer, kind) in where.items()
    }
    cells = {place: values[name] for place, name in names.items()}
    return Grid(list(dict.fromkeys(r for r, _ in cells)), list(dict.fromkeys(c for _, c in cells)), cells, names)


def shade(share: float) -> str:
    """CSS of a table cell for a share between 0 and 1: viridis, with text that can be read on it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colour = colormaps["viridis"](share)
    red, green, blue = (channel**2.2 for channel in colour[:3])  # about linear light
    is_light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18  # black has the higher contrast from there
    return f"background:{to_hex(colour)};color:{'#000' if is_light else '#fff'}"


def percent(share: float) -> str:
    """A share for a cell of a table; 0 and 100 % only where it is exactly that."""
    if math.isnan(share):
        return "not run"
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def whole_percent(share: float) -> str:
    """A share for a narrow cell, as whole percent; 0 and 100 only where it is exactly that."""
    if 0 < share < 0.005:
        return "<1"
    return ">99" if 0.995 <= share < 1 else f"{100 * share:.0f}"


def plot_curves(
    name: str, curves: Curves, x_label: str, y_label: str, ticks: list[str] | None = None, runs: Sequence[str] = ()
) -> str:
    """An SVG of curves, each marked by a colour and a shape, with the numbers of `data-curves` for the page's script.

    Args:
        name: prefix of the ids in it, unlike that of the other figures on the page.
        curves: by label and run, points `(x, y)`.
        x_label: what x is.
        y_label: what y is.
        ticks: labels of x = 0, 1, 2, ...; by default its numbers.
        runs: all runs of the page, where it has several: a colour then stands for a run, and else for a label.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    labels = list(dict.fromkeys(label for label, _ in curves))
    drawn: list[dict[str, Any]] = []
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT)
    # Text stays text: it can be searched, and takes the page's font; a dollar in a folder's name is no formula.
    style: Any = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        "grid.color": _FAINT,
        **colours,
    }
    with matplotlib.rc_context(style):
        longest = max(len(label) + (len(run) if runs else 0) for label, run in curves)
        columns = max(1, min(4, 80 // (longest + 10)))  # about 80 letters fit in the width, with line samples
        figure = Figure(figsize=(7.2, 3.6 + 0.2 * (len(curves) // columns)), dpi=_DPI, layout="constrained")
        axes = figure.subplots()
        for (label, run), points in curves.items():
            shape = labels.index(label)
            colour = _COLOURS[(runs.index(run) if runs else shape) % len(_COLOURS)]
            text = f"{label}, {run}" if runs else label
            every = -(-len(points) // _MARKED)
            axes.plot(
                *zip(*points, strict=True),
                label=text,
                gid=f"curve-{len(drawn)}",
                color=colour,
                linestyle=_LINES[shape % len(_LINES)] if runs else "-",
                linewidth=1.6,
                marker=_MARKERS[shape % len(_MARKERS)],
                markersize=4,
                markevery=every,
            )
            numbers = [(x, float(f"{y:.5g}") if math.isfinite(y) else None) for x, y in points]
            drawn.append({"label": text, "run": run, "colour": colour, "every": every, "points": numbers})
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label, labelpad=14)  # room for the longer numbers of a part of the figure
        if ticks is None:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            step = -(-len(ticks) // 16)
            axes.set_xticks(range(0, len(ticks), step), ticks[::step])
        axes.grid(linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        legend = figure.legend(loc="outside lower center", frameon=False, ncols=columns)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    # Where the figure was laid out: in points from the lower left, as the SVG has them from the upper left.
    (left, low), (right, high) = axes.bbox.get_points()
    (zero_x, zero_y), (one_x, one_y) = axes.transData.transform([(0, 0), (1, 1)])
    height = figure.bbox.height
    data = {
        "height": height - legend.get_window_extent().y1,  # without the legend, of which the script makes buttons
        "box": [left, height - high, right, height - low],
        "x": [zero_x, one_x - zero_x],
        "y": [height - zero_y, zero_y - one_y],
        "x_label": x_label,
        "ticks": ticks,
        "curves": drawn,
    }
    return _inline(
        file.getvalue(), name, f"{y_label} by {x_label}: {_in_words(drawn)}", json.dumps(data, separators=(",", ":"))
    )


def plot_grid(grid: Grid[float]) -> "Figure":
    """A picture of the sparsity by layer and kind of module, as the report's page has it."""
    from matplotlib.figure import Figure

    shares = [[grid.values.get((row, column), math.nan) for column in grid.columns] for row in grid.rows]
    figure = Figure(figsize=(1.5 + 0.9 * len(grid.columns), 1.5 + 0.45 * len(grid.rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(grid.columns)), grid.columns, rotation=30, ha="right")
    axes.set_yticks(range(len(grid.rows)), grid.rows)
    axes.set(ylabel="layer", title="Sparsity by layer and kind of module")
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            if not math.isnan(value):
                colour = shade(value).rpartition(":")[2]
                axes.text(column, row, percent(value), ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="share of silent activations")
    return figure


def _inline(svg: str, name: str, label: str, data: str) -> str:
    """Matplotlib's SVG file as an element of a page: without prologue, with own ids, the page's colours and a label."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace(_TEXT, "currentColor").replace(_FAINT, "var(--line)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}" data-curves="{escape(data)}"', 1)


def _in_words(drawn: list[dict[str, Any]]) -> str:
    numbers = {curve["label"]: [y for _, y in curve["points"] if y is not None] for curve in drawn}
    return "; ".join(f"{label} from {ys[0]:.4g} to {ys[-1]:.4g}" for label, ys in numbers.items() if ys)
