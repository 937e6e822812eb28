"""What an adapter's `adapter_config.json` must contain, so that the adapter runs as it was trained."""

import warnings
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftType

from spikelora.errors import SpikeLoraError
from spikelora.peft.adapter_files import holds_gates
from spikelora.peft.config import SURROGATES, SpikeLoraConfig

# If one of them were missing, a default would scale a saved adapter's weights differently than in its training.
_SCALING = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_FIRST_ADAPTERS = """{file} has `use_spikelora`, and not SPIKELORA for its `peft_type`: it is an adapter of the first \
SpikeLoRA code, which PEFT would load without its gate. Give its tensors a gate, with the values of its configuration:
    config = SpikeLoraConfig(r=..., lora_alpha=..., use_rslora=..., target_modules=..., v_threshold=..., tau=...)
    model = get_peft_model(base_model, config)
    tensors = safetensors.torch.load_file("adapter_model.safetensors")
    set_peft_model_state_dict(model, get_peft_model_state_dict(model) | tensors)
    model.save_pretrained(folder)"""


def check_config_file(file: Path, attributes: Any, method: str | None) -> None:
    """Raise a `SpikeLoraError` if an adapter's `adapter_config.json` is damaged, or would run it without its gate.

    Args:
        file: the file; the adapter's weights may lie next to it.
        attributes: its content.
        method: the adapter's method, if the configuration does not say it and the caller knows it.
    """
    remedy = "Copy or save the adapter again."
    if not isinstance(attributes, dict):
        raise SpikeLoraError(f"{file} is damaged: it holds a {type(attributes).__name__}, not fields. {remedy}")
    method = attributes.get("peft_type", method)
    if "peft_type" in attributes and method not in list(PeftType):
        raise SpikeLoraError(
            f"{file} cannot be read: its `peft_type` {method!r} is none that PEFT knows here. Upgrade `peft` or "
            "import the package that brings the method; if it should be SPIKELORA, copy or save the adapter again."
        )
    if method != PeftType.SPIKELORA:
        if attributes.get("use_spikelora"):
            raise SpikeLoraError(_FIRST_ADAPTERS.format(file=file))
        if holds_gates(file.parent) or (method is None and {"v_threshold", "tau"} & attributes.keys()):
            raise SpikeLoraError(
                f"{file} has {method and str(PeftType(method).value)!r} for its `peft_type`, but the adapter is a "
                f"SPIKELORA one, which would run without its gate. {remedy}"
            )
        return
    hints = get_type_hints(SpikeLoraConfig)
    unknown = sorted(attributes.keys() - hints.keys())
    if unknown:
        raise SpikeLoraError(
            f"{file} has fields that SpikeLoraConfig does not know: {', '.join(unknown)}. Upgrade `spikelora` and "
            "`peft` if a newer release has saved it, or copy the adapter again."
        )
    for name, value in attributes.items():
        if not _is_a(value, hints[name]):
            raise SpikeLoraError(f"`{name}` in {file} is {value!r}, which is not of its type. {remedy}")
    missing = sorted(_SCALING - attributes.keys())
    if missing and holds_gates(file.parent):
        raise SpikeLoraError(f"{file} has no {', '.join(missing)}, which the scaling of its weights needs. {remedy}")


def with_known_surrogate(file: Path, attributes: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration; an unknown surrogate becomes the default, with a warning."""
    default, surrogate = SURROGATES[0], attributes.get("surrogate", SURROGATES[0])
    if attributes.get("peft_type") != PeftType.SPIKELORA or surrogate in SURROGATES:
        return attributes
    warnings.warn(
        f"{file} was trained with the surrogate gradient {surrogate!r}, which this version does not know. Its "
        f"forward does not depend on it; training it further would take {default!r}: upgrade `spikelora` for that.",
        RuntimeWarning,
        stacklevel=2,
    )
    return attributes | {"surrogate": default}


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value from a JSON file has the type of its field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if origin in (Union, UnionType):
        return any(_is_a(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (list, tuple):
        return isinstance(value, list) and all(_is_a(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(item, arguments[1]) for item in value.values())
    if hint in (int, float):  # a whole number may be written with a point, as pruning does with `lora_alpha`
        return isinstance(value, int | float) and not isinstance(value, bool)
    if issubclass(hint, Enum):
        return value in list(hint)
    return isinstance(value, dict if is_dataclass(hint) else hint)
