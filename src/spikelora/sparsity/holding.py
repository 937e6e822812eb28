"""Holding the sparsity at a target in transformers' Trainer and those of TRL."""

import math
import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from spikelora.errors import SpikeLoraError
from spikelora.method.neuron import charge
from spikelora.method.sharding import add_up_processes, own_shard, whole
from spikelora.sparsity.meter import SparsityMeter
from spikelora.sparsity.observe import (
    Gated,
    configs_of,
    gates,
    observing,
    refuse_data_parallel,
)
from spikelora.sparsity.quantiles import common_threshold

_START = 0.5  # where targets begin: the sparsity of a symmetric activation at threshold 0
_SAMPLE = 2**12  # elements from which a quantile is taken; at 0.97 it is off by 0.003, and the steps average that
_JUDGED = 0.1  # the last share of the training, in which the sparsity has to be near the target


class SparsityControlCallback(TrainerCallback, ExportableState):
    """Holds an adapter, or each of its modules, at the `target_sparsity` of its configuration during training.

    After each step the threshold moves a part of the way to the target quantile of the module's own activations in that
    step, `v_threshold += gain * (quantile(v, target) - v_threshold)`, with the mean quantile over micro-batches and
    processes. After the first step it moves all the way, wherever it was. With `target_scope="adapter"` it is the
    quantile of all modules' activations together, see `quantiles.common_threshold`. The target itself rises over the
    first steps from 0.5, the sparsity of a symmetric activation at threshold 0. This wakes modules that never fire,
    because their thresholds fall to their activations. The thresholds are saved with the adapter, in checkpoints and at
    the end. The callback holds the sparsity of the training, with its dropout. Without dropout, as in evaluation,
    activations vary less and the sparsity is higher.

    Args:
        warmup_ratio: share of the training over which the target rises.
        gain: share of the way that a threshold moves in one step.

    Raises:
        SpikeLoraError: at the start of the training, if no active adapter has a `target_sparsity`, if the training
            resumes from a checkpoint without the checkpoint's thresholds, and under `torch.nn.DataParallel`.
    """

    def __init__(self, warmup_ratio: float = 0.1, gain: float = 0.1) -> None:
        if not (_is_number(warmup_ratio) and 0 <= warmup_ratio <= 1):
            raise SpikeLoraError(f"`warmup_ratio` must be a share from 0 to 1, got {warmup_ratio!r}. Leave it at 0.1.")
        if not (_is_number(gain) and 0 < gain <= 1):
            raise SpikeLoraError(f"`gain` must be above 0 and at most 1, got {gain!r}. Leave it at 0.1.")
        self.warmup_ratio = warmup_ratio
        self.gain = gain
        self._context = ExitStack()

    def state(self) -> dict[str, Any]:
        return {"args": {"warmup_ratio": self.warmup_ratio, "gain": self.gain}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._context.close()
        refuse_data_parallel(args.n_gpu)
        found = gates(model)
        configs = configs_of(model)
        # Only adapters that are trained: a reference policy has the configuration of the adapter that it copies.
        targets = {gated: configs[gated.adapter].target_sparsity for gated in found if gated.is_active}
        self._targets = {gated: target for gated, target in targets.items() if target is not None}
        self._goals = {g.adapter: (target, configs[g.adapter].target_tolerance) for g, target in self._targets.items()}
        if not self._targets:
            raise SpikeLoraError(
                "SparsityControlCallback has no target. Set `SpikeLoraConfig(target_sparsity=...)`, or leave the "
                "callback out."
            )
        dropout = max(configs[adapter].lora_dropout for adapter in self._goals)
        if dropout and state.is_world_process_zero:
            warnings.warn(
                f"`target_sparsity` is held under `lora_dropout={dropout:g}`; without it, as in evaluation, the "
                "sparsity is higher. Leave `lora_dropout=0`, or call `calibrate_thresholds` after the training.",
                RuntimeWarning,
                stacklevel=2,
            )
        # If the checkpoint's training had no such callback, its thresholds are set as at a start.
        self._is_new = state.global_step == 0 or type(self).__name__ not in state.stateful_callbacks
        if not self._is_new and all(self._is_at_start(gated, configs[gated.adapter]) for gated in self._targets):
            # Checkpoints of FSDP2 that earlier versions wrote lack the thresholds that the callback had set.
            raise SpikeLoraError(
                "Each `v_threshold` is from before the training, not from the checkpoint. Load them, too, by "
                "`model.load_adapter(checkpoint, adapter_name, is_trainable=True)` before the Trainer resumes."
            )
        self._is_common = {adapter: configs[adapter].target_scope == "adapter" for adapter in self._goals}
        self._seen: dict[Gated, Tensor] = {}
        self._samples: dict[Gated, list[tuple[Tensor, Tensor]]] = {}
        self._set_progress(state)
        self._context.enter_context(observing(model, self._see))
        self._meter = self._context.enter_context(SparsityMeter(model, training=True))

    @torch.no_grad()
    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._add_common()

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._add_common()
        # In the same order in all processes, even for a module that ran in only some of them.
        sums = torch.stack([self._seen.get(g, torch.zeros(2)).to(args.device) for g in self._targets])
        self._seen.clear()
        add_up_processes(sums)
        gain = 1.0 if self._is_new else self.gain
        self._is_new = False
        for gated, (total, count) in zip(self._targets, sums, strict=True):
            v_threshold = own_shard(gated.gate.v_threshold)
            moved = v_threshold.lerp((total / count.clamp(min=1)).to(v_threshold), gain)
            v_threshold.copy_(torch.where(count.to(v_threshold.device) > 0, moved, v_threshold))
        self._set_progress(state)
        if state.global_step <= (1 - _JUDGED) * state.max_steps:
            self._meter.reset()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        report = self._meter.report()
        self._context.close()
        if state.global_step < (1 - _JUDGED) * state.max_steps:
            if state.is_world_process_zero:
                warnings.warn(
                    f"The training ended after {state.global_step} of {state.max_steps} steps, before it was judged "
                    "whether `target_sparsity` was reached: measure it with a `SparsityMeter`.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
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

    @staticmethod
    def _is_at_start(gated: Gated, config: Any) -> bool:
        starts = torch.tensor([config.v_threshold, *config.threshold_pattern.values()], dtype=torch.float32)
        return bool((whole(gated.gate.v_threshold.detach()).cpu() == starts).any())

    def _set_progress(self, state: TrainerState) -> None:
        n_warmup = self.warmup_ratio * state.max_steps
        self._progress = min(1.0, state.global_step / n_warmup) if n_warmup else 1.0

    def _see(self, gated: Gated, a: Tensor, mask: Tensor | None) -> None:
        if gated not in self._targets or not gated.gate.training or not a.numel():
            return
        tokens = _sample(a)
        v = charge(a[tokens], gated.gate.neuron()[1])
        if mask is not None:
            v = v.masked_fill(~mask[tokens, None], torch.nan)
        if self._is_common[gated.adapter]:
            v = v.flatten().float()
            weights = torch.full_like(v, a.numel() / v.numel())
            self._samples.setdefault(gated, []).append((v, weights))
        else:
            self._add(gated, v.nanquantile(self._target_now(gated)))

    def _add_common(self) -> None:
        """After a micro-batch, give each module its quantile from the activations of all modules of its adapter."""
        for adapter in self._goals:
            shown = {gated: parts for gated, parts in self._samples.items() if gated.adapter == adapter}
            if shown:
                device = next(iter(shown.values()))[0][0].device  # a model may be on several devices
                values, weights = (
                    [torch.cat([part[n] for part in parts]).to(device) for parts in shown.values()] for n in (0, 1)
                )
                found = common_threshold(values, weights, self._target_now(next(iter(shown))))
                for gated, v_threshold in zip(shown, found, strict=True):
                    self._add(gated, v_threshold)
        self._samples.clear()

    def _target_now(self, gated: Gated) -> float:
        target = self._targets[gated]
        start = min(_START, target)
        return start + (target - start) * self._progress

    def _add(self, gated: Gated, v_threshold: Tensor) -> None:
        is_known = v_threshold.isfinite()
        new = torch.stack((torch.where(is_known, v_threshold, 0), is_known.to(v_threshold.dtype)))
        self._seen[gated] = self._seen[gated] + new if gated in self._seen else new


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sample(a: Tensor) -> Tensor | slice:
    """Which tokens of `a (N, r)` to sample: whole tokens, so that every rank has its share, spread over all.

    Every k-th token could be the first of its row each time. Steps of the golden ratio have no period.
    """
    n_tokens, wanted = a.shape[0], max(1, _SAMPLE // a.shape[1])
    if n_tokens <= wanted:
        return slice(None)
    step = next(s for s in range(round(n_tokens * (math.sqrt(5) - 1) / 2), n_tokens) if math.gcd(s, n_tokens) == 1)
    return torch.arange(wanted, device=a.device) * step % n_tokens
