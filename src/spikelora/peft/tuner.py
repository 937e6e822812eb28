"""SpikeLoRA as a tuner of PEFT: LoRA's model with the layers of `layers`, and its refusals."""

import warnings
from contextlib import suppress
from copy import deepcopy
from typing import Any

from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from spikelora.errors import SpikeLoraError
from spikelora.method.layers import Embedding, SpikingLayer, has_spiking_type, make_spiking
from spikelora.method.variants import refuse_merging
from spikelora.peft.adapter_files import check_tensors
from spikelora.peft.config import SpikeLoraConfig
from spikelora.peft.loading import as_it_was, check_fit
from spikelora.peft.read_not_called import check_called


class NoMatchingModuleError(SpikeLoraError, NoMatchingPeftModuleError):
    """Raised if an adapter would adapt no module at all."""


class SpikeLoraModel(LoraModel):
    """Puts SpikeLoRA adapters into a model; `get_peft_model` and PEFT's loaders make it for a `SpikeLoraConfig`.

    Takes what `LoraModel` takes.

    Raises:
        SpikeLoraError: for a target whose layer cannot have a gate, for damaged adapter tensors, and for every attempt
            to merge, weight or convert.
    """

    @staticmethod
    def _create_new_module(
        lora_config: SpikeLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        _check_whole(kwargs["target_name"], target)
        plain_config = lora_config.without_neuron()
        try:
            layer = LoraModel._create_new_module(plain_config, adapter_name, target, **kwargs)
        except ValueError as error:
            if "is not supported" not in str(error):
                raise
            raise _unsupported(kwargs["target_name"], target) from error
        check_supported(layer, kwargs["target_name"], target)
        lora_config.fan_in_fan_out = plain_config.fan_in_fan_out  # PEFT corrects it for each layer
        make_spiking(layer, adapter_name, lora_config, kwargs["target_name"])
        if isinstance(layer, Embedding):
            layer.reset_lora_parameters(adapter_name, lora_config.init_lora_weights)
        return layer

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if not isinstance(config, SpikeLoraConfig):
            raise SpikeLoraError(
                f"SpikeLoraModel takes a SpikeLoraConfig, got a {type(config).__name__}. Put adapters of other "
                "methods on a model of their own."
            )
        config.check()  # it may have been changed since it was made

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        experts = _stacked_targets(config, model) if isinstance(config, SpikeLoraConfig) else set()
        try:
            with as_it_was(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingModuleError(f'{error} Use `target_modules="all-linear"` for every linear layer.') from error
        alike = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        for layer in model.modules() if alike else ():
            if isinstance(layer, SpikingLayer) and adapter_name in layer.lora_gate:
                layer.lora_gate[adapter_name].made_like = alike[0]
        if experts:
            warnings.warn(
                f"The target_modules also stand for {', '.join(f'`{name}`' for name in sorted(experts))}. No gate can "
                "be put on these stacked parameters: they are not adapted, though PEFT's LoRA would adapt them.",
                RuntimeWarning,
                stacklevel=2,
            )
        patterns = self.peft_config[adapter_name].threshold_pattern
        matched = {get_pattern_key([key], name) for key in patterns for name in self.targeted_module_names}
        unmatched = sorted(patterns.keys() - matched)
        if unmatched:
            warnings.warn(
                f"The following threshold_pattern keys did not match any targeted module: {unmatched}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _create_and_replace(
        self,
        lora_config: SpikeLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        check_called(parent, current_key)
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT would move what has no parameters on the meta device, and a gate may have none; it goes where its A is.
        if not isinstance(new_module, SpikingLayer):  # when adapters are taken off
            super()._replace_module(parent, child_name, new_module, child)
            return
        gates = new_module._modules.pop("lora_gate")
        super()._replace_module(parent, child_name, new_module, child)
        new_module._modules["lora_gate"] = gates
        for adapter_name in new_module.lora_gate:
            new_module.move_gate(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SpikeLoraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        for layer in model.modules():
            if isinstance(layer, SpikingLayer) and adapter_name in layer.lora_gate:
                layer.complete_copy(adapter_name)  # in place, and `state_dict` sees it
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT goes by the names of modules, and finds nothing, because FSDP's activation checkpointing adds a part to
        # them. It has already left out the tensors of other adapters.
        keys = (key.partition("lora_gate.") for key in state_dict)
        layers = tuple(f"{layer}lora_" for layer, part, _ in keys if part)
        selected |= {key: tensor for key, tensor in state_dict.items() if key.startswith(layers)}
        # PEFT checks for shards that were not gathered only if the method is called LORA.
        _validate_lora_adapter_state_dict(selected, adapter_name)
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SpikeLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_tensors(state_dict)
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_fit(model, adapter_name, state_dict)
        # With low_cpu_mem_usage the file's tensors take the place of the gate's, dtype and all.
        return {key: value.float() if ".lora_gate." in key else value for key, value in state_dict.items()}

    def _check_merge_allowed(self) -> None:
        refuse_merging()

    add_weighted_adapter = subtract_mutated_init = refuse_merging
    _convert_state_dict_for_initial_model = classmethod(refuse_merging)


def check_supported(layer: nn.Module, name: str, target: nn.Module) -> None:
    """Raise a `SpikeLoraError` if the layer that PEFT made for a target has no spiking counterpart."""
    # `nn.MultiheadAttention` reads the weight of its `out_proj` and never calls it.
    if not has_spiking_type(layer) or isinstance(target, NonDynamicallyQuantizableLinear):
        raise _unsupported(name, target)


def _stacked_targets(config: SpikeLoraConfig, model: nn.Module) -> set[str]:
    """The parameters of experts and routers that PEFT would adapt for some of the targets, if this were LoRA."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers  # as late as PEFT

    plain = deepcopy(config.without_neuron())
    with suppress(ValueError):  # LoRA refuses a part of a stacked parameter, whose name may also be a layer's
        convert_peft_config_for_transformers(plain, model, conversions=None)
    return set(plain.target_parameters or ())


def _check_whole(name: str, target: nn.Module) -> None:
    """Raise a `SpikeLoraError` if a target's weight is split over processes."""
    plan = getattr(target, "_hf_tp_plan", None)  # of tensor parallelism, put there by newer versions of PEFT
    placements = getattr(getattr(target, "weight", None), "placements", ())
    if plan is not None or any(placement.is_shard() for placement in placements):
        raise SpikeLoraError(
            f"Target module `{name}` is split over processes ({plan or 'its weight is a sharded DTensor'}): a gate "
            "needs the whole of `a`, and a part of the layer gives only a part of it. Load the model without "
            "`tp_plan`, put the adapter on it, and shard it with FSDP2 afterwards."
        )


def _unsupported(name: str, target: nn.Module) -> SpikeLoraError:
    return SpikeLoraError(
        f"Target module `{name}` is a {type(target).__name__}, on which SpikeLoRA is not supported: it could run "
        "without its gate. Leave it out through `target_modules` or `exclude_modules`: supported are `nn.Linear`, "
        "`nn.Embedding`, `nn.Conv1d` to `nn.Conv3d`, transformers' `Conv1D`, and linear layers quantised by "
        "bitsandbytes, GPTQ, HQQ, torchao or INC."
    )
