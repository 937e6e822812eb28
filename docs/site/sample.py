"""Trains what the site's sample report shows, into build/sample: `python docs/site/sample.py`, part of `make docs`.

Three short runs on the model that is shipped with the example: a fixed threshold, a target sparsity, and LoRA.
"""

import os
import re
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

import spikelora  # noqa: F401 - registers the method with PEFT, and so comes first

# isort: split
from peft import LoraConfig, SpikeLoraConfig, get_peft_model

from spikelora import SparsityCallback, SparsityControlCallback

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "build" / "sample"
BASE = "examples/spikelora_finetuning/model"  # as the report shows it
STEPS = 40
RUNS: dict[str, dict[str, Any]] = {
    "threshold": {"r": 8, "v_threshold": 0.1},
    "target": {"r": 8, "target_sparsity": 0.9},
    "lora": {"r": 8},
}


def train(name: str, method: dict[str, Any], text: Any) -> None:
    """Train one run and leave in its folder what a report reads."""
    torch.manual_seed(0)
    is_lora = name == "lora"
    make = LoraConfig if is_lora else SpikeLoraConfig
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    model = get_peft_model(model, make(target_modules="all-linear", task_type="CAUSAL_LM", **method))
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "max_steps": STEPS, "seed": 0}
    args = SFTConfig(
        output_dir=str(SAMPLE / name),
        max_length=128,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=text["train"],
        eval_dataset=text["test"].select(range(32)),
        processing_class=AutoTokenizer.from_pretrained(BASE),
    )
    trainer.remove_callback(PrinterCallback)  # which prints every log
    if not is_lora:
        trainer.add_callback(SparsityCallback(trainer))
    if "target_sparsity" in method:
        trainer.add_callback(SparsityControlCallback())
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    lines = (f"{key}: {value}\n" for key, value in {**settings, **method}.items())
    (SAMPLE / name / "config.yaml").write_text("".join(lines))


def main() -> None:
    """Train every run, in place of those of an earlier call."""
    os.chdir(ROOT)
    shutil.rmtree(SAMPLE, ignore_errors=True)
    paragraphs = dict.fromkeys(p.strip() for t in topics.values() for p in re.split(r"\n\s*\n", t) if len(p) > 200)
    text = Dataset.from_list([{"text": paragraph} for paragraph in paragraphs]).train_test_split(0.1, seed=0)
    for name, method in RUNS.items():
        train(name, method, text)


if __name__ == "__main__":
    main()
