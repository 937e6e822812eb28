"""What an adapter computes and moves for a token, counted from measured firing rates; no time is measured here."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from spikelora.errors import SpikeLoraError
from spikelora.method.layers import SpikingLinear
from spikelora.sparsity.meter import ModuleSparsity, SparsityReport
from spikelora.sparsity.observe import gates

if TYPE_CHECKING:
    from pandas import DataFrame

# pJ in float32 at 45 nm and 0.9 V: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014.
_MULTIPLICATION = 3.7
_ADDITION = 0.9


@dataclass(frozen=True)
class Operations:
    """The operations for one token, a mean over the tokens measured; float32.

    Attributes:
        macs: multiply-accumulates.
        multiplications: those outside the multiply-accumulates, of the gate and of `scaling`.
        additions: those outside the multiply-accumulates, into the base's output.
        comparisons: of the gate, `v >= v_threshold`.
        divisions: of the gate, `v = a / tau`.
        weight_words: 32-bit words of weights read.
        activation_words: 32-bit words of activations read or written.
        energy: of all of them, in pJ.
    """

    macs: float = 0.0
    multiplications: float = 0.0
    additions: float = 0.0
    comparisons: float = 0.0
    divisions: float = 0.0
    weight_words: float = 0.0
    activation_words: float = 0.0
    energy: float = 0.0


@dataclass(frozen=True)
class Costs:
    """The ways to run a module, per token: the base layer, and each adapter beyond it.

    Attributes:
        base: the base layer, `in * out` multiply-accumulates; its bias is left out.
        lora_merged: LoRA of this rank merged into the base, which costs nothing. SpikeLoRA cannot be merged.
        lora_unmerged: LoRA of this rank, `r * in + r * out` multiply-accumulates.
        dense: SpikeLoRA with nothing skipped: unmerged LoRA and the gate. Most paths of this package run like this.
        effective: SpikeLoRA with all that is silent skipped: `r * in + firing_share * r * out`.
    """

    base: Operations
    lora_merged: Operations
    lora_unmerged: Operations
    dense: Operations
    effective: Operations


@dataclass(frozen=True)
class ModuleCosts(Costs):
    """The same of one adapter in one module.

    Attributes:
        module: its name in the model that was adapted.
        adapter: name of the adapter.
        in_features: `in`.
        out_features: `out`.
        r: rank of the adapter.
        firing_share: measured share of the elements of `gated` with a spike.
    """

    module: str
    adapter: str
    in_features: int
    out_features: int
    r: int
    firing_share: float


@dataclass(frozen=True)
class Ledger(Costs):
    """What `operations` counted, overall and by module, for one token that passes each module once.

    `modules` has the keys of the report that it was made from; `print` shows it as a table.

    Attributes:
        modules: the modules that tokens reached.
        left_out: keys of the modules that no token reached or that are not linear layers; they are in no sum.
        tokens_per_pass: tokens for which the weights are read once.
        weight_pj: energy of reading one word of weights, in pJ.
        activation_pj: energy of reading or writing one word of activations, in pJ.
    """

    modules: dict[str, ModuleCosts]
    left_out: tuple[str, ...]
    tokens_per_pass: int
    weight_pj: float
    activation_pj: float

    @property
    def saving(self) -> float:
        """Share of unmerged LoRA's energy, without the base's, that `effective` saves; negative if it costs more."""
        return 1 - self.effective.energy / self.lora_unmerged.energy

    @property
    def verdict(self) -> str:
        """What the sums say, in words, and what they do not say."""
        lora, effective, base = self.lora_unmerged, self.effective, self.base.energy
        fewer = _less(1 - effective.macs / lora.macs, "fewer")
        overall = _less(1 - (base + effective.energy) / (base + lora.energy))
        dense = _less(1 - self.dense.energy / lora.energy)
        share_of_A = sum(m.r * m.in_features for m in self.modules.values()) / lora.macs
        return (
            f"If all that is silent is skipped, SpikeLoRA adds {_less(self.saving)} energy per token to the base than "
            f"unmerged LoRA, and {fewer} multiply-accumulates. With the base included it takes {overall} energy. A is "
            f"dense: it alone is {100 * share_of_A:.3g}% of LoRA's multiply-accumulates, which no sparsity saves. "
            f"Computed in full, SpikeLoRA adds {dense} energy than unmerged LoRA. It is never cheaper than merged "
            "LoRA, which adds nothing to the base."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists and numbers, for JSON."""
        return asdict(self) | {"saving": self.saving, "verdict": self.verdict}

    def to_pandas(self) -> "DataFrame":
        """One row per module and adapter, columns such as `effective.macs`; needs pandas."""
        from pandas import json_normalize

        return json_normalize([asdict(module) for module in self.modules.values()])

    def __str__(self) -> str:
        width = max(map(len, ["all modules", *self.modules]))
        ways = [field.name for field in fields(Costs)]
        lines = [" " * (width + 26) + "".join(f"{way:>15}" for way in ways)]
        for name, costs in [*self.modules.items(), ("all modules", self)]:
            rank = f"r={costs.r} fires {costs.firing_share:.1%}" if isinstance(costs, ModuleCosts) else ""
            for label, unit, field in (("MACs", 1, "macs"), ("nJ", 1e3, "energy")):
                numbers = (getattr(getattr(costs, way), field) / unit for way in ways)
                row = "".join(f"{number:>15,.1f}" for number in numbers)
                lines.append(f"{name:<{width}} {rank:<19} {label:<4} {row}")
                name = rank = ""
        read = f"weights are read once for {self.tokens_per_pass} token(s) at {self.weight_pj:g} pJ a word"
        lines.append(f"Per token; {read}, activations at {self.activation_pj:g} pJ a word.")
        lines.append(self.verdict)
        if self.left_out:
            lines.append(f"Left out, as they were not reached or are not linear: {', '.join(self.left_out)}.")
        return "\n".join(lines)


