"""Second moments of an adapter's activations: they compare a linear update with a gated one."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# With ranks scaled to 1, directions with a smaller share of the variance are only the float32 rounding of `a`.
_NOISE = 1e-12


class Moments(NamedTuple):
    """Sums over tokens of `a a^T`, `gated a^T` and `gated gated^T`, each `(r, r)` in float64."""

    aa: Tensor
    ga: Tensor
    gg: Tensor

    @classmethod
    def of(cls, a: Tensor, gated: Tensor) -> "Moments":
        """The sums of one batch of tokens, both arguments `(N, r)`."""
        a, gated = exact(a), exact(gated)
        return cls(a.T @ a, gated.T @ a, gated.T @ gated)

    def plus(self, other: "Moments") -> "Moments":
        return Moments(*map(torch.add, self, other))

    def regression(self) -> Tensor:
        """`C = E[gated a^T] (E[a a^T])^+` `(r, r)`, the least squares of `gated` on `a`."""
        deviation = self.aa.diagonal().sqrt()
        scale = torch.where(deviation > 0, 1 / deviation, 0)
        # Ranks are scaled to 1, so that a rank with small activations is not taken for rounding.
        inverse = torch.linalg.pinv(scale[:, None] * self.aa * scale, rtol=_NOISE, hermitian=True)
        return self.ga @ (scale[:, None] * inverse * scale)

    def spiking(self, B: Tensor) -> float:
        """Sum of `|B gated|^2`."""
        return _trace(B, self.gg, B)

    def linear(self, B: Tensor) -> float:
        """Sum of `|B a|^2`."""
        return _trace(B, self.aa, B)

    def distance(self, B: Tensor, linear_B: Tensor) -> float:
        """Sum of `|B gated - linear_B a|^2`, kept from falling below 0 by rounding."""
        return max(self.spiking(B) - 2 * _trace(B, self.ga, linear_B) + self.linear(linear_B), 0.0)


def _trace(left: Tensor, moments: Tensor, right: Tensor) -> float:
    """`tr(left moments right^T)`."""
    return ((exact(left) @ moments) * exact(right)).sum().item()


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU if its device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def lost_share(lost: float, whole: float) -> float:
    """`lost / whole`, 0 if there was nothing to lose."""
    if not whole:  # an update of 0
        return math.inf if lost else 0.0
    return lost / whole
