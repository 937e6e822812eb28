"""Command line of the conformance suite: fetch PEFT's tests, run them twice, compare, print and write the page."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from . import page
from .judge import Outcome, is_case, judge, stale

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "outputs" / "conformance"
PEFT = CACHE / f"peft-{version('peft')}"
PACKAGES, HUB = CACHE / "packages", CACHE / "hub"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", HERE.parent, PACKAGES))),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}


class ConformanceError(Exception):
    """The suite itself did not work, so nothing was compared."""


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; returns the exit status, 1 where a test failed or a rule is stale."""
    options = _parse(arguments)
    console = Console(width=140, markup=False, highlight=False)
    try:
        _prepare()
        files = options.only or _files()
        console.print(f"LoRA: {len(files)} files")
        with_lora = _lora(files)
        cases = [outcome["test"] for outcome in with_lora if is_case(outcome)]
        console.print(f"SpikeLoRA: {len(cases):,} tests")
        with_spikelora = _spikelora(files, cases)
    except ConformanceError as error:
        print(f"Nothing was compared: {error}", file=sys.stderr)
        return 1
    verdicts = judge(with_lora, with_spikelora)
    page.show(verdicts, console)
    # Rules and page are about all files.
    problems = [] if options.only else stale(verdicts)
    for problem in problems:
        console.print(f"stale rule: {problem}", soft_wrap=True)
    if options.only or verdicts.failures or problems:
        return int(bool(verdicts.failures or problems))
    page.write(verdicts)
    console.print(f"{page.PAGE} was written")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description="Run PEFT's own tests with LoRA and, those that pass, with SpikeLoRA in its place.",
        epilog="example: python -m tests.conformance --only test_vision_models --only test_helpers",
    )
    parser.add_argument("--only", action="append", metavar="FILE", help="a test file of PEFT's; may be repeated")
    return parser.parse_args(arguments)


def _prepare() -> None:
    """Fetch PEFT's tests and what they import, and make the models, each once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    requirements = HERE / "requirements.txt"
    installed = PACKAGES / ".installed"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        _python("-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", PACKAGES, "-r", requirements)
        installed.write_text(requirements.read_text())
    if not PEFT.exists():
        sdist = CACHE / f"{PEFT.name}.tar.gz"
        what = ("--no-deps", "--no-binary", ":all:", f"peft=={version('peft')}")
        _python("-m", "pip", "download", "--quiet", "--dest", CACHE, *what)
        with tarfile.open(sdist) as archive:
            archive.extractall(CACHE, filter="data")
        (PEFT / "tests" / "__init__.py").touch()  # the tests import each other, and the archive lacks it
    if f"\nVersion: {version('peft')}\n" not in (PEFT / "PKG-INFO").read_text():
        raise ConformanceError(f"{PEFT} is not PEFT {version('peft')}.")
    for method in ("lora", "spikelora"):
        made = HUB / method / ".made"
        if not made.exists() or made.read_text() != _digest():
            shutil.rmtree(HUB / method, ignore_errors=True)
            _python("-m", "conformance.hub", method, home=HUB / method)
            made.write_text(_digest())


def _files() -> list[str]:
    """PEFT's test files that speak of LoRA."""
    return [path.stem for path in sorted(PEFT.glob("tests/test_*.py")) if "LoraConfig" in path.read_text()]


def _lora(files: list[str]) -> list[Outcome]:
    """The outcomes with LoRA, which are kept for each file as long as nothing changes that they depend on."""
    kept = CACHE / f"lora-{_digest()}"
    missing = [file for file in files if not (kept / f"{file}.jsonl").exists()]
    if missing:
        kept.mkdir(exist_ok=True)
        outcomes = _pytest(missing, "lora")
        for file in missing:
            own = [outcome for outcome in outcomes if outcome["test"].startswith(f"tests/{file}.py::")]
            (kept / f"{file}.jsonl").write_text("".join(json.dumps(outcome) + "\n" for outcome in own))
    return [outcome for file in files for outcome in _read(kept / f"{file}.jsonl")]


def _spikelora(files: list[str], cases: list[str]) -> list[Outcome]:
    chosen = CACHE / "cases.txt"
    chosen.write_text("\n".join(cases))
    return _pytest(files, "spikelora", f"--cases={chosen}") if cases else []


def _digest() -> str:
    """Changes with what the outcomes with LoRA depend on."""
    versions = [version(package) for package in ("peft", "torch", "transformers")]
    files = [(HERE / name).read_text() for name in ("hub.py", "plugin.py", "requirements.txt")]
    return hashlib.sha256("\n".join([*versions, *files]).encode()).hexdigest()[:16]


def _pytest(files: list[str], method: str, *more: str) -> list[Outcome]:
    """The outcomes of PEFT's tests in some files; what pytest says lies in a log beside them."""
    outcomes, log = CACHE / f"{method}.jsonl", CACHE / f"{method}.log"
    outcomes.write_text("")
    # PEFT's own options need a plugin; its warnings as errors are about transformers. Tracebacks of the other styles
    # take most of the time.
    own = ("-o", "addopts=", "-o", "filterwarnings=default", "--rootdir=.", "-c", "pyproject.toml")
    ours = ("-p", "conformance.plugin", f"--method={method}", f"--outcomes={outcomes}", *more)
    usual = ("-v", "--tb=native", "--timeout=300", "-p", "no:cacheprovider")
    with log.open("w") as output:
        status = subprocess.run(
            [sys.executable, "-m", "pytest", *(f"tests/{file}.py" for file in files), *own, *ours, *usual],
            cwd=PEFT,
            env=ENVIRONMENT | {"HF_HOME": str(HUB / method)},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if status not in (0, 1, 5):  # all passed, some failed, none was selected
        raise ConformanceError(f"pytest ended with {status}, see {log}.")
    return _read(outcomes)


def _read(path: Path) -> list[Outcome]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _python(*arguments: str | Path, home: Path = HUB) -> None:
    environment = ENVIRONMENT | {"HF_HOME": str(home)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConformanceError(f"{' '.join(map(str, arguments))} failed: {done.stderr[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
