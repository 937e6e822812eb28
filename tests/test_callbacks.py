"""The callbacks in transformers' Trainer and TRL's: what they log and hold, and that watching changes nothing."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import takes_adapters, tiny_opt
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from spikelora import (
    SparsityCallback,
    SparsityControlCallback,
    SparsityMeter,
    SpikeLoraConfig,
    SpikeLoraError,
    prune_ranks,
)
from spikelora.__main__ import main
from spikelora.sparsity.holding import _sample
from spikelora.sparsity.observe import gates

TOKENIZER = Path(__file__).parents[1] / "examples" / "spikelora_finetuning" / "model"
GENERATOR = torch.Generator().manual_seed(0)
ROWS = [
    {"input_ids": ids, "labels": ids, "attention_mask": [1] * 12 + [0] * 4}
    for ids in torch.randint(3, 100, (64, 16), generator=GENERATOR).tolist()
]


class Reporter(TrainerCallback):
    """What a reporter such as TensorBoard's sees: the logs when it is called, before the callbacks behind it."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


def spiking(**options):
    torch.manual_seed(0)
    defaults = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "v_threshold": 0.0}
    config = SpikeLoraConfig(**(defaults | options))
    return get_peft_model(tiny_opt(), config)


def make_trainer(folder, model, callbacks=(), **options):
    options = {
        "max_steps": 10,
        "logging_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
    } | options
    arguments = TrainingArguments(output_dir=str(folder), **options)
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:10], callbacks=list(callbacks))


def test_logs_with_each_loss_and_each_evaluation(tmp_path, device):
    reporter, model = Reporter(), spiking()
    trainer = make_trainer(tmp_path, model, [reporter], eval_strategy="steps", eval_steps=5)
    trainer.add_callback(SparsityCallback(trainer))
    trainer.train()

    kinds = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    figures = {"sparsity", "silent_tokens", "zero_threshold_sparsity", *(f"sparsity/{kind}" for kind in kinds)}
    training = [(step, logs) for step, logs in reporter.seen if "sparsity" in logs]
    evaluation = [(step, logs) for step, logs in reporter.seen if "eval_sparsity" in logs]
    assert [step for step, _ in training] == [step for step, _ in evaluation] == [5, 10]
    assert all(figures <= logs.keys() for _, logs in training)
    assert all({f"eval_{name}" for name in figures} <= logs.keys() for _, logs in evaluation)
    assert all(0 < logs["sparsity"] < 1 for _, logs in training)
    assert model.device.type == device.type
    assert evaluation[-1][1]["eval_sparsity"] == pytest.approx(held_out(model, ROWS[:10]).sparsity, abs=1e-6)
    assert any("sparsity" in logs for logs in trainer.state.log_history)
    left = TrainerState.load_from_json(tmp_path / "trainer_state.json")
    assert (left.log_history, left.global_step) == (trainer.state.log_history, 10)


class WithCompletions(Trainer):
    """A trainer that shows what it has generated whenever it logs, as some of TRL's do."""

    log_completions = True
    shown = 0

    def log(self, logs, start_time=None):
        self.shown += 1
        super().log(logs, start_time)


