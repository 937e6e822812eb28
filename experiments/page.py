"""docs/results.md, made from the committed studies and results; no figure is typed by hand."""

from pathlib import Path

from . import plots, tables
from .store import Store
from .study import Study, read_study

HERE = Path(__file__).resolve().parent
STUDIES, RESULTS = HERE / "studies", HERE / "results"
PAGE, PICTURES = HERE.parent / "docs" / "results.md", HERE.parent / "docs" / "results"
HEAD = """# The study: LoRA against SpikeLoRA on real data

Made by `python -m experiments page` from the studies in [experiments/studies](../experiments/studies) and the lines in
[experiments/results](../experiments/results): no figure of a table or a picture is typed by hand.
[experiments/README.md](../experiments/README.md) says how to run it.
"""


def committed() -> list[Study]:
    """The studies of the page, in its order, without the reduced one, whose figures mean little."""
    paths = [path for path in STUDIES.glob("*.toml") if path.stem != "reduced"]
    return sorted(map(read_study, paths), key=lambda study: (study.order, study.name))


def page(studies: list[Study], store: Store, preface: str = "") -> str:
    """The whole page: the preface, then for each finished study its question, finding, tables and pictures."""
    parts = [HEAD, *([preface] if preface else []), "## How to read the tables\n", tables.NOTE + "\n"]
    for study in ended(studies, store):
        parts.append(f"## {study.title}\n")
        parts += [f"{text}\n" for text in (study.question, study.finding) if text]
        parts.append(tables.markdown(study, store))
        parts += [f"![{study.title}](results/{name})\n" for name in plots.figures(study, store)]
    return "\n".join(parts)


def ended(studies: list[Study], store: Store) -> list[Study]:
    """The studies whose runs all have a line. Those that need the hub, a GPU or a missing file are left out."""
    return [study for study in studies if all(store.get(run) is not None for run in study.runs)]


def preface() -> str:
    """What the results mean for a user, in words: `experiments/preface.md`, if there is one."""
    path = HERE / "preface.md"
    return path.read_text() if path.exists() else ""
