"""Tables in markdown, made only from the lines of results."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .paired import ENOUGH, LEVEL, Difference, Summary, difference, holm, summary
from .store import Store
from .study import Cell, Study, as_text
from .tasks import TASKS

_LONGEST = 200  # characters of an error or a warning
Lines = dict[str, dict[str, Any]]
NOTE = (
    "A figure is the mean ± standard deviation over seeds [95 % confidence interval]. Differences to LoRA are paired "
    "by seed, between runs on the same rows, kind of device, Python and torch. p is of the paired t test, corrected by "
    "Holm's method for all differences of the table. Bold is only what has p < 0.05 over at least 3 seeds, none of "
    "which failed, in a complete table."
)


def markdown(study: Study, store: Store) -> str:
    """All tables of a study, or a line that says why there are none."""
    lines = store.done(study.runs)
    failed = {run.key: line["error"] for run in study.runs if (line := store.get(run)) and line["status"] == "failed"}
    pending = len(study.runs) - len(lines) - len(failed)
    if not lines:
        said = f"*Not run: {pending} runs are pending{f', {len(failed)} failed' if failed else ''}.*"
        return "\n\n".join([said, *_remarks(study, lines, failed)]) + "\n"
    parts = []
    if pending:
        parts.append(f"*Incomplete: {pending} of {len(study.runs)} runs are pending.*")
    compared = _compared(study, lines, failed, is_complete=not pending)
    parts.append(_table(*_columns(*compared, lambda name: name not in _FOLDED)))
    parts += _remarks(study, lines, failed)
    n_point = len(study.cells[0].point)
    folded = [_columns(*compared, lambda name: name in _FOLDED or name in compared[0][: n_point + 1])]
    folded += [made for name in study.show if (made := _MORE.get(name, lambda *_: None)(study, lines))]
    parts += ["<details><summary>More figures</summary>", *(_table(*made) for made in folded)]
    parts += [_spent(list(lines.values())), "</details>"]
    return "\n\n".join(parts) + "\n"


# Details are folded below the table: a reader who wants the answer skips them.
_FOLDED = {"p", "p of that", "gap", "at threshold 0", "silent tokens", "dead before, after", "CPU min", "min"}


def _columns(
    head: list[str], body: list[list[str]], is_kept: Callable[[str], bool]
) -> tuple[list[str], list[list[str]]]:
    kept = [n for n, name in enumerate(head) if is_kept(name)]
    return [head[n] for n in kept], [[row[n] for n in kept] for row in body]


def of_cell(cell: Cell, lines: Lines) -> dict[int, dict[str, Any]]:
    """The lines of a cell's runs that are done, by seed."""
    return {run.seed: lines[run.key] for run in cell.runs if run.key in lines}


def modules_of(cell: Cell, lines: Lines) -> list[dict[str, Any]]:
    """The figures of all gates, over the modules and the seeds of a cell."""
    sparsities = (line["result"].get("sparsity", {}) for line in of_cell(cell, lines).values())
    return [module for found in sparsities for module in found.get("by_module", {}).values()]


def figure(line: dict[str, Any], name: str, part: str) -> float:
    """A number of a result: a metric or the sparsity on a part, or of the training; NaN if there is none."""
    result = line["result"]
    of_part = result["test"] if part == "test" else result["metrics"]
    for group in (of_part, result.get("sparsity", {}), result, line["where"]):
        if name in group:
            return float(group[name])
    return math.nan


def beside(cell: Cell, study: Study, label: str | None = "lora") -> Cell | None:
    """The cell of another method at the same point of the grid; None if there is none, or it is this cell."""
    found = (other for other in study.cells if other.label == label != cell.label and other.point == cell.point)
    return next(found, None)


