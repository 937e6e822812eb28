"""The documentation does what it says: its code runs, its outputs are those of the code, its commands exist."""

import io
import json
import os
import re
import shlex
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main

import spikelora

# isort: split
from peft import PeftModel
from transformers import AutoModelForCausalLM

from spikelora.report.cli import app

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```" in path.read_text())
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
NEEDS = {"quantisation.md": "bitsandbytes"}  # what a page's code needs beside what the tests have
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+(?:\.\d+)?")

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning"),
    # Three steps reach no target, and wake no module.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page, as pairs of language and text."""
    return BLOCK.findall(page.read_text())


def run_page(page: Path, names: dict) -> int:
    """Run a page's Python, and compare what it prints with a text block right behind it; how many were compared."""
    compared, text = 0, page.read_text()
    for block in BLOCK.finditer(text):
        if block[1] != "python":
            continue
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(block[2], f"{page.name}, line {text.count(chr(10), 0, block.start()) + 1}", "exec"), names)
        assert not re.search(r"\bnan\b", printed.getvalue())
        shown = BLOCK.match(text, block.end() + 2)
        if shown and shown[1] == "text":
            assert_alike(printed.getvalue(), shown[2])
            compared += 1
    return compared


def assert_alike(printed: str, shown: str) -> None:
    """The same words, and numbers within 3 % or two of their last digit, as other versions of torch round otherwise.

    The trainer's own log, a dict for each line, is not shown.
    """
    printed = "\n".join(line for line in printed.splitlines() if not line.startswith("{'"))
    assert NUMBER.sub("#", printed.strip()) == NUMBER.sub("#", shown.strip())
    for was, said in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        last_digit = 10.0 ** -len(said.partition(".")[2])
        assert float(was) == pytest.approx(float(said), rel=0.03, abs=2 * last_digit), printed


def runs_elsewhere(page: Path) -> bool:
    """Whether another file of tests names the page, and runs its code."""
    return any(f'"{page.name}"' in path.read_text() for path in TESTS.glob("test_*.py") if path.name != "test_docs.py")


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """What the code of the page "Start" leaves behind, in a folder that has the example where a clone has it."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    before = os.getcwd()
    os.chdir(folder)
    names: dict = {}
    assert run_page(ROOT / "docs" / "start.md", names) == 3
    names["args"].max_steps = 3  # where other pages train with them
    (folder / "my-adapter").symlink_to("outputs/start/adapter")
    yield names
    os.chdir(before)


def test_the_first_page_loads_what_it_trained(started):
    prompt = started["prompt"]
    assert started["loaded"](**prompt).logits.equal(started["model"].eval()(**prompt).logits)


# The code of `tools.md` is of other packages; tests/tools makes the same calls, in their environments.
GUIDES = [
    page for page in PAGES if "```python" in page.read_text() and not runs_elsewhere(page) and page.name != "tools.md"
]


@pytest.mark.parametrize("page", [page for page in GUIDES if page.name != "start.md"], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, started):
    needed = NEEDS.get(page.name)
    if needed and find_spec(needed) is None:
        pytest.skip(f"no {needed}")
    names = started | {"folder": "by-hand"}
    # Loaded, as a trainer's model does not copy: TRL's wrapper around its forward goes on to run the first one.
    names["base_model"], loaded = (
        AutoModelForCausalLM.from_pretrained(started["base"], dtype="float32") for _ in range(2)
    )
    names["model"] = PeftModel.from_pretrained(loaded, "my-adapter", is_trainable=True)
    if page.name == "distributed.md":
        from accelerate import Accelerator

        names["accelerator"] = Accelerator(cpu=True)
    run_page(page, names)


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's console blocks, without comments, each in words; prose in backticks as well."""
    texts = [text.replace("\\\n", "") for language, text in blocks(page) if language == "console"]
    lines = [line for text in texts for line in text.splitlines()]
    lines += re.findall(r"`((?:make|spikelora) [a-z][^`]*)`", BLOCK.sub("", page.read_text()))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.stem)
def test_commands_exist(page):
    """`make` has the targets, `spikelora` takes the flags, scripts and files are there."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    group = typer.main.get_command(app)
    for program, *words in commands(page):
        if program == "make":
            assert {word for word in words if "=" not in word} <= targets, words
        if program == "spikelora":
            known = {flag for parameter in group.commands[words[0]].params for flag in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known | {"--help"}, words
        if program == "python" and words[0] != "-m":
            assert any((ROOT / place / words[0]).exists() for place in (".", "examples/spikelora_finetuning")), words
            text = "".join(path.read_text() for path in (ROOT / "examples" / "spikelora_finetuning").glob("*.py"))
            is_ours = not words[0].startswith("examples/tools/")  # what lies there takes the flags of others as well
            assert not is_ours or all(word[2:] in text for word in words if word.startswith("--")), words


def test_messages_in_the_questions_are_the_package_s_own():
    """What a page tells to search for is in the source, or in PEFT's."""
    page = (ROOT / "docs" / "faq.md").read_text()
    source = " ".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s+f?"', "", source)
    for message in (
        "A SpikeLoRA adapter cannot be merged",
        "TRL hands vLLM the weights of the model with its adapter merged",
        "is from before the training, not from the checkpoint",
        "cannot learn while they are silent, as their B is still 0",
    ):
        assert message in page
        assert message in source


@pytest.mark.parametrize("name", spikelora.__all__)
def test_every_public_name_is_explained_and_in_the_reference(name):
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    assert f"::: spikelora.{name}\n" in pages
    thing = getattr(spikelora, name)
    assert thing.__doc__
    for member, value in vars(thing).items() if isinstance(thing, type) else ():
        if not member.startswith("_") and (callable(value) or isinstance(value, property)):
            assert value.__doc__ or any(getattr(base, member, None) for base in thing.__mro__[1:]), f"{name}.{member}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_as_they_ran(path):
    """Every cell ran, in order and without an error, and no path of a machine is in what it printed."""
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not re.search(r"/(home|root|work|tmp|usr)/", json.dumps(outputs))
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_the_site_s_pages_are_all_in_its_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r": (\S+\.md)$", text, re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages |= {f"tutorials/{path.name}.md" for path in NOTEBOOKS}
    assert pages <= listed


def test_links_of_the_documentation_lead_somewhere():
    """Also where the repository is read; `make docs` has the anchors as well."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)\s#:]+)", BLOCK.sub("", page.read_text())):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
