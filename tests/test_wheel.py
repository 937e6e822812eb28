"""The wheel: what a user gets from `pip install`."""

import subprocess
import sys
import zipfile
from pathlib import Path

import spikelora

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    # Without isolation, as an isolated build would fetch its backend.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"spikelora-{spikelora.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"spikelora-{spikelora.__version__}.dist-info/METADATA").decode()
    files = [path for path in (ROOT / "src" / "spikelora").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert names == {path.relative_to(ROOT / "src").as_posix() for path in files}
    assert "spikelora/py.typed" in names
    assert "License-Expression: Apache-2.0" in metadata
