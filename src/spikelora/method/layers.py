"""LoRA's layers with a gate on each adapter.

PEFT builds LoRA's layer for a target. `make_spiking` then gives it the class of the same name here, whose only LoRA
variant is the gated one. `_SPIKING` lists these classes. Any other layer could run without its gate, and is refused.
"""

import math
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from spikelora.errors import SpikeLoraError
from spikelora.method import variants
from spikelora.method.ops.linear import spike_branch, spike_linear
from spikelora.method.paths import Choice, Path, choose, keep, kept, returns_private
from spikelora.method.sharding import own_shard


class SpikingLayer(nn.Module, lora.LoraLayer):
    """The base of all gated layers: one gate per adapter, in `lora_gate`, and no merging.

    `y = base(x) + scaling * lora_B(gated)` with `gated = lora_gate(a)`, `a` the low-rank activation of the layer.
    """

    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, "lora_gate")
    target_name: str  # the layer's name in its model
    variant: type[variants.SpikeVariant]

    if TYPE_CHECKING:  # PEFT's layers have no types, and torch's modules give every attribute the wrong one

        def __getattr__(self, name: str) -> Any: ...

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant:
        if not hasattr(config, "v_threshold"):
            raise SpikeLoraError(
                f"A spiking layer takes a SpikeLoraConfig, got a {type(config).__name__}. Put adapters of other "
                "methods on a model of their own."
            )
        return self.variant()

    def low_rank(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of one adapter: `(r, in)` and `(out, r)`, followed by the kernel's dimensions in a convolution."""
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

    def set_low_rank(self, adapter_name: str, A: nn.Parameter, B: nn.Parameter) -> None:
        """Replace the A and B of one adapter by an A and a B of another rank; its scaling stays."""
        r = len(A)
        self._put(adapter_name, A, B)
        share = r / self.r[adapter_name]
        self.lora_alpha[adapter_name] *= math.sqrt(share) if self.use_rslora[adapter_name] else share
        self.r[adapter_name] = r

    def _put(self, adapter_name: str, A: nn.Parameter, B: nn.Parameter) -> None:
        lora_A, lora_B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        lora_A.weight, lora_A.out_features = A, len(A)
        lora_B.weight, lora_B.in_features = B, len(A)

    def tokens(self, x: Tensor) -> Tensor | None:
        """The input as `(..., in)`, with the leading dimensions of `a`; None where `a` has others."""
        return x

    def _mixed_batch_forward(
        self, x: Tensor, *args: Any, adapter_names: list[str], alora_offsets: None = None, **kwargs: Any
    ) -> Tensor:
        # PEFT's own method ignores the variant in some layers.
        result = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.lora_gate:  # neither the base nor an adapter of other layers
                self.complete_copy(name)
                rows = [row for row, of_row in enumerate(adapter_names) if of_row == name]
                part = x[rows]
                if part.is_floating_point():
                    part = self._cast_input_dtype(part, self.low_rank(name)[0].dtype)
                result[rows] = self.lora_variant[name].forward(self, name, part, result[rows]).to(result.dtype)
        return result

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for name in self.active_adapters:
            if name in self.lora_gate:
                self.complete_copy(name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        self.adapter_layer_names = lora.LoraLayer.adapter_layer_names  # without the gates
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        del self.adapter_layer_names
        self.move_gate(adapter_name)

    def move_gate(self, adapter_name: str) -> None:
        """Move a gate to where its A is. PEFT itself would move one without parameters from the meta device."""
        if adapter_name in self.lora_gate:
            self.lora_gate[adapter_name].to(self.low_rank(adapter_name)[0].device)

    def complete_copy(self, adapter_name: str) -> None:
        """Copy the fixed numbers as well, if an adapter was copied from another parameter by parameter.

        TRL makes its references like this: it makes an adapter with the configuration of the trained one, then copies
        the parameters. An adapter counts as a copy if it has the same configuration object and the same A and B.
        """
        gate = self.lora_gate[adapter_name]
        if gate.made_like not in self.lora_gate:
            return
        pairs = zip(self.low_rank(adapter_name), self.low_rank(gate.made_like), strict=True)
        if all(_are_alike(*pair) for pair in pairs):
            gate.load_state_dict(dict(self.lora_gate[gate.made_like].named_buffers()), strict=False)
            gate.made_like = None

    merge = get_delta_weight = variants.refuse_merging

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def neuron(self, adapter_name: str) -> dict[str, float]:
        """Rank, threshold and time constant of one adapter, by their symbols.

        A number is NaN while on the meta device, and in processes of FSDP2 that hold no part of it.
        """
        gate = self.lora_gate[adapter_name]
        tensors = {name: own_shard(getattr(gate, name).detach()) for name in ("v_threshold", "tau")}
        values = {name: t.item() if t.numel() and not t.is_meta else math.nan for name, t in tensors.items()}
        return {"r": self.r[adapter_name], **values}

    def extra_repr(self) -> str:
        lines = []
        for name, gate in self.lora_gate.items():
            learned = {"v_threshold": gate.learn_threshold, "tau": gate.learn_tau}
            values = (
                f"{symbol}={value:g}" + (" (learned)" if learned.get(symbol) else "")
                for symbol, value in self.neuron(name).items()
            )
            lines.append(f"{name}: {', '.join(values)}")
        return "\n".join(lines)


class SpikingLinear(SpikingLayer):
    """A linear layer, quantised or not. It runs module by module in `SpikeLinearVariant.forward`, or as one function
    with the same values, see `path`.
    """

    variant = variants.SpikeLinearVariant

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not kwargs:
            operands = kept(self, x)
            if operands is not None:
                return spike_linear(x, *operands)
        adapters = self.active_adapters
        if args or kwargs or self.disable_adapters or len(adapters) != 1 or adapters[0] not in self._gates():
            return self._forward_of_peft(x, *args, **kwargs)
        choice = choose(self, adapters[0], x)
        if choice.adapter is None:
            return super().forward(x)
        base: Any = self._modules["base_layer"]
        if choice.path is Path.BRANCH:
            return spike_branch(base(x), x, choice.adapter, returns_private(base))
        parameters = base._parameters
        weight = parameters["weight"] if type(base) is nn.Linear else parameters["weight"].T  # as Conv1D stores it
        keep(self, adapters[0], x, choice.adapter)
        return spike_linear(x, weight, parameters["bias"], choice.adapter)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}  # which is of these parts

    def _gates(self) -> dict[str, nn.Module | None]:
        """The gates by adapter; as an attribute, `lora_gate` would take two microseconds of every forward."""
        gates: Any = self._modules["lora_gate"]
        return gates._modules

    def _forward_of_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, for disabled adapters, several adapters and mixed batches. It runs the base layer and copies
        x to the adapter's dtype before it calls the variant.
        """
        adapter_names = kwargs.pop("adapter_names", None)  # PEFT's GPTQ layer takes none
        if adapter_names is None or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, adapter_names=adapter_names)
        return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)

    def path(self, x: Tensor) -> Choice:
        """The path that `forward` takes for an input `x (..., in)`, and why."""
        adapters = [name for name in self.active_adapters if name in self.lora_gate]
        if self.disable_adapters or not adapters:
            return Choice(Path.PLAIN, "no adapter is active here: the base layer runs alone")
        choice = choose(self, adapters[0], x)
        if len(self.active_adapters) > 1 and choice.path is Path.FUSED:
            return choice._replace(path=Path.BRANCH, reason="several adapters are active")
        return choice


class Linear(SpikingLinear, lora.Linear):
    """For `nn.Linear` and transformers' `Conv1D`."""


class SpikingConv(SpikingLayer):
    """A convolution, with or without groups."""

    variant = variants.SpikeConvVariant

    def _put(self, adapter_name: str, A: nn.Parameter, B: nn.Parameter) -> None:
        lora_A, lora_B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        lora_A.weight, lora_A.out_channels = A, len(A)
        lora_B.weight, lora_B.in_channels = B, len(A)

    def tokens(self, x: Tensor) -> None:
        return None


class Conv1d(SpikingConv, lora.Conv1d):
    """For `nn.Conv1d`."""


class Conv2d(SpikingConv, lora.Conv2d):
    """For `nn.Conv2d`."""


class Conv3d(SpikingConv, lora.Conv3d):
    """For `nn.Conv3d`."""


class Embedding(SpikingLayer, lora.Embedding):
    """For `nn.Embedding`."""

    variant = variants.SpikeEmbeddingVariant

    def low_rank(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]

    def _put(self, adapter_name: str, A: nn.Parameter, B: nn.Parameter) -> None:
        self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name] = A, B

    def tokens(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-1)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Start with A random and B zero; LoRA's start, the other way round, never fires at a positive threshold."""
        if init_lora_weights is not False:
            A, B = self.low_rank(adapter_name)
            nn.init.normal_(A)
            nn.init.zeros_(B)


