"""The tasks: where their rows come from, what is measured on them, and how they become tokens.

Local files lie in the folder that `SPIKELORA_DATA` names: `cola/in_domain_train.tsv`, `cola/*_dev.tsv`,
`sst2/train.txt`, `sst2/dev.txt`, `subj/subj.all`, `tinyshakespeare/input.txt`. GLUE comes from the hub.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class TaskError(Exception):
    """Data that are missing or do not fit; the message names file and line, or the columns."""


class Row(NamedTuple):
    """A text, perhaps a second one, and a label; a label of None for language modelling."""

    text: str
    pair: str | None
    label: float | None


class Rows(NamedTuple):
    """The rows of a task: to train on, to choose settings on, and to report if settings were chosen.

    `test` comes from its own file, or its rows are in `train` as well: then `Task.load` takes them out if they are
    used.
    """

    train: list[Row]
    held_out: list[Row]
    test: list[Row]


@dataclass(frozen=True)
class Task:
    """A task; `metrics` are named as in `METRICS`, first the one that tables compare. `labels` is 1 for regression."""

    read: Callable[[], Rows]
    metrics: tuple[str, ...]
    labels: int

    def load(self, with_test: bool = False) -> Rows:
        """The rows; if there is a test part, none of it is trained on."""
        rows = self.read()
        if not with_test:
            return rows
        of_test = {id(row) for row in rows.test}
        return rows._replace(train=[row for row in rows.train if id(row) not in of_test])

    @property
    def is_language(self) -> bool:
        return self.labels == 0


# Metrics -------------------------------------------------------------------------------------------------------------


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two binary vectors; 0 if one of them is constant, as in GLUE's scorer."""
    if len(set(predicted)) < 2 or len(set(labels)) < 2:
        return 0.0
    return float(np.corrcoef(predicted, labels)[0, 1])


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of label 1; 0 if nothing is right."""
    right = ((predicted == 1) & (labels == 1)).sum()
    return float(2 * right / max(1, (predicted == 1).sum() + (labels == 1).sum()))


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float(stats.pearsonr(predicted, labels).statistic) if np.ptp(predicted) else 0.0


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float(stats.spearmanr(predicted, labels).statistic) if np.ptp(predicted) else 0.0


METRICS = {"mcc": matthews, "accuracy": accuracy, "f1": f1, "pearson": pearson, "spearman": spearman}


# Rows ----------------------------------------------------------------------------------------------------------------


def _file(name: str) -> Path:
    folder = os.environ.get("SPIKELORA_DATA")
    if not folder:
        raise TaskError("SPIKELORA_DATA is not set: let it name the folder of local data, see experiments/README.md")
    path = Path(folder) / name
    if not path.is_file():
        raise TaskError(f"{name} is not in the folder that SPIKELORA_DATA names")
    return path


def _lines(name: str) -> list[str]:
    data = _file(name).read_bytes()
    try:
        return data.decode().split("\n")
    except UnicodeDecodeError:  # the usual copies of Subj
        return data.decode("latin-1").split("\n")


def _cola_rows(name: str) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(name), 1):
        columns = line.rstrip("\r").split("\t")
        if columns == [""]:
            continue
        if len(columns) != 4 or columns[1] not in ("0", "1") or not columns[3].strip():
            raise TaskError(f"{name}, line {number}: needs 4 columns, source, label 0 or 1, mark and sentence")
        rows.append(Row(columns[3], None, int(columns[1])))
    return _some(rows, name)


def _labelled_rows(name: str) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(name), 1):
        label, _, sentence = line.strip().partition(" ")
        if not label:
            continue
        if label not in ("0", "1") or not sentence.strip():
            raise TaskError(f"{name}, line {number}: needs a label 0 or 1, a space and a sentence")
        rows.append(Row(sentence, None, int(label)))
    return _some(rows, name)


def _some(rows: list[Row], name: str) -> list[Row]:
    if len(rows) < 2:
        raise TaskError(f"{name} has {len(rows)} rows; at least 2 are needed")
    return rows


def _cola() -> Rows:
    """As in GLUE: its validation set is the sentences in the domain and out of it."""
    held_out = _cola_rows("cola/in_domain_dev.tsv") + _cola_rows("cola/out_of_domain_dev.tsv")
    train = _cola_rows("cola/in_domain_train.tsv")
    return Rows(train, held_out, _every_tenth(train))


def _every_tenth(rows: list[Row]) -> list[Row]:
    """The training rows of the test part; for tasks in one piece these are not the held-out rows."""
    return rows[5::10]


def _sst2() -> Rows:
    return Rows(*(_labelled_rows(f"sst2/{part}.txt") for part in ("train", "dev", "test")))


def _subj() -> Rows:
    """Subj comes in one piece: every tenth row is held out."""
    rows = _labelled_rows("subj/subj.all")
    return Rows([row for n, row in enumerate(rows) if n % 10], rows[::10], _every_tenth(rows))


def _shakespeare() -> Rows:
    """The last tenth of the text is held out, the one before it is the test part."""
    name = "tinyshakespeare/input.txt"
    text = "\n".join(_lines(name))
    test, end = (text.find("\n\n", len(text) * tenths // 10) for tenths in (8, 9))
    if not 0 <= test < end:
        raise TaskError(f"{name}: needs an empty line in each of its last two tenths, behind which those are held out")
    parts = [Row(part, None, None) for part in (text[:test], text[test:end], text[end:])]
    return Rows(parts[:2], parts[2:], parts[1:2])


def _pydoc() -> Rows:
    """Python's language reference in passages of about 2,000 characters, every tenth held out.

    The topics contain each other. A paragraph is taken only once, so none of the held-out text is also trained on.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    passages, passage = [], ""
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                passage += paragraph.strip("\n") + "\n\n"
            if len(passage) > 2000:
                passages.append(Row(passage, None, None))
                passage = ""
    return Rows([row for n, row in enumerate(passages) if n % 10], passages[::10], _every_tenth(passages))


