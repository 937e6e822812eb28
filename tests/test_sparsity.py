"""The meter: counts by hand, padding, everything that runs twice, and that it changes nothing."""

import copy
import json
import math
from collections import Counter

import pytest
import torch
from conftest import CACHE, spiking, tiny_gpt2, tiny_llama, tiny_opt
from conftest import TOKENS as SHARED
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerModel,
    T5Config,
    T5ForConditionalGeneration,
)

from spikelora import SparsityMeter, SpikeLoraConfig, SpikeLoraError
from spikelora.method.paths import Path, force_path
from spikelora.sparsity.meter import places
from spikelora.sparsity.observe import gates

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
TOKENS = torch.arange(3, 31).view(2, 14)


def by_hand(**options):
    """One layer with A = identity, so that `v = x / 2`, and threshold 1: x fires from 2 on."""
    model = spiking(nn.Sequential(nn.Linear(3, 2)), r=3, target_modules=["0"], v_threshold=1.0, **options)
    with torch.no_grad():
        model.base_model.model[0].lora_A["default"].weight.copy_(torch.eye(3))
    return model.eval()


X = torch.tensor([[2.0, 1.9, -1.0], [0.0, 1.0, -2.0], [5.0, 2.0, -9.0], [-1.0, -1.0, -1.0]])


@pytest.mark.parametrize("path", list(Path))
def test_counted_by_hand(path):
    model = by_hand()
    with SparsityMeter(model) as meter, force_path(path):
        model(X[:1])
        inside = meter.report()
        model(X[1:])
    report = meter.report()

    assert inside.tokens == 1
    assert inside.sparsity == pytest.approx(2 / 3)
    assert report.sparsity == 1 - 3 / 12
    assert report.silent_tokens == 2 / 4
    assert report.zero_threshold_sparsity == 6 / 12
    assert report.tokens == 4
    (name, module), *rest = report.modules.items()
    assert (name, rest) == ("0", [])
    assert module.firing_rates == (2 / 4, 1 / 4, 0.0)
    assert module.dead_ranks == (2,)
    assert (module.module, module.adapter, module.layer, module.kind) == ("0", "default", "0", "0")
    assert (module.v_threshold, module.tau) == (1.0, 2.0)
    assert (module.sparsity, module.silent_tokens, module.tokens) == (report.sparsity, 0.5, 4)


def test_report_as_dict_and_table():
    model = by_hand()
    with SparsityMeter(model) as meter:
        model(X)
    report = meter.report()

    as_dict = json.loads(json.dumps(report.to_dict()))
    assert as_dict["sparsity"] == 0.75
    assert as_dict["modules"]["0"]["firing_rates"] == [0.5, 0.25, 0.0]
    table = report.to_pandas()
    assert table.loc[0, "sparsity"] == 0.75
    assert list(table["module"]) == ["0"]


def test_nothing_ran():
    model = by_hand()
    with SparsityMeter(model) as meter:
        pass
    report = meter.report()

    assert report.tokens == 0
    assert math.isnan(report.sparsity)
    assert math.isnan(report.modules["0"].firing_rates[0])
    assert report.modules["0"].dead_ranks == ()


def test_reset_and_a_second_context():
    model = by_hand()
    meter = SparsityMeter(model)
    with meter:
        model(X)
    model(X)
    with meter:
        model(X[:1])
    assert meter.report().tokens == 5
    meter.reset()
    assert meter.report().tokens == 0


def test_two_meters_count_alike_and_leave_no_trace():
    model = by_hand()
    with SparsityMeter(model) as outer:
        with SparsityMeter(model) as inner:
            model(X)
        model(X[:2])
    model(X)

    assert (inner.report().tokens, outer.report().tokens) == (4, 6)
    (gated,) = gates(model)
    assert gated.gate.observers == ()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_inside_detaches():
    model = by_hand()
    with pytest.raises(RuntimeError), SparsityMeter(model):
        model(torch.zeros(1, 7))
    (gated,) = gates(model)
    assert gated.gate.observers == ()


def test_no_spiking_adapter():
    with pytest.raises(SpikeLoraError, match="no spiking adapter"):
        SparsityMeter(tiny_opt())


def test_by_mode():
    model = by_hand()
    with SparsityMeter(model, training=True) as training, SparsityMeter(model, training=False) as evaluation:
        model.train()(X)
        model.eval()(X[:1])

    assert (training.report().tokens, evaluation.report().tokens) == (4, 1)


