"""The study: bad input stops it before anything runs, an interrupted one goes on, its tables are made from results."""

import functools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_opt
from experiments import page, paired, runner, tables, tasks
from experiments.__main__ import main
from experiments.methods import RandomMask, adapt, fired, rank_of_same_operations
from experiments.store import SCHEMA, Store
from experiments.study import Run, StudyError, read_study
from experiments.train import train
from peft import LoraConfig
from processes import in_processes
from scipy import stats

from spikelora import SparsityMeter
from spikelora.sparsity.observe import gates

ROOT = Path(__file__).parents[1]
STUDY = """\
title = "Tiny"
show = ["sweep", "modules", "gradients", "history"]
model = "embedded"
task = "pydoc"
seeds = [0, 1]

[settings]
learning_rate = 1e-2
epochs = 1
batch_size = 4
max_length = 16
train_rows = 8
eval_rows = 4

[[methods]]
name = "lora"

[[methods]]
name = "spikelora"
v_threshold = [0.1, 2.0]
"""
RUN = Run(
    model="embedded", task="pydoc", method="lora", seed=0, learning_rate=0.01, epochs=1, batch_size=4, max_length=16,
    train_rows=8, eval_rows=4,
)  # fmt: skip


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Where a result is always the same, and where the processes of `in_processes` are; on a GPU trainings differ."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)  # what another test began may be on the GPU
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def results_in(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.jsonl")}


def canned(run: Run, bar: bool = False) -> dict:
    """A line as `train` makes it; the loss falls with the seed, and with gates."""
    loss = 4.0 - run.seed - (0.5 if run.method != "lora" else 0)
    norms = {part: {"by_epoch": [1.0], "by_module": {"a": 1.0, "b": 2.0, "c": 3.0}} for part in "AB"}
    result = {"metrics": {"loss": loss}, "generalisation_gap": 0.25, "r": run.r, "gradient_norms": norms}
    result["history"] = [{"train_loss": 5.0, "loss": loss}]
    where = {"device": "CPU", "total_seconds": 36.0, "training_cpu_seconds": 30.0, "date": "2026-01-01"}
    return {"status": "done", "result": result, "versions": {"torch": "2"}, "where": where}


class TestBadStudy:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('title = "Tiny"', 'titel = "Tiny"', "line 1: unknown key `titel`"),
            ("epochs = 1", "epoch = 1", "line 9: `epoch` has no meaning here; there are A_rate, batch_size"),
            ('task = "pydoc"', 'task = "kola"', "line 4: `task` must be one of cola, sst2, subj"),
            ('name = "spikelora"', 'name = "spiklora"', "line 19: `name` must be one of lora, lora_same_operations"),
            ("seeds = [0, 1]", "seeds = []", "line 5: `seeds` is missing or empty"),
            ("[0.1, 2.0]", "[]", "line 20: `v_threshold` must be a list of at least one value, got []"),
            ("[0.1, 2.0]", '"high"', "line 20: `v_threshold` must be of type float, got 'high'"),
            ("v_threshold = [0.1, 2.0]", "rate = 0.5", "line 20: `rate` has no meaning here"),
            ('name = "spikelora"', 'name = "random_mask"', "line 20: `v_threshold` has no meaning here"),
            ('"spikelora"\nv_threshold = [0.1, 2.0]', '"dropout"', "line 19: `dropout` needs a `rate`"),
            ("[[methods]]\n", "[grid]\nr = []\n[[methods]]\n", "line 16: `r` must be a list of at least one value"),
            ("[[methods]]\n", "[grid]\n[[methods]]\n", "line 15: `grid` is empty"),
            ("[[methods]]\n", "[grid]\nepochs = [1, 2]\n[[methods]]\n", "line 16: `epochs` is given twice"),
            ("[[methods]]\n", "[grid]\ntau = [2.0]\n[[methods]]\n", "line 16: `tau` has no meaning here"),
            ("[0.1, 2.0]", "0.1\nagainst = 'dropout'", "line 21: `against` is 'dropout'; there are no others"),
            ("[0.1, 2.0]", "0.1\nagainst = 'lora r={r}'", "line 21: `against` must be the label of a method"),
            ('task = "pydoc"', 'task = "pydoc"\ncompare = "mcc"', "line 5: `compare` must be one of loss"),
            ("learning_rate = 1e-2", "learning_rate = -1.0", "line 8: `learning_rate` must be above 0, got -1.0"),
            ("learning_rate = 1e-2\n", "", "line 7: `learning_rate` is missing"),
            ('[[methods]]\nname = "lora"\n', "", 'no plain `name = "lora"` to compare with'),
            ('"history"]', '"histories"]', "line 2: `show` must be a list of sweep, modules"),
            ('title = "Tiny"', 'title = "Tiny"\npart = "train"', "line 2: `part` must be one of held_out, test"),
            ('title = "Tiny"', 'title = "Tiny"\npart = "test"', "line 2: `part` is the test part, .* `test = true`"),
            ("[0.1, 2.0]", "0.1\ntarget_scope = 'model'", "line 21: `target_scope` must be one of module, adapter"),
            ("epochs = 1", "epochs = 1\nA_rate = 0", "line 10: `A_rate` must be above 0, got 0"),
            ("[0.1, 2.0]", "[0.1, 0.1]", "line 20: `v_threshold` has a value twice"),
            ("[0.1, 2.0]", "[1, 1.0]", "line 20: `v_threshold` has a value twice"),
            ("[0.1, 2.0]", '0.1\nagainst = "lora"', "line 21: `against` is 'lora'; there are no others"),
            ("[0.1, 2.0]", '0.1\n[[methods]]\nname = "lora"', "line 21: `lora` is listed twice"),
            ("learning_rate = 1e-2", "learning_rate = inf", "line 8: `learning_rate` must be finite, got inf"),
            ("seeds = [0, 1]", "seeds = [4294967296]", "line 5: `seeds` must be at least 0 and below 2**32"),
            ("max_length = 16", f"max_length = 16\nweight_decay = 1{'0' * 400}", "`weight_decay` must be finite"),
            ("epochs = 1", "'epochs' = 0", "line 9: `epochs` must be at least 1, got 0"),
            ('title = "Tiny"', 'title = "Tiny', "is not TOML: .*line 1"),
        ],
    )  # fmt: skip
    def test_is_refused_with_its_line(self, old, new, message, study, capsys):
        assert old in STUDY
        study.write_text(STUDY.replace(old, new, 1))
        assert main(["run", str(study), "--results", str(study.parent / "results")]) == 2
        assert re.search(re.escape(message).replace(r"\.\*", ".*"), capsys.readouterr().err)
        assert not (study.parent / "results").exists()

    def test_is_refused_with_its_line_whatever_the_order_of_its_tables(self, study):
        study.write_text(
            'title = """\nr = 3\n"""\nmodel = "embedded"\ntask = "pydoc"\nseeds = [0]\n[[methods]]\nname = "lora"\n'
            '[[methods]]\nname = "spikelora"\nr = 2\n[settings]\nlearning_rate = 1e-2\n[grid]\nr = []\n'
        )
        with pytest.raises(StudyError, match=r"line 15: `r` must be a list"):
            read_study(study)

    def test_that_is_not_there(self, tmp_path, capsys):
        assert main(["run", str(tmp_path / "none.toml")]) == 2
        assert "none.toml: cannot be read" in capsys.readouterr().err

    def test_of_contradicting_options_is_refused_before_anything_runs(self, study, capsys):
        study.write_text(STUDY + "target_sparsity = 0.9\nlearn_threshold = true\n")
        assert main(["run", str(study), "--results", str(study.parent / "results")]) == 2
        assert "line 19: `target_sparsity` sets the thresholds" in capsys.readouterr().err

    def test_of_a_model_that_is_not_there(self, study, capsys):
        study.write_text(STUDY.replace('"embedded"', '"embeded"'))
        assert main(["run", str(study), "--results", str(study.parent / "results")]) == 2
        assert "line 3: the model `embeded` cannot be had" in capsys.readouterr().err


