"""A virtual environment whose packages are those of the tests, with `spikelora autoload` to switch."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import spikelora

SOURCE = Path(spikelora.__file__).parents[1]
# Those of the interpreter, and folders such as build/quantised that are on the path before them.
PACKAGES = [
    path for path in sys.path if path.endswith(("site-packages", "dist-packages")) or f"{os.sep}build{os.sep}" in path
]


class Environment:
    def __init__(self, folder):
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.packages,) = folder.glob("lib/python*/site-packages")
        self.paths([*PACKAGES, SOURCE])

    def paths(self, paths):
        (self.packages / "the_tests.pth").write_text("".join(f"{path}\n" for path in paths))

    def start(self, *arguments, cwd=None):
        """A process that has ended, with what it said; without what the tests' own process has on its path."""
        command = [self.python, *map(str, arguments)]
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd, env=variables)

    def run(self, *arguments, cwd=None):
        """Standard output of a process that ends well."""
        process = self.start("-W", "error::RuntimeWarning", *arguments, cwd=cwd or self.packages)
        assert process.returncode == 0, process.stderr
        return process.stdout

    def autoload(self, switch):
        return self.run("-m", "spikelora", "autoload", switch)