def operations(
    model: nn.Module,
    report: SparsityReport,
    tokens_per_pass: int = 1,
    weight_pj: float = 640.0,
    activation_pj: float = 5.0,
) -> Ledger:
    """Count what each adapted module computes and moves for a token, at the firing rates that a meter measured.

    `p` is the share of the elements of `gated` that spike, `q` the share of the tokens with any spike, `rate` the
    firing rate of each rank, and `T = tokens_per_pass`. Each line but the first is what comes on top of the base:

                     MACs                  scaling, additions   words of weights               words of activations
        base         in * out              0                    in * out / T                   in + out
        LoRA         r * in + r * out      out each             (r * in + r * out) / T         in + 2 * r + 2 * out
        dense        r * in + r * out      out each             (r * in + r * out + 2) / T     in + 2 * r + 2 * out
        effective    r * in + p * r * out  q * out each         (r * in + f * out + 2) / T     in + 2 * r + q * 2 * out

    All of them add into the base's output in place. PEFT's own LoRA moves `4 * out` words more, in temporaries.

    The gate, dense and effective, adds a division, a comparison and a multiplication (`a * spikes`) per rank, and reads
    `v_threshold` and `tau`. Graded values reach B, not bits: B's products are multiply-accumulates, not the mere
    additions between spiking layers. `f = sum(1 - (1 - rate) ** T)` is the number of columns of B that any of T tokens
    needs, if their spikes are independent; `f = p * r` for one token.

    Energy: a multiply-accumulate takes 4.6 pJ, a multiplication 3.7 and an addition 0.9, by Horowitz. A comparison
    counts as an addition, and a division as a multiplication, because tau is constant. A word from DRAM takes 640 pJ
    and one from an 8 KB cache 5 pJ (Han et al., "Learning both weights and connections for efficient neural networks",
    NeurIPS 2015, after Horowitz, who gives 1.3 to 2.6 nJ and 10 pJ for 64 bits). By default the weights come from DRAM
    for every token, as when one sequence is generated, and activations stay in that cache. These figures are of one old
    process and of an ideal machine: they rank ways to compute, and measure none. `effective` is what such a machine
    would need.

    Args:
        model: the model that was measured.
        report: what a `SparsityMeter` measured on it.
        tokens_per_pass: tokens for which the weights are read once, at least 1: the batch when generating.
        weight_pj: energy of reading a 32-bit word of weights, in pJ.
        activation_pj: energy of reading or writing a 32-bit word of activations, in pJ.

    Raises:
        SpikeLoraError: for a report of another model or without any token, and for numbers out of range.

    Source: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9.
    """
    if isinstance(tokens_per_pass, bool) or not isinstance(tokens_per_pass, int) or not 1 <= tokens_per_pass <= 1e30:
        raise SpikeLoraError(f"`tokens_per_pass` must be whole, from 1 to 1e30, got {tokens_per_pass!r}. Try 1.")
    for name, value in (("weight_pj", weight_pj), ("activation_pj", activation_pj)):  # sums of far larger ones overflow
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e30:
            raise SpikeLoraError(f"`{name}` must be a number from 0 to 1e30, in pJ, got {value!r}. Leave it out.")
    if not isinstance(report, SparsityReport):
        raise SpikeLoraError(
            f"`report` must be a SparsityReport, got a {type(report).__name__}. Give what "
            "`SparsityMeter(model).report()` returns."
        )
    layers: dict[tuple[str, str], Any] = {(g.module, g.adapter): g.layer for g in gates(model)}
    modules = {}
    for key, seen in report.modules.items():
        layer = layers.get((seen.module, seen.adapter))
        if layer is None or layer.r[seen.adapter] != len(seen.firing_rates):
            raise SpikeLoraError(
                f"The report is of another model: this one has no adapter `{seen.adapter}` of rank "
                f"{len(seen.firing_rates)} on `{seen.module}`. Measure it with `SparsityMeter(model)`."
            )
        if seen.tokens and isinstance(layer, SpikingLinear):
            counted = _count(layer.in_features, layer.out_features, seen, tokens_per_pass)
            costs: dict[str, Any] = {w: _with_energy(counts, weight_pj, activation_pj) for w, counts in counted.items()}
            modules[key] = ModuleCosts(
                **costs,
                in_features=layer.in_features,
                out_features=layer.out_features,
                module=seen.module,
                adapter=seen.adapter,
                r=len(seen.firing_rates),
                firing_share=1 - seen.sparsity,
            )
    if not modules:
        raise SpikeLoraError(
            "`report` has no token of a linear layer. Run the model inside `with SparsityMeter(model) as meter:`."
        )
    # If several adapters share a module, its base runs once.
    bases = {m.module: m.base for m in modules.values()}
    sums = {field.name: _sum(getattr(m, field.name) for m in modules.values()) for field in fields(Costs)}
    return Ledger(
        **(sums | {"base": _sum(bases.values())}),
        modules=modules,
        left_out=tuple(key for key in report.modules if key not in modules),
        tokens_per_pass=tokens_per_pass,
        weight_pj=weight_pj,
        activation_pj=activation_pj,
    )


