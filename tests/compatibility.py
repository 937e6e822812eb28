"""A plugin of pytest that writes `docs/compatibility.md` from the outcomes of the tests, see `make compatibility`.

A test that carries `@pytest.mark.compatibility(area, feature)` says that the feature works; with `refused=reason` that
it raises, and why. Skipped, it says that the feature was not tested, for the reason it was skipped for.
"""

from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
PACKAGES = ("torch", "peft", "transformers", "trl", "accelerate")
HEAD = "# Compatibility\n\nMade by `make compatibility` from the outcomes of the tests, on CPU cores, with {}."

_areas: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
_failed: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        _failed.append(item.nodeid)
    if report.skipped or (report.when == "call" and report.passed):
        for marker in item.iter_markers("compatibility"):
            area, feature = marker.args
            status = "works" + (f"; {marker.kwargs['note']}" if "note" in marker.kwargs else "")
            if report.skipped:
                status = f"untested here: {str(report.longrepr[-1]).removeprefix('Skipped: ')}"
            elif "refused" in marker.kwargs:
                status = f"refused: {marker.kwargs['refused']}"
            _areas[area][feature].add(status)
    return report


def pytest_sessionfinish(session):
    if _failed or not _areas:
        return  # a page of failing tests would be wrong
    lines = [HEAD.format(", ".join(f"{name} {version(name)}" for name in PACKAGES))]
    for area, features in sorted(_areas.items()):
        lines += [f"\n## {area}\n", "| | |", "|---|---|"]
        lines += [f"| {feature} | {'; '.join(sorted(statuses))} |" for feature, statuses in sorted(features.items())]
    PAGE.write_text("\n".join(lines) + "\n")


def pytest_terminal_summary(terminalreporter):
    failed = f"{PAGE.name} was left as it is, as {len(_failed)} tests failed"
    terminalreporter.write_line(failed if _failed else f"{PAGE} was written")
