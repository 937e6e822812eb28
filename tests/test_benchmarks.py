"""The benchmarks: what they count is right, a wrong result stops them, and a run writes what it says."""

import getpass
import importlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from benchmarks import check, events, goals, host, measure, models, sparsity, whole_model
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import times, values
from benchmarks.gpu.run import Run
from benchmarks.report import show
from rich.console import Console

from spikelora.method.ops import linear, torch_backend, triton_backend

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MACHINE = {"device", "cores", "threads", "python", "torch", "peft", "transformers", "spikingjelly", "spikelora", "date"}
COLUMNS = {
    "whole_model": {"style", "hidden", "r", "dtype", "quantity", "method", "rounds", "seconds", "seconds_q25"}
    | {"seconds_q75", "to_lora", "to_base", "to_transcription", "overhead_share", "lora_overhead_clear", "error"},
    "memory": {"method", "held_mb", "added_mb", "peak_mb", "peak_to_lora", "added_to_lora", "judged_by", "error"},
    "sparsity": {"r", "quantity", "sparsity", "measured_sparsity", "firing_tokens", "seconds", "to_dense", "to_lora"},
    "events": {"tokens", "width", "r", "firing_tokens", "dense_seconds", "event_driven_seconds", "to_dense"}
    | {"max_firing", "min_elements"},
    "one_layer": {"tokens", "width", "r", "quantity", "method", "seconds", "to_lora", "overhead_share", "error"},
    "host": {"way", "dtype", "quantity", "method", "launches", "seconds", "to_lora", "overhead_share"},
    "import_time": {"what", "rounds", "milliseconds", "milliseconds_q25", "milliseconds_q75"},
}
GPU_TABLES = {
    "checks": {"what", "worst", "error", "limit"},
    "times": {"style", "hidden", "quantity", "to_lora", "q25", "q75", "overhead", "goal", "met"},
    "launches": {"method", "launches", "host_ms"},
    "training": {"method", "steps", "before", "after", "seconds"},
}


class TestMemory:
    def test_of_known_tensors(self):
        held = torch.zeros(1000)
        kept = []

        def call():
            first = torch.empty(300_000, dtype=torch.float32)
            second = torch.empty(100_000, dtype=torch.float64)
            del first, second
            kept.append(torch.empty(500_000, dtype=torch.float32))

        memory = measure.peak_memory(call, [held, held.view(10, 100)], CPU)
        assert memory == measure.Memory(held=4000, added=2_000_000)
        assert memory.peak == 2_004_000

    def test_what_a_backward_keeps(self):
        """`exp` saves its output, its backward makes a gradient of the same size, and `sum` starts from 4 bytes."""
        x = torch.zeros(1_000_000, requires_grad=True)
        memory = measure.peak_memory(lambda: x.exp().sum().backward(), [x], CPU)
        assert memory.held == 4_000_000
        assert 8_000_000 <= memory.added <= 8_000_100


