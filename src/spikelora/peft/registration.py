"""Makes SpikeLoRA a method of PEFT: the only place that touches PEFT's enum, mappings and namespace."""

import functools
import os
from collections import defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap, register_peft_method
from transformers.integrations.peft import PeftAdapterMixin

from spikelora.errors import SpikeLoraError
from spikelora.method.layers import SpikingLayer
from spikelora.peft import loading
from spikelora.peft.adapter_files import say_how_to_load
from spikelora.peft.config import SpikeLoraConfig
from spikelora.peft.config_file import check_config_file, with_known_surrogate
from spikelora.peft.tuner import SpikeLoraModel

_NAME = "SPIKELORA"
# Whether the file that is read makes a configuration of the method that it names.
_by_method: ContextVar[bool] = ContextVar("by_method", default=False)


def register() -> None:
    """Register the method with PEFT; it may be called again, and PEFT may already have a method of this name."""
    if _NAME not in PeftType.__members__:
        _add_member()
    peft_type = PeftType[_NAME]
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered is not None:
        if registered.__module__ != SpikeLoraConfig.__module__:
            return
        # The package was imported anew, with new classes.
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            del mapping[peft_type]
    register_peft_method(
        name=_NAME.lower(), config_cls=SpikeLoraConfig, model_cls=SpikeLoraModel, prefix=SpikeLoraModel.prefix
    )
    hotswap.CONFIG_KEYS_TO_CHECK[peft_type] = hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]
    peft.SpikeLoraConfig = SpikeLoraConfig
    peft.SpikeLoraModel = SpikeLoraModel
    PeftConfig.from_pretrained = classmethod(_from_pretrained)
    PeftConfig.from_json_file = classmethod(_from_json_file)
    PeftModel.from_pretrained = classmethod(loading.guard_peft_loading(original(PeftModel.from_pretrained.__func__)))
    remap = original(BaseTuner._remap_adapter_state_dict_for_load.__func__)
    BaseTuner._remap_adapter_state_dict_for_load = classmethod(loading.guard_remapping(remap))
    for owner, name, wrap in _WRAPPED:
        setattr(owner, name, wrap(original(getattr(owner, name))))


def _add_member() -> None:
    # PEFT's enum of methods is closed. The attribute comes first: once the name is a member, the enum refuses it.
    member = str.__new__(PeftType, _NAME)
    member._name_ = member._value_ = _NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    setattr(PeftType, _NAME, member)
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    if hasattr(PeftType, "_hashable_values_"):  # since a patch release of Python 3.12
        PeftType._hashable_values_.append(_NAME)


def original(function: Any) -> Any:
    """The function as it was before an earlier registration wrapped it; wrappers of others stay."""
    is_ours = function.__globals__["__name__"].partition(".")[0] == "spikelora"
    return function.__wrapped__ if is_ours else function


def _from_json_file(cls: Any, /, path_json_file: Any, **kwargs: Any) -> Any:
    """PEFT's own; all its loaders read an adapter_config.json through it, before they do anything else."""
    file = Path(path_json_file)
    try:
        attributes = super(PeftConfig, cls).from_json_file(path_json_file, **kwargs)
    except (JSONDecodeError, UnicodeDecodeError, TypeError, RecursionError) as error:
        # It no longer says which method it is of.
        raise SpikeLoraError(
            f"{file} is damaged ({type(error).__name__}: {error}). Copy or save the adapter again."
        ) from error
    check_config_file(file, attributes, _NAME if issubclass(cls, SpikeLoraConfig) else None)
    # PEFT's `from_pretrained` makes a configuration of the method in the file, whatever `cls` is. Those who ask LoRA's
    # class for a file's fields read A and B by themselves, as axolotl's merging does.
    is_of_lora = issubclass(cls, LoraConfig) and not issubclass(cls, SpikeLoraConfig)
    if is_of_lora and attributes.get("peft_type") == _NAME and not _by_method.get():
        raise SpikeLoraError(
            f"{file} is of a SPIKELORA adapter, and `{cls.__name__}` reads it as LoRA, without its gate. Load the "
            "adapter with `PeftModel.from_pretrained`, or make a LoRA of it with `to_lora`."
        )
    return with_known_surrogate(file, attributes)


def _from_pretrained(
    cls: Any, /, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
) -> Any:
    """PEFT's own, which transformers calls on `PeftConfig`; here it also checks a spiking adapter's folder."""
    token = _by_method.set(True)
    try:
        config = super(PeftConfig, cls).from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
    finally:
        _by_method.reset(token)
    if cls is PeftConfig and isinstance(config, SpikeLoraConfig):
        config.check_folder(pretrained_model_name_or_path, subfolder, **kwargs)
    return config


def _with_neurons(print_trainable_parameters: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's line, and for each spiking adapter a line with its modules' ranks, thresholds and time constants."""

    @functools.wraps(print_trainable_parameters)
    def with_neurons(self: PeftModel) -> None:
        print_trainable_parameters(self)
        adapters: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for layer in self.modules():
            if isinstance(layer, SpikingLayer):
                for name in layer.lora_gate:
                    for symbol, value in layer.neuron(name).items():
                        adapters[name][symbol].append(value)
        for name, symbols in adapters.items():
            spans = (
                f"{symbol}: {min(values):g}" + (f" to {max(values):g}" if min(values) < max(values) else "")
                for symbol, values in symbols.items()
            )
            print(f"spiking adapter {name!r} on {len(symbols['r']):,d} modules || {' || '.join(spans)}")

    return with_neurons


def _with_instructions(create_or_update_model_card: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's card and, for a spiking adapter, what to install and import before it is loaded."""

    @functools.wraps(create_or_update_model_card)
    def with_instructions(self: PeftModel, output_dir: str | os.PathLike[str]) -> None:
        create_or_update_model_card(self, output_dir)
        _say_how_to_load(self, output_dir)

    return with_instructions


def _with_instructed_card(upload_modified_files: Callable[..., Any]) -> Callable[..., Any]:
    """The upload of `push_to_hub`, which has overwritten PEFT's card with its own."""

    @functools.wraps(upload_modified_files)
    def with_instructed_card(self: PeftModel, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        _say_how_to_load(self, working_dir)
        return upload_modified_files(self, working_dir, *args, **kwargs)

    return with_instructed_card


def _say_how_to_load(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    if any(isinstance(config, SpikeLoraConfig) for config in model.peft_config.values()):
        say_how_to_load(Path(folder))


_WRAPPED = (
    (PeftModel, "load_adapter", loading.guard_load_adapter),
    (PeftAdapterMixin, "load_adapter", loading.guard_transformers_loading),
    (hotswap, "hotswap_adapter_from_state_dict", loading.guard_hotswap),
    (PeftModel, "print_trainable_parameters", _with_neurons),
    (PeftModel, "create_or_update_model_card", _with_instructions),
    (PeftModel, "_upload_modified_files", _with_instructed_card),
)