class TestBadResults:
    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda line: json.dumps(line | {"schema": SCHEMA + 1}), f"line 1: written by version {SCHEMA + 1}"),
            (lambda line: json.dumps({"loss": 3}), "line 1: written by version None"),
            (lambda line: json.dumps({"schema": SCHEMA, "other": 1}), "line 1: a part of the result is missing"),
            (lambda line: json.dumps({k: v for k, v in line.items() if k != "result"}), "line 1: a part of the result"),
            (lambda line: json.dumps(line)[:40], "line 1: is not JSON"),
            (lambda line: json.dumps(line) + "\n" + json.dumps(line), "line 2: a result is one line"),
            (lambda line: json.dumps(line | {"config": line["config"] | {"seed": 9}}), "line 1: key, configuration"),
            (lambda line: json.dumps(line | {"result": {}}), "line 1: a part of the result is missing"),
            (lambda line: json.dumps(line | {"where": {}}), "line 1: a part of the result is missing"),
            (lambda line: json.dumps(line | {"versions": None}), "line 1: a part of the result is missing"),
            (lambda line: json.dumps({"schema": SCHEMA, "status": "failed", "error": "x"}), "line 1: a part of the"),
            (lambda line: json.dumps(line).replace('"by_epoch"', '"epochs"'), "line 1: a part of the result"),
            (lambda line: json.dumps(line | {"status": "running", "error": "x"}), "line 1: a part of the result"),
            (lambda line: json.dumps(line).replace('"loss": 4.0', '"loss": "a"', 1), "line 1: a part of the result"),
            (lambda line: "\udcff", "line 1: is not JSON"),
            (lambda line: "", "line 1: is not JSON"),
        ],
    )
    @pytest.mark.parametrize("command", ["run", "list", "table", "plot"])
    def test_are_refused_with_their_line_before_anything_runs(self, command, edit, message, study, capsys):
        store = Store(study.parent / "results")
        store.folder.mkdir()
        store.put(RUN, canned(RUN))
        path = store.folder / f"{RUN.key}.jsonl"
        path.write_text(edit(json.loads(path.read_text())) + "\n", errors="surrogateescape")
        assert main([command, str(study), "--results", str(store.folder)]) == 2
        assert f"{path}, {message}" in capsys.readouterr().err
        assert list(results_in_names(store.folder)) == [path.name]


