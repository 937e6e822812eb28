"""What transformers and TRL do when they start that a gate does not bear: undone, or refused with what to do instead.

Neither asks the method of PEFT beforehand, so that two methods of transformers are wrapped.
"""

import functools
from typing import Any

from torch import nn
from transformers.integrations.peft import PeftAdapterMixin
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from spikelora.config import SpikeLoraConfig
from spikelora.errors import SpikeLoraError
from spikelora.gate import SpikeGate


def refuse_early() -> None:
    """Wrap the two methods; doing so again changes nothing."""
    # Every trainer calls it at the end of `Trainer.__init__`, before TRL's start their engine of vLLM.
    current = CallbackHandler.on_init_end
    CallbackHandler.on_init_end = _fit_for_gates(getattr(current, "__wrapped__", current))
    current = PeftAdapterMixin.load_adapter
    PeftAdapterMixin.load_adapter = _with_the_ways_to_swap(getattr(current, "__wrapped__", current))


def _fit_for_gates(on_init_end):
    @functools.wraps(on_init_end)
    def fit_for_gates(
        self: CallbackHandler, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # The asynchronous trainers know of no other engine and have no switch.
        uses_vllm = getattr(args, "use_vllm", hasattr(args, "vllm_server_base_url"))
        if uses_vllm and _is_spiking(self.model):
            raise SpikeLoraError(
                "TRL hands vLLM the weights of the model with its adapter merged, and a spiking adapter cannot be "
                "merged: generate with the model itself, by `use_vllm=False` and a trainer that has the option."
            )
        for gate in self.model.modules() if isinstance(self.model, nn.Module) else ():
            if isinstance(gate, SpikeGate):  # on quantised bases TRL has cast what is trained to bfloat16
                for tensor in (gate.v_threshold, gate.tau):
                    tensor.data = tensor.data.float()
        return on_init_end(self, args, state, control, **kwargs)

    return fit_for_gates


def _with_the_ways_to_swap(load_adapter):
    @functools.wraps(load_adapter)
    def with_the_ways_to_swap(self: PeftAdapterMixin, *args: Any, **kwargs: Any) -> Any:
        try:
            return load_adapter(self, *args, **kwargs)
        except ValueError as error:
            if "Hotswapping is currently only supported" not in str(error) or not _is_spiking(self):
                raise
            raise SpikeLoraError(
                "transformers swaps adapters of LoRA only: call `delete_adapter` and then `load_adapter`, or hold the "
                "model in a `PeftModel` and swap with `peft.utils.hotswap.hotswap_adapter`."
            ) from error

    return with_the_ways_to_swap


def _is_spiking(model: nn.Module) -> bool:
    configs: Any = getattr(model, "peft_config", {})
    return any(isinstance(config, SpikeLoraConfig) for config in configs.values())
