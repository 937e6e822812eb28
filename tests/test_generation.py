"""`generate` in its variants, and pipelines, give the tokens that follow from the spiking model's own logits."""

from pathlib import Path

import pytest
import torch
from conftest import spiking, takes_adapters, tiny_gpt2, tiny_llama, tiny_opt
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    OPTForSequenceClassification,
    pipeline,
)

from spikelora import SpikeLoraConfig
from spikelora.method.gate import SpikeGate

FOLDER = Path(__file__).parents[1] / "examples" / "spikelora_finetuning" / "model"
PROMPTS = torch.arange(3, 15).view(2, 6)
PADDED = torch.tensor([[1, 1, 1, 7, 8, 9], [3, 4, 5, 6, 7, 8]])
NEVER, ALWAYS = 1e30, -1e30
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}

works = pytest.mark.compatibility
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")


def generate(model, tokens=PROMPTS, **options):
    return model.generate(input_ids=tokens, **(OPTIONS | options))


def greedy(model, tokens=PROMPTS):
    """What greedy decoding is: the likeliest token of a whole forward, one at a time."""
    with torch.no_grad():
        for _ in range(OPTIONS["max_new_tokens"]):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.fixture(params=[tiny_opt, tiny_gpt2, tiny_llama], ids=["opt", "gpt2", "llama"])
def make_base(request):
    return request.param


@pytest.fixture
def model(make_base):
    model = spiking(make_base(), task_type="CAUSAL_LM", v_threshold=0.02)
    assert not torch.equal(generate(model), generate(make_base()))
    return model


class TestGenerate:
    @works("Generation", "greedy, with and without a cache")
    @pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
    def test_greedy(self, model, options):
        assert torch.equal(generate(model, **options), greedy(model))

    @works("Generation", "padded batches")
    def test_padding_changes_no_token(self, model):
        padded = generate(model, PADDED, attention_mask=(PADDED != 1).long())
        assert torch.equal(padded[0, 6:], generate(model, PADDED[:1, 3:])[0, 3:])
        assert torch.equal(padded[1], generate(model, PADDED[1:])[0])

    @works("Generation", "beams")
    def test_beams(self, model):
        options = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
        beams, uncached = generate(model, **options), generate(model, use_cache=False, **options)
        assert torch.equal(beams.sequences, uncached.sequences)
        torch.testing.assert_close(beams.sequences_scores, uncached.sequences_scores)
        # The score is the mean log-probability of the new tokens, by a forward over the whole sequence.
        with torch.no_grad():
            log_probs = model(beams.sequences).logits[:, 5:-1].log_softmax(-1)
        score = log_probs.gather(2, beams.sequences[:, 6:, None]).sum((1, 2)) / OPTIONS["max_new_tokens"]
        torch.testing.assert_close(beams.sequences_scores, score)

    @works("Generation", "sampling")
    def test_sampling(self, model, make_base):
        def sample(model):
            torch.manual_seed(1)
            return generate(model, do_sample=True, top_k=10)

        silent = spiking(make_base(), v_threshold=NEVER, task_type="CAUSAL_LM")
        assert torch.equal(sample(silent), sample(make_base()))
        assert not torch.equal(sample(model), sample(make_base()))

    @works("Generation", "assisted decoding, prompt lookup")
    @pytest.mark.parametrize("assistant", ["base", "the model itself", "prompt lookup"])
    def test_assisted(self, model, make_base, assistant):
        options = {"assistant_model": {"base": make_base(), "the model itself": model}.get(assistant)}
        if assistant == "prompt lookup":
            options = {"prompt_lookup_num_tokens": 3}
        for row in PROMPTS.split(1):
            assert torch.equal(generate(model, row, **options), greedy(model, row))

    @works("Generation", "assisted decoding, as the assistant")
    def test_as_the_assistant(self, model, make_base):
        row = PROMPTS[:1]
        assert torch.equal(generate(make_base(), row, assistant_model=model), generate(make_base(), row))

    @works("Generation", "greedy, with and without a cache")
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
    def test_a_gate_that_never_fires_gives_the_base(self, make_base, options):
        silent = spiking(make_base(), v_threshold=NEVER, task_type="CAUSAL_LM")
        assert torch.equal(generate(silent, **options), generate(make_base(), **options))

    @works("Generation", "greedy, with and without a cache")
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
    def test_a_gate_that_always_fires_gives_lora(self, make_base, options):
        fires = spiking(make_base(), v_threshold=ALWAYS, task_type="CAUSAL_LM")
        plain = get_peft_model(make_base(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
        plain.load_state_dict({k: v for k, v in fires.state_dict().items() if "lora_gate" not in k})
        assert torch.equal(generate(fires, **options), generate(plain, **options))

    @works("Generation", "half precision")
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_in_half_precision(self, make_base, dtype):
        model = spiking(make_base().to(dtype), task_type="CAUSAL_LM", v_threshold=0.02)
        assert not torch.equal(generate(model), generate(make_base().to(dtype)))
        silent = spiking(make_base().to(dtype), task_type="CAUSAL_LM", v_threshold=NEVER)
        assert torch.equal(generate(silent), generate(make_base().to(dtype)))

    @works("Generation", "switching the adapter off")
    def test_disabled(self, model, make_base):
        with model.disable_adapter():
            assert torch.equal(generate(model), generate(make_base()))


@works("Generation", "continuous batching")
def test_continuous_batching():
    options = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=1, eos_token_id=-1)
    model = spiking(tiny_llama(), task_type="CAUSAL_LM", v_threshold=0.02)
    rows = [PROMPTS[0].tolist(), PROMPTS[1, :4].tolist()]
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)  # by default it takes most of the memory
    batch = model.generate_batch(inputs=rows, generation_config=options, continuous_batching_config=small)
    for row, output in zip(rows, batch.values(), strict=True):
        assert output.generated_tokens == greedy(model, torch.tensor([row]))[0, len(row) :].tolist()
        assert output.generated_tokens != greedy(tiny_llama(), torch.tensor([row]))[0, len(row) :].tolist()


