import copy
import importlib.metadata
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import peft
import pytest
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap
from transformers.integrations.peft import PeftAdapterMixin
from transformers.trainer_callback import CallbackHandler

import spikelora
from spikelora import SpikeLoraConfig, SpikeLoraModel
from spikelora.peft import versions
from spikelora.peft.registration import register
from spikelora.peft.trainers import guard_trainers


def test_the_import_brings_nothing_heavy_and_may_be_repeated(fresh):
    code = """
import sys, peft
before = set(sys.modules)
import spikelora
print(*{name for name in set(sys.modules) - before if not name.startswith("spikelora")})
print(*{"spikelora.method.ops.triton_backend", "spikelora.serving"} & sys.modules.keys())
import spikelora.report.cli, spikelora.serving.plugin
print(*{"matplotlib", "vllm"} & (sys.modules.keys() - before))

old = spikelora.SpikeLoraConfig
for name in [name for name in sys.modules if name.partition(".")[0] == "spikelora"]:
    del sys.modules[name]
import spikelora, torch

assert spikelora.SpikeLoraConfig is not old
assert peft.SpikeLoraConfig is spikelora.SpikeLoraConfig
assert [member.name for member in peft.PeftType].count("SPIKELORA") == 1
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
model = peft.get_peft_model(model, spikelora.SpikeLoraConfig(target_modules=["0"]))
assert type(model.base_model) is spikelora.SpikeLoraModel
model.print_trainable_parameters()
"""
    run = fresh(code)
    assert run.returncode == 0, run.stderr
    brought, own, by_commands, *printed = run.stdout.splitlines()
    # The callbacks' base classes and what they import; transformers' Trainer, which is heavy, is not among them.
    of_transformers = {"debug_utils", "trainer_callback", "trainer_pt_utils", "trainer_utils", "training_args"}
    assert set(brought.split()) <= {"peft.utils.hotswap", *(f"transformers.{name}" for name in of_transformers)}
    assert own == by_commands == ""
    assert "\n".join(printed).count("spiking adapter 'default' on 1 modules") == 1


def test_member_of_the_enum():
    member = PeftType.SPIKELORA

    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert member == member.name == member.value == "SPIKELORA"
    assert PeftType["SPIKELORA"] is PeftType("SPIKELORA") is member
    assert list(PeftType)[-1] is member
    assert list(PeftType).count(member) == 1
    assert hash(member) == hash("SPIKELORA")
    assert repr(member) == "<PeftType.SPIKELORA: 'SPIKELORA'>"


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda member: pickle.loads(pickle.dumps(member))], ids=range(3)
)
def test_copies_of_the_member_are_the_member(duplicate):
    assert duplicate(PeftType.SPIKELORA) is PeftType.SPIKELORA


def test_mappings():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SPIKELORA] is SpikeLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SPIKELORA] is SpikeLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SPIKELORA] == "lora_"
    assert PeftType.SPIKELORA not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    # Files hold the name as a string.
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SPIKELORA"] is SpikeLoraConfig


def test_hotswapping_compares_the_keys_of_lora():
    assert "use_rslora" in hotswap.CONFIG_KEYS_TO_CHECK[PeftType.SPIKELORA]
    assert hotswap.CONFIG_KEYS_TO_CHECK[PeftType.SPIKELORA] == hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]


def test_names_in_peft():
    assert peft.SpikeLoraConfig is SpikeLoraConfig
    assert peft.SpikeLoraModel is SpikeLoraModel


def test_public_names():
    assert spikelora.__all__ == [
        "Ledger",
        "LoraApproximation",
        "ModuleSparsity",
        "Sparsity",
        "SparsityCallback",
        "SparsityControlCallback",
        "SparsityMeter",
        "SparsityReport",
        "SpikeLoraConfig",
        "SpikeLoraError",
        "SpikeLoraModel",
        "calibrate_thresholds",
        "from_lora",
        "operations",
        "prune_ranks",
        "to_lora",
    ]
    assert all(getattr(spikelora, name).__name__ == name for name in spikelora.__all__)
    assert spikelora.__version__ == importlib.metadata.version("spikelora")


def test_registering_again_changes_nothing():
    mappings = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    before = [list(PeftType), *map(dict, mappings), dict(hotswap.CONFIG_KEYS_TO_CHECK)]

    register()
    register()

    assert [list(PeftType), *map(dict, mappings), dict(hotswap.CONFIG_KEYS_TO_CHECK)] == before
    assert peft.SpikeLoraConfig is SpikeLoraConfig
    # Wrapped once: a second wrapper would print the neurons twice.
    assert not hasattr(peft.PeftModel.print_trainable_parameters.__wrapped__, "__wrapped__")


