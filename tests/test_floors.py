"""Imports point downward only: each module of the package stands on a floor and imports from lower ones."""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "spikelora"
FLOORS = {
    "errors": 0,
    "moments": 0,
    "quantiles": 0,
    "composed": 0,
    "neuron": 0,
    "ops.__init__": 0,
    "ops.linear": 0,
    "ops.firing": 0,
    "ops.torch_backend": 0,
    "ops.triton_backend": 0,
    "gate": 1,
    "parameters": 1,
    "_versions": 2,
    "adapter_files": 2,
    "observe": 2,
    "paths": 2,
    "sparsity": 2,
    "config": 2,
    "config_file": 3,
    "read_not_called": 3,
    "layers": 3,
    "loading": 3,
    "tuner": 3,
    "_registration": 3,
    "account": 4,
    "adapt": 4,
    "convert": 4,
    "holding": 4,
    "integrations": 4,
    "watching": 4,
    "cli": 5,
    "__main__": 6,
    "calibration_text": 5,
    "report": 5,
    "report_figures": 5,
    "report_html": 5,
    "report_tables": 5,
    "__init__": 6,
}
# A gate adds what the neuron does to its parameters. The registration names the classes and guards that it registers,
# and the model makes its layers and loads what fits them; a configuration is loaded from an adapter's folder; the
# autograd functions are made of a backend's products; the meter observes; conversions calibrate; what is held is not
# warned of; a report is read, drawn and written, and the command does all of that.
SAME_FLOOR = {
    ("sparsity", "observe"),
    ("_registration", "tuner"),
    ("_registration", "layers"),
    ("_registration", "loading"),
    ("tuner", "layers"),
    ("tuner", "read_not_called"),
    ("_registration", "config_file"),
    ("tuner", "loading"),
    ("config", "adapter_files"),
    ("gate", "parameters"),
    ("convert", "adapt"),
    ("watching", "holding"),
    ("neuron", "composed"),
    ("ops.linear", "composed"),
    ("ops.linear", "errors"),
    ("ops.linear", "ops.torch_backend"),
    ("ops.torch_backend", "ops.firing"),
    ("ops.linear", "ops.triton_backend"),
    ("report_figures", "report"),
    ("report_html", "report"),
    ("report_html", "report_figures"),
    ("report_tables", "report"),
    ("report_tables", "report_figures"),
    ("report_tables", "report_html"),
    ("cli", "calibration_text"),
    ("cli", "report"),
    ("cli", "report_html"),
    ("cli", "report_tables"),
}
MODULES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}


def imports(source):
    """Dotted names that the source imports, anywhere in it; `from a import b` counts as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            names.update(f"{package}.{alias.name}" for alias in node.names)
    return names


def own_module(name):
    """The module of ours that a dotted name lies in, or None: `spikelora.gate.SpikeGate` lies in `gate`."""
    package, _, rest = name.partition(".")
    if package != "spikelora":
        return None
    inside = [module for module in FLOORS if f"{rest}.".startswith(f"{module}.")]
    return max(inside, key=len, default="__init__")


def test_reading_of_imports():
    source = "import a.b as c\nfrom d import e, f\ndef g():\n    if h:\n        from .i import j\n    from . import k\n"

    assert imports(source) == {"a.b", "d.e", "d.f", ".i.j", "..k"}
    assert own_module("spikelora.gate.SpikeGate") == own_module("spikelora.gate") == "gate"
    assert own_module("spikelora") == own_module("spikelora.SpikeLoraConfig") == "__init__"
    assert own_module("spikelora_other.gate") is own_module("torch.nn") is None


def test_every_module_has_a_floor():
    assert set(MODULES) == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module):
    own = {own_module(name) for name in imports(MODULES[module].read_text())} - {None}

    upward = {other for other in own if FLOORS[other] >= FLOORS[module] and (module, other) not in SAME_FLOOR}
    assert upward == set()


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_absolute(module):
    assert [name for name in imports(MODULES[module].read_text()) if name.startswith(".")] == []


@pytest.mark.parametrize("module", [module for module in MODULES if FLOORS.get(module, 0) <= 1])
def test_the_arithmetic_needs_torch_alone(module):
    packages = {name.partition(".")[0] for name in imports(MODULES[module].read_text())}
    kernels = {"triton"} if module == "ops.triton_backend" else set()

    assert packages - sys.stdlib_module_names <= {"torch", "spikelora"} | kernels


def test_the_oracle_and_the_fast_paths_share_no_code():
    fast = [module for module in MODULES if module.startswith("ops.")]
    own = {module: {own_module(name) for name in imports(MODULES[module].read_text())} for module in [*fast, "neuron"]}

    assert len(fast) == 5
    assert not [module for module in fast if "neuron" in own[module]]
    assert not [other for other in own["neuron"] if other in fast]


@pytest.mark.parametrize("module", [module for module in MODULES if FLOORS.get(module, 0) < 4])
def test_no_trainer_below_floor_4(module):
    names = imports(MODULES[module].read_text())

    assert [name for name in names if name.lower().startswith("transformers.trainer")] == []
