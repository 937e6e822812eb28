"""Every message of a `SpikeLoraError`, read from the syntax trees: what happened and where, then what to do."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from spikelora.peft.config import _REFUSED

SOURCE = Path(__file__).parents[1] / "src"
ERRORS = {"SpikeLoraError", "NoMatchingModuleError"}
VALUE = "VALUE"  # in place of what is known only when it is raised
REMEDIES = {
    *(
        "Calibrate",
        "Call",
        "Choose",
        "Copy",
        "Delete",
        "Drop",
        "Force",
        "Generate",
        "Give",
        "Leave",
        "Load",
        "Look",
        "Measure",
    ),
    *("Name", "Put", "Run", "Save", "Serve", "Set", "Start", "Take", "Target", "Train", "Try", "Upgrade", "Use"),
}
# Words of PEFT, alone or before a remedy; a recipe of six lines; and what the last test reads by its parts.
OTHERWISE = {
    "str(error)",
    """f'{error} Use `target_modules="all-linear"` for every linear layer.'""",
    "_FIRST_ADAPTERS.format(file=file)",
    "f'`{name}` cannot be combined with SpikeLoRA: {reason}.'",
}


def text(node, texts):
    """What an expression says, with the texts that have names."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part, texts) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text(node.value, texts)
    if isinstance(node, ast.Name):
        return texts.get(node.id, VALUE)
    return node.value if isinstance(node, ast.Constant) else VALUE


def messages(path):
    """The messages of a file by their lines, but those in `OTHERWISE`."""
    tree = ast.parse(path.read_text())
    texts = {}
    if "serving" not in path.parts:  # which imports vLLM
        module = importlib.import_module(".".join(path.relative_to(SOURCE).with_suffix("").parts))
        texts = {name: value for name, value in vars(module).items() if isinstance(value, str)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            texts |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ERRORS:
            (message,) = node.args
            if ast.unparse(message) not in OTHERWISE:
                yield node.lineno, text(message, texts)


CASES = [
    pytest.param(message, id=f"{path.relative_to(SOURCE / 'spikelora')}:{line}")
    for path in sorted(SOURCE.rglob("*.py"))
    if any(error in path.read_text() for error in ERRORS)
    for line, message in messages(path)
]


def is_in_order(message):
    """Two sentences, the second of which begins with what to do."""
    plain = re.sub(r"`[^`]*`", "`name`", message)
    what, *rest = re.split(r"(?<=\.)\s+(?=\S)|\n", plain)
    return bool(
        len(rest) == 1
        and re.search(r"`name`|VALUE|[a-z][A-Z]|PEFT|transformers|TRL|meter", what)
        and rest[0].partition(" ")[0] in REMEDIES
        and rest[0].endswith(".")
    )


def test_there_are_messages():
    assert len(CASES) > 95


@pytest.mark.parametrize(
    "message",
    [
        "`tau` must be greater than 1.",
        "`tau` must be greater than 1. Try 2.0",
        "`tau` must be greater than 1; try 2.0.",
        "`tau` must be greater than 1. The paper uses 2.0.",
        "`tau` must be greater than 1. Try 2.0. Or try 3.0.",
        "Something is wrong. Try 2.0.",
        "Try 2.0. `tau` must be greater than 1.",
    ],
)
def test_what_is_not_in_order(message):
    assert is_in_order("`tau` must be greater than 1. Try `config.tau = 2.0`.")
    assert not is_in_order(message)


@pytest.mark.parametrize("message", CASES)
def test_a_message_says_what_happened_and_then_what_to_do(message):
    assert is_in_order(message), message


@pytest.mark.parametrize("name", _REFUSED)
def test_a_refused_option_says_what_to_do(name):
    assert is_in_order(f"`{name}` cannot be combined with SpikeLoRA: {_REFUSED[name]}.")
