"""SpikeLoRA as a tuner of PEFT: LoRA's layers with a gate, LoRA's model with its refusals.

PEFT builds LoRA's layer for a target; the layer then takes the class of the same name here, whose only LoRA variant is
the gated one. A type of layer that is not listed in `_SPIKING_LAYERS` is refused: it could run without its gate.
"""

import math
import re
import warnings
from typing import Any, NoReturn

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from spikelora.adapter_files import check_tensors
from spikelora.config import SpikeLoraConfig
from spikelora.errors import SpikeLoraError
from spikelora.gate import SpikeGate
from spikelora.ops.linear import spike_branch, spike_linear
from spikelora.paths import Choice, Path, choose, returns_private


def _refuse_merging(*args: Any, **kwargs: Any) -> NoReturn:
    raise SpikeLoraError(
        "A SpikeLoRA adapter cannot be merged, weighted or turned into a weight: its gate depends on the input. Serve "
        "it unmerged, or make a mergeable LoRA of it with `to_lora(model, batches)`, which says how far that is off."
    )


class NoMatchingModuleError(SpikeLoraError, NoMatchingPeftModuleError):
    """Raised where an adapter would adapt no module at all."""


class SpikeLinearVariant(LoraVariant):
    """The gated forward of a linear layer, in PEFT's terms a variant of LoRA's."""

    @staticmethod
    def init(module: "Linear", adapter_name: str, config: SpikeLoraConfig, **kwargs: Any) -> None:
        if "lora_gate" not in module._modules:
            module.lora_gate = nn.ModuleDict()
        # Where the layer was built PEFT told it its name; EVA, which builds adapters anew, does not tell it again.
        pattern = get_pattern_key(config.threshold_pattern.keys(), module.kwargs["target_name"])
        v_threshold = config.threshold_pattern.get(pattern, config.v_threshold)
        gate = SpikeGate(v_threshold, config.tau, config.surrogate_alpha, config.learn_threshold, config.learn_tau)
        # A is where the adapter belongs by now. PEFT's own mover would also cast A and B of a trained LoRA.
        module.lora_gate[adapter_name] = gate.to(module.lora_A[adapter_name].weight.device)

    @staticmethod
    def forward(module: "Linear", active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        adapter = choose(module, active_adapter, x).adapter
        if adapter is not None:  # beside others, or for a part of the batch; the same as what follows, see `paths`
            return spike_branch(result, x, adapter, returns_private(module.base_layer))
        a = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        gated = module.lora_gate[active_adapter](a)
        return result + module.lora_B[active_adapter](gated) * module.scaling[active_adapter]

    merge_safe = merge_unsafe = unmerge = staticmethod(_refuse_merging)


class Linear(LoraLinear):
    """LoRA's linear layer with a gate on each adapter, for `nn.Linear` and transformers' `Conv1D`.

    `y = base(x) + scaling * lora_B(gated)` with `a = lora_A(dropout(x))` `(..., r)` and `gated = lora_gate(a)`: module
    by module in `SpikeLinearVariant.forward`, or as one function with the same values, see `path`.
    """

    adapter_layer_names = (*LoraLinear.adapter_layer_names, "lora_gate")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # PEFT's forward, which also serves disabled, several and mixed adapters, runs the base layer and copies x to
        # the adapter's dtype before it asks the variant.
        adapters = self.active_adapters
        if args or kwargs or self.disable_adapters or len(adapters) != 1 or adapters[0] not in self.lora_gate:
            return super().forward(x, *args, **kwargs)
        choice = choose(self, adapters[0], x)
        if choice.adapter is None:
            return super().forward(x)
        base = self.base_layer
        if choice.path is Path.BRANCH:
            return spike_branch(base(x), x, choice.adapter, returns_private(base))
        weight = base.weight if type(base) is nn.Linear else base.weight.T  # as Conv1D stores it
        return spike_linear(x, weight, base.bias, choice.adapter)

    def path(self, x: Tensor) -> Choice:
        """The path that `forward` takes for an input `x (..., in)`, and why."""
        adapters = [name for name in self.active_adapters if name in self.lora_gate]
        if self.disable_adapters or not adapters:
            return Choice(Path.PLAIN, "no adapter is active here: the base layer runs alone")
        choice = choose(self, adapters[0], x)
        if len(self.active_adapters) > 1 and choice.path is Path.FUSED:
            return choice._replace(path=Path.BRANCH, reason="several adapters are active")
        return choice

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant:
        if not isinstance(config, SpikeLoraConfig):
            raise SpikeLoraError(
                f"A spiking layer takes a SpikeLoraConfig, got a {type(config).__name__}; adapters of other methods go "
                "on a model of their own."
            )
        return SpikeLinearVariant()

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | list[str] | None = None) -> None:
        super()._freeze_non_trainable_peft_weights(adapter_names)
        for gate in self.lora_gate.values():
            gate.freeze_fixed()

    merge = get_delta_weight = _refuse_merging

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def neuron(self, adapter_name: str) -> dict[str, float]:
        """Rank, threshold and time constant of one adapter, by their symbols; no number while on the meta device."""
        tensors = {"v_threshold": self.lora_gate[adapter_name].v_threshold, "tau": self.lora_gate[adapter_name].tau}
        values = {symbol: math.nan if t.is_meta else t.detach().item() for symbol, t in tensors.items()}
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


_SPIKING_LAYERS: dict[type[LoraLayer], type[Linear]] = {LoraLinear: Linear}