class TestPipelines:
    TEXT = "def gate(a):\n    return"

    @pytest.fixture
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(FOLDER)

    def model(self):
        base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
        return spiking(base, v_threshold=0.02, task_type="CAUSAL_LM").eval()

    def write(self, model, tokenizer, **options):
        options = {"max_new_tokens": 12, "do_sample": False} | options
        return pipeline("text-generation", model=model, tokenizer=tokenizer)(self.TEXT, **options)[0]["generated_text"]

    def by_hand(self, model, tokenizer):
        tokens = tokenizer(self.TEXT, return_tensors="pt").to(model.device)  # to which a pipeline may have moved it
        generated = model.generate(**tokens, max_new_tokens=12, do_sample=False)
        return tokenizer.decode(generated[0], skip_special_tokens=True)

    @works("Generation", "pipelines: text generation")
    def test_a_peft_model(self, tokenizer, device):
        model = self.model()
        written = self.write(model, tokenizer)
        assert model.device.type == device.type
        assert written == self.by_hand(model, tokenizer)
        assert written != self.write(AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32), tokenizer)

    @works("Generation", "pipelines: text generation")
    def test_an_adapter_by_its_folder(self, tokenizer, tmp_path):
        model = self.model()
        model.save_pretrained(tmp_path)
        written = pipeline(
            "text-generation", model=str(tmp_path), tokenizer=tokenizer, model_kwargs={"dtype": torch.float32}
        )
        assert sum(isinstance(module, SpikeGate) for module in written.model.modules()) == 24
        text = written(self.TEXT, max_new_tokens=12, do_sample=False)[0]["generated_text"]
        assert text == self.by_hand(model, tokenizer)

    @works("Generation", "pipelines: text classification")
    def test_a_classifier(self, tokenizer, tmp_path):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(FOLDER, dtype=torch.float32, num_labels=3)
        base.save_pretrained(tmp_path / "base")
        model = spiking(base, v_threshold=0.02, task_type=TaskType.SEQ_CLS).eval()
        model.save_pretrained(tmp_path / "adapter")
        base = OPTForSequenceClassification.from_pretrained(tmp_path / "base")
        model = PeftModel.from_pretrained(base, tmp_path / "adapter")
        scores = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)([self.TEXT])[0]
        tokens = tokenizer(self.TEXT, return_tensors="pt").to(model.device)
        with torch.no_grad():
            expected = model(**tokens).logits[0].softmax(-1).cpu()
            with model.disable_adapter():
                without = model(**tokens).logits[0].softmax(-1).cpu()
        by_label = torch.tensor([score["score"] for score in sorted(scores, key=lambda score: score["label"])])
        torch.testing.assert_close(by_label, expected)
        assert not torch.allclose(without, expected)

    @works("Generation", "pipelines: text generation")
    @takes_adapters
    def test_a_model_that_took_the_adapter_itself(self, tokenizer):
        expected = self.model()
        model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
        model.add_adapter(SpikeLoraConfig(r=4, target_modules="all-linear"))
        model.load_state_dict({k.removeprefix("base_model.model."): v for k, v in expected.state_dict().items()})
        assert self.write(model.eval(), tokenizer) == self.write(expected, tokenizer)