def test_inference_mode_and_back():
    model = by_hand()
    with SparsityMeter(model) as meter:
        with torch.inference_mode():
            model(X)
            model(X)
        model(X)

    assert meter.report().tokens == 12


def test_a_nan_is_silent_and_infinity_fires():
    model = by_hand()
    x = torch.tensor([[torch.nan, torch.inf, 0.0]])
    with SparsityMeter(model) as meter, torch.no_grad():
        model.base_model.model[0].lora_gate["default"](x)
    assert meter.report().modules["0"].firing_rates == (0.0, 1.0, 0.0)
    assert meter.report().zero_threshold_sparsity == pytest.approx(1 / 3)


def test_several_adapters_each_by_itself():
    model = spiking(tiny_gpt2(), r=2)
    model.add_adapter("other", SpikeLoraConfig(r=3, target_modules=["c_attn"], v_threshold=5.0))
    model.eval()
    with SparsityMeter(model) as meter:
        model.set_adapter("other")
        model(input_ids=TOKENS)
    assert set(meter.report().modules) == {"transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"}
    with meter:
        model.set_adapter("default")
        model(input_ids=TOKENS)
    report = meter.report()

    assert len(report.modules["transformer.h.0.attn.c_attn.other"].firing_rates) == 3
    assert len(report.modules["transformer.h.0.attn.c_attn.default"].firing_rates) == 2
    assert report.modules["transformer.h.0.attn.c_attn.other"].v_threshold == 5.0
    assert report.modules["transformer.h.0.mlp.c_fc.default"].tokens == 28


def test_one_of_several_adapters():
    model = spiking(tiny_gpt2())
    model.add_adapter("other", SpikeLoraConfig(target_modules=["c_attn"]))
    with SparsityMeter(model.eval(), adapters=["default"]) as meter:
        model(input_ids=TOKENS)
        one = meter.report()
        model.set_adapter("other")
        model(input_ids=TOKENS)

    assert meter.report() == one
    assert "transformer.h.0.mlp.c_fc" in one.modules


def test_an_adapter_by_its_name_is_that_one_alone():
    model = spiking(tiny_gpt2())
    model.add_adapter("default-2", SpikeLoraConfig(target_modules=["c_attn"]))
    model.base_model.set_adapter(["default", "default-2"])
    with SparsityMeter(model.eval(), adapters="default-2") as meter:
        model(input_ids=TOKENS)
    assert {module.adapter for module in meter.report().modules.values()} == {"default-2"}


def test_an_adapter_that_was_deleted_keeps_what_was_counted():
    model = spiking(tiny_gpt2())
    for name in ("counted", "never"):
        model.add_adapter(name, SpikeLoraConfig(target_modules=["c_attn"]))
    model.set_adapter("counted")
    with SparsityMeter(model.eval()) as meter:
        model(input_ids=TOKENS)
    before = meter.report()
    model.set_adapter("default")
    for name in ("counted", "never"):
        model.delete_adapter(name)

    assert meter.report() == before
    assert before.tokens == 2 * TOKENS.numel()


def test_no_adapter_that_is_counted():
    model = spiking(tiny_gpt2())
    model.add_adapter("other", SpikeLoraConfig(target_modules=["c_attn"]))
    with SparsityMeter(model.eval(), adapters=["other"]) as meter:
        model.delete_adapter("other")
        model(input_ids=TOKENS)
    assert meter.report().tokens == 0
    assert math.isnan(meter.report().sparsity)


def test_what_is_offloaded_is_refused():
    model = spiking(tiny_opt())
    gates(model)[3].gate.to("meta")
    with pytest.raises(SpikeLoraError, match=f"The neuron of `{gates(model)[3].module}` is on the meta device"):
        SparsityMeter(model).__enter__()


def test_a_copy_on_another_device_is_refused():
    model = spiking(tiny_opt())
    with SparsityMeter(model), pytest.raises(SpikeLoraError, match=r"under `torch\.nn\.DataParallel`"):
        gates(model)[0].gate.observers[0](torch.zeros(2, 4, device="meta"))


