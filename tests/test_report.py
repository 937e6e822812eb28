"""The report says what is in a folder, and what is missing."""

import json
import math
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import tiny_opt
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from spikelora import SparsityMeter, SpikeLoraConfig, SpikeLoraError
from spikelora.method.gate import SpikeGate
from spikelora.report.adapter import read_adapter
from spikelora.report.figures import by_layer, percent, plot_curves, plot_grid, shade, whole_percent
from spikelora.report.html import differing, render, results, run_names, summary, write_report
from spikelora.report.run import read_run, read_runs

TOKENS = torch.arange(3, 31).view(2, 14)
FC1 = "model.decoder.layers.0.fc1"
LOG = [
    {"step": 10, "loss": 4.5, "epoch": 0.5},
    {"step": 10, "sparsity": 0.75, "zero_threshold_sparsity": 0.5, "sparsity/fc1": 0.625, "sparsity/fc2": 0.875},
    {"step": 10, "eval_loss": 4.25},
    {"step": 10, "eval_sparsity": 0.8125},
    {"step": 20, "loss": 3.5},
    {"step": 20, "sparsity": 0.9, "zero_threshold_sparsity": 0.6, "sparsity/fc1": 0.85, "sparsity/fc2": 0.95},
    {"step": 20, "train_loss": 4.0},
]


@pytest.fixture
def model():
    """A spiking adapter with thresholds of its own in each module, one of which never fires."""
    torch.manual_seed(0)
    config = SpikeLoraConfig(r=4, lora_alpha=6, target_modules=["fc1", "fc2"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_opt(), config).eval()
    gates = [gate for gate in model.modules() if isinstance(gate, SpikeGate)]
    for gate, v_threshold in zip(gates, (-0.25, 1e6, 0.0, 0.0), strict=True):
        gate.v_threshold.data.fill_(v_threshold)
    for name, parameter in model.named_parameters():
        if "layers.0.fc1.lora_B" in name:
            parameter.data.fill_(0.5)
    return model


@pytest.fixture
def adapter_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def run_folder(model, adapter_folder):
    """A run with everything that a report can show."""
    with SparsityMeter(model) as meter:
        model(TOKENS)
    (adapter_folder / "sparsity.json").write_text(json.dumps(meter.report().to_dict()))
    (adapter_folder / "metrics.json").write_text(json.dumps({"before": {"loss": 4.75}, "spikelora": {"loss": 3.25}}))
    (adapter_folder / "config.yaml").write_text("data_path: <b>&.txt\n")
    for step, log in ((10, LOG[:4]), (20, LOG), (3, [])):
        checkpoint = adapter_folder / f"checkpoint-{step}"
        model.save_pretrained(checkpoint)
        write_state(checkpoint, step, log)
    return adapter_folder


def write_state(folder, step, log):
    state = {"global_step": step, "max_steps": 40, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))


@pytest.fixture
def lora_folder(tmp_path):
    """A run of LoRA that has saved its checkpoints alone."""
    checkpoint = tmp_path / "lora" / "checkpoint-20"
    get_peft_model(tiny_opt(), LoraConfig(r=2, target_modules=["fc1"])).save_pretrained(checkpoint)
    write_state(
        checkpoint, 20, [{"step": 10, "loss": 4.25}, {"step": 20, "loss": 3.75}, {"step": 20, "eval_loss": 3.5}]
    )
    return tmp_path / "lora"


