"""transformers' Trainer and TRL's trainers with spiking adapters: training, saving, resuming, pushing, references."""

import copy
import json
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import trl.generation.vllm_generation
from conftest import spiking, takes_adapters, tiny_opt
from datasets import Dataset
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from spikelora import SpikeLoraConfig, SpikeLoraError
from spikelora.method.gate import SpikeGate
from spikelora.peft.trainers import guard_trainers

TOKENIZER = Path(__file__).parents[1] / "examples" / "spikelora_finetuning" / "model"
GENERATOR = torch.Generator().manual_seed(0)
# Four rows, which two layers learn by heart in a few steps.
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 100, (4, 16), generator=GENERATOR).tolist()] * 16
TOKENS = torch.tensor([row["input_ids"] for row in ROWS[:2]])
NEVER, ALWAYS = 1e30, -1e30
ARGUMENTS = {
    "max_steps": 6,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-2,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "use_cpu": True,
}
works = pytest.mark.compatibility


def config(**options):
    defaults = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "v_threshold": 0.05}
    return SpikeLoraConfig(**(defaults | options))


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(tokens).logits


def adapter(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


class TestTrainer:
    """transformers' own, on a model of two layers."""

    def trainer(self, folder, model=None, **options):
        if model is None:
            model = spiking(tiny_opt(), task_type="CAUSAL_LM", v_threshold=0.05)
        arguments = TrainingArguments(output_dir=str(folder), **(ARGUMENTS | options))
        return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:8])

    @works("Trainers", "transformers: training, saving, loading")
    def test_learns_and_what_it_saves_is_what_it_learned(self, tmp_path):
        trainer = self.trainer(tmp_path, max_steps=30)
        before, loss = adapter(trainer.model), trainer.evaluate()["eval_loss"]
        trainer.train()
        moved = {name for name, tensor in adapter(trainer.model).items() if not torch.equal(tensor, before[name])}
        assert trainer.evaluate()["eval_loss"] < loss - 0.1
        assert moved == {name for name in before if "lora_gate" not in name}
        trainer.save_model(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(tiny_opt(), tmp_path / "adapter")
        assert torch.equal(logits(loaded), logits(trainer.model))

    @works("Trainers", "transformers: an adapter put on by `add_adapter`")
    @takes_adapters
    def test_a_model_that_took_the_adapter_itself(self, tmp_path):
        expected = self.trainer(tmp_path)
        model = tiny_opt()
        model.add_adapter(config())
        model.load_state_dict(
            {name.removeprefix("base_model.model."): tensor for name, tensor in expected.model.state_dict().items()}
        )
        trainer = self.trainer(tmp_path, model)
        trainer.train()
        expected.train()
        assert losses(trainer) == losses(expected)
        trainer.save_model(tmp_path / "adapter")
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_opt(), tmp_path / "adapter")), logits(expected.model))

    @works("Trainers", "transformers: gradient checkpointing, with and without re-entrance")
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_changes_no_loss(self, use_reentrant, tmp_path):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        trainer, plain = self.trainer(tmp_path, **options), self.trainer(tmp_path)
        trainer.train()
        plain.train()
        assert losses(trainer) == losses(plain)
        torch.testing.assert_close(adapter(trainer.model), adapter(plain.model), rtol=0, atol=0)

    @works("Trainers", "transformers: gradient accumulation")
    def test_accumulation_is_a_larger_batch(self, tmp_path):
        trainer = self.trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
        plain = self.trainer(tmp_path)
        trainer.train()
        plain.train()
        assert losses(trainer) == pytest.approx(losses(plain), abs=1e-5)

    @works("Trainers", "transformers: `bf16`")
    def test_autocast_in_bfloat16(self, tmp_path):
        trainer, plain = self.trainer(tmp_path, bf16=True), self.trainer(tmp_path)
        trainer.train()
        plain.train()
        assert losses(trainer) != losses(plain)
        assert losses(trainer) == pytest.approx(losses(plain), abs=0.05)
        assert {tensor.dtype for tensor in adapter(trainer.model).values()} == {torch.float32}

    @works("Trainers", "transformers: `fp16`", note="on CPU cores, with what accelerate does on a GPU switched on")
    def test_autocast_in_float16_with_scaled_gradients(self, tmp_path):
        trainer, plain = self.trainer(tmp_path, fp16=True), self.trainer(tmp_path)
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        trainer.train()
        plain.train()
        assert scaler.get_scale() == 2.0**10
        assert losses(trainer) != losses(plain)
        assert losses(trainer) == pytest.approx(losses(plain), abs=0.05)

    @works("Trainers", "transformers: a model in half precision")
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_model_in_half_precision(self, dtype, tmp_path):
        trainer = self.trainer(tmp_path, spiking(tiny_opt().to(dtype), task_type="CAUSAL_LM", v_threshold=0.05))
        plain = self.trainer(tmp_path)
        trainer.train()
        plain.train()
        assert losses(trainer) == pytest.approx(losses(plain), abs=0.05)
        gates = [gate for gate in trainer.model.modules() if isinstance(gate, SpikeGate)]
        assert {gate.v_threshold.item() for gate in gates} == {torch.tensor(0.05).item()}
        trainer.save_model(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(tiny_opt().to(dtype), tmp_path / "adapter")
        assert torch.equal(logits(loaded), logits(trainer.model))

    @works("Trainers", "transformers: `load_best_model_at_end`")
    def test_the_best_is_loaded_with_its_thresholds(self, tmp_path):
        model = spiking(tiny_opt(), task_type="CAUSAL_LM", learn_threshold=True, learn_tau=True)
        options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
        # The worst counts as the best, so that it is not the last.
        options |= {"metric_for_best_model": "loss", "greater_is_better": True}
        trainer = self.trainer(tmp_path, model, load_best_model_at_end=True, **options)
        trainer.train()
        best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
        assert best < 6
        folders = {step: tmp_path / f"checkpoint-{step}" for step in (best, 6)}
        saved = {step: PeftModel.from_pretrained(tiny_opt(), folder) for step, folder in folders.items()}
        assert torch.equal(logits(trainer.model), logits(saved[best]))
        gates = {step: adapter(loaded) for step, loaded in saved.items()}
        assert not all(torch.equal(gates[best][k], gates[6][k]) for k in gates[6] if k.endswith("v_threshold"))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses(trainer, "eval_loss")), abs=1e-6)

    @works("Trainers", "transformers: resuming from a checkpoint")
    @pytest.mark.parametrize("learned", [False, True])
    def test_a_resumed_training_ends_where_an_uninterrupted_one_does(self, learned, tmp_path):
        def model():
            return spiking(tiny_opt(), task_type="CAUSAL_LM", learn_threshold=learned, learn_tau=learned)

        whole = self.trainer(tmp_path, model(), save_strategy="steps", save_steps=3)
        whole.train()
        resumed = self.trainer(tmp_path / "resumed", model())
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert losses(resumed)[-3:] == losses(whole)[-3:]
        torch.testing.assert_close(adapter(resumed.model), adapter(whole.model), rtol=0, atol=0)
        trained = {name for name, p in resumed.model.named_parameters() if p.requires_grad and "lora_gate" in name}
        assert bool(trained) == learned


