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
from spikelora.peft.targets import check_scope, check_target
from spikelora.sparsity.batches import by_module, repeatable, run, warn_of_unreached
from spikelora.sparsity.observe import Gated, gates
from spikelora.sparsity.quantiles import QuantileSketch, common_threshold

# How far a module may be from its target with its best threshold: activations that repeat may allow no closer one.
MAX_MISS = 0.03
_MAX_MISS_OF_ALL = 0.005  # the same for the adapter as a whole, if it has the target
# A module settles once those before it have: a chain of this many modules settles, and longer ones nearly.
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
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    target_sparsity: float = 0.9,
    target_scope: str = "module",
) -> Calibration:
    """Set the thresholds so that a target share of the activations is silent on calibration data.

    `v_threshold` becomes the `target_sparsity` quantile of the module's own `v = a / tau`, over all ranks and all
    tokens that are not padding. The activations are not stored, see `quantiles.py`. With `target_scope="adapter"` it is
    the quantile of all modules together, see `quantiles.common_threshold`. If B is not 0, the new gates change what
    later modules see. So it goes in rounds, until each module is within 0.03 of the target, or the adapter within
    0.005, or eight rounds are over. A last pass measures the result.

    Args:
        model: a model with spiking adapters; those that are active are calibrated.
        batches: the model's keyword arguments, batch by batch, attention masks among them. They are used 2 to 9
            times; an iterator is turned into a list.
        target_sparsity: share of the elements of `gated` that are to be silent, between 0 and 1.
        target_scope: what has to reach the target: each "module", or the "adapter" as a whole.

    Returns:
        The new thresholds by module, or by `<module>.<adapter>` where several adapters ran, with the number of rounds
        and how far each module is from the target.

    Raises:
        SpikeLoraError: for a target outside (0, 1), an unknown scope, a model without spiking adapters, no batches or
            no tokens. If each module has to reach the target, also for a module whose activations are the same for all
            tokens, or for which no finite threshold comes within 0.03 of it. All thresholds are then as they were.
    """
    check_target("target_sparsity", target_sparsity)
    check_scope("target_scope", target_scope)
    is_common = target_scope == "adapter"
    before = {gated: gated.gate.v_threshold.detach().clone() for gated in gates(model)}
    batches = repeatable(batches)
    found: dict[Gated, float] = {}
    try:
        for rounds in range(_MAX_ROUNDS + 1):
            sketches, counts = _look(model, batches, f"calibrating, round {rounds + 1}" if rounds else "calibrating")
            off = {gated: (silent / n) - target_sparsity for gated, (silent, n) in counts.items()}
            missed = _missed_of_all(counts, target_sparsity) if is_common else _missed(off)
            if rounds == _MAX_ROUNDS or (rounds and not missed):
                break
            found |= (_common if is_common else _thresholds)(sketches, target_sparsity)
            _set(found)
    except BaseException:
        with torch.no_grad():
            for gated, v_threshold in before.items():
                gated.gate.v_threshold.copy_(v_threshold)
        raise
    warn_of_unreached(model, found, "their thresholds stay as they are")
    if missed:
        warnings.warn(
            f"After {rounds} rounds these are still off the target {target_sparsity:g}: {', '.join(missed)}. "
            "Calibrate again, or on more varied data.",
            RuntimeWarning,
            stacklevel=2,
        )
    silent, n_elements = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    return Calibration(by_module(found), rounds, silent / n_elements, by_module(off))


def _look(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], title: str
) -> tuple[dict[Gated, QuantileSketch], dict[Gated, tuple[int, int]]]:
    """For each module the quantiles of its `v`, how many of its elements are silent now, and how many there are.

    A `SparsityMeter` would add up over processes; here one of them may calibrate alone.
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


def _missed(off: Mapping[Gated, float]) -> list[str]:
    """The modules that are too far from the target."""
    return [f"`{name}` by {d:+.3f}" for name, d in by_module(off).items() if abs(d) > MAX_MISS]


def _missed_of_all(counts: Mapping[Gated, tuple[int, int]], target: float) -> list[str]:
    """The adapters that are too far from the target."""
    sums: dict[str, list[int]] = {}
    for gated, numbers in counts.items():
        sums[gated.adapter] = [a + b for a, b in zip(sums.get(gated.adapter, [0, 0]), numbers, strict=True)]
    off = {adapter: silent / n - target for adapter, (silent, n) in sums.items()}
    return [f"adapter {adapter!r} by {d:+.3f}" for adapter, d in off.items() if abs(d) > _MAX_MISS_OF_ALL]


def _common(sketches: Mapping[Gated, QuantileSketch], target: float) -> dict[Gated, float]:
    """The thresholds at which the modules of an adapter reach the target together."""
    found: dict[Gated, float] = {}
    for adapter in dict.fromkeys(gated.adapter for gated in sketches):
        shown = [gated for gated in sketches if gated.adapter == adapter]
        values, weights = zip(*(sketches[gated].kept() for gated in shown), strict=True)
        v_thresholds = common_threshold([v.double() for v in values], weights, target).float()
        found |= {g: v.item() for g, v in zip(shown, v_thresholds, strict=True) if v.isfinite()}
    return found


def _thresholds(sketches: Mapping[Gated, QuantileSketch], target: float) -> dict[Gated, float]:
    """For each module the threshold that comes closest to the target.

    Raises:
        SpikeLoraError: if none comes close.
    """
    found = {gated: _threshold(sketch, target, _rank(gated)) for gated, sketch in sketches.items()}
    # Not `abs(...) > MAX_MISS`, which a NaN would pass, as from activations that are NaN.
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
    """The threshold whose sparsity comes closest to the target, and that sparsity; NaN if there is none.

    If each rank has one value over several tokens, the gate does not depend on the input: whatever the threshold, the
    same ranks are always silent.
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
