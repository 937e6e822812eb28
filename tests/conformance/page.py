"""The result as tables in a terminal, and as a page."""

from collections import Counter
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .judge import VERDICTS, Verdicts
from .rules import EXCLUSIONS, REFUSALS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
PACKAGES = ("torch", "transformers")
HEAD = """# PEFT's own tests

Made by `make conformance`: the tests of PEFT {peft} that use a `LoraConfig` and pass with LoRA on CPU cores, run with
SpikeLoRA in its place, on {packages}. In place of models that they would download, they use random
ones made for the run.

Of {total:,} tests {passed:,} pass, {refused:,} are refused by design, {excluded:,} are excluded and {failed:,} fail.
A test is refused where it ends in a `SpikeLoraError` for one of the reasons below. In the tests that pass every adapter
had a gate; there were {gates:,}. [rules.py](../tests/conformance/rules.py) names the excluded tests; an
exclusion that no test needs fails the run. {plain:,} more tests have no counterpart: in them PEFT itself makes the
LoRA, from another method's adapter.
"""


def show(verdicts: Verdicts, console: Console) -> None:
    """Print the verdicts by file, the refusals and exclusions, the tests that are not counted and each failure."""
    for title, head, rows in _tables(verdicts):
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for test in verdicts.without_counterpart:
        console.print(f"without a counterpart: {test}", soft_wrap=True)
    for test, why in verdicts.failures.items():
        console.print(f"failed: {test}\n    {why}", soft_wrap=True)


def write(verdicts: Verdicts) -> None:
    """Write the page."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    counts = {verdict: verdicts.total[verdict] for verdict in VERDICTS}
    numbers = counts | {"total": verdicts.total.total(), "gates": verdicts.gates}
    numbers |= {"plain": len(verdicts.without_counterpart)}
    lines = [HEAD.format(peft=version("peft"), packages=packages, **numbers)]
    for title, head, rows in _tables(verdicts):
        lines += [f"## {title}\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


def _tables(verdicts: Verdicts) -> list[tuple[str, list[str], list[list[str]]]]:
    files = [(Path(file).name, counts) for file, counts in sorted(verdicts.by_file.items())]
    by_file = [
        [name, f"{counts.total():,}", *(f"{counts[verdict]:,}" for verdict in VERDICTS)]
        for name, counts in [*files, ("all", verdicts.total)]
    ]
    refusals = [[reason, f"{verdicts.refusals[reason]:,}"] for reason in REFUSALS if reason in verdicts.refusals]
    exclusions: Counter[str] = Counter()
    for pattern, number in verdicts.exclusions.items():
        exclusions[EXCLUSIONS[pattern]] += number
    return [
        ("By file", ["file", "total", *VERDICTS], by_file),
        ("Refused by design", ["reason", "tests"], refusals),
        ("Excluded", ["the test", "tests"], [[reason, f"{number:,}"] for reason, number in exclusions.most_common()]),
    ]
