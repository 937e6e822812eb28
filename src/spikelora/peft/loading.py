"""Guards of PEFT's and transformers' loaders: a spiking adapter loads as it was saved, or leaves the model as it was.

PEFT puts an adapter's layers into the model before it reads the weights. It warns of tensors that are missing and
ignores those that are extra. transformers does so too, and reads the file without PEFT's functions.
"""

import functools
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from spikelora.errors import SpikeLoraError
from spikelora.method.gate import SpikeGate
from spikelora.peft.adapter_files import check_tensors
from spikelora.peft.config import SpikeLoraConfig

_REMEDY = "Load it on the base model that it was made for, or copy the adapter again."
_OTHER_BASE = (
    "it was trained on another base model, or with other `target_modules` than its adapter_config.json has now. "
    f"{_REMEDY}"
)
_PREFIX = "base_model.model."


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """On an error, restore the modules, attributes and `requires_grad` of a model with spiking adapters."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    # Some are shared, such as `peft_config`, so their contents are restored.
    containers = {id(v): (v, copy(v)) for a in attributes for v in a.values() if type(v) in (dict, OrderedDict, list)}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException as error:
        if isinstance(error, SpikeLoraError) or _has_gates(model):
            for module, before in zip(modules, attributes, strict=True):
                vars(module).clear()
                vars(module).update(before)
            for container, contents in containers.values():
                container.clear()
                container.extend(contents) if isinstance(container, list) else container.update(contents)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
        raise


def _has_gates(model: nn.Module) -> bool:
    return any(isinstance(module, SpikeGate) for module in model.modules())


def _tensors_of(adapter_name: str) -> re.Pattern[str]:
    """A pattern for the names of an adapter's tensors in a model; modules may have the adapter's name, too."""
    return re.compile(rf"(\.lora_\w+)\.{re.escape(adapter_name)}(\.|$)")


def check_fit(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor], swapped: bool = False) -> None:
    """Raise a `SpikeLoraError` unless a file has every tensor of an adapter in this model, in its shape, and no other.

    Args:
        model: the model with the adapter's layers.
        adapter_name: the adapter.
        tensors: by their names in the model; if it is not a `PeftModel`, the names may also have a `PeftModel`'s
            prefix.
        swapped: whether it replaces another adapter, which may have another rank and more modules.
    """
    state = {key.removeprefix(_PREFIX): value for key, value in model.state_dict().items()}
    found = {key.removeprefix(_PREFIX): value for key, value in tensors.items()}
    own = _tensors_of(adapter_name)
    for key in state:
        if own.search(key) and key not in found and not swapped:
            raise SpikeLoraError(f"The adapter's file has nothing for `{key}`: {_OTHER_BASE}")
    for key, tensor in found.items():
        # With `bias="all"` PEFT saves the bias of a module that is trained whole a second time, under a name that no
        # model has.
        if key not in state and key.endswith(".modules_to_save.bias"):
            continue
        if key not in state:
            raise SpikeLoraError(f"The adapter's file has `{key}`, which the model does not have: {_OTHER_BASE}")
        if not own.search(key):  # of a module that is trained whole; PEFT checks these itself
            continue
        shape, expected_shape = tuple(tensor.shape), tuple(state[key].shape)
        if swapped and re.search(r"\.lora_(embedding_)?A\.", key):
            shape, expected_shape = shape[1:], expected_shape[1:]
        elif swapped and re.search(r"\.lora_(embedding_)?B\.", key):
            shape, expected_shape = (shape[0], *shape[2:]), (expected_shape[0], *expected_shape[2:])
        if shape != expected_shape:
            raise SpikeLoraError(
                f"`{key}` has the shape {tuple(tensor.shape)} in the adapter's file and {tuple(state[key].shape)} in "
                "the model: the adapter was trained on another base model, or `r` or `rank_pattern` in its "
                f"adapter_config.json was changed. {_REMEDY}"
            )


def _refuse_lost_gates(tensors: Iterable[str]) -> None:
    """Raise a `SpikeLoraError` if tensors for another method have gates, as in a file that says LORA."""
    if any(".lora_gate." in key for key in tensors):
        raise SpikeLoraError(
            "The adapter's weights have gates, but PEFT loads them for another method: it would run without its gates. "
            "Copy or save it again or, if a program takes only LoRA, as `load_lora_adapter` of diffusers does, use "
            "`add_adapter` with its SpikeLoraConfig, then `peft.set_peft_model_state_dict`."
        )


def guard_peft_loading(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.from_pretrained`, as a function of the class."""

    @functools.wraps(from_pretrained)
    def guarded(cls: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with as_it_was(model):
            return from_pretrained(cls, model, *args, **kwargs)

    return guarded


def guard_remapping(remap: Callable[..., Any]) -> Callable[..., Any]:
    """`BaseTuner._remap_adapter_state_dict_for_load`, as a function of the class; all of PEFT's methods load through
    it.

    PEFT reports tensors that have no place in the model, and diffusers logs them as a warning.
    """

    @functools.wraps(remap)
    def guarded(cls: type[Any], model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]) -> Any:
        if not isinstance(config, SpikeLoraConfig):
            _refuse_lost_gates(state_dict)
        return remap(cls, model, config, adapter_name, state_dict)

    return guarded