def test_completions_are_not_shown_again_with_the_figures(tmp_path):
    arguments = {"logging_steps": 2, "max_steps": 4, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    trainer = WithCompletions(
        spiking(), TrainingArguments(str(tmp_path), dataloader_pin_memory=False, **arguments), train_dataset=ROWS
    )
    trainer.add_callback(SparsityCallback(trainer))
    trainer.train()
    assert trainer.shown == 3  # two losses, and the summary at the end
    assert sum("sparsity" in entry for entry in trainer.state.log_history) == 2


def test_the_training_logs_cover_every_token_since_the_last(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, spiking(), gradient_accumulation_steps=2)
    trainer.add_callback(SparsityCallback(trainer))
    reports, report = [], SparsityMeter.report
    monkeypatch.setattr(SparsityMeter, "report", lambda meter: reports.append(report(meter)) or reports[-1])
    trainer.train()

    # 5 updates of 2 x 4 rows with 12 tokens that are no padding, in 12 modules; nothing is left at the end
    assert [r.tokens for r in reports] == [5 * 2 * 4 * 12 * 12] * 2 + [0]


def test_the_log_is_left_while_the_training_goes_on(tmp_path, monkeypatch):
    """At the first loss, with the sparsity behind it, and then as often as the clock says."""
    clock, seen = iter([0.0, 0.0, 9.0, 11.0, 11.0]), []
    trainer = make_trainer(tmp_path, spiking(), max_steps=4, logging_steps=1)
    trainer.add_callback(SparsityCallback(trainer))

    class Looks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step:
                log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
                seen.append([(entry["step"], "sparsity" in entry) for entry in log])

    trainer.add_callback(Looks())
    monkeypatch.setattr("spikelora.sparsity.watching.time", SimpleNamespace(monotonic=lambda: next(clock, 11.0)))
    trainer.train()
    first = [(1, False), (1, True)]
    assert seen == [first, first, [*first, (2, False), (2, True), (3, False), (3, True)]]
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert log == trainer.state.log_history
    assert {path.name for path in tmp_path.iterdir()} == {"trainer_state.json"}


def test_evaluate_alone_returns_the_figures(tmp_path):
    trainer = make_trainer(tmp_path, spiking())
    trainer.add_callback(SparsityCallback(trainer))
    trainer.predict(ROWS[:3])
    metrics = trainer.evaluate(metric_key_prefix="test")

    assert 0 < metrics["test_sparsity"] < 1
    assert 0 < metrics["test_sparsity/fc1"] < 1


def test_an_evaluation_is_left_for_the_report(tmp_path):
    model = spiking()
    trainer = make_trainer(tmp_path / "run", model)
    trainer.add_callback(SparsityCallback(trainer))
    metrics = trainer.evaluate()
    trainer.save_model()

    assert json.loads((tmp_path / "run" / "sparsity.json").read_text())["sparsity"] == metrics["eval_sparsity"]
    assert f"| all | {metrics['eval_sparsity']:.1%} |" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    assert ended.value.code == 0
    assert f"{metrics['eval_sparsity']:.1%}" in (tmp_path / "page.html").read_text()


def test_a_checkpoint_has_the_sparsity_of_its_step_and_nothing_is_logged_behind_the_end(tmp_path):
    class Ended(Reporter):
        def on_train_end(self, args, state, control, **kwargs):
            self.seen.clear()

    reporter = Ended()
    options = {"logging_steps": 10, "save_strategy": "steps", "save_steps": 10}
    trainer = make_trainer(tmp_path, spiking(), [reporter], **options)
    trainer.add_callback(SparsityCallback(trainer))
    trainer.train()

    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "sparsity" in entry] == [10]
    assert not reporter.seen


def test_watching_changes_nothing(tmp_path):
    def losses(watch):
        model = spiking(lora_dropout=0.1)
        trainer = make_trainer(tmp_path, model, logging_steps=1, eval_strategy="steps", eval_steps=5)
        if watch:
            trainer.add_callback(SparsityCallback(trainer))
        trainer.train()
        return [(e["step"], e[k]) for e in trainer.state.log_history for k in ("loss", "eval_loss") if k in e]

    assert losses(True) == losses(False)


def test_a_second_training_does_not_count_twice(tmp_path):
    trainer = make_trainer(tmp_path, spiking())
    callback = SparsityCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    first = trainer.state.log_history
    trainer.train()

    assert not any(g.gate.observers for g in gates(trainer.model))
    assert [e["step"] for e in trainer.state.log_history] == [e["step"] for e in first]


def test_an_evaluation_is_that_of_its_own_rows(tmp_path):
    trainer = make_trainer(tmp_path, spiking())
    trainer.add_callback(SparsityCallback(trainer))
    alone = trainer.evaluate()["eval_sparsity"]
    trainer.model.eval()(input_ids=torch.full((2, 16), 5))

    assert trainer.evaluate()["eval_sparsity"] == alone


