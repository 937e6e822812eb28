"""Runs that go on: what their folders hold, again whenever something was written."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spikelora.errors import SpikeLoraError
from spikelora.report.run import Run, read_runs

LATELY = 60.0  # seconds since something was written in which a run may still go on
_PAUSE = 2.0  # seconds between two looks at the folders
_READ = (".json", ".yaml", ".safetensors")


def watch_runs(
    folders: Sequence[Path], write: Callable[[Sequence[Run]], object], say: Callable[[str], object]
) -> list[Run]:
    """Read runs and write them whenever their folders have changed, until Ctrl-C; return them as they are then.

    A file that is being written when it is read is read again at the next look. What is still amiss when nothing has
    changed since the look before, such as a folder without an adapter, is said once.

    Args:
        folders: of the runs, as `read_runs` takes them.
        write: is given the runs after each change.
        say: is given a line for each change.

    Raises:
        SpikeLoraError: where the runs could never be read, and whatever `write` raises.
    """
    seen: object = None
    found: list[Run] = []
    is_written, said = False, ""
    try:
        while True:
            before, seen = seen, _state(folders)
            if seen != before or not is_written:
                try:
                    found = read_runs(folders)
                except (SpikeLoraError, OSError) as error:
                    is_written = False
                    if seen == before and str(error) != said:
                        said = str(error)
                        say(f"Waiting: {said}")
                else:
                    write(found)
                    is_written = True
                    say(f"{time.strftime('%H:%M:%S')} {' and '.join(map(_line, found))}")
            time.sleep(_PAUSE)
    except KeyboardInterrupt:
        try:
            return read_runs(folders)
        except (SpikeLoraError, OSError):
            if not found:
                raise
            return found


def is_written_to(folders: Sequence[Path]) -> bool:
    """Whether the folders, or the files that are read in them, were written lately."""
    newest = max([folder.stat().st_mtime_ns for folder in folders] + [written for _, written, _ in _state(folders)])
    return time.time() - newest / 1e9 < LATELY


def _state(folders: Sequence[Path]) -> list[tuple[Path, int, int]]:
    """The files of the folders and of the folders in them, each with its time and size."""
    files = [path for folder in folders for pattern in ("*", "*/*") for path in folder.glob(pattern)]
    state = []
    for path in sorted(path for path in files if path.suffix in _READ):
        try:
            status = path.stat()
        except OSError:  # a checkpoint that the run has removed meanwhile
            continue
        state.append((path, status.st_mtime_ns, status.st_size))
    return state


def _line(run: Run) -> str:
    curves = run.curves("loss") | run.curves("sparsity")
    shown = (f"{name} {points[-1][1]:.4f}" for name, points in curves.items() if "zero_threshold" not in name)
    return ", ".join((f"{run.folder}: step {run.steps[0]:,}", *shown))