def test_mixed_batches_leave_out_the_padding_of_their_own_rows():
    model = spiking(tiny_gpt2(), r=2)
    model.add_adapter("other", SpikeLoraConfig(r=2, target_modules="all-linear"))
    model.eval()
    mask = torch.ones_like(TOKENS)
    mask[1, 9:] = 0
    with SparsityMeter(model) as meter:
        model(input_ids=TOKENS, attention_mask=mask, adapter_names=["default", "other"])
    modules = meter.report().modules

    assert modules["transformer.h.0.attn.c_attn.default"].tokens == 14
    assert modules["transformer.h.0.attn.c_attn.other"].tokens == 9


@pytest.mark.parametrize("make", [tiny_opt, tiny_gpt2])
def test_padding_does_not_count(make):
    """Rows of their own length, and the same rows padded on either side."""
    model = spiking(make()).eval()
    with SparsityMeter(model) as alone:
        model(input_ids=TOKENS[:1, :9])
        model(input_ids=TOKENS[1:])
    padded, mask = torch.full((2, 14), 1), torch.zeros(2, 14, dtype=torch.long)
    padded[0, :9], mask[0, :9] = TOKENS[0, :9], 1
    padded[1], mask[1] = TOKENS[1], 1
    with SparsityMeter(model) as right:
        if make is tiny_opt:
            model(padded, mask)  # by position
        else:
            model(input_ids=padded, attention_mask=mask)
    assert {m.tokens for m in right.report().modules.values()} == {9 + 14}
    for name, module in right.report().modules.items():
        assert module.firing_rates == pytest.approx(alone.report().modules[name].firing_rates, abs=0.05)


def test_left_padded_generation_counts_each_token_once():
    model = spiking(tiny_gpt2()).eval()
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    with SparsityMeter(model) as meter:
        model.generate(input_ids=TOKENS, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, pad_token_id=1)
    # The last new token is not fed back.
    assert {m.tokens for m in meter.report().modules.values()} == {28 - 4 + 2 * 4}


def test_padding_among_the_newest_tokens_of_a_cached_text_does_not_count():
    model, mask = spiking(tiny_gpt2()).eval(), torch.ones_like(TOKENS)
    mask[0, 12:] = 0
    with SparsityMeter(model) as meter:
        cache = model(input_ids=TOKENS[:, :10], attention_mask=mask[:, :10], use_cache=True)[CACHE]
        model(input_ids=TOKENS[:, 10:], attention_mask=mask, **{CACHE: cache})
    assert {m.tokens for m in meter.report().modules.values()} == {28 - 2}


def tiny_bart():
    torch.manual_seed(0)
    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "max_position_embeddings": 32}
    return BartForConditionalGeneration(BartConfig(**shape, **heads, **SHARED, forced_eos_token_id=None))


def tiny_t5():
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=100, decoder_start_token_id=0, **shape))


@pytest.mark.parametrize("make", [tiny_bart, tiny_t5])
def test_encoder_decoder_and_cross_attention_each_have_their_mask(make):
    model = spiking(make(), task_type="SEQ_2_SEQ_LM").eval()
    encoder_mask, decoder_mask = torch.ones_like(TOKENS), torch.ones_like(TOKENS)
    encoder_mask[0, 10:], decoder_mask[:, 3:] = 0, 0
    with SparsityMeter(model) as meter:
        model(
            input_ids=TOKENS,
            attention_mask=encoder_mask,
            decoder_input_ids=TOKENS,  # as long as the encoder's: the shape does not tell them apart
            decoder_attention_mask=decoder_mask,
        )
    cross, keys = ("encoder_attn", "k_proj") if make is tiny_bart else ("EncDecAttention", "k")
    queries = "q_proj" if make is tiny_bart else "q"
    for name, module in meter.report().modules.items():
        parts = name.split(".")
        from_encoder = "encoder" in parts or (cross in parts and parts[-1] in (keys, "v_proj", "v"))
        assert module.tokens == (24 if from_encoder else 6), name
    assert any(cross in name and name.endswith(queries) for name in meter.report().modules)