def test_an_adapter_is_read_from_its_tensors(adapter_folder):
    adapter = read_adapter(adapter_folder)
    tensors = load_file(adapter_folder / "adapter_model.safetensors")
    first = adapter.modules[0]
    assert [m.name for m in adapter.modules] == [f"model.decoder.layers.{n}.fc{k}" for n in (0, 1) for k in (1, 2)]
    assert (first.r, first.scaling, first.v_threshold, first.tau) == (4, 1.5, -0.25, 2.0)
    assert first.norm_B == pytest.approx(0.5 * math.sqrt(64 * 4), rel=1e-6)
    assert first.norm_A == pytest.approx(tensors[f"base_model.model.{FC1}.lora_A.weight"].norm().item(), rel=1e-6)
    assert [module.is_untrained for module in adapter.modules] == [False, True, True, True]
    assert adapter.parameters == 2 * 2 * (4 * 32 + 64 * 4 + 2)
    assert adapter.n_bytes == (adapter_folder / "adapter_model.safetensors").stat().st_size
    facts = summary(adapter)
    assert facts["v_threshold"] == "-0.25 to 1e+06"
    assert (facts["tau"], facts["rank r"], facts["scaling"]) == ("2", "4", "1.5")
    assert facts["target modules"] == "fc1, fc2"
    assert facts["modules"] == "4, 3 of them untrained (B is 0)"


def test_rank_and_scaling_by_pattern_and_rslora(tmp_path):
    config = SpikeLoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"fc1": 9},
        alpha_pattern={"fc2": 8},
        use_rslora=True,
        target_modules=["fc1", "fc2"],
    )
    get_peft_model(tiny_opt(), config).save_pretrained(tmp_path)
    assert [(m.r, m.scaling) for m in read_adapter(tmp_path).modules] == [(9, 2.0), (4, 4.0)] * 2


def test_ten_comes_after_nine():
    values = {f"layers.{n}.fc1": n / 10 for n in (10, 9, 1)} | {"lm_head": 0.5}
    grid = by_layer(values)
    assert (grid.rows, grid.columns) == (["1", "9", "10", "outside the layers"], ["fc1", "lm_head"])
    assert grid.values["10", "fc1"] == 1.0
    assert ("1", "lm_head") not in grid.values


def test_modules_of_the_same_kind_in_a_layer_keep_apart():
    values = {"dec.0.self.q": 0.25, "dec.0.cross.q": 0.5, "enc.0.self.q": 0.75, "enc.0.fc": 1.0}
    grid = by_layer(values)
    assert grid.rows == ["dec.0", "enc.0"]
    assert grid.values == {
        ("dec.0", "self.q"): 0.25,
        ("dec.0", "cross.q"): 0.5,
        ("enc.0", "self.q"): 0.75,
        ("enc.0", "fc"): 1.0,
    }


def set_tensor(folder, name, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{FC1}.{name}"] = change(tensors[f"base_model.model.{FC1}.{name}"])
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lora_B.weight", lambda b: b * torch.nan, rf"{FC1}\.lora_B.*not finite numbers.*learning rate"),
        ("lora_B.weight", lambda b: b[:, :3].clone(), rf"{FC1}`.* have the shapes \(4, 32\) and \(64, 3\)"),
        ("lora_gate.tau", lambda tau: tau * 0, rf"`tau` of `base_model.model.{FC1}`.*above 1"),
    ],
)
def test_damaged_tensors_are_refused(adapter_folder, name, change, message):
    set_tensor(adapter_folder, name, change)
    with pytest.raises(SpikeLoraError, match=message):
        read_adapter(adapter_folder)


def test_a_rank_that_the_configuration_does_not_have_is_refused(adapter_folder):
    file = adapter_folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 16}))
    with pytest.raises(SpikeLoraError, match=r"has rank 4 in the weights in .*, and 16 by `r`"):
        read_adapter(adapter_folder)


def test_an_adapter_of_another_method_is_refused(tmp_path):
    get_peft_model(tiny_opt(), LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path)
    with pytest.raises(SpikeLoraError, match="holds a LORA adapter, not a SPIKELORA one"):
        read_adapter(tmp_path)


def test_a_configuration_alone_is_no_adapter(tmp_path):
    SpikeLoraConfig().save_pretrained(tmp_path)
    with pytest.raises(SpikeLoraError, match=r"but no adapter_model\.safetensors"):
        read_adapter(tmp_path)


