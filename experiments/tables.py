"""Tables in markdown, made from the lines of results alone."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .paired import ENOUGH, LEVEL, Difference, Summary, difference, holm, summary
from .store import Store
from .study import Cell, Study, as_text
from .tasks import TASKS

Lines = dict[str, dict[str, Any]]
NOTE = (
    "Mean ± standard deviation over seeds [95 % confidence interval]; differences to LoRA are paired by seed; p is of "
    "the paired t test, corrected by Holm's method within the table. Bold: p < 0.05 over at least 3 seeds, and nothing "
    "else."
)


def markdown(study: Study, store: Store) -> str:
    """All tables of a study, or what there is instead."""
    lines = store.done(study.runs)
    failed = sum(1 for run in study.runs if (line := store.get(run)) and line["status"] == "failed")
    if not lines:
        return f"*Not run: {len(study.runs)} runs are pending{f', {failed} of them failed' if failed else ''}.*\n"
    parts = []
    if len(lines) < len(study.runs):
        parts.append(f"*Incomplete: {len(lines)} of {len(study.runs)} runs, {failed} failed.*")
    parts.append(_table(*_compared(study, lines)))
    parts += [_table(*made) for name in study.show if (made := _MORE.get(name, lambda *_: None)(study, lines))]
    parts.append(_spent(list(lines.values())))
    return "\n\n".join(parts) + "\n"


def of_cell(cell: Cell, lines: Lines) -> dict[int, dict[str, Any]]:
    """The lines of a cell's runs that are done, by seed."""
    return {run.seed: lines[run.key] for run in cell.runs if run.key in lines}


def figure(line: dict[str, Any], name: str) -> float:
    """A number of a result: a metric, of the training, or of the sparsity; NaN where it has none."""
    result = line["result"]
    for group in (result["metrics"], result.get("sparsity", {}), result, line["where"]):
        if name in group:
            return float(group[name])
    return math.nan


def baseline_of(cell: Cell, study: Study) -> Cell | None:
    return next((other for other in study.cells if other.is_baseline and other.point == cell.point), None)


def _compared(study: Study, lines: Lines) -> tuple[list[str], list[list[str]]]:
    """The metrics of each cell, against LoRA at the same point of the grid."""
    metrics = list(dict.fromkeys(m for cell in study.cells for m in TASKS[cell.runs[0].task].metrics))
    firsts = list(dict.fromkeys(TASKS[cell.runs[0].task].metrics[0] for cell in study.cells))
    others = [name for name in metrics if name not in firsts] + ([] if "loss" in firsts else ["loss"])
    varied = [name for name, _ in study.cells[0].point]
    differences = [_to_baseline(cell, study, lines) for cell in study.cells]
    ps = iter(holm([d.p for d in differences if d]))
    head = [*varied, "method", "seeds", firsts[0] if len(firsts) == 1 else "metric", "difference to LoRA", "p"]
    head += [
        *(f"held-out {name}" if name == "loss" else name for name in others),
        "gap",
        "sparsity",
        "at threshold 0",
        "silent tokens",
        "dead before, after",
        "CPU min",
    ]
    body = []
    for cell, to_lora in zip(study.cells, differences, strict=True):
        found = of_cell(cell, lines)
        task = TASKS[cell.runs[0].task]
        first = task.metrics[0]
        row = [as_text(value) for _, value in cell.point]
        label = f"{cell.label} (r = {rank})" if (rank := _other_rank(cell, found)) else cell.label
        row += [label, f"{len(found)} of {len(cell.runs)}" if len(found) < len(cell.runs) else str(len(found))]
        if not found:
            body.append([*row, *[""] * (len(head) - len(row))])
            continue
        row.append(("" if len(firsts) == 1 else f"{first} ") + _with_interval(_over(found, first)))
        row += _difference(to_lora, next(ps)) if to_lora else ["", ""]
        row += [_with_sd(_over(found, name)) for name in others]
        row += [_with_sd(_over(found, name)) for name in ("generalisation_gap", "sparsity")]
        row += [_share(_over(found, name)) for name in ("zero_threshold_sparsity", "silent_tokens")]
        dead = [_over(found, name).mean for name in ("dead_at_start", "dead_at_end")]
        row.append("" if math.isnan(dead[0]) else f"{dead[0]:.3g}, {dead[1]:.3g}")
        body.append([*row, f"{_over(found, 'training_cpu_seconds').mean / 60:.2g}"])
    return head, body


def _to_baseline(cell: Cell, study: Study, lines: Lines) -> Difference | None:
    baseline = baseline_of(cell, study)
    if cell.is_baseline or baseline is None:
        return None
    first = TASKS[cell.runs[0].task].metrics[0]
    values, base = ({s: figure(line, first) for s, line in of_cell(c, lines).items()} for c in (cell, baseline))
    return difference(values, base)


