"""The gate of one adapter in one layer, its threshold and time constant as tensors."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spikelora.errors import SpikeLoraError
from spikelora.neuron import charge, spike_gate

# The smallest float32 above 1: the floor of a learned tau alters no tau that a configuration accepts.
MIN_TAU = 1 + torch.finfo(torch.float32).eps


class SpikeGate(nn.Module):
    """The neuron of one adapter in one layer, `gated = a * (a / tau >= v_threshold)`; see `neuron.spike_gate`.

    `v_threshold` and `tau` are parameters of shape `(1,)`, saved with the adapter. They stay float32 whatever the model
    is cast to, as bfloat16 has no 0.1, and have a gradient only where they are learned. A learned `tau` stays above 1.
    After `to_empty` from the meta device they are as they were configured, until a state dict is loaded.
    """

    def __init__(
        self, v_threshold: float, tau: float, surrogate_alpha: float, learn_threshold: bool, learn_tau: bool
    ) -> None:
        super().__init__()
        self.v_threshold = nn.Parameter(torch.full((1,), v_threshold, dtype=torch.float32), learn_threshold)
        self.tau = nn.Parameter(torch.full((1,), tau, dtype=torch.float32), learn_tau)
        self.surrogate_alpha = surrogate_alpha
        self.learn_threshold = learn_threshold
        self.learn_tau = learn_tau
        self.configured = {"v_threshold": v_threshold, "tau": tau}
        self.observers: tuple[Callable[[Tensor], None], ...] = ()  # called with `a` in every forward, see `observe`

    def forward(self, a: Tensor) -> Tensor:
        for observe in self.observers:
            observe(a)
        return spike_gate(a, *self.neuron(), self.surrogate_alpha)

    def spikes(self, a: Tensor) -> Tensor:
        """Where the neuron spikes, boolean and shaped like `a (..., r)`."""
        v_threshold, tau = self.neuron()
        return charge(a, tau) >= v_threshold

    def freeze_fixed(self) -> None:
        """Take the gradient from what is not learned; PEFT makes every tensor of an active adapter trainable."""
        for tensor, learned in ((self.v_threshold, self.learn_threshold), (self.tau, self.learn_tau)):
            tensor.requires_grad_(tensor.requires_grad and learned)

    def neuron(self) -> tuple[Tensor, Tensor]:
        """`v_threshold` and `tau` as the forward takes them, in float32."""
        v_threshold, tau = self.v_threshold, self.tau
        if not v_threshold.dtype == tau.dtype == torch.float32:
            raise SpikeLoraError(
                "`v_threshold` and `tau` were cast, but have to stay float32: leave SpikeGate out. Where FSDP2's mixed "
                "precision has cast them: load the base in bfloat16 and set `mixed_precision: no`, or leave thresholds "
                "that are not learned out by `fsdp_ignored_modules: .*lora_gate.*`, see docs/distributed.md."
            )
        return v_threshold, _AboveOne.apply(tau) if self.learn_tau else tau

    def __getstate__(self):
        return super().__getstate__() | {"observers": ()}  # who watches this gate does not watch its copies

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            return moved if (moved := fn(tensor)).dtype == tensor.dtype else tensor.to(moved.device)

        was_meta = self.tau.is_meta
        super()._apply(keep_dtype, recurse)
        if was_meta and not self.tau.is_meta:  # by `to_empty`, which leaves in a tensor what the memory held
            with torch.no_grad():
                for name, value in self.configured.items():
                    getattr(self, name).fill_(value)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.learn_tau and not keep_vars:  # an optimiser may have stepped below the floor
            destination[prefix + "tau"] = destination[prefix + "tau"].clamp(min=MIN_TAU)


class _AboveOne(torch.autograd.Function):
    """`max(tau, MIN_TAU)`; at the floor a gradient passes where its step would raise tau, so that tau can leave it."""

    @staticmethod
    def forward(ctx, tau):
        ctx.save_for_backward(tau)
        return tau.clamp(min=MIN_TAU)

    @staticmethod
    def backward(ctx, grad):
        (tau,) = ctx.saved_tensors
        return grad * ((tau > MIN_TAU) | (grad < 0))