def test_a_run_is_read_from_all_its_files(run_folder):
    run = read_run(run_folder)
    assert run.losses == {"before the training": 4.75, "SpikeLoRA": 3.25}
    assert run.curves("loss") == {"loss": [(10, 4.5), (20, 3.5)], "eval_loss": [(10, 4.25)]}
    assert list(run.curves("sparsity")) == ["sparsity", "eval_sparsity", "zero_threshold_sparsity"]
    assert run.curves_by_kind() == {"fc1": [(10, 0.625), (20, 0.85)], "fc2": [(10, 0.875), (20, 0.95)]}
    assert run.sparsity.source == "sparsity.json"
    measured = json.loads((run_folder / "sparsity.json").read_text())
    assert run.sparsity.sparsity == measured["sparsity"]
    assert run.sparsity.modules == {name: module["sparsity"] for name, module in measured["modules"].items()}
    assert run.sparsity.firing_rates[FC1] == measured["modules"][FC1]["firing_rates"]
    assert run.sparsity.modules["model.decoder.layers.0.fc2"] == 1
    assert results(run)["modules that never fire"] == "1 of 4"
    dead = sum(len(module["dead_ranks"]) for module in measured["modules"].values())
    assert results(run)["ranks that never fire"] == f"{dead} of 16"


def test_a_run_that_has_not_ended_is_read_from_its_last_checkpoint(run_folder):
    (run_folder / "adapter_config.json").unlink()
    run = read_run(run_folder)
    assert run.adapter.folder == run_folder / "checkpoint-20"
    assert run.curves("loss")["loss"] == [(10, 4.5), (20, 3.5)]
    assert results(run)["step"] == "20 of 40"
    assert results(run)["loss, last logged"] == "3.5000"


def test_the_log_that_has_come_farthest_is_read(run_folder):
    write_state(run_folder, 30, [*LOG, {"step": 30, "loss": 3.25}])
    assert read_run(run_folder).curves("loss")["loss"][-1] == (30, 3.25)
    write_state(run_folder, 10, LOG[:4])
    assert read_run(run_folder).curves("loss")["loss"][-1] == (20, 3.5)


def test_a_run_without_an_adapter_yet_shows_its_log(tmp_path):
    write_state(tmp_path, 10, LOG[:4])
    page = Page(render(read_runs([tmp_path])))
    assert "This run has saved no adapter yet." in page.text
    assert page.figures[0].startswith("loss by step: loss from 4.5 to 4.5")
    write_state(tmp_path, 0, [])
    with pytest.raises(SpikeLoraError, match=r"has no adapter_config\.json"):
        read_run(tmp_path)


def test_an_adapter_of_another_name_is_in_a_folder_of_its_own(run_folder):
    for folder in (run_folder, run_folder / "checkpoint-20"):
        (folder / "mine").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).rename(folder / "mine" / name)
    assert read_run(run_folder / "checkpoint-20").adapter.folder == run_folder / "checkpoint-20" / "mine"
    assert read_run(run_folder).adapter.folder == run_folder / "mine"
    shutil.copytree(run_folder / "mine", run_folder / "other")
    with pytest.raises(SpikeLoraError, match=r"holds several adapters\. Give the folder of one, such as .*mine\."):
        read_run(run_folder)
    shutil.rmtree(run_folder / "mine")
    shutil.rmtree(run_folder / "other")
    assert read_run(run_folder).adapter.folder == run_folder / "checkpoint-20" / "mine"


def test_firing_rates_come_in_the_order_of_the_layers(adapter_folder):
    modules = {f"layers.{n}.fc1": {"sparsity": 0.5, "firing_rates": [n / 16]} for n in (10, 1, 9)}
    report = {"sparsity": 0.5, "zero_threshold_sparsity": 0.25, "modules": modules}
    (adapter_folder / "sparsity.json").write_text(json.dumps(report))
    rates = read_run(adapter_folder).sparsity.firing_rates
    assert list(rates.items()) == [("layers.1.fc1", [0.0625]), ("layers.9.fc1", [0.5625]), ("layers.10.fc1", [0.625])]


