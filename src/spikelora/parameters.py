"""The two numbers of a neuron as tensors of a model: saved with it, float32 whatever is cast, learned or fixed."""

import torch
from torch import Tensor, nn

from spikelora.errors import SpikeLoraError

# The smallest float32 above 1: the floor of a learned tau alters no tau that a configuration accepts.
MIN_TAU = 1 + torch.finfo(torch.float32).eps


class NeuronParameters(nn.Module):
    """`v_threshold` and `tau` of one neuron, each of shape `(1,)`.

    They stay float32 whatever the model is cast to, as bfloat16 has no 0.1, and have a gradient only where they are
    learned. A learned `tau` stays above 1. After `to_empty` from the meta device they are as they were configured,
    until a state dict is loaded.
    """

    def __init__(self, v_threshold: float, tau: float, learn_threshold: bool, learn_tau: bool) -> None:
        super().__init__()
        self.v_threshold = nn.Parameter(torch.full((1,), v_threshold, dtype=torch.float32), learn_threshold)
        self.tau = nn.Parameter(torch.full((1,), tau, dtype=torch.float32), learn_tau)
        self.learn_threshold = learn_threshold
        self.learn_tau = learn_tau
        self.configured = {"v_threshold": v_threshold, "tau": tau}

    def neuron(self) -> tuple[Tensor, Tensor]:
        """`v_threshold` and `tau` as the forward takes them, in float32."""
        # As attributes they would take two microseconds of every forward.
        v_threshold, tau = self._parameters["v_threshold"], self._parameters["tau"]
        assert v_threshold is not None
        assert tau is not None
        if not v_threshold.dtype == tau.dtype == torch.float32:
            raise SpikeLoraError(
                "`v_threshold` and `tau` were cast, but have to stay float32: leave SpikeGate out. Where FSDP2's mixed "
                "precision has cast them: load the base in bfloat16 and set `mixed_precision: no`, or leave thresholds "
                "that are not learned out by `fsdp_ignored_modules: .*lora_gate.*`, see docs/distributed.md."
            )
        return v_threshold, _AboveOne.apply(tau) if self.learn_tau else tau

    def freeze_fixed(self) -> None:
        """Take the gradient from what is not learned; PEFT makes every tensor of an active adapter trainable."""
        for tensor, learned in ((self.v_threshold, self.learn_threshold), (self.tau, self.learn_tau)):
            tensor.requires_grad_(tensor.requires_grad and learned)

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