def results_in_names(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.jsonl")]


class TestBadData:
    @pytest.fixture
    def data(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SPIKELORA_DATA", str(tmp_path))
        for name in ("cola", "sst2", "subj"):
            (tmp_path / name).mkdir()
        good = "x\t1\t\tA sentence.\nx\t0\t*\tSentence a.\n"
        for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
            (tmp_path / "cola" / f"{name}.tsv").write_text(good)
        (tmp_path / "subj" / "subj.all").write_bytes(b"0 caf\xe9\n" + b"1 a film\n" * 19)
        (tmp_path / "tinyshakespeare").mkdir()
        (tmp_path / "tinyshakespeare" / "input.txt").write_text("\n\n".join(f"Speech {n}" for n in range(100)))
        return tmp_path

    def test_columns_that_do_not_fit_are_named_with_their_line(self, data, study, capsys):
        (data / "cola" / "in_domain_train.tsv").write_text("x\t1\t\tA sentence.\n1\tA sentence.\n")
        study.write_text(STUDY.replace("pydoc", "cola"))
        assert main(["run", str(study), "--results", str(data / "results")]) == 2
        message = "line 4: the task `cola` cannot be used: cola/in_domain_train.tsv, line 2: needs 4 columns"
        assert message in capsys.readouterr().err

    def test_labels_that_are_none_are_named_with_their_line(self, data):
        (data / "sst2" / "train.txt").write_text("1 good\npositive fine\n")
        with pytest.raises(tasks.TaskError, match=r"sst2/train.txt, line 2: needs a label 0 or 1"):
            tasks.TASKS["sst2"].load()

    def test_a_missing_file_and_folder_are_named(self, data, monkeypatch):
        with pytest.raises(tasks.TaskError, match=r"sst2/train.txt is not in the folder that SPIKELORA_DATA names"):
            tasks.TASKS["sst2"].load()
        monkeypatch.delenv("SPIKELORA_DATA")
        with pytest.raises(tasks.TaskError, match="SPIKELORA_DATA is not set"):
            tasks.TASKS["sst2"].load()

    def test_cola_holds_out_both_domains_and_subj_every_tenth_row(self, data):
        cola, subj = tasks.TASKS["cola"].load(), tasks.TASKS["subj"].load()
        assert (len(cola.train), len(cola.held_out)) == (2, 4)
        assert cola.train[1] == tasks.Row("Sentence a.", None, 0)
        assert (len(subj.train), subj.held_out) == (18, [("café", None, 0), ("a film", None, 1)])

    def test_sst2_has_a_test_file_of_its_own(self, data):
        for part in ("train", "dev", "test"):
            (data / "sst2" / f"{part}.txt").write_text(f"1 good {part}\n0 bad {part}\n")
        rows = tasks.TASKS["sst2"].load(with_test=True)
        assert [part[0].text for part in rows] == ["good train", "good dev", "good test"]

    @pytest.mark.parametrize(("task", "n_test"), [("cola", 2), ("subj", 2), ("shakespeare", 1), ("pydoc", None)])
    def test_what_is_kept_apart_for_the_test_is_neither_trained_on_nor_held_out(self, task, n_test, data):
        path = data / "cola" / "in_domain_train.tsv"
        path.write_text("".join(f"x\t1\t\tSentence {n}.\n" for n in range(20)))
        (data / "subj" / "subj.all").write_text("".join(f"1 film {n}\n" for n in range(20)))
        without, rows = tasks.TASKS[task].load(), tasks.TASKS[task].load(with_test=True)

        assert len(rows.test) == n_test or (n_test is None and 10 < len(rows.test) < 20)
        assert rows.held_out == without.held_out
        assert not {row.text for row in rows.test} & {row.text for row in rows.train + rows.held_out}
        assert sorted(row.text for row in rows.train + rows.test) == sorted(row.text for row in without.train)

    def test_glue_is_loaded_by_its_columns(self, monkeypatch):
        asked = []

        def load(*names):
            asked.append(names)
            rows = datasets.Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1, 0]})
            return {"train": rows, "validation": rows if len(asked) == 1 else rows.remove_columns("sentence2")}

        monkeypatch.setattr(datasets, "load_dataset", load)
        assert tasks.TASKS["glue/rte"].load().held_out == [("a", "c", 1), ("b", "d", 0)]
        assert asked == [("glue", "rte")]
        with pytest.raises(tasks.TaskError, match=r"glue/rte, validation: has the columns .*, and lacks sentence2"):
            tasks.TASKS["glue/rte"].load()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"label": [-1, 0]}, r"glue/rte, train, row 1: needs text and a label, has \('a', 'c', -1\)"),
            ({"label": [1, 2]}, r"glue/rte, train, row 2"),
            ({"label": ["y", "n"]}, r"glue/rte, train, row 1"),
            ({"sentence2": ["c", None]}, r"glue/rte, train, row 2"),
            ({"sentence1": [], "sentence2": [], "label": []}, "glue/rte, train has 0 rows"),
        ],
    )
    def test_rows_of_glue_that_do_not_fit_are_named(self, changed, message, monkeypatch):
        rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1, 0]}
        splits = {"train": datasets.Dataset.from_dict(rows | changed), "validation": datasets.Dataset.from_dict(rows)}
        monkeypatch.setattr(datasets, "load_dataset", lambda *names: splits)
        with pytest.raises(tasks.TaskError, match=message):
            tasks.TASKS["glue/rte"].load()
        del splits["train"]
        with pytest.raises(tasks.TaskError, match="has no split train, but validation"):
            tasks.TASKS["glue/rte"].load()


class TestTasks:
    def test_metrics_by_hand(self):
        predicted, labels = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
        # 2 true positives, 1 false one, 1 false negative, 2 true ones.
        assert tasks.matthews(predicted, labels) == pytest.approx((2 * 2 - 1 * 1) / 9)
        assert tasks.accuracy(predicted, labels) == pytest.approx(4 / 6)
        assert tasks.f1(predicted, labels) == pytest.approx(2 / 3)
        assert tasks.matthews(np.ones(4), np.array([0, 1, 1, 0])) == 0
        assert tasks.pearson(np.array([1.0, 2, 4]), np.array([2.0, 4, 8])) == pytest.approx(1)
        assert tasks.spearman(np.array([1.0, 2, 4]), np.array([9.0, 1, 8])) == pytest.approx(-0.5)

    def test_glue_has_its_metrics(self):
        first = {name: task.metrics for name, task in tasks.TASKS.items()}
        assert first["glue/cola"] == ("mcc",)
        assert first["glue/mrpc"] == first["glue/qqp"] == ("accuracy", "f1")
        assert first["glue/stsb"] == ("pearson", "spearman")

    def test_batches_have_every_row_once_and_little_padding(self):
        lengths = np.random.default_rng(0).integers(1, 60, 1000)
        rows = [{"input_ids": [0] * n} for n in lengths]
        batches = tasks.batches_of(rows, 32, np.random.default_rng(0))
        assert sorted(n for batch in batches for n in batch) == list(range(1000))
        padded = sum(len(batch) * max(lengths[batch]) for batch in batches)
        assert padded < 1.1 * lengths.sum()
        assert batches != tasks.batches_of(rows, 32, np.random.default_rng(1))

    def test_held_out_passages_are_not_trained_on(self):
        rows = tasks.TASKS["pydoc"].load()
        trained = {p for row in rows.train for p in row.text.split("\n\n") if p.strip()}
        assert not trained & {p for row in rows.held_out for p in row.text.split("\n\n") if p.strip()}


def adapted(method: str, seed: int = 0, **own):
    """A tiny model with the adapter of a method, whose B is not 0."""
    torch.manual_seed(seed)
    model = adapt(tiny_opt(), replace(RUN, method=method, seed=seed, r=4, **own), "CAUSAL_LM")
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name and "lora_gate" not in name:
            p.data = torch.randn(p.shape, generator=generator) / 4
    return model


