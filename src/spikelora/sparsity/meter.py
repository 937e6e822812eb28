"""How sparse a model's adapters are, measured over everything that runs."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikelora.errors import SpikeLoraError
from spikelora.method.sharding import add_up_processes, whole
from spikelora.sparsity.observe import Gated, gates, names, observing

if TYPE_CHECKING:
    from pandas import DataFrame


# The file in which a run leaves `SparsityReport.to_dict()` as JSON.
SPARSITY_FILE = "sparsity.json"


@dataclass(frozen=True)
class Sparsity:
    """Shares of what ran, between 0 and 1; NaN if no token ran.

    Attributes:
        sparsity: silent elements of `gated`, those without a spike.
        silent_tokens: tokens without any spike in a module.
        zero_threshold_sparsity: elements that would be silent at `v_threshold = 0`, which is mere rectification.
        tokens: count of tokens, once for each module that they reached; padding is left out if a mask was given.
    """

    sparsity: float
    silent_tokens: float
    zero_threshold_sparsity: float
    tokens: int


@dataclass(frozen=True)
class ModuleSparsity(Sparsity):
    """The same of one adapter in one module.

    Attributes:
        module: its name in the model that was adapted.
        adapter: name of the adapter.
        layer: the name up to its first number, such as `model.layers.0`; empty if it has none.
        kind: the last part of the name, such as `q_proj`, or as many parts as tell the modules of a layer apart.
        v_threshold: firing threshold at the time of the report.
        tau: membrane time constant at the time of the report.
        firing_rates: share of the tokens at which each rank spiked, of length r.
        dead_ranks: the ranks that never spiked.
    """

    module: str
    adapter: str
    layer: str
    kind: str
    v_threshold: float
    tau: float
    firing_rates: tuple[float, ...]
    dead_ranks: tuple[int, ...]


@dataclass(frozen=True)
class SparsityReport(Sparsity):
    """What a `SparsityMeter` measured: overall, and by module, kind of module and layer.

    `modules` has the names of the modules as keys, or `<module>.<adapter>` where several adapters ran.
    """

    modules: dict[str, ModuleSparsity]
    kinds: dict[str, Sparsity]
    layers: dict[str, Sparsity]

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists and numbers, for JSON."""
        return asdict(self)

    def to_pandas(self) -> "DataFrame":
        """One row per module and adapter; needs pandas."""
        from pandas import DataFrame

        return DataFrame([asdict(module) for module in self.modules.values()])


class SparsityMeter:
    """Measures the sparsity of all spiking adapters of a model, over everything that runs inside its context.

        with SparsityMeter(model) as meter:
            trainer.evaluate()
        print(meter.report().sparsity)

    It leaves out padding by the attention masks that the model and its encoder and decoder are called with. If there is
    no mask, or its shape is not that of a module's tokens, every token counts. What gradient checkpointing computes
    again is counted once. What a module computes twice in a forward is counted twice. The numbers that the model
    computes stay the same to the bit. Adapters that are added inside the context are not measured.

    Args:
        model: a model with spiking adapters.
        training: count the modules in training mode only (True), in evaluation mode only (False) or both (None).
        adapters: count the adapters of these names only; by default all.

    Raises:
        SpikeLoraError: if the model has no spiking adapter, under `torch.nn.DataParallel`, and if accelerate has
            offloaded an adapter.
    """

    def __init__(
        self, model: nn.Module, training: bool | None = None, adapters: Collection[str] | str | None = None
    ) -> None:
        if not isinstance(training, bool | None):
            raise SpikeLoraError(
                f"`training` must be True, False or None, got {training!r}. Leave it at None to count both modes."
            )
        self._model = model
        self._training = training
        found = gates(model)
        if adapters is not None:
            known = {gated.adapter for gated in found}
            try:
                chosen = {adapters} if isinstance(adapters, str) else set(adapters)
            except TypeError:  # no collection, or one of what cannot be a name
                chosen = set()
            if not chosen or not chosen <= known:
                raise SpikeLoraError(
                    f"`adapters` must be of the model's own, got {adapters!r}. Name some of "
                    f"{', '.join(map(repr, sorted(known)))}, or leave it out for all."
                )
            found = [gated for gated in found if gated.adapter in chosen]
        self._gated = {(gated.module, gated.adapter): gated for gated in found}
        self._counts: dict[tuple[str, str], Tensor] = {}
        self._context = ExitStack()
        self._is_open = False

    def __enter__(self) -> "SparsityMeter":
        if self._is_open:
            raise SpikeLoraError("This meter is measuring already, and would count twice. Take another one inside.")
        self._context.enter_context(observing(self._model, self._count))
        self._is_open = True
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.close()
        self._is_open = False

    def reset(self) -> None:
        """Reset all counts to 0."""
        self._counts.clear()

    def report(self) -> SparsityReport:
        """What was measured so far; call it inside the context or after it.

        In a distributed run the counts of all processes are added up, so every process has to call it.
        """
        # An adapter may have been deleted, before or after it was counted.
        keys = sorted(key for key in self._gated if key in self._counts or self._is_there(*key))
        counted = [self._counts[k] if k in self._counts else self._no_counts(k) for k in keys]
        counts = dict(zip(keys, _of_all_processes(counted), strict=True))
        ran = {adapter for (_, adapter), seen in counts.items() if seen[-1]} or {adapter for _, adapter in keys}
        return _report({self._gated[key]: seen for key, seen in counts.items() if key[1] in ran})

    def _is_there(self, module: str, adapter: str) -> bool:
        layer: Any = self._gated[module, adapter].layer
        return adapter in layer.r

    def _no_counts(self, key: tuple[str, str]) -> Tensor:
        gated = self._gated[key]
        layer: Any = gated.layer
        return torch.zeros(layer.r[gated.adapter] + 3, dtype=torch.int64, device=gated.gate.tau.device)

    def _count(self, gated: Gated, a: Tensor, mask: Tensor | None) -> None:
        key = gated.module, gated.adapter
        if key not in self._gated or (self._training is not None and gated.gate.training is not self._training):
            return
        spikes, rectified = gated.gate.spikes(a), ~(a >= 0)
        silent = ~spikes.any(1)
        tokens = torch.full((1,), a.shape[0], device=a.device)
        if mask is not None:
            spikes, rectified, silent = spikes & mask[:, None], rectified & mask[:, None], silent & mask
            tokens = mask.sum().view(1)
        # Spikes by rank, then elements silent at 0, silent tokens, tokens. As one tensor, nothing waits for the device.
        counts = torch.cat((spikes.sum(0), rectified.sum().view(1), silent.sum().view(1), tokens))
        if key in self._counts and len(self._counts[key]) != len(counts):
            del self._counts[key]  # its ranks were pruned since
        # Added out of place: a tensor made in inference mode cannot be changed outside of it.
        self._counts[key] = self._counts[key] + counts if key in self._counts else counts


