"""The parts of a benchmark: jobs that check a result, time it, and give rows of tables."""

from collections.abc import Callable
from typing import Any, NamedTuple

Row = dict[str, Any]


class Job(NamedTuple):
    """One cell of a benchmark: its label for the progress bar, and a function that runs it and gives rows by table."""

    label: str
    run: Callable[[], dict[str, list[Row]]]