def test_a_module_that_did_not_run_is_told_as_such(adapter_folder):
    modules = {FC1: {"sparsity": math.nan, "firing_rates": [math.nan] * 2}}
    report = {"sparsity": math.nan, "zero_threshold_sparsity": math.nan, "modules": modules}
    (adapter_folder / "sparsity.json").write_text(json.dumps(report))
    page = Page(render(read_runs([adapter_folder])))
    assert ["0", "not run"] in page.rows
    assert ["0", "", ""] in page.rows
    assert f"{FC1} was not run" in page.titles


def test_sparsity_from_the_metrics_of_the_example(adapter_folder):
    modules = {f"base_model.model.{FC1}": 0.25, "base_model.model.model.decoder.layers.0.fc2": 0.75}
    figures = {"loss": 3.0, "sparsity": 0.5, "zero_threshold_sparsity": 0.125, "sparsity_by_module": modules}
    (adapter_folder / "metrics.json").write_text(json.dumps({"spikelora": figures}))
    sparsity = read_run(adapter_folder).sparsity
    assert (sparsity.source, sparsity.sparsity, sparsity.zero_threshold_sparsity) == ("metrics.json", 0.5, 0.125)
    assert sparsity.modules == {FC1: 0.25, "model.decoder.layers.0.fc2": 0.75}
    assert sparsity.firing_rates == {}


@pytest.mark.parametrize("content", ["{", "[1]", '{"spikelora": {"loss": "low"}}', '{"spikelora": 3}'])
def test_damaged_metrics_are_named(adapter_folder, content):
    (adapter_folder / "metrics.json").write_text(content)
    with pytest.raises(SpikeLoraError, match=r"metrics.json is damaged"):
        read_run(adapter_folder)


@pytest.mark.parametrize(
    "content", ['{"sparsity": 1}', '{"sparsity": 1, "zero_threshold_sparsity": 1, "modules": [3]}']
)
def test_a_damaged_sparsity_report_is_named(adapter_folder, content):
    (adapter_folder / "sparsity.json").write_text(content)
    with pytest.raises(SpikeLoraError, match=r"sparsity.json is damaged"):
        read_run(adapter_folder)


@pytest.mark.parametrize("content", ['{"log_history": [', '{"log_history": [{"loss": 1.0}], "global_step": 20}'])
def test_a_damaged_log_is_named(run_folder, content):
    (run_folder / "checkpoint-20" / "trainer_state.json").write_text(content)
    with pytest.raises(SpikeLoraError, match=r"checkpoint-20/trainer_state.json is damaged"):
        read_run(run_folder)


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0"), (0.004, "<1"), (0.0051, "1"), (0.616, "62"), (0.996, ">99"), (1.0, "100")]
)
def test_whole_percents_are_0_and_100_only_where_exact(share, text):
    assert whole_percent(share) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0%"), (1e-6, "<0.1%"), (0.5, "50.0%"), (0.99999, ">99.9%"), (1.0, "100%"), (math.nan, "not run")],
)
def test_only_what_is_silent_reads_100_percent(share, text):
    assert percent(share) == text


def test_shades_are_those_of_viridis_with_text_that_can_be_read():
    assert shade(0.0) == "background:#440154;color:#fff"
    assert shade(1.0) == "background:#fde725;color:#000"


def test_a_figure_has_ids_of_its_own_and_a_text():
    svg = plot_curves("one", {("a<b $^$", ""): [(1, 0.5), (2, 0.75)]}, "step", "loss")
    ids = re.findall(r'\bid="([^"]*)"', svg)
    references = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg)
    assert ids
    assert all(name.startswith("one-") for name in ids)
    assert {first or second for first, second in references} <= set(ids)
    assert 'aria-label="loss by step: a&lt;b $^$ from 0.5 to 0.75"' in svg
    assert "currentColor" in svg
    assert "#010203" not in svg


