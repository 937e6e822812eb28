"""Quantiles of a stream of numbers in bounded memory, and one threshold for many modules."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_SIZE = 2**13


class QuantileSketch:
    """A sample of all numbers added so far, from which their ranks can be told.

    Numbers wait until there are `_SIZE` of them. Two full levels of equal weight are sorted together, and every second
    number goes one level up with twice the weight. Odd and even numbers are taken in turn, so that errors of rank
    cancel. Memory grows with the logarithm of the count, and a rank is off by at most `levels / (2 * _SIZE)` of the
    count: 0.09 % for a hundred million numbers. Source: Manku, Rajagopalan, Lindsay, "Approximate medians and other
    quantiles in one pass and with limited memory", 1998.
    """

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []
        self._levels: list[Tensor | None] = []
        self._offset = 0
        self.count = 0  # how many numbers were added

    def add(self, values: Tensor) -> None:
        """Add the numbers of a tensor of any shape; a NaN has no rank and is left out."""
        values = values.detach().flatten().float()
        self._waiting.append(values[~values.isnan()])
        self.count += len(self._waiting[-1])
        if sum(map(len, self._waiting)) >= _SIZE:
            *full, rest = torch.cat(self._waiting).split(_SIZE)
            if len(rest) == _SIZE:
                full, rest = [*full, rest], rest[:0]
            self._waiting = [rest.clone()]
            for part in full:
                self._carry(part)

    def shares_below(self) -> tuple[Tensor, Tensor]:
        """The distinct numbers that were kept, in rising order, and the share of all numbers below each."""
        values, weights = self.kept()
        if not len(values):
            return torch.empty(0), torch.empty(0)
        values, order = values.sort()
        weights = weights[order]
        distinct, counts = values.unique_consecutive(return_counts=True)
        first = counts.cumsum(0) - counts
        return distinct, (weights.cumsum(0) - weights)[first] / weights.sum()

    def kept(self) -> tuple[Tensor, Tensor]:
        """The numbers that were kept, in no order, and how many numbers each of them stands for."""
        levels = [(0, values) for values in self._waiting]
        levels += [(k, values) for k, values in enumerate(self._levels) if values is not None]
        levels = [(k, values.cpu()) for k, values in levels] or [(0, torch.empty(0))]  # not every device has float64
        weights = [torch.full_like(values, 2**k, dtype=torch.float64) for k, values in levels]
        return torch.cat([values for _, values in levels]), torch.cat(weights)

    def _carry(self, values: Tensor) -> None:
        for level, below in enumerate(self._levels):
            if below is None:
                self._levels[level] = values.clone()  # not a view, which would keep the whole tensor in memory
                return
            values = torch.cat((below, values)).sort().values[self._offset :: 2]
            self._offset = 1 - self._offset
            self._levels[level] = None
        self._levels.append(values.clone())


def common_threshold(values: Sequence[Tensor], weights: Sequence[Tensor], target: float) -> Tensor:
    """One threshold for all modules, at which the share `target` of all their elements together is silent.

    A module that fell silent by this would stop learning. So each module keeps at least a tenth of the overall firing
    rate, `threshold = min(common, quantile(v, 1 - (1 - target) / 10))`, and `common` is higher to make up for it.

    Args:
        values: some of each module's `v`, with one dimension; a NaN has no rank.
        weights: how many elements each value stands for.
        target: above 0 and below 1.

    Returns:
        A threshold for each module, NaN for a module without a number.
    """
    v = pad_sequence(list(values), batch_first=True, padding_value=torch.nan)
    w = pad_sequence(list(weights), batch_first=True).masked_fill(v.isnan(), 0)
    v, order = v.sort(dim=1)  # NaN last
    w = w.gather(1, order)
    own = _quantile(v, w, 1 - (1 - target) / 10)
    pooled, order = torch.where(v < own, v, torch.inf).flatten().sort()
    common = _quantile(pooled[None], w.flatten()[order][None], target)
    return torch.minimum(common, own).squeeze(1)


def _quantile(v: Tensor, w: Tensor, share: float) -> Tensor:
    """In each row of sorted, weighted numbers the first with at least the share below it, `(rows, 1)`."""
    below = w.cumsum(1) - w
    n_known = (w > 0).sum(1, keepdim=True)
    at = torch.searchsorted(below, share * w.sum(1, keepdim=True))
    return v.gather(1, torch.minimum(at, n_known - 1).clamp(min=0))