def _compared(
    study: Study, lines: Lines, failed: dict[str, str], is_complete: bool
) -> tuple[list[str], list[list[str]]]:
    """The metrics of each cell, against LoRA at the same point of the grid and against what the study names."""
    metrics = list(dict.fromkeys(m for cell in study.cells for m in TASKS[cell.runs[0].task].metrics))
    firsts = list(dict.fromkeys(study.compared(cell) for cell in study.cells))
    others = [name for name in dict.fromkeys([*metrics, "loss"]) if name not in firsts]
    on_cpu = all("CPU" in line["where"]["device"] for line in lines.values())
    head = [*(name for name, _ in study.cells[0].point), "method", "seeds"]
    head += [
        title_of(firsts[0], study.part) if len(firsts) == 1 else "metric",
        "difference to LoRA",
        "p",
        "against",
        "difference",
        "p of that",
    ]
    head += [*(title_of(name, study.part) for name in others), "gap", "sparsity", "operations"]
    head += ["at threshold 0", "silent tokens", "dead before, after"]
    head.append("CPU min" if on_cpu else "min")
    pairs = [difference_to(cell, study, lines, label) for cell in study.cells for label in ("lora", cell.against)]
    corrected = holm([pair.p if pair else math.nan for pair in pairs])
    # If some seeds failed, the others are a selection and not a sample.
    whole = [
        is_complete and not any(run.key in failed for c in (cell, beside(cell, study, label)) if c for run in c.runs)
        for cell in study.cells
        for label in ("lora", cell.against)
    ]
    differences = (_difference_text(*made) for made in zip(pairs, corrected, whole, strict=True))
    body = []
    for cell in study.cells:
        found = of_cell(cell, lines)
        to_lora, to_other = next(differences), next(differences)
        row = [as_text(value) for _, value in cell.point]
        row.append(f"{cell.label} (r = {rank})" if (rank := _other_rank(cell, found)) else cell.label)
        n_failed = sum(run.key in failed for run in cell.runs)
        row.append(str(len(found)) + (f" of {len(cell.runs)}" if len(found) < len(cell.runs) else ""))
        row[-1] += f", {n_failed} failed" if n_failed else ""
        if not found:
            body.append([*row, *[""] * (len(head) - len(row))])
            continue
        first = study.compared(cell)
        row.append(("" if len(firsts) == 1 else f"{first} ") + _with_interval(_over(found, first, study.part)))
        row += [*to_lora, (cell.against or "") if to_other[0] else "", *to_other]
        row += [_with_sd(_over(found, name, study.part)) for name in (*others, "generalisation_gap", "sparsity")]
        operations = _over(found, "operations", study.part).mean
        row.append("" if math.isnan(operations) else f"{operations / 1000:.1f}k")
        # Masks that ignore the activation are not thresholds.
        looks = cell.runs[0].method not in ("random_mask", "dropout")
        row.append(_mean(_over(found, "zero_threshold_sparsity", study.part)) if looks else "")
        row.append(_mean(_over(found, "silent_tokens", study.part)))
        dead = [_over(found, name, study.part).mean for name in ("dead_at_start", "dead_at_end")]
        row.append("" if math.isnan(dead[0]) else f"{dead[0]:.3g}, {dead[1]:.3g}")
        seconds = _over(found, "training_cpu_seconds" if on_cpu else "training_seconds", study.part).mean
        body.append([*row, f"{seconds / 60:.2g}"])
    return head, body


def title_of(figure: str, part: str) -> str:
    where = "test " if part == "test" else "held-out " if figure == "loss" else ""
    return where + figure


def difference_to(cell: Cell, study: Study, lines: Lines, label: str | None) -> Difference | None:
    """The difference of a cell to another at the same point of the grid, over their pairs."""
    found, name = pairs_of(cell, study, lines, label), study.compared(cell)
    return difference(*({seed: figure(pair[n], name, study.part) for seed, pair in found.items()} for n in (0, 1)))