def test_a_legend_of_long_names_is_not_cut_off():
    names = [f"eval_zero_threshold_sparsity_{n}" for n in range(4)]
    svg = plot_curves("one", {(name, ""): [(1, 0.5), (2, 0.75)] for name in names}, "step", "sparsity")
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', svg)[1])
    starts = [float(x) for x in re.findall(r' x="([\d.-]+)"[^>]*>eval_zero', svg)]
    assert len(starts) == 4
    assert min(starts) > 0
    assert max(starts) + 5.5 * len(names[0]) < width  # about 5.5 points a letter


def curves_of(svg):
    """What the page's script is given of a figure."""
    return json.loads(unescape(re.search(r'data-curves="([^"]*)"', svg)[1]))


def test_the_script_finds_the_points_where_the_figure_has_them():
    points = [(10, 4.5), (20, 3.5), (40, 3.25)]
    svg = plot_curves("one", {("loss", ""): points}, "step", "loss")
    data = curves_of(svg)
    (curve,) = data["curves"]
    assert (curve["label"], curve["points"]) == ("loss", [list(point) for point in points])
    line = re.search(r'<path d="([^"]*)" clip-path="[^"]*" style="[^"]*stroke: #3b8ed0', svg)[1]
    drawn = [float(number) for number in re.findall(r"[\d.]+", line)]
    (x0, dx), (y0, dy) = data["x"], data["y"]
    found = [number for x, y in points for number in (x0 + x * dx, y0 + y * dy)]
    assert found == pytest.approx(drawn, abs=1e-3)
    left, top, right, bottom = data["box"]
    assert all(left < x < right for x in drawn[::2])
    assert all(top < y < bottom for y in drawn[1::2])


def test_a_loss_that_is_no_number_leaves_a_gap():
    svg = plot_curves("one", {("loss", ""): [(1, 0.5), (2, math.nan), (3, 0.25)]}, "step", "loss")
    assert curves_of(svg)["curves"][0]["points"] == [[1, 0.5], [2, None], [3, 0.25]]
    assert 'aria-label="loss by step: loss from 0.5 to 0.25"' in svg


def test_a_run_keeps_its_colour_in_every_figure():
    points = [(1, 0.5), (2, 0.75)]
    both = plot_curves("one", {("loss", "a"): points, ("loss", "b"): points}, "step", "loss", runs=("a", "b"))
    one = plot_curves("two", {("sparsity", "b"): points}, "step", "sparsity", runs=("a", "b"))
    (first, second), (again,) = (curves_of(svg)["curves"] for svg in (both, one))
    assert (first["label"], second["label"], again["label"]) == ("loss, a", "loss, b", "sparsity, b")
    assert first["colour"] != second["colour"] == again["colour"]


def test_the_picture_of_a_grid_has_a_number_where_a_module_ran():
    values = {FC1: 0.25, "model.decoder.layers.0.fc2": 1.0, "model.decoder.layers.1.fc2": math.nan}
    axes = plot_grid(by_layer(values)).axes[0]
    assert [(text.get_position(), text.get_text()) for text in axes.texts] == [((0, 0), "25.0%"), ((1, 0), "100%")]
    assert [[label.get_text() for label in labels] for labels in (axes.get_xticklabels(), axes.get_yticklabels())] == [
        ["fc1", "fc2"],
        ["0", "1"],
    ]