# Of each data set of GLUE: its columns of text, its metrics, its number of labels, and the split that is held out.
_GLUE = {
    "cola": (("sentence",), ("mcc",), 2),
    "sst2": (("sentence",), ("accuracy",), 2),
    "mrpc": (("sentence1", "sentence2"), ("accuracy", "f1"), 2),
    "qqp": (("question1", "question2"), ("accuracy", "f1"), 2),
    "stsb": (("sentence1", "sentence2"), ("pearson", "spearman"), 1),
    "mnli": (("premise", "hypothesis"), ("accuracy",), 3),
    "qnli": (("question", "sentence"), ("accuracy",), 2),
    "rte": (("sentence1", "sentence2"), ("accuracy",), 2),
    "wnli": (("sentence1", "sentence2"), ("accuracy",), 2),
}


def _glue(name: str, held_out: str) -> Rows:
    from datasets import load_dataset

    columns, _, n_labels = _GLUE[name]
    try:
        splits = load_dataset("glue", name)
    except Exception as error:  # no network, no such data set: the hub's errors are of many types
        raise TaskError(f"glue/{name} cannot be had from the hub: {type(error).__name__}: {error}") from error
    made = []
    for split in ("train", held_out):
        if split not in splits:
            raise TaskError(f"glue/{name}: has no split {split}, but {', '.join(splits)}")
        found = splits[split].column_names
        if missing := {*columns, "label"} - set(found):
            raise TaskError(f"glue/{name}, {split}: has the columns {found}, and lacks {', '.join(sorted(missing))}")
        texts = [splits[split][column] for column in columns]
        texts = [*texts, [None] * len(texts[0])][:2]
        rows = [Row(*row) for row in zip(*texts, splits[split]["label"], strict=True)]
        for number, row in enumerate(rows, 1):
            is_label = row.label in range(n_labels) if n_labels > 1 else isinstance(row.label, float)
            if not is_label or not all(isinstance(text, str) for text in row[: len(columns)]):
                raise TaskError(f"glue/{name}, {split}, row {number}: needs text and a label, has {tuple(row)!r:.200}")
        made.append(_some(rows, f"glue/{name}, {split}"))
    return Rows(*made, _every_tenth(made[0]))  # the hub's test splits have no labels


TASKS = {
    "cola": Task(_cola, ("mcc", "accuracy"), 2),
    "sst2": Task(_sst2, ("accuracy",), 2),
    "subj": Task(_subj, ("accuracy",), 2),
    "shakespeare": Task(_shakespeare, ("loss",), 0),
    "pydoc": Task(_pydoc, ("loss",), 0),
    **{
        f"glue/{name}": Task(partial(_glue, name, "validation_matched" if name == "mnli" else "validation"), metrics, n)
        for name, (_, metrics, n) in _GLUE.items()
    },
    "glue/mnli-mm": Task(partial(_glue, "mnli", "validation_mismatched"), ("accuracy",), 3),
}


# Tokens --------------------------------------------------------------------------------------------------------------


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Rows of `input_ids` and what else the model takes, with `labels`: a class, a number, or the tokens themselves."""
    if rows[0].label is None:
        end = tokenizer.eos_token or ""
        texts = [tokenizer(row.text + end, verbose=False)["input_ids"] for row in rows]
        windows = [ids[at : at + max_length] for ids in texts for at in range(0, len(ids), max_length)]
        # A row without a second token teaches nothing.
        return [{"input_ids": ids, "labels": ids} for ids in windows if len(ids) > 1]
    pairs = None if rows[0].pair is None else [row.pair for row in rows]
    made = tokenizer([row.text for row in rows], pairs, truncation=True, max_length=max_length)
    names = [name for name in made if name != "attention_mask"]
    return [{name: made[name][n] for name in names} | {"labels": row.label} for n, row in enumerate(rows)]


def batches_of(rows: Sequence[dict[str, Any]], size: int, order: np.random.Generator | None) -> list[list[int]]:
    """Indices of rows of similar length, batch by batch; in random order if `order` is given, else by length.

    Rows are shuffled, sorted by length within fifty batches, and the batches are shuffled. So each epoch has other
    batches, with little padding.
    """
    lengths = np.array([len(row["input_ids"]) for row in rows])
    if order is None:
        by_length = np.argsort(lengths, kind="stable")
        return [by_length[at : at + size].tolist() for at in range(0, len(rows), size)]
    shuffled = order.permutation(len(rows))
    pools = [shuffled[at : at + 50 * size] for at in range(0, len(rows), 50 * size)]
    by_length = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = [by_length[at : at + size].tolist() for at in range(0, len(rows), size)]
    return [batches[n] for n in order.permutation(len(batches))]
