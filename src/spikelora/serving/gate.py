"""The gate of served adapters: between the two products of vLLM's LoRA, by token and by slice of a layer."""

import math
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers import BaseLayerWithLoRA, RowParallelLinearWithLoRA

from spikelora.errors import SpikeLoraError


class GatedWrapper:
    """vLLM's wrapper of its LoRA kernels as one linear layer sees it: what the shrink computes passes the gate.

    vLLM adds `scaling * lora_B(lora_A(x))` as a shrink into a buffer, which holds `a (tokens, r)` for each of the
    layer's slices, and an expand of it with a B that has the scaling in it. In between, with the slot that a token's
    adapter lies in:

        gated = 0 where a <= silent[slot, slice], else a

    `silent (slots + 1, slices)`, in float32, is the greatest activation that does not fire; NaN, which nothing is as
    small as, lets all of a slot pass, as of a plain LoRA. Its last row is for tokens without an adapter, whose slot is
    -1: the kernels for CPUs take the last slot's adapter for them, of which nothing is to pass.
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
        # Each process has a part of the input, and of the sum that `a` is.
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
        """vLLM's own, whose shrink and expand are the methods of this object."""
        return type(self.wrapper).add_lora_linear(self, *args, **kwargs)

    def add_shrink(self, y: Any, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any) -> Any:
        """vLLM's own, then the gate, in place."""
        # Elsewhere than on a CPU a captured graph would keep the choice of the moment at which it was captured.
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
            # The products with B are summed over the processes: one of them adds what passes the gate, or for a linear
            # adapter each its part.
            whole = tensor_model_parallel_all_reduce(part.clone())
            gated = whole.masked_fill(whole <= silent, 0) if self.tp_rank == 0 else torch.zeros_like(whole)
            part.copy_(torch.where(silent.isnan(), part, gated))
