"""What changes adapters by looking at calibration data."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikelora.config import check_target
from spikelora.errors import SpikeLoraError
from spikelora.neuron import charge
from spikelora.observe import Gated, Observer, gates, observing
from spikelora.quantiles import QuantileSketch

# How far from its target the best threshold of a module may leave it: activations that repeat allow no closer one.
_MAX_MISS = 0.03


def calibrate_thresholds(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], target_sparsity: float = 0.9
) -> dict[str, float]:
    """Set the threshold of each module so that a target share of its activations is silent on calibration data.

    `v_threshold` becomes the `target_sparsity` quantile of the module's own `v = a / tau`, over all ranks and all
    tokens that are no padding. One pass, without storing the activations, see `quantiles.QuantileSketch`. Meant for
    before the training, when B = 0: afterwards the new gates change what the modules behind them see, so that a second
    pass may be wanted.

    Args:
        model: a model with spiking adapters; those that are active are calibrated.
        batches: the model's keyword arguments, batch by batch, attention masks among them.
        target_sparsity: share of the elements of `gated` that shall be silent, between 0 and 1.

    Returns:
        The new thresholds by module, or by `<module>.<adapter>` where several adapters ran.

    Raises:
        SpikeLoraError: for a target outside (0, 1), a model without spiking adapters, no batches, no tokens, or
            activations for which no threshold comes within 0.03 of the target; all thresholds are as they were then.
    """
    check_target("target_sparsity", target_sparsity)
    sketches: dict[Gated, QuantileSketch] = defaultdict(QuantileSketch)

    def see(gated: Gated, a: Tensor, mask: Tensor | None) -> None:
        v = charge(a, gated.gate.neuron()[1])
        sketches[gated].add(v if mask is None else v[mask])

    run(model, batches, see, "calibrating")
    found = {gated: _threshold(sketch, target_sparsity) for gated, sketch in sketches.items()}
    missed = {gated.module: share for gated, (_, share) in found.items() if abs(share - target_sparsity) > _MAX_MISS}
    if missed:
        raise SpikeLoraError(
            f"No threshold gives a sparsity near {target_sparsity:g} in "
            f"{', '.join(f'`{name}` (nearest: {share:.2f})' for name, share in missed.items())}: many of its "
            "activations have the same value. Calibrate on more varied data, or with another target."
        )
    _warn_of_unreached(model, {gated.module for gated in found}, {gated.adapter for gated in found})
    with torch.no_grad():
        for gated, (v_threshold, _) in found.items():
            gated.gate.v_threshold.fill_(v_threshold)
    several = len({gated.adapter for gated in found}) > 1
    return {
        f"{gated.module}.{gated.adapter}" if several else gated.module: v_threshold
        for gated, (v_threshold, _) in found.items()
    }


@torch.no_grad()
def run(model: nn.Module, batches: Iterable[Mapping[str, Any]], observer: Observer, title: str) -> None:
    """Show the observer all activations of a model in evaluation mode, over batches of its keyword arguments.

    Raises:
        SpikeLoraError: where there is no spiking adapter, no batch, or no token in them that reaches an adapter.
    """
    modes = {module: module.training for module in model.modules()}
    device = gates(model)[0].gate.tau.device
    n_batches = n_tokens = 0

    def count_and_see(gated: Gated, a: Tensor, mask: Tensor | None) -> None:
        nonlocal n_tokens
        n_tokens += a.shape[0] if mask is None else int(mask.sum())
        observer(gated, a, mask)

    model.eval()
    try:
        with observing(model, count_and_see):
            for batch in tqdm(batches, desc=title, unit="batch", leave=False):
                n_batches += 1
                if not isinstance(batch, Mapping):
                    raise SpikeLoraError(
                        f"`batches` must give the model's keyword arguments, such as "
                        f"`{{'input_ids': ..., 'attention_mask': ...}}`, got a {type(batch).__name__}."
                    )
                inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
                if any(v.numel() for v in inputs.values() if isinstance(v, Tensor)):
                    model(**inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not n_batches:
        raise SpikeLoraError("`batches` is empty; give at least one, and a list where it is used more than once.")
    if not n_tokens:
        raise SpikeLoraError("`batches` has no token that reaches an active spiking adapter, or all are padding.")


def _threshold(sketch: QuantileSketch, target: float) -> tuple[float, float]:
    """The threshold whose sparsity comes closest to the target, and that sparsity."""
    values, below = sketch.shares_below()
    if not len(values):
        return math.nan, math.nan
    best = (below - target).abs().argmin()
    return values[best].item(), below[best].item()


def _warn_of_unreached(model: nn.Module, reached: set[str], adapters: set[str]) -> None:
    unreached = sorted({g.module for g in gates(model) if g.adapter in adapters} - reached)
    if unreached:
        warnings.warn(
            f"No calibration data reached {', '.join(unreached)}: their thresholds stay as they are.",
            RuntimeWarning,
            stacklevel=3,
        )
