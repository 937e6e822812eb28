"""Observing the low-rank activations of a model while it runs, each token with its place in the attention mask."""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikelora.errors import SpikeLoraError
from spikelora.method.gate import SpikeGate
from spikelora.method.sharding import unwrapped

DATA_PARALLEL = (
    "Sparsity cannot be measured under `torch.nn.DataParallel`, as trainers use it for several GPUs in one process. "
    "Start one process for each, by `torchrun` or `accelerate launch`, or show it one GPU."
)


# What transformers' EncoderDecoderModel and similar models run themselves, on the encoder's output.
_ON_ENCODER_TOKENS = "enc_to_dec_proj"
_CACHES = "past_key_values", "cache"  # of keys and values, up to transformers 5.23 and from 5.24


class Gated(NamedTuple):
    """One adapter's gate in one module, which has its name in the model that was adapted."""

    module: str
    adapter: str
    gate: SpikeGate
    layer: nn.Module

    @property
    def is_active(self) -> bool:
        layer: Any = self.layer
        return self.adapter in layer.active_adapters


# Called with `a (N, r)` and, if the attention mask is known, which of the N tokens are not padding.
Observer = Callable[[Gated, Tensor, Tensor | None], None]


def gates(model: nn.Module) -> list[Gated]:
    """All gates of a model.

    Raises:
        SpikeLoraError: if there are none.
    """
    if not isinstance(model, nn.Module):
        raise SpikeLoraError(
            f"`model` must be a model with a spiking adapter, got a {type(model).__name__}. Give the one of "
            "`get_peft_model(model, SpikeLoraConfig(...))` or `PeftModel.from_pretrained`."
        )
    found = []
    for name, gate in model.named_modules():
        layer, is_part, adapter = f".{name}".rpartition(".lora_gate.")
        if isinstance(gate, SpikeGate) and is_part:
            layer = layer.removeprefix(".")
            module = unwrapped(layer.removeprefix("base_model.model."))
            found.append(Gated(module, adapter, gate, model.get_submodule(layer)))
    if not found:
        raise SpikeLoraError(
            f"This {type(model).__name__} has no spiking adapter. Put one on it with `get_peft_model(model, "
            "SpikeLoraConfig(...))`, or load one with `PeftModel.from_pretrained`."
        )
    return found


def refuse_data_parallel(n_gpu: int) -> None:
    """Raise a `SpikeLoraError` if a trainer would use several GPUs in one process."""
    if n_gpu > 1:
        raise SpikeLoraError(DATA_PARALLEL)


def configs_of(model: nn.Module) -> dict[str, Any]:
    """The configurations of a model's adapters, by their names.

    Raises:
        SpikeLoraError: if the model does not have them.
    """
    configs: Any = getattr(model, "peft_config", None)
    if configs is None:
        raise SpikeLoraError(
            f"This {type(model).__name__} has no `peft_config`, where the settings of its adapters are. Give the "
            "model that `get_peft_model` or `PeftModel.from_pretrained` made, without what was wrapped around it."
        )
    return configs


def names(gated: Iterable[Gated]) -> list[str]:
    """Their names in reports: the module's, or `<module>.<adapter>` if they are of several adapters."""
    gated = list(gated)
    several = len({g.adapter for g in gated}) > 1
    return [f"{g.module}.{g.adapter}" if several else g.module for g in gated]


@contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call the observer with every low-rank activation that a gate sees, whichever path its layer takes.

    What gradient checkpointing computes a second time, in the backward, is not shown again.

    Raises:
        SpikeLoraError: if the model has no spiking adapter, or one on the meta device; while it runs, also under
            `torch.nn.DataParallel`.
    """
    found = gates(model)
    for gated in found:
        if gated.gate.tau.is_meta or gated.gate.v_threshold.is_meta:
            raise SpikeLoraError(
                f"The neuron of `{gated.module}` is on the meta device, as what accelerate offloads is between two "
                "runs. Load the model where all of it has a device, without offloading to CPU or disk."
            )
    with ExitStack() as stack, token_masks(model) as masks:
        layers = {gated.layer: gated.module for gated in found}
        # All entries from the start: a compiler would recompile as the dict grows.
        seen = _Seen(layers)
        one_at_a_time = threading.Lock()

        def note_mask(layer: Any, args: tuple[Any, ...]) -> None:
            tokens = layer.tokens(args[0]) if args else None
            mask = None if tokens is None else masks.of(tokens, layers[layer].endswith(_ON_ENCODER_TOKENS))
            seen.by_layer[layer] = (mask, _adapter_names(layer))

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        @torch.no_grad()
        def show(gated: Gated, a: Tensor) -> None:
            if torch._C._current_graph_task_id() != -1:  # in a backward
                return
            if a.device != gated.gate.tau.device:  # in a copy of the model
                raise SpikeLoraError(DATA_PARALLEL)
            mask, names = seen.by_layer[gated.layer]
            if mask is not None and names is not None:  # a mixed batch: its rows have different adapters
                mask = mask[[row for row, name in enumerate(names) if name == gated.adapter]]
            with one_at_a_time:
                observer(gated, a.detach().flatten(0, -2), None if mask is None else mask.flatten())

        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(_Hook(note_mask)).remove)
        for gated in found:
            show_gate = partial(show, gated)
            gated.gate.observers += (show_gate,)
            stack.callback(_forget, gated.gate, show_gate)
        yield


class _Hook:
    """A hook on a module while its model is watched; a copy of the model, or a file of it, does not keep it."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_ignore,)


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _forget(gate: SpikeGate, observer: Callable[[Tensor], None]) -> None:
    gate.observers = tuple(other for other in gate.observers if other is not observer)


