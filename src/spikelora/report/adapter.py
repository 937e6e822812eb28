"""What a folder holds of an adapter and of the run that trained it, read from its files without the base model."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from torch import Tensor

from spikelora.errors import SpikeLoraError
from spikelora.peft.adapter_files import check_weights, low_rank_names
from spikelora.peft.config import SpikeLoraConfig
from spikelora.sparsity.meter import SPARSITY_FILE

METRICS_FILE = "metrics.json"
STATE_FILE = "trainer_state.json"
SETTINGS_FILE = "config.yaml"

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module as its tensors are in the file.

    Attributes:
        name: its name in the model that was adapted.
        r: rank, the rows of `lora_A`.
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA.
        v_threshold: firing threshold, in the units of `a / tau`.
        tau: membrane time constant.
        norm_A: Frobenius norm of `lora_A.weight`.
        norm_B: Frobenius norm of `lora_B.weight`, in which scaling is not included.
    """

    name: str
    r: int
    scaling: float
    v_threshold: float
    tau: float
    norm_A: float
    norm_B: float

    @property
    def is_untrained(self) -> bool:
        """Whether B is all 0, as it starts."""
        return self.norm_B == 0


@dataclass(frozen=True)
class Adapter:
    """A sound adapter.

    Attributes:
        folder: its folder.
        config: its configuration.
        modules: in the order of their layers.
        parameters: count of the numbers in its tensors, modules saved whole among them.
        n_bytes: size of the file of its tensors.
        dtypes: names of the dtypes of A and B.
    """

    folder: Path
    config: SpikeLoraConfig
    modules: list[AdaptedModule]
    parameters: int
    n_bytes: int
    dtypes: list[str]


@dataclass(frozen=True)
class MeasuredSparsity:
    """Sparsity as a file in the folder says it.

    Attributes:
        source: name of the file.
        sparsity: share of silent activations over all modules.
        zero_threshold_sparsity: what it would be at `v_threshold = 0`; NaN if the file does not say.
        modules: share of silent activations by module.
        firing_rates: share of the tokens at which each rank spiked, by module; empty if the file does not say.
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
        adapter: the adapter in the folder, or in its last checkpoint if the run has not ended.
        sparsity: as measured, None if no file has it.
        history: what was logged, by name, each value with its step.
        losses: held-out losses by label, such as `before`.
        settings: the resolved flags as text, empty if there are none.
    """

    adapter: Adapter
    sparsity: MeasuredSparsity | None
    history: dict[str, list[tuple[int, float]]]
    losses: dict[str, float]
    settings: str

    def curves(self, name: str) -> dict[str, list[tuple[int, float]]]:
        """What was logged under a name, and then under prefixed names, such as `sparsity` and `eval_sparsity`.

        `train_loss` is left out: the Trainer logs it once, as the mean of the whole training.
        """
        names = [key for key in self.history if key == name or (key.endswith(f"_{name}") and key != "train_loss")]
        return {key: self.history[key] for key in sorted(names, key=lambda key: (key != name, key))}

    def curves_by_kind(self) -> dict[str, list[tuple[int, float]]]:
        """The sparsity in training, by kind of module."""
        prefix = "sparsity/"
        return {key.removeprefix(prefix): v for key, v in self.history.items() if key.startswith(prefix)}


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter and check all of it.

    Raises:
        SpikeLoraError: if it is of another method, damaged or incomplete, with the file, field or module and the
        remedy.
    """
    config = SpikeLoraConfig.from_pretrained(folder)
    tensors = check_weights(folder, needed=True)
    names = low_rank_names(tensors)
    modules = [_module(*item, tensors, config) for item in names.items()]
    modules.sort(key=lambda module: natural(module.name))
    low_rank = [tensors[name] for pair in names.values() for name in pair]
    return Adapter(
        folder=folder,
        config=config,
        modules=modules,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        n_bytes=(folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in low_rank}),
    )


def read_run(folder: Path) -> Run:
    """Read the folder of a run, of one of its checkpoints, or of an adapter alone.

    Raises:
        SpikeLoraError: if there is no sound adapter, or a file next to it cannot be read.
    """
    checkpoint = _last_checkpoint(folder)
    metrics = _read_json(folder / METRICS_FILE)
    adapter = read_adapter(_adapter_in(folder) or (checkpoint and _adapter_in(checkpoint)) or checkpoint or folder)
    state_file = next(
        (path / STATE_FILE for path in (folder, checkpoint) if path and (path / STATE_FILE).exists()), None
    )
    settings = folder / SETTINGS_FILE
    return Run(
        adapter=adapter,
        sparsity=_sparsity(folder, metrics),
        history=_history(state_file) if state_file else {},
        losses=_losses(folder / METRICS_FILE, metrics),
        settings=settings.read_text(errors="replace") if settings.is_file() else "",
    )


def _module(
    name: str, low_rank: tuple[str, str], tensors: Mapping[str, Tensor], config: SpikeLoraConfig
) -> AdaptedModule:
    module = name.removeprefix(_PREFIX)
    a, b = (tensors[part].float() for part in low_rank)
    r = a.shape[0]
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return AdaptedModule(
        name=module,
        r=r,
        scaling=alpha / (math.sqrt(r) if config.use_rslora else r),
        v_threshold=tensors[f"{name}.lora_gate.v_threshold"].item(),
        tau=tensors[f"{name}.lora_gate.tau"].item(),
        norm_A=a.norm().item(),
        norm_B=b.norm().item(),
    )


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key for names of modules that sorts `layers.10` after `layers.9`."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written completely; the Trainer writes its state last."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    numbered = [path for path in complete if path.name.rpartition("-")[2].isdigit()]
    return max(numbered, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _adapter_in(folder: Path) -> Path | None:
    """The folder of the adapter: PEFT saves one that is not called `default` in a subfolder of that name."""
    if (folder / CONFIG_NAME).exists():
        return folder
    named = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    named = [path for path in named if not path.name.startswith("checkpoint-")]
    if len(named) > 1:
        raise SpikeLoraError(f"{folder} holds several adapters. Give the folder of one, such as {named[0]}.")
    return named[0] if named else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file."""
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
    report = _read_json(folder / SPARSITY_FILE)
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
            modules={name.removeprefix(_PREFIX): float(v) for name, v in figures["sparsity_by_module"].items()},
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


def _history(path: Path) -> dict[str, list[tuple[int, float]]]:
    history = defaultdict(list)
    try:
        for entry in _read_json(path)["log_history"]:
            for name, value in entry.items():
                if name != "step" and isinstance(value, int | float):
                    history[name].append((int(entry["step"]), float(value)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return dict(history)