def guard_load_adapter(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.load_adapter`; for an adapter that is there already, PEFT reads only the weights."""

    @functools.wraps(load_adapter)
    def guarded(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config.get(adapter_name)
        if isinstance(config, SpikeLoraConfig):
            config.check_folder(model_id, needed=True, **self._split_kwargs(dict(kwargs))[0])
        with as_it_was(self):
            try:
                return load_adapter(self, model_id, adapter_name, *args, **kwargs)
            except KeyError as error:  # of a module that is trained whole
                config = self.peft_config.get(adapter_name)
                if not (isinstance(config, SpikeLoraConfig) and config.modules_to_save):
                    raise
                raise SpikeLoraError(f"The adapter's file has nothing for {error}: {_OTHER_BASE}") from error

    return guarded


def guard_transformers_loading(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """`load_adapter` of transformers' models, which reads the file without PEFT and only logs what is wrong."""
    signature = inspect.signature(load_adapter)

    @functools.wraps(load_adapter)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        tensors = given.get("adapter_state_dict")
        if isinstance(given.get("peft_config"), SpikeLoraConfig) and tensors is not None:
            check_tensors(tensors)
        with as_it_was(self):
            try:
                info = load_adapter(self, *args, **kwargs)
            except ValueError as error:
                if "Hotswapping is currently only supported" not in str(error) or not _has_gates(self):
                    raise
                raise SpikeLoraError(
                    "transformers swaps adapters of LoRA only. Call `delete_adapter` and then `load_adapter`, or "
                    "hold the model in a `PeftModel` and swap with `peft.utils.hotswap.hotswap_adapter`."
                ) from error
            except RuntimeError as error:
                if "ignore_mismatched_sizes" not in str(error):
                    raise
                raise SpikeLoraError(f"The adapter's file has tensors in other shapes: {_OTHER_BASE}") from error
            adapter_name = given.get("adapter_name") or "default"
            if not isinstance(self.peft_config[adapter_name], SpikeLoraConfig):
                _refuse_lost_gates(info.unexpected_keys)
            else:
                # Modules of the base may have the adapter's name, and are then reported as missing.
                parts = re.compile(rf"{_tensors_of(adapter_name).pattern}|modules_to_save|trainable_tokens")
                for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                    if keys := [key for key in getattr(info, what) if what != "missing_keys" or parts.search(str(key))]:
                        raise SpikeLoraError(
                            f"The adapter's file does not fit the model, {what.replace('_', ' ')} "
                            f"{', '.join(f'`{key}`' for key in sorted(map(str, keys)))}: {_OTHER_BASE}"
                        )
            return info

    return guarded


def guard_hotswap(swap: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's `hotswap_adapter_from_state_dict`, which sets missing tensors to 0: right for A and B, wrong for tau.

    It has three more errors. It matches the keys of `rank_pattern` and `alpha_pattern` with names that they never
    match. It looks for an embedding's layer one name too far up. It looks for missing tensors among those of all
    adapters whose names contain this one's.
    """

    @functools.wraps(swap)
    def guarded(
        model: nn.Module, state_dict: dict[str, Any], adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        kept: dict[Tensor, Tensor] = {}
        if isinstance(config, SpikeLoraConfig):
            if config.rank_pattern or config.alpha_pattern:
                raise SpikeLoraError(
                    "PEFT's hot-swapping would scale this adapter as if it had no `rank_pattern` and "
                    "`alpha_pattern`. Load it beside the other with `load_adapter`, and choose it with `set_adapter`."
                )
            if any(".lora_embedding_" in key for key in state_dict):
                raise SpikeLoraError(
                    "PEFT's hot-swapping does not find the layers of embeddings. Load this adapter beside the other "
                    "with `load_adapter`, and choose it with `set_adapter`."
                )
            own = _tensors_of(adapter_name)
            check_tensors({own.sub(r"\1\2", key): value for key, value in state_dict.items()})
            model_itself = getattr(model, "_orig_mod", model)
            check_fit(model_itself, adapter_name, state_dict, swapped=True)
            # Other adapters, and the neurons of modules that the new adapter does not have.
            kept = {
                tensor: tensor.detach().clone()
                for name, tensor in model_itself.state_dict(keep_vars=True).items()
                if ".lora_" in name and (not own.search(name) or (".lora_gate." in name and name not in state_dict))
            }
        swap(model, state_dict, adapter_name, config, *args, **kwargs)
        with torch.no_grad():
            for tensor, value in kept.items():
                tensor.copy_(value)

    return guarded