def test_ranks_may_be_pruned_between_evaluations(tmp_path, device):
    model = spiking(v_threshold=0.4)
    trainer = make_trainer(tmp_path, model)
    trainer.add_callback(SparsityCallback(trainer))
    trainer.evaluate()
    assert model.device.type == device.type
    rows = {name: torch.tensor([row[name] for row in ROWS[:10]]) for name in ("input_ids", "attention_mask")}
    before = trainer.evaluate()["eval_sparsity"]
    assert sum(prune_ranks(model, [rows]).values())
    assert trainer.evaluate()["eval_sparsity"] < before


def test_a_model_that_the_trainer_makes_anew(tmp_path, device):
    arguments = {"logging_steps": 5, "max_steps": 5, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    trainer = Trainer(
        model_init=lambda: spiking(),
        args=TrainingArguments(output_dir=str(tmp_path), dataloader_pin_memory=False, **arguments),
        train_dataset=ROWS,
        eval_dataset=ROWS[:10],
    )
    trainer.add_callback(SparsityCallback(trainer))
    trainer.train()

    assert any("sparsity" in logs for logs in trainer.state.log_history)
    assert 0 < trainer.evaluate()["eval_sparsity"] < 1


def test_dead_modules_are_named_once(tmp_path, device):
    model = spiking(threshold_pattern={"fc2": 1e6})
    trainer = make_trainer(tmp_path, model, logging_steps=2)
    trainer.add_callback(SparsityCallback(trainer))
    with pytest.warns(RuntimeWarning, match="2 of 12 modules have never fired") as caught:
        trainer.train()

    texts = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert len(texts) == 1
    assert "model.decoder.layers.0.fc2, model.decoder.layers.1.fc2" in texts[0]
    assert "calibrate_thresholds" in texts[0]


def test_a_silent_module_that_has_learned_is_not_called_dead(tmp_path):
    model = spiking(threshold_pattern={"fc2": 1e6})
    for gated in gates(model):
        gated.layer.lora_B["default"].weight.data.fill_(0.01)
    trainer = make_trainer(tmp_path, model)
    trainer.add_callback(SparsityCallback(trainer))
    trainer.train()


@pytest.mark.parametrize("logging_steps", [2, 500])  # also where the training ends before a loss is logged
def test_collapse_is_named_once(logging_steps, tmp_path):
    trainer = make_trainer(tmp_path, spiking(v_threshold=1e6), logging_steps=logging_steps)
    trainer.add_callback(SparsityCallback(trainer))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        trainer.train()
    texts = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert len(texts) == 2
    assert "12 of 12 modules have never fired" in texts[0]
    assert "and 4 more" in texts[0]
    assert "has fallen silent: sparsity 100.00%" in texts[1]


@takes_adapters
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_lora_beside_a_spiking_adapter_that_is_not_active(tmp_path):
    model = tiny_opt()
    model.add_adapter(SpikeLoraConfig(target_modules=["fc1"]), "spiking")
    model.add_adapter(LoraConfig(target_modules=["fc2"]), "plain")
    trainer = make_trainer(tmp_path, model, eval_strategy="steps", eval_steps=5)
    trainer.add_callback(SparsityCallback(trainer))
    trainer.train()
    assert not any("sparsity" in name for entry in trainer.state.log_history for name in entry)


@takes_adapters
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_lora_beside_an_adapter_that_is_held(tmp_path):
    model = tiny_opt()
    model.add_adapter(LoraConfig(target_modules=["fc2"]), "plain")
    model.add_adapter(SpikeLoraConfig(target_modules=["fc1"], target_sparsity=0.9, target_tolerance=0.9), "spiking")
    model.set_adapter(["spiking", "plain"])
    trainer = make_trainer(tmp_path, model, [SparsityControlCallback()])
    trainer.add_callback(SparsityCallback(trainer))
    trainer.train()
    sparsities = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert len(sparsities) == 2
    assert all(0 < sparsity < 1 for sparsity in sparsities)


def test_each_model_that_the_trainer_makes_is_warned_of(tmp_path):
    arguments = {"logging_steps": 2, "max_steps": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    trainer = Trainer(
        model_init=lambda: spiking(threshold_pattern={"fc2": 1e6}),
        args=TrainingArguments(output_dir=str(tmp_path), dataloader_pin_memory=False, **arguments),
        train_dataset=ROWS,
    )
    trainer.add_callback(SparsityCallback(trainer))
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="2 of 12 modules have never fired"):
            trainer.train()


def test_what_a_target_holds_is_not_warned_of_and_what_none_holds_is(tmp_path):
    model = spiking(target_sparsity=0.9, target_tolerance=0.9, v_threshold=1e6)
    model.add_adapter("free", SpikeLoraConfig(target_modules=["fc1"], v_threshold=1e6))
    model.base_model.set_adapter(["default", "free"])
    trainer = make_trainer(tmp_path, model, [SparsityControlCallback()], logging_steps=2)
    trainer.add_callback(SparsityCallback(trainer))
    with pytest.warns(RuntimeWarning) as caught:
        trainer.train()
    texts = [str(w.message) for w in caught if "never fired" in str(w.message)]
    assert len(texts) == 1
    assert texts[0].startswith("2 of 2 modules have never fired")
    assert "fc1.free" in texts[0]


def test_a_model_without_a_spiking_adapter(tmp_path):
    with pytest.raises(SpikeLoraError, match="no spiking adapter"):
        SparsityCallback(make_trainer(tmp_path, tiny_opt()))


def held_out(model, rows=ROWS):
    with SparsityMeter(model.eval()) as meter, torch.no_grad():
        for start in range(0, len(rows), 8):  # the trainer's batches: a GPU's products round by the size of their batch
            batch = rows[start : start + 8]
            model(**{name: torch.tensor([row[name] for row in batch], device=model.device) for name in rows[0]})
    return meter.report()


@pytest.mark.parametrize("target", [0.5, pytest.param(0.9, marks=pytest.mark.slow), 0.97])
def test_control_holds_the_target(tmp_path, target, device):
    model = spiking(target_sparsity=target, target_tolerance=0.03)
    options = {"max_steps": 80, "per_device_train_batch_size": 8, "lr_scheduler_type": "cosine"}
    trainer = make_trainer(tmp_path, model, [SparsityControlCallback()], **options)
    trainer.train()
    assert model.device.type == device.type
    report = held_out(model)

    assert report.sparsity == pytest.approx(target, abs=0.01)
    assert all(m.sparsity == pytest.approx(target, abs=0.03) for m in report.modules.values())
    assert not any(gated.gate.observers for gated in gates(model))
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_opt(), tmp_path / "adapter")
    assert [g.gate.v_threshold.item() for g in gates(loaded)] == [g.gate.v_threshold.item() for g in gates(model)]