def _of_all_processes(counts: list[Tensor]) -> list[list[int]]:
    """The counts as numbers, summed over the processes of a distributed run; waits for the device once."""
    if not counts:
        return []
    flat = torch.cat([c.to(counts[0].device) for c in counts])
    add_up_processes(flat)
    numbers = iter(flat.tolist())
    return [[next(numbers) for _ in range(len(c))] for c in counts]


def _report(counted: dict[Gated, list[int]]) -> SparsityReport:
    modules, kinds, layers = {}, defaultdict(list), defaultdict(list)
    where = places(gated.module for gated in counted)
    named = zip(names(counted), counted.items(), _neurons(counted), strict=True)
    for name, (gated, counts), (v_threshold, tau) in named:
        *spikes, _, _, tokens = counts
        layer, kind = where[gated.module]
        kinds[kind].append(counts)
        layers[layer].append(counts)
        modules[name] = ModuleSparsity(
            **_shares([counts]),
            module=gated.module,
            adapter=gated.adapter,
            layer=layer,
            kind=kind,
            v_threshold=v_threshold,
            tau=tau,
            firing_rates=tuple(_share(n, tokens) for n in spikes),
            dead_ranks=tuple(rank for rank, n in enumerate(spikes) if tokens and not n),
        )
    return SparsityReport(
        **_shares(list(counted.values())),
        modules=modules,
        kinds={kind: Sparsity(**_shares(counts)) for kind, counts in kinds.items()},
        layers={layer: Sparsity(**_shares(counts)) for layer, counts in layers.items()},
    )


def _neurons(counted: Iterable[Gated]) -> list[list[float]]:
    """Threshold and time constant of each gate; waits for the device once."""
    tensors = [torch.cat([whole(tensor) for tensor in gated.gate.neuron()]) for gated in counted]
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else []


def _shares(all_counts: list[list[int]]) -> dict[str, Any]:
    """The fields of `Sparsity`, over all modules whose counts are given."""
    spikes = sum(sum(counts[:-3]) for counts in all_counts)
    elements = sum((len(counts) - 3) * counts[-1] for counts in all_counts)
    rectified, silent, tokens = (sum(counts[k] for counts in all_counts) for k in (-3, -2, -1))
    return {
        "sparsity": 1 - _share(spikes, elements),
        "silent_tokens": _share(silent, tokens),
        "zero_threshold_sparsity": _share(rectified, elements),
        "tokens": tokens,
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def places(modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Layer and kind of each module: `model.layers.0.self_attn.q_proj` is a `q_proj` of `model.layers.0`.

    The kind is the last part of the name. If a layer has several modules with that part (BERT's are all `dense`), it is
    as many parts as tell them apart in every layer. Modules whose names differ only by a number, such as experts, are
    of one kind.
    """
    layers, endings = {}, {}
    of_layer: dict[str, dict[str, list[str]]] = defaultdict(dict)  # by the longest
    for module in modules:
        numbered = re.match(r"(.*?\.)?\d+(?=\.|$)", module)
        layer = numbered[0] if numbered else ""
        parts = module.split(".")
        first = max((k for k, part in enumerate(parts[:-1], 1) if part.isdigit()), default=0)
        layers[module], endings[module] = layer, [".".join(parts[k:]) for k in range(len(parts) - 1, first - 1, -1)]
        of_layer[layer][endings[module][-1]] = endings[module]
    counts = (Counter(chain.from_iterable(of_one.values())) for of_one in of_layer.values())
    twice = {ending for count in counts for ending, n in count.items() if n > 1}
    kinds = {name: next((e for e in ends if e not in twice), ends[-1]) for name, ends in endings.items()}
    return {module: (layers[module], kind) for module, kind in kinds.items()}
