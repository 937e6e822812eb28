"""Watching the sparsity in transformers' Trainer and those of TRL."""

import functools
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from spikelora.errors import SpikeLoraError
from spikelora.method.sharding import whole
from spikelora.sparsity.holding import SparsityControlCallback
from spikelora.sparsity.meter import SPARSITY_FILE, SparsityMeter, SparsityReport
from spikelora.sparsity.observe import gates, refuse_data_parallel

_COLLAPSE = 0.999  # overall silence that is warned of
_NAMED = 8  # modules in one warning
_PAUSE = 10.0  # seconds between two writings of the log, which grows
_REMEDY = (
    "Lower `v_threshold`, set it by `calibrate_thresholds(model, batches, target_sparsity=...)` before the training, "
    "or hold the sparsity by `target_sparsity` and a `SparsityControlCallback`."
)


class SparsityCallback(TrainerCallback):
    """Logs the sparsity of all spiking adapters to whatever the trainer reports to.

        trainer.add_callback(SparsityCallback(trainer))

    With each training loss it logs `sparsity`, `silent_tokens` and `zero_threshold_sparsity` of everything since the
    last one, and `sparsity/<kind>` by kind of module, of the adapters that are active when the training begins. With
    each evaluation it logs the same over the whole evaluation set, as `eval_sparsity` and so on. These are also in the
    metrics that `evaluate()` returns; a search for hyperparameters that adds up all metrics then needs an objective of
    its own. The evaluation by module and rank is left as `sparsity.json` in the trainer's `output_dir`, for
    `spikelora report`. So is the Trainer's own log, as `trainer_state.json`, at most every ten seconds and when the
    training ends. It warns of modules that cannot learn, because they never fired and their B is still 0, and of a
    model that has fallen silent. It does not warn of adapters that a `SparsityControlCallback` holds at a
    `target_sparsity`.

    Args:
        trainer: the trainer that it is added to, whose model has a spiking adapter.

    Raises:
        SpikeLoraError: if the model has none, and under `torch.nn.DataParallel`.
    """

    def __init__(self, trainer: Trainer) -> None:
        if not isinstance(trainer, Trainer):
            raise SpikeLoraError(
                f"`trainer` must be the trainer that the callback is added to, got a {type(trainer).__name__}. Call "
                "`trainer.add_callback(SparsityCallback(trainer))`."
            )
        refuse_data_parallel(trainer.args.n_gpu)
        self._trainer = trainer
        self._model = trainer.model
        self._training = self._evaluation = _meter(self._model)
        self._fired: set[str] = set()
        self._warned: set[str] = set()
        self._wrote_log = -math.inf
        # No event announces an evaluation, so the meter is put around the method that runs it. What a callback adds to
        # logs comes too late for earlier reporters, and what it logs at the next event misses the checkpoint of this
        # step. So a second log follows the loss's, after TRL's trainers have emptied theirs.
        evaluation_loop, log = trainer.evaluation_loop, trainer.log
        # If TRL's trainers log completions, each of their logs shows and writes all of them again.
        self._log = functools.partial(Trainer.log, trainer) if getattr(trainer, "log_completions", False) else log

        @functools.wraps(evaluation_loop)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._evaluation = _meter(self._model)
            with self._evaluation:
                return evaluation_loop(*args, **kwargs)

        @functools.wraps(log)
        def followed(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            log(logs, *args, **kwargs)
            if "loss" in logs and (figures := self._of_training()):
                self._log(figures, *args, **kwargs)
            if time.monotonic() - self._wrote_log >= _PAUSE:
                self._write_log()

        trainer.evaluation_loop, trainer.log = metered, followed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._training.__exit__()  # a training before this one may have been interrupted
        if model is not self._model:  # the trainer has made a new model, with `model_init`
            self._model = model
            self._fired, self._warned = set(), set()
        self._training = _meter(model, training=True)
        self._training.__enter__()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training.__exit__()
        self._of_training()  # warn of what came after the last log of a loss
        self._write_log()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        report = self._evaluation.report()
        runtimes = [name for name in metrics if name.endswith("_runtime")]
        prefix = min(runtimes, key=len).removesuffix("runtime") if runtimes else "eval_"
        if report.tokens:
            figures = _figures(report, prefix)
            metrics.update(figures)
            self._log(figures)
            if state.is_world_process_zero:
                with _replacing(Path(args.output_dir, SPARSITY_FILE)) as partial:
                    partial.write_text(json.dumps(report.to_dict(), indent=2) + "\n")

    def _write_log(self) -> None:
        """What checkpoints have too, for those who look at the run between them."""
        if self._trainer.is_world_process_zero():
            with _replacing(Path(self._trainer.args.output_dir, TRAINER_STATE_NAME)) as partial:
                # What `save_to_json` writes, of values too that are no JSON: no training is to end for its log.
                partial.write_text(json.dumps(asdict(self._trainer.state), default=str) + "\n")
        self._wrote_log = time.monotonic()

    def _of_training(self) -> dict[str, float]:
        """The figures since the last call, and warnings of what they show."""
        report = self._training.report()
        self._training.reset()
        if not report.tokens:
            return {}
        warned = self._warnings(report)  # in all processes, because they may hold shards of B
        if self._trainer.is_world_process_zero():
            for warning in warned:
                warnings.warn(f"{warning} {_REMEDY}", RuntimeWarning, stacklevel=2)
        return _figures(report, "")

    def _warnings(self, report: SparsityReport) -> list[str]:
        callbacks = self._trainer.callback_handler.callbacks
        is_held = any(isinstance(other, SparsityControlCallback) for other in callbacks)
        configs: Any = getattr(self._model, "peft_config", {}) if is_held else {}
        held = {name for name, config in configs.items() if getattr(config, "target_sparsity", None) is not None}
        own = {name: module for name, module in report.modules.items() if module.adapter not in held}
        if not own:
            return []
        found = []
        self._fired |= {name for name, module in own.items() if module.sparsity < 1}
        silent = own.keys() - self._fired - self._warned
        gated = {(g.module, g.adapter): g for g in gates(self._model)} if silent else {}
        dead = []
        for name in sorted(silent):
            module = report.modules[name]
            layer: Any = gated[module.module, module.adapter].layer
            if module.tokens and not whole(layer.low_rank(module.adapter)[1]).any():
                dead.append(name)
        if dead:
            self._warned.update(dead)
            names = ", ".join(dead[:_NAMED]) + (f", and {len(dead) - _NAMED} more" if len(dead) > _NAMED else "")
            found.append(
                f"{len(dead)} of {len(own)} modules have never fired, and cannot learn while they are "
                f"silent, as their B is still 0: {names}."
            )
        if report.sparsity > _COLLAPSE and "" not in self._warned:
            self._warned.add("")
            found.append(f"The adapter has fallen silent: sparsity {report.sparsity:.2%}.")
        return found


def _meter(model: nn.Module, training: bool | None = None) -> SparsityMeter:
    """A meter of the adapters that are active now: a reference policy, for example, is left out."""
    active = {gated.adapter for gated in gates(model) if gated.is_active}
    return SparsityMeter(model, training, active or None)  # none, if a LoRA beside them is trained


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A place to write to, which takes the file's when it is whole: another process may read it at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    yield partial
    os.replace(partial, file)


def _figures(report: SparsityReport, prefix: str) -> dict[str, float]:
    figures = {name: getattr(report, name) for name in ("sparsity", "silent_tokens", "zero_threshold_sparsity")}
    figures |= {f"sparsity/{kind}": shares.sparsity for kind, shares in report.kinds.items() if shares.tokens}
    return {prefix + name: value for name, value in figures.items()}
