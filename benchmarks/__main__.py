"""Command line of the benchmarks: check, time, print, and write CSV files and pictures."""

import argparse
import sys
import warnings
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from tqdm import tqdm

from spikelora import SpikeLoraError

from . import events, host, import_time, one_layer, sparsity, whole_model
from .check import CheckError
from .goals import goals, judge
from .plot import plot
from .report import environment, show, write

BENCHMARKS = {
    "whole_model": whole_model,
    "sparsity": sparsity,
    "events": events,
    "one_layer": one_layer,
    "host": host,
    "import_time": import_time,
}
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; return the exit status, 1 if a check failed."""
    options = _parse(arguments)
    # PEFT 0.21 uses names of checkpointing that transformers 5 deprecates.
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tables = _run(options.only or list(BENCHMARKS), device, options.quick)
    except (CheckError, SpikeLoraError) as error:
        print(f"Nothing was reported, as a result is wrong: {error}", file=sys.stderr)
        return 1
    if not tables:
        print(f"Nothing to measure on {device.type}.", file=sys.stderr)
        return 0
    machine, verdicts = environment(device), judge(goals(device), tables)
    write(tables, verdicts, machine, options.output)
    plot(tables, machine, options.output)
    # Not wrapped at a terminal's width: a table reads better with whole lines.
    console = Console(width=140, markup=False, highlight=False)
    show(tables, verdicts, machine, console)
    console.print(f"Written to {options.output}", soft_wrap=True)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time SpikeLoRA against the frozen base, PEFT's LoRA and a plain transcription of the method, on "
        "the GPU if there is one. Results are checked before they are timed.",
        epilog="example: python -m benchmarks --only sparsity --only events --output outputs/benchmarks",
    )
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="run this one; may be repeated")
    parser.add_argument("--output", type=Path, help="folder for CSV files and pictures (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all works: figures mean nothing")
    options = parser.parse_args(arguments)
    if options.quick and not options.output:
        parser.error("--quick needs --output: its figures are not to replace the real ones")
    options.output = options.output or RESULTS
    return options


def _run(names: list[str], device: torch.device, quick: bool) -> dict[str, pd.DataFrame]:
    """All tables of these benchmarks; none of them is shown before all are done."""
    jobs = [job for name in names for job in BENCHMARKS[name].jobs(device, quick)]
    rows: dict[str, list] = {}
    with tqdm(jobs, unit="job", disable=None) as bar:
        for job in bar:
            bar.set_description(job.label)
            for table, more in job.run().items():
                rows.setdefault(table, []).extend(more)
    return {table: pd.DataFrame(more) for table, more in rows.items()}


if __name__ == "__main__":
    sys.exit(main())
