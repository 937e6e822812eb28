"""Whatever is done to a saved adapter, loading it gives the adapter that was saved, or a clear error and no change.

What cannot be told from another trained adapter is left out here: a bit of a weight that flips to another finite
number, or a digit of `lora_alpha`; see docs/files.md.
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
    PeftModel,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load, save
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
    """A bit of an exponent flips, so that a number is none, or a tau or threshold out of range."""
    name = draw(st.sampled_from(sorted(tensors)))
    place = draw(st.integers(0, tensors[name].numel() - 1))
    tensors[name].view(-1)[place] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))


def _dtype(draw, tensors):
    name = draw(st.sampled_from(sorted(tensors)))
    tensors[name] = tensors[name].view(torch.int32)


def _rank(draw, tensors):
    """A and B of another rank in one module, or in all."""
    rank = draw(st.sampled_from([1, 3, 5]))
    for module in draw(st.sampled_from([MODULES, MODULES[:1]])):
        for name in tensors:
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
        name = draw(st.sampled_from(sorted(config)))
    except Exception:  # it was damaged before
        return files
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