class TestStatistics:
    # Added to the base: LoRA 1, 1, 3 and SpikeLoRA 0.5, 0.8, 1.5.
    times = pd.DataFrame({"base": [1.0, 1.0, 1.0], "LoRA": [2.0, 2.0, 4.0], "SpikeLoRA": [1.5, 1.8, 2.5]})

    def test_a_ratio_is_taken_within_its_round(self):
        ratios = measure.ratio(self.times, "SpikeLoRA", "LoRA")
        assert list(ratios) == [0.75, 0.9, 0.625]
        assert measure.spread(ratios, "to_lora") == {"to_lora": 0.75, "to_lora_q25": 0.6875, "to_lora_q75": 0.825}

    def test_overhead_is_a_share_of_loras(self):
        assert list(measure.overhead_share(self.times, "SpikeLoRA", "base", "LoRA")) == pytest.approx([0.5, 0.8, 0.5])

    @pytest.mark.parametrize(
        ("added", "clear"),
        [([1.0, 1.0, 1.2], True), ([1.0, 1.0, 3.0], False), ([-1.0, -1.0, -1.0], False), ([0.1, 0.1, 0.1], False)],
    )
    def test_an_overhead_within_its_own_spread_is_not_clear(self, added, clear):
        times = pd.DataFrame({"base": 6.0, "LoRA": [6 + a for a in added]})
        assert measure.overhead_is_clear(times, "base", "LoRA") is clear

    def test_rounds_are_interleaved(self):
        called = []
        calls = {name: lambda name=name: called.append(name) for name in "abc"}
        times = measure.interleaved(calls, 8, CPU)
        rounds = [tuple(called[k : k + 3]) for k in range(0, len(called), 3)]
        assert len(rounds) == 9  # the first warms up
        assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
        assert len(set(rounds)) > 1
        assert times.shape == (8, 3)

    @pytest.mark.parametrize(
        ("ratios", "share"), [([0.5, 0.75, 1.25], 0.3), ([1.5, 2, 3], 0.0), ([0.1, 0.2, 0.9], float("inf"))]
    )
    def test_break_even(self, ratios, share):
        assert events.break_even([0.0, 0.2, 0.4], ratios) == pytest.approx(share)

    @pytest.mark.parametrize(("share", "silent"), [(0.0, 0), (0.5, 4), (0.75, 6)])
    def test_a_threshold_silences_its_share(self, share, silent):
        a = torch.tensor([[3.0, -1.0, 2.0, 0.5], [-2.0, 8.0, 1.0, 4.0]])
        v, threshold = a / 2, sparsity.threshold_for(share, a)
        assert (v < threshold).sum() == silent
        # Neither of the two products that give `a` decides it by its rounding.
        assert (v - threshold).abs().min() > 0.1

    @pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
    def test_a_share_of_the_tokens_fires(self, share):
        a = events.activation(events.Size(40, 8, 4), share, torch.Generator().manual_seed(0))
        assert (a > 0).any(1).sum() == 40 * share


class TestGoals:
    # Any number will do: a goal is compared with what is measured, never the other way round.
    def table(self, ratio: float, share: float, clear: bool = True) -> dict[str, pd.DataFrame]:
        row = {"style": "OPT", "hidden": 1024, "layers": 3, "r": 8, "dtype": "float32", "method": "SpikeLoRA"}
        row |= {"quantity": "training step", "lora_overhead_clear": clear}
        for column, value in (("to_lora", ratio), ("overhead_share", share), ("to_transcription", 0.5)):
            row |= {column: value, f"{column}_q25": value - 0.01, f"{column}_q75": value + 0.01}
        return {"whole_model": pd.DataFrame([row, row | {"hidden": 768, "to_lora": 0.1}])}

    def test_missed_says_missed(self):
        verdicts = goals.judge(goals.goals(CPU), self.table(0.921, 0.5)).set_index("goal")
        assert verdicts.loc["OPT: training step / LoRA's", "verdict"] == "missed"
        assert verdicts.loc["OPT: training step / LoRA's", "measured"] == 0.921
        assert verdicts.loc["OPT: training step / transcription's", "verdict"] == "met"

    def test_met_at_the_limit(self):
        verdicts = goals.judge(goals.goals(CPU), self.table(0.92, 0.5))
        assert list(verdicts["verdict"]) == ["met", "met", "met"]

    def test_not_a_number_is_missed(self):
        verdicts = goals.judge(goals.goals(CPU), self.table(float("nan"), 0.5))
        assert verdicts["verdict"][0] == "missed"

    def test_noise_is_said(self):
        verdicts = goals.judge(goals.goals(CPU), self.table(0.8, 0.6, clear=False))
        assert verdicts.set_index("limit").loc[0.5, "note"] == "LoRA's overhead is within noise"

    def test_the_verdict_is_printed(self, capsys):
        verdicts = goals.judge(goals.goals(CPU), self.table(0.99, 0.5))
        show({}, verdicts, {"device": "a machine"}, Console(width=140, markup=False))
        line = next(line for line in capsys.readouterr().out.splitlines() if "training step / LoRA's" in line)
        assert "0.92" in line
        assert "0.99" in line
        assert "missed" in line


