"""Conversion of a trained LoRA to SpikeLoRA, and of SpikeLoRA to a mergeable LoRA; both say what is lost."""

import copy
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from spikelora.conversion.moments import Moments, exact, lost_share
from spikelora.conversion.pruning import tied
from spikelora.errors import SpikeLoraError
from spikelora.method.layers import SpikingLayer, is_grouped, make_plain, make_spiking
from spikelora.peft.adapter_files import as_path
from spikelora.peft.config import SpikeLoraConfig
from spikelora.peft.read_not_called import check_called
from spikelora.peft.targets import check_target
from spikelora.peft.tuner import SpikeLoraModel, check_supported
from spikelora.sparsity.batches import repeatable, run, warn_of_unreached
from spikelora.sparsity.calibration import Calibration, calibrate_thresholds
from spikelora.sparsity.observe import Gated, gates

# A gate that always fires; a threshold has to be finite.
_OPEN = torch.finfo(torch.float32).min


def from_lora(model: PeftModel, batches: Iterable[Mapping[str, Any]], target_sparsity: float = 0.9) -> PeftModel:
    """Turn the trained LoRA adapter of a model, in place, into a SpikeLoRA adapter of a target sparsity.

    A gate passes only one side of `a`. LoRA stays the same if a row of A and its column of B change sign together. So
    each rank gets the sign whose passing side weighs more: `sum(a * |a|) >= 0` over the calibration tokens. Then the
    thresholds are calibrated in rounds, because the gates change what later modules see. This ends when each module is
    within 0.03 of the target; after eight rounds a deep model may still be off. The function prints the sparsity that
    was reached and, per module and overall, what the update loses on the calibration data, at the inputs that the new
    adapter sees: `E|dLoRA - dSpike|^2 / E|dLoRA|^2`, with `dLoRA = scaling * B a` and `dSpike = scaling * B gated`.

    Name, rank, scaling, dropout and targets of the adapter stay. The neuron has the default `tau`. A module that no
    calibration token reaches keeps an open gate, and stays LoRA.

    Args:
        model: a `PeftModel` with one plain LoRA adapter, not merged.
        batches: the model's keyword arguments, batch by batch, attention masks among them. They are used
            4 to 11 times; an iterator is turned into a list.
        target_sparsity: share of the elements of `gated` that are to be silent, between 0 and 1.

    Returns:
        The same model, whose adapter now spikes.

    Raises:
        SpikeLoraError: for a model or an adapter of another kind, LoRA variants, `lora_bias`, several adapters, layers
            that SpikeLoRA does not support, and all that `calibrate_thresholds` refuses. The model is then as it was.
    """
    check_target("target_sparsity", target_sparsity)
    adapter, config, layers = _plain_lora(model)
    batches = repeatable(batches)
    with ExitStack() as undo:
        undo.callback(_restore_lora, model, adapter, model.peft_config[adapter], layers)
        _open_gates(model, adapter, config, layers)
        _refuse_tied(gates(model))
        for gated, signs in _signs(model, batches).items():
            undo.callback(_flip, gated, signs)
            _flip(gated, signs)
        calibration = calibrate_thresholds(model, batches, target_sparsity)
        moments = _second_moments(model, batches, "measuring")
        undo.pop_all()
    _print_loss(moments, calibration, target_sparsity)
    return model


