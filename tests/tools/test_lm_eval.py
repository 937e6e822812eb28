"""lm-eval finds the method through autoload, and scores the gated model: `make tools`."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

ROWS = [
    {"question": "The value of an expression is", "choices": [" a number.", " the name of a module."], "answer": 0},
    {"question": "If the file does not exist,", "choices": [" it is true", " an exception is raised."], "answer": 1},
    {"question": "The function returns", "choices": [" a list of strings.", " nothing at all"], "answer": 0},
]
TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


def evaluate(environment, folder, model_args):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "local_choice.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    command = [
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        model_args,
        "--tasks",
        "local_choice",
        "--device",
        "cpu",
    ]
    command += ["--include_path", folder, "--output_path", folder / "out", "--log_samples", "--batch_size", "1"]
    return environment.start(*command, cwd=folder)


def log_likelihoods(model, base):
    """Of each row's choices, given its question."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for row in ROWS:
        question = len(tokenizer(row["question"]).input_ids)
        for choice in row["choices"]:
            ids = tokenizer(row["question"] + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                scores = model(ids).logits.log_softmax(-1)
            found.append(sum(scores[0, k - 1, ids[0, k]].item() for k in range(question, ids.shape[1])))
    return found


def test_the_command_evaluates_the_gated_model(environment, base, adapter, tmp_path):
    process = evaluate(environment, tmp_path, f"pretrained={base},peft={adapter},dtype=float32")

    assert process.returncode == 0, process.stderr
    print(process.stdout)
    assert "|local_choice|" in process.stdout
    (samples,) = (tmp_path / "out").rglob("samples_local_choice_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    counted = [
        float(response[0][0]) for row in sorted(rows, key=lambda row: row["doc_id"]) for response in row["resps"]
    ]
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = PeftModel.from_pretrained(loaded, adapter).eval()
    expected = log_likelihoods(model, base)
    assert counted == pytest.approx(expected, abs=1e-3)
    # Without the gate they are others, by far more than that.
    for module in model.modules():
        if type(module).__name__ == "SpikeGate":
            module.v_threshold.fill_(-1e30)
    ungated = log_likelihoods(model, base)
    assert min(abs(one - other) for one, other in zip(expected, ungated, strict=True)) > 0.01


def test_without_autoload_the_error_is_that_of_the_card(environment, base, adapter, tmp_path):
    environment.autoload("off")
    try:
        process = evaluate(environment, tmp_path, f"pretrained={base},peft={adapter}")
    finally:
        environment.autoload("on")

    assert process.returncode != 0
    assert "KeyError: 'SPIKELORA'" in process.stderr
