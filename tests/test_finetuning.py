"""The main job, run as a user runs it: twice in a process of its own, otherwise here, as the imports take longest."""

import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections import ChainMap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from spikelora import SpikeLoraConfig

FOLDER = Path(__file__).parents[1] / "examples" / "spikelora_finetuning"
SCRIPT = FOLDER / "spikelora_finetuning.py"
sys.path.append(str(FOLDER))  # as where a script is run
# Enough to see the loss fall, and no more. The text is that of Python's own manual, so it differs between its versions.
SMALL = ["--max_steps=32", "--batch_size=4", "--cutoff_len=64", "--val_set_size=4", "--save_step=8", "--eval_step=32"]
SMALL += ["--compare_lora=false"]  # where it is not asked for
SMALL += ["--device_map=cpu"]  # where a test without `device` trains

# Runs the script and ends it, in whatever thread, where it opens a socket.
WITHOUT_SOCKETS = """
import os, runpy, sys
sys.addaudithook(lambda event, arguments: event.startswith("socket.") and os._exit(99))
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# Offline mode off: what a user has, and what lets a query of the hub get as far as its socket. And no GPU, as a run
# here on the CPU goes on with what one in a process has begun.
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "0", "CUDA_VISIBLE_DEVICES": ""}


def command(*flags: str) -> list[str]:
    return [sys.executable, "-c", WITHOUT_SOCKETS, str(SCRIPT), *flags]


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*flags), capture_output=True, text=True, env=ENVIRONMENT)


def run_here(script: dict, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """The same in this process, which has imported everything."""
    monkeypatch.setattr(sys, "argv", ["spikelora_finetuning.py", *flags])
    script["main"]()


@pytest.fixture(scope="module")
def script() -> dict:
    """What the script and the files beside it define, by name."""
    beside = (importlib.import_module(name) for name in ("options", "texts", "results", "run_folder"))
    return dict(ChainMap(runpy.run_path(str(SCRIPT)), *map(vars, beside)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of the default job on a smaller budget: its folder and its output."""
    folder = tmp_path_factory.mktemp("finished")
    result = run(*SMALL, f"--output_dir={folder}", "--learn_threshold", "--learn_tau", "--compare_lora")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_the_loss_falls_and_everything_is_saved(finished):
    folder, output = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    for method in ("spikelora", "lora"):
        assert metrics[method]["loss"] < metrics["before"]["loss"] - 0.05
    assert metrics["before"]["tokens"] == metrics["spikelora"]["tokens"] > 0
    assert metrics["spikelora"]["steps"] == 32
    assert 0.1 < metrics["spikelora"]["sparsity"] < 1
    assert set(metrics["spikelora"]["sparsity_by_kind"]) == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert len(metrics["spikelora"]["sparsity_by_module"]) == 24
    of_a_rank = metrics["lora"]["trainable_parameters"] / metrics["lora"]["r"]
    assert metrics["spikelora"]["trainable_parameters"] == 8 * of_a_rank + 2 * 24
    # LoRA's rank is the one with as many operations, to half a rank.
    by_rank = metrics["lora"]["operations"] / metrics["lora"]["r"]
    assert metrics["lora"]["r"] == round(metrics["spikelora"]["operations"] / by_rank) < metrics["spikelora"]["r"] == 8
    kinds = metrics["spikelora"]["sparsity_by_module"]
    sizes = {"fc1": (192, 768), "fc2": (768, 192)}
    ends = {name: sizes.get(name.rpartition(".")[2], (192, 192)) for name in kinds}
    expected = sum(8 * (n_in + (1 - kinds[name]) * n_out) for name, (n_in, n_out) in ends.items())
    assert metrics["spikelora"]["operations"] == pytest.approx(expected)
    names = {path.name for path in folder.iterdir()}
    written = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "sparsity.png", "sparsity.json"}
    assert written <= names
    assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 1e-2
    assert (folder / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert f"| all | {metrics['spikelora']['sparsity']:.1%} |" in card
    assert "](sparsity.png)" in card
    for shown in (
        "recipe: paper",
        "perplexity",
        "next token guessed",
        "trainable parameters",
        "operations / token",
        "peak memory, MB",
        "out_proj",
        "the same logits to the bit",
        "goes on with",
        f"spikelora report {folder}",
    ):
        assert shown in output
    assert "{'" not in output  # the logs are in the bar


def test_the_figures_are_those_of_the_saved_adapter(script, finished):
    """Loss and sparsity once more, by another way: row by row without padding, the gate written out."""
    folder, _ = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    options = script["parse_options"]([str(folder / "config.yaml")])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, rows = script["split"](script["load_rows"](options), options)
    rows = script["tokenize"](rows, tokenizer, options)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder)

    silent, entries = 0, 0

    def look(layer, inputs):
        nonlocal silent, entries
        a = layer.lora_A["default"](inputs[0])
        gate = layer.lora_gate["default"]
        silent += (a / gate.tau < gate.v_threshold).sum().item()
        entries += a.numel()

    for layer in model.modules():
        if hasattr(layer, "lora_gate"):
            layer.register_forward_pre_hook(look)
    total, guessed, tokens = 0.0, 0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            output = model(ids, labels=ids)
            total += output.loss.item() * (ids.shape[1] - 1)
            guessed += sum(output.logits[0, i].argmax() == ids[0, i + 1] for i in range(ids.shape[1] - 1)).item()
            tokens += ids.shape[1] - 1
    assert tokens == metrics["spikelora"]["tokens"]
    assert total / tokens == pytest.approx(metrics["spikelora"]["loss"], abs=1e-4)
    assert guessed / tokens == pytest.approx(metrics["spikelora"]["guessed"], abs=1e-3)
    assert silent / entries == pytest.approx(metrics["spikelora"]["sparsity"], abs=1e-4)


