"""The figures of a report: grids by layer and kind of module, and curves as SVG that follows the page's colours."""

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any

from spikelora.report.adapter import natural
from spikelora.sparsity.meter import places

# Placeholder for the colour of the page's text, for which matplotlib has no name.
_TEXT = "#010203"
_FAINT = "#010204"
# Each has a contrast of 3 or more with the light and the dark page.
_COLOURS = ("#3b8ed0", "#d9702b", "#3a9a49", "#b565c9", "#b08900", "#d64550")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Curves = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Grid:
    """Values of modules, laid out by layer and by the module's place in it.

    Attributes:
        rows: labels of the layers, in order.
        columns: labels of the modules in a layer, in order.
        values: by row and column; a place without a module has no value.
    """

    rows: list[str]
    columns: list[str]
    values: dict[tuple[str, str], float]


def by_layer(values: Mapping[str, float]) -> Grid:
    """Lay out values of modules by layer and kind; kinds that a layer has twice get their full name."""
    where = places(sorted(values, key=natural))
    counted = Counter(where.values())
    twice = {kind for (_, kind), count in counted.items() if count > 1}
    stacks = {layer.rpartition(".")[0] for layer, _ in where.values() if layer}

    def row(layer: str) -> str:
        if not layer:
            return "outside the layers"
        return layer.rpartition(".")[2] if len(stacks) == 1 else layer

    cells = {
        (row(layer), name[len(layer) :].lstrip(".") if kind in twice else kind): values[name]
        for name, (layer, kind) in where.items()
    }
    return Grid(list(dict.fromkeys(r for r, _ in cells)), list(dict.fromkeys(c for _, c in cells)), cells)


def shade(share: float) -> str:
    """CSS of a table cell for a share between 0 and 1: viridis, with text that can be read on it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colour = colormaps["viridis"](share)
    red, green, blue = (channel**2.2 for channel in colour[:3])  # about linear light
    is_light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18  # black has the higher contrast from there
    return f"background:{to_hex(colour)};color:{'#000' if is_light else '#fff'}"


def plot_curves(name: str, curves: Curves, x_label: str, y_label: str, ticks: list[str] | None = None) -> str:
    """An SVG of curves, each marked by a colour and a shape.

    Args:
        name: prefix of the ids in it, unlike that of the other figures on the page.
        curves: by label, points `(x, y)`.
        x_label: what x is.
        y_label: what y is.
        ticks: labels of x = 0, 1, 2, ...; by default its numbers.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT)
    # Text stays text: it can be searched, and takes the page's font.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "grid.color": _FAINT, **colours}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.subplots()
        for (label, points), colour, marker in zip(curves.items(), cycle(_COLOURS), cycle(_MARKERS)):
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, label=label, color=colour, marker=marker, markersize=4, linewidth=1.6)
        axes.set(xlabel=x_label, ylabel=y_label)
        if ticks is None:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            step = -(-len(ticks) // 16)
            axes.set_xticks(range(0, len(ticks), step), ticks[::step])
        axes.grid(linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        columns = 80 // (max(map(len, curves)) + 8)  # about 80 letters fit in the width, line samples among them
        figure.legend(loc="outside lower center", frameon=False, ncols=max(1, min(4, columns)))
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _inline(file.getvalue(), name, f"{y_label} by {x_label}: {_in_words(curves)}")


def _inline(svg: str, name: str, label: str) -> str:
    """Matplotlib's SVG file as an element of a page: without prologue, with own ids, the page's colours and a label."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace(_TEXT, "currentColor").replace(_FAINT, "var(--line)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _in_words(curves: Curves) -> str:
    return "; ".join(f"{label} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for label, points in curves.items())
