"""A plugin of pytest that writes `docs/compatibility.md`, see `make compatibility`.

A test that carries `@pytest.mark.compatibility(area, feature)` says that the feature works, or with `refused=reason`
that it raises, and why. If the test is skipped, the page says that the feature was not tested, and why. A run of all
tests notes its versions in `docs/versions.json`, for the same page.
"""

import json
import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
VERSIONS = "\n## Versions\n\n"
PAGE, RUNS = DOCS / "compatibility.md", DOCS / "versions.json"
PACKAGES = ("torch", "triton", "peft", "transformers", "trl", "accelerate")
HEAD = "# Compatibility\n\nMade by `make compatibility` from the outcomes of the tests, on CPU cores, with {}."

_areas: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped or (report.when == "call" and report.passed):
        for marker in item.iter_markers("compatibility"):
            status = "works" + (f"; {marker.kwargs['note']}" if "note" in marker.kwargs else "")
            if report.skipped:
                status = f"untested here: {str(report.longrepr[-1]).removeprefix('Skipped: ')}"
            elif "refused" in marker.kwargs:
                status = f"refused: {marker.kwargs['refused']}"
            report.user_properties.append(("compatibility", (*marker.args, status)))
    return report


def pytest_runtest_logreport(report):  # where the reports of all processes come together
    for name, line in report.user_properties:
        if name == "compatibility":
            area, feature, status = line
            _areas[area][feature].add(status)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if hasattr(config, "workerinput"):  # one of several processes, which saw its own tests alone
        return
    if exitstatus:
        terminalreporter.write_line(f"{PAGE.name} is left as it is, as not every test passed")
        return
    if config.option.markexpr:
        body = page()
    else:
        body = PAGE.read_text().partition(VERSIONS)[0]
        runs = json.loads(RUNS.read_text()) if RUNS.exists() else {}
        runs[versions()] = {outcome: len(terminalreporter.stats.get(outcome, ())) for outcome in ("passed", "skipped")}
        RUNS.write_text(json.dumps(runs, indent=2) + "\n")
    PAGE.write_text(body + section())
    terminalreporter.write_line(f"{PAGE} is written")


def page() -> str:
    lines = [HEAD.format(versions())]
    for area, features in sorted(_areas.items()):
        lines += [f"\n## {area}\n", "| | |", "|---|---|"]
        lines += [f"| {feature} | {'; '.join(sorted(statuses))} |" for feature, statuses in sorted(features.items())]
    return "\n".join(lines) + "\n"


def section() -> str:
    lines = ["With a PEFT or transformers that `pyproject.toml` does not allow, the import says which one to install."]
    if RUNS.exists():
        lines += ["`make versions` also ran all tests with", "", "| | passed | skipped |", "|---|---|---|"]
        for names, counts in json.loads(RUNS.read_text()).items():
            lines.append(f"| {names} | {counts['passed']:,} | {counts['skipped']} |")
    return VERSIONS + "\n".join(lines) + "\n"


def versions() -> str:
    packages = (f"{name} {version(name)}" for name in PACKAGES)
    return ", ".join((f"Python {platform.python_version()}", *packages))