class Page(HTMLParser):
    """The tables of a page as rows of text, what it refers to, its text, and what it shows where it is pointed at."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.references, self.figures, self.titles, self.text, self._cell = [], [], [], [], "", None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href", "action", "data")]
        if tag == "svg" and "aria-label" in attributes:
            self.figures.append(attributes["aria-label"])
        if tag == "tr":
            self.rows.append([])
        if "title" in attributes:
            self.titles.append(attributes["title"])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = tag

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data


def check_page(html, run):
    page = Page(html)
    sparsity = run.sparsity
    for layer in (0, 1):
        values = [sparsity.modules[f"model.decoder.layers.{layer}.fc{k}"] for k in (1, 2)]
        assert [str(layer), *map(percent, values)] in page.rows
        assert f"model.decoder.layers.{layer}.fc1: {percent(values[0])} silent" in page.titles
    rates = sparsity.firing_rates[FC1]
    assert ["0", *map(whole_percent, rates)] in page.rows
    assert f"{FC1}, rank 3: {percent(rates[3])}" in page.titles
    assert [FC1, "4", "-0.25", "2", f"{run.adapter.modules[0].norm_A:.4g}", "8"] in page.rows
    assert ["20", "3.5000", "", "0.9000", "", "0.6000"] in page.rows
    assert [figure.partition(":")[0] for figure in page.figures] == [
        "loss by step",
        "sparsity by step",
        "sparsity by step",
        "v_threshold by layer",
    ]
    assert [reference for reference in page.references if not reference.startswith(("#", "data:"))] == []
    assert "data_path: <b>&.txt" in page.text
    assert "This folder has no" not in page.text


def test_the_page_has_the_values(run_folder):
    run = read_run(run_folder)
    check_page(render([run]), run)


def test_a_page_shows_runs_beside_each_other(run_folder, lora_folder):
    runs = read_runs([run_folder, lora_folder])
    html = render(runs)
    page = Page(html)
    assert ["", "adapter", "lora"] in page.rows
    assert ["method", "SPIKELORA", "LORA"] in page.rows
    assert ["rank r", "4", "2"] in page.rows
    assert ["tau", "2", ""] in page.rows
    assert ["loss, last logged", "3.5000", "3.7500"] in page.rows
    assert ["held-out loss, SpikeLoRA", "3.2500", ""] in page.rows
    labels = [curve["label"] for curve in curves_of(html)["curves"]]
    assert labels == ["loss, adapter", "eval_loss, adapter", "loss, lora", "eval_loss, lora"]
    assert ["step", *labels, "sparsity, adapter", "eval_sparsity, adapter"] in page.rows
    assert ["20", "3.5000", "", "3.7500", "3.5000", "0.9000", ""] in page.rows
    assert [figure.partition(":")[0] for figure in page.figures] == [
        "loss by step",
        "sparsity by step",
        "sparsity by step",
        "v_threshold by layer",
    ]
    assert "This folder has no" not in page.text


def test_the_first_run_is_a_spiking_one_and_the_others_may_be_lora(run_folder, lora_folder, tmp_path):
    with pytest.raises(SpikeLoraError, match="holds a LORA adapter, not a SPIKELORA one"):
        read_runs([lora_folder, run_folder])
    config = IA3Config(target_modules=["fc1"], feedforward_modules=[])
    get_peft_model(tiny_opt(), config).save_pretrained(tmp_path / "ia3")
    with pytest.raises(SpikeLoraError, match="holds a IA3 adapter, which is neither SpikeLoRA nor LoRA"):
        read_runs([run_folder, tmp_path / "ia3"])
    file = lora_folder / "checkpoint-20" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(SpikeLoraError, match=r"adapter_model\.safetensors is damaged"):
        read_runs([run_folder, lora_folder])


def test_runs_of_the_same_name_are_told_apart(adapter_folder, tmp_path):
    for name in ("first/out", "second/out"):
        shutil.copytree(adapter_folder, tmp_path / name)
    runs = read_runs([tmp_path / "first" / "out", tmp_path / "second" / "out"])
    assert run_names(runs) == [str(Path("first", "out")), str(Path("second", "out"))]
    assert run_names(runs[:1]) == ["out"]
    assert run_names([runs[0], runs[0]]) == ["1", "2"]


def test_a_page_of_an_adapter_alone_says_what_is_missing(adapter_folder):
    page = Page(render(read_runs([adapter_folder])))
    assert page.text.count("This folder has no") == 5
    assert "an adapter alone, without results of a run" in page.text
    assert [figure.partition(":")[0] for figure in page.figures] == ["v_threshold by layer"]


def test_equal_thresholds_are_told_in_words(tmp_path):
    get_peft_model(tiny_opt(), SpikeLoraConfig(v_threshold=0.3, target_modules=["fc1"])).save_pretrained(tmp_path)
    page = Page(render(read_runs([tmp_path])))
    assert "All 2 modules have v_threshold 0.3." in page.text
    assert page.figures == []


def test_a_report_that_fails_leaves_the_old_one(adapter_folder, tmp_path, monkeypatch):
    output = tmp_path / "new" / "report.html"
    write_report(read_runs([adapter_folder]), output)
    before = output.read_text()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("spikelora.report.html.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(read_runs([adapter_folder]), output)
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    assert output.read_text() == before


def browse(page, tmp_path):
    """The document and the console's messages, as headless Chromium has them."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    command = [chromium, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_shows_the_page_and_asks_for_nothing(run_folder, tmp_path):
    run = read_run(run_folder)
    output = tmp_path / "report.html"
    write_report([run], output)
    dom, messages = browse(output, tmp_path)
    check_page(dom, run)
    assert messages == []


