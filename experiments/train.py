"""One run: a model with an adapter trained on a task, and its results, which depend only on the seed."""

import datetime
import math
import platform
import time
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_scheduler, set_seed

import spikelora
from spikelora import SparsityControlCallback, SparsityMeter, SparsityReport

from . import models
from .methods import adapt, fired
from .study import Run
from .tasks import METRICS, TASKS, Task, batches_of, encode

_EVAL_BATCH = 64


def processes() -> PartialState:
    """The processes of `accelerate launch`; on a machine without a GPU they must be asked for with `cpu=True`."""
    return PartialState(cpu=not torch.cuda.is_available())


class Diverged(Exception):
    """The loss is not finite any more."""


def train(run: Run, bar: bool = False) -> dict[str, Any]:
    """Train a run and return `result`, `versions` and `where` of its line; on a CPU `result` is always the same.

    Raises:
        Diverged: if the loss is not finite.
    """
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # because two runs at once are faster than one run on two cores
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result, seconds = _Training(run, bar).run()
    finally:
        torch.set_num_threads(threads)
    # The package's own warnings belong to the result; those of the libraries do not.
    result["warnings"] = [str(w.message) for w in caught if w.category is RuntimeWarning]
    where = {
        "device": _device(),
        "threads": 1,
        "processes": processes().num_processes,
        **seconds,
        "total_seconds": time.perf_counter() - started,
    }
    where["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"status": "done", "result": result, "versions": versions(), "where": where}


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "peft", "transformers")}
    return {"python": platform.python_version(), **packages, "spikelora": spikelora.__version__}


