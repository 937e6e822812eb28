"""The gate of served adapters: between the two products of vLLM's LoRA, by token and by slice of a layer."""

import math
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers import BaseLayerWithLoRA, RowParallelLinearWithLoRA

from spikelora.errors import SpikeLoraError


class GatedWrapper:
    """vLLM's wrapper of its LoRA kernels, as one linear layer sees it: the result of the shrink passes the gate.

    vLLM adds `scaling * lora_B(lora_A(x))` in two steps. A shrink writes `a (tokens, r)` into a buffer, for each of the
    layer's slices. An expand multiplies it with a B that includes the scaling. In between, with the slot of the token's
    adapter:

        gated = 0 where a <= silent[slot, slice], else a

    `silent (slots + 1, slices)`, in float32, is the greatest activation that does not fire. NaN lets all of a slot
    pass, as for a plain LoRA: no `a <= NaN` is true. The last row is infinite and lets nothing pass. It is for tokens
    without an adapter, whose slot is -1: the kernels for CPUs use the last slot's adapter for them.
    """

    def __init__(self, wrapper: Any, layer: BaseLayerWithLoRA) -> None:
        self.wrapper = wrapper
        a_stacked = layer.lora_a_stacked
        self.silent = torch.full(
            (len(a_stacked[0]) + 1, len(a_stacked)), math.nan, dtype=torch.float32, device=a_stacked[0].device
        )
        self.silent[-1] = math.inf
        self.spiking_slots: set[int] = set()
        self.tp_rank = layer.tp_rank
        # Each process has a part of the input, and so only a part of the sum `a`.
        self.is_partial = isinstance(layer, RowParallelLinearWithLoRA) and layer.tp_size > 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapper, name)

    def set_slot(self, slot: int, silent: list[float] | None) -> None:
        """Fill a slot: one number for each slice of a spiking adapter, None for anything else."""
        self.silent[slot] = math.nan if silent is None else torch.tensor(silent, dtype=torch.float32)
        if silent is None:
            self.spiking_slots.discard(slot)
        else:
            self.spiking_slots.add(slot)

    def add_lora_linear(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own, but with this object's shrink and expand."""
        return type(self.wrapper).add_lora_linear(self, *args, **kwargs)

    def add_shrink(self, y: Any, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any) -> Any:
        """vLLM's own, then the gate, in place."""
        # Only on a CPU is there a choice: a captured graph would keep the choice of the moment of its capture.
        is_gated = bool(self.spiking_slots) or not x.is_cpu
        if is_gated and scale != 1:
            raise SpikeLoraError(f"vLLM scales the activations by {scale} before the gate. Upgrade `spikelora`.")
        result = self.wrapper.add_shrink(y, x, lora_a_stacked, scale, **kwargs)
        if is_gated:
            self._gate(y if result is None else result)
        return result

    def _gate(self, a: Any) -> None:
        slots = self.wrapper._token_lora_indices[: a[0].shape[0]]
        for part, silent in zip(a, self.silent[slots].unbind(1), strict=True):
            silent = silent[:, None]
            if not self.is_partial:
                part.masked_fill_(part <= silent, 0)
                continue
            # The products with B are summed over the processes. So one process adds what passes the gate; for a plain
            # LoRA each process adds its part.
            whole = tensor_model_parallel_all_reduce(part.clone())
            gated = whole.masked_fill(whole <= silent, 0) if self.tp_rank == 0 else torch.zeros_like(whole)
            part.copy_(torch.where(silent.isnan(), part, gated))
