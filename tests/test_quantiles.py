"""The sketch of quantiles: exact while all fits, close afterwards, whatever the distribution."""

import pytest
import torch

from spikelora.sparsity.quantiles import _SIZE, QuantileSketch


def shares(sketch):
    values, below = sketch.shares_below()
    return dict(zip(values.tolist(), below.tolist(), strict=True))


def test_few_numbers_are_exact():
    sketch = QuantileSketch()
    sketch.add(torch.tensor([[3.0, 1.0], [1.0, torch.nan]]))
    sketch.add(torch.tensor([2.0, 1.0]))

    assert shares(sketch) == {1.0: 0.0, 2.0: 3 / 5, 3.0: 4 / 5}


def test_nothing_has_no_quantile():
    sketch = QuantileSketch()
    sketch.add(torch.tensor([torch.nan]))

    assert shares(sketch) == {}


@pytest.mark.parametrize(
    "make", [torch.randn, torch.rand, lambda n, generator: 5 + torch.randn(n, generator=generator) / 1e4]
)
@pytest.mark.parametrize("order", ["as it comes", "rising"])
def test_many_numbers_keep_their_ranks(make, order):
    numbers = make(600_000, generator=torch.Generator().manual_seed(0))
    if order == "rising":
        numbers = numbers.sort().values
    sketch = QuantileSketch()
    for part in numbers.split(9_973):
        sketch.add(part)
    values, below = sketch.shares_below()

    true = torch.searchsorted(numbers.sort().values, values) / len(numbers)
    assert (below - true).abs().max() < 1e-3
    assert len(values) < _SIZE * 9
    kept = [*sketch._waiting, *(level for level in sketch._levels if level is not None)]
    assert sum(part.untyped_storage().nbytes() for part in kept) == 4 * len(numbers[: sum(map(len, kept))])
    for target in (0.5, 0.9, 0.99):
        assert (below - target).abs().min() < 1e-3


def test_repeated_numbers_count_as_often_as_they_come():
    sketch = QuantileSketch()
    for _ in range(40):
        sketch.add(torch.tensor([0.0] * 700 + [1.0] * 300))

    assert shares(sketch) == {0.0: 0.0, 1.0: pytest.approx(0.7, abs=1e-3)}
