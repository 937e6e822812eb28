"""Ranks that never fire, and their removal."""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spikelora.method.layers import is_grouped
from spikelora.sparsity.batches import by_module, run, warn_of_unreached
from spikelora.sparsity.observe import Gated, configs_of, gates


def prune_ranks(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Remove the ranks that never fire on calibration data: rows of `lora_A`, columns of `lora_B`.

    A silent rank adds nothing to `lora_B(gated)`, so the outputs on these data stay the same, except for rounding: `a`
    may differ in its last bit, and fall on the other side of the threshold. The scaling stays: for the rank `r'` that
    is left, `lora_alpha` becomes `lora_alpha * r' / r`, or `lora_alpha * sqrt(r' / r)` with rsLoRA. A module that is
    silent altogether keeps its first rank. A convolution with groups, and layers with tied matrices, keep all ranks.
    The configuration notes the ranks and alphas as `rank_pattern` and `alpha_pattern`, so the adapter can be saved and
    loaded. An optimiser that was made before still has the old parameters.

    Args:
        model: a model with spiking adapters, as PEFT makes it; those that are active are pruned.
        batches: the model's keyword arguments, batch by batch, attention masks among them.

    Returns:
        How many ranks were removed by module, or by `<module>.<adapter>` where several adapters ran.

    Raises:
        SpikeLoraError: for a model without spiking adapters or their configurations, no batches or no tokens. The model
            is then as it was.
    """
    fired: dict[Gated, Tensor] = {}

    def see(gated: Gated, a: Tensor, mask: Tensor | None) -> None:
        passes = gated.gate.spikes(a) | a.isnan()  # the gate does not hide a NaN
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
    return by_module({gated: int((~keep).sum()) for gated, keep in kept.items()})


def tied(found: Iterable[Gated]) -> set[Gated]:
    """The modules that share an A or a B, such as a head and the embedding that it is tied to."""
    owners: dict[int, list[Gated]] = defaultdict(list)
    for gated in found:
        layer: Any = gated.layer
        for part in layer.low_rank(gated.adapter):
            owners[part.data_ptr()].append(gated)
    return {gated for sharing in owners.values() if len(sharing) > 1 for gated in sharing}


def _kept(gated: Gated, fires: Tensor, is_tied: bool) -> Tensor:
    """A mask of the ranks that stay, `(r,)`."""
    # Each group of a convolution has its own ranks, and all groups have equally many.
    if is_tied or is_grouped(gated.layer):
        return torch.ones_like(fires)
    return fires if fires.any() else torch.arange(len(fires)) == 0


def _parts(gated: Gated, keep: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B with only the ranks to keep."""
    layer: Any = gated.layer
    A, B = layer.low_rank(gated.adapter)
    keep = keep.to(A.device)
    return (
        nn.Parameter(A.detach()[keep], A.requires_grad),
        nn.Parameter(B.detach()[:, keep].contiguous(), B.requires_grad),
    )


def _with_ranks(config: Any, layers: list[Any], adapter: str) -> Any:
    """A copy of a configuration whose patterns give each layer its present rank and alpha.

    Each key matches only one module: it begins with `^`, without which PEFT would also match the end of a name. The old
    keys are dropped: a saved configuration is sorted, and the first key that matches counts.
    """
    config = copy.copy(config)
    for pattern, field, default in (
        ("rank_pattern", "r", config.r),
        ("alpha_pattern", "lora_alpha", config.lora_alpha),
    ):
        values = {f"^{re.escape(layer.target_name)}": getattr(layer, field)[adapter] for layer in layers}
        setattr(config, pattern, {key: value for key, value in values.items() if value != default})
    return config
