"""The two numbers of a neuron as tensors of a model: learned or fixed, saved with it, and always float32."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from spikelora.errors import SpikeLoraError
from spikelora.method.composed import is_transformed

# The smallest float32 above 1: as the floor of a learned tau it changes no tau that a configuration accepts.
MIN_TAU = 1 + torch.finfo(torch.float32).eps


class NeuronParameters(nn.Module):
    """`v_threshold` and `tau` of one neuron, each of shape `(1,)`.

    A learned number is a parameter. A fixed one is a buffer, so it is skipped by all that trains, casts, shards or
    counts parameters. Both stay float32 whatever the model is cast to, because bfloat16 cannot hold 0.1. A learned
    `tau` stays above 1. After `to_empty` from the meta device they are as they were configured, until a state dict is
    loaded.
    """

    v_threshold: Tensor
    tau: Tensor

    def __init__(self, v_threshold: float, tau: float, learn_threshold: bool, learn_tau: bool) -> None:
        super().__init__()
        self.learn_threshold = learn_threshold
        self.learn_tau = learn_tau
        self.configured = {"v_threshold": v_threshold, "tau": tau}
        for name, is_learned in (("v_threshold", learn_threshold), ("tau", learn_tau)):
            tensor = torch.full((1,), self.configured[name], dtype=torch.float32)
            if is_learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def neuron(self) -> tuple[Tensor, Tensor]:
        """`v_threshold` and `tau` as the forward takes them, in float32."""
        # As attributes they would take two microseconds of every forward. A replica of `nn.DataParallel` has no
        # parameters, but attributes in their place.
        learned = self._parameters or self.__dict__
        v_threshold = (learned if self.learn_threshold else self._buffers)["v_threshold"]
        tau = (learned if self.learn_tau else self._buffers)["tau"]
        assert v_threshold is not None
        assert tau is not None
        # FSDP2's mixed precision casts what is learned to bfloat16 for the forward; the number itself is in float32.
        if self.learn_threshold:
            v_threshold = v_threshold.float()
        if self.learn_tau:
            tau = _above_one(tau.float())
        if not v_threshold.dtype == tau.dtype == torch.float32:
            raise SpikeLoraError(
                f"`v_threshold` and `tau` were cast to {v_threshold.dtype} and {tau.dtype}, but have to stay float32. "
                "Use FSDP2 if FSDP1 casts buffers, and leave `SpikeGate` out if you cast by hand."
            )
        return v_threshold, tau

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            return moved if (moved := fn(tensor)).dtype == tensor.dtype else tensor.to(moved.device)

        were_meta = [name for name in self.configured if getattr(self, name).is_meta]
        super()._apply(keep_dtype, recurse)
        with torch.no_grad():
            for name in were_meta:
                if not getattr(self, name).is_meta:  # an empty tensor, which holds what the memory held
                    getattr(self, name).fill_(self.configured[name])
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.learn_tau and not keep_vars:  # an optimiser may have stepped below the floor
            destination[prefix + "tau"] = destination[prefix + "tau"].clamp(min=MIN_TAU)


def _above_one(tau: Tensor) -> Tensor:
    """`max(tau, MIN_TAU)`, with a gradient at the floor."""
    if is_transformed():  # a gradient's sign cannot be tested there, so every gradient passes at the floor
        return torch.where(tau > MIN_TAU, tau, MIN_TAU + (tau - tau.detach()))
    above_one: Tensor = _AboveOne.apply(tau)
    return above_one


class _AboveOne(torch.autograd.Function):
    """`max(tau, MIN_TAU)`; at the floor only a gradient that would raise tau passes, so that tau can leave it."""

    @staticmethod
    def forward(ctx: Any, tau: Tensor) -> Tensor:
        ctx.save_for_backward(tau)
        return tau.clamp(min=MIN_TAU)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (tau,) = ctx.saved_tensors
        return grad * ((tau > MIN_TAU) | (grad < 0))
