"""The report of a run, beside others or alone, as one HTML page that needs nothing else."""

import math
import os
import re
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from spikelora.peft.config import SpikeLoraConfig
from spikelora.report.adapter import Adapter
from spikelora.report.figures import Curves, by_layer, percent, plot_curves, shade, whole_percent
from spikelora.report.run import Run
from spikelora.sparsity.meter import SPARSITY_FILE

REFRESH = 5  # seconds after which a page of a run that goes on loads itself again


def summary(adapter: Adapter) -> dict[str, str]:
    """What an adapter is, as labels and text."""
    config = adapter.config
    targets = config.target_modules
    untrained = sum(module.is_untrained for module in adapter.modules)
    neuron = {}
    if isinstance(config, SpikeLoraConfig):
        neuron["v_threshold"] = _range(m.v_threshold for m in adapter.modules)
        neuron["v_threshold"] += " (learned)" if config.learn_threshold else ""
        neuron["tau"] = _range(m.tau for m in adapter.modules) + (" (learned)" if config.learn_tau else "")
    return {
        "method": config.peft_type.value,
        "base model": config.base_model_name_or_path or "not recorded",
        "task": config.task_type or "not recorded",
        "rank r": _range(module.r for module in adapter.modules),
        "lora_alpha": f"{config.lora_alpha:g}" + (" and by pattern" if config.alpha_pattern else ""),
        "scaling": _range(module.scaling for module in adapter.modules) + (" (rsLoRA)" if config.use_rslora else ""),
        "target modules": targets if isinstance(targets, str) else ", ".join(sorted(targets or ())) or "not recorded",
        "modules": f"{len(adapter.modules)}" + (f", {untrained} of them untrained (B is 0)" if untrained else ""),
        **neuron,
        "parameters": f"{adapter.parameters:,}",
        "file": f"{adapter.n_bytes / 2**10:,.0f} KiB, {', '.join(adapter.dtypes)}",
    }


def results(run: Run) -> dict[str, str]:
    """The results of a run, as labels and text; without what its folder does not say."""
    found = {f"held-out loss, {label}": f"{loss:.4f}" for label, loss in run.losses.items()}
    done, planned = run.steps
    if done:
        found["step"] = f"{done:,}" + (f" of {planned:,}" if planned else "")
    found |= {f"{name}, last logged": f"{points[-1][1]:.4f}" for name, points in run.curves("loss").items()}
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


