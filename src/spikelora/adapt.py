"""What changes adapters by looking at calibration data."""

import copy
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikelora.config import check_target
from spikelora.errors import SpikeLoraError
from spikelora.layers import is_grouped
from spikelora.neuron import charge
from spikelora.observe import Gated, Observer, configs_of, gates, names, observing
from spikelora.quantiles import QuantileSketch

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
    tokens that are no padding, without storing the activations, see `quantiles.QuantileSketch`. Where B is not 0, the
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
    missed = [f"`{name}` by {d:+.3f}" for name, d in _by_module(off).items() if abs(d) > MAX_MISS]
    if missed:
        warnings.warn(
            f"After {rounds} rounds these modules are still off the target {target_sparsity:g}: {', '.join(missed)}. "
            "Calibrate again, or on more varied data.",
            RuntimeWarning,
            stacklevel=2,
        )
    silent, n_elements = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    return Calibration(_by_module(found), rounds, silent / n_elements, _by_module(off))


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


def prune_ranks(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Remove the ranks that never fire on calibration data: rows of `lora_A`, columns of `lora_B`.

    A silent rank adds nothing to `lora_B(gated)`, so that on these data the outputs stay the same, but for rounding:
    `a` may come out different in its last bit, and fall on the other side of the threshold. The scaling stays, as
    `lora_alpha` becomes `lora_alpha * r' / r`, with rsLoRA `lora_alpha * sqrt(r' / r)`, for the rank `r'` that is
    left. A module that is silent altogether keeps its first rank; a convolution with groups, and layers with tied
    matrices, keep all. The ranks and alphas are noted in the configuration, as `rank_pattern` and `alpha_pattern`, so
    that the adapter can be saved and loaded. An optimiser that was made before still has the old parameters.

    Args:
        model: a model with spiking adapters, as PEFT makes it; those that are active are pruned.
        batches: the model's keyword arguments, batch by batch, attention masks among them.

    Returns:
        How many ranks were removed by module, or by `<module>.<adapter>` where several adapters ran.

    Raises:
        SpikeLoraError: for a model without spiking adapters or configurations of them, no batches or no tokens; the
            model is as it was then.
    """
    fired: dict[Gated, Tensor] = {}

    def see(gated: Gated, a: Tensor, mask: Tensor | None) -> None:
        passes = gated.gate.spikes(a) | a.isnan()  # as the gate does not hide a NaN
        passes = passes if mask is None else passes[mask]
        if len(passes):
            fired[gated] = passes.any(0) | fired[gated] if gated in fired else passes.any(0)

    run(model, batches, see, "looking for silent ranks")
    configs = configs_of(model)  # where the ranks are noted
    warn_of_unreached(model, fired, "their ranks stay as they are")
    shared = tied(fired)
    kept = {gated: _kept(gated, fires, gated in shared) for gated, fires in fired.items()}
    pruned = {gated: _parts(gated, keep) for gated, keep in kept.items() if not keep.all()}
    # Nothing can fail any more.
    for gated, (A, B) in pruned.items():
        layer: Any = gated.layer
        layer.set_low_rank(gated.adapter, A, B)
    for adapter in {gated.adapter for gated in pruned}:
        layers = [gated.layer for gated in gates(model) if gated.adapter == adapter]
        configs[adapter] = _with_ranks(configs[adapter], layers, adapter)
    return _by_module({gated: int((~keep).sum()) for gated, keep in kept.items()})


def repeatable(batches: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Batches that can be used more than once.

    Raises:
        SpikeLoraError: for what holds no batches, such as a single one.
    """
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        raise SpikeLoraError(
            f"`batches` must be a list of batches, or another iterable of them, got a {type(batches).__name__}: "
            "put a single batch into a list."
        )
    return list(batches) if isinstance(batches, Iterator) else batches


@torch.no_grad()
def run(model: nn.Module, batches: Iterable[Mapping[str, Any]], observer: Observer, title: str) -> None:
    """Show the observer all activations of a model in evaluation mode, over batches of its keyword arguments.

    Raises:
        SpikeLoraError: where there is no spiking adapter, no batch, or no token in them that reaches an adapter.
    """
    device = gates(model)[0].gate.tau.device
    batches = repeatable(batches)
    modes = {module: module.training for module in model.modules()}
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
                sizes = [v.numel() for v in inputs.values() if isinstance(v, Tensor)]
                if any(sizes) or not sizes:  # models fail on batches without any token
                    _call(model, inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not n_batches:
        raise SpikeLoraError("`batches` is empty; give at least one, and a list where it is used more than once.")
    if not n_tokens:
        raise SpikeLoraError("`batches` has no token that reaches an active spiking adapter, or all are padding.")


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    try:
        model(**inputs)
    except SpikeLoraError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        if not any(isinstance(value, Tensor) for value in inputs.values()):
            kinds = ", ".join(f"`{name}` is a {type(value).__name__}" for name, value in inputs.items())
            raise SpikeLoraError(f"`batches` must hold tensors, but {kinds or 'a batch is empty'}.") from error
        if isinstance(error, ValueError) or "unexpected keyword argument" in str(error):
            raise SpikeLoraError(f"`batches` does not hold what the model takes: {error}") from error
        raise


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


def warn_of_unreached(model: nn.Module, reached: Iterable[Gated], outcome: str) -> None:
    """Warn of the modules that calibration data did not reach, though they have an adapter that ran elsewhere."""
    reached = list(reached)
    adapters = {gated.adapter for gated in reached}
    unreached = {g.module for g in gates(model) if g.adapter in adapters} - {gated.module for gated in reached}
    if unreached:
        warnings.warn(
            f"No calibration data reached {', '.join(sorted(unreached))}: {outcome}.", RuntimeWarning, stacklevel=3
        )


def _by_module(values: Mapping[Gated, Any]) -> dict[str, Any]:
    return dict(zip(names(values), values.values(), strict=True))


def tied(found: Iterable[Gated]) -> set[Gated]:
    """Those that share an A or a B, as a head that is tied to its embedding does."""
    owners: dict[int, list[Gated]] = defaultdict(list)
    for gated in found:
        layer: Any = gated.layer
        for part in layer.low_rank(gated.adapter):
            owners[part.data_ptr()].append(gated)
    return {gated for sharing in owners.values() if len(sharing) > 1 for gated in sharing}


def _kept(gated: Gated, fires: Tensor, is_tied: bool) -> Tensor:
    """Which ranks stay, `(r,)`."""
    # Each group of a convolution has its own ranks, and as many as the others.
    if is_tied or is_grouped(gated.layer):
        return torch.ones_like(fires)
    return fires if fires.any() else torch.arange(len(fires)) == 0


def _parts(gated: Gated, keep: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B with the ranks to keep alone."""
    layer: Any = gated.layer
    A, B = layer.low_rank(gated.adapter)
    keep = keep.to(A.device)
    return (
        nn.Parameter(A.detach()[keep], A.requires_grad),
        nn.Parameter(B.detach()[:, keep].contiguous(), B.requires_grad),
    )


def _with_ranks(config: Any, layers: list[Any], adapter: str) -> Any:
    """A copy of a configuration whose patterns give each layer the rank and the alpha that it has.

    Each key matches one module alone: PEFT lets a key match the end of a name as well, but not one that begins with
    `^`. The keys of before go: a saved configuration is sorted, and the first key that matches counts.
    """
    config = copy.copy(config)
    for pattern, field, default in (
        ("rank_pattern", "r", config.r),
        ("alpha_pattern", "lora_alpha", config.lora_alpha),
    ):
        values = {f"^{re.escape(layer.target_name)}": getattr(layer, field)[adapter] for layer in layers}
        setattr(config, pattern, {key: value for key, value in values.items() if value != default})
    return config