def test_control_holds_the_adapter_as_a_whole_and_lets_its_modules_differ(tmp_path):
    model = spiking(target_sparsity=0.9, target_tolerance=0.03, target_scope="adapter")
    options = {"max_steps": 80, "per_device_train_batch_size": 8, "lr_scheduler_type": "cosine"}
    make_trainer(tmp_path, model, [SparsityControlCallback()], **options).train()
    report = held_out(model)
    shares = [m.sparsity for m in report.modules.values()]

    assert report.sparsity == pytest.approx(0.9, abs=0.01)
    assert max(shares) - min(shares) > 0.1
    assert max(shares) < 0.995  # a tenth of the share of all fires in each, which is 0.01


@pytest.mark.parametrize("scope", ["module", "adapter"])
def test_control_wakes_a_dead_module(tmp_path, scope):
    model = spiking(target_sparsity=0.9, target_tolerance=0.5, target_scope=scope, v_threshold=1e6)
    make_trainer(tmp_path, model, [SparsityControlCallback()]).train()

    assert all(gated.layer.lora_B["default"].weight.any() for gated in gates(model))


def test_the_target_rises_over_the_warm_up(tmp_path):
    class Watch(TrainerCallback):
        def __init__(self):
            self.shares = []

        def on_step_end(self, args, state, control, model, **kwargs):
            self.shares.append(round(held_out(model).sparsity, 2))
            model.train()

    model = spiking(target_sparsity=0.9, target_tolerance=0.5)
    watch = Watch()
    callbacks = [SparsityControlCallback(warmup_ratio=0.5, gain=1.0), watch]
    make_trainer(tmp_path, model, callbacks, learning_rate=1e-6, per_device_train_batch_size=32).train()

    assert watch.shares[:6] == pytest.approx([0.5, 0.58, 0.66, 0.74, 0.82, 0.9], abs=0.02)