def write_report(runs: Sequence[Run], output: Path, watching: bool = False) -> None:
    """Write the report of runs as one HTML file; a file that was there is replaced when the new one is whole.

    Args:
        runs: the run, and those beside which it is shown.
        output: the file.
        watching: whether the page is to load itself again every `REFRESH` seconds.
    """
    page = render(runs, watching)
    partial = output.with_name(f".{output.name}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def render(runs: Sequence[Run], watching: bool = False) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(shade=shade, percent=percent, whole_percent=whole_percent)
    source = files("spikelora.report")
    template = environment.from_string(source.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    script = source.joinpath("report.js").read_text(encoding="utf-8")
    names = run_names(runs)
    named = dict(zip(names, runs, strict=True))
    return template.render(
        names=names,
        refresh=REFRESH if watching else 0,
        script=script,
        # The browser runs the script of this hash, and no other that a file of a stranger may have brought in.
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        summary=side_by_side(summary(run.adapter) if run.adapter else {} for run in runs),
        results=side_by_side(map(results, runs)),
        sparsities=[_sparsity(name, run) for name, run in named.items() if run.sparsity],
        sparsity_file=SPARSITY_FILE,
        figures=_training_figures(named),
        log=_log(named),
        thresholds=[
            {"name": name, "modules": run.adapter.modules, "svg": _threshold_figure(number, run.adapter)}
            for number, (name, run) in enumerate(named.items())
            if run.adapter and isinstance(run.adapter.config, SpikeLoraConfig)
        ],
        settings={name: run.settings for name, run in named.items() if run.settings},
        differing=differing([run.settings for run in runs if run.settings]),
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """The names of the runs' folders; where two have the same, with the folders above that tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    lengths = range(1, max(map(len, parts)) + 1)
    tried = ([os.path.join(*path[-n:]) for path in parts] for n in lengths)
    return next((names for names in tried if len({*names}) == len(names)), [str(n) for n in range(1, len(runs) + 1)])


def side_by_side(facts: Any) -> dict[str, list[str]]:
    """By label, the text of each run; empty where a run has none."""
    columns = list(facts)
    labels = dict.fromkeys(label for column in columns for label in column)
    return {label: [column.get(label, "") for column in columns] for label in labels}


def differing(settings: Sequence[str]) -> dict[str, list[str]]:
    """The settings in which runs differ, of those that have a line of their own; empty for a single run."""
    columns = [dict(re.findall(r"^([\w.-]+):[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE)) for text in settings]
    return {label: values for label, values in side_by_side(columns).items() if len({*values}) > 1}


def _range(values: Any) -> str:
    numbers = list(values)
    lowest, highest = min(numbers), max(numbers)
    return f"{lowest:.4g}" if lowest == highest else f"{lowest:.4g} to {highest:.4g}"


def _sparsity(name: str, run: Run) -> dict[str, Any]:
    """What a file says of a run's sparsity, laid out by layer, and the firing rates of each kind of module."""
    sparsity: Any = run.sparsity
    rates = by_layer(sparsity.firing_rates)
    kinds = {
        kind: [(row, rates.names[row, kind], rates.values[row, kind]) for row, of in rates.names if of == kind]
        for kind in rates.columns
    }
    return {"name": name, "source": sparsity.source, "grid": by_layer(sparsity.modules), "kinds": kinds}


def _training_figures(runs: dict[str, Run]) -> list[dict[str, str]]:
    """What was logged: the curves of all runs in one figure, those by kind of module in one for each run."""
    several = tuple(runs) if len(runs) > 1 else ()
    rectified = "" if several else ", and what it would be at v_threshold = 0, which is mere rectification"
    what = f"Share of silent activations over all modules{rectified}."
    held_out = "Loss in training and, as eval_loss, on held-out data."
    callback = "a SparsityCallback"
    figures = [
        _figure("loss", "Loss", _curves(runs, "loss"), "loss", held_out, "the Trainer", several),
        _figure("sparsity", "Sparsity", _curves(runs, "sparsity"), "sparsity", what, callback, several),
    ]
    what = "Share of silent activations in training, over all modules of a kind."
    for number, (name, run) in enumerate(runs.items()):
        curves = {(kind, name): points for kind, points in run.curves_by_kind().items()}
        title = "Sparsity by kind of module" + (f", {name}" if several else "")
        if curves or not several:
            figures.append(_figure(f"kinds-{number}", title, curves, "sparsity", what, callback))
    return figures


def _figure(
    name: str, title: str, curves: Curves, y_label: str, caption: str, logs: str, runs: tuple[str, ...] = ()
) -> dict[str, str]:
    """SVG and caption, or text that says what is missing in place of an SVG."""
    svg = plot_curves(name, curves, "step", y_label, runs=runs) if curves else ""
    missing = f"This folder has no such curve: no trainer_state.json in it holds what {logs} logs."
    return {"title": title, "svg": svg, "caption": caption, "missing": missing}


def _curves(runs: dict[str, Run], name: str) -> Curves:
    """The curves of all runs by label and run; of several without those at a threshold of 0, to tell the rest apart."""
    return {
        (label, of): points
        for of, run in runs.items()
        for label, points in run.curves(name).items()
        if len(runs) == 1 or "zero_threshold" not in label
    }


def _log(runs: dict[str, Run]) -> dict[str, dict[float, float]]:
    """The numbers behind the curves, by name and step."""
    curves = {**_curves(runs, "loss"), **_curves(runs, "sparsity")}
    return {f"{label}, {of}" if len(runs) > 1 else label: dict(points) for (label, of), points in curves.items()}


def _threshold_figure(number: int, adapter: Adapter) -> str:
    """Thresholds by layer, a curve for each kind; empty where all are the same."""
    values = {module.name: module.v_threshold for module in adapter.modules}
    if len(set(values.values())) == 1:
        return ""
    grid = by_layer(values)
    curves = {
        (kind, ""): [(x, grid.values[row, kind]) for x, row in enumerate(grid.rows) if (row, kind) in grid.values]
        for kind in grid.columns
    }
    return plot_curves(f"thresholds-{number}", curves, "layer", "v_threshold", ticks=grid.rows)
