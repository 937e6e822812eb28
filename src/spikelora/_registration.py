"""Makes SpikeLoRA a method of PEFT: the only place that touches PEFT's enum, mappings and namespace."""

import functools
from collections import defaultdict

import peft
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import hotswap, register_peft_method

from spikelora.config import SpikeLoraConfig
from spikelora.layers import SpikingLayer
from spikelora.tuner import SpikeLoraModel

_NAME = "SPIKELORA"


def register() -> None:
    """Register the method with PEFT; doing so again, or beside a PEFT with a method of this name, does no harm."""
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
    current = PeftModel.print_trainable_parameters
    PeftModel.print_trainable_parameters = _with_neurons(getattr(current, "__wrapped__", current))


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


def _from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
    """PEFT's own, which transformers calls on `PeftConfig`; a spiking adapter's folder is checked there as well."""
    config = super(PeftConfig, cls).from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
    if cls is PeftConfig and isinstance(config, SpikeLoraConfig):
        config.check_folder(pretrained_model_name_or_path, subfolder)
    return config


def _with_neurons(print_trainable_parameters):
    """PEFT's line and, for each spiking adapter, one with the ranks, thresholds and time constants of its modules."""

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
