"""Whatever is done to a saved adapter, loading it gives the saved adapter, or a clear error and no change.

Damage that looks like another trained adapter is left out here: a bit of a weight that flips to another finite number,
or a digit of `lora_alpha`; see docs/files.md.
"""

import json
import struct

import pytest
import torch
from conftest import tiny_opt
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from test_save_load import TOKENS, trained
from transformers import AutoModelForCausalLM, OPTForCausalLM

from spikelora import SpikeLoraConfig, SpikeLoraError

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
MODULES = [f"layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "fc1")]
OPTIONS = {"target_modules": ["q_proj", "fc1"]}


class Touch:
    """As a pickle, makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


# The loaders: each makes a model and loads a folder into it -----------------------------------------------------------


def bare(base_folder):
    return tiny_opt()


def with_an_adapter(base_folder):
    """With one of the same modules and rank, active, and other values."""
    torch.manual_seed(7)
    model = get_peft_model(tiny_opt(), SpikeLoraConfig(r=4, v_threshold=0.4, task_type="CAUSAL_LM", **OPTIONS)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def nothing(base_folder):
    return None


def second_adapter(model, folder):
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


def over_an_adapter(model, folder):
    model.load_adapter(folder, "default")
    return model


def hotswap(model, folder):
    hotswap_adapter(model, folder, "default", torch_device="cpu")
    return model


def transformers(model, folder):
    model.load_adapter(str(folder))
    return model


LOADERS = {
    "PeftModel.from_pretrained": (bare, PeftModel.from_pretrained),
    "PeftModel.from_pretrained, low_cpu_mem_usage": (
        bare,
        lambda model, folder: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True),
    ),
    "PeftModel.load_adapter, a second one": (with_an_adapter, second_adapter),
    "PeftModel.load_adapter, over one": (with_an_adapter, over_an_adapter),
    "hotswap_adapter": (with_an_adapter, hotswap),
    "load_adapter of transformers": (bare, transformers),
    "AutoPeftModelForCausalLM": (nothing, lambda _, folder: AutoPeftModelForCausalLM.from_pretrained(folder)),
    "AutoModelForCausalLM": (nothing, lambda _, folder: AutoModelForCausalLM.from_pretrained(str(folder))),
}


# Where an adapter of the name is there, `load_adapter` reads the weights alone, and their gates with them.
READ_THE_CONFIGURATION = [name for name in LOADERS if name != "PeftModel.load_adapter, over one"]


def state(model):
    """All of a model that a loader could leave changed."""
    if model is None:
        return None
    tensors = model.state_dict(keep_vars=True)
    modules = model.named_modules()
    return (
        [(name, type(module), module.training, len(module._forward_pre_hooks)) for name, module in modules],
        [(name, tensor.requires_grad, tensor.dtype) for name, tensor in tensors.items()],
        sorted(getattr(model, "peft_config", {})),
        getattr(model, "_hf_peft_config_loaded", None),
        model(TOKENS).logits.detach().numpy().tobytes(),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The files of a saved adapter, the logits it gives, and the folder of its base."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_opt().save_pretrained(folder / "base")
    model = trained(OPTForCausalLM.from_pretrained(folder / "base"), **OPTIONS)
    model.save_pretrained(folder / "adapter")
    files = {name: (folder / "adapter" / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    return files, model(TOKENS).logits, folder / "base"


@pytest.fixture(scope="module")
def models(saved):
    """The models that the loaders are tried on: one for all tries, as a failed one leaves it as it was."""
    return {name: make(saved[2]) for name, (make, _) in LOADERS.items()}


def write(files, folder):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# The damage -----------------------------------------------------------------------------------------------------------


def flip(content, bit):
    content = bytearray(content)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def header_bits(content):
    return 8 * (8 + struct.unpack("<Q", content[:8])[0])


@st.composite
def cut(draw, files):
    assume(files)
    name = draw(st.sampled_from(sorted(files)))
    return files | {name: files[name][: draw(st.integers(0, max(0, len(files[name]) - 1)))]}


@st.composite
def flip_in_header(draw, files):
    content = files.get(WEIGHTS, b"")
    assume(len(content) > 8)
    return files | {WEIGHTS: flip(content, draw(st.integers(0, min(header_bits(content), 8 * len(content)) - 1)))}


@st.composite
def flip_in_config(draw, files):
    assume(files.get(CONFIG))
    return files | {CONFIG: flip(files[CONFIG], draw(st.integers(0, 8 * len(files[CONFIG]) - 1)))}


def _drop(draw, tensors):
    name = draw(st.sampled_from(sorted(tensors)))
    module = name.partition(".lora")[0] if draw(st.booleans()) else name
    for other in [other for other in tensors if other.startswith(module)]:
        del tensors[other]


def _extra(draw, tensors):
    name = draw(st.sampled_from(sorted(tensors)))
    old, new = draw(st.sampled_from([("fc1", "fc2"), ("layers.0", "layers.7"), ("lora_A", "lora_C"), ("model.", "x.")]))
    tensors[name.replace(old, new) if old in name else "x"] = tensors[name].clone()


def _shape(draw, tensors):
    name = draw(st.sampled_from(sorted(tensors)))
    sizes = draw(st.lists(st.integers(0, 5), max_size=3))
    assume(tuple(sizes) != tuple(tensors[name].shape))
    tensors[name] = torch.ones(sizes)


def _value(draw, tensors):
    """A bit of an exponent flips, so that a number is none."""
    names = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel())
    assume(names)
    name = draw(st.sampled_from(names))
    place = draw(st.integers(0, tensors[name].numel() - 1))
    tensors[name].view(-1)[place] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))


def _dtype(draw, tensors):
    name = draw(st.sampled_from(sorted(tensors)))
    assume(tensors[name].dtype == torch.float32)
    tensors[name] = tensors[name].view(torch.int32)


def _rank(draw, tensors):
    """A and B of another rank in one module, or in all."""
    rank = draw(st.sampled_from([1, 3, 5]))
    for module in draw(st.sampled_from([MODULES, MODULES[:1]])):
        matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2]  # some may have been reshaped before
        for name in matrices:
            if module in name and ".lora_A." in name:
                tensors[name] = torch.ones(rank, tensors[name].shape[1])
            if module in name and ".lora_B." in name:
                tensors[name] = torch.ones(tensors[name].shape[0], rank)


@st.composite
def tensors(draw, files):
    try:
        found = load(files[WEIGHTS])
    except Exception:  # it was damaged before
        return files
    assume(found)
    draw(st.sampled_from([_drop, _extra, _shape, _value, _dtype, _rank]))(draw, found)
    return files | {WEIGHTS: save(found, metadata={"format": "pt"})}


JUNK = [None, True, -1, 0, 1, 1.5, float("nan"), "x", "(", [], [1], ["x"], [[0, 1]], {}, {"x": 1}, {"fc1": 3}]


@st.composite
def fields(draw, files):
    try:
        config = json.loads(files[CONFIG])
    except Exception:  # it was damaged before
        return files
    assume(isinstance(config, dict) and config)
    name = draw(st.sampled_from(sorted(config)))
    how = draw(st.sampled_from(["value", "value", "name", "missing"]))
    value = draw(st.sampled_from(JUNK)) if how == "value" else config.pop(name)
    if how != "missing":
        config[name + "x" * (how == "name")] = value
    return files | {CONFIG: json.dumps(config).encode()}


@st.composite
def lost_or_pickled(draw, files):
    lost = draw(st.sampled_from([WEIGHTS, CONFIG, None]))
    pickled = {PICKLE: b"x"} if lost is None or draw(st.booleans()) else {}
    return {name: content for name, content in files.items() if name != lost} | pickled


DAMAGE = [cut, flip_in_header, flip_in_config, tensors, fields, lost_or_pickled]


class Files(dict):
    def __repr__(self):  # which goes into the report of a failure
        return f"{ {name: len(content) for name, content in self.items()} } {self.get(CONFIG)!r}"


@st.composite
def damaged(draw, files):
    for damage in draw(st.lists(st.sampled_from(DAMAGE), min_size=1, max_size=3)):
        files = draw(damage(files))
    return files


def is_another_adapter(files, original):
    """Whether the configuration is a sound one, of another scaling, which only who trained the adapter can tell."""
    try:
        config, before = json.loads(files[CONFIG]), json.loads(original[CONFIG])
        SpikeLoraConfig(**config)
    except Exception:
        return False
    return any(config.get(name) != before[name] for name in ("lora_alpha", "use_rslora", "alpha_pattern"))


@pytest.mark.compatibility("Reliability", "damaged adapter files", refused="the model stays as it was")
@pytest.mark.filterwarnings("ignore")  # PEFT warns of some damage before it is refused
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_of_any_kind_ends_in_an_error_and_the_model_as_it_was(data, saved, models, tmp_path_factory):
    original, logits, base_folder = saved
    files = data.draw(damaged(original).map(Files))
    assume(not is_another_adapter(files, original))
    loader = data.draw(st.sampled_from(sorted(LOADERS)))
    folder = write(files, tmp_path_factory.mktemp("damaged") / "adapter")
    model = models[loader]
    before = state(model)
    try:
        loaded = LOADERS[loader][1](model, folder)
    except SpikeLoraError:
        assert state(model) == before
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        assert state(model) == before
        # Without a model, a loader first reads for itself which one to load. Fields that do not go with the model, as
        # a missing configuration, PEFT and transformers refuse themselves.
        assert model is None or type(error) in (ValueError, OSError)  # noqa: PT017, an error is one outcome of several
        assert files.get(CONFIG) != original[CONFIG] or model is None
        return
    models[loader] = LOADERS[loader][0](base_folder)
    assert torch.equal(loaded(TOKENS).logits, logits)


# What the property cannot say: the reasons that are given, and what has no file ---------------------------------------


def edited(files, change):
    found = load(files[WEIGHTS])
    change(found)
    return files | {WEIGHTS: save(found, metadata={"format": "pt"})}


@pytest.mark.compatibility("Reliability", "an adapter of another base model", refused="the model stays as it was")
@pytest.mark.parametrize("loader", [name for name, (make, _) in LOADERS.items() if make is bare])
@pytest.mark.parametrize("other", [{"ffn_dim": 48}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}], ids=str)
def test_an_adapter_of_another_base(loader, other, saved, tmp_path):
    config = tiny_opt().config
    config.update(other)
    base = OPTForCausalLM(config).eval()
    before = state(base)
    with pytest.raises(SpikeLoraError, match="trained on another base model"):
        LOADERS[loader][1](base, write(saved[0], tmp_path / "adapter"))
    assert state(base) == before


# A swap takes an adapter of fewer modules, and silences the others.
@pytest.mark.parametrize(
    "loader", [name for name, (make, _) in LOADERS.items() if make is with_an_adapter and name != "hotswap_adapter"]
)
def test_an_adapter_of_other_modules(loader, saved, tmp_path):
    def drop_a_layer(tensors):
        for name in [name for name in tensors if "layers.1.fc1" in name]:
            del tensors[name]

    model = with_an_adapter(None)
    before = state(model)
    with pytest.raises(SpikeLoraError, match=r"nothing for `.*layers\.1\.fc1.*other `target_modules`"):
        LOADERS[loader][1](model, write(edited(saved[0], drop_a_layer), tmp_path / "adapter"))
    assert state(model) == before


def test_hotswapping_an_adapter_with_patterns(tmp_path):
    options = {"rank_pattern": {"fc1": 2}, "target_modules": ["q_proj", "fc1"]}
    trained(tiny_opt(), **options).save_pretrained(tmp_path / "adapter")
    model = trained(tiny_opt(), **options)
    before = state(model)
    with pytest.raises(SpikeLoraError, match=r"no `rank_pattern`.*with `load_adapter`"):
        hotswap(model, tmp_path / "adapter")
    assert state(model) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, module: tensors.pop(f"{module}.lora_gate.tau"), r"no `lora_gate\.tau` for `.*fc1`"),
        (lambda tensors, module: tensors[f"{module}.lora_A.weight"].fill_(float("nan")), r"lora_A.*not finite numbers"),
        (lambda tensors, module: tensors[f"{module}.lora_gate.tau"].fill_(float("nan")), r"`tau` of `.*fc1`"),
        (
            lambda tensors, module: tensors.update({f"{module}.lora_C.weight": torch.ones(1)}),
            r"lora_C.*no `lora_A` that",
        ),
        (
            lambda tensors, module: tensors.update({"x.weight": torch.ones(1)}),
            r"has `x\.weight`, which the model does not have",
        ),
        (lambda tensors, module: tensors.update({f"{module}.lora_B.weight": torch.ones(64, 3)}), "not of one rank"),
        (lambda tensors, module: tensors.update({f"{module}.lora_A.weight": torch.ones(4, 9)}), r"the shape \(4, 9\)"),
        (lambda tensors, module: tensors.clear(), "no `lora_A` at all"),
    ],
)
def test_tensors_without_a_file(change, message):
    model = with_an_adapter(None)
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    before = state(model)
    change(tensors, "base_model.model.model.decoder.layers.1.fc1")
    with pytest.raises(SpikeLoraError, match=message):
        set_peft_model_state_dict(model, tensors)
    assert state(model) == before


def test_tensors_given_to_transformers(saved):
    tensors = load(saved[0][WEIGHTS])
    config = SpikeLoraConfig(r=4, **OPTIONS)
    tensors["base_model.model.model.decoder.layers.1.fc1.lora_B.weight"][0, 0] = float("inf")
    base = tiny_opt()
    before = state(base)
    with pytest.raises(SpikeLoraError, match=r"fc1\.lora_B\.weight` .*not finite numbers"):
        base.load_adapter(peft_config=config, adapter_state_dict=tensors)
    assert state(base) == before


@pytest.mark.compatibility("Reliability", "weights that are a pickle", refused="never loaded")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("alone", [True, False])
def test_a_pickle_is_never_loaded(loader, alone, saved, tmp_path):
    files, _, base_folder = saved
    folder = write({name: files[name] for name in ([CONFIG] if alone else files)}, tmp_path / "adapter")
    torch.save(load(files[WEIGHTS]) | {"x": Touch(tmp_path / "ran")}, folder / PICKLE)
    model = LOADERS[loader][0](base_folder)
    before = state(model)
    with pytest.raises(SpikeLoraError, match=r"adapter_model\.bin is a pickle.*Delete it.*save the adapter again"):
        LOADERS[loader][1](model, folder)
    assert state(model) == before
    assert not (tmp_path / "ran").exists()


def test_saving_as_a_pickle_is_refused(tmp_path):
    with pytest.raises(SpikeLoraError, match=r"adapter_model\.bin is a pickle"):
        with_an_adapter(None).save_pretrained(tmp_path, safe_serialization=False)


def cached(folder, files):
    """The hub's cache, with a repository `someone/adapter` in it."""
    repository = folder / "models--someone--adapter"
    write(files, repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    return folder


def test_an_adapter_of_the_hub_is_checked_as_well(saved, tmp_path):
    files, logits, _ = saved
    model = PeftModel.from_pretrained(tiny_opt(), "someone/adapter", cache_dir=cached(tmp_path / "whole", files))
    assert torch.equal(model(TOKENS).logits, logits)
    damaged_files = files | {WEIGHTS: files[WEIGHTS][:-100]}
    pickled_files = {CONFIG: files[CONFIG], PICKLE: b"x"}
    for number, (content, message) in enumerate(((damaged_files, "is damaged"), (pickled_files, "a pickle is never"))):
        cache = cached(tmp_path / str(number), content)
        base = tiny_opt()
        before = state(base)
        with pytest.raises(SpikeLoraError, match=message):
            PeftModel.from_pretrained(base, "someone/adapter", cache_dir=cache)
        assert state(base) == before


@pytest.mark.compatibility(
    "Reliability", "an adapter that says LORA, with gates in its weights", refused="by all loaders"
)
@pytest.mark.parametrize("loader", READ_THE_CONFIGURATION)
def test_gates_are_never_left_out(loader, saved, tmp_path):
    """Its method changed, PEFT would load the adapter as a LoRA, and ignore the gates."""
    files, _, base_folder = saved
    config = json.loads(files[CONFIG].replace(b"SPIKELORA", b"LORA"))
    model = LOADERS[loader][0](base_folder)
    before = state(model)
    with pytest.raises(SpikeLoraError, match=r"'LORA' for its `peft_type`, but the adapter is a SPIKELORA"):
        LOADERS[loader][1](model, write(files | {CONFIG: json.dumps(config).encode()}, tmp_path / "adapter"))
    assert state(model) == before


@pytest.mark.filterwarnings("ignore")  # PEFT warns of the fields, which are not LoRA's
@pytest.mark.parametrize("loader", READ_THE_CONFIGURATION)
def test_gates_are_not_left_out_where_the_weights_come_later(loader, saved, tmp_path, monkeypatch):
    """From the hub the configuration comes first, and nothing lies beside it."""
    files, _, base_folder = saved
    config = json.loads(files[CONFIG].replace(b"SPIKELORA", b"LORA"))
    model = LOADERS[loader][0](base_folder)
    before = state(model)
    folder = write(files | {CONFIG: json.dumps(config).encode()}, tmp_path / "adapter")
    monkeypatch.setattr("spikelora.peft.config_file.holds_gates", lambda folder: False)
    # Beside a spiking adapter PEFT itself refuses one that says LORA.
    with pytest.raises(ValueError, match=r"The adapter's weights have gates|different peft types|Incompatible PEFT"):
        LOADERS[loader][1](model, folder)
    assert state(model) == before


class TestTheFirstAdapters:
    """Adapters of the first SpikeLoRA code: `peft_type: LORA`, with `use_spikelora` and a threshold beside it."""

    @pytest.fixture
    def folder(self, saved, tmp_path):
        """The saved adapter, as that code would have saved it."""
        get_peft_model(tiny_opt(), LoraConfig(r=4, task_type="CAUSAL_LM", **OPTIONS)).save_pretrained(
            tmp_path / "first"
        )
        file = tmp_path / "first" / CONFIG
        extra = {"use_spikelora": True, "spikelora_v_threshold": 0.1, "base_model_name_or_path": str(saved[2])}
        file.write_text(json.dumps(json.loads(file.read_text()) | extra))
        plain = {name: tensor for name, tensor in load(saved[0][WEIGHTS]).items() if ".lora_gate." not in name}
        (tmp_path / "first" / WEIGHTS).write_bytes(save(plain, metadata={"format": "pt"}))
        return tmp_path / "first"

    @pytest.mark.compatibility(
        "Reliability",
        "adapters of the first SpikeLoRA code, `use_spikelora`",
        refused="the error says how to give them a gate",
    )
    @pytest.mark.parametrize("loader", READ_THE_CONFIGURATION)
    def test_they_are_refused(self, loader, folder, saved):
        model = LOADERS[loader][0](saved[2])
        before = state(model)
        with pytest.raises(SpikeLoraError, match=r"`use_spikelora`.*without its gate"):
            LOADERS[loader][1](model, folder)
        assert state(model) == before

    @pytest.mark.parametrize("config_class", [LoraConfig, PeftConfig, SpikeLoraConfig])
    def test_their_configuration_is_refused(self, config_class, folder):
        with pytest.raises(SpikeLoraError, match=r"`use_spikelora`.*without its gate"):
            config_class.from_pretrained(folder)

    def test_a_lora_with_the_field_off_is_a_lora(self, folder):
        file = folder / CONFIG
        file.write_text(file.read_text().replace('true, "spikelora', 'false, "spikelora'))
        with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
            assert type(PeftConfig.from_pretrained(folder)) is LoraConfig

    def test_the_way_that_the_error_names(self, folder, saved, tmp_path):
        config = SpikeLoraConfig(r=4, v_threshold=0.1, task_type="CAUSAL_LM", **OPTIONS)
        model = get_peft_model(tiny_opt(), config).eval()
        tensors = load_file(folder / WEIGHTS)
        set_peft_model_state_dict(model, get_peft_model_state_dict(model) | tensors)
        model.save_pretrained(tmp_path / "new")
        loaded = PeftModel.from_pretrained(tiny_opt(), tmp_path / "new")
        expected = trained(tiny_opt(), **OPTIONS)
        first = next(
            name for name in expected.state_dict() if name.endswith("v_threshold.default") or "v_threshold" in name
        )
        expected.get_buffer(first).fill_(0.1)  # `trained` gave it another one
        assert torch.equal(loaded(TOKENS).logits, expected(TOKENS).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_treshold": 0.3}, "does not know: v_treshold"),
        ({"use_rslora": "yes"}, r"`use_rslora` in .*adapter_config\.json is 'yes'"),
        ({"lora_alpha": [8]}, r"`lora_alpha` in .*is \[8\]"),
        ({"r": 3}, "has rank 4 in the weights in .* and 3 by `r`"),
        ({"rank_pattern": {"fc1": 3}}, r"layers\.\d\.fc1` has rank 4 .* and 3 by"),
        ({"tau": 0.5}, "`tau` must be greater than 1"),
        ({"peft_type": "SPIKEL0RA"}, "'SPIKEL0RA' is none that PEFT knows"),
        ({"peft_type": None}, "None is none that PEFT knows"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"modules_to_save": ["final_layer_norm"]}, "nothing for '.*final_layer_norm"),
    ],
)
def test_what_is_said_of_a_damaged_configuration(change, message, saved, tmp_path):
    files = saved[0]
    folder = write(files | {CONFIG: json.dumps(json.loads(files[CONFIG]) | change).encode()}, tmp_path / "adapter")
    base = tiny_opt()
    before = state(base)
    with pytest.raises(SpikeLoraError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert state(base) == before


@pytest.mark.parametrize("name", ["lora_alpha", "use_rslora", "rank_pattern"])
def test_a_configuration_without_what_scales_the_weights(name, saved, tmp_path):
    config = json.loads(saved[0][CONFIG])
    del config[name]
    folder = write(saved[0] | {CONFIG: json.dumps(config).encode()}, tmp_path / "adapter")
    with pytest.raises(SpikeLoraError, match=f"has no {name}, which the scaling of its weights needs"):
        PeftModel.from_pretrained(tiny_opt(), folder)


def test_a_failed_load_of_another_method_is_peft_s_affair(saved, tmp_path):
    get_peft_model(tiny_opt(), LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(tiny_opt(), tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(SpikeLoraError, match=r"adapter_config\.json is damaged"):
        PeftModel.from_pretrained(tiny_opt(), tmp_path)


@pytest.mark.parametrize("loader", READ_THE_CONFIGURATION)
def test_a_surrogate_of_a_newer_version(loader, saved, tmp_path):
    """The forward does not depend on it, so that the adapter loads, and says so."""
    files, _, base_folder = saved
    fields = json.loads(files[CONFIG])
    assert fields["surrogate"] == "atan"
    folder = write(files | {CONFIG: json.dumps(fields | {"surrogate": "later"}).encode()}, tmp_path / "adapter")
    with pytest.warns(RuntimeWarning, match="trained with the surrogate gradient 'later', which this version does not"):
        LOADERS[loader][1](LOADERS[loader][0](base_folder), folder)
