"""Results of runs: for each a file with one line of JSON, in a folder that machines may share.

A line is written to a temporary file that is then renamed, so no reader ever sees a part of a line. The process that
trains a run holds a lock on a file next to it. The system releases the lock when the process ends, however it ends, so
no run stays claimed.
"""

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .study import Run, StudyError, key_of

SCHEMA = 1
# What tables and pictures read of a finished run, with the types that it must have.
_NORMS = {"by_epoch": list, "by_module": dict}
_RESULT = {
    "metrics": dict,
    "history": list,
    "gradient_norms": {"A": _NORMS, "B": _NORMS},
    "generalisation_gap": float,
    "r": int,
}
_WHERE = {"device": str, "date": str, "total_seconds": float, "training_cpu_seconds": float}
_MODULE = {"layer": str, "kind": str, "sparsity": float}


class Store:
    """The results in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Read every line of the folder.

        Raises:
            StudyError: for the first that is not a whole result of this version of the schema, with its file and line.
        """
        for path in sorted(self.folder.glob("*.jsonl")):
            self._read(path)

    def get(self, run: Run) -> dict[str, Any] | None:
        path = self._path(run)
        return self._read(path) if path.exists() else None

    def done(self, runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
        """The results of the finished ones among the runs, by key."""
        found = {run.key: self.get(run) for run in runs}
        return {key: line for key, line in found.items() if line and line["status"] == "done"}

    def is_pending(self, run: Run, retry: bool) -> bool:
        """Whether a run has no result yet, or one that failed and is to be tried again."""
        line = self.get(run)
        return line is None or (retry and line["status"] == "failed")

    def put(self, run: Run, line: dict[str, Any]) -> None:
        line = {"schema": SCHEMA, "key": run.key, "config": run.config()} | line
        aside = self.folder / f".{run.key}.{uuid.uuid4().hex}"
        with aside.open("x") as file:
            file.write(json.dumps(_rounded(line), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self._path(run))

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Whether this process may train a run; if so, no other process may until the context ends."""
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        # The file stays: if it were removed, two processes could lock two files of the same name.
        with (locks / run.key).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _path(self, run: Run) -> Path:
        return self.folder / f"{run.key}.jsonl"

    def _read(self, path: Path) -> dict[str, Any]:
        where = f"{path}, line 1"
        try:
            lines = path.read_text().splitlines()
            line = json.loads(lines[0]) if lines else None
        except OSError as error:
            raise StudyError(f"{path}: cannot be read ({error.strerror}); results are files") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise StudyError(f"{where}: is not JSON ({error}); remove the file, and the run is done again") from error
        if len(lines) != 1:
            last = max(1, len(lines))
            raise StudyError(f"{path}, line {last}: a result is one line, this file has {len(lines)}; remove it")
        if not isinstance(line, dict) or line.get("schema") != SCHEMA:
            found = line.get("schema") if isinstance(line, dict) else None
            raise StudyError(
                f"{where}: written by version {found} of the schema, and this is version {SCHEMA}; keep those results "
                "in a folder of their own, and give another one by --results"
            )
        if not _is_whole(line):
            raise StudyError(f"{where}: a part of the result is missing; remove the file, and the run is done again")
        if line["key"] != key_of(line["config"]) or line["key"] != path.stem:
            raise StudyError(f"{where}: key, configuration and file name do not belong together; remove the file")
        return line


def _is_whole(line: dict[str, Any]) -> bool:
    if not _has(line, {"key": str, "config": dict, "versions": dict, "where": dict, "status": str}):
        return False
    if line["status"] != "done":
        return line["status"] == "failed" and _has(line, {"error": str})
    if not _has(line, {"result": _RESULT, "where": _WHERE}):
        return False
    sparsity = line["result"].get("sparsity", {"by_module": {}})
    if not _has(sparsity, {"by_module": dict}) or not all(_has(m, _MODULE) for m in sparsity["by_module"].values()):
        return False
    if line["config"].get("test") and not _has(line["result"], {"test": {"loss": float, "rows": int}}):
        return False
    return all(isinstance(number, float) for number in line["result"]["metrics"].values())


def _has(value: Any, shape: Any) -> bool:
    """Whether a value has a type, or is a dict whose values have the types in a dict."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_has(value.get(name), kind) for name, kind in shape.items())
    return isinstance(value, shape)


def _rounded(value: Any) -> Any:
    """Numbers rounded to 8 digits, more than a float32 has."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value