def test_a_killed_run_goes_on_to_the_same_end(script, finished, monkeypatch, tmp_path):
    flags = [*SMALL, f"--output_dir={tmp_path}", "--learn_threshold", "--learn_tau"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command(*flags), env=ENVIRONMENT, **silent) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoint-8" / "trainer_state.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "adapter_config.json").exists()

    with pytest.raises(SystemExit, match="--resume_from_checkpoint"):
        run_here(script, monkeypatch, *flags)

    run_here(script, monkeypatch, *flags, "--resume_from_checkpoint")
    expected = json.loads((finished[0] / "metrics.json").read_text())["spikelora"]
    actual = json.loads((tmp_path / "metrics.json").read_text())["spikelora"]
    assert actual["steps"] == expected["steps"]
    assert actual["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert actual["sparsity"] == pytest.approx(expected["sparsity"], abs=1e-6)
    counted, all_tokens = (run["tokens_per_second"] * run["training_seconds"] for run in (actual, expected))
    assert counted < 0.8 * all_tokens  # those of the first run are not counted again

    with pytest.raises(SystemExit, match=r"was trained with v_threshold 0\.1, not 0\.3"):
        run_here(script, monkeypatch, *flags, "--resume_from_checkpoint", "--v_threshold=0.3")
    run_here(script, monkeypatch, *flags, "--resume_from_checkpoint")
    again = json.loads((tmp_path / "metrics.json").read_text())["spikelora"]
    assert (again["steps"], again["loss"]) == (actual["steps"], actual["loss"])
    run_here(script, monkeypatch, *flags, "--resume_from_checkpoint", "--max_steps=34")
    assert json.loads((tmp_path / "metrics.json").read_text())["spikelora"]["steps"] == 34


def test_no_held_out_passage_stands_in_the_training_text(script):
    options = script["parse_options"]([])
    train, held_out = script["split"](script["python_reference"](), options)
    text = " ".join(" ".join(train["text"]).split())
    passages = [" ".join(passage.split()) for passage in held_out["text"]]
    assert len(passages) > 10
    assert not [passage for passage in passages if passage in text]
    paragraphs = {" ".join(part.split()) for passage in train["text"] for part in passage.split("\n\n")}
    assert not paragraphs & {
        " ".join(part.split()) for passage in held_out["text"] for part in passage.split("\n\n")
    } - {""}


def test_neurons_get_no_weight_decay(script):
    options = script["parse_options"](["--learn_threshold", "--learn_tau"])
    base = script["load_base"](options)
    model = script["get_peft_model"](base, script["adapter_config"](options, spiking=True))
    trainer = script["NeuronTrainer"](model=model)
    decayed = set(trainer.get_decay_parameter_names(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    neurons = {name for name in trained if "lora_gate" in name}
    assert len(neurons) == 2 * 24
    assert trained - decayed == neurons


ROWS = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Say hi.", "output": "hi"}]


def test_instructions_mask_the_prompt(script):
    options = script["parse_options"]([])
    tokenizer = AutoTokenizer.from_pretrained(script["EMBEDDED_MODEL"])
    rows = script["tokenize"](Dataset.from_list(ROWS), tokenizer, options)
    for row, source in zip(rows, ROWS, strict=True):
        learned = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(learned) == source["output"] + "</s>"
        assert row["input_ids"][-len(learned) :] == learned
        assert source["instruction"] in tokenizer.decode(row["input_ids"])
    assert "1 and 2" in tokenizer.decode(rows[0]["input_ids"])


def test_long_texts_become_several_rows(script):
    options = script["parse_options"](["--cutoff_len=8"])
    tokenizer = AutoTokenizer.from_pretrained(script["EMBEDDED_MODEL"])
    text = "The neuron fires at equality. " * 10
    rows = script["tokenize"](Dataset.from_list([{"text": text}]), tokenizer, options)
    assert max(map(len, rows["input_ids"])) == 8
    assert tokenizer.decode([token for ids in rows["input_ids"] for token in ids]) == text + "</s>"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "txt", "saved"])
def test_every_kind_of_file_is_read(script, suffix, tmp_path):
    rows = Dataset.from_list([{"text": "first row"}, {"text": "second row"}])
    path = tmp_path / f"rows.{suffix}"
    if suffix == "txt":
        path.write_text("first row\n\nsecond row")
    elif suffix == "json":
        path.write_text(json.dumps(rows.to_list()))
    else:
        save = {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet, "saved": rows.save_to_disk}
        save[suffix](str(path))
    assert script["load_rows"](script["parse_options"]([f"--data_path={path}"]))["text"][:] == rows["text"][:]


def test_an_instruction_run(script, monkeypatch, capsys, tmp_path, device):
    rows = [{"instruction": f"Add {n} and 1.", "input": "", "output": str(n + 1)} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = [f"--data_path={tmp_path / 'rows.jsonl'}", "--val_set_size=8"]
    # Where a user's run is: on the GPU, if there is one.
    run_here(script, monkeypatch, *SMALL, "--device_map=auto", *data, f"--output_dir={tmp_path / 'out'}")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["spikelora"]["loss"] < metrics["before"]["loss"] - 1
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    answers = [len(tokenizer(row["output"] + "</s>")["input_ids"]) for row in rows]
    assert 8 * min(answers) <= metrics["before"]["tokens"] <= 8 * max(answers)
    shown = re.search(r"The first held-out text has (\d+) tokens", capsys.readouterr().out)
    assert int(shown[1]) in answers


@pytest.mark.compatibility("Layers", "the example with `--quantize 4bit`")
def test_a_run_on_a_quantised_base(script, tmp_path):
    pytest.importorskip("bitsandbytes")
    result = run(*SMALL, "--max_steps=6", "--quantize=4bit", f"--output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["spikelora"]["loss"] < metrics["before"]["loss"] - 0.02
    base = script["load_base"](script["parse_options"](["--quantize=4bit"]))
    assert base.model.decoder.layers[0].fc1.weight.dtype == torch.uint8


def test_a_run_that_diverges_leaves_no_adapter(script, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="Lower --learning_rate"):
        run_here(script, monkeypatch, *SMALL, "--max_steps=3", "--learning_rate=1e30", f"--output_dir={tmp_path}")
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_push_uploads_the_finished_run_alone(script, finished, monkeypatch, tmp_path):
    calls = {}
    hub = script["huggingface_hub"]
    monkeypatch.setattr(hub, "create_repo", lambda name, **_: calls.setdefault("repository", hub.RepoUrl(f"me/{name}")))
    monkeypatch.setattr(hub, "upload_folder", lambda **options: calls.update(options))
    flags = [*SMALL, "--max_steps=2", "--val_set_size=4", "--push_to_hub", f"--output_dir={tmp_path / 'mine'}"]
    run_here(script, monkeypatch, *flags)
    assert calls["repo_id"] == "me/mine"
    assert calls["folder_path"] == tmp_path / "mine"
    assert (
        hub.utils.filter_repo_objects(
            ["checkpoint-2/optimizer.pt", "lora/checkpoint-2/optimizer.pt", "adapter_config.json"],
            ignore_patterns=calls["ignore_patterns"],
        ).__next__()
        == "adapter_config.json"
    )
    assert "import spikelora" in (tmp_path / "mine" / "README.md").read_text()


def test_yaml_and_flags(script, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "v_threshold: -0.3\nlearn_tau: true\nlearning_rate: 1e-3\nmax_steps: 7\nlora_target_modules: [q_proj, 0.fc1]\n"
    )
    options = script["parse_options"]([str(tmp_path / "run.yaml"), "--max_steps=9"])
    assert (options.v_threshold, options.learn_tau, options.learning_rate, options.max_steps) == (-0.3, True, 1e-3, 9)
    assert script["adapter_config"](options, spiking=True).target_modules == {"q_proj", "0.fc1"}


def test_a_recipe_fills_in_what_is_left_out(script):
    def resolved(*flags):
        options = script["parse_options"](list(flags))
        target = options.target_sparsity, options.target_scope
        return options.lora_r, options.lora_alpha, options.surrogate, *target

    assert resolved() == resolved("--recipe=paper") == (8, 16, "atan", None, "module")
    assert resolved("--recipe=straight_through") == (16, 32, "straight_through", 0.89, "adapter")
    given = ("--lora_r=4", "--target_sparsity=0.5", "--target_scope=module")
    assert resolved("--recipe=straight_through", *given) == (4, 32, "straight_through", 0.5, "module")


@pytest.mark.parametrize(("flags", "alpha"), [((), 10), (("--use_rslora",), 13)])
def test_lora_beside_has_as_many_operations_and_the_same_scaling(script, flags, alpha):
    ledger = SimpleNamespace(effective=SimpleNamespace(macs=5.2), lora_unmerged=SimpleNamespace(macs=8.0))
    smaller = script["as_lora"](script["parse_options"](list(flags)), ledger)
    assert (smaller.lora_r, smaller.lora_alpha) == (5, alpha)  # 16 / 8, or 16 / sqrt(8), of rank 5


def test_lora_is_trained_beside_the_shipped_job_alone(script, tmp_path):
    def compares(*flags):
        return script["parse_options"](list(flags)).compare_lora

    assert compares()
    assert not compares("--compare_lora=false")
    for other in ("--base_model=facebook/opt-350m", "--data_path=notes.txt"):
        assert not compares(other)
        assert compares(other, "--compare_lora")
    (tmp_path / "run.yaml").write_text("compare_lora: false\n")
    assert not compares(str(tmp_path / "run.yaml"))


def test_the_example_shows_what_is_won_and_what_is_lost(script, capsys):
    tokenizer = AutoTokenizer.from_pretrained(script["EMBEDDED_MODEL"])
    ids = tokenizer("Return a list of the", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5

    def guessing(*places):
        logits = torch.zeros(1, len(ids), len(tokenizer))
        logits[0, :, 7] = 1.0
        for place in places:
            logits[0, place - 1, ids[place]] = 2.0
        return logits

    row = {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
    script["show_example"](tokenizer, row, guessing(1, 2, 4), guessing(1, 3, 4))
    said = capsys.readouterr().out
    assert "has 3 tokens" in said
    assert "2 of them were guessed before, 2 are now" in " ".join(said.split())
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert rows == [["Return a", "' list'", "' list'", "'&'"], ["Return a list", "' of'", "'&'", "' of'"]]


def test_zero_in_yaml_is_zero(script, tmp_path):
    (tmp_path / "run.yaml").write_text("v_threshold: 0\nweight_decay: 0.0\nwarmup_ratio: 0\nlearn_tau: false\n")
    options = script["parse_options"]([str(tmp_path / "run.yaml")])
    assert (options.v_threshold, options.weight_decay, options.warmup_ratio, options.learn_tau) == (0, 0, 0, False)


class TestBadInput:
    def refused(self, script, monkeypatch, capsys, *flags: str) -> str:
        """The message with which the script ends, before it has loaded a model."""
        with pytest.raises((SystemExit, script["SpikeLoraError"])) as raised:
            run_here(script, monkeypatch, *flags)
        return str(raised.value) + capsys.readouterr().err

    def test_a_quantised_base_without_the_library(self, script, monkeypatch, capsys, tmp_path):
        monkeypatch.setitem(script["parse_options"].__globals__, "find_spec", lambda name: None)
        message = self.refused(script, monkeypatch, capsys, "--quantize=8bit", f"--output_dir={tmp_path}")
        assert "--quantize 8bit needs bitsandbytes: pip install bitsandbytes" in message

    @pytest.mark.parametrize(
        ("flag", "named"),
        [
            ("--v_threshold=nan", "v_threshold"),
            ("--v_threshold=inf", "v_threshold"),
            ("--tau=1", "tau"),
            ("--recipe=best", "--recipe"),
            ("--target_scope=model", "--target_scope"),
            ("--lora_r=0", "`r`"),
            ("--learning_rate=-1", "--learning_rate"),
            ("--learning_rate=inf", "--learning_rate"),
            ("--weight_decay=-1", "--weight_decay"),
            ("--warmup_ratio=2", "--warmup_ratio"),
            ("--lora_dropout=1", "--lora_dropout"),
            ("--seed=-1", "--seed"),
            ("--dtype=float7", "--dtype"),
            ("--report_to=nowhere", "nowhere"),
            ("--lora_target_modules=(", "target_modules"),
            ("--resume_from_checkpoint=nowhere", "--resume_from_checkpoint nowhere"),
            ("--batch_size=0", "--batch_size"),
            ("--cutoff_len=300", "--cutoff_len 300"),
            ("--cutoff_len=nan", "--cutoff_len"),
            ("--val_set_size=1000000", "--val_set_size"),
            ("--base_model=./nowhere", "--base_model ./nowhere"),
            ("--data_path=nowhere.csv", "--data_path nowhere.csv"),
            ("--data_path=./nowhere", "--data_path ./nowhere"),
            ("--lora_target_modules=nowhere", "nowhere"),
            ("--unknown_flag=1", "--unknown_flag"),
        ],
    )
    def test_flags(self, script, monkeypatch, capsys, tmp_path, flag, named):
        folder = f"--output_dir={tmp_path / 'out'}"
        assert named in self.refused(script, monkeypatch, capsys, flag, folder)
        assert not (tmp_path / "out" / "adapter_config.json").exists()

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            ("", "the file is empty"),
            ("no json", "rows.jsonl"),
            ('{"text": "one"}\n', "1 rows"),
            ('{"words": "one"}\n{"words": "two"}\n', "--text_field text"),
            ('{"text": ""}\n{"text": ""}\n{"text": ""}', "no row has a token"),
            ('{"text": "one"}\n{"text": null}\n{"text": "three"}', "no text in the column text"),
        ],
    )
    def test_data(self, script, monkeypatch, capsys, tmp_path, content, named):
        (tmp_path / "rows.jsonl").write_text(content)
        flags = (f"--data_path={tmp_path / 'rows.jsonl'}", f"--output_dir={tmp_path / 'out'}")
        assert named in self.refused(script, monkeypatch, capsys, *flags)

    def test_an_output_folder_that_cannot_be_written(self, script, monkeypatch, capsys, tmp_path):
        (tmp_path / "file").touch()
        flags = (f"--output_dir={tmp_path / 'file' / 'out'}",)
        assert "--output_dir" in self.refused(script, monkeypatch, capsys, *flags)

    def test_a_checkpoint_of_another_method(self, script, monkeypatch, capsys, finished, tmp_path):
        checkpoint = next((finished[0] / "lora").glob("checkpoint-*"))
        flags = (f"--resume_from_checkpoint={checkpoint}", f"--output_dir={tmp_path}")
        assert "holds a LORA adapter" in self.refused(script, monkeypatch, capsys, *flags)

    def test_a_refused_run_keeps_the_results_of_the_last(self, script, monkeypatch, capsys, finished):
        self.refused(script, monkeypatch, capsys, "--data_path=nowhere.csv", f"--output_dir={finished[0]}")
        assert (finished[0] / "adapter_config.json").exists()


@pytest.mark.slow
def test_a_real_text(script, monkeypatch, tmp_path):
    """Tiny Shakespeare (karpathy/char-rnn on GitHub), by file."""
    if "SPIKELORA_DATA" not in os.environ:
        pytest.skip(
            "SPIKELORA_DATA is unset; the text is in the public repository karpathy/char-rnn, data/tinyshakespeare"
        )
    text = Path(os.environ["SPIKELORA_DATA"], "tinyshakespeare", "input.txt")
    run_here(script, monkeypatch, *SMALL, "--val_set_size=24", f"--data_path={text}", f"--output_dir={tmp_path}")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["spikelora"]["loss"] < metrics["before"]["loss"] - 0.3


@pytest.fixture
def model(script):
    options = script["parse_options"](["--v_threshold=-1e9"])
    return script["get_peft_model"](script["load_base"](options), script["adapter_config"](options, spiking=True))


@pytest.fixture
def collator(script):
    return DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(script["EMBEDDED_MODEL"]), label_pad_token_id=-100)


ROW = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}


def test_only_what_a_finished_run_left_is_cleared(script, tmp_path):
    left = [*script["ADAPTER_FILES"], "trainer_state.json", "checkpoint-8/model", "lora/checkpoint-8/model"]
    for name in (*left, "notes.txt", "lora/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    script["clear_results"](tmp_path)
    assert all((tmp_path / name).exists() for name in left)
    (tmp_path / "metrics.json").touch()
    script["clear_results"](tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"notes.txt", "lora", "lora/notes.txt"}


def test_the_configuration_is_moved_in_place_last(script, monkeypatch, tmp_path):
    class Saved:
        model = None

        def save_model(self, folder):
            assert json.loads((folder / "sparsity.json").read_text()) == {"sparsity": 0.5}  # which the card shows
            for name in script["ADAPTER_FILES"]:
                (folder / name).touch()

        def to_dict(self):
            return {"sparsity": 0.5}

        def save_pretrained(self, folder):
            pass

    moved = []
    monkeypatch.setitem(script["save"].__globals__, "check_reload", lambda *_: None)
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(target.name))
    script["save"](Saved(), Saved(), {}, Saved(), script["parse_options"]([]), tmp_path)
    pictured = {"sparsity.json", "sparsity.png"}
    assert set(moved) == {"adapter_model.safetensors", "README.md", "adapter_config.json", *pictured}
    assert moved[-1] == "adapter_config.json"


def test_a_saved_adapter_that_gives_other_logits_ends_the_run(script, model, collator, tmp_path):
    options = script["parse_options"]([])
    model.save_pretrained(tmp_path)
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(1.0)
    with pytest.raises(SystemExit, match="gives other logits"):
        script["check_reload"](model, ROW, options, tmp_path)


def test_a_gate_that_is_never_called_ends_the_run(script, model, collator):
    model.unused = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), SpikeLoraConfig(target_modules=["0"]))
    with pytest.raises(SystemExit, match=r"never calls \['unused.base_model.model.0'\]"):
        script["measure"](model, Dataset.from_list([ROW]), collator, script["parse_options"]([]), "")