# PEFT's layers that call the variant, by their modules. Those for quantised layers are subclassed when first needed,
# because their modules import the libraries that quantise.
_SPIKING = {
    "peft.tuners.lora.layer": ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"),
    "peft.tuners.lora.bnb": ("Linear8bitLt", "Linear4bit"),
    "peft.tuners.lora.gptq": ("GPTQLoraLinear",),
    "peft.tuners.lora.hqq": ("HqqLoraLinear",),
    "peft.tuners.lora.inc": ("IncLoraLinear",),
    "peft.tuners.lora.torchao": ("TorchaoLoraLinear",),
}


def __getattr__(name: str) -> type[SpikingLayer]:
    for module, names in _SPIKING.items():
        if name in names:
            # It is in this module under its own name, so that a model can be pickled.
            layer_type = type(name, (SpikingLinear, getattr(import_module(module), name)), {"__module__": __name__})
            globals()[name] = layer_type
            return layer_type
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _are_alike(own: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, or were before TRL cast one of them to bfloat16."""
    if own.is_meta or other.is_meta or own.shape != other.shape:
        return False
    lower = min(own.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(own.to(lower), other.to(lower))


def is_grouped(layer: Any) -> bool:
    """Whether a layer's B has one block for each group of a convolution."""
    return getattr(layer.get_base_layer(), "groups", 1) > 1


def has_spiking_type(layer: nn.Module) -> bool:
    """Whether there is a spiking layer for a layer that PEFT made."""
    return type(layer).__name__ in _SPIKING.get(type(layer).__module__, ())


def make_spiking(layer: Any, adapter_name: str, config: LoraConfig, target_name: str) -> None:
    """Give a LoRA layer of PEFT the class of the same name here, and its adapter a gate."""
    layer.__class__ = getattr(import_module(__name__), type(layer).__name__)
    layer.target_name = target_name
    layer.lora_variant[adapter_name] = layer.resolve_lora_variant(config=config)
    layer.lora_variant[adapter_name].init(layer, adapter_name, config)


def make_plain(layer: Any, adapter_name: str) -> None:
    """Undo `make_spiking` on a layer with a single adapter."""
    layer.__class__ = next(base for base in type(layer).__mro__ if base.__module__ in _SPIKING)
    layer.lora_variant.pop(adapter_name, None)
    del layer.target_name, layer.lora_gate
    layer.__dict__.pop("_kept", None)
