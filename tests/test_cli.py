"""The command, as a shell calls it: what it prints and writes, and its exit status."""

import json
import os
import shutil
import sys

import pytest
import torch
from conftest import tiny_opt
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikelora import SparsityMeter, SpikeLoraConfig, SpikeLoraError, calibrate_thresholds
from spikelora.__main__ import main
from spikelora.conversion.lora import to_lora
from spikelora.report.text import text_batches

WORDS = [f"word{n}" for n in range(90)]
TEXTS = [" ".join(WORDS[(7 * n + k * k) % 90] for k in range(5 + n)) for n in range(12)]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def base_folder(tmp_path):
    """The tiny OPT with a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<unk>", "<pad>", "</s>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    wrapped.save_pretrained(tmp_path / "base")
    tiny_opt().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base_folder, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    config = SpikeLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"text": text, "other": 3}) for text in TEXTS) + "\n\n")
    return file


def status(*arguments):
    """What `main` ends with: a number, or a message, which Python prints to stderr before it ends with 1."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_inspect_says_what_a_sound_adapter_holds(adapter, base_folder, capsys):
    assert status("inspect", adapter) == 0
    output = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    facts = {row[0]: row[1] for row in cells if len(row) == 2}
    assert facts["method"] == "SPIKELORA"
    assert facts["base model"] == str(base_folder)
    assert facts["modules"] == "12, 12 of them untrained (B is 0)"
    (row,) = (row for row in cells if row[0] == "model.decoder.layers.1.fc2")
    tensors = load_file(adapter / "adapter_model.safetensors")
    norm = tensors["base_model.model.model.decoder.layers.1.fc2.lora_A.weight"].norm().item()
    assert row[1:] == ["4", "0.1", "2", f"{norm:.4g}", "0, untrained"]
    assert output.endswith("The adapter is sound.\n")


def test_inspect_of_a_damaged_adapter_ends_with_1(adapter, fresh):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code = 'import runpy; runpy.run_module("spikelora", run_name="__main__", alter_sys=True)'  # what `python -m` does
    result = fresh(code, "inspect", adapter)
    assert result.returncode == 1
    assert f"{file} is damaged" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_inspect_without_a_gate_ends_with_1(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith("fc1.lora_gate.tau")}
    save_file(tensors, file, metadata={"format": "pt"})
    assert "has no `lora_gate.tau` for `base_model.model.model.decoder.layers.0.fc1`" in status("inspect", adapter)