class TestAWrongResult:
    """Where there is a GPU as well on the CPU, whose arithmetic they put wrong."""

    @pytest.fixture(autouse=True)
    def on_the_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    @pytest.fixture
    def wrong_scaling(self, monkeypatch):
        add_up_, add_adapter_ = torch_backend.add_up_, torch_backend.add_adapter_

        def wrong(y, a, B, v_threshold, tau, scaling):
            add_up_(y, a, B, v_threshold, tau, 1.1 * scaling)

        def wrong_as_well(y, x, A, B, v_threshold, tau, scale, scaling, need_a):
            return add_adapter_(y, x, A, B, v_threshold, tau, scale, 1.1 * scaling, need_a)

        monkeypatch.setattr(torch_backend, "add_up_", wrong)
        monkeypatch.setattr(torch_backend, "add_adapter_", wrong_as_well)

    @pytest.mark.parametrize("benchmark", ["whole_model", "sparsity", "events", "one_layer"])
    def test_of_ours_stops_the_run_without_a_figure(self, benchmark, wrong_scaling, tmp_path, capsys):
        assert main(["--quick", "--only", benchmark, "--output", str(tmp_path)]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert "a result is wrong" in output.err
        assert list(tmp_path.iterdir()) == []

    def test_of_the_transcription_stops_it_too(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(models, "TAU", 2.5)
        assert main(["--quick", "--only", "whole_model", "--output", str(tmp_path)]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert "SpikeLoRA and the transcription differ" in output.err

    @pytest.mark.parametrize("wrong", [float("nan"), 1.03])
    def test_tolerances(self, wrong):
        results = {name: torch.ones(5) for name in "abc"}
        assert check.compare("x and y", results, results, torch.float32) == 0
        with pytest.raises(check.CheckError, match=r"x and y differ by .* in the b"):
            check.compare("x and y", results | {"b": torch.full((5,), wrong)}, results, torch.float32)

    def test_a_factor_on_everything_is_seen_in_the_median(self):
        results = {name: torch.ones(5) for name in "abc"}
        with pytest.raises(check.CheckError, match="in the median of 3"):
            check.compare("x and y", {k: 1.005 * v for k, v in results.items()}, results, torch.float32)


def test_methods_share_the_base_and_the_adapter():
    base = models.base_model("Llama", 64, 1, torch.float32, CPU)
    built = models.methods(base, 4)
    tensors = {name: dict(method.model.named_parameters()) for name, method in built.items()}
    ours = tensors[models.OURS]
    trained = built[models.OURS].trained()
    assert len(trained) == 2 * 7  # A and B of 7 linear layers; the head has none
    for name in (models.LORA, models.TRANSCRIPTION):
        assert built[name].trained().keys() == trained.keys()
        assert all(torch.equal(p, ours[key]) for key, p in tensors[name].items())
    assert all(p.count_nonzero() for p in trained.values())
    assert not built[models.BASE].trained()


def test_the_headline_has_nine_rounds():
    cells = [cell for cell in whole_model._cpu() if cell.hidden == 1024 and cell.r == 8 and cell.dtype == torch.float32]
    assert {cell.style for cell in cells} == {"OPT", "Llama"}
    assert all(cell.rounds >= 9 for cell in cells)


def test_quick_does_not_replace_the_real_figures(capsys):
    with pytest.raises(SystemExit):
        main(["--quick"])
    assert "--quick needs --output" in capsys.readouterr().err


CPU_ALONE = {"events", "host"}


def test_what_is_for_a_cpu_alone_has_no_jobs_on_a_gpu():
    jobs = {name: benchmark.jobs(torch.device("cuda"), quick=True) for name, benchmark in BENCHMARKS.items()}
    assert {name for name in jobs if not jobs[name]} == CPU_ALONE


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.slow
@pytest.mark.parametrize("on", ["cpu", GPU])
def test_a_quick_run(on, tmp_path):
    expected = {name: columns for name, columns in COLUMNS.items() if name not in CPU_ALONE or on == "cpu"}
    # One thread: such sizes are all start of threads, which takes very long where others use the cores.
    command = [sys.executable, "-W", "error", "-m", "benchmarks", "--quick", "--output", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if on == "cpu" else {})
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # The goals of a GPU are about sizes that are not quick.
    assert {path.stem for path in tmp_path.glob("*.csv")} == expected.keys() | ({"goals"} if on == "cpu" else set())
    assert {path.stem for path in tmp_path.glob("*.png")} == expected.keys() - {"host", "memory", "import_time"}
    for name, columns in expected.items():
        table = pd.read_csv(tmp_path / f"{name}.csv")
        assert len(table)
        assert columns | MACHINE <= set(table.columns)
    assert set(pd.read_csv(tmp_path / "whole_model.csv")["method"]) == set(models.METHODS)
    assert set(BENCHMARKS) <= set(COLUMNS)
    written = "".join(path.read_text() for path in tmp_path.glob("*.csv"))
    for private in (platform.node(), str(Path.home()), str(ROOT)):
        assert private not in written
    assert getpass.getuser() not in pd.read_csv(tmp_path / "memory.csv").astype(str).to_numpy()
    titles = ["Whole model, training step", "Peak memory", "Cost against sparsity"]
    for title in titles + ["Skipping silent tokens", "The host's part", "Goals"] * (on == "cpu"):
        assert title in result.stdout


class TestHost:
    """The launches of one layer, by hand: LoRA's five, and seven with a bfloat16 base, are its products and casts."""

    @pytest.mark.parametrize(
        ("dtype", "lora", "ours"),
        [
            # base, two products, scaling, sum; ours without the scaling, or as the base and two kernels
            (torch.float32, (5, 5, 12), {host.CPU: (4, 4, 16), host.KERNELS: (3, 3, 7)}),
            # and the casts of x and of the sum
            (torch.bfloat16, (7, 7, 17), {host.CPU: (6, 6, None), host.KERNELS: (3, 3, 7)}),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("way", [host.CPU, host.KERNELS])
    def test_launches(self, dtype, lora, ours, way):
        counted = host.launches(way, dtype)
        for quantity, of_lora, of_ours in zip((host.INFERENCE, host.FORWARD, host.STEP), lora, ours[way], strict=True):
            assert counted[quantity][models.LORA] == of_lora
            # The products of bfloat16 in the backward go in parts that depend on the CPU.
            assert of_ours is None or counted[quantity][models.OURS] == of_ours

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", host.KINDS)
    def test_kernels_are_fewer_than_lora_s_in_every_kind_of_training(self, kind, dtype):
        for counted in host.launches(host.KERNELS, dtype, kind).values():
            assert counted[models.OURS] < counted[models.LORA]

    def test_kernels_are_not_started_and_come_back(self):
        kept = triton_backend._compiled, triton_backend.driver
        with host.as_on(host.KERNELS) as started:
            host.calls_of(torch.float32)[host.INFERENCE][models.OURS]()
        assert len(started) == 2
        assert kept == (triton_backend._compiled, triton_backend.driver)


class TestGpu:
    """`make gpu`, as far as a machine without a GPU can show it."""

    @pytest.mark.slow
    def test_a_dry_run(self, tmp_path):
        command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--output", str(tmp_path)]
        result = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert {path.name for path in tmp_path.iterdir()} == {f"gpu_{name}.csv" for name in GPU_TABLES}
        for name, columns in GPU_TABLES.items():
            table = pd.read_csv(tmp_path / f"gpu_{name}.csv")
            assert len(table)
            assert columns | {"device", "python", "versions", "date"} <= set(table.columns)
        training = pd.read_csv(tmp_path / "gpu_training.csv")
        assert (training["after"] < training["before"]).all()
        measured = pd.read_csv(tmp_path / "gpu_times.csv")
        assert set(measured["quantity"]) == set(times.GOALS)
        assert measured["met"].isna().all()
        assert not {"met", "missed"} & set(result.stdout.split())  # nothing is judged

    def test_a_wrong_value_ends_it(self, monkeypatch, tmp_path, capsys):
        add_up_ = torch_backend.add_up_
        monkeypatch.setattr(torch_backend, "add_up_", lambda *args: add_up_(*args[:-1], 1.01 * args[-1]))
        assert gpu.main(["--dry", "--output", str(tmp_path)]) == 1
        output = capsys.readouterr()
        assert "A result is wrong: float32 base, float32 adapter, r 8, learned numbers: relative error" in output.err
        assert "OPT" not in output.out  # nothing was timed
        assert list(tmp_path.iterdir()) == []

    def test_plain_torch_in_place_of_kernels_ends_it(self, monkeypatch, tmp_path, capsys):
        run = Run(dry=True)
        run.backend = "triton_backend"  # which layers have to take on a GPU
        monkeypatch.setattr(gpu, "Run", lambda dry: run)
        assert gpu.main(["--dry", "--output", str(tmp_path)]) == 1
        assert "takes spikelora.method.ops.torch_backend instead of triton_backend" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_kernels_that_are_not_kept_end_it(self, monkeypatch):
        """A backend of that name which keeps none, as if each launch were Triton's own."""
        run = Run(dry=True)
        run.backend = "triton_backend"
        names = ("add_adapter_", "adapter_backward")
        unkept = SimpleNamespace(__name__="a.triton_backend", **{name: getattr(torch_backend, name) for name in names})
        monkeypatch.setattr(linear, "_backend", lambda y, A: unkept)
        with pytest.raises(check.CheckError, match="fixed numbers: its kernels were not kept"):
            values.kernels(run)

    def test_times_that_are_not_reached_are_left_out(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(gpu, "VALUES", ())
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert gpu.main(["--dry", "--seconds", "0.1"]) == 0
        (said,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
        for task in ("host", "eager, OPT 64", *(f"compiled_training, OPT 64, {mode}" for mode in gpu.MODES)):
            assert task in said
        folder = tmp_path / "a_cpu_dry"
        assert {path.name for path in folder.iterdir()} == {f"gpu_{name}.csv" for name in GPU_TABLES}
        assert pd.read_csv(folder / "gpu_times.csv").empty

    def test_values_that_are_not_reached_are_no_success(self, tmp_path, capsys):
        assert gpu.main(["--dry", "--seconds", "0.01", "--output", str(tmp_path)]) == 1
        output = capsys.readouterr()
        assert "left out: kernels" in output.out
        assert "Not all values were compared" in output.err

    @pytest.mark.parametrize(
        ("quantity", "ratio", "overhead", "verdict"),
        [
            (times.TRAINING, 0.9, 0.5, "goal 0.90 (0.50): met"),
            (times.TRAINING, 0.91, 0.5, "goal 0.90 (0.50): missed"),
            (times.TRAINING, 0.9, 0.51, "goal 0.90 (0.50): missed"),
            (times.INFERENCE, 0.95, 0.9, "goal 0.95: met"),
            (times.DECODE, float("nan"), 0.9, "goal 1.00: missed"),
            (times.COMPILED["reduce-overhead"], 1.01, 0.9, "goal 1.00: missed"),
            (times.MEMORY, 0.8, None, "goal 0.80: met"),
        ],
    )
    def test_goals(self, quantity, ratio, overhead, verdict, capsys):
        run = Run(dry=True)
        run.dry = False
        spread = {} if overhead is None else {"q25": ratio, "q75": ratio}
        times.judge(run, times.Size("OPT", 1024), quantity, ratio, overhead, **spread)
        assert capsys.readouterr().out.endswith(f", {verdict}\n")
        assert run.tables["times"][0]["met"] is verdict.endswith(": met")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_so(self, capsys):
        assert gpu.main([]) == 2
        assert "There is no CUDA GPU here" in capsys.readouterr().err

    def test_it_needs_few_packages(self, monkeypatch):
        """For those of spikelora see tests/test_registration.py."""
        for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
            monkeypatch.delitem(sys.modules, name)
        for name in ("pandas", "rich", "matplotlib", "spikingjelly", "datasets", "trl"):
            monkeypatch.setitem(sys.modules, name, None)
        assert importlib.import_module("benchmarks.gpu.__main__") is not gpu
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("benchmarks.__main__")