def _over(found: dict[int, dict[str, Any]], name: str) -> Summary:
    return summary([figure(line, name) for line in found.values()])


def _other_rank(cell: Cell, found: dict[int, dict[str, Any]]) -> int | None:
    """The rank that was trained, where it is not the one that was asked for."""
    ranks = {line["result"]["r"] for line in found.values()} - {cell.runs[0].r}
    return ranks.pop() if ranks else None


def _gradients(study: Study, lines: Lines) -> tuple[list[str], list[list[str]]] | None:
    """Mean norms of the gradients of A and B, and how the modules' norms correlate with those under LoRA."""
    head = [*(name for name, _ in study.cells[0].point), "method"]
    head += ["gradient of A", "of B", "A / LoRA's", "B / LoRA's", "correlation over modules, A", "B"]
    body = []
    for cell in study.cells:
        baseline = baseline_of(cell, study)
        found, base = of_cell(cell, lines), of_cell(baseline, lines) if baseline else {}
        if not found:
            continue
        row = [*(as_text(value) for _, value in cell.point), cell.label]
        row += [_with_sd(summary([_norm(line, part) for line in found.values()])) for part in "AB"]
        seeds = [] if cell.is_baseline else sorted(found.keys() & base.keys())
        for measure in (_ratio, _correlation):
            for part in "AB":
                values = [measure(found[s], base[s], part) for s in seeds]
                row.append(_with_sd(summary(values)) if values else "")
        body.append(row)
    return head, body


def _norm(line: dict[str, Any], part: str) -> float:
    return float(np.mean(line["result"]["gradient_norms"][part]["by_epoch"]))


def _ratio(line: dict[str, Any], base: dict[str, Any], part: str) -> float:
    return _norm(line, part) / norm if (norm := _norm(base, part)) else math.nan


def _correlation(line: dict[str, Any], base: dict[str, Any], part: str) -> float:
    """Pearson's, between the logarithms of the modules' norms; modules without any gradient are left out."""
    ours, theirs = (x["result"]["gradient_norms"][part]["by_module"] for x in (line, base))
    pairs = np.array([(ours[name], theirs[name]) for name in ours if ours[name] > 0 and theirs.get(name, 0) > 0])
    return float(np.corrcoef(np.log(pairs).T)[0, 1]) if len(pairs) > 2 else math.nan


def _modules(study: Study, lines: Lines) -> tuple[list[str], list[list[str]]] | None:
    """Sparsity by kind of module, a mean over layers and seeds."""
    body, kinds = [], []
    for cell in study.cells:
        shares: dict[str, list[float]] = {}
        for line in of_cell(cell, lines).values():
            for module in line["result"].get("sparsity", {}).get("by_module", {}).values():
                shares.setdefault(module["kind"], []).append(module["sparsity"])
        if shares:
            kinds = kinds or list(shares)
            row = [*(as_text(value) for _, value in cell.point), cell.label]
            body.append(row + [f"{np.mean(shares[kind]):.3f}" if kind in shares else "" for kind in kinds])
    return ([*(name for name, _ in study.cells[0].point), "sparsity", *kinds], body) if body else None


_MORE = {"gradients": _gradients, "modules": _modules}


def _spent(lines: Sequence[dict[str, Any]]) -> str:
    """Where and with what; the newest and the oldest where they differ."""
    hours = sum(line["where"]["total_seconds"] for line in lines) / 3600
    devices = sorted({line["where"]["device"] for line in lines})
    used = {name: sorted({line["versions"][name] for line in lines}) for name in lines[0]["versions"]}
    packages = ", ".join(f"{name} {' and '.join(found)}" for name, found in used.items())
    dates = sorted({line["where"]["date"] for line in lines})
    return (
        f"{len(lines)} runs, {hours:.2g} hours in all, each on {' or '.join(devices)}; "
        f"{packages}; {dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}."
    )


def _table(head: list[str], body: list[list[str]]) -> str:
    kept = [n for n in range(len(head)) if any(row[n] for row in body)]  # columns that say something
    rows = [[row[n] for n in kept] for row in [head, *body]]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(kept), *lines[1:]])


def _difference(found: Difference, p: float) -> list[str]:
    text = f"{found.mean:+.3f}" + ("" if math.isnan(found.low) else f" [{found.low:+.3f}, {found.high:+.3f}]")
    if found.n >= ENOUGH and p < LEVEL:
        text = f"**{text}**"
    return [text, "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"]


def _with_interval(s: Summary) -> str:
    return _with_sd(s) + ("" if math.isnan(s.low) else f" [{s.low:.3f}, {s.high:.3f}]")


def _with_sd(s: Summary) -> str:
    if math.isnan(s.mean):
        return ""
    return f"{s.mean:.3f}" + ("" if math.isnan(s.sd) else f" ± {s.sd:.3f}")


def _share(s: Summary) -> str:
    return "" if math.isnan(s.mean) else f"{s.mean:.3f}"
