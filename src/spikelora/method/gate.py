"""The gate of one adapter in one layer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from spikelora.method.neuron import charge, spike_gate
from spikelora.method.parameters import NeuronParameters


class SpikeGate(NeuronParameters):
    """The neuron of one adapter in one layer, `gated = a * (a / tau >= v_threshold)`; see `neuron.spike_gate`."""

    def __init__(
        self,
        v_threshold: float,
        tau: float,
        surrogate_alpha: float,
        learn_threshold: bool,
        learn_tau: bool,
        straight_through: bool = False,
    ) -> None:
        super().__init__(v_threshold, tau, learn_threshold, learn_tau)
        self.surrogate_alpha = surrogate_alpha
        self.straight_through = straight_through
        self.observers: tuple[Callable[[Tensor], None], ...] = ()  # called with `a` in every forward, see `observe`
        self.made_like: str | None = None  # the adapter whose configuration it has, see `complete_copy`

    def forward(self, a: Tensor) -> Tensor:
        for observe in self.observers:
            observe(a)
        return spike_gate(a, *self.neuron(), self.surrogate_alpha, self.straight_through)

    def spikes(self, a: Tensor) -> Tensor:
        """Where the neuron spikes, boolean and shaped like `a (..., r)`."""
        v_threshold, tau = self.neuron()
        return charge(a, tau) >= v_threshold

    def __getstate__(self) -> Any:
        return super().__getstate__() | {"observers": ()}  # observers of this gate do not observe its copies