@pytest.mark.parametrize("command", ["inspect", "report"])
def test_an_adapter_of_another_method_ends_with_1(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    get_peft_model(tiny_opt(), LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path / "lora")
    assert "holds a LORA adapter, not a SPIKELORA one" in status(command, "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("command", ["inspect", "report"])
def test_a_folder_without_an_adapter_ends_with_1(command, tmp_path):
    assert "has no adapter_config.json" in status(command, tmp_path)


def test_wrong_usage_ends_with_2(adapter, data, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept.txt").write_text("kept")
    (tmp_path / "data.csv").write_text("a,b\n")
    calibrate = ("calibrate", adapter, "--data", data, "--output")
    for arguments, message in [
        (("inspect", tmp_path / "missing"), "does not exist"),
        (("report", tmp_path / "missing"), "does not exist"),
        (("inspect",), "Missing argument 'ADAPTER'"),
        (("solve",), "No such command 'solve'"),
        ((*calibrate, full), "exists and is not an empty folder"),
        ((*calibrate, full / "kept.txt"), "exists and is not an empty folder"),
        ((*calibrate, tmp_path / "new", "--target_sparsity", "1.5"), "`--target_sparsity` must be a share"),
        ((*calibrate, tmp_path / "new", "--target_scope", "model"), "`--target_scope` must be one of"),
        ((*calibrate, tmp_path / "new", "--batch_size", "0"), "--batch_size"),
        (("calibrate", adapter, "--data", tmp_path / "no.txt", "--output", tmp_path / "new"), "does not exist"),
        (("calibrate", adapter, "--data", tmp_path / "data.csv", "--output", tmp_path / "new"), ".txt and .jsonl"),
    ]:
        assert status(*arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert (full / "kept.txt").read_text() == "kept"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["inspect", "report", "calibrate", "to-lora"])
def test_help_has_an_example(command, capsys):
    assert status(command, "--help") == 0
    assert f"Example: spikelora {command} " in capsys.readouterr().out


def test_report_writes_a_page_and_shows_tables(adapter, tmp_path, capsys):
    modules = {"base_model.model.model.decoder.layers.0.fc1": 0.25, "base_model.model.model.decoder.layers.1.fc1": 1.0}
    metrics = {"spikelora": {"loss": 3.25, "sparsity": 0.625, "sparsity_by_module": modules}}
    (adapter / "metrics.json").write_text(json.dumps(metrics))
    assert status("report", adapter, "--output", tmp_path / "pages" / "a.html") == 0
    output = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    assert ["0", "25.0%"] in rows
    assert ["1", "100%"] in rows
    assert ["held-out loss, SpikeLoRA", "3.2500"] in rows
    assert "This folder has no log of the training." in output
    page = (tmp_path / "pages" / "a.html").read_text()
    assert "<td>62.5%</td>" not in page
    assert "<dd>62.5%</dd>" in page


def test_report_names_an_output_that_cannot_be_written(adapter, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--output cannot be written" in status("report", adapter, "--output", tmp_path / "file" / "a.html")


def test_report_shows_a_lora_beside_it(adapter, tmp_path, capsys):
    get_peft_model(tiny_opt(), LoraConfig(r=2, target_modules=["fc1"])).save_pretrained(tmp_path / "lora")
    assert status("report", adapter, tmp_path / "lora", "--output", tmp_path / "a.html") == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["method", "SPIKELORA", "LORA"] in rows
    assert ["rank r", "4", "2"] in rows
    assert "<td>LORA</td>" in (tmp_path / "a.html").read_text()


def test_report_watches_a_run(adapter, tmp_path, monkeypatch, capsys):
    """From an empty folder over half a log to a whole one and a checkpoint that comes and goes."""
    run, page = tmp_path / "run", tmp_path / "page.html"
    run.mkdir()
    state = json.dumps({"global_step": 10, "max_steps": 20, "log_history": [{"step": 10, "loss": 4.5}]})
    later = json.dumps({"global_step": 20, "max_steps": 20, "log_history": [{"step": 20, "loss": 3.5}]})
    seen = []

    def interrupt():
        raise KeyboardInterrupt

    happens = iter(
        [
            lambda: None,
            lambda: None,  # said once that there is nothing yet
            lambda: (run / "trainer_state.json").write_text(state[:30]),
            lambda: (run / "trainer_state.json").write_text(state),
            lambda: None,  # nothing new, nothing written
            lambda: shutil.copytree(adapter, run, dirs_exist_ok=True),
            lambda: (run / "trainer_state.json").write_text(later[:-9]),
            lambda: (run / "trainer_state.json").write_text(later),
            interrupt,
        ]
    )

    def sleep(seconds):
        seen.append(page.read_text() if page.exists() else "")
        next(happens)()

    monkeypatch.setattr("spikelora.report.watch.time.sleep", sleep)
    assert status("report", run, "--watch", "--output", page) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line.partition(" ")[2] for line in lines[: lines.index(next(line for line in lines if "│" in line)) - 2]]
    assert said[0].startswith(f"{run} has no adapter_config.json")
    assert said[1:] == [
        f"{run}: step 10, loss 4.5000",
        f"{run}: step 10, loss 4.5000",
        f"{run}: step 20, loss 3.5000",
    ]
    refresh = '<meta http-equiv="refresh"'
    assert [refresh in text for text in seen] == [False] * 4 + [True] * 5
    assert ["This run has saved no adapter yet" in text for text in seen] == [False] * 4 + [True] * 2 + [False] * 3
    assert seen[4] == seen[5] != seen[6] == seen[7] != seen[8]
    assert refresh not in page.read_text()
    assert lines[-1] == f"The report is in {page}"


@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_model.safetensors", "adapter_config.json", None])
def test_a_report_of_a_folder_that_is_being_written_says_how_to_wait(adapter, tmp_path, capsys, name):
    """Half of a file that the run writes, or a folder with nothing in it yet; the hint ends when the writing has."""
    run = tmp_path / "run"
    if name:
        shutil.copytree(adapter, run)
        (run / name).write_bytes(b'{"half')
    else:
        run.mkdir()
    hint = "With --watch the report waits until it has."
    page = tmp_path / "page.html"
    assert (name or "has no adapter_config.json") in status("report", run, "--output", page)
    assert hint in capsys.readouterr().err
    for path in (run, *run.iterdir()):
        os.utime(path, (0, 0))
    assert (name or "has no adapter_config.json") in status("report", run, "--output", page)
    assert hint not in capsys.readouterr().err
    assert not page.exists()


def test_a_file_that_goes_while_a_report_reads_it_is_told(adapter, tmp_path, monkeypatch):
    def gone(folders):
        raise FileNotFoundError("checkpoint-20/trainer_state.json")

    monkeypatch.setattr("spikelora.report.run.read_runs", gone)
    said = status("report", adapter, "--output", tmp_path / "page.html")
    assert said == "A file of the run cannot be read (checkpoint-20/trainer_state.json). Run the command again."


def test_watching_what_never_was_a_run_ends_with_1(tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("spikelora.report.watch.time.sleep", interrupt)
    assert "has no adapter_config.json" in status("report", tmp_path, "--watch", "--output", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_run_that_breaks_while_it_is_watched_keeps_its_last_page(adapter, tmp_path, monkeypatch):
    page = tmp_path / "page.html"

    def break_off(seconds):
        (adapter / "adapter_model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("spikelora.report.watch.time.sleep", break_off)
    assert status("report", adapter, "--watch", "--output", page) == 0
    assert "<td>SPIKELORA</td>" in page.read_text()
    assert '<meta http-equiv="refresh"' not in page.read_text()


@pytest.mark.parametrize("name", ["jinja2", "matplotlib", "typer"])
def test_a_missing_library_is_named(adapter, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "spikelora.report.cli", raising=False)
    modules = {"base_model.model.model.decoder.layers.0.fc1": 0.25}  # whose colours are matplotlib's
    (adapter / "metrics.json").write_text(json.dumps({"spikelora": {"sparsity": 0.25, "sparsity_by_module": modules}}))
    assert "pip install 'spikelora[report]'" in status("report", adapter, "--output", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def thresholds_of(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_gate.v_threshold"): tensor.item()
        for name, tensor in tensors.items()
        if name.endswith("v_threshold")
    }


def load_where_the_command_does(base_folder, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder, device_map="auto"), adapter)


@pytest.mark.parametrize("scope", ["module", "adapter"])
def test_calibrate_does_what_the_function_does(adapter, base_folder, data, tmp_path, capsys, device, scope):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    arguments = ("--data", data, "--output", tmp_path / "new", "--target_sparsity", "0.8", "--batch_size", "5")
    arguments += ("--target_scope", scope)
    assert status("calibrate", adapter, *arguments, "--max_batches", "2") == 0
    model = load_where_the_command_does(base_folder, adapter)
    assert model.device.type == device.type
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    batches = [dict(tokenizer(TEXTS[n : n + 5], padding=True, return_tensors="pt")) for n in (0, 5)]
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    expected = calibrate_thresholds(model, batches, 0.8, scope)
    assert thresholds_of(tmp_path / "new") == pytest.approx(expected, rel=1e-6)
    output = capsys.readouterr().out
    assert all(name in output for name in expected)
    calibrated = load_where_the_command_does(base_folder, tmp_path / "new")
    with SparsityMeter(calibrated) as meter:
        for batch in batches:
            calibrated(**{name: tensor.to(device) for name, tensor in batch.items()})
    assert meter.report().sparsity == pytest.approx(0.8, abs=0.02)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_calibrate_takes_another_base_model_and_an_empty_folder(adapter, base_folder, data, tmp_path):
    shutil.copytree(base_folder, tmp_path / "moved")
    shutil.rmtree(base_folder)
    (tmp_path / "new").mkdir()
    arguments = ("calibrate", adapter, "--data", data, "--output", tmp_path / "new")
    assert f"The base model {base_folder} cannot be loaded" in status(*arguments)
    assert list((tmp_path / "new").iterdir()) == []
    assert status(*arguments, "--base_model", tmp_path / "moved") == 0
    assert len(thresholds_of(tmp_path / "new")) == 12
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["inference_mode"]) == (str(tmp_path / "moved"), True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no text"),
        ('{"text": "word1 word2"}\n{"other": "word1"}\n', "line 2 has no text under 'text'"),
        ('{"text": "word1 word2"\n', "line 1 is not JSON"),
        ("[1]\n", "line 1 has no text under 'text'"),
        (json.dumps({"text": " ".join(WORDS)}), "more than the 64 positions"),
        (b"caf\xe9", "cannot be read as text in UTF-8"),
    ],
)
def test_bad_data_ends_with_1_and_leaves_nothing(adapter, data, tmp_path, content, message):
    data.write_bytes(content if isinstance(content, bytes) else content.encode())
    names = {path.name for path in tmp_path.iterdir()}
    said = status("calibrate", adapter, "--data", data, "--output", tmp_path / "new")
    assert message in said
    assert "base model" not in said
    assert {path.name for path in tmp_path.iterdir()} == names


def test_calibrate_that_fails_while_saving_leaves_nothing(adapter, data, tmp_path, monkeypatch):
    def fail(model, folder, **options):
        (folder / "half").write_text("written")
        raise SpikeLoraError("no space left")

    monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    names = {path.name for path in tmp_path.iterdir()}
    assert status("calibrate", adapter, "--data", data, "--output", tmp_path / "new") == "no space left"
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_adapter_that_does_not_say_its_base_asks_for_it(adapter, data, tmp_path, capsys):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    assert status("calibrate", adapter, "--data", data, "--output", tmp_path / "new") == 2
    assert "name it with --base_model" in " ".join(capsys.readouterr().err.split())


def test_calibrate_refuses_tasks_that_need_more_than_text(adapter, data, tmp_path):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "SEQ_2_SEQ_LM"}))
    message = status("calibrate", adapter, "--data", data, "--output", tmp_path / "new")
    assert message.startswith("An adapter for SEQ_2_SEQ_LM needs more than a text and the name of its base")


def test_to_lora_does_what_the_function_does(adapter, base_folder, data, tmp_path, capsys, device):
    file = adapter / "adapter_model.safetensors"
    torch.manual_seed(1)
    tensors = {name: torch.randn_like(t) if "lora_B" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = ("--data", data, "--output", tmp_path / "lora", "--batch_size", "12", "--cutoff_len", "6")
    assert status("to-lora", adapter, *arguments) == 0

    model = load_where_the_command_does(base_folder, adapter)
    assert model.device.type == device.type
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=6, return_tensors="pt")
    expected = to_lora(model, [{name: batch[name] for name in ("input_ids", "attention_mask")}])
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert saved.keys() == expected.tensors.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected.tensors[name].cpu(), rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    printed = {row[0]: float(row[1]) for row in rows if row}
    assert printed == pytest.approx(expected.errors, rel=1e-3)
    assert 0 < printed["model.decoder.layers.0.fc1"] < 1


def test_paragraphs_become_padded_batches(base_folder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("word0 word1\nword2\n \n\nword3\n\n\nword4 word5 word6 word7\n")
    first, second = text_batches(file, AutoTokenizer.from_pretrained(base_folder), batch_size=2, cutoff_len=3)
    assert first["input_ids"].tolist() == [[3, 4, 5], [6, 1, 1]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert second["input_ids"].tolist() == [[7, 8, 9]]


def test_a_tokenizer_without_padding_pads_with_the_end_and_without_either_is_refused(base_folder, data):
    tokenizer = AutoTokenizer.from_pretrained(base_folder, pad_token=None)
    (batch,) = text_batches(data, tokenizer, batch_size=len(TEXTS), cutoff_len=64)
    padded = batch["input_ids"][batch["attention_mask"] == 0]
    assert len(padded)
    assert set(padded.tolist()) == {tokenizer.eos_token_id}

    tokenizer = AutoTokenizer.from_pretrained(base_folder, pad_token=None, eos_token=None)
    with pytest.raises(SpikeLoraError, match="has no token to pad with"):
        next(text_batches(data, tokenizer, batch_size=2, cutoff_len=64))
