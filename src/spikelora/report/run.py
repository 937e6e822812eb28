"""What a folder holds of a run, read from its files while it goes on or when it has ended."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from spikelora.errors import SpikeLoraError
from spikelora.report.adapter import PREFIX, Adapter, natural, read_adapter
from spikelora.sparsity.meter import SPARSITY_FILE

METRICS_FILE = "metrics.json"
STATE_FILE = "trainer_state.json"
SETTINGS_FILE = "config.yaml"


@dataclass(frozen=True)
class MeasuredSparsity:
    """Sparsity as a file in the folder says it.

    Attributes:
        source: name of that file.
        sparsity: share of silent activations over all modules.
        zero_threshold_sparsity: what it would be at `v_threshold = 0`; NaN where the file does not say.
        modules: share of silent activations by module.
        firing_rates: share of the tokens at which each rank spiked, by module; empty where the file does not say.
    """

    source: str
    sparsity: float
    zero_threshold_sparsity: float
    modules: dict[str, float]
    firing_rates: dict[str, list[float]]


@dataclass(frozen=True)
class Run:
    """An adapter and what its folder says of its training.

    Attributes:
        folder: of the run.
        adapter: the adapter in the folder, or in its last checkpoint where the run has not ended; None where it has
            logged something, and saved none yet.
        sparsity: as measured, None where no file has it.
        history: what was logged, by name, each value with its step.
        steps: how many updates were made, and how many were to be made; 0 where the folder does not say.
        losses: held-out losses by label, such as `before`.
        settings: the resolved flags as text, empty where there are none.
    """

    folder: Path
    adapter: Adapter | None
    sparsity: MeasuredSparsity | None
    history: dict[str, list[tuple[int, float]]]
    steps: tuple[int, int]
    losses: dict[str, float]
    settings: str

    def curves(self, name: str) -> dict[str, list[tuple[int, float]]]:
        """What was logged under a name and, behind it, under prefixed ones, such as `sparsity` and `eval_sparsity`.

        Without `train_loss`, which the Trainer logs once, as the mean of the whole training.
        """
        names = [key for key in self.history if key == name or (key.endswith(f"_{name}") and key != "train_loss")]
        return {key: self.history[key] for key in sorted(names, key=lambda key: (key != name, key))}

    def curves_by_kind(self) -> dict[str, list[tuple[int, float]]]:
        """The sparsity in training, by kind of module."""
        prefix = "sparsity/"
        return {key.removeprefix(prefix): v for key, v in self.history.items() if key.startswith(prefix)}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the run of a spiking adapter and, behind it, those to compare it with, which may be of LoRA.

    Raises:
        SpikeLoraError: as `read_run`.
    """
    return [read_run(folder, spiking=number == 0) for number, folder in enumerate(folders)]


def read_run(folder: Path, spiking: bool = True) -> Run:
    """Read the folder of a run, of one of its checkpoints, or of an adapter alone.

    Args:
        folder: of the run.
        spiking: whether its adapter has to be a spiking one; else it may be a LoRA.

    Raises:
        SpikeLoraError: where there is no sound adapter, or a file beside it cannot be read.
    """
    checkpoint = _last_checkpoint(folder)
    metrics = read_json(folder / METRICS_FILE)
    steps, history = max(
        (_state(path / STATE_FILE) for path in (folder, checkpoint) if path and (path / STATE_FILE).exists()),
        key=lambda state: state[0],
        default=((0, 0), {}),
    )
    place = _adapter_in(folder) or (checkpoint and _adapter_in(checkpoint))
    settings = folder / SETTINGS_FILE
    return Run(
        folder=folder,
        adapter=read_adapter(place or folder, spiking) if place or not history else None,
        sparsity=_sparsity(folder, metrics),
        history=history,
        steps=steps,
        losses=_losses(folder / METRICS_FILE, metrics),
        settings=settings.read_text(errors="replace") if settings.is_file() else "",
    )


def _last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; the Trainer's state is what it writes last."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    numbered = [path for path in complete if path.name.rpartition("-")[2].isdigit()]
    return max(numbered, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _adapter_in(folder: Path) -> Path | None:
    """Where a folder has its adapter: PEFT saves one that is not called `default` in a folder of its name."""
    if (folder / CONFIG_NAME).exists():
        return folder
    named = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    named = [path for path in named if not path.name.startswith("checkpoint-")]
    if len(named) > 1:
        raise SpikeLoraError(f"{folder} holds several adapters. Give the folder of one, such as {named[0]}.")
    return named[0] if named else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file.

    Raises:
        SpikeLoraError: where it cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}")
    return content


def _damaged(path: Path, reason: object) -> SpikeLoraError:
    return SpikeLoraError(f"{path} is damaged ({reason}). Copy the run again, or take the file away to go without it.")


def _sparsity(folder: Path, metrics: dict[str, Any]) -> MeasuredSparsity | None:
    report = read_json(folder / SPARSITY_FILE)
    try:
        if report:
            return MeasuredSparsity(
                source=SPARSITY_FILE,
                sparsity=float(report["sparsity"]),
                zero_threshold_sparsity=float(report["zero_threshold_sparsity"]),
                modules={name: float(module["sparsity"]) for name, module in report["modules"].items()},
                firing_rates={
                    name: [float(rate) for rate in report["modules"][name]["firing_rates"]]
                    for name in sorted(report["modules"], key=natural)
                },
            )
        figures = metrics.get("spikelora", {})
        if "sparsity_by_module" not in figures:
            return None
        return MeasuredSparsity(
            source=METRICS_FILE,
            sparsity=float(figures["sparsity"]),
            zero_threshold_sparsity=float(figures.get("zero_threshold_sparsity", math.nan)),
            modules={name.removeprefix(PREFIX): float(v) for name, v in figures["sparsity_by_module"].items()},
            firing_rates={},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        name = SPARSITY_FILE if report else METRICS_FILE
        raise _damaged(folder / name, f"{type(error).__name__}: {error}") from error


def _losses(path: Path, metrics: dict[str, Any]) -> dict[str, float]:
    labels = {"before": "before the training", "spikelora": "SpikeLoRA", "lora": "LoRA"}
    try:
        return {label: float(metrics[key]["loss"]) for key, label in labels.items() if "loss" in metrics.get(key, ())}
    except (TypeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _state(path: Path) -> tuple[tuple[int, int], dict[str, list[tuple[int, float]]]]:
    """The steps and the history in a state that a Trainer has written."""
    history = defaultdict(list)
    state = read_json(path)
    try:
        for entry in state["log_history"]:
            for name, value in entry.items():
                if name != "step" and isinstance(value, int | float):
                    history[name].append((int(entry["step"]), float(value)))
        steps = int(state["global_step"]), int(state.get("max_steps", 0))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return steps, dict(history)
