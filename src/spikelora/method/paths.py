"""Which path a gated layer takes, and why: fused with its base, as a branch beside it, or plain."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from spikelora.errors import SpikeLoraError
from spikelora.method.composed import is_transformed
from spikelora.method.gate import SpikeGate
from spikelora.method.ops.adapter import Adapter, is_autocast

# The types of an adapter's parts, unless somebody has replaced them.
_PARTS = {
    "lora_A": (nn.Linear,),
    "lora_B": (nn.Linear,),
    "lora_dropout": (nn.Identity, nn.Dropout),
    "lora_gate": (SpikeGate,),
}
_DROPOUTS = _PARTS["lora_dropout"]
_PLAIN_TYPES = {Tensor, nn.Parameter, type(None)}


class Path(Enum):
    """The ways to compute a gated layer, cheapest first; the value says what runs as one function."""

    FUSED = "the base layer and its adapter"
    BRANCH = "the adapter, beside its base layer"
    PLAIN = "nothing: every part is called as the module that it is"


class Choice(NamedTuple):
    """The path that a layer takes, the reason, and the operands for the paths that need them."""

    path: Path
    reason: str
    adapter: Adapter | None = None


class Kept(NamedTuple):
    """The state for which `Path.FUSED` was chosen."""

    adapter: Adapter
    active: list[str]
    parts: tuple[Any, ...]  # the base layer, and the adapter's in the order of `_PARTS`
    dtypes: tuple[torch.dtype, ...]
    autocast: torch.dtype | None
    device: str
    n_hooks: int


_forced: Path | None = None


@contextmanager
def force_path(path: Path) -> Iterator[None]:
    """Make every linear layer take one path, for tests and benchmarks; with several adapters FUSED means BRANCH.

    Raises:
        SpikeLoraError: in the forward of a layer that cannot take that path.
    """
    global _forced
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def choose(layer: Any, adapter_name: str, x: Tensor) -> Choice:
    """The cheapest path with the plain path's result, for one adapter of a `SpikingLinear` and an input."""
    choice = _cheapest(layer, adapter_name, x)
    if _forced is None or _forced is choice.path:
        return choice
    if choice.path is Path.PLAIN or _forced is Path.FUSED:
        raise SpikeLoraError(
            f"{_forced} was forced on a layer that can take {choice.path} only: {choice.reason}. Force that one, or "
            "none."
        )
    return Choice(_forced, "it is forced", choice.adapter if _forced is Path.BRANCH else None)


def keep(layer: Any, adapter_name: str, x: Tensor, adapter: Adapter) -> None:
    """Remember for `kept` that a layer takes `Path.FUSED`; not with a learned tau, which is computed anew, nor with
    observers.
    """
    if torch.compiler.is_compiling():
        return
    modules = layer._modules
    gate = modules["lora_gate"]._modules[adapter_name]
    if gate.learn_tau or gate.observers:
        return
    base = modules["base_layer"]
    if type(base) is nn.Linear and not x.is_meta:
        parts = (modules[name]._modules[adapter_name] for name in _PARTS)
        dtypes = (x.dtype, base.weight.dtype, adapter.A.dtype, adapter.A.dtype, torch.float32, torch.float32)
        device, n_hooks = x.device.type, RemovableHandle.next_id
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        layer.__dict__["_kept"] = Kept(adapter, [adapter_name], (base, *parts), dtypes, autocast, device, n_hooks)


def kept(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Adapter] | None:
    """Weight and bias of the base, and the adapter, if `choose` would choose `Path.FUSED` as it did last time.

    It checks that all that `choose` looks at is unchanged, and forgets the choice if it is not. It notices that hooks
    were registered, but not hooks that were written into a module's dicts without torch's functions. At one token of
    width 1024 it takes 12 us, where choosing takes 40, because the weights have pushed Python's own objects out of the
    processor's caches. The frozen layer alone takes 150 (2 cores of a Xeon with AMX, float32).
    """
    own = layer.__dict__
    choice: Kept | None = own.get("_kept")
    if choice is None or torch.compiler.is_compiling():
        return None
    weight, bias = choice.parts[0]._parameters.get("weight"), choice.parts[0]._parameters.get("bias")
    if _holds(choice, own, weight, bias, x):
        return weight, bias, choice.adapter
    own.pop("_kept", None)  # free the memory that it holds; another thread may have done so already
    return None


def _holds(choice: Kept, own: dict[str, Any], weight: Any, bias: Any, x: Tensor) -> bool:
    adapter, active, parts, dtypes, autocast, device, n_hooks = choice
    A, B, v_threshold, tau, alpha, straight_through, scaling, p, _ = adapter
    base, lora_A, lora_B, dropout, gate = parts
    modules, (name,) = own["_modules"], active
    if not (
        RemovableHandle.next_id == n_hooks  # no hook was registered anywhere since
        and own["_active_adapter"] == active
        and not own["_disable_adapters"]
        and own["cast_input_dtype_enabled"]
        and own["scaling"].get(name) is scaling
        and modules["base_layer"] is base
        and modules["lora_A"]._modules.get(name) is lora_A
        and modules["lora_B"]._modules.get(name) is lora_B
        and modules["lora_dropout"]._modules.get(name) is dropout
        and modules["lora_gate"]._modules.get(name) is gate
        and type(base) is type(lora_A) is type(lora_B) is nn.Linear
        and type(dropout) in _DROPOUTS
        and type(gate) is SpikeGate
        and (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None) is autocast
        and not is_transformed()
        and _forced is None
    ):
        return False
    downs, ups, numbers, of_gate = lora_A._parameters, lora_B._parameters, gate._buffers, gate.__dict__
    of_threshold = gate._parameters if of_gate["learn_threshold"] else numbers
    return (
        type(weight) is type(A) is type(B) is nn.Parameter
        and (bias is None or type(bias) is nn.Parameter)
        and type(tau) is type(x) is Tensor
        and (type(v_threshold) is Tensor or type(v_threshold) is nn.Parameter)
        and (x.dtype, weight.dtype, A.dtype, B.dtype, v_threshold.dtype, tau.dtype) == dtypes
        and not weight.requires_grad
        and downs.get("weight") is A
        and downs.get("bias") is None
        and ups.get("weight") is B
        and ups.get("bias") is None
        and of_threshold.get("v_threshold") is v_threshold
        and numbers.get("tau") is tau
        and (type(dropout) is nn.Identity or (dropout.p if dropout.training else 0.0) == p)
        and of_gate["surrogate_alpha"] is alpha
        and of_gate["straight_through"] is straight_through
        and not of_gate["observers"]
        and not ("forward" in base.__dict__ or "forward" in lora_A.__dict__ or "forward" in lora_B.__dict__)
        and not ("forward" in of_gate or "forward" in dropout.__dict__)
    )


def returns_private(base: Any) -> bool:
    """Whether only the caller holds what this base layer returns, and autograd has not saved it."""
    return type(base).forward in (nn.Linear.forward, Conv1D.forward) and not _is_hooked(base)


def _cheapest(layer: Any, adapter_name: str, x: Tensor) -> Choice:
    # This runs in every forward, and at one token the layer itself takes only 100 us. So the usual case is tested first
    # and at once, attributes are read past `nn.Module.__getattr__`, and a reason is looked for only if one is needed.
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
        gate.straight_through,
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
    # A weight that is not a parameter, as after torch's pruning, is None here.
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