def _count(n_in: int, n_out: int, seen: ModuleSparsity, tokens_per_pass: int) -> dict[str, dict[str, float]]:
    """The counts of one module by the names of `Costs`: the table in `operations`."""
    r, q = len(seen.firing_rates), 1 - seen.silent_tokens
    columns = sum(1 - (1 - rate) ** tokens_per_pass for rate in seen.firing_rates)

    def adapter(ranks_up: float, columns: float, outputs: float, gated: int) -> dict[str, float]:
        return {
            "macs": r * n_in + ranks_up * n_out,
            "multiplications": outputs + gated * r,
            "additions": outputs,
            "comparisons": gated * r,
            "divisions": gated * r,
            "weight_words": (r * n_in + columns * n_out + 2 * gated) / tokens_per_pass,
            "activation_words": n_in + 2 * r + 2 * outputs,
        }

    return {
        "base": {
            "macs": n_in * n_out,
            "weight_words": n_in * n_out / tokens_per_pass,
            "activation_words": n_in + n_out,
        },
        "lora_merged": {},
        "lora_unmerged": adapter(r, r, n_out, gated=0),
        "dense": adapter(r, r, n_out, gated=1),
        "effective": adapter(sum(seen.firing_rates), columns, q * n_out, gated=1),
    }


def _with_energy(counts: dict[str, float], weight_pj: float, activation_pj: float) -> Operations:
    pj = {
        "macs": _MULTIPLICATION + _ADDITION,
        "multiplications": _MULTIPLICATION,
        "additions": _ADDITION,
        "comparisons": _ADDITION,
        "divisions": _MULTIPLICATION,
        "weight_words": weight_pj,
        "activation_words": activation_pj,
    }
    return Operations(**counts, energy=math.fsum(pj[name] * count for name, count in counts.items()))


def _sum(parts: Iterable[Operations]) -> Operations:
    all_parts = list(parts)
    return Operations(**{f.name: math.fsum(getattr(p, f.name) for p in all_parts) for f in fields(Operations)})


def _less(saving: float, less: str = "less") -> str:
    percent = f"{100 * abs(saving):.3g}%"
    return f"{percent} {less}" if saving > 0 else f"{percent} more" if saving < 0 else f"no {less}"