def test_the_seed_is_that_of_everything(script, model, collator, monkeypatch, tmp_path):
    options, other = script["parse_options"](["--seed=7"]), script["parse_options"](["--seed=8"])
    rows = Dataset.from_list([{"text": str(n)} for n in range(100)])
    assert script["split"](rows, options)[1]["text"][:] != script["split"](rows, other)[1]["text"][:]
    assert script["make_trainer"](model, None, Dataset.from_list([ROW]), collator, options, tmp_path).args.seed == 7
    monkeypatch.setitem(script["run"].__globals__, "load_base", lambda options: sys.exit("before the model"))
    with pytest.raises(SystemExit, match="before the model"):
        script["run"](options, None, None, None, True, tmp_path, None)
    assert torch.initial_seed() == 7


def test_silent_modules_are_named(script, capsys):
    script["warn_of_silence"]({"sparsity_by_module": {"layers.0.fc1": 1, "layers.0.fc2": 0.5}}, "now")
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 modules never fire now" in said
    assert "layers.0.fc1" in said
    assert "fc2" not in said


def test_the_last_checkpoint_is_the_last_complete_one(script, tmp_path):
    for step in (8, 16, 24):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (8, 16):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert script["last_checkpoint"](tmp_path).name == "checkpoint-16"


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--lora_r=4", "r"),
        ("--lora_alpha=4", "lora_alpha"),
        ("--lora_dropout=0.5", "lora_dropout"),
        ("--use_rslora", "use_rslora"),
        ("--v_threshold=0.3", "v_threshold"),
        ("--tau=3", "tau"),
        ("--learn_threshold", "learn_threshold"),
        ("--learn_tau", "learn_tau"),
    ],
)
def test_a_run_goes_on_with_the_same_adapter_only(script, tmp_path, flag, name):
    checkpoint = tmp_path / "checkpoint-8"
    script["adapter_config"](script["parse_options"]([]), spiking=True).save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").touch()
    same = script["parse_options"](["--resume_from_checkpoint"])
    assert script["prepare_folder"](tmp_path, same, script["adapter_config"](same, spiking=True)) == checkpoint
    other = script["parse_options"](["--resume_from_checkpoint", flag])
    with pytest.raises(SystemExit, match=f"was trained with {name} "):
        script["prepare_folder"](tmp_path, other, script["adapter_config"](other, spiking=True))