# Modules whose weight transformers hands to a function of its own, by model type; PEFT knows only some of them.
_READ_NOT_CALLED = (
    (
        {"bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h", "zamba2"},
        r"(^|\.)(conv1d|dt_proj|out_proj)$",
    ),
    ({"mobilebert"}, r"predictions\.dense$"),
    ({"wavlm"}, r"\.attention\.\w+_proj$"),
)


class SpikeLoraModel(LoraModel):
    """Puts SpikeLoRA adapters into a model; made by `get_peft_model` and PEFT's loaders for a `SpikeLoraConfig`.

    Takes what `LoraModel` takes.

    Raises:
        SpikeLoraError: for a target that is no plain linear layer, for damaged adapter tensors, and for every attempt
            to merge, weight or convert.
    """

    @staticmethod
    def _create_new_module(
        lora_config: SpikeLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        plain_config = lora_config.without_neuron()
        try:
            layer = LoraModel._create_new_module(plain_config, adapter_name, target, **kwargs)
        except ValueError as error:
            if "is not supported" not in str(error):
                raise
            raise _unsupported(kwargs["target_name"], target) from error
        check_supported(layer, kwargs["target_name"], target)
        lora_config.fan_in_fan_out = plain_config.fan_in_fan_out  # PEFT corrects it for each layer
        make_spiking(layer, adapter_name, lora_config)
        return layer

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if not isinstance(config, SpikeLoraConfig):
            raise SpikeLoraError(
                f"SpikeLoraModel takes a SpikeLoraConfig, got a {type(config).__name__}; adapters of other methods go "
                "on a model of their own."
            )
        config.check()  # it may have been changed since it was made

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingModuleError(f'{error} `target_modules="all-linear"` takes every linear layer.') from error
        patterns = self.peft_config[adapter_name].threshold_pattern
        matched = {get_pattern_key([key], name) for key in patterns for name in self.targeted_module_names}
        unmatched = sorted(patterns.keys() - matched)
        if unmatched:
            warnings.warn(
                f"The following threshold_pattern keys did not match any targeted module: {unmatched}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _create_and_replace(
        self,
        lora_config: SpikeLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        check_called(self.model, parent, current_key)
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SpikeLoraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT's check for shards that were not gathered goes by the method's name.
        _validate_lora_adapter_state_dict(selected, adapter_name)
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SpikeLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_tensors(state_dict)
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _check_fit(model, adapter_name, state_dict)
        # With low_cpu_mem_usage the file's tensors take the place of the gate's, dtype and all.
        return {key: value.float() if ".lora_gate." in key else value for key, value in state_dict.items()}

    def _check_merge_allowed(self) -> None:
        _refuse_merging()

    add_weighted_adapter = subtract_mutated_init = _refuse_merging
    _convert_state_dict_for_initial_model = classmethod(_refuse_merging)


def make_spiking(layer: Any, adapter_name: str, config: SpikeLoraConfig) -> None:
    """Give a supported LoRA layer of PEFT the class of the same name here, and its adapter a gate."""
    layer.__class__ = _SPIKING_LAYERS[type(layer)]
    layer.lora_variant[adapter_name] = layer.resolve_lora_variant(config=config)
    layer.lora_variant[adapter_name].init(layer, adapter_name, config)


def check_supported(layer: nn.Module, name: str, target: nn.Module) -> None:
    """Raise a `SpikeLoraError` where the layer that PEFT made for a target has no spiking counterpart."""
    # `nn.MultiheadAttention` takes the weight of its `out_proj` and never calls it.
    if type(layer) not in _SPIKING_LAYERS or isinstance(target, NonDynamicallyQuantizableLinear):
        raise _unsupported(name, target)


def check_called(model: nn.Module, parent: nn.Module, name: str) -> None:
    """Raise a `SpikeLoraError` where the model takes the weight of a target and never calls it."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    bypassed = (pattern for types, pattern in _READ_NOT_CALLED if model_type in types)
    if isinstance(parent, nn.TransformerEncoderLayer) or any(re.search(p, name) for p in bypassed):
        raise SpikeLoraError(
            f"Target module `{name}` is read by its model, not called: the gate would never run. Leave it out through "
            "`target_modules` or `exclude_modules`."
        )


def _unsupported(name: str, target: nn.Module) -> SpikeLoraError:
    return SpikeLoraError(
        f"Target module `{name}` is a {type(target).__name__}, on which SpikeLoRA is not supported: it could run "
        "without its gate. Supported are `torch.nn.Linear`, neither quantised nor parallel, and "
        "`transformers.pytorch_utils.Conv1D`; leave the module out through `target_modules` or `exclude_modules`."
    )


def _check_fit(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse a file that is not for this model: every tensor of the adapter has to be there, in its shape."""
    for key, expected in model.state_dict().items():
        if ".lora_" not in key or f".{adapter_name}." not in key:
            continue
        if key not in state_dict:
            raise SpikeLoraError(
                f"The adapter's file has nothing for `{key}`: it was trained on another base model, or with other "
                "`target_modules` than its adapter_config.json has now."
            )
        if state_dict[key].shape != expected.shape:
            raise SpikeLoraError(
                f"`{key}` has the shape {tuple(state_dict[key].shape)} in the adapter's file and "
                f"{tuple(expected.shape)} in the model: the adapter was trained on another base model, or `r` or "
                "`rank_pattern` in its adapter_config.json was changed."
            )
