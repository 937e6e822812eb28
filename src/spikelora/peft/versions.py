"""Checks, when imported, the versions of the packages that the requirements of this one name."""

import re
from importlib.metadata import PackageNotFoundError, requires

from transformers.utils.versions import require_version

_CHECKED = ("peft", "transformers")


def check() -> None:
    """Raise an `ImportError` that says what to install, if an installed package has another version."""
    try:
        requirements = requires("spikelora") or []
    except PackageNotFoundError:  # not installed, but on the path
        return
    for requirement in requirements:
        if re.split(r"[^\w-]", requirement)[0] in _CHECKED:
            require_version(requirement, f"spikelora needs another one: pip install '{requirement}'")


check()
