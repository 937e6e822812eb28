"""Statistics over seeds: a mean with its spread, and differences between runs of the same seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ENOUGH = 3  # with fewer seeds nothing is claimed
LEVEL = 0.05
_RESOLUTION = 1e-7  # of results, which are written with 8 digits


@dataclass(frozen=True)
class Summary:
    """Of `n` numbers: mean, sample standard deviation, and the 95 % confidence interval of the mean by t."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Summary):
    """The summary of the differences of pairs, with `p` of the paired t test; NaN below three pairs or if none
    differs."""

    p: float


def summary(values: Sequence[float]) -> Summary:
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Summary(n, mean, math.nan, math.nan, math.nan)
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """`values - baseline` over the seeds that both have; None if they share none."""
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    found = summary([values[seed] - baseline[seed] for seed in seeds])
    p = math.nan
    # If all differences are the same, as an accuracy's on few rows may be, there is no spread for t.
    if found.n >= ENOUGH and found.sd > _RESOLUTION:
        p = float(2 * stats.t.sf(abs(found.mean) / (found.sd / math.sqrt(found.n)), found.n - 1))
    return Difference(found.n, found.mean, found.sd, found.low, found.high, p)


def holm(ps: Sequence[float]) -> list[float]:
    """p values of several comparisons, corrected by Holm's method; a NaN stays NaN and does not count."""
    known = sorted((p, at) for at, p in enumerate(ps) if not math.isnan(p))
    made, running = list(ps), 0.0
    for rank, (p, at) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * p))
        made[at] = running
    return made