def _device() -> str:
    """Kind of the device, no name of a machine."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"one CPU core, {platform.machine()}"


class _Training:
    def __init__(self, run: Run, bar: bool) -> None:
        self.settings, self.bar = run, bar
        self.task: Task = TASKS[run.task]
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        set_seed(run.seed)
        base, self.tokenizer = models.load(run.model, self.task)
        task_type = "CAUSAL_LM" if self.task.is_language else "SEQ_CLS"
        self.model = adapt(base, run, task_type).to(self.device)
        self.train_rows, self.held_out, self.test_rows = self._rows()
        self.adapters = [
            (name.replace("base_model.model.", "").partition(".lora_")[0], "A" if ".lora_A." in name else "B", p)
            for name, p in self.model.named_parameters()
            if p.requires_grad and (".lora_A." in name or ".lora_B." in name)
        ]
        self.has_gates = not run.method.startswith("lora")

    def _rows(self) -> tuple[list[dict], list[dict], list[dict]]:
        run = self.settings
        parts = self.task.load(bool(run.test))
        train, held_out, test = (encode(rows, self.tokenizer, run.max_length) for rows in parts)
        # If the training rows are limited, each seed draws its own; the held-out rows are the same for all.
        train, held_out = _some(train, run.train_rows, run.seed), _some(held_out, run.eval_rows, 0)
        return train, held_out, _some(test, run.eval_rows, 0) if run.test else []

    def run(self) -> tuple[dict[str, Any], dict[str, float]]:
        run = self.settings
        order = np.random.default_rng(run.seed)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        steps = run.epochs * math.ceil(len(self.train_rows) / run.batch_size)
        optimizer = torch.optim.AdamW(self._groups(), lr=run.learning_rate)
        scheduler = get_scheduler(run.schedule, optimizer, math.ceil(run.warmup * steps), steps)
        state = SimpleNamespace(global_step=0, max_steps=steps, is_world_process_zero=True)
        trained = self.accelerator.prepare(self.model)
        control = self._control(state)
        start = end = self.evaluate(self.held_out)
        history, norms_of_epochs = [], []
        wall = cpu = 0.0
        with tqdm(total=steps, unit="step", leave=False, disable=None if self.bar else True) as bar:
            for _ in range(run.epochs):
                wall_begin, cpu_begin = time.perf_counter(), time.process_time()
                trained.train()
                loss_sum, norms = torch.zeros((), device=self.device), []
                batches = batches_of(self.train_rows, run.batch_size, order)
                for batch in batches:
                    mine = batch[rank::processes] or batch[:1]  # every process takes part in each step
                    loss = trained(**self._collate([self.train_rows[n] for n in mine])).loss
                    penalty = 0.0 if run.penalty is None else run.penalty * fired(self.model)
                    self.accelerator.backward(loss + penalty)
                    norms.append(torch.stack(torch._foreach_norm([p.grad for *_, p in self.adapters])))
                    nn.utils.clip_grad_norm_(self._trained(), run.clipping)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    loss_sum += loss.detach()
                    state.global_step += 1
                    if control:
                        control.on_step_end(self._arguments(), state, None)
                    bar.update()
                norms_of_epochs.append(torch.stack(norms).mean(0).cpu())  # which waits for the device
                wall += time.perf_counter() - wall_begin
                cpu += time.process_time() - cpu_begin
                train_loss = self.accelerator.reduce(loss_sum, "mean").item() / len(batches)
                if not math.isfinite(train_loss):
                    raise Diverged(f"the loss is not finite after {state.global_step} of {steps} steps")
                end = self.evaluate(self.held_out)
                history.append({"train_loss": train_loss, **_brief(end)})
        if control:
            control.on_train_end(self._arguments(), state, None)
        result = self._result(start, end, history, norms_of_epochs, steps)
        return result, {"training_seconds": wall, "training_cpu_seconds": cpu}

    def _result(self, start: dict, end: dict, history: list[dict], norms: list[Tensor], steps: int) -> dict[str, Any]:
        # As many rows as are held out, so that both losses are equally noisy.
        again = self.evaluate(_some(self.train_rows, len(self.held_out), 0))
        ends = {name: end[name] for name in (*self.task.metrics, "loss")}
        result = {
            "metrics": ends,
            "train_loss": again["loss"],
            "generalisation_gap": end["loss"] - again["loss"],
            "steps": steps,
            "train_rows": len(self.train_rows),
            "eval_rows": len(self.held_out),
            "trainable_parameters": sum(p.numel() for p in self._trained()),
            "r": self.model.peft_config["default"].r,
            "start": _brief(start),
            "history": history,
            "gradient_norms": self._norms(norms),
        }
        if self.has_gates:
            result["sparsity"] = _sparsity(start["report"], end["report"])
        result["operations"] = self._operations(end.get("report"))
        if self.test_rows:
            test = self.evaluate(self.test_rows)
            result["test"] = {name: test[name] for name in ends} | {"rows": len(self.test_rows)}
            if self.has_gates:
                result["test"] |= {"sparsity": test["report"].sparsity, "silent_tokens": test["report"].silent_tokens}
        return result

    def _operations(self, report: SparsityReport | None) -> float:
        """Multiply-accumulates of the whole adapter for a token: `r * in + (1 - sparsity) * r * out` in each module.

        The same as in `spikelora.operations`, but also for LoRA and the controls, which that function does not know.
        """
        silent = {name: module.sparsity for name, module in report.modules.items()} if report else {}
        layers = {name.removeprefix("base_model.model."): layer for name, layer in self.model.named_modules()}
        layers = {name: layer for name, layer in layers.items() if hasattr(layer, "lora_A")}
        return sum(
            layer.r["default"] * (layer.in_features + (1 - silent.get(name, 0.0)) * layer.out_features)
            for name, layer in layers.items()
        )

    def _norms(self, norms: list[Tensor]) -> dict[str, Any]:
        """Mean over the steps of the norms of gradients before clipping: by epoch over all modules, and by module."""
        whole = torch.stack(norms).mean(0)
        factor = {part: [n for n, (_, p, _) in enumerate(self.adapters) if p == part] for part in "AB"}
        return {
            part: {
                "by_epoch": [epoch[at].square().sum().sqrt().item() for epoch in norms],
                "by_module": {self.adapters[n][0]: whole[n].item() for n in at},
            }
            for part, at in factor.items()
        }

    @torch.no_grad()
    def evaluate(self, rows: list[dict]) -> dict[str, Any]:
        """Loss, the task's metrics and, with gates, the sparsity without padding; every process runs all rows."""
        self.model.eval()
        loss, count, outputs, labels = 0.0, 0, [], []
        meter = SparsityMeter(self.model) if self.has_gates else None
        with meter or nullcontext():
            for batch in batches_of(rows, _EVAL_BATCH if not self.task.is_language else self.settings.batch_size, None):
                inputs = self._collate([rows[n] for n in batch])
                made = self.model(**inputs)
                n = int((inputs["labels"][:, 1:] != -100).sum()) if self.task.is_language else len(batch)
                loss, count = loss + made.loss.item() * n, count + n
                if not self.task.is_language:
                    outputs.append(made.logits.float().cpu().numpy())
                    labels.append(inputs["labels"].cpu().numpy())
        figures: dict[str, Any] = {"loss": loss / count}
        if not math.isfinite(figures["loss"]):
            raise Diverged("the held-out loss is not finite")
        if not self.task.is_language:
            logits, truth = np.concatenate(outputs), np.concatenate(labels)
            predicted = logits[:, 0] if self.task.labels == 1 else logits.argmax(1)
            figures |= {name: METRICS[name](predicted, truth) for name in self.task.metrics}
        return figures | ({"report": meter.report()} if meter else {})

    def _collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """The model's arguments, padded to the longest row."""
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.tokenizer.pad_token_id, "labels": -100}

        def padded(name: str, row: dict) -> list[int]:
            return row[name] + [fill.get(name, 0)] * (longest - len(row[name]))

        batch = {name: torch.tensor([padded(name, row) for row in rows]) for name in rows[0] if name != "labels"}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        if self.task.is_language:
            batch["labels"] = torch.tensor([padded("labels", row) for row in rows])
        else:
            kind = torch.float32 if self.task.labels == 1 else torch.int64
            batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=kind)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups: no weight decay for biases and learned thresholds, which it would pull to 0; `A_rate` for
        A."""
        run = self.settings
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                decay = 0.0 if name.endswith("bias") or ".lora_gate." in name else run.weight_decay
                rate = run.learning_rate * (run.A_rate or 1.0 if ".lora_A." in name else 1.0)
                groups.setdefault((decay, rate), []).append(p)
        return [{"params": ps, "weight_decay": decay, "lr": rate} for (decay, rate), ps in groups.items()]

    def _control(self, state: Any) -> SparsityControlCallback | None:
        if self.settings.target_sparsity is None:
            return None
        warmup = self.settings.target_warmup
        control = SparsityControlCallback(**({} if warmup is None else {"warmup_ratio": warmup}))
        control.on_train_begin(self._arguments(), state, None, model=self.model)
        return control

    def _arguments(self) -> Any:
        """The Trainer's arguments that the callback reads."""
        return SimpleNamespace(n_gpu=1, device=self.device)


def _some(rows: list, number: int | None, seed: int) -> list:
    if number is None or number >= len(rows):
        return rows
    return [rows[n] for n in np.random.default_rng(seed).permutation(len(rows))[:number]]


def _brief(figures: dict[str, Any]) -> dict[str, float]:
    report = figures.get("report")
    numbers = {name: value for name, value in figures.items() if name != "report"}
    return numbers | ({"sparsity": report.sparsity} if report else {})


def _sparsity(start: SparsityReport, end: SparsityReport) -> dict[str, Any]:
    return {
        "sparsity": end.sparsity,
        "zero_threshold_sparsity": end.zero_threshold_sparsity,
        "silent_tokens": end.silent_tokens,
        "dead_at_start": sum(m.sparsity == 1 for m in start.modules.values()),
        "dead_at_end": sum(m.sparsity == 1 for m in end.modules.values()),
        "modules": len(end.modules),
        "by_module": {
            name: {"layer": m.layer, "kind": m.kind, "sparsity": m.sparsity, "v_threshold": m.v_threshold}
            for name, m in end.modules.items()
        },
    }
