"""What trainers do, when they are made, that a gate does not tolerate: corrected, or refused with a remedy."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import fsdp_utils
from torch import nn
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from spikelora.errors import SpikeLoraError
from spikelora.method.gate import SpikeGate
from spikelora.method.layers import SpikingLayer
from spikelora.method.sharding import unwrapped
from spikelora.peft.config import SpikeLoraConfig
from spikelora.peft.registration import original


def guard_trainers() -> None:
    """Wrap what every trainer calls when it is made; a second call changes nothing."""
    # It runs at the end of `Trainer.__init__`, before TRL's trainers start vLLM.
    CallbackHandler.on_init_end = _fit_for_gates(original(CallbackHandler.on_init_end))
    fsdp_utils.fsdp2_load_full_state_dict = _with_fixed_numbers(original(fsdp_utils.fsdp2_load_full_state_dict))


def _fit_for_gates(on_init_end: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(on_init_end)
    def fit_for_gates(
        self: CallbackHandler, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # The asynchronous trainers know of no other engine and have no switch.
        uses_vllm = getattr(args, "use_vllm", hasattr(args, "vllm_server_base_url"))
        if uses_vllm and _is_spiking(self.model):
            raise SpikeLoraError(
                "TRL hands vLLM the weights of the model with its adapter merged, and a spiking adapter cannot be "
                "merged. Generate with the model itself, by `use_vllm=False` and a trainer that has the option."
            )
        for module in self.model.modules() if isinstance(self.model, nn.Module) else ():
            # On quantised bases TRL casts what is trained to bfloat16. The dtype is restored here; the lost digits are
            # not.
            if _is_gate(module):
                for tensor in module.parameters():
                    tensor.data = tensor.data.float()
            elif isinstance(module, SpikingLayer):
                for name, gate in module.lora_gate.items():
                    module.complete_copy(name)
                    gate.made_like = None  # from now on the training decides what is equal
        _guard_synchronising()
        return on_init_end(self, args, state, control, **kwargs)

    return fit_for_gates


def _with_fixed_numbers(load_full_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """accelerate's function that sends what the first process has loaded to the others.

    It assumes that every entry of a state dict is sharded. Fixed numbers are not, and are sent here.
    """

    @functools.wraps(load_full_state_dict)
    def with_fixed_numbers(
        accelerator: Any, model: nn.Module, full_sd: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        fixed = [(name, gate, dict(gate.named_buffers())) for name, gate in model.named_modules() if _is_gate(gate)]
        for _, gate, numbers in fixed:
            gate._non_persistent_buffers_set.update(numbers)
        try:
            result = load_full_state_dict(accelerator, model, full_sd, *args, **kwargs)
        finally:
            for _, gate, numbers in fixed:
                gate._non_persistent_buffers_set.difference_update(numbers)
        for name, gate, numbers in fixed:
            for symbol in numbers:
                number = full_sd[f"{unwrapped(name)}.{symbol}"].to(accelerator.device)
                torch.distributed.broadcast(number, src=0)
                gate.register_buffer(symbol, number)
        return result

    return with_fixed_numbers


def _guard_synchronising() -> None:
    """Wrap TRL's update of a reference model, once imported: it mixes parameters alone, and fixed numbers are
    buffers."""
    callbacks: Any = sys.modules.get("trl.trainer.callbacks")
    if callbacks is not None:
        callback = callbacks.SyncRefModelCallback
        callback.sync_target_model = staticmethod(_with_numbers(original(callback.sync_target_model)))


def _with_numbers(sync: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(sync)  # in every process, where under ZeRO-3 TRL mixes gathered parameters in the first alone
    def with_numbers(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        sync(model, target_model, alpha)
        both = ([gate for gate in each.modules() if _is_gate(gate)] for each in (target_model, model))
        for target, gate in zip(*both, strict=True):
            for number, new in zip(target.buffers(), gate.buffers(), strict=True):
                number.lerp_(new, alpha)

    return with_numbers


def _is_gate(module: nn.Module) -> bool:
    return isinstance(module, SpikeGate)


def _is_spiking(model: nn.Module) -> bool:
    configs: Any = getattr(model, "peft_config", {})
    return any(isinstance(config, SpikeLoraConfig) for config in configs.values())
