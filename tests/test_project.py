"""Facts that stand in several of the project's files are the same in all of them."""

import re
import tomllib
from pathlib import Path

import yaml
from conftest import LONGEST

import spikelora

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert citation["version"] == newest[1] == spikelora.__version__
    assert str(citation.get("date-released", "unreleased")) == newest[2]


def test_uv_takes_the_constraints_of_pip():
    constraints = (ROOT / "constraints.txt").read_text().splitlines()

    assert set(PROJECT["tool"]["uv"]["constraint-dependencies"]) <= set(constraints)
    for package in PROJECT["tool"]["uv"]["dependency-metadata"]:
        assert f"{package['name']}=={package['version']}" in constraints


def test_the_workflow_tests_the_versions_of_python_that_the_package_names():
    named = [line.rpartition(" :: ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]

    assert WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


def test_actions_are_pinned_by_commit():
    lines = re.findall(r"uses: (.*)", (ROOT / ".github" / "workflows" / "checks.yml").read_text())

    assert len(lines) > 10
    assert [line for line in lines if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []
    assert len(set(lines)) == len({line.partition("@")[0] for line in lines})  # each at one commit


def test_the_workflow_calls_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = [step.get("run", "") for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    called = {target for step in steps for target in re.findall(r"^make (\w+)", step, re.MULTILINE)}

    assert {"quality", "test", "coverage", "wheel"} <= called
    assert called <= targets


def test_files_that_go_first_are_there():
    assert [name for name in LONGEST if not (ROOT / "tests" / f"test_{name}.py").exists()] == []
