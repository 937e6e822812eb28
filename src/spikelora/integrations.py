"""What trainers do when they are made that a gate does not bear: put right, or refused with what to do instead."""

import functools
from typing import Any

from torch import nn
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from spikelora._registration import original
from spikelora.config import SpikeLoraConfig
from spikelora.errors import SpikeLoraError
from spikelora.gate import SpikeGate


def guard_trainers() -> None:
    """Wrap what every trainer calls when it is made; doing so again changes nothing."""
    # At the end of `Trainer.__init__`, before TRL's trainers start their engine of vLLM.
    CallbackHandler.on_init_end = _fit_for_gates(original(CallbackHandler.on_init_end))


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
            # On quantised bases TRL casts what is trained to bfloat16. The dtype comes back, the digits do not.
            if isinstance(gate, SpikeGate):
                for tensor in (gate.v_threshold, gate.tau):
                    tensor.data = tensor.data.float()
        return on_init_end(self, args, state, control, **kwargs)

    return fit_for_gates


def _is_spiking(model: nn.Module) -> bool:
    configs: Any = getattr(model, "peft_config", {})
    return any(isinstance(config, SpikeLoraConfig) for config in configs.values())