@pytest.mark.parametrize("n_decoder_tokens", [14, 10])
def test_what_joins_an_encoder_and_a_decoder_has_the_encoder_s_mask(n_decoder_tokens):
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 100}
    encoder = BertModel(BertConfig(hidden_size=16, **shape))
    decoder = BertLMHeadModel(BertConfig(hidden_size=24, is_decoder=True, add_cross_attention=True, **shape))
    targets = ["enc_to_dec_proj", "crossattention.self.key", "crossattention.self.query"]
    model = spiking(EncoderDecoderModel(encoder=encoder, decoder=decoder), target_modules=targets).eval()
    encoder_mask, decoder_ids = torch.ones_like(TOKENS), TOKENS[:, :n_decoder_tokens]
    decoder_mask = torch.ones_like(decoder_ids)
    encoder_mask[0, 9:], decoder_mask[:, 3:] = 0, 0
    with SparsityMeter(model) as meter:
        model(TOKENS, encoder_mask, decoder_input_ids=decoder_ids, decoder_attention_mask=decoder_mask)
    assert {module.kind: module.tokens for module in meter.report().modules.values()} == {
        "enc_to_dec_proj": 23, "key": 23, "query": 6
    }  # fmt: skip


def test_a_decoder_without_a_mask_does_not_take_the_encoder_s():
    model = spiking(tiny_bart(), task_type="SEQ_2_SEQ_LM").eval()
    mask = torch.ones_like(TOKENS)
    mask[0, 10:] = 0
    with SparsityMeter(model) as meter:
        model(input_ids=TOKENS, attention_mask=mask, decoder_input_ids=TOKENS)
    modules = meter.report().modules

    assert modules["model.decoder.layers.0.self_attn.q_proj"].tokens == 28
    assert modules["model.decoder.layers.0.encoder_attn.v_proj"].tokens == 24


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_counts_once(use_reentrant):
    model = spiking(tiny_gpt2(), v_threshold=0.02).train()
    with SparsityMeter(model) as plain:
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with SparsityMeter(model) as checkpointed:
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()

    assert checkpointed.report() == plain.report()


def test_a_layer_that_runs_twice_counts_twice():
    model = spiking(tiny_gpt2()).eval()
    with SparsityMeter(model) as meter:
        model(input_ids=TOKENS)
        model(input_ids=TOKENS)
    assert {m.tokens for m in meter.report().modules.values()} == {56}


