"""Command line of the study: run it, list what is pending, and make tables, pictures and the page of the results."""

import argparse
import shlex
import sys
import warnings
from pathlib import Path

from . import page, plots, tables
from .runner import prepare, run_pending
from .store import Store
from .study import Study, StudyError, read_study
from .train import processes


def main(arguments: list[str] | None = None) -> int:
    """Do what is asked for; return the exit status: 1 if a run failed, 2 if nothing could begin."""
    options = _parse(arguments)
    # PEFT 0.21 uses names of checkpointing that transformers 5 deprecates.
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
    try:
        if options.command == "page":
            return _page(Store(page.RESULTS))
        return COMMANDS[options.command](read_study(_path(options.study)), Store(options.results), options)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2


def _run(study: Study, store: Store, options: argparse.Namespace) -> int:
    runs = [run for run in study.runs if not options.only or run.key in options.only]
    if unknown := set(options.only) - {run.key for run in runs}:
        raise StudyError(f"{study.path}: has no run {', '.join(sorted(unknown))}; `list` shows those that are pending")
    prepare(study, runs, store)
    outcomes = run_pending(runs, store, options.workers, options.retry)
    if not processes().is_main_process:
        return 0
    print(
        f"{len(runs)} runs: {outcomes['done']} trained now, {outcomes['there']} were there, "
        f"{outcomes['elsewhere']} in other processes."
    )
    failed = {run: line for run in runs if (line := store.get(run)) and line["status"] == "failed"}
    for run, line in failed.items():
        print(f"failed: {run.key} ({run.method}, seed {run.seed}): {line['error']}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} runs failed; try them again by --retry", file=sys.stderr)
    return 1 if failed else 0


def _list(study: Study, store: Store, options: argparse.Namespace) -> int:
    store.check()
    commands = []
    for run in study.runs:
        if store.is_pending(run, options.retry):
            command = ["python", "-m", "experiments", "run", options.study, "--only", run.key]
            command += ["--results", str(options.results)] if options.results != page.RESULTS else []
            commands.append(shlex.join(command + (["--retry"] if options.retry else [])))
    print("\n".join(commands), end="\n" if commands else "")
    return 0


def _table(study: Study, store: Store, options: argparse.Namespace) -> int:
    store.check()
    print(f"{study.title}\n\n{tables.markdown(study, store)}\n{tables.NOTE}")
    return 0


def _plot(study: Study, store: Store, options: argparse.Namespace) -> int:
    store.check()
    for path in plots.plot(study, store, options.output):
        print(path)
    return 0


def _page(store: Store) -> int:
    store.check()
    studies = page.committed()
    drawn = {path for study in page.ended(studies, store) for path in plots.plot(study, store, page.PICTURES)}
    for stale in set(page.PICTURES.glob("*.png")) - drawn:
        stale.unlink()
    page.PAGE.write_text(page.page(studies, store, page.preface()))
    print(page.PAGE)
    return 0


COMMANDS = {"run": _run, "list": _list, "table": _table, "plot": _plot}


def _path(name: str) -> Path:
    """A study by its path, or by its name among the committed ones."""
    return Path(name) if name.endswith(".toml") else page.STUDIES / f"{name}.toml"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="LoRA against SpikeLoRA on real data. A run that has a result is not repeated; several processes "
        "may work on one folder of results.",
        epilog="example: python -m experiments run thresholds_cola --workers 2",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "run": "train what is pending",
        "list": "print a command for every pending run",
        "table": "print the tables in markdown",
        "plot": "draw the pictures",
        "page": "write docs/results.md and its pictures from all committed studies and results",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        if name != "page":
            command.add_argument("study", help="path of a study file, or the name of one in experiments/studies")
            command.add_argument("--results", type=Path, default=page.RESULTS, help="folder of the results")
        if name in ("run", "list"):
            command.add_argument("--retry", action="store_true", help="failed runs as well")
        if name == "run":
            command.add_argument(
                "--workers", type=int, default=1, help="runs at once, one thread each; they share the GPUs"
            )
            command.add_argument("--only", action="append", default=[], metavar="KEY", help="this run; may be repeated")
        if name == "plot":
            command.add_argument("--output", type=Path, default=page.PICTURES, help="folder of the pictures")
    options = parser.parse_args(arguments)
    if options.command == "run" and options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; runs that were finished are kept, and the same command goes on", file=sys.stderr)
        sys.exit(130)
