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
from spikelora.method.composed import is_transformed
from spikelora.method.gate import SpikeGate
from spikelora.method.ops.linear import Adapter, is_autocast

# What an adapter's parts are when nobody has put something else in their place.
_PARTS = {
    "lora_A": (nn.Linear,),
    "lora_B": (nn.Linear,),
    "lora_dropout": (nn.Identity, nn.Dropout),
    "lora_gate": (SpikeGate,),
}
_DROPOUTS = _PARTS["lora_dropout"]
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
    # This runs in every forward, and at one token the layer itself takes but 100 us. So what is usual is asked for in
    # one go, attributes are read past `nn.Module.__getattr__`, and a reason is looked for where there is one to give.
    if is_transformed():
        return Choice(Path.PLAIN, "`torch.func` or forward-mode differentiation transforms it")
    modules = layer._modules
    lora_A, lora_B = modules["lora_A"]._modules[adapter_name], modules["lora_B"]._modules[adapter_name]
    dropout, gate = modules["lora_dropout"]._modules[adapter_name], modules["lora_gate"]._modules[adapter_name]
    if (
        _has_any_global_hook()
        or not (type(lora_A) is type(lora_B) is nn.Linear and type(gate) is SpikeGate and type(dropout) in _DROPOUTS)
        or _is_hooked(lora_A)
        or _is_hooked(lora_B)
        or _is_hooked(dropout)
        or _is_hooked(gate)
    ):
        return Choice(Path.PLAIN, _why_not_as_made(layer, adapter_name))
    if gate.observers and torch.compiler.is_compiling():
        return Choice(Path.PLAIN, "it is observed, which a compiler has to leave its graph for")
    adapter = Adapter(
        lora_A._parameters.get("weight"),  # type: ignore[arg-type]
        lora_B._parameters.get("weight"),  # type: ignore[arg-type]
        *gate.neuron(),
        gate.surrogate_alpha,
        layer.scaling[adapter_name],
        dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0,
        gate.observers,
    )
    reason = _why_plain(layer, lora_A, lora_B, adapter, x)
    if reason:
        return Choice(Path.PLAIN, reason)
    reason = _why_branch(modules["base_layer"], x)
    if reason:
        return Choice(Path.BRANCH, reason, adapter)
    return Choice(Path.FUSED, "a single adapter on a plain linear layer with a frozen weight", adapter)


def _why_not_as_made(layer: Any, adapter_name: str) -> str:
    if _has_any_global_hook():
        return "there are hooks on all modules"
    for name, types in _PARTS.items():
        part = layer._modules[name]._modules[adapter_name]
        if type(part) not in types:
            return f"`{name}` is a {type(part).__name__}"
        if _is_hooked(part):
            return f"`{name}` has hooks"
    raise AssertionError("its parts are as they were made")


def _why_plain(layer: Any, lora_A: nn.Linear, lora_B: nn.Linear, adapter: Adapter, x: Tensor) -> str:
    A, B, v_threshold, tau, *_ = adapter
    # A weight that is no parameter, as pruning leaves it, is None here.
    if A is None or B is None or not {type(x), type(A), type(B), type(v_threshold), type(tau)} <= _PLAIN_TYPES:
        return "the input or a tensor of the adapter is of a class of its own"
    if lora_A._parameters["bias"] is not None or lora_B._parameters["bias"] is not None:
        return "the adapter has a bias"
    if isinstance(adapter.scaling, Tensor):
        return "its scaling is a tensor, as `prepare_model_for_compiled_hotswap` makes it"
    if A.dtype != B.dtype:
        return "`lora_A` and `lora_B` differ in dtype"
    if x.dtype != A.dtype and not layer.cast_input_dtype_enabled:
        return "the input has another dtype than the adapter, and its cast is switched off"
    return ""


def _why_branch(base: Any, x: Tensor) -> str:
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is a {type(base).__name__}"
    if _is_hooked(base):
        return "the base layer has hooks"
    weight = base._parameters.get("weight")
    if weight is None or not {type(weight), type(base._parameters["bias"])} <= _PLAIN_TYPES:
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
