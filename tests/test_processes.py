"""What runs a test in several processes: a crash of a library's own thread is tried again, all else is a failure."""

import ctypes
import time

import pytest
from processes import in_processes


def crashing_once(folder):
    """A thread without Python reads address 0, the first time."""
    mark = folder.parent / "crashed"
    if not mark.exists():
        mark.touch()
        libc = ctypes.CDLL(None)
        libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, ctypes.cast(libc.strlen, ctypes.c_void_p), None)
        time.sleep(10)
    return "done"


def crashing_below_python(folder):
    (folder.parent / "tried").open("a").write("once ")
    ctypes.string_at(0)


def test_a_crash_of_a_thread_without_python_is_tried_again(tmp_path):
    assert in_processes(crashing_once, tmp_path, 1) == [["done"]]
    assert (tmp_path / "crashed").exists()


def test_a_crash_below_our_own_calls_is_a_failure(tmp_path):
    with pytest.raises(AssertionError):
        in_processes(crashing_below_python, tmp_path, 1)
    assert (tmp_path / "tried").read_text() == "once "
