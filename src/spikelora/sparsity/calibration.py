"""Thresholds from calibration data."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spikelora.errors import SpikeLoraError
from spikelora.method.neuron import charge
from spikelora.peft.config import check_target
from spikelora.sparsity.batches import by_module, repeatable, run, warn_of_unreached
from spikelora.sparsity.observe import Gated, gates
from spikelora.sparsity.quantiles import QuantileSketch

# How far from its target the best threshold of a module may leave it: activations that repeat allow no closer one.
MAX_MISS = 0.03
# A module settles once those before it have: a chain of as many modules does, and longer ones nearly.
_MAX_ROUNDS = 8


class Calibration(dict[str, float]):
    """The thresholds that `calibrate_thresholds` has set, by module or by `<module>.<adapter>`.

    Attributes:
        rounds: how often they were set.
        sparsity: share of silent elements over all modules, on the calibration data with the last thresholds.
        off: by module, its own sparsity minus the target.
    """

    def __init__(self, thresholds: Mapping[str, float], rounds: int, sparsity: float, off: dict[str, float]) -> None:
        super().__init__(thresholds)
        self.rounds = rounds
        self.sparsity = sparsity
        self.off = off


def calibrate_thresholds(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], target_sparsity: float = 0.9
) -> Calibration:
    """Set the threshold of each module so that a target share of its activations is silent on calibration data.

    `v_threshold` becomes the `target_sparsity` quantile of the module's own `v = a / tau`, over all ranks and all
    tokens that are no padding, without storing the activations, see `quantiles.py`. Where B is not 0, the
    new gates change what the modules behind them see. So it goes in rounds, until each module is within 0.03 of the
    target or eight rounds are over; a last pass measures.

    Args:
        model: a model with spiking adapters; those that are active are calibrated.
        batches: the model's keyword arguments, batch by batch, attention masks among them. They are used 2 to 9
            times; an iterator is turned into a list.
        target_sparsity: share of the elements of `gated` that shall be silent, between 0 and 1.

    Returns:
        The new thresholds by module, or by `<module>.<adapter>` where several adapters ran, with the number of rounds
        and how far each module is from the target.

    Raises:
        SpikeLoraError: for a target outside (0, 1), a model without spiking adapters, no batches, no tokens, or a
            module whose activations are the same for all tokens, or for which no finite threshold comes within 0.03 of
            the target; all are as they were then.
    """
    check_target("target_sparsity", target_sparsity)
    before = {gated: gated.gate.v_threshold.detach().clone() for gated in gates(model)}
    batches = repeatable(batches)
    found: dict[Gated, float] = {}
    try:
        for rounds in range(_MAX_ROUNDS + 1):
            sketches, counts = _look(model, batches, f"calibrating, round {rounds + 1}" if rounds else "calibrating")
            off = {gated: (silent / n) - target_sparsity for gated, (silent, n) in counts.items()}
            if rounds == _MAX_ROUNDS or (rounds and all(abs(distance) <= MAX_MISS for distance in off.values())):
                break
            found |= _thresholds(sketches, target_sparsity)
            _set(found)
    except BaseException:
        with torch.no_grad():
            for gated, v_threshold in before.items():
                gated.gate.v_threshold.copy_(v_threshold)
        raise
    warn_of_unreached(model, found, "their thresholds stay as they are")
    missed = [f"`{name}` by {d:+.3f}" for name, d in by_module(off).items() if abs(d) > MAX_MISS]
    if missed:
        warnings.warn(
            f"After {rounds} rounds these modules are still off the target {target_sparsity:g}: {', '.join(missed)}. "
            "Calibrate again, or on more varied data.",
            RuntimeWarning,
            stacklevel=2,
        )
    silent, n_elements = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    return Calibration(by_module(found), rounds, silent / n_elements, by_module(off))


def _look(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], title: str
) -> tuple[dict[Gated, QuantileSketch], dict[Gated, tuple[int, int]]]:
    """The quantiles of each module's `v`, and how many of its elements are silent now and how many there are.

    Counted here and not by a `SparsityMeter`, which adds up over processes: one of them may calibrate alone.
    """
    sketches: dict[Gated, QuantileSketch] = defaultdict(QuantileSketch)
    counts: dict[Gated, tuple[int, int]] = {}

    def see(gated: Gated, a: Tensor, mask: Tensor | None) -> None:
        v_threshold, tau = gated.gate.neuron()
        v = charge(a if mask is None else a[mask], tau)
        if len(v):
            sketches[gated].add(v)
            silent, n_elements = counts.get(gated, (0, 0))
            counts[gated] = silent + int((~(v >= v_threshold)).sum()), n_elements + v.numel()

    run(model, batches, see, title)
    return sketches, counts


def _thresholds(sketches: Mapping[Gated, QuantileSketch], target: float) -> dict[Gated, float]:
    """By module the threshold that comes closest to the target.

    Raises:
        SpikeLoraError: where none comes close.
    """
    found = {gated: _threshold(sketch, target, _rank(gated)) for gated, sketch in sketches.items()}
    # The other way round a share that is no number, as of activations that are none, would pass.
    missed = {g.module: share for g, (_, share) in found.items() if not abs(share - target) <= MAX_MISS}
    if missed:
        nearest = {name: "none" if math.isnan(share) else f"{share:.2f}" for name, share in missed.items()}
        raise SpikeLoraError(
            f"No threshold gives a sparsity near {target:g} in "
            f"{', '.join(f'`{name}` (nearest: {share})' for name, share in nearest.items())}: its activations are "
            "too few, constant, repeat too often, or are not finite. Calibrate on more varied data, with another "
            "target, or leave the module out when the adapter is made."
        )
    return {gated: v_threshold for gated, (v_threshold, _) in found.items()}


@torch.no_grad()
def _set(thresholds: Mapping[Gated, float]) -> None:
    for gated, v_threshold in thresholds.items():
        gated.gate.v_threshold.fill_(v_threshold)


def _threshold(sketch: QuantileSketch, target: float, r: int) -> tuple[float, float]:
    """The threshold whose sparsity comes closest to the target, and that sparsity; NaN where there is none.

    One value for each rank, over several tokens, is a module that gates nothing by its input: whatever the threshold,
    the same ranks are silent for good.
    """
    values, below = sketch.shares_below()
    is_constant = len(values) <= r < sketch.count
    values, below = values[values.isfinite()], below[values.isfinite()]
    if is_constant or not len(values):
        return math.nan, math.nan
    best = (below - target).abs().argmin()
    return values[best].item(), below[best].item()


def _rank(gated: Gated) -> int:
    layer: Any = gated.layer
    return layer.r[gated.adapter]
