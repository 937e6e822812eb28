"""Callbacks for transformers' Trainer and those of TRL: watching the sparsity, and holding it at a target."""

import warnings
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from spikelora.errors import SpikeLoraError
from spikelora.neuron import charge
from spikelora.observe import Gated, gates, observing
from spikelora.sparsity import SparsityMeter, SparsityReport

_COLLAPSE = 0.999  # overall silence that is warned of
_NAMED = 8  # modules in one warning
_START = 0.5  # where targets begin: what a symmetric activation has at threshold 0
_SAMPLE = 2**12  # elements that a quantile is taken of; at 0.97 it is off by 0.003, which the steps average
_JUDGED = 0.1  # last share of the training, whose sparsity has to be near the target
_REMEDY = (
    "Lower `v_threshold`, set it by `calibrate_thresholds(model, batches, target_sparsity=...)` before the training, "
    "or hold the sparsity by `target_sparsity` and a `SparsityControlCallback`."
)


class SparsityCallback(TrainerCallback):
    """Logs the sparsity of all spiking adapters to whatever the trainer reports to.

        trainer.add_callback(SparsityCallback(trainer))

    With each training loss: `sparsity`, `silent_tokens` and `zero_threshold_sparsity` of everything since the last one,
    and `sparsity/<kind>` by kind of module. With each evaluation the same over the whole evaluation set, as
    `eval_sparsity` and so on, which are also put into the metrics that `evaluate()` returns. Warns of modules that
    cannot learn, as they never fired and their B is still 0, and of a model that has fallen silent.

    Args:
        trainer: the trainer that it is added to, whose model has a spiking adapter.

    Raises:
        SpikeLoraError: where it has none.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._training = SparsityMeter(trainer.model, training=True)
        # Attached for good: no event announces an evaluation.
        self._evaluation = SparsityMeter(trainer.model, training=False).__enter__()
        self._fired: set[str] = set()
        self._warned: set[str] = set()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._training.__exit__()  # a training before this one may have been interrupted
        self._training.reset()
        self._training.__enter__()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._training.__exit__()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._evaluation.reset()  # what ran in evaluation mode without being an evaluation

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs:
            return
        report = self._training.report()
        self._training.reset()
        if not report.tokens:
            return
        # Logged beside, not added to `logs`: reporters that come before this callback have read those already.
        self._trainer.log(_figures(report, ""))
        if state.is_world_process_zero:
            self._warn(report)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        report = self._evaluation.report()
        self._evaluation.reset()
        prefix = next((name.removesuffix("runtime") for name in metrics if name.endswith("_runtime")), "eval_")
        if report.tokens:
            figures = _figures(report, prefix)
            metrics.update(figures)
            self._trainer.log(figures)

    def on_predict(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._evaluation.reset()

    def _warn(self, report: SparsityReport) -> None:
        self._fired |= {name for name, module in report.modules.items() if module.sparsity < 1}
        silent = report.modules.keys() - self._fired - self._warned
        gated = {(g.module, g.adapter): g for g in gates(self._trainer.model)} if silent else {}
        dead = []
        for name in sorted(silent):
            module = report.modules[name]
            layer: Any = gated[module.module, module.adapter].layer
            if module.tokens and not layer.lora_B[module.adapter].weight.any():
                dead.append(name)
        if dead:
            self._warned.update(dead)
            names = ", ".join(dead[:_NAMED]) + (f", and {len(dead) - _NAMED} more" if len(dead) > _NAMED else "")
            warnings.warn(
                f"{len(dead)} of {len(report.modules)} modules have never fired, and cannot learn while they are "
                f"silent, as their B is still 0: {names}. {_REMEDY}",
                RuntimeWarning,
                stacklevel=2,
            )
        if report.sparsity > _COLLAPSE and "" not in self._warned:
            self._warned.add("")
            warnings.warn(
                f"The adapter has fallen silent: sparsity {report.sparsity:.2%}. {_REMEDY}",
                RuntimeWarning,
                stacklevel=2,
            )


def _figures(report: SparsityReport, prefix: str) -> dict[str, float]:
    figures = {name: getattr(report, name) for name in ("sparsity", "silent_tokens", "zero_threshold_sparsity")}
    figures |= {f"sparsity/{kind}": shares.sparsity for kind, shares in report.kinds.items() if shares.tokens}
    return {prefix + name: value for name, value in figures.items()}


class SparsityControlCallback(TrainerCallback, ExportableState):
    """Holds each module at the `target_sparsity` of its configuration while it is trained.

    After each step the threshold goes a part of the way to the target quantile of the module's own activations in that
    step, `v_threshold += gain * (quantile(v, target) - v_threshold)`, averaged over micro-batches and processes. The
    target itself rises from 0.5, what a symmetric activation has at threshold 0, over the first steps. A module that
    never fires comes back to life so, as its threshold falls to its activations. The thresholds are saved with the
    adapter, in checkpoints as at the end.

    Args:
        warmup_ratio: share of the training over which the target rises.
        gain: share of the way that a threshold goes in one step.

    Raises:
        SpikeLoraError: at the start of the training, where no spiking adapter has a `target_sparsity`.
    """

    def __init__(self, warmup_ratio: float = 0.1, gain: float = 0.1) -> None:
        for name, value in (("warmup_ratio", warmup_ratio), ("gain", gain)):
            if not 0 <= value <= 1 or (name == "gain" and not value):
                raise SpikeLoraError(f"`{name}` must be a share between 0 and 1, got {value!r}.")
        self.warmup_ratio = warmup_ratio
        self.gain = gain
        self._context = ExitStack()

    def state(self) -> dict[str, Any]:
        return {"args": {"warmup_ratio": self.warmup_ratio, "gain": self.gain}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._context.close()
        configs: Any = model.peft_config
        targets = {gated: configs[gated.adapter].target_sparsity for gated in gates(model)}
        self._targets = {gated: target for gated, target in targets.items() if target is not None}
        self._goals = {g.adapter: (target, configs[g.adapter].target_tolerance) for g, target in self._targets.items()}
        if not self._targets:
            raise SpikeLoraError(
                "SparsityControlCallback has no target: set `SpikeLoraConfig(target_sparsity=...)`, or leave it out."
            )
        self._is_new = state.global_step == 0
        self._quantiles: dict[Gated, list[Tensor]] = defaultdict(list)
        self._set_progress(state)
        self._context.enter_context(observing(model, self._see))
        self._meter = self._context.enter_context(SparsityMeter(model, training=True))

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # In the same order in all processes, also for a module that ran in some of them only.
        seen = [torch.stack(self._quantiles[g] or [g.gate.tau.new_full((), torch.nan)]) for g in self._targets]
        self._quantiles.clear()
        gain = 1.0 if self._is_new else self.gain
        self._is_new = False
        for gated, mean, is_known in zip(self._targets, *_means(seen), strict=True):
            v_threshold = gated.gate.v_threshold
            v_threshold.copy_(torch.where(is_known, v_threshold.lerp(mean, gain), v_threshold))
        self._set_progress(state)
        if state.global_step <= (1 - _JUDGED) * state.max_steps:
            self._meter.reset()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        report = self._meter.report()
        self._context.close()
        for adapter, (target, tolerance) in self._goals.items():
            modules = [module for module in report.modules.values() if module.adapter == adapter and module.tokens]
            elements = [module.tokens * len(module.firing_rates) for module in modules]
            if not modules:
                continue
            sparsity = sum(m.sparsity * n for m, n in zip(modules, elements, strict=True)) / sum(elements)
            if abs(sparsity - target) > tolerance and state.is_world_process_zero:
                warnings.warn(
                    f"Adapter {adapter!r} ended at a sparsity of {sparsity:.3f}, further from its `target_sparsity` "
                    f"{target:g} than its `target_tolerance` {tolerance:g}: train for more steps, or with a lower "
                    "learning rate at the end.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _set_progress(self, state: TrainerState) -> None:
        n_warmup = self.warmup_ratio * state.max_steps
        self._progress = min(1.0, state.global_step / n_warmup) if n_warmup else 1.0

    def _see(self, gated: Gated, a: Tensor, mask: Tensor | None) -> None:
        if gated not in self._targets or not gated.gate.training:
            return
        stride = -(-a.numel() // _SAMPLE)  # whole tokens, so that every rank has its share
        v = charge(a[::stride], gated.gate.neuron()[1])
        if mask is not None:
            v = v.masked_fill(~mask[::stride, None], torch.nan)
        target = self._targets[gated]
        start = min(_START, target)
        self._quantiles[gated].append(v.nanquantile(start + (target - start) * self._progress))


def _means(quantiles: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Mean of each tensor's finite elements over all processes, and whether there are any."""
    device = quantiles[0].device
    finite = [q.isfinite() for q in quantiles]
    sums = torch.stack([torch.where(f, q, 0).sum().to(device) for q, f in zip(quantiles, finite, strict=True)])
    counts = torch.stack([f.sum().to(device) for f in finite])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(counts)
    devices = [q.device for q in quantiles]
    means, is_known = sums / counts.clamp(min=1), counts > 0
    return [m.to(d) for m, d in zip(means, devices, strict=True)], [
        k.to(d) for k, d in zip(is_known, devices, strict=True)
    ]
