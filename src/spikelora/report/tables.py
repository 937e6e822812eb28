"""The tables that the command prints."""

from collections.abc import Iterator, Mapping, Sequence

from rich.rule import Rule
from rich.table import Table

from spikelora.report.adapter import Adapter
from spikelora.report.figures import by_layer, percent
from spikelora.report.html import results, run_names, side_by_side, summary
from spikelora.report.run import MeasuredSparsity, Run


def facts_table(title: str, facts: Mapping[str, Sequence[str]], names: Sequence[str] = ("",)) -> Table:
    """Labels and, by column, the text of each of what is named."""
    table = Table(title=title, show_header=len(names) > 1)
    table.add_column(style="bold", no_wrap=True)
    for name in names:
        table.add_column(name, overflow="fold")
    for label, values in facts.items():
        table.add_row(label, *values)
    return table


def modules_table(adapter: Adapter) -> Table:
    """One row per adapted module."""
    table = _table("Modules", "module", "r", "v_threshold", "tau", "norm of A", "norm of B")
    for module in adapter.modules:
        norm_b = "0, untrained" if module.is_untrained else f"{module.norm_B:.4g}"
        numbers = (f"{value:.4g}" for value in (module.r, module.v_threshold, module.tau, module.norm_A))
        table.add_row(module.name, *numbers, norm_b)
    return table


def run_tables(runs: Sequence[Run]) -> Iterator[Table | Rule | str]:
    """What a run's folder says, beside others or alone; a line in place of each table that it has nothing for."""
    names = run_names(runs)
    facts = ((summary(run.adapter) if run.adapter else {}) | results(run) for run in runs)
    yield facts_table(", ".join(str(run.folder) for run in runs), side_by_side(facts), names)
    for name, run in zip(names, runs, strict=True):
        if len(runs) > 1:
            yield Rule(name)
        yield _sparsity_table(run.sparsity) if run.sparsity else "This folder has no sparsity by module."
        curves = run.curves("loss") | run.curves("sparsity")
        yield _training_table(curves) if curves else "This folder has no log of the training."


def _sparsity_table(sparsity: MeasuredSparsity) -> Table:
    """Layers by kinds of module."""
    grid = by_layer(sparsity.modules)
    table = _table(f"Sparsity, from {sparsity.source}", "layer", *grid.columns)
    for row in grid.rows:
        cells = (grid.values.get((row, column)) for column in grid.columns)
        table.add_row(row, *("" if value is None else percent(value) for value in cells))
    return table


def _training_table(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Table:
    """First and last value of what was logged."""
    table = _table("Training", "", "first", "at step", "last", "at step")
    for label, points in curves.items():
        (first_step, first), (last_step, last) = points[0], points[-1]
        table.add_row(label, f"{first:.4f}", str(first_step), f"{last:.4f}", str(last_step))
    return table


def numbers_table(title: str, values: Mapping[str, float], heading: str) -> Table:
    """A number for each module."""
    table = _table(title, "module", heading)
    for name, value in values.items():
        table.add_row(name, f"{value:.4g}")
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title)
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", overflow="fold")
    return table
