"""Imports point downward only: from room to room, and within a room from later modules to earlier ones."""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "spikelora"
# By room the modules, each of which imports from those before it alone. The rooms stand in this order as well.
ROOMS = {
    "": ["errors"],
    "method": [
        "__init__",
        "composed",
        "neuron",
        "parameters",
        "gate",
        "sharding",
        "ops.__init__",
        "ops.adapter",
        "ops.second_backward",
        "ops.frozen",
        "ops.firing",
        "ops.torch_backend",
        "ops.triton_backend",
        "ops.usual",
        "ops.linear",
        "paths",
        "variants",
        "layers",
    ],
    "peft": [
        "__init__",
        "versions",
        "adapter_files",
        "targets",
        "config",
        "config_file",
        "read_not_called",
        "loading",
        "tuner",
        "registration",
        "trainers",
        "autoload_hook",
        "autoload",
    ],
    "sparsity": [
        "__init__",
        "observe",
        "meter",
        "account",
        "quantiles",
        "batches",
        "calibration",
        "holding",
        "watching",
    ],
    "conversion": ["__init__", "moments", "pruning", "lora"],
    "report": ["__init__", "adapter", "run", "figures", "html", "card", "tables", "text", "watch", "cli"],
    "serving": ["__init__", "gate", "adapters", "changes", "plugin"],
    # The package's face, and the start of the command.
    " ": ["__init__", "__main__"],
}
ORDER = [f"{room}.{name}".strip(". ") for room, names in ROOMS.items() for name in names]
MODULES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}
# These extend layers of PEFT and transformers; the rest of the method needs torch alone.
OF_PEFT = {"method.paths", "method.variants", "method.layers"}
# What follows a trainer; `import spikelora` imports the first alone, which needs no Trainer itself.
OF_TRAINERS = {"peft.trainers", "sparsity.holding", "sparsity.watching"}


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
    """The module of ours that a dotted name lies in, or None: `spikelora.errors.SpikeLoraError` lies in `errors`."""
    package, _, rest = name.partition(".")
    if package != "spikelora":
        return None
    by_name = {module.removesuffix(".__init__"): module for module in ORDER}
    inside = [name for name in by_name if f"{rest}.".startswith(f"{name}.")]
    return by_name[max(inside, key=len, default="__init__")]


def own_imports(module):
    return {own_module(name) for name in imports(MODULES[module].read_text())} - {None}


def test_reading_of_imports():
    source = "import a.b as c\nfrom d import e, f\ndef g():\n    if h:\n        from .i import j\n    from . import k\n"

    assert imports(source) == {"a.b", "d.e", "d.f", ".i.j", "..k"}
    assert own_module("spikelora.method.gate.SpikeGate") == own_module("spikelora.method.gate") == "method.gate"
    assert own_module("spikelora.method") == own_module("spikelora.method.Unknown") == "method.__init__"
    assert own_module("spikelora") == own_module("spikelora.SpikeLoraConfig") == "__init__"
    assert own_module("spikelora_other.gate") is own_module("torch.nn") is None


def test_every_module_has_its_place():
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module):
    # The text of the hook runs outside of this package, in a .pth file, and imports it as a program does.
    outside = {"__init__"} if module == "peft.autoload_hook" else set()
    assert {other for other in own_imports(module) if ORDER.index(other) >= ORDER.index(module)} == outside


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_absolute(module):
    assert [name for name in imports(MODULES[module].read_text()) if name.startswith(".")] == []


@pytest.mark.parametrize("room", [room for room in ROOMS if room.strip()])
def test_a_room_says_what_it_is_for_and_holds_nothing_else(room):
    says, *rest = ast.parse(MODULES[f"{room}.__init__"].read_text()).body

    assert "?" in says.value.value
    assert "import" in says.value.value
    assert rest == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(("method.", "errors"))])
def test_the_method_needs_torch_alone(module):
    packages = {name.partition(".")[0] for name in imports(MODULES[module].read_text())}
    others = {"triton"} if module == "method.ops.triton_backend" else {"peft", "transformers"} & packages
    allowed = others if module == "method.ops.triton_backend" or module in OF_PEFT else set()

    assert packages - sys.stdlib_module_names <= {"torch", "spikelora"} | allowed


def test_the_oracle_and_the_fast_paths_share_no_code():
    fast = [module for module in MODULES if module.startswith("method.ops.")]

    assert len(fast) == 9
    assert not [module for module in fast if "method.neuron" in own_imports(module)]
    assert not own_imports("method.neuron") & set(fast)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in OF_TRAINERS])
def test_few_import_trainers(module):
    names = imports(MODULES[module].read_text())

    assert [name for name in names if name.lower().startswith("transformers.trainer")] == []


def test_the_method_is_read_in_three_files_and_300_lines():
    files = ("neuron", "gate", "variants")

    assert sum(len(MODULES[f"method.{name}"].read_text().splitlines()) for name in files) <= 300


@pytest.mark.parametrize("module", MODULES)
def test_a_long_file_says_why(module):
    source = MODULES[module].read_text()

    assert len(source.splitlines()) <= 300 or "One file" in ast.get_docstring(ast.parse(source))