@pytest.mark.parametrize(
    "foreign", ['<img src="https://127.0.0.1:9/x.png">', '<script>document.title = "mine"</script>']
)
def test_the_page_forbids_its_browser_to_ask_for_or_run_anything_else(run_folder, tmp_path, foreign):
    output = tmp_path / "report.html"
    output.write_text(render(read_runs([run_folder])).replace("<main>", f"<main>{foreign}"))
    dom, (message,) = browse(output, tmp_path)
    assert "Content Security Policy" in message
    assert "<title>mine" not in dom


def test_the_page_allows_its_own_script_alone(adapter_folder):
    html = render(read_runs([adapter_folder]))
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in html


def act(runs, script, tmp_path):
    """The document after a script has acted on the page, and what the script has put into its title."""
    output = tmp_path / "report.html"
    html = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", render(runs))
    output.write_text(html.replace("</body>", f"<script>{HANDS}{script}</script></body>"))
    dom, messages = browse(output, tmp_path)
    assert messages == []
    return dom, unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1])


# Where a step is on the screen, an input that is set, and what a figure shows: its curves by their ids, and its ticks.
HANDS = """
const svg = document.querySelector("svg[data-curves]"), data = JSON.parse(svg.dataset.curves);
const at = step => new DOMPoint(data.x[0] + step * data.x[1], 50).matrixTransform(svg.getScreenCTM());
const point = (kind, step, more = {}) => svg.dispatchEvent(new PointerEvent(kind, {
  clientX: at(step).x, clientY: at(step).y, pointerType: "mouse", button: 0, ...more }));
const put = (name, value) => {
  const input = document.querySelector(`[name=${name}]`);
  input.value = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
};
const press = name => [...document.querySelectorAll(".legend button")].find(b => b.textContent === name).click();
const seen = kind => [...svg.querySelectorAll(kind)].filter(e => e.getClientRects().length);
const read = kind => seen(kind).map(e => e.textContent);
const drawn = () => seen("[id*=-curve-]").map(e => e.id.split("-").at(-1)).join(" ");
const ends = n => svg.querySelectorAll("[id*=-curve-]")[n].querySelector("path:last-of-type").getAttribute("d")
  .match(/[\\d.-]+/g).map(Number);
"""


def test_a_pointer_over_a_curve_shows_the_step_and_the_values(run_folder, tmp_path):
    script = """point("pointermove", 19);
document.title = svg.parentElement.querySelector("output").innerText;
svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));"""
    dom, title = act([read_run(run_folder)], script, tmp_path)
    assert re.fullmatch(r"step 20\s+loss 3.5", title)
    shown = re.search(r"<output[^>]*>(.*?)</output>", dom)[1]
    assert re.sub(r"<[^>]*>", " ", shown).split() == ["step", "10", "loss", "4.5", "eval_loss", "4.25"]


