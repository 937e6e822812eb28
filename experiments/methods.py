"""The methods of the study: LoRA, SpikeLoRA, and controls, which exist only in the experiments.

`METHODS` lists them with their own parameters; `...` marks a parameter without a default. The gates here replace
`spikelora.SpikeGate`, and the same meter counts them.
"""

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from spikelora import SpikeLoraConfig
from spikelora.method.gate import SpikeGate
from spikelora.method.neuron import atan_surrogate, charge, spike_gate
from spikelora.sparsity.observe import gates

_NEURON = {"v_threshold": 0.1, "tau": 2.0, "target_sparsity": None, "learn_threshold": False}
_TARGET = {"target_scope": None, "target_warmup": None}
_SURROGATE = {"surrogate": None, "surrogate_alpha": None}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    # LoRA with the rank that needs as many multiply-accumulates as SpikeLoRA of rank r at the sparsity `rate`.
    "lora_same_operations": {"rate": ...},
    "spikelora": _NEURON | _SURROGATE | _TARGET,
    # The straight-through window has a width in units of the module's own threshold, or of the spread of its v.
    "relative_window": _NEURON | {"surrogate_alpha": None} | _TARGET | {"unit": ...},
    # Learned thresholds, which `penalty` times the share of activations that fire pushes up.
    "l0_penalty": {"v_threshold": 0.1, "tau": 2.0} | _SURROGATE | {"penalty": ...},
    # Open where |a| >= tau * v_threshold.
    "two_sided": _NEURON,
    # max(a, 0) with its own gradient; `spikelora` at a threshold of 0 also has the surrogate's.
    "relu": {},
    # A share `rate` of the elements, drawn anew for every token in training and evaluation, is silent.
    "random_mask": {"rate": ...},
    # Dropout on `a`: only in training, with the rest scaled by 1 / (1 - rate).
    "dropout": {"rate": ...},
}


def adapter_config(run: Any, task_type: str) -> LoraConfig:
    """PEFT's configuration of a run; raises a `SpikeLoraError` for values that contradict each other."""
    shared = {
        "r": run.r,
        "lora_alpha": run.lora_alpha,
        "lora_dropout": run.lora_dropout,
        "use_rslora": run.use_rslora,
        "init_lora_weights": run.init_lora_weights,
        "target_modules": "all-linear",
        "task_type": task_type,
    }
    if run.method.startswith("lora"):
        return LoraConfig(**shared)
    neuron = {
        name: value for name in (*_NEURON, *_SURROGATE, "target_scope") if (value := getattr(run, name)) is not None
    }
    if run.method in ("relu", "random_mask", "dropout"):
        neuron = {"v_threshold": 0.0}
    if run.method == "relative_window":
        neuron["surrogate"] = "straight_through"
    if run.method == "l0_penalty":
        neuron["learn_threshold"] = True
    return SpikeLoraConfig(**shared, **neuron)


def adapt(base: nn.Module, run: Any, task_type: str) -> PeftModel:
    """The base with the adapter of a run. With the same seed all methods of one rank start from the same A."""
    config = adapter_config(run, task_type)
    if run.method == "lora_same_operations":
        config.r = rank_of_same_operations(base, config, run.rate)
    model = get_peft_model(base, config)
    if run.method == "two_sided":
        _replace(model, TwoSidedGate)
    elif run.method == "relative_window":
        _replace(model, RelativeWindow, unit=run.unit)
    elif run.method == "l0_penalty":
        _replace(model, PenalisedGate)
    elif run.method == "relu":
        _replace(model, ReluGate)
    elif run.method in ("random_mask", "dropout"):
        _replace(model, RandomMask if run.method == "random_mask" else DropoutGate, rate=run.rate, seed=run.seed)
    return model


def rank_of_same_operations(base: nn.Module, config: LoraConfig, sparsity: float) -> int:
    """The rank `r'` with `r' * (in + out) = r * in + (1 - sparsity) * r * out`, summed over all targets, rounded."""
    with torch.random.fork_rng():
        probe = get_peft_model(copy.deepcopy(base), LoraConfig(**{**_fields(config), "r": 1}))
    shapes = [(m.in_features, m.out_features) for m in probe.modules() if hasattr(m, "lora_A")]
    total_in, total_out = (sum(sizes) for sizes in zip(*shapes, strict=True))
    return max(1, round(config.r * (total_in + (1 - sparsity) * total_out) / (total_in + total_out)))


