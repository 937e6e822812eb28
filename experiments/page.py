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
    whole, others = ended(studies, store)
    for study in whole:
        parts.append(f"## {study.title}\n")
        parts += [f"{text}\n" for text in (study.question, study.finding) if text]
        parts.append(tables.markdown(study, store))
        parts += [f"![{study.title}](results/{name})\n" for name in plots.figures(study, store)]
    if others:
        parts.append("## Not run, or not to the end\n")
        parts += [f"- {study.title}: {pending} of {len(study.runs)} runs are pending." for study, pending in others]
        parts.append("")
    return "\n".join(parts)


def ended(studies: list[Study], store: Store) -> tuple[list[Study], list[tuple[Study, int]]]:
    """The studies whose runs all have a line, and the others with their number of runs without one."""
    pending = [(study, sum(store.get(run) is None for run in study.runs)) for study in studies]
    return [study for study, n in pending if not n], [(study, n) for study, n in pending if n]


def preface() -> str:
    """What the results mean for a user, in words: `experiments/preface.md`, if there is one."""
    path = HERE / "preface.md"
    return path.read_text() if path.exists() else ""