def test_a_name_below_a_figure_switches_its_curve_off_and_on(run_folder, tmp_path):
    script = """const before = read("text").join(" "), told = [drawn()];
press("loss");
told.push(drawn(), read("text").filter(Number).join(" "));
point("pointermove", 12);
told.push(svg.parentElement.querySelector("output").innerText.replace(/\\s+/g, " "));
press("loss");
document.title = [...told, drawn(), before === read("text").join(" ")].join("; ");"""
    dom, title = act([read_run(run_folder)], script, tmp_path)
    # The one point that is left, 4.25, is in the middle of an axis that is fitted to it.
    first, second, ticks, shown, *last = title.split("; ")
    assert (first, second, shown, last) == ("0 1", "1", "step 10 eval_loss 4.25", ["0 1", "true"])
    assert [tick for tick in ticks.split() if "." in tick] == ["3.8", "4.0", "4.2", "4.4", "4.6"]
    assert dom.count('aria-pressed="true"') == len(re.findall(r'"label"', unescape(dom)))


def test_a_range_of_steps_is_for_all_figures_over_steps(run_folder, tmp_path):
    script = """const whole = ends(0), all = document.querySelectorAll("svg[data-curves]").length;
point("pointerdown", 15, { pointerId: 1 });
point("pointermove", 30);
point("pointerup", 30);
const [from, to] = ["from", "to"].map(name => document.querySelector(`[name=${name}]`).value);
const last = ends(0).slice(-2);
const changed = [...document.querySelectorAll("svg[data-curves] [id*=-xtick_1]")].filter(tick => tick.style.display);
svg.dispatchEvent(new MouseEvent("dblclick"));
document.title = [from, to, last[0] > data.box[0] && last[0] < data.box[2], changed.length, all,
  ends(0).every((n, i) => Math.abs(n - whole[i]) < 1e-6), document.querySelector("[name=from]").value].join(" ");"""
    script = f"svg.setPointerCapture = () => {{}};\n{script}"  # a made-up pointer cannot be captured
    _, title = act([read_run(run_folder)], script, tmp_path)
    assert title == "20 20 true 3 4 true "


def test_smoothing_is_that_of_tensorboard_beside_the_values_themselves(run_folder, tmp_path):
    script = """put("smoothing", 0.5);
const [zero, one] = data.y, y = ends(0)[3];
point("pointermove", 20);
document.title = `${((y - zero) / one).toFixed(4)} ${svg.parentElement.querySelector("output").innerText}`;
document.querySelector("[type=reset]").click();"""
    dom, title = act([read_run(run_folder)], script, tmp_path)
    mean = (0.25 * 4.5 + 0.5 * 3.5) / 0.75
    assert re.fullmatch(rf"{mean:.4f} step 20\s+loss 3.5 smoothed {mean:.4f}", title)
    assert dom.count("opacity: 0.35") == 0


def test_a_run_is_switched_off_in_all_figures(run_folder, lora_folder, tmp_path):
    script = """const box = document.querySelector("input[value=adapter]");
box.click();
const left = [...document.querySelectorAll(".legend button")].filter(b => b.offsetParent).map(b => b.textContent);
document.title = [drawn(), ...left].join("; ");"""
    dom, title = act(read_runs([run_folder, lora_folder]), script, tmp_path)
    # Thresholds have no steps, and stay.
    assert title == "2 3; loss, lora; eval_loss, lora; fc1; fc2"
    assert len(re.findall(r'<div class="figure" hidden', dom)) == 2


def test_settings_that_differ_are_in_a_table_and_so_told_in_bold(run_folder, tmp_path):
    assert differing(["a: 1\nb: x y \nonly: 2\nlist:\n  - 3\n"]) == {}
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    (other / "config.yaml").write_text("data_path: <b>&.txt\nseed: 1\nrates:\n- 0.1\n")
    html = render(read_runs([run_folder, other]))
    assert ["seed", "", "1"] in Page(html).rows
    assert ["data_path", "<b>&.txt", "<b>&.txt"] not in Page(html).rows
    assert "differs" not in html.partition("<main>")[2]
    config = json.loads((other / "adapter_config.json").read_text()) | {"lora_alpha": 12}
    (other / "adapter_config.json").write_text(json.dumps(config))
    html = render(read_runs([run_folder, other]))
    assert re.findall(r'<tr class="differs"><th scope="row">([^<]*)', html) == ["lora_alpha", "scaling"]