@pytest.mark.parametrize("scope", ["module", "adapter"])
def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path, scope):
    def run(folder, resume=None, **options):
        model = spiking(target_sparsity=0.9, target_tolerance=0.5, target_scope=scope)
        trainer = make_trainer(
            folder, model, [SparsityControlCallback()], save_strategy="steps", save_steps=5, logging_steps=1, **options
        )
        trainer.train(resume_from_checkpoint=resume)
        return [e["loss"] for e in trainer.state.log_history if "loss" in e], [
            g.gate.v_threshold.item() for g in gates(model)
        ]

    losses, thresholds = run(tmp_path)
    resumed_losses, resumed_thresholds = run(tmp_path, str(tmp_path / "checkpoint-5"))
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())

    assert resumed_losses == losses
    assert resumed_thresholds == thresholds
    assert state["stateful_callbacks"]["SparsityControlCallback"]["args"] == {"warmup_ratio": 0.1, "gain": 0.1}


def test_holding_may_begin_at_a_checkpoint_of_a_training_that_nothing_held(tmp_path):
    model = spiking(target_sparsity=0.9, target_tolerance=0.5)
    make_trainer(tmp_path, model, save_strategy="steps", save_steps=5, max_steps=5).train()
    before = {g.gate.v_threshold.item() for g in gates(model)}

    resumed = spiking(target_sparsity=0.9, target_tolerance=0.5)
    make_trainer(tmp_path, resumed, [SparsityControlCallback()]).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-5")
    )

    assert before == {0.0}
    assert all(g.gate.v_threshold.item() for g in gates(resumed))


def test_ending_far_from_the_target_is_said(tmp_path):
    model = spiking(target_sparsity=0.97)
    with pytest.warns(RuntimeWarning, match=r"Adapter 'default' ended at a sparsity of 0\.[0-9]+, further"):
        make_trainer(tmp_path, model, [SparsityControlCallback(gain=0.01, warmup_ratio=1.0)]).train()