class Hub:
    """A stand-in for the hub's API: it keeps what is uploaded."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/somebody/{Path(repo_id).name}")

    def upload_folder(self, folder_path, **kwargs):
        for file in Path(folder_path).iterdir():
            if file.is_file():
                self.files[file.name] = file.read_bytes()
        done = Future()
        done.set_result(None)
        return done

    def create_commit(self, operations, **kwargs):
        for operation in operations:
            self.files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    return hub


class TestPushToHub:
    def check(self, hub, folder, expected):
        assert json.loads(hub.files["adapter_config.json"])["peft_type"] == "SPIKELORA"
        for name, content in hub.files.items():
            (folder / name).write_bytes(content)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert sum(name.endswith("lora_gate.v_threshold") for name in file.keys()) == 12  # noqa: SIM118 - no dict
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_opt(), folder)), expected)

    @works("Trainers", "transformers: `push_to_hub`")
    @pytest.mark.parametrize("strategy", ["end", "every_save"])
    def test_from_the_trainer(self, strategy, hub, tmp_path):
        options = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "somebody/adapter"}
        saving = {"save_strategy": "steps", "save_steps": 6} if strategy == "every_save" else {}
        trainer = TestTrainer().trainer(tmp_path / "out", **options, **saving)
        trainer.train()
        if strategy == "end":
            trainer.push_to_hub()
            assert "import spikelora" in hub.files["README.md"].decode()
        (tmp_path / "pulled").mkdir()
        self.check(hub, tmp_path / "pulled", logits(trainer.model))

    @works("Trainers", "PEFT: `push_to_hub`")
    def test_from_the_model(self, hub, monkeypatch, tmp_path):
        load = ModelCard.load

        def load_local(name, **kwargs):
            if name == "somebody/adapter":
                raise EntryNotFoundError(f"{name} has no card yet.")
            return load(name, **kwargs)

        monkeypatch.setattr(ModelCard, "load", load_local)
        model = spiking(tiny_opt(), task_type="CAUSAL_LM")
        model.push_to_hub("somebody/adapter")
        assert "import spikelora" in hub.files["README.md"].decode()
        self.check(hub, tmp_path, logits(model))


TEXTS = [{"text": text} for text in ("The neuron fires at equality.", "def gate(a): return a", "import torch")] * 8
PAIRS = {
    "prompt": ["The neuron", "def gate(a):"] * 8,
    "chosen": [" fires at equality.", " return a"] * 8,
    "rejected": [" is silent.", " pass"] * 8,
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def small(tokenizer, tmp_path_factory):
    """The folder of a tiny OPT that knows the tokenizer's words; TRL loads its reference models by their folders."""
    folder = tmp_path_factory.mktemp("small")
    model = tiny_opt()
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def trained(folder, dtype=torch.float32):
    """A model whose adapter has been trained before: B is not 0, and the thresholds are not the configuration's."""
    model = spiking(load(folder, dtype), task_type="CAUSAL_LM", v_threshold=0.3)
    for gate in model.modules():
        if isinstance(gate, SpikeGate):
            gate.v_threshold.data.fill_(0.02)
    return model