def _fields(config: LoraConfig) -> dict[str, Any]:
    return {"target_modules": config.target_modules, "task_type": config.task_type}


def _replace(model: nn.Module, kind: type[SpikeGate], **own: Any) -> None:
    """Replace every gate by one of another kind; the layer then calls it as a module."""
    for number, gated in enumerate(gates(model)):
        gated.gate.__class__ = kind
        for name, value in own.items():
            # Each module draws its own numbers.
            setattr(gated.gate, name, value + 1000 * number if name == "seed" else value)


class TwoSidedGate(SpikeGate):
    """`gated = a * (|a| / tau >= v_threshold)`, with the surrogate at `|a| / tau - v_threshold`.

    Observers are shown `|a|`, so that targets and calibration hold a two-sided gate as well.
    """

    def forward(self, a: Tensor) -> Tensor:
        for observe in self.observers:
            observe(a.abs())
        return a.sign() * spike_gate(a.abs(), *self.neuron(), self.surrogate_alpha, self.straight_through)

    def spikes(self, a: Tensor) -> Tensor:
        return super().spikes(a.abs())


class RelativeWindow(SpikeGate):
    """The straight-through window at `u / unit`: the unit is `|v_threshold|`, or the spread of `v` in the forward."""

    unit: str

    def forward(self, a: Tensor) -> Tensor:
        for observe in self.observers:
            observe(a)
        v_threshold, tau = self.neuron()
        unit = v_threshold.abs() if self.unit == "threshold" else charge(a.detach(), tau).std()
        alpha: Any = self.surrogate_alpha / unit.detach().clamp(min=1e-6)
        return spike_gate(a, v_threshold, tau, alpha, self.straight_through)


class PenalisedGate(SpikeGate):
    """A gate that keeps the share of its activations that fire, with the surrogate's derivative by the threshold alone.

    So JumpReLU is trained (Rajamanoharan et al., arXiv 2407.14435), with another pseudo-derivative.
    """

    fired: Tensor | None = None

    def forward(self, a: Tensor) -> Tensor:
        v_threshold, tau = self.neuron()
        u = charge(a.detach(), tau) - v_threshold
        slope = atan_surrogate(u.detach(), self.surrogate_alpha) * u
        self.fired = ((u >= 0) + slope - slope.detach()).mean()
        return super().forward(a)


def fired(model: nn.Module) -> Tensor:
    """Share of activations that fired in the last forward, the mean over the modules of `l0_penalty`."""
    return torch.stack([gated.gate.fired for gated in gates(model)]).mean()


class ReluGate(SpikeGate):
    """`gated = max(a, 0)`, whose gradient is that of `max`."""

    def forward(self, a: Tensor) -> Tensor:
        for observe in self.observers:
            observe(a)
        return a.relu()


class RandomMask(SpikeGate):
    """`gated = a * mask`; the mask is drawn for each element, whatever its value: silent with probability `rate`."""

    rate: float
    seed: int
    _generator: torch.Generator | None = None
    _mask: Tensor | None = None

    def forward(self, a: Tensor) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(a.device).manual_seed(self.seed)
        self._mask = self.draw(a)
        for observe in self.observers:
            observe(a)
        return torch.where(self._mask, a, 0)

    def draw(self, a: Tensor) -> Tensor:
        return torch.rand(a.shape, device=a.device, generator=self._generator) >= self.rate

    def spikes(self, a: Tensor) -> Tensor:
        """The mask of the forward that is being observed."""
        assert self._mask is not None
        return self._mask.reshape(a.shape)


class DropoutGate(RandomMask):
    """`gated = a * mask / (1 - rate)` in training, `a` in evaluation."""

    def forward(self, a: Tensor) -> Tensor:
        gated = super().forward(a)
        return gated / (1 - self.rate) if self.training else gated

    def draw(self, a: Tensor) -> Tensor:
        return super().draw(a) if self.training else torch.ones_like(a, dtype=torch.bool)