@dataclass(frozen=True)
class LoraApproximation:
    """The LoRA adapter that comes closest to a SpikeLoRA adapter, see `to_lora`.

    Attributes:
        config: its configuration.
        tensors: its tensors by their names in an adapter's file.
        errors: share of the update that it misses on the calibration data, for each module that they reached:
            `E|dSpike - dLoRA|^2 / E|dSpike|^2`, with `dSpike = scaling * B gated` and `dLoRA = scaling * B' a`.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    errors: dict[str, float]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter as PEFT does, for `PeftModel.from_pretrained(base, folder).merge_and_unload()`.

        The old configuration is removed first and the new one written last: if the writing is interrupted, nothing
        loads.
        """
        folder = as_path("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        save_file(self.tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config.save_pretrained(folder)


def to_lora(model: PeftModel, batches: Iterable[Mapping[str, Any]]) -> LoraApproximation:
    """The LoRA adapter, of the same rank and A, that comes closest to the active SpikeLoRA adapter on calibration data.

    `B' = B C` with `C = E[gated a^T] (E[a a^T])^+` `(r, r)`: the least squares of `gated` on `a` over the tokens, from
    the activations' second moments, module by module at the inputs that the SpikeLoRA model sees. For Gaussian inputs
    no other A does better: `gated` is a function of `a = A x` alone, and its best linear prediction from `x` is one
    from `a` (Bussgang, 1952). The model stays as it is.

    Args:
        model: a `PeftModel` with one active SpikeLoRA adapter.
        batches: the model's keyword arguments, batch by batch, attention masks among them.

    Returns:
        The adapter, and the measured error of each module. A module that no token reached has B' = 0 and no error.

    Raises:
        SpikeLoraError: for a model without spiking adapters or with several active ones, no batches, no tokens, or
            activations that are not finite.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, SpikeLoraModel):
        raise SpikeLoraError(
            f"This {type(model).__name__} has no spiking adapter as PEFT makes it. Give the model of "
            "`get_peft_model(model, SpikeLoraConfig(...))` or `PeftModel.from_pretrained`."
        )
    if len(model.active_adapters) != 1:
        raise SpikeLoraError(
            f"{len(model.active_adapters)} adapters are active, and only one can be turned into LoRA at a time. Choose "
            "it with `set_adapter`."
        )
    (adapter,) = model.active_adapters
    found = [gated for gated in gates(model) if gated.adapter == adapter]
    for gated in found:
        _refuse_groups(gated.module, gated.layer)
    _refuse_tied(found)
    moments = {g: m for g, m in _second_moments(model, batches, "regressing").items() if g.adapter == adapter}
    warn_of_unreached(model, moments, "their update is 0 in the LoRA")
    state = model.state_dict()
    keys = {parameter: name for name, parameter in model.named_parameters()}
    errors = {}
    for gated in found:
        parameter, B = _B(gated)
        if gated in moments:
            linear_B = (exact(B) @ moments[gated].regression()).to(B)
            errors[gated.module] = lost_share(moments[gated].distance(B, linear_B), moments[gated].spiking(B))
        else:
            linear_B = torch.zeros_like(B)
        state[keys[parameter]] = linear_B.view_as(parameter)
    tensors = get_peft_model_state_dict(model, state, adapter)
    return LoraApproximation(
        _lora_config(model, adapter),
        {
            name: t.detach().to("cpu", copy=True).contiguous()
            for name, t in tensors.items()
            if ".lora_gate." not in name
        },
        errors,
    )


def _second_moments(model: nn.Module, batches: Iterable[Mapping[str, Any]], title: str) -> dict[Gated, Moments]:
    sums: dict[Gated, Moments] = {}

    def see(gated: Gated, a: Tensor, mask: Tensor | None) -> None:
        a = a if mask is None else a[mask]
        if len(a):
            new = Moments.of(a, torch.where(gated.gate.spikes(a), a, 0))
            sums[gated] = sums[gated].plus(new) if gated in sums else new

    run(model, batches, see, title)
    for gated, moments in sums.items():
        if not moments.aa.isfinite().all():
            raise SpikeLoraError(
                f"The activations of `{gated.module}` are not finite on these batches. Look for NaN or infinity in "
                "the model's inputs and weights."
            )
    return sums


def _plain_lora(model: nn.Module) -> tuple[str, SpikeLoraConfig, dict[str, Any]]:
    """Name, spiking configuration and layers of the one LoRA adapter of a model, if it can be made to spike."""
    if not isinstance(model, PeftModel) or type(model.base_model) is not LoraModel:
        raise SpikeLoraError(
            f"This {type(model).__name__} has no LoRA adapter as PEFT makes it. Give the model of "
            "`get_peft_model(model, LoraConfig(...))` or `PeftModel.from_pretrained`."
        )
    if len(model.peft_config) != 1:
        raise SpikeLoraError(
            f"The model has the adapters {', '.join(map(repr, model.peft_config))}, and only a single one can be made "
            "to spike. Take the others off with `delete_adapter`, or load that one by itself."
        )
    ((adapter, plain),) = model.peft_config.items()
    values = {f.name: copy.copy(getattr(plain, f.name)) for f in fields(LoraConfig) if f.init}
    if values["init_lora_weights"] == "orthogonal":  # an initialisation that leaves the base weight as it is
        values["init_lora_weights"] = True
    config = SpikeLoraConfig(**values)
    base = model.base_model.model
    layers: dict[str, Any] = {}
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            check_supported(layer, name, layer.get_base_layer())
            check_called(base.get_submodule(name.rpartition(".")[0]), name)
            _refuse_groups(name, layer)
            if layer.merged:
                raise SpikeLoraError(f"The adapter is merged into `{name}`. Call `unmerge_adapter` first.")
            layers[name] = layer
    return adapter, config, layers


def _open_gates(model: PeftModel, adapter: str, config: SpikeLoraConfig, layers: dict[str, Any]) -> None:
    """Turn the adapter into a spiking one whose gates always fire; it computes the same."""
    for name, layer in layers.items():
        make_spiking(layer, adapter, config, name)
        layer.lora_gate[adapter].train(layer.training).v_threshold.data.fill_(_OPEN)
    model.base_model.__class__ = SpikeLoraModel
    model.peft_config[adapter] = config
    model.peft_type = config.peft_type


def _restore_lora(model: PeftModel, adapter: str, config: LoraConfig, layers: dict[str, Any]) -> None:
    for layer in layers.values():
        if isinstance(layer, SpikingLayer):
            make_plain(layer, adapter)
    model.base_model.__class__ = LoraModel
    model.peft_config[adapter] = config
    model.peft_type = config.peft_type


def _signs(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[Gated, Tensor]:
    """The sign `(r,)` for each rank that makes the side of `a` with the larger sum of squares positive."""
    sums: dict[Gated, Tensor] = {}

    def see(gated: Gated, a: Tensor, mask: Tensor | None) -> None:
        a = exact(a if mask is None else a[mask])
        sums[gated] = sums.get(gated, 0) + (a * a.abs()).sum(0)

    run(model, batches, see, "choosing signs")
    return {gated: torch.where(total < 0, -1.0, 1.0) for gated, total in sums.items()}


@torch.no_grad()
def _flip(gated: Gated, signs: Tensor) -> None:
    """Change the sign of the ranks with sign -1, in A and in B; a second call changes it back."""
    layer: Any = gated.layer
    A, B = layer.low_rank(gated.adapter)
    signs = signs.to(A.device)
    A.mul_(signs.view(-1, *[1] * (A.dim() - 1)))
    B.mul_(signs.view(-1, *[1] * (B.dim() - 2)))


def _print_loss(moments: dict[Gated, Moments], calibration: Calibration, target_sparsity: float) -> None:
    lost_overall = whole_overall = 0.0
    print("What gating loses of the update, E|dLoRA - dSpike|^2 / E|dLoRA|^2 on the calibration data:")
    for gated, moment in moments.items():
        layer: Any = gated.layer
        B = _B(gated)[1] * layer.scaling[gated.adapter]
        lost, whole = moment.distance(B, B), moment.linear(B)
        lost_overall, whole_overall = lost_overall + lost, whole_overall + whole
        sparsity = target_sparsity + calibration.off.get(gated.module, math.nan)
        print(f"  {gated.module}: {lost_share(lost, whole):.4f} at sparsity {sparsity:.4f}")
    print(f"  overall: {lost_share(lost_overall, whole_overall):.4f} at sparsity {calibration.sparsity:.4f}")


def _B(gated: Gated) -> tuple[nn.Parameter, Tensor]:
    """B as it is in the layer, and as a matrix `(out, r)`."""
    layer: Any = gated.layer
    _, B = layer.low_rank(gated.adapter)
    return B, B.detach().flatten(1)  # a convolution's is a kernel of one position


def _refuse_groups(name: str, layer: Any) -> None:
    if is_grouped(layer):
        raise SpikeLoraError(
            f"`{name}` is a convolution with groups, whose B is in blocks: it cannot be turned from LoRA to SpikeLoRA "
            "or back. Train the adapter without it, through `target_modules` or `exclude_modules`."
        )


def _refuse_tied(found: list[Gated]) -> None:
    if shared := sorted(gated.module for gated in tied(found)):
        raise SpikeLoraError(
            f"{' and '.join(f'`{name}`' for name in shared)} share their matrices by `ensure_weight_tying`, and each "
            "would need others. Train the adapter without one of them, through `target_modules` or `exclude_modules`."
        )


def _lora_config(model: PeftModel, adapter: str) -> LoraConfig:
    config = copy.deepcopy(model.peft_config[adapter]).without_neuron()
    # As PEFT does when it saves: the tensors are there, and are not to be initialised.
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    config.inference_mode = True
    config.init_lora_weights = True
    return config
