"""The report of a run as one HTML page that needs nothing else."""

import math
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from spikelora.report.adapter import Adapter, Run
from spikelora.report.figures import Grid, by_layer, plot_curves, shade
from spikelora.sparsity.meter import SPARSITY_FILE


def summary(adapter: Adapter) -> dict[str, str]:
    """What an adapter is, as labels and text."""
    config = adapter.config
    targets = config.target_modules
    untrained = sum(module.is_untrained for module in adapter.modules)
    return {
        "method": config.peft_type.value,
        "base model": config.base_model_name_or_path or "not recorded",
        "task": config.task_type or "not recorded",
        "rank r": _range(module.r for module in adapter.modules),
        "lora_alpha": f"{config.lora_alpha:g}" + (" and by pattern" if config.alpha_pattern else ""),
        "scaling": _range(module.scaling for module in adapter.modules) + (" (rsLoRA)" if config.use_rslora else ""),
        "target modules": targets if isinstance(targets, str) else ", ".join(sorted(targets or ())) or "not recorded",
        "modules": f"{len(adapter.modules)}" + (f", {untrained} of them untrained (B is 0)" if untrained else ""),
        "v_threshold": _range(m.v_threshold for m in adapter.modules)
        + (" (learned)" if config.learn_threshold else ""),
        "tau": _range(module.tau for module in adapter.modules) + (" (learned)" if config.learn_tau else ""),
        "parameters": f"{adapter.parameters:,}",
        "file": f"{adapter.n_bytes / 2**10:,.0f} KiB, {', '.join(adapter.dtypes)}",
    }


def results(run: Run) -> dict[str, str]:
    """The results of a run, as labels and text; without what its folder does not say."""
    found = {f"held-out loss, {label}": f"{loss:.4f}" for label, loss in run.losses.items()}
    if run.sparsity:
        found["sparsity"] = percent(run.sparsity.sparsity)
        if not math.isnan(run.sparsity.zero_threshold_sparsity):
            found["sparsity at threshold 0"] = percent(run.sparsity.zero_threshold_sparsity)
        silent = [name for name, sparsity in run.sparsity.modules.items() if sparsity == 1]
        found["modules that never fire"] = f"{len(silent)} of {len(run.sparsity.modules)}"
        if run.sparsity.firing_rates:
            dead = sum(rate == 0 for rates in run.sparsity.firing_rates.values() for rate in rates)
            found["ranks that never fire"] = f"{dead} of {sum(map(len, run.sparsity.firing_rates.values()))}"
    return found


def write_report(run: Run, output: Path) -> None:
    """Write the report of a run as one HTML file; a file that was there is replaced when the new one is whole."""
    page = render(run)
    partial = output.with_name(f".{output.name}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def render(run: Run) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(shade=shade, percent=percent)
    template = environment.from_string(
        files("spikelora.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    adapter, sparsity = run.adapter, run.sparsity
    rates = sparsity.firing_rates if sparsity else {}
    return template.render(
        name=adapter.folder.resolve().name,
        summary=summary(adapter),
        results=results(run),
        adapter=adapter,
        sparsity=sparsity,
        grid=by_layer(sparsity.modules) if sparsity and sparsity.modules else None,
        ranks=max(map(len, rates.values()), default=0),
        figures=_training_figures(run),
        log=_log(run),
        sparsity_file=SPARSITY_FILE,
        thresholds=_threshold_figure(adapter),
        settings=run.settings,
    )


def percent(share: float) -> str:
    """A share for a cell of a table; 0 and 100 % only if it is exactly that."""
    if math.isnan(share):
        return "not run"
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def _range(values: Any) -> str:
    numbers = list(values)
    lowest, highest = min(numbers), max(numbers)
    return f"{lowest:.4g}" if lowest == highest else f"{lowest:.4g} to {highest:.4g}"


def _training_figures(run: Run) -> list[dict[str, str]]:
    """SVG and caption of what was logged; if there is nothing, a text that says what is missing."""
    figures = []
    for name, title, curves, what, remedy in (
        (
            "loss",
            "Loss",
            run.curves("loss"),
            "Loss in training and, as eval_loss, on held-out data.",
            "the Trainer logs",
        ),
        (
            "sparsity",
            "Sparsity",
            run.curves("sparsity"),
            "Share of silent activations over all modules, and what it would be at v_threshold = 0, which is mere "
            "rectification.",
            "a SparsityCallback logs",
        ),
        (
            "kinds",
            "Sparsity by kind of module",
            run.curves_by_kind(),
            "Share of silent activations in training, over all modules of a kind.",
            "a SparsityCallback logs",
        ),
    ):
        y_label = "loss" if name == "loss" else "sparsity"
        svg = plot_curves(name, curves, "step", y_label) if curves else ""
        missing = f"This folder has no such curve: no trainer_state.json in it holds what {remedy}."
        figures.append({"title": title, "svg": svg, "caption": what, "missing": missing})
    return figures


def _log(run: Run) -> dict[str, dict[int, float]]:
    """The numbers behind the curves, by name and step."""
    curves = run.curves("loss") | run.curves("sparsity")
    return {name: dict(points) for name, points in curves.items()}


def _threshold_figure(adapter: Adapter) -> str:
    """Thresholds by layer, a curve for each kind; empty if all are the same."""
    values = {module.name: module.v_threshold for module in adapter.modules}
    if len(set(values.values())) == 1:
        return ""
    grid: Grid = by_layer(values)
    curves = {
        kind: [(x, grid.values[row, kind]) for x, row in enumerate(grid.rows) if (row, kind) in grid.values]
        for kind in grid.columns
    }
    return plot_curves("thresholds", curves, "layer", "v_threshold", ticks=grid.rows)