def arguments(kind, folder, **options):
    return kind(output_dir=str(folder), **(ARGUMENTS | {"max_steps": 3, "bf16": False} | options))


class TestSFT:
    def train(self, folder, model, peft_config, tokenizer, **options):
        torch.manual_seed(0)
        trainer = SFTTrainer(
            model=model,
            args=arguments(SFTConfig, folder, **({"max_length": 16, "max_steps": 6} | options)),
            train_dataset=Dataset.from_list(TEXTS),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
        return trainer

    @works("Trainers", "TRL: `SFTTrainer(peft_config=...)`")
    @pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 32}, {"completion_only_loss": False}])
    def test_learns_and_reloads(self, options, small, tokenizer, tmp_path):
        trainer = self.train(tmp_path, small, config(), tokenizer, max_steps=20, learning_rate=0.02, **options)
        assert losses(trainer)[-1] < losses(trainer)[0] - 0.04
        trainer.save_model(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(load(small), tmp_path / "adapter")
        assert torch.equal(logits(loaded), logits(trainer.model))

    @works("Trainers", "TRL: `SFTTrainer(peft_config=...)`")
    def test_a_gate_that_always_fires_trains_as_lora(self, small, tokenizer, tmp_path):
        plain = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        expected = self.train(tmp_path, small, plain, tokenizer)
        actual = self.train(tmp_path, small, config(v_threshold=ALWAYS), tokenizer)
        assert losses(actual) == pytest.approx(losses(expected), abs=1e-5)
        torch.testing.assert_close(logits(actual.model), logits(expected.model), rtol=1e-4, atol=1e-4)

    @works("Trainers", "TRL: `SFTTrainer(peft_config=...)`")
    def test_a_gate_that_never_fires_stays_the_base(self, small, tokenizer, tmp_path):
        trainer = self.train(tmp_path, small, config(v_threshold=NEVER), tokenizer)
        assert torch.equal(logits(trainer.model), logits(load(small)))


class TestDPO:
    def trainer(self, folder, model, tokenizer, peft_config=None, **options):
        torch.manual_seed(0)
        return DPOTrainer(
            model=model,
            args=arguments(DPOConfig, folder, **options),
            train_dataset=Dataset.from_dict(PAIRS),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    def reference(self, trainer):
        """The reference's log-probabilities of the first batch, chosen above rejected."""
        inputs = next(iter(trainer.get_train_dataloader()))
        return inputs, torch.cat(trainer.compute_ref_log_probs(trainer.model, inputs))

    def log_probs(self, model, inputs):
        ids, is_completion = inputs["input_ids"], inputs["completion_mask"][:, 1:]
        with torch.no_grad():
            all_log_probs = model.eval()(ids, attention_mask=inputs["attention_mask"]).logits[:, :-1].log_softmax(-1)
        return (all_log_probs.gather(2, ids[:, 1:, None])[..., 0] * is_completion).sum(1)

    @works("Trainers", "TRL: `DPOTrainer(peft_config=...)`, the reference is the base")
    @pytest.mark.parametrize("precompute", [False, True])
    def test_a_new_adapter_is_referred_to_the_base(self, precompute, small, tokenizer, tmp_path):
        trainer = self.trainer(tmp_path, small, tokenizer, config(), precompute_ref_log_probs=precompute)
        trainer.train()
        inputs, reference = self.reference(trainer)
        expected = self.log_probs(load(small), inputs)
        torch.testing.assert_close(reference, expected)
        assert not torch.allclose(self.log_probs(trainer.model, inputs), expected)
        assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)  # log 2, as B is 0 and both policies the base
        if precompute:
            torch.testing.assert_close(torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]), expected)

    @works("Trainers", "TRL: `DPOTrainer` with a trained adapter, the reference is its copy")
    def test_a_trained_adapter_is_referred_to_its_copy(self, small, tokenizer, tmp_path):
        trainer = self.trainer(tmp_path, trained(small), tokenizer)
        trainer.train()
        inputs, reference = self.reference(trainer)
        torch.testing.assert_close(reference, self.log_probs(trained(small), inputs))
        assert not torch.allclose(reference, self.log_probs(load(small), inputs))
        assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
        trained_again = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert not any("lora_gate" in name or ".ref." in name for name in trained_again)


