"""Which way a gated layer computes: fused with its base, as a branch beside it, or plainly; and why."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from spikelora.errors import SpikeLoraError
from spikelora.gate import SpikeGate
from spikelora.ops.linear import Adapter, is_autocast

# What an adapter's parts are when nobody has put something else in their place.
_PARTS = {
    "lora_A": (nn.Linear,),
    "lora_B": (nn.Linear,),
    "lora_dropout": (nn.Identity, nn.Dropout),
    "lora_gate": (SpikeGate,),
}
_PLAIN_TYPES = {Tensor, nn.Parameter, type(None)}


class Path(Enum):
    """The ways to compute a gated layer, cheapest first; each says what runs as one function."""

    FUSED = "the base layer and its adapter"
    BRANCH = "the adapter, beside its base layer"
    PLAIN = "nothing: every part is called as the module that it is"


class Choice(NamedTuple):
    """The path that a layer takes, the reason, and the operands for the paths that need them."""

    path: Path
    reason: str
    adapter: Adapter | None = None


_forced: Path | None = None


@contextmanager
def force_path(path: Path) -> Iterator[None]:
    """Make every linear layer take one path, for tests and benchmarks; beside other adapters FUSED is BRANCH.

    Raises:
        SpikeLoraError: in the forward of a layer that cannot take it.
    """
    global _forced
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def choose(layer: Any, adapter_name: str, x: Tensor) -> Choice:
    """The cheapest path that gives what the plain one gives, for one adapter of a `SpikingLinear` and an input."""
    choice = _cheapest(layer, adapter_name, x)
    if _forced is None or _forced is choice.path:
        return choice
    if choice.path is Path.PLAIN or _forced is Path.FUSED:
        raise SpikeLoraError(f"{_forced} was forced on a layer that can take {choice.path} only: {choice.reason}.")
    return Choice(_forced, "it is forced", choice.adapter if _forced is Path.BRANCH else None)


def returns_private(base: Any) -> bool:
    """Whether nobody but the caller holds what this base layer returns, nor has autograd saved it."""
    return type(base).forward in (nn.Linear.forward, Conv1D.forward) and not _is_hooked(base)


def _cheapest(layer: Any, adapter_name: str, x: Tensor) -> Choice:
    # This runs in every forward, and at one token the layer itself takes but 100 us: each attribute is read once.
    if _has_any_global_hook():
        return Choice(Path.PLAIN, "there are hooks on all modules")
    modules = layer._modules
    parts = [modules[name]._modules[adapter_name] for name in _PARTS]
    for part, (name, types) in zip(parts, _PARTS.items(), strict=True):
        if type(part) not in types:
            return Choice(Path.PLAIN, f"`{name}` is a {type(part).__name__}")
        if _is_hooked(part):
            return Choice(Path.PLAIN, f"`{name}` has hooks")
    lora_A, lora_B, dropout, gate = parts
    if gate.observers and torch.compiler.is_compiling():
        return Choice(Path.PLAIN, "it is observed, which a compiler has to leave its graph for")
    v_threshold, tau = gate.neuron()
    adapter = Adapter(
        A=lora_A.weight,
        B=lora_B.weight,
        v_threshold=v_threshold,
        tau=tau,
        surrogate_alpha=gate.surrogate_alpha,
        scaling=layer.scaling[adapter_name],
        dropout=dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0,
        observers=gate.observers,
    )
    reason = _why_plain(layer, lora_A, lora_B, adapter, x)
    if reason:
        return Choice(Path.PLAIN, reason)
    reason = _why_branch(modules["base_layer"], x)
    if reason:
        return Choice(Path.BRANCH, reason, adapter)
    return Choice(Path.FUSED, "a single adapter on a plain linear layer with a frozen weight", adapter)


def _why_plain(layer: Any, lora_A: nn.Linear, lora_B: nn.Linear, adapter: Adapter, x: Tensor) -> str:
    A, B, v_threshold, tau, *_ = adapter
    if not _are_plain(x, A, B, v_threshold, tau):
        return "the input or a tensor of the adapter is of a class of its own"
    if lora_A._parameters.get("bias") is not None or lora_B._parameters.get("bias") is not None:
        return "the adapter has a bias"
    if isinstance(adapter.scaling, Tensor):
        return "its scaling is a tensor, as `prepare_model_for_compiled_hotswap` makes it"
    if A.dtype != B.dtype:
        return "`lora_A` and `lora_B` differ in dtype"
    if x.dtype != A.dtype and not layer.cast_input_dtype_enabled:
        return "the input has another dtype than the adapter, and its cast is switched off"
    return ""


def _why_branch(base: Any, x: Tensor) -> str:
    if type(base) not in (nn.Linear, Conv1D):
        return f"the base layer is a {type(base).__name__}"
    if _is_hooked(base):
        return "the base layer has hooks"
    weight = base.weight
    if not _are_plain(weight, base.bias):
        return "a tensor of the base layer is of a class of its own"
    if weight.requires_grad:
        return "the base layer's weight is trained"
    if x.dtype != weight.dtype and not is_autocast(x):
        return "the input has another dtype than the base layer's weight"
    return ""


def _is_hooked(module: Any) -> bool:
    """Whether calling the module does more than its class's `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # as accelerate puts its hooks
    )


def _are_plain(*tensors: Tensor | None) -> bool:
    return _PLAIN_TYPES.issuperset(map(type, tensors))