def _adapter_names(layer: nn.Module) -> list[str] | None:
    """The adapter of each row of the batch, which PEFT passes to a layer in a hook of its own."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, partial) and "adapter_names" in hook.keywords:
            return hook.keywords["adapter_names"]
    return None


class _Scope(NamedTuple):
    """The masks that hold inside one module that was given masks."""

    mask: Tensor | None
    encoder_states: Tensor | None
    encoder_mask: Tensor | None
    is_cached: bool


class _Seen(threading.local):
    """The mask and the rows' adapters with which each layer runs now, separately for each thread."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.by_layer: dict[nn.Module, tuple[Tensor | None, list[str] | None]] = dict.fromkeys(layers, (None, None))


class TokenMasks(threading.local):
    """The attention masks of the modules that run now, outermost first, separately for each thread."""

    def __init__(self) -> None:
        self._scopes: list[_Scope] = []

    def of(self, x: Tensor, is_of_encoder: bool = False) -> Tensor | None:
        """Which tokens of a module's input `x (..., in)` are not padding, in the order of `x`; None if unknown."""
        if not self._scopes:
            return None
        scope = self._scopes[-1]
        states, mask = scope.encoder_states, scope.mask
        if is_of_encoder or (states is not None and x.shape == states.shape and x.data_ptr() == states.data_ptr()):
            mask = scope.encoder_mask  # keys and values of cross-attention are made from the encoder's tokens
        if mask is None or mask.dim() != 2:
            return None
        if scope.is_cached and x.dim() == 3 and x.shape[0] == mask.shape[0]:
            mask = mask[:, -x.shape[1] :]  # with a cache only the newest tokens are computed
        is_flat = x.dim() == 2 and x.shape[0] == mask.numel()
        if x.shape[:-1] == mask.T.shape and not is_flat and x.shape[:-1] != mask.shape:
            mask = mask.T  # some models have tokens before batch
        elif x.shape[:-1] != mask.shape and not is_flat:
            return None
        return mask.to(x.device) > 0

    def enter(
        self, signature: inspect.Signature, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Take the masks that a module is called with; without any, it keeps those of the modules around it."""
        try:
            given = signature.bind_partial(*args, **kwargs).arguments
        except TypeError:
            given = kwargs
        outer = self._scopes[-1] if self._scopes else _Scope(None, None, None, False)
        mask, states = given.get("attention_mask"), given.get("encoder_hidden_states")
        is_cached = any(given.get(name) is not None for name in _CACHES)
        scope = outer._replace(is_cached=outer.is_cached or is_cached)
        if states is not None and states is not outer.encoder_states:
            # A decoder: the mask around it is the encoder's.
            scope = scope._replace(mask=None, encoder_states=states, encoder_mask=given.get("encoder_attention_mask"))
        if "decoder_attention_mask" in signature.parameters:
            # Encoder and decoder in one: it passes the mask on to the encoder, and runs decoder tokens itself.
            scope, mask = scope._replace(mask=None, encoder_mask=mask), given.get("decoder_attention_mask")
        if "pixel_values" in signature.parameters and "input_ids" not in signature.parameters:
            scope = scope._replace(mask=None)  # a vision tower: the text mask does not apply to its patches
        # A floating-point mask inside of another is added to attention scores, as in Longformer's layers.
        is_added = isinstance(mask, Tensor) and mask.is_floating_point() and outer.mask is not None
        if isinstance(mask, Tensor) and mask.dim() == 2 and not is_added:
            scope = scope._replace(mask=mask)
        self._scopes.append(scope)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._scopes.pop()


@contextmanager
def token_masks(model: nn.Module) -> Iterator[TokenMasks]:
    """Follow the attention masks through a model: each part has those of the nearest module that was given them."""
    masks = TokenMasks()
    with ExitStack() as stack:
        for module in model.modules():
            signature = inspect.signature(module.forward)
            if "attention_mask" in signature.parameters:
                enter, leave = _Hook(partial(masks.enter, signature)), _Hook(masks.leave)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield masks