def rewards(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


GRPO = {"num_generations": 4, "max_completion_length": 8, "beta": 0.1, "learning_rate": 0.5}


class TestGRPO:
    def trainer(self, folder, model, tokenizer, peft_config=None, kind=(GRPOTrainer, GRPOConfig), **options):
        torch.manual_seed(0)
        return kind[0](
            model=model,
            reward_funcs=rewards,
            args=arguments(kind[1], folder, **(GRPO | options)),
            train_dataset=Dataset.from_dict({"prompt": PAIRS["prompt"]}),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    def train(self, trainer):
        """Train; return for each batch its completions' tokens and the reference's log-probabilities of them."""
        batches, generate = [], trainer._generate_and_score_completions

        def noting(inputs):
            output = generate(inputs)
            batches.append(output)
            return output

        trainer._generate_and_score_completions = noting
        trainer.train()
        return batches

    def log_probs(self, model, batch):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        n_prompt = batch["prompt_ids"].shape[1]
        with torch.no_grad():
            all_log_probs = model.eval()(ids, attention_mask=mask).logits[:, n_prompt - 1 : -1].log_softmax(-1)
        return all_log_probs.gather(2, batch["completion_ids"][..., None])[..., 0]

    def check(self, batches, model):
        for batch in batches:
            is_token = batch["completion_mask"].bool()
            expected = self.log_probs(model, batch)[is_token]
            torch.testing.assert_close(batch["ref_per_token_logps"][is_token], expected, rtol=0, atol=1e-4)

    @works("Trainers", "TRL: `GRPOTrainer(peft_config=...)`, the reference is the base")
    def test_a_new_adapter_is_referred_to_the_base(self, small, tokenizer, tmp_path):
        trainer = self.trainer(tmp_path, small, tokenizer, config())
        batches = self.train(trainer)
        assert len(batches) == 3
        self.check(batches, load(small))
        assert losses(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
        assert losses(trainer, "kl")[-1] > 1e-6
        trainer.save_model(tmp_path / "adapter")
        assert torch.equal(logits(PeftModel.from_pretrained(load(small), tmp_path / "adapter")), logits(trainer.model))

    @works("Trainers", "TRL: `GRPOTrainer` with a trained adapter, the reference is its copy")
    def test_a_trained_adapter_is_referred_to_its_copy(self, small, tokenizer, tmp_path):
        trainer = self.trainer(tmp_path, trained(small), tokenizer)
        batches = self.train(trainer)
        self.check(batches, trained(small))
        assert losses(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
        assert not torch.equal(logits(trainer.model), logits(trained(small)))
        assert not torch.allclose(self.log_probs(load(small), batches[0]), batches[0]["ref_per_token_logps"], atol=1e-3)


@works("Trainers", "TRL: references that are copies of a trained adapter")
@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO"])
def test_a_copy_by_parameters_has_the_thresholds(kind, small, tokenizer, tmp_path):
    data = {
        "DPO": PAIRS,
        "KTO": {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False] * 8},
        "GRPO": {"prompt": PAIRS["prompt"]},
        "RLOO": {"prompt": PAIRS["prompt"]},
    }[kind]
    generates = kind in ("GRPO", "RLOO")
    scored = {"reward_funcs": lambda completions, **_: [1.0] * len(completions)} if generates else {}
    grouped = {"num_generations": 2} if generates else {}
    model = trained(small, torch.bfloat16)
    expected = logits(model)
    getattr(trl, f"{kind}Trainer")(
        model=model,
        args=arguments(getattr(trl, f"{kind}Config"), tmp_path, beta=0.1, **grouped),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
        **scored,
    )
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


@works("Trainers", "TRL: `sync_ref_model`")
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@takes_adapters
def test_a_reference_model_that_follows_has_the_thresholds(alpha, small, tokenizer, tmp_path):
    model = load(small)
    model.add_adapter(config(v_threshold=0.3))
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=arguments(DPOConfig, tmp_path, sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=alpha),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer,
    )
    for gate in model.modules():
        if isinstance(gate, SpikeGate):
            gate.v_threshold.fill_(0.02)
    trainer.train()
    gates = [gate for gate in trainer.ref_model.modules() if isinstance(gate, SpikeGate)]
    assert [gate.v_threshold.item() for gate in gates] == pytest.approx([0.3 + alpha * (0.02 - 0.3)] * 12)
    assert torch.equal(logits(trainer.ref_model), logits(model)) == (alpha == 1)
    assert not torch.equal(logits(model), logits(load(small)))


def test_a_process_that_mixes_no_parameters_mixes_the_numbers(monkeypatch):
    """As under ZeRO-3, where TRL mixes parameters in the first process alone."""
    models = [spiking(tiny_opt(), v_threshold=v_threshold) for v_threshold in (0.3, 0.1)]
    guard_trainers()
    callback = trl.trainer.callbacks.SyncRefModelCallback
    monkeypatch.setattr(callback, "_sync_target_model", lambda *args: None)
    callback.sync_target_model(*models, 0.25)
    thresholds = [gate.v_threshold.item() for gate in models[1].modules() if isinstance(gate, SpikeGate)]
    assert thresholds == pytest.approx([0.15] * 12)


class Engine:
    """A stand-in for `vllm.LLM`."""

    made = 0

    def __init__(self, **options):
        Engine.made += 1


@pytest.fixture
def vllm(monkeypatch):
    module = trl.generation.vllm_generation
    monkeypatch.setattr(Engine, "made", 0)
    monkeypatch.setattr(module, "is_vllm_available", lambda: True)
    monkeypatch.setattr(module, "LLM", Engine, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # TRL sets them, the fixture takes them back
        monkeypatch.delenv(name)


@works("Trainers", "TRL: vLLM", refused="it generates with merged weights; `use_vllm=False`")
class TestVLLM:
    @pytest.mark.parametrize("kind", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)], ids=["GRPO", "RLOO"])
    @pytest.mark.parametrize("adapted", [False, True], ids=["peft_config", "PeftModel"])
    def test_is_refused_before_the_engine_starts(self, kind, adapted, vllm, small, tokenizer, tmp_path):
        model, peft_config = (trained(small), None) if adapted else (small, config())
        with pytest.raises(SpikeLoraError, match="by `use_vllm=False`"):
            TestGRPO().trainer(tmp_path, model, tokenizer, peft_config, kind, use_vllm=True, vllm_mode="colocate")
        assert Engine.made == 0

    @pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning")
    def test_is_refused_to_trainers_that_know_nothing_else(self, tmp_path):
        """Asynchronous trainers have no `use_vllm`; they may serve the adapter itself, which vLLM would not gate."""
        from trl.experimental.async_grpo import AsyncGRPOConfig

        options = {name: value for name, value in ARGUMENTS.items() if name != "per_device_train_batch_size"}
        with pytest.raises(SpikeLoraError, match="a trainer that has the option"):
            Trainer(spiking(tiny_opt()), AsyncGRPOConfig(output_dir=str(tmp_path), bf16=False, **options))

    def test_is_left_to_lora(self, vllm, small, tokenizer, tmp_path):
        plain = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        TestGRPO().trainer(tmp_path, small, tokenizer, plain, use_vllm=True, vllm_mode="colocate")
        assert Engine.made == 1
