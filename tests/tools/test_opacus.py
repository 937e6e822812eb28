"""Opacus on spiking adapters: the gradients of single samples, and DP-SGD with them: `make tools`."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from spikelora import SpikeLoraConfig
from spikelora.method.paths import Path

opacus = pytest.importorskip("opacus")

pytestmark = [
    # Opacus takes its noise from torch's generator, and says that this one is not a cryptographic one.
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
    # Nothing before the first adapted layer needs a gradient. Opacus takes the gradient of its outputs.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

NEVER, ALWAYS = 1e30, -1e30
LEARNED = {"learn_threshold": True, "learn_tau": True}
OPTIONS = {"fixed": {}, "learned": LEARNED, "straight through": LEARNED | {"surrogate": "straight_through"}}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
IDS = torch.arange(3, 33).view(3, 10)
in_both_modes = pytest.mark.parametrize("mode", ["hooks", "functorch"])
with_all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
as_with_lora = pytest.mark.parametrize("make_config", [LoraConfig, SpikeLoraConfig])


def llama():
    """Its weights are large enough that every gate is open for some tokens and closed for others."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(intermediate_size=64, num_key_value_heads=2, initializer_range=0.2, **SIZES)
    ).eval()


def adapted(base, make_config=SpikeLoraConfig, target_modules="all-linear", **options):
    """A model in training mode whose B is not 0, so that its gates matter."""
    torch.manual_seed(0)
    model = get_peft_model(base, make_config(r=4, target_modules=target_modules, **options)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            nn.init.normal_(parameter, std=0.25)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def losses(model, ids):
    return model(input_ids=ids, use_cache=False).logits.sin().sum(dim=(1, 2))


def ordinary(model, ids):
    found = trained(model)
    return dict(zip(found, torch.autograd.grad(losses(model, ids).sum(), list(found.values())), strict=True))


def by_sample(model, mode):
    """What Opacus finds for each sample; it is taken off the model again."""
    private = opacus.GradSampleModule(model, loss_reduction="sum", force_functorch=mode == "functorch")
    losses(private, IDS).sum().backward()
    found = {name: p.grad_sample for name, p in trained(model).items()}
    private.to_standard_module()
    return found


def make_private(model, rows, **options):
    engine = opacus.PrivacyEngine()
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(trained(model).values(), lr=1e-2),
        data_loader=DataLoader(TensorDataset(rows), batch_size=32),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        noise_generator=torch.Generator().manual_seed(1),
        **options,
    )
    return engine, *made


def step(model):
    _, private, optimizer, _ = make_private(model, IDS, poisson_sampling=False)
    losses(private, IDS).mean().backward()
    optimizer.step()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def fill(model, symbol, value):
    for name, number in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(symbol):
            number.data.fill_(value)


@in_both_modes
@with_all_options
def test_each_sample_has_the_gradients_of_its_row_alone(mode, options):
    model = adapted(llama(), **options)
    rows, together = [ordinary(model, row[None]) for row in IDS], ordinary(model, IDS)

    found = by_sample(model, mode)

    assert len(found) == 14 * (4 if options else 2)
    for name, of_samples in found.items():
        expected = torch.stack([row[name] for row in rows])
        assert expected.abs().max() > 0.05
        torch.testing.assert_close(of_samples, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of_samples.sum(0), together[name], rtol=1e-4, atol=1e-4)


@in_both_modes
@with_all_options
def test_dp_sgd_learns_and_leaves_the_gates(mode, options, tmp_path):
    model = adapted(llama(), **options)
    layer, x = model.get_base_model().model.layers[0].self_attn.q_proj, torch.ones(1, 3, 32)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    torch.manual_seed(1)  # of the samples that are drawn
    engine, private, optimizer, loader = make_private(
        model, torch.arange(10, 20).expand(256, -1), grad_sample_mode=mode
    )
    seen = []
    for _ in range(2):
        for (ids,) in loader:
            loss = private(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    epsilon = engine.get_epsilon(delta=1e-5)
    path_within = layer.path(x)
    model = private.to_standard_module()

    assert 0 < epsilon < math.inf
    assert seen[-1] < seen[0] / 2  # more than noise alone would do
    for name, p in trained(model).items():
        assert p.isfinite().all()
        assert not torch.equal(p, before[name]), name
    assert path_within == (Path.PLAIN, "`lora_A` has hooks", None)
    assert layer.path(x).path is Path.FUSED

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model.eval()))
    with model.disable_adapter():
        of_base = logits(model)
    assert (logits(model) - of_base).abs().max() > 0.1
    fill(model, "v_threshold", NEVER)
    assert torch.equal(logits(model), of_base)

    lora = adapted(llama(), LoraConfig)
    low_rank = {name: p for name, p in trained(model).items() if "lora_gate" not in name}
    assert low_rank.keys() == trained(lora).keys()
    lora.load_state_dict(low_rank, strict=False)
    expected = by_sample(lora, mode)
    fill(model, "v_threshold", ALWAYS)
    found = by_sample(model.train(), mode)
    for name, of_samples in expected.items():
        torch.testing.assert_close(found[name], of_samples, rtol=1e-4, atol=1e-4)
    # With the thresholds of the training they are others.
    found = by_sample(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train(), mode)
    assert all((found[name] - of_samples).abs().max() > 0.1 for name, of_samples in expected.items())


@in_both_modes
def test_a_tau_at_its_floor_also_gets_what_would_lower_it(mode):
    model = adapted(llama(), **LEARNED)
    fill(model, "tau", 1.0)
    together = {name: g for name, g in ordinary(model, IDS).items() if name.endswith("tau")}
    found = by_sample(model, mode)
    stopped = [name for name, g in together.items() if g == 0]
    assert 0 < len(stopped) < len(together)
    for name, g in together.items():
        if name in stopped:
            assert found[name].sum() > 0
        else:
            torch.testing.assert_close(found[name].sum(0), g, rtol=1e-4, atol=1e-4)


@as_with_lora
def test_opt_counts_each_token_as_a_sample(make_config):
    """Of `fc1` and `fc2`, before which it flattens tokens, and with LoRA as well."""

    def opt():
        return OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **SIZES))

    model = adapted(opt(), make_config)
    rows = [ordinary(model, row[None]) for row in IDS]
    for name, of_samples in by_sample(model, "hooks").items():
        if ".fc" in name:
            assert len(of_samples) == IDS.numel()
        else:
            torch.testing.assert_close(of_samples, torch.stack([row[name] for row in rows]), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        step(model)
    step(adapted(opt(), make_config, ["fc1", "fc2"]))  # nothing else is there to differ from
    step(adapted(opt(), make_config, ["q_proj", "v_proj"]))


@as_with_lora
def test_embeddings_are_refused_by_opacus(make_config):
    """It finds parameters outside of a layer's own, for which it finds no gradients."""
    model = adapted(llama(), make_config, ["embed_tokens", "q_proj"])
    missing = {name for name, of_samples in by_sample(model, "hooks").items() if of_samples is None}
    assert missing == {name for name in trained(model) if "lora_embedding" in name}
    with pytest.raises(ValueError, match="Per sample gradient is not initialized"):
        step(model)


@pytest.mark.parametrize("options", [{"learn_threshold": True}, {"learn_tau": True}])
def test_one_learned_number_beside_a_fixed_one_is_refused_by_opacus(options):
    with pytest.raises(NotImplementedError, match="trainable layer with buffers"):
        make_private(adapted(llama(), **options), IDS)