def pairs_of(
    cell: Cell, study: Study, lines: Lines, label: str | None = "lora"
) -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
    """A cell's line and that of another at the same point of the grid, by the seeds with the same circumstances."""
    other = beside(cell, study, label)
    ours, theirs = of_cell(cell, lines), of_cell(other, lines) if other else {}
    both = {seed: (ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}
    return {seed: pair for seed, pair in both.items() if _circumstances(pair[0]) == _circumstances(pair[1])}


def _circumstances(line: dict[str, Any]) -> list[Any]:
    """What has to be the same in a pair besides seed and settings; `pydoc` is another text in each Python."""
    rows = [line["result"].get(name) for name in ("train_rows", "eval_rows")]
    return [*rows, line["where"]["device"], *(line["versions"].get(name) for name in ("python", "torch"))]


def _over(found: dict[int, dict[str, Any]], name: str, part: str) -> Summary:
    return summary([figure(line, name, part) for line in found.values()])


def _other_rank(cell: Cell, found: dict[int, dict[str, Any]]) -> int | None:
    """The rank that was trained, if it is not the one that was asked for."""
    ranks = {line["result"]["r"] for line in found.values()} - {cell.runs[0].r}
    return ranks.pop() if ranks else None


def _gradients(study: Study, lines: Lines) -> tuple[list[str], list[list[str]]] | None:
    """Mean norms of the gradients of A and B, and the correlation of the modules' norms with those under LoRA."""
    head = [*(name for name, _ in study.cells[0].point), "method"]
    head += ["gradient of A", "of B", "A / LoRA's", "B / LoRA's", "correlation over modules, A", "B"]
    body = []
    for cell in study.cells:
        found, pairs = of_cell(cell, lines), pairs_of(cell, study, lines).values()
        if not found:
            continue
        row = [*(as_text(value) for _, value in cell.point), cell.label]
        row += [_with_sd(summary([_norm(line, part) for line in found.values()])) for part in "AB"]
        for measure in (_ratio, _correlation):
            for part in "AB":
                values = [measure(ours, theirs, part) for ours, theirs in pairs]
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
        for module in modules_of(cell, lines):
            shares.setdefault(module["kind"], []).append(module["sparsity"])
        if shares:
            kinds = kinds or list(shares)
            row = [*(as_text(value) for _, value in cell.point), cell.label]
            body.append(row + [f"{np.mean(shares[kind]):.3f}" if kind in shares else "" for kind in kinds])
    return ([*(name for name, _ in study.cells[0].point), "sparsity", *kinds], body) if body else None


_MORE = {"gradients": _gradients, "modules": _modules}


def _remarks(study: Study, lines: Lines, failed: dict[str, str]) -> list[str]:
    """What failed, what the package warned of (such as a missed target), and how often."""
    remarks: dict[str, int] = {}
    for cell in study.cells:
        where = ", ".join([cell.label, *(f"{name} {as_text(value)}" for name, value in cell.point)])
        errors = [failed[run.key] for run in cell.runs if run.key in failed]
        warned = [w for line in of_cell(cell, lines).values() for w in line["result"].get("warnings", ())]
        for text in [*errors, *warned]:
            text = " ".join(text.split())
            shown = f"{where}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}"
            remarks[shown] = remarks.get(shown, 0) + 1
    lists = [f"- {text}" + (f" ({n} times)" if n > 1 else "") for text, n in remarks.items()]
    return ["\n".join(lists)] if lists else []


def _spent(lines: Sequence[dict[str, Any]]) -> str:
    """The time, machines and versions of the runs; the oldest and the newest if they differ."""
    hours = sum(line["where"]["total_seconds"] for line in lines) / 3600
    devices = sorted({line["where"]["device"] for line in lines})
    used = {name: sorted({line["versions"].get(name, "none") for line in lines}) for name in lines[0]["versions"]}
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


def _difference_text(found: Difference | None, p: float, is_whole: bool) -> list[str]:
    if found is None:
        return ["", ""]
    text = f"{found.mean:+.3f}" + ("" if math.isnan(found.low) else f" [{found.low:+.3f}, {found.high:+.3f}]")
    if is_whole and found.n >= ENOUGH and p < LEVEL:
        text = f"**{text}**"
    return [text, "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"]


def _with_interval(s: Summary) -> str:
    return _with_sd(s) + ("" if math.isnan(s.low) else f" [{s.low:.3f}, {s.high:.3f}]")


def _with_sd(s: Summary) -> str:
    return _mean(s) + ("" if math.isnan(s.sd) else f" ± {s.sd:.3f}")


def _mean(s: Summary) -> str:
    return "" if math.isnan(s.mean) else f"{s.mean:.3f}"