class WithReference(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        with torch.no_grad():
            model.base_model.set_adapter("ref", inference_mode=True)
            model(**inputs)
            model.base_model.set_adapter("default")
        return super().compute_loss(model, inputs, **kwargs)


def test_a_reference_beside_the_trained_adapter_is_neither_moved_nor_measured(tmp_path):
    def run(kind, model, folder):
        options = make_trainer(folder, model, eval_strategy="steps", eval_steps=5).args
        trainer = kind(
            model, options, train_dataset=ROWS, eval_dataset=ROWS[:10], callbacks=[SparsityControlCallback()]
        )
        trainer.add_callback(SparsityCallback(trainer))
        trainer.train()
        figures = [entry for entry in trainer.state.log_history if {"sparsity", "eval_sparsity"} & entry.keys()]
        return figures, (folder / "sparsity.json").read_text()

    alone, model = (spiking(target_sparsity=0.9, target_tolerance=0.9) for _ in range(2))
    model.add_adapter("ref", model.peft_config["default"])  # as TRL does, with the same configuration
    assert run(WithReference, model, tmp_path / "both") == run(Trainer, alone, tmp_path / "alone")
    assert {g.gate.v_threshold.item() for g in gates(model) if g.adapter == "ref"} == {0.0}


def test_control_of_a_float64_model(tmp_path, device):
    model = get_peft_model(
        tiny_opt().double(), SpikeLoraConfig(target_modules=["fc1"], target_sparsity=0.9, target_tolerance=0.5)
    )
    make_trainer(tmp_path, model, [SparsityControlCallback()]).train()
    assert all(g.gate.v_threshold.item() != pytest.approx(0.1) for g in gates(model))


def test_a_training_that_is_stopped_early_is_not_judged(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    with pytest.warns(
        RuntimeWarning, match="ended after 4 of 10 steps, before it was judged whether `target_sparsity`"
    ):
        make_trainer(tmp_path, spiking(target_sparsity=0.9), [SparsityControlCallback(), Stop()]).train()


def test_control_without_adapters(tmp_path):
    with pytest.raises(SpikeLoraError, match="no spiking adapter"):
        make_trainer(tmp_path, tiny_opt(), [SparsityControlCallback()]).train()


def test_control_without_a_target(tmp_path):
    with pytest.raises(SpikeLoraError, match="has no target"):
        make_trainer(tmp_path, spiking(), [SparsityControlCallback()]).train()


@pytest.mark.parametrize("options", [{"gain": 0}, {"gain": 1.5}, {"warmup_ratio": -0.1}])
def test_control_checks_its_options(options):
    with pytest.raises(SpikeLoraError, match="must be a"):
        SparsityControlCallback(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_tolerance": 0},
        {"target_tolerance": 1.0},
        {"target_sparsity": 0.9, "learn_threshold": True},
        {"target_sparsity": 0.9, "target_scope": "adapter", "threshold_pattern": {"x": 0.2}},
    ],
)
def test_the_configuration_checks_its_options(options):
    with pytest.raises(SpikeLoraError, match="`target_"):
        SpikeLoraConfig(**options)


def test_trl(tmp_path, device):
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in ROWS])
    reporter = Reporter()
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=4,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    trainer = SFTTrainer(
        spiking(target_sparsity=0.9, target_tolerance=0.5),
        arguments,
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        callbacks=[reporter, SparsityControlCallback()],
    )
    trainer.add_callback(SparsityCallback(trainer))
    trainer.train()

    assert [step for step, logs in reporter.seen if "sparsity" in logs] == [2, 4]
    assert [step for step, logs in reporter.seen if "eval_sparsity" in logs] == [4]
    losses = [logs for _, logs in reporter.seen if "loss" in logs]
    assert all("mean_token_accuracy" in logs for logs in losses)
    assert not any("mean_token_accuracy" in logs for _, logs in reporter.seen if "sparsity" in logs)


def test_control_under_dropout_says_what_it_holds(tmp_path):
    model = spiking(target_sparsity=0.9, target_tolerance=0.5, lora_dropout=0.3)
    with pytest.warns(RuntimeWarning, match="is held under `lora_dropout=0.3`"):
        make_trainer(tmp_path, model, [SparsityControlCallback()], max_steps=1).train()


@pytest.mark.parametrize(("rows", "length", "r"), [(64, 16, 64), (64, 128, 8), (1, 9, 8), (3, 1000, 100)])
def test_the_sample_has_no_period(rows, length, r):
    a = torch.arange(rows * length).view(-1, 1).expand(-1, r)
    seen = a[_sample(a)][:, 0]

    assert len(seen) == min(rows * length, 4096 // r)
    assert len(seen.unique()) == len(seen)
    places = torch.bincount(seen % length, minlength=length)
    if rows * length > len(seen):
        assert places.max() - places.min() <= max(2, 0.5 * places.float().mean())


class Experts(nn.Module):
    """Calls its second layer without any token."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x) + self.unused(x[:0]).sum()


def test_control_lives_with_a_module_that_sees_no_token(tmp_path):
    config = SpikeLoraConfig(target_modules=["used", "unused"], target_sparsity=0.9, target_tolerance=0.5)
    model = get_peft_model(Experts(), config).train()
    arguments, state, control = TrainingArguments(output_dir=str(tmp_path)), TrainerState(max_steps=1), TrainerControl()
    callback = SparsityControlCallback(warmup_ratio=0.0)
    callback.on_train_begin(arguments, state, control, model=model)
    x = torch.randn(100, 4)
    model(x)
    state.global_step = 1
    callback.on_step_end(arguments, state, control)
    with SparsityMeter(model) as meter:
        model(x)
    callback.on_train_end(arguments, state, control)

    assert model.base_model.model.unused.lora_gate["default"].v_threshold.item() == pytest.approx(0.1)
    assert meter.report().sparsity == pytest.approx(0.9, abs=0.01)