def test_another_method_of_the_same_name_is_left_alone(fresh):
    run = fresh("""
import sys
import peft
from peft import LoraConfig, LoraModel, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import hotswap, register_peft_method

class ForeignConfig(LoraConfig): pass
class ForeignModel(LoraModel): prefix = "foreign_"

member = str.__new__(PeftType, "SPIKELORA")
member._name_ = member._value_ = "SPIKELORA"
PeftType.SPIKELORA = member
PeftType._member_names_.append("SPIKELORA")
PeftType._member_map_["SPIKELORA"] = PeftType._value2member_map_["SPIKELORA"] = member
if hasattr(PeftType, "_hashable_values_"):  # since a patch release of Python 3.12
    PeftType._hashable_values_.append("SPIKELORA")
register_peft_method(name="spikelora", config_cls=ForeignConfig, model_cls=ForeignModel, prefix="foreign_")
printer = PeftModel.print_trainable_parameters

import spikelora

assert PeftType.SPIKELORA is member and [m.name for m in PeftType].count("SPIKELORA") == 1
assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is ForeignConfig
assert PEFT_TYPE_TO_TUNER_MAPPING[member] is ForeignModel
assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "foreign_"
assert member not in hotswap.CONFIG_KEYS_TO_CHECK
assert not hasattr(peft, "SpikeLoraConfig") and not hasattr(peft, "SpikeLoraModel")
assert PeftModel.print_trainable_parameters is printer
print("left alone")
""")

    assert (run.stdout, run.returncode) == ("left alone\n", 0), run.stderr


def test_lora_s_own_model_refuses_the_config(opt):
    config = SpikeLoraConfig(target_modules=["q_proj"])

    with pytest.raises(ValueError, match="Invalid or unsupported variant combination"):
        LoraModel(opt, config, "default")

    assert not any(isinstance(module, LoraLayer) for module in opt.modules())


def test_mixed_models_refuse_the_config(opt):
    config = SpikeLoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="'SPIKELORA' is not compatible with"):
        get_peft_model(opt, config, mixed=True)
    assert not any(isinstance(module, LoraLayer) for module in opt.modules())

    mixed = get_peft_model(opt, LoraConfig(target_modules=["k_proj"]), mixed=True)
    with pytest.raises(ValueError, match="'SPIKELORA' is not compatible with"):
        mixed.add_adapter("spiking", config)
    assert not any("spiking" in name for name, _ in opt.named_parameters())


@pytest.mark.parametrize("requirement", ["peft<0.21,>=0.20", "transformers>=99"])
def test_an_unsupported_version_is_an_error_that_says_which_to_install(requirement, monkeypatch):
    supported = ["peft<0.22,>=0.21", "transformers<6,>=5.17", "torch>=2.10", "pandas>=99; extra == 'dev'"]
    monkeypatch.setattr(versions, "requires", lambda name: supported)
    versions.check()
    monkeypatch.setattr(versions, "requires", lambda name: [*supported, requirement])
    with pytest.raises(ImportError, match=re.escape(f"spikelora needs another one: pip install '{requirement}'")):
        versions.check()


def test_the_versions_are_looked_at_before_peft_is_imported():
    code = """
import importlib.metadata, sys
importlib.metadata.requires = lambda name: ["peft<0.1"]
try:
    import spikelora
except ImportError as error:
    print(error)
print("peft" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, _, imported = run.stdout.splitlines()
    assert message.startswith("peft<0.1 is required")
    assert imported == "False"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (CallbackHandler, "on_init_end"),
        (PeftAdapterMixin, "load_adapter"),
        (peft.utils.hotswap, "hotswap_adapter_from_state_dict"),
        (BaseTuner, "_remap_adapter_state_dict_for_load"),
        (peft.PeftModel, "create_or_update_model_card"),
        (peft.PeftModel, "_upload_modified_files"),
    ],
)
def test_what_is_wrapped_is_wrapped_once(owner, name):
    register()
    guard_trainers()
    assert not hasattr(getattr(owner, name).__wrapped__, "__wrapped__")


def test_the_table_of_what_is_changed_in_other_packages():
    _, _, section = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().partition("in other packages\n")
    rows = [row for row in section.partition("\n## ")[0].splitlines() if row.startswith("| `")]
    listed = {name for row in rows for name in re.findall("`([^`]+)`", row.split(" | ")[0])}
    others = {"accelerate", "peft", "torch", "transformers", "trl"}
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in others]
    # By `type`, as some objects warn of being looked at.
    classes = {c for module in modules for c in vars(module).values() if issubclass(type(c), type)}
    owners = [*modules, *(c for c in classes if c.__module__.partition(".")[0] in others)]
    functions = [
        (f"{place(owner)}.{name}", f.__func__ if type(f) in (classmethod, staticmethod) else f)
        for owner in owners
        for name, f in list(vars(owner).items())
    ]
    source = str(Path(spikelora.__file__).parent)
    ours = {name for name, f in functions if type(f) is FunctionType and f.__code__.co_filename.startswith(source)}
    added = {"peft.PeftType.SPIKELORA", "peft.SpikeLoraConfig", "peft.SpikeLoraModel"}
    added |= {"peft.utils.hotswap.CONFIG_KEYS_TO_CHECK"}
    once_imported = {"trl.trainer.callbacks.SyncRefModelCallback.sync_target_model"}
    in_vllm = {  # tests/serving/test_gate.py
        "vllm.platforms.current_platform.get_punica_wrapper",
        "vllm.lora.layers.BaseLayerWithLoRA.set_mapping",
        "vllm.lora.lora_model.LoRAModel.from_local_checkpoint",
        "vllm.lora.worker_manager.WorkerLoRAManager._load_adapter",
        "vllm.lora.model_manager.LoRAModelManager.activate_adapter",
    }
    assert listed == ours | added | once_imported | in_vllm


def place(owner):
    """Where users find a class or a module."""
    if inspect.ismodule(owner):
        return owner.__name__
    return f"peft.{owner.__name__}" if hasattr(peft, owner.__name__) else f"{owner.__module__}.{owner.__name__}"
