"""Type checkers on the wheel: `make types`, because pyright has to be installed and mypy takes minutes."""

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYRIGHT = ROOT / "build" / "pyright" / "node_modules" / ".bin" / "pyright"
USER = ROOT / "tests" / "typed" / "user.py"

pytestmark = pytest.mark.skipif(not PYRIGHT.exists(), reason="make types installs pyright")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment that has the wheel's files, and what is installed here beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": environment}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin" / "python"


def check(*command, cwd):
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.timeout(1200)
def test_mypy_takes_a_users_program(python, tmp_path):
    code, says = check(
        *(sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "--config-file="),
        *("--cache-dir", ROOT / ".mypy_cache" / "user", USER),
        cwd=tmp_path,
    )

    assert code == 0, says


@pytest.mark.timeout(1200)
def test_pyright_takes_a_users_program(python, tmp_path):
    options = {
        "include": [str(USER.parent)],
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(options))

    code, says = check(PYRIGHT, "--project", tmp_path, "--pythonpath", python, cwd=tmp_path)

    assert code == 0, says
