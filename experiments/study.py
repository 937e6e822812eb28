"""A study: a file that names model, task, methods, grid and seeds, and the runs that follow from it.

Everything that can be wrong with a study is found here, before anything runs, and reported with its line. One file of
more than 300 lines, because half of them are such checks.
"""

import hashlib
import itertools
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from spikelora import SpikeLoraError
from spikelora.peft.config import SURROGATES
from spikelora.peft.targets import TARGET_SCOPES

from .methods import METHODS, adapter_config
from .tasks import TASKS

PARTS = ("held_out", "test")  # of the rows that are not trained on: one to choose settings on, one to report
SCHEDULES = ("linear", "cosine", "constant_with_warmup")


class StudyError(Exception):
    """A study, a data set or a result that cannot be used; the message names the place and the remedy."""


@dataclass(frozen=True)
class Run:
    """The resolved configuration of one run. What is None does not apply, and is left out of the key.

    The defaults are the paper's settings where design and data allow: warm-up 6 %, weight decay 0.01, clipping 1.0,
    all linear layers, rsLoRA, r 8. The learning rate has no default, as each model has its own.
    """

    model: str
    task: str
    method: str
    seed: int
    learning_rate: float
    # The adapter.
    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = True
    init_lora_weights: bool = True
    # The method's own, see `methods.METHODS`.
    v_threshold: float | None = None
    tau: float | None = None
    target_sparsity: float | None = None
    learn_threshold: bool | None = None
    surrogate: str | None = None
    surrogate_alpha: float | None = None
    target_scope: str | None = None
    target_warmup: float | None = None
    rate: float | None = None
    unit: str | None = None
    penalty: float | None = None
    # Training.
    epochs: int = 4
    batch_size: int = 32  # of all processes together
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.01
    clipping: float = 1.0
    max_length: int = 128
    A_rate: float | None = None  # learning rate of A, as a share of the learning rate
    train_rows: int | None = None
    eval_rows: int | None = None
    test: bool | None = None  # keep a test part apart and measure it at the end; otherwise train on it

    def config(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def key(self) -> str:
        return key_of(self.config())


def key_of(config: Mapping[str, Any]) -> str:
    """Hash of a resolved configuration: 16 hexadecimal digits, the name of the run's file."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """The runs of one method at one point of the grid, one for each seed: one line of a table.

    It is compared with plain LoRA at the same point and, if `against` names one, with another method there.
    """

    point: tuple[tuple[str, Any], ...]
    label: str
    runs: tuple[Run, ...]
    against: str | None

    @property
    def is_baseline(self) -> bool:
        return self.label == "lora"


@dataclass(frozen=True)
class Study:
    """A study as written in its file, with all its cells in the order of the file."""

    name: str
    path: Path
    title: str
    question: str
    finding: str
    compare: str | None
    part: str
    show: tuple[str, ...]
    order: int
    lines: dict[str, int] = field(repr=False)
    cells: tuple[Cell, ...] = field(repr=False)

    @property
    def runs(self) -> list[Run]:
        return list({run.key: run for cell in self.cells for run in cell.runs}.values())

    def compared(self, cell: Cell) -> str:
        """The figure in which a cell is compared with others: `compare`, else the first metric of its task."""
        return self.compare or TASKS[cell.runs[0].task].metrics[0]

    def where(self, key: str) -> str:
        """File and line of a key."""
        return f"{self.path}, line {self.lines[key]}"


_TEXTS = ("title", "question", "finding", "compare")
_KEYS = {*_TEXTS, "part", "show", "order", "model", "task", "seeds", "settings", "grid", "methods"}
_SHOWN = ("sweep", "modules", "gradients", "history", "frontier")
_TYPES = {f.name: f.type for f in fields(Run)}
_OWN = {"v_threshold", "tau", "target_sparsity", "target_scope", "target_warmup", "learn_threshold", "surrogate"}
_OWN |= {"surrogate_alpha", "rate", "unit", "penalty"}
# What each field of a run has to be, besides its type.
_LIMITS = {
    "learning_rate": (lambda v: v > 0, "above 0"),
    "r": (lambda v: v >= 1, "at least 1"),
    "lora_alpha": (lambda v: v > 0, "above 0"),
    "lora_dropout": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "rate": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "tau": (lambda v: v > 1, "above 1"),
    "target_sparsity": (lambda v: 0 < v < 1, "between 0 and 1"),
    "target_scope": (lambda v: v in TARGET_SCOPES, f"one of {', '.join(TARGET_SCOPES)}"),
    "target_warmup": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "A_rate": (lambda v: v > 0, "above 0"),
    "surrogate": (lambda v: v in SURROGATES, f"one of {', '.join(SURROGATES)}"),
    "surrogate_alpha": (lambda v: v > 0, "above 0"),
    "unit": (lambda v: v in ("threshold", "spread"), "threshold or spread"),
    "penalty": (lambda v: v >= 0, "at least 0"),
    "epochs": (lambda v: v >= 1, "at least 1"),
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "schedule": (lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "warmup": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "weight_decay": (lambda v: v >= 0, "at least 0"),
    "clipping": (lambda v: v > 0, "above 0"),
    "max_length": (lambda v: v >= 2, "at least 2"),
    "train_rows": (lambda v: v >= 1, "at least 1"),
    "eval_rows": (lambda v: v >= 1, "at least 1"),
    "task": (lambda v: v in TASKS, f"one of {', '.join(TASKS)}"),
    "method": (lambda v: v in METHODS, f"one of {', '.join(METHODS)}"),
    "seed": (lambda v: 0 <= v < 2**32, "at least 0 and below 2**32"),
}


def read_study(path: Path) -> Study:
    """Read and check a study file.

    Raises:
        StudyError: for a file that cannot be read, and for an unknown key, task or method, a value of a wrong type or
            out of range, or an empty grid, with the line of the file.
    """
    return _Reader(path).study()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.text = path.read_text()
            self.values = tomllib.loads(self.text)
        except OSError as error:
            raise StudyError(f"{path}: cannot be read ({error.strerror}); give the path of a study file") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise StudyError(f"{path}: is not TOML: {error}") from error

    def study(self) -> Study:
        values = self.values
        for key in values.keys() - _KEYS:
            self.fail(f"unknown key `{key}`; there are {', '.join(sorted(_KEYS))}", key)
        for key in ("title", "seeds", "methods"):
            if not values.get(key):
                self.fail(f"`{key}` is missing or empty", key)
        for key in _TEXTS:
            if not isinstance(values.get(key, ""), str):
                self.fail(f"`{key}` must be text, got {values[key]!r}", key)
        for key, kind, name in (("settings", dict, "table"), ("grid", dict, "table"), ("methods", list, "list")):
            if not isinstance(values.get(key, kind()), kind):
                self.fail(f"`{key}` must be a {name}", key)
        if not isinstance(values.get("order", 0), int):
            self.fail(f"`order` must be a whole number, got {values['order']!r}", "order")
        show = values.get("show", [])
        if not isinstance(show, list) or any(name not in _SHOWN for name in show):
            self.fail(f"`show` must be a list of {', '.join(_SHOWN)}, got {show!r}", "show")
        if values.get("part", "held_out") not in PARTS:
            self.fail(f"`part` must be one of {', '.join(PARTS)}, got {values['part']!r}", "part")
        self.once(values, values.get("settings", {}), values.get("grid", {}))
        if not values.get("grid", {"": 0}):
            self.fail("`grid` is empty; give it a list, or leave it out", "grid")
        shared = {key: values[key] for key in ("model", "task") if key in values} | values.get("settings", {})
        for key, value in shared.items():
            self.check(key, value, _OWN | {"method", "seed"}, *self.place(key))
        seeds = self.options("seed", values["seeds"], set(), "seeds")
        grid = values.get("grid", {})
        grid = {key: self.options(key, value, _OWN | {"method", "seed"}, "grid", key) for key, value in grid.items()}
        cells = tuple(
            Cell(tuple(point.items()), label, self.runs(shared | point | own, seeds, nth), against)
            for point in _product(grid)
            for nth, label, own, against in self.methods(grid)
        )
        compare = values.get("compare")
        for metrics in [TASKS[cell.runs[0].task].metrics for cell in cells] if compare else ():
            if compare not in (*metrics, "loss"):
                self.fail(f"`compare` must be one of {', '.join(dict.fromkeys((*metrics, 'loss')))}", "compare")
        if not any(cell.is_baseline for cell in cells):
            self.fail('no plain `name = "lora"` to compare with; add it', "methods")
        texts = {key: " ".join(values.get(key, "").split()) for key in ("title", "question", "finding")}
        texts |= {"compare": compare, "part": values.get("part", PARTS[0])}
        if texts["part"] == "test" and not all(run.test for cell in cells for run in cell.runs):
            self.fail("`part` is the test part, which these runs do not keep apart: set `test = true`", "part")
        lines = {key: self.line(*self.place(key)) for key in ("task", "model")}
        show, order = tuple(values.get("show", ())), values.get("order", 100)
        return Study(name=self.path.stem, path=self.path, cells=cells, show=show, order=order, lines=lines, **texts)

    def once(self, top: dict[str, Any], settings: dict[str, Any], grid: dict[str, Any]) -> None:
        """Refuse a key that is given in two places, neither of which overrides the other."""
        twice = [("grid", key) for key in grid.keys() & (settings.keys() | top.keys())]
        twice += [("settings", key) for key in settings.keys() & top.keys()]
        for table, key in twice:
            self.fail(f"`{key}` is given twice, at the top, in `settings` or in `grid`", table, key)

    def methods(self, grid: dict[str, Any]) -> Iterator[tuple[int, str, dict[str, Any], str | None]]:
        """For each method its table in the file, its label, the fields of its runs, and what else it is compared
        with."""
        others = {label for _, label, _, _ in self.each_method(grid)} - {"lora"}  # all are compared with that one
        labels = set()
        for nth, label, own, against in self.each_method(grid):
            if label in labels:
                self.fail(f"`{label}` is listed twice", "methods", nth)
            labels.add(label)
            if against is not None and against not in others - {label}:
                there = ", ".join(sorted(others - {label})) or "no others"
                self.fail(f"`against` is {against!r}; there are {there}", "methods", nth, "against")
            yield nth, label, own, against

    def each_method(self, grid: dict[str, Any]) -> Iterator[tuple[int, str, dict[str, Any], str | None]]:
        for nth, method in enumerate(self.values["methods"]):
            if not isinstance(method, dict) or "name" not in method:
                self.fail("each of `methods` needs a `name`", "methods", nth)
            name = method["name"]
            self.check("method", name, set(), "methods", nth, "name")
            own = {key: value for key, value in method.items() if key not in ("name", "against")}
            for key in own.keys() & grid.keys():
                self.fail(f"`{key}` is given in `grid` as well", "methods", nth, key)
            foreign = (_OWN - METHODS[name].keys()) | {"method", "seed", "model", "task"}
            options = {
                key: self.options(key, value if isinstance(value, list) else [value], foreign, "methods", nth, key)
                for key, value in own.items()
            }
            defaults = METHODS[name]
            for needed in [key for key, value in defaults.items() if value is ... and key not in own]:
                self.fail(f"`{name}` needs a `{needed}`", "methods", nth, "name")
            for point in _product(options):
                words = {key: as_text(value) for key, value in point.items()}
                label = " ".join([name, *(f"{key}={word}" for key, word in words.items())])
                yield nth, label, {"method": name, **defaults, **point}, self.other(method, words, nth)

    def other(self, method: dict[str, Any], words: dict[str, str], nth: int) -> str | None:
        """The label that `against` means, with the method's own value for `{v_threshold}`."""
        try:
            return method["against"].format(**words) if "against" in method else None
        except (AttributeError, KeyError, IndexError, ValueError):
            said = f"`against` must be the label of a method, got {method['against']!r}"
            self.fail(said, "methods", nth, "against")

    def runs(self, values: dict[str, Any], seeds: list[int], nth: int) -> tuple[Run, ...]:
        for needed in ("model", "task", "learning_rate"):
            if needed not in values:
                self.fail(f"`{needed}` is missing: give it in the file, in `settings` or in `grid`", "settings")
        # Numbers of one kind, so that 1 and 1.0 are the same run.
        values = {key: float(v) if "float" in str(_TYPES[key]) and v is not None else v for key, v in values.items()}
        runs = tuple(Run(**values, seed=seed) for seed in seeds)
        try:
            adapter_config(runs[0], "CAUSAL_LM")
        except SpikeLoraError as error:
            self.fail(str(error), "methods", nth, "name")
        return runs

    def options(self, name: str, values: Any, foreign: set[str], *place: str | int) -> list[Any]:
        key = place[-1]
        if not isinstance(values, list) or not values:
            self.fail(f"`{key}` must be a list of at least one value, got {values!r}", *place)
        for value in values:
            self.check(name, value, foreign, *place)
        if len(set(values)) < len(values):
            self.fail(f"`{key}` has a value twice: {values}", *place)
        return values

    def check(self, name: str, value: Any, foreign: set[str], *place: str | int) -> None:
        """Check that a field of a run may be set at this place of the file, and to this value."""
        key = place[-1]
        if name not in _TYPES or name in foreign:
            known = ", ".join(sorted(_TYPES.keys() - foreign))
            self.fail(f"`{key}` has no meaning here; there are {known}", *place)
        kinds = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
        wanted = str(_TYPES[name]).replace("<class '", "").replace("'>", "").split(" | ")[0]
        is_right, words = _LIMITS.get(name, (lambda v: True, ""))
        if not isinstance(value, kinds[wanted]) or isinstance(value, bool) != (wanted == "bool"):
            words = f"of type {wanted}"
        elif wanted == "float" and not abs(value) <= sys.float_info.max:
            words = "finite"
        elif is_right(value):
            return
        self.fail(f"`{key}` must be {words}, got {value!r}", *place)

    def fail(self, message: str, *place: str | int) -> NoReturn:
        raise StudyError(f"{self.path}, line {self.line(*place)}: {message}")

    def place(self, key: str) -> tuple[str, ...]:
        """Where a field that all runs share is given: at the top, in `settings` or in `grid`."""
        return next(((t, key) for t in ("settings", "grid") if key in self.values.get(t, {})), (key,))

    def line(self, *place: str | int) -> int:
        """The line at which a key begins, by the keys and numbers that lead to it; else the line of what contains it.

        It parses the first lines of the file, one more each time, until the key is there.
        """
        lines = self.text.split("\n")
        for depth in range(len(place), 0, -1):
            parsed = 0
            for n in range(1, len(lines) + 1):
                try:
                    values = tomllib.loads("\n".join(lines[:n]))
                except tomllib.TOMLDecodeError:  # in the middle of a value
                    continue
                if _holds(values, place[:depth]):
                    return parsed + 1
                parsed = n
        return 1


def _holds(values: Any, place: tuple[str | int, ...]) -> bool:
    for key in place:
        if not (key in values if isinstance(values, dict) else isinstance(values, list) and key in range(len(values))):
            return False
        values = values[key]
    return True


def as_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _product(options: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))