class TestControls:
    a = torch.tensor([[-3.0, -0.5, 0.0, 0.5, 1.0, 3.0]])

    def gate(self, method: str, **own):
        return gates(adapted(method, **own))[0].gate

    def test_the_two_sided_gate_by_value(self):
        gate = self.gate("two_sided", v_threshold=0.5, tau=2.0)
        a = self.a.clone().requires_grad_()
        gated = gate(a)
        assert gated.tolist() == [[-3.0, 0, 0, 0, 1.0, 3.0]]
        assert gate.spikes(a).tolist() == [[True, False, False, False, True, True]]
        gated.sum().backward()
        size = self.a.abs()
        surrogate = 1 / (1 + (math.pi * (size / 2 - 0.5)) ** 2)
        expected = (size >= 1).float() + size * surrogate / 2
        expected[0, 2] = 0  # sign(0) is 0
        torch.testing.assert_close(a.grad, expected)

    @pytest.mark.parametrize("unit", ["threshold", "spread"])
    def test_the_relative_window_by_value(self, unit):
        gate = self.gate("relative_window", v_threshold=0.25, tau=2.0, surrogate_alpha=0.5, unit=unit)
        a = self.a.clone().requires_grad_()
        gate(a).sum().backward()
        v = self.a / 2
        width = 0.25 if unit == "threshold" else v.std()
        window = 1 / (1 + (math.pi / 2 * 0.5 * (v - 0.25) / width) ** 2)
        torch.testing.assert_close(a.grad, torch.where(v >= 0.25, torch.ones(()), window))

    def test_the_penalty_pushes_the_threshold_by_the_surrogate_and_leaves_activations_alone(self):
        model = adapted("l0_penalty", v_threshold=0.25, tau=2.0, penalty=1.0).train()
        model(input_ids=torch.arange(10, 26).view(2, 8))
        share = fired(model)
        shares = []
        for gated in gates(model):
            gated.gate.observers = (lambda a, gate=gated.gate: shares.append(gate.spikes(a).float().mean().item()),)
        model(input_ids=torch.arange(10, 26).view(2, 8))
        assert share.item() == pytest.approx(sum(shares) / len(shares))
        assert 0 < share.item() < 1
        gate = gates(model)[0].gate
        a = self.a.clone().requires_grad_()
        gate(a)
        gate.fired.backward()
        surrogate = 1 / (1 + (math.pi * (self.a / 2 - 0.25)) ** 2)
        assert a.grad is None
        torch.testing.assert_close(gate.v_threshold.grad, -surrogate.mean().view(1))

    def test_the_relu_by_value(self):
        a = self.a.clone().requires_grad_()
        gate = self.gate("relu")
        gated = gate(a)
        assert gated.tolist() == [[0, 0, 0, 0.5, 1.0, 3.0]]
        gated.sum().backward()
        assert a.grad.tolist() == [[0, 0, 0, 1, 1, 1]]

    @pytest.mark.parametrize("training", [True, False])
    def test_the_random_mask_silences_its_share_whatever_the_activation_is(self, training):
        gate = self.gate("random_mask", rate=0.75).train(training)
        gated = gate(self.a.repeat(4000, 1) + 10)
        assert (gated == 0).float().mean(0).tolist() == pytest.approx([0.75] * 6, abs=0.03)
        assert set(gated[:, 5].tolist()) == {0, 13}

    def test_dropout_scales_in_training_and_passes_in_evaluation(self):
        gate = self.gate("dropout", rate=0.75).train()
        gated = gate(self.a.repeat(4000, 1))
        assert set(gated[:, 5].tolist()) == {0, 12}
        assert (gated[:, 5] == 0).float().mean().item() == pytest.approx(0.75, abs=0.03)
        assert torch.equal(gate.eval()(self.a), self.a)

    def test_masks_are_those_of_the_seed_and_differ_between_modules(self):
        masks = [[g.gate(torch.ones(8, 8)) for g in gates(adapted("random_mask", s, rate=0.5))[:2]] for s in (0, 0, 1)]
        assert torch.equal(masks[0][0], masks[1][0])
        assert not torch.equal(masks[0][0], masks[2][0])
        assert not torch.equal(masks[0][0], masks[0][1])

    def test_the_rank_of_the_same_operations_by_hand(self):
        base = tiny_opt()  # attention is 32 to 32; of fc1 and fc2 one has 32 to 64, the other 64 to 32: sums are equal
        for sparsity, rank in ((0.0, 8), (0.5, 6), (0.75, 5), (0.99, 4)):
            config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
            assert rank_of_same_operations(base, config, sparsity) == rank

    def test_all_methods_of_a_seed_start_from_the_same_a(self):
        options = {"spikelora": {"v_threshold": 0.1}, "two_sided": {}, "relu": {}, "random_mask": {"rate": 0.5}}
        starts = [
            {n: p for n, p in adapted(method, **own).named_parameters() if "lora_A" in n}
            for method, own in [("lora", {}), *options.items()]
        ]
        assert len(starts[0]) == 12
        assert all(torch.equal(p, other[n]) for other in starts[1:] for n, p in starts[0].items())

    def test_the_meter_sees_the_mask_without_changing_the_result(self):
        ids = torch.arange(10, 26).view(2, 8)
        alone = adapted("random_mask", rate=0.6).eval()(input_ids=ids).logits
        model = adapted("random_mask", rate=0.6).eval()
        with SparsityMeter(model) as meter:
            assert torch.equal(model(input_ids=ids).logits, alone)
        assert all(isinstance(g.gate, RandomMask) for g in gates(model))
        assert meter.report().sparsity == pytest.approx(0.6, abs=0.05)


class TestStatistics:
    def test_a_difference_is_paired_by_seed(self):
        ours, lora = {0: 0.5, 1: 0.7, 2: 0.6, 5: 9.0}, {0: 0.4, 1: 0.5, 2: 0.55, 7: 1.0}
        found = paired.difference(ours, lora)
        test = stats.ttest_rel([0.5, 0.7, 0.6], [0.4, 0.5, 0.55])
        interval = test.confidence_interval()
        assert (found.n, found.p) == (3, pytest.approx(test.pvalue))
        assert (found.mean, found.low, found.high) == pytest.approx((0.35 / 3, interval.low, interval.high))

    def test_two_seeds_give_no_p(self):
        assert math.isnan(paired.difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0}).p)
        assert paired.difference({0: 1.0}, {1: 1.0}) is None

    @pytest.mark.parametrize("difference", [0.0, 1 / 872])
    def test_differences_that_are_all_the_same_give_no_p(self, difference):
        lora = {0: 0.8, 1: 0.9, 2: 0.7}
        assert math.isnan(paired.difference({s: value + difference for s, value in lora.items()}, lora).p)

    def test_holm_by_hand(self):
        corrected = paired.holm([0.01, 0.04, math.nan, 0.03])
        assert corrected[:2] + corrected[3:] == pytest.approx([0.03, 0.06, 0.06])
        assert math.isnan(corrected[2])


