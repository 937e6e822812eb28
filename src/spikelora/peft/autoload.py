"""Switches autoload on and off: with it, programs of an environment find SpikeLoRA by importing PEFT alone.

It is a .pth file in the environment's site-packages, which Python runs when it starts. It contains `autoload_hook.py`.
"""

import inspect
import os
import site
import sys
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path

from spikelora.errors import SpikeLoraError
from spikelora.peft import autoload_hook

_NAME = "spikelora-autoload.pth"
# Python runs each line that begins with `import` separately. A virtual environment may see a second file, its base's.
_CONTENTS = """\
# Registers SpikeLoRA when PEFT is imported. `spikelora autoload off` removes this file, and so may you.
import sys; any("SpikeLoraAutoload" in repr(f) for f in sys.meta_path) or exec({waiting!r}, {{"sys": sys}})
"""
_WAITING = """\
class SpikeLoraAutoload:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            space = {{"__name__": {name!r}}}
            exec({source!r}, space)
            return space["take_over"](SpikeLoraAutoload, name, path, target)
sys.meta_path.insert(0, SpikeLoraAutoload)
"""


def switch_on() -> Path:
    """Write or rewrite the file, and return its path.

    Raises:
        SpikeLoraError: if the environment cannot be written, or does not read such files.
    """
    file = _file()
    contents = _contents()
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f"{_NAME}.", dir=file.parent)
        try:
            with open(descriptor, "w", encoding="ascii") as stream:
                stream.write(contents)
            os.chmod(partial, 0o644)  # mkstemp lets only its owner read it
            os.replace(partial, file)
        except BaseException:
            with suppress(FileNotFoundError):
                os.remove(partial)
            raise
    except OSError as error:
        raise _unwritable(error) from error
    return file


def switch_off() -> Path | None:
    """Remove the file, and return its path, or None if there was no file.

    Raises:
        SpikeLoraError: if the environment cannot be written.
    """
    file = _file()
    try:
        file.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unwritable(error) from error
    return file


def describe() -> str:
    """Say whether autoload is on in this environment, and where its file is."""
    file = _file()
    if not file.exists():
        return f"Autoload is off in {sys.prefix}: programs have to `import spikelora` themselves."
    if file.read_text(encoding="ascii", errors="replace") != _contents():
        return f"Autoload is on in {sys.prefix}, by {file} of another version: `spikelora autoload on` renews it."
    return f"Autoload is on in {sys.prefix}, by {file}."


def _contents() -> str:
    source = inspect.getsource(autoload_hook)
    waiting = _WAITING.format(packages=autoload_hook.PACKAGES, name=autoload_hook.__name__, source=source)
    return _CONTENTS.format(waiting=waiting)


def _file() -> Path:
    folder = sysconfig.get_path("purelib")
    if folder not in site.getsitepackages():
        raise SpikeLoraError(
            f"Python reads no .pth files in {folder}, where this environment has its packages. Use `import spikelora` "
            "in the program."
        )
    return Path(folder, _NAME)


def _unwritable(error: OSError) -> SpikeLoraError:
    return SpikeLoraError(
        f"The environment in {sys.prefix} cannot be written ({error}). Run this with the rights to change it, or in an "
        "environment of your own (`python -m venv`), or import spikelora in the program."
    )