class Operations(TorchDispatchMode):
    """Counts what torch computes."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket] += 1
        return operation(*args, **(kwargs or {}))


def test_a_meter_waits_for_nothing_and_leaves_nothing_behind():
    model = spiking(tiny_gpt2()).train()
    mask = torch.ones_like(TOKENS)
    mask[0, 10:] = 0

    def count():
        model.zero_grad()
        with Operations() as seen:
            model(input_ids=TOKENS, attention_mask=mask, labels=TOKENS).loss.backward()
        return seen.counts

    before = count()
    with SparsityMeter(model):
        added = count() - before
    assert sum(added.values()) > 100  # it counts
    aten = torch.ops.aten
    waiting = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.is_nonzero, aten.equal}
    assert not waiting & added.keys()
    assert aten.index not in added  # by a boolean mask it would have to know how many are True
    assert count() == before


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_the_same_to_the_bit(dropout):
    def losses(metered):
        model = spiking(tiny_gpt2(), v_threshold=0.02, lora_dropout=dropout, learn_threshold=True).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        meter = SparsityMeter(model)
        torch.manual_seed(3)
        if metered:
            meter.__enter__()
        seen = []
        for _ in range(8):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        meter.__exit__()
        return seen, meter.report().tokens

    plain, metered = losses(False), losses(True)
    assert metered[0] == plain[0]
    assert (plain[1], metered[1]) == (0, 8 * 28 * 8)


def test_paths_stay_as_they_are():
    model = spiking(tiny_gpt2())
    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    x = torch.randn(2, 3, 32)
    before = layer.path(x).path
    with SparsityMeter(model):
        assert layer.path(x).path is before is Path.FUSED


def test_layers_and_kinds():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **SHARED)
    model = spiking(LlamaForCausalLM(config)).eval()
    with SparsityMeter(model) as meter:
        model(input_ids=TOKENS)
    report = meter.report()

    assert set(report.kinds) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(report.layers) == {"model.layers.0", "model.layers.1"}
    of_kind = [m.sparsity for m in report.modules.values() if m.kind == "q_proj"]
    assert report.kinds["q_proj"].sparsity == pytest.approx(sum(of_kind) / 2)
    of_layer = [m.silent_tokens for m in report.modules.values() if m.layer == "model.layers.1"]
    assert report.layers["model.layers.1"].silent_tokens == pytest.approx(sum(of_layer) / 7)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled():
    model = by_hand()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    with SparsityMeter(compiled) as meter, torch.no_grad():
        y = compiled(X)

    torch.testing.assert_close(y, model(X))
    assert meter.report().sparsity == 0.75
    with torch.no_grad():
        compiled(X)
    assert meter.report().tokens == 4


def tiny_bert(model_class=BertModel, config_class=BertConfig, **options):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return model_class(config_class(vocab_size=100, pad_token_id=1, **shape, **options))


def test_kinds_tell_the_modules_of_a_layer_apart():
    model = spiking(tiny_bert()).eval()
    with SparsityMeter(model) as meter:
        model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), token_type_ids=torch.zeros_like(TOKENS))
    dense = {"attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"}
    assert set(meter.report().kinds) == {"query", "key", "value", *dense}
    assert places(["h.0.experts.0.w1", "h.0.experts.1.w1", "lm_head", "3"]) == {
        "h.0.experts.0.w1": ("h.0", "w1"),
        "h.0.experts.1.w1": ("h.0", "w1"),
        "lm_head": ("", "lm_head"),
        "3": ("3", "3"),
    }


def test_an_encoder_with_a_pooler():
    model, mask = spiking(tiny_bert()).eval(), torch.ones_like(TOKENS)
    mask[0, 5:] = 0
    with SparsityMeter(model) as meter:
        model(input_ids=TOKENS, attention_mask=mask)
    modules = meter.report().modules

    assert modules.pop("pooler.dense").tokens == 2
    assert {module.tokens for module in modules.values()} == {5 + 14}


def test_masks_that_are_added_to_scores_are_none_of_tokens():
    """Longformer turns the mask of tokens into one to add, of the same shape."""
    model = tiny_bert(LongformerModel, LongformerConfig, attention_window=4, max_position_embeddings=40)
    model, tokens, mask = spiking(model).eval(), torch.arange(3, 35).view(2, 16), torch.ones(2, 16)
    mask[0, 6:] = 0
    with SparsityMeter(model) as meter:
        model(input_ids=tokens, attention_mask=mask)
    assert meter.report().modules["encoder.layer.0.intermediate.dense"].tokens == 6 + 16


def test_tokens_before_batch():
    class TokensFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x, attention_mask):
            return self.fc(x.transpose(0, 1))

    model = spiking(TokensFirst(), r=3, target_modules=["fc"], v_threshold=1.0).eval()
    model.base_model.model.fc.lora_A["default"].weight.data = torch.eye(3)
    x, mask = torch.full((2, 4, 3), 9.0), torch.ones(2, 4)
    x[1, 1:], mask[1, 1:] = -9.0, 0
    with SparsityMeter(model) as meter:
        model(x=x, attention_mask=mask)
    assert (meter.report().tokens, meter.report().sparsity) == (5, 0.0)


def test_a_copy_is_not_watched():
    model = by_hand()
    with SparsityMeter(model) as meter:
        copied = copy.deepcopy(model)
        copied(X)
    assert meter.report().tokens == 0
    torch.testing.assert_close(copied(X), model(X))


def test_a_copy_and_a_file_of_a_model_with_masks_are_not_watched(tmp_path):
    torch.manual_seed(0)
    model = spiking(tiny_gpt2(), v_threshold=0.0)
    inputs = {"input_ids": torch.arange(6)[None] + 3, "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}
    expected = model(**inputs).logits
    with SparsityMeter(model) as meter:
        copied = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        read = torch.load(tmp_path / "model.pt", weights_only=False)
        for other in (copied, read):
            assert torch.equal(other(**inputs).logits, expected)
        assert meter.report().tokens == 0
        model(**inputs)
    assert meter.report().tokens == 4 * len(gates(model))


def test_a_meter_measures_once_at_a_time():
    meter = SparsityMeter(by_hand())
    with meter, pytest.raises(SpikeLoraError, match="is measuring already"):
        meter.__enter__()


def test_padding_free_batches():
    """Several texts in one row, whose positions start anew, count as each of them does in a row of its own."""
    model = spiking(tiny_llama(), v_threshold=0.02)
    texts = [torch.arange(3, 12), torch.arange(20, 25), torch.arange(40, 54)]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    with torch.no_grad(), SparsityMeter(model) as meter:
        model(input_ids=torch.cat(texts)[None], position_ids=positions, use_cache=False)
    packed = meter.report()
    with torch.no_grad(), SparsityMeter(model) as meter:
        for text in texts:
            model(input_ids=text[None], use_cache=False)
    assert packed.tokens == 14 * 28
    assert packed == meter.report()
