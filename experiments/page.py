"""docs/results.md, made of the committed studies and the committed lines of results; figures are never typed."""

from pathlib import Path

from . import plots, tables
from .store import Store
from .study import Study, read_study

HERE = Path(__file__).resolve().parent
STUDIES, RESULTS = HERE / "studies", HERE / "results"
PAGE, PICTURES = HERE.parent / "docs" / "results.md", HERE.parent / "docs" / "results"
HEAD = """# The study: LoRA against SpikeLoRA on real data

Made by `python -m experiments page` from the studies in [experiments/studies](../experiments/studies) and the lines in
[experiments/results](../experiments/results): no figure of a table or a picture is typed. How to run it is in
[experiments/README.md](../experiments/README.md).
"""


def committed() -> list[Study]:
    """The studies of the page, in its order."""
    return sorted(map(read_study, STUDIES.glob("*.toml")), key=lambda study: (study.order, study.name))


def page(studies: list[Study], store: Store, preface: str = "") -> str:
    """The whole page: the preface, then each study with its question, what was found, tables and pictures."""
    parts = [HEAD, *([preface] if preface else []), tables.NOTE + "\n"]
    for study in studies:
        parts.append(f"## {study.title}\n")
        parts += [f"{text}\n" for text in (study.question, study.finding) if text]
        parts.append(tables.markdown(study, store))
        parts += [f"![{study.title}](results/{name})\n" for name in plots.figures(study, store)]
    return "\n".join(parts)


def preface() -> str:
    """What the results mean for a user, in words: `experiments/preface.md`, where there is one."""
    path = HERE / "preface.md"
    return path.read_text() if path.exists() else ""