class TestStore:
    def test_one_and_one_point_zero_are_the_same_run_in_any_study(self, study):
        first = read_study(study).runs
        other = study.parent / "other.toml"
        other.write_text(STUDY.replace("1e-2", "0.01").replace("[0.1, 2.0]", "[2, 0.1]").replace("Tiny", "Other"))
        assert {run.key for run in read_study(other).runs} == {run.key for run in first}
        assert len(first) == 6

    def test_a_claim_excludes_others_until_it_ends(self, tmp_path):
        first, second = Store(tmp_path), Store(tmp_path)
        with first.claim(RUN) as mine, second.claim(RUN) as others, second.claim(replace(RUN, seed=1)) as another:
            assert (mine, others, another) == (True, False, True)
        with second.claim(RUN) as others:
            assert others

    def test_what_cannot_be_written_leaves_nothing_that_is_read(self, tmp_path):
        store = Store(tmp_path)
        with pytest.raises(ValueError, match="Out of range float"):
            store.put(RUN, canned(RUN) | {"result": {"loss": math.nan}})
        assert store.get(RUN) is None


class TestRunning:
    def test_a_failed_run_is_recorded_left_and_retried_on_request(self, study, monkeypatch, capsys):
        tried = []

        def fail(run, bar=False):
            tried.append(run)
            if run.seed == 1 and run.method == "lora":
                raise RuntimeError(f"no memory in {ROOT}/src")
            return canned(run)

        monkeypatch.setattr(runner, "train", fail)
        command = ["run", str(study), "--results", str(study.parent / "results")]
        assert main(command) == 1
        assert "5 trained now" in (output := capsys.readouterr()).out
        assert "RuntimeError: no memory in ./src" in output.err
        failed = [line for line in results_in(study.parent / "results").values() if line["status"] == "failed"]
        assert [(line["config"]["method"], line["config"]["seed"]) for line in failed] == [("lora", 1)]
        assert main(command) == 1
        assert len(tried) == 6
        monkeypatch.setattr(runner, "train", canned)
        assert main([*command, "--retry"]) == 0
        assert "1 trained now, 5 were there" in capsys.readouterr().out

    def test_a_run_that_another_process_trains_is_left_to_it(self, study, monkeypatch, capsys):
        monkeypatch.setattr(runner, "train", canned)
        store = Store(study.parent / "results")
        with store.claim(read_study(study).runs[0]):
            assert main(["run", str(study), "--results", str(store.folder)]) == 0
        assert "5 trained now, 0 were there, 1 in other processes" in capsys.readouterr().out

    def test_each_line_of_list_trains_one_run(self, study, monkeypatch, capsys):
        monkeypatch.setattr(runner, "train", canned)
        results = study.parent / "results"
        assert main(["list", str(study), "--results", str(results)]) == 0
        commands = capsys.readouterr().out.splitlines()
        assert len(commands) == 6
        for done, command in enumerate(commands, 1):
            python, flag, module, *arguments = shlex.split(command)
            assert (python, flag, module) == ("python", "-m", "experiments")
            assert main(arguments) == 0
            assert len(results_in(results)) == done
        assert main(["list", str(study), "--results", str(results)]) == 0
        assert not capsys.readouterr().out.splitlines()[6:]

    def test_an_unknown_run_is_refused(self, study, capsys):
        assert main(["run", str(study), "--only", "abc", "--results", str(study.parent / "results")]) == 2
        assert "has no run abc" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("method", "own"), [("spikelora", {"v_threshold": 0.1, "tau": 2.0}), ("dropout", {"rate": 0.5})]
    )
    def test_the_same_configuration_gives_the_same_result(self, method, own, on_the_cpu):
        run = replace(RUN, method=method, **own)
        first, second = train(run), train(run)
        assert first["result"] == second["result"]
        assert first["result"]["metrics"]["loss"] != train(replace(run, seed=1))["result"]["metrics"]["loss"]

    @pytest.mark.parametrize(
        ("method", "own"),
        [
            ("spikelora", {"target_sparsity": 0.9, "target_scope": "adapter", "target_warmup": 0.5}),
            pytest.param("two_sided", {"target_sparsity": 0.9}, marks=pytest.mark.slow),
            ("spikelora", {"learn_threshold": True, "v_threshold": 0.1, "train_rows": 32}),
        ],
    )
    def test_targets_are_held_and_thresholds_learned(self, method, own):
        options = {"train_rows": 192, "eval_rows": 32, "learning_rate": 1e-3, "tau": 2.0} | own
        found = train(replace(RUN, method=method, **options))["result"]["sparsity"]
        thresholds = {module["v_threshold"] for module in found["by_module"].values()}
        is_common = own.get("target_scope") == "adapter"
        assert is_common or len(thresholds) == len(found["by_module"])  # none is that of another, nor the first
        if "target_sparsity" in own:
            assert found["sparsity"] == pytest.approx(0.9, abs=0.05)  # after 48 steps, from about 0.5
        else:
            assert all(0.05 < v_threshold < 0.15 for v_threshold in thresholds)

    def test_a_test_part_is_measured_at_the_end_and_operations_are_counted(self):
        run = replace(RUN, method="spikelora", v_threshold=0.1, tau=2.0, test=True)
        result = train(run)["result"]
        assert result["test"]["rows"] == 4
        assert result["test"]["loss"] != result["metrics"]["loss"]
        assert 0 < result["test"]["sparsity"] < 1
        # q, k, v and out 192 by 192, fc1 192 by 768, fc2 768 by 192, in each of 4 layers.
        outs = {"fc1": 768}
        sparsity = {name: module["sparsity"] for name, module in result["sparsity"]["by_module"].items()}
        expected = sum(
            8 * ((768 if name.endswith("fc2") else 192) + (1 - s) * outs.get(name.rpartition(".")[2], 192))
            for name, s in sparsity.items()
        )
        assert result["operations"] == pytest.approx(expected)
        assert train(replace(RUN))["result"]["operations"] == 8 * 4 * (4 * 384 + 2 * 960)

    def test_the_rate_of_a_is_its_own(self, monkeypatch):
        seen = []

        class Watched(torch.optim.AdamW):
            def __init__(self, groups, **options):
                super().__init__(groups, **options)
                seen.append({p.shape: group["lr"] for group in groups for p in group["params"]})

        monkeypatch.setattr(torch.optim, "AdamW", Watched)
        train(replace(RUN, A_rate=0.25, r=3))
        rates = {("A" if shape[0] == 3 else "B"): rate for shape, rate in seen[0].items()}
        assert rates == {"A": 0.0025, "B": 0.01}

    def test_a_classification_run_records_what_is_asked_for(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SPIKELORA_DATA", str(tmp_path))
        (tmp_path / "sst2").mkdir()
        for name in ("train", "dev", "test"):
            (tmp_path / "sst2" / f"{name}.txt").write_text("1 a very good film\n0 bad\n" * 8)
        own = {"task": "sst2", "method": "spikelora", "v_threshold": 0.1, "tau": 2.0, "train_rows": None}
        line = train(replace(RUN, **own, eval_rows=None, epochs=8))
        result = line["result"]
        assert (result["train_rows"], result["eval_rows"], result["steps"], len(result["history"])) == (16, 16, 32, 8)
        assert result["metrics"]["accuracy"] == 1.0  # two sentences are soon told apart
        assert result["generalisation_gap"] == pytest.approx(0, abs=1e-5)
        assert 0 < result["sparsity"]["sparsity"] < 1
        assert set(result["sparsity"]["by_module"]) == set(result["gradient_norms"]["A"]["by_module"])
        assert len(result["gradient_norms"]["B"]["by_epoch"]) == 8
        assert all(norm > 0 for norm in result["gradient_norms"]["B"]["by_epoch"])
        assert line["where"]["training_seconds"] > 0

    def test_a_study_from_its_runs_to_its_pictures(self, study):
        results = study.parent / "results"
        assert main(["run", str(study), "--results", str(results)]) == 0
        lines = results_in(results)
        assert {key: line["status"] for key, line in lines.items()} == {
            run.key: "done" for run in read_study(study).runs
        }
        assert str(ROOT) not in json.dumps(lines)
        table = tables.markdown(read_study(study), Store(results))
        silent = next(line for line in table.splitlines() if "v_threshold=2" in line)
        assert "1.000 ± 0.000" in silent  # a threshold of 2 silences everything
        pictures = study.parent / "pictures"
        assert main(["plot", str(study), "--results", str(results), "--output", str(pictures)]) == 0
        assert {p.name for p in pictures.iterdir()} == {
            f"tiny-{n}.png" for n in ("sweep", "modules", "gradients", "history")
        }

    @pytest.mark.slow
    def test_an_interruption_from_the_keyboard_waits_for_no_run(self, study):
        study.write_text(STUDY.replace("train_rows = 8", "train_rows = 200").replace("[0, 1]", "[0, 1, 2, 3]"))
        results = study.parent / "results"
        command = [sys.executable, "-m", "experiments", "run", str(study), "--results", str(results), "--workers", "2"]
        stopped = subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # all of its processes get the signal, as from a terminal
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        )
        while stopped.poll() is None and not list(results.glob("*.jsonl")):
            time.sleep(0.02)
        before = len(list(results.glob("*.jsonl")))
        os.killpg(stopped.pid, signal.SIGINT)
        said = stopped.communicate(timeout=60)[1]
        assert "interrupted; runs that were finished are kept" in said
        assert not {"Traceback", "leaked"} & set(said.split())
        assert stopped.returncode == 130
        assert 1 <= before <= len(list(results.glob("*.jsonl"))) <= before + 2  # those that were at their end

    @pytest.mark.slow
    def test_an_interrupted_study_goes_on_in_two_processes(self, study):
        results = study.parent / "results"
        command = [sys.executable, "-m", "experiments", "run", str(study), "--results", str(results)]
        options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        killed = subprocess.Popen([*command, "--workers", "2"], **options)
        while killed.poll() is None and not list(results.glob("*.jsonl")):
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()  # ends when the workers have, too, which share the pipes
        before = {path: path.stat().st_mtime_ns for path in results.glob("*.jsonl")}
        assert 1 <= len(before) < 6
        both = [subprocess.Popen(command, **options) for _ in range(2)]
        outputs = [process.communicate(timeout=300) for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        trained = sum(int(re.search(r"(\d+) trained now", out)[1]) for out, _ in outputs)
        assert trained == 6 - len(before)
        assert all(path.stat().st_mtime_ns == time_of for path, time_of in before.items())
        assert {key: line["status"] for key, line in results_in(results).items()} == {
            run.key: "done" for run in read_study(study).runs
        }


@pytest.mark.parametrize(
    ("named", "expected"),
    [(None, ["0", "0", "1", "1", "2"]), ("5,GPU-8c1f,3,0", ["3", "5", "5", "GPU-8c1f", "GPU-8c1f"])],
)
def test_workers_take_the_gpus_in_turn(named, expected, monkeypatch):
    for name in ("OMP_NUM_THREADS", "PYTORCH_NVML_BASED_CUDA_CHECK"):  # set by the pool, and put back
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    of_worker = {}
    with runner.worker_pool(5) as pool:
        while len(of_worker) < 5:  # as a fast one may take two of five
            said = pool.map(subprocess.getoutput, ["echo $PPID $CUDA_VISIBLE_DEVICES; sleep 0.1"] * 5)
            of_worker |= dict(line.split() for line in said)
    assert sorted(of_worker.values()) == expected


@pytest.mark.slow
def test_what_workers_are_forked_from_does_not_begin_with_cuda():
    code = (
        "import torch\n"
        "def begun(*_): raise SystemExit('CUDA was begun')\n"
        # What a build of torch with CUDA has; imports of it are no use of it.
        "def absent(name):\n"
        "    if name.startswith(('_cuda', '_CUDA', '_Cuda')): return begun\n"
        "    raise AttributeError(name)\n"
        "torch._C.__getattr__ = absent\n"
        "torch.cuda._device_count_nvml = lambda: 1\n"  # a GPU, as far as can be seen without CUDA
        "torch._C._cuda_getDeviceCount = torch.cuda._lazy_init = begun\n"
        "assert torch.cuda.is_available()\n"
        "import experiments.runner"
    )
    environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def run_together(folder: Path) -> int:
    return main(["run", str(folder.parent / "tiny.toml"), "--results", str(folder.parent / "results")])


@pytest.mark.slow
def test_processes_of_a_launch_train_one_run_together_and_record_it_once(study, on_the_cpu):
    study.write_text(STUDY.replace("[0, 1]", "[0]").replace("[0.1, 2.0]", "0.1").replace("rows = 8", "rows = 16"))
    assert in_processes(run_together, study.parent, 2) == [[0, 0]]
    lines = results_in(study.parent / "results").values()
    assert [line["status"] for line in lines] == ["done", "done"]
    for line in lines:
        assert (line["result"]["steps"], line["where"]["processes"]) == (4, 2)
        alone = train(Run(**line["config"]))["result"]
        # A sum over two processes rounds otherwise, and a spike at its threshold may flip: 9e-5 on one of two kinds of
        # CPU, where one training row less moves the loss by 5e-3.
        bound = 1e-5 if line["config"]["method"] == "lora" else 1e-3
        assert line["result"]["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], abs=bound)
        assert line["result"]["history"][0]["train_loss"] == pytest.approx(alone["history"][0]["train_loss"], abs=1e-5)


def test_a_batch_that_processes_cannot_share_is_refused(study, monkeypatch, capsys):
    monkeypatch.setattr(runner, "processes", lambda: SimpleNamespace(num_processes=3))
    assert main(["run", str(study), "--results", str(study.parent / "results")]) == 2
    assert "`batch_size` is of all 3 processes together" in capsys.readouterr().err


class TestTables:
    def table(self, study, seeds, values) -> str:
        study.write_text(STUDY.replace("[0, 1]", str(seeds)).replace("[0.1, 2.0]", "0.1"))
        store = Store(study.parent / "results")
        store.folder.mkdir(exist_ok=True)
        for run in read_study(study).runs:
            line = canned(run)
            line["result"]["metrics"]["loss"] = values[run.method][run.seed]
            store.put(run, line)
        return tables.markdown(read_study(study), store)

    def test_a_table_by_value(self, study):
        table = self.table(study, [0, 1, 2], {"lora": [4.0, 3.0, 2.0], "spikelora": [3.49, 2.5, 1.51]})
        assert table.splitlines()[:11] == [
            "| method | seeds | held-out loss | difference to LoRA |",
            "|---|---|---|---|",
            "| lora | 3 | 3.000 ± 1.000 [0.516, 5.484] |  |",
            "| spikelora v_threshold=0.1 | 3 | 2.500 ± 0.990 [0.041, 4.959] | **-0.500 [-0.525, -0.475]** |",
            "",
            "<details><summary>More figures</summary>",
            "",
            "| method | p | gap | CPU min |",
            "|---|---|---|---|",
            "| lora |  | 0.250 ± 0.000 | 0.5 |",
            "| spikelora v_threshold=0.1 | < 0.001 | 0.250 ± 0.000 | 0.5 |",
        ]

    def test_a_table_of_the_test_part_has_its_figures_alone(self, study):
        text = (
            STUDY.replace("[0, 1]", "[0, 1, 2]")
            .replace("[0.1, 2.0]", "0.1")
            .replace("eval_rows", "test = true\neval_rows")
        )
        study.write_text(text.replace("title", 'part = "test"\ntitle', 1))
        store = Store(study.parent / "results")
        store.folder.mkdir(exist_ok=True)
        for run in read_study(study).runs:
            line = canned(run)
            line["result"]["test"] = {"loss": 3.0 + run.seed, "rows": 4}
            store.put(run, line)
        lines = tables.markdown(read_study(study), store).splitlines()
        assert lines[0].startswith("| method | seeds | test loss | difference to LoRA |")
        assert lines[2].startswith("| lora | 3 | 4.000 ± 1.000 ")

    def test_nothing_within_noise_is_bold(self, study):
        noise = self.table(study, [0, 1, 2], {"lora": [4.0, 3.0, 2.0], "spikelora": [3.0, 3.1, 1.0]})
        assert "**" not in noise
        assert "| 0.2" in noise

    def test_two_seeds_make_no_claim(self, study):
        table = self.table(study, [0, 1], {"lora": [4.0, 3.0], "spikelora": [3.49, 2.5]})
        assert "-0.505" in table
        assert "**" not in table

    def test_what_was_not_run_is_said(self, study):
        assert tables.markdown(read_study(study), Store(study.parent / "none")) == "*Not run: 6 runs are pending.*\n"

    def test_the_page_is_what_the_committed_results_give(self):
        store = Store(page.RESULTS)
        store.check()
        assert page.PAGE.read_text() == page.page(page.committed(), store, page.preface())
        pictures = {name for study in page.ended(page.committed(), store) for name in page.plots.figures(study, store)}
        assert pictures == {path.name for path in page.PICTURES.glob("*.png")}

    @pytest.mark.parametrize("task", ["cola", "sst2"])
    def test_the_rates_of_the_controls_are_the_sparsity_that_was_measured(self, task):
        study = read_study(page.STUDIES / f"controls_{task}.toml")
        lines = Store(page.RESULTS).done(study.runs)
        gated = [line for line in lines.values() if line["config"]["method"] == "spikelora"]
        if len(gated) < 3:
            pytest.skip(f"SpikeLoRA on {task} has not been run over all seeds yet")
        sparsity = np.mean([line["result"]["sparsity"]["sparsity"] for line in gated])
        (rate,) = {run.rate for run in study.runs} - {None}
        assert rate == pytest.approx(sparsity, abs=0.005)

    def test_committed_studies_can_be_read_and_are_all_compared_with_lora(self):
        studies = page.committed()
        assert {"thresholds_cola", "thresholds_sst2", "controls_cola", "controls_sst2", "language_model"} <= {
            study.name for study in studies
        }
        for study in studies:
            others = [cell for cell in study.cells if not cell.is_baseline]
            assert all(tables.beside(cell, study) for cell in others)
            assert all(tables.beside(cell, study, cell.against) for cell in others if cell.against)

    def test_a_method_is_compared_with_the_one_it_is_the_control_of(self, study):
        study.write_text(
            STUDY.replace("[0, 1]", "[0, 1, 2]").replace("[0.1, 2.0]", "0.1")
            + '[[methods]]\nname = "relu"\nagainst = "spikelora v_threshold=0.1"\n'
        )
        store = Store(study.parent / "results")
        store.folder.mkdir()
        losses = {"lora": [4.0, 4.1, 4.2], "spikelora": [3.0, 3.2, 3.4], "relu": [3.5, 3.71, 3.89]}
        for run in read_study(study).runs:
            line = canned(run)
            line["result"]["metrics"]["loss"] = losses[run.method][run.seed]
            store.put(run, line)
        lines = tables.markdown(read_study(study), store).splitlines()
        assert "| difference to LoRA | against | difference |" in lines[0]
        assert lines[8].startswith("| method | p | p of that |")
        ps = [stats.ttest_rel(losses[a], losses[b]).pvalue for a, b in (("spikelora", "lora"), ("relu", "spikelora"))]
        ps.append(stats.ttest_rel(losses["relu"], losses["lora"]).pvalue)
        assert "| spikelora v_threshold=0.1 | **+0.500 [+0.475, +0.525]** |" in lines[4]
        assert f"| {paired.holm(ps)[0]:.3f} |" in lines[11]
        assert "| < 0.001 |" in lines[12]

    def test_a_table_that_is_not_complete_makes_no_claim_and_names_what_failed(self, study):
        values = {"lora": [4.0, 3.0, 2.0], "spikelora": [3.49, 2.5, 1.51]}
        assert "**" in self.table(study, [0, 1, 2], values)
        store, runs = Store(study.parent / "results"), read_study(study).runs
        failed = {"status": "failed", "error": "Diverged: no", "versions": {}, "where": {}}
        study.write_text(study.read_text().replace("[0, 1, 2]", "[0, 1, 2, 3]"))
        pending, failing = (run for run in read_study(study).runs if run not in runs)
        store.put(failing, failed)
        incomplete = tables.markdown(read_study(study), store)
        assert incomplete.startswith("*Incomplete: 1 of 8 runs are pending.*")
        assert "**" not in incomplete
        assert "| spikelora v_threshold=0.1 | 3 of 4, 1 failed |" in incomplete
        assert "\n- spikelora v_threshold=0.1: Diverged: no\n" in incomplete
        store.put(pending, canned(pending))
        assert "**" not in tables.markdown(read_study(study), store)  # what is left of the seeds is a selection
        store.put(failing, canned(failing))
        assert "**" in tables.markdown(read_study(study), store)

    def test_a_study_of_which_all_runs_failed_says_why(self, study):
        store = Store(study.parent / "results")
        store.folder.mkdir()
        for run in read_study(study).runs:
            store.put(run, {"status": "failed", "error": "Diverged: a\nsecond line", "versions": {}, "where": {}})
        text = tables.markdown(read_study(study), store)
        assert text.startswith("*Not run: 0 runs are pending, 6 failed.*\n\n- lora: Diverged: a second line (2 times)")

    def test_a_sweep_draws_a_method_at_its_default_beside_its_values(self, study):
        study.write_text(STUDY.replace("v_threshold = [0.1, 2.0]", "target_sparsity = [0.5, 0.7, 0.9]"))
        study.write_text(study.read_text() + '[[methods]]\nname = "spikelora"\n')
        store = Store(study.parent / "results")
        store.folder.mkdir()
        for run in read_study(study).runs:
            store.put(run, canned(run))
        sweep = page.plots.figures(read_study(study), store)["tiny-sweep.png"]
        assert len(sweep.axes[0].containers) == 1
        assert len([line for line in sweep.axes[0].lines if line.get_linestyle() == "--"]) == 2
        labels = [text.get_text() for text in sweep.axes[0].get_legend().get_texts()]
        assert labels == ["lora", "spikelora by default", "spikelora"]

    @pytest.mark.parametrize(("part", "changed"), [("where", {"device": "another CPU"}), ("versions", {"torch": "3"})])
    def test_runs_on_other_rows_devices_or_versions_are_no_pair(self, part, changed, study):
        table = self.table(study, [0, 1, 2], {"lora": [4.0, 3.0, 2.0], "spikelora": [3.49, 2.5, 1.51]})
        store = Store(study.parent / "results")
        for run in read_study(study).runs[-3:]:
            line = canned(run)
            line[part] |= changed
            store.put(run, line)
        mixed = tables.markdown(read_study(study), store)
        for of_pairs in ("difference to LoRA", "A / LoRA's", "correlation over modules"):
            assert of_pairs in table
            assert of_pairs not in mixed
        assert "tiny-gradients.png" not in page.plots.figures(read_study(study), store)

    def test_the_page_links_the_pictures_that_there_is_something_to_draw_of(self, study):
        store = Store(study.parent / "results")
        store.folder.mkdir()
        for run in read_study(study).runs:
            store.put(run, canned(run))
        drawn = page.plots.plot(read_study(study), store, study.parent / "pictures")
        text = page.page([read_study(study)], store)
        assert [path.name for path in drawn] == ["tiny-sweep.png", "tiny-gradients.png", "tiny-history.png"]
        assert re.findall(r"\(results/(.*)\)", text) == [path.name for path in drawn]

    def test_the_page_has_no_table_of_a_study_that_did_not_come_to_its_end(self, study):
        store = Store(study.parent / "results")
        store.folder.mkdir()
        for run in read_study(study).runs[:2]:
            store.put(run, canned(run))
        assert page.page([read_study(study)], store) == page.page([], store)
        for run in read_study(study).runs[2:]:
            store.put(run, canned(run))
        assert "## Tiny" in page.page([read_study(study)], store)

    def test_a_frontier_has_a_line_for_each_recipe_and_a_level_for_what_is_not_sparse(self, study):
        text = STUDY.replace('["sweep", "modules", "gradients", "history"]', '["frontier"]')
        study.write_text(text + '\n[[methods]]\nname = "lora"\nr = 16\n')
        store = Store(study.parent / "results")
        store.folder.mkdir()
        for run in read_study(study).runs:
            line = canned(run)
            if run.method == "spikelora":
                sparsity = {"sparsity": 0.5 + run.v_threshold / 10, "by_module": {}}
                line["result"]["sparsity"] = sparsity
            store.put(run, line)
        (picture,) = page.plots.figures(read_study(study), store).values()
        (panel,) = picture.axes
        assert panel.get_legend_handles_labels()[1] == ["lora", "lora r=16", "spikelora"]
        points = panel.containers[0].lines[0]
        assert points.get_xdata() == pytest.approx([0.51, 0.7])
        assert points.get_ydata() == pytest.approx([-0.5, -0.5])
