"""Looks, when imported, at the versions of the packages that this one rests on: those that its requirements name."""

import re
from importlib.metadata import PackageNotFoundError, requires

from transformers.utils.versions import require_version

_CHECKED = ("peft", "transformers")


def check() -> None:
    """Raise an `ImportError` where an installed package is of another version, with the one to install."""
    try:
        requirements = requires("spikelora") or []
    except PackageNotFoundError:  # not installed, but on the path
        return
    for requirement in requirements:
        if re.split(r"[^\w-]", requirement)[0] in _CHECKED:
            require_version(requirement, f"spikelora needs another one: pip install '{requirement}'")


check()
