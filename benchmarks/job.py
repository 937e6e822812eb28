"""What a benchmark is made of: jobs that check a result, time it, and give rows of tables."""

from collections.abc import Callable
from typing import Any, NamedTuple

Row = dict[str, Any]


class Job(NamedTuple):
    """One cell of a benchmark: its label for the progress bar, and what runs it and gives rows by the table's name."""

    label: str
    run: Callable[[], dict[str, list[Row]]]
