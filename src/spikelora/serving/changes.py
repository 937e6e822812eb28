"""The only place that changes classes of vLLM; CONTRIBUTING.md lists what and why."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.lora.layers import BaseLayerWithLoRA, ClassificationHeadWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.worker_manager import WorkerLoRAManager

from spikelora.serving import adapters
from spikelora.serving.gate import GatedWrapper


def change_vllm() -> None:
    """Put the gate into vLLM's LoRA; a second call changes nothing."""
    if hasattr(BaseLayerWithLoRA.set_mapping, "__wrapped__"):
        return
    BaseLayerWithLoRA.set_mapping = _with_gate(BaseLayerWithLoRA.set_mapping)
    LoRAModel.from_local_checkpoint = classmethod(_reading_gates(LoRAModel.from_local_checkpoint.__func__))
    WorkerLoRAManager._load_adapter = _fitting(WorkerLoRAManager._load_adapter)
    LoRAModelManager.activate_adapter = _with_numbers(LoRAModelManager.activate_adapter)


def _with_gate(set_mapping: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a linear layer its kernels, which it then calls through its own gate."""

    @functools.wraps(set_mapping)
    def with_gate(self: Any, punica_wrapper: Any) -> None:
        if isinstance(self, BaseLinearLayerWithLoRA) and not isinstance(self, ClassificationHeadWithLoRA):
            punica_wrapper = GatedWrapper(punica_wrapper, self)
        set_mapping(self, punica_wrapper)

    return with_gate


def _reading_gates(from_local_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Reads an adapter's folder; for a spiking adapter also the gates' tensors, which vLLM does not know."""

    @functools.wraps(from_local_checkpoint)
    def reading_gates(cls: Any, lora_dir: str, expected_lora_modules: set[str], peft_helper: Any, **kwargs: Any) -> Any:
        folder = Path(lora_dir)
        if not adapters.is_spiking(folder):
            return from_local_checkpoint(cls, lora_dir, expected_lora_modules, peft_helper, **kwargs)
        kwargs.pop("moe_ep_spec", None)  # of experts, which `adapters.fit` refuses
        tensors, silent = adapters.read(folder, kwargs.get("weights_mapper"))
        lora = cls.from_lora_tensors(tensors=tensors, peft_helper=peft_helper, **kwargs)
        lora.silent_of_modules = silent
        return lora

    return reading_gates


def _fitting(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """Loads an adapter before any of it is used; a spiking one that does not fit the model is refused here."""

    @functools.wraps(load_adapter)
    def fitting(self: Any, lora_request: Any) -> Any:
        lora = load_adapter(self, lora_request)
        if hasattr(lora, "silent_of_modules"):
            lora.silent_of_slices = adapters.fit(self._adapter_manager, lora, lora.silent_of_modules)
        return lora

    return fitting


def _with_numbers(activate_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """Fills a slot with an adapter, and says whether it did; the slot gets the numbers of the adapter's gates, if
    any."""

    @functools.wraps(activate_adapter)
    def with_numbers(self: Any, lora_id: int) -> bool:
        if not activate_adapter(self, lora_id):
            return False
        slot = self.lora_index_to_id.index(lora_id)
        silent = getattr(self._registered_adapters[lora_id], "silent_of_slices", {})
        for name, layer in self.modules.items():
            if isinstance(layer.punica_wrapper, GatedWrapper):
                layer.punica_wrapper.set_slot(slot, silent.get(name))
        return True

    return with_numbers
