"""The sketch of quantiles: exact while all fits, close afterwards, whatever the distribution."""

import pytest
import torch

from spikelora.sparsity.quantiles import _SIZE, QuantileSketch, common_threshold


def shares(sketch):
    values, below = sketch.shares_below()
    return dict(zip(values.tolist(), below.tolist(), strict=True))


def test_few_numbers_are_exact():
    sketch = QuantileSketch()
    sketch.add(torch.tensor([[3.0, 1.0], [1.0, torch.nan]]))
    sketch.add(torch.tensor([2.0, 1.0]))

    assert shares(sketch) == {1.0: 0.0, 2.0: 3 / 5, 3.0: 4 / 5}


def test_numbers_that_fill_a_part_to_the_last_are_all_kept():
    sketch = QuantileSketch()
    sketch.add(torch.arange(2.0 * _SIZE))
    values, below = sketch.shares_below()

    assert sum(map(len, sketch._waiting)) == 0
    true = torch.searchsorted(torch.arange(2.0 * _SIZE), values) / (2 * _SIZE)
    assert (below - true).abs().max() < 1e-3


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


class TestCommonThreshold:
    def test_silences_the_share_over_all_modules_and_lets_each_find_its_own(self):
        torch.manual_seed(0)
        v = [torch.randn(20_000), 3 * torch.randn(20_000), torch.randn(20_000) - 1]
        found = common_threshold(v, [torch.ones(len(x)) for x in v], 0.8)

        assert found.unique().numel() == 1
        silent = [(x < t).float().mean().item() for x, t in zip(v, found, strict=True)]
        assert sum(silent) / 3 == pytest.approx(0.8, abs=1e-4)
        assert max(silent) - min(silent) > 0.2

    def test_a_module_of_small_activations_keeps_a_tenth_of_the_share_and_the_others_make_up_for_it(self):
        torch.manual_seed(0)
        v = [torch.randn(10_000), 1e-3 * torch.randn(10_000)]
        found = common_threshold(v, [torch.ones(len(x)) for x in v], 0.9)

        silent = [(x < t).double().mean().item() for x, t in zip(v, found, strict=True)]
        assert silent == pytest.approx([0.81, 0.99], abs=1e-3)

    def test_values_count_by_their_weights_and_padding_not_at_all(self):
        few, many = torch.tensor([1.0, torch.nan, 2.0]), torch.arange(100.0)
        found = common_threshold([few, many], [torch.full((3,), 1000.0), torch.ones(100)], 0.5)

        assert found.tolist() == [2.0, 50.0]  # 1000 + 50 of 2100 are silent

    def test_a_module_without_a_number_has_no_threshold(self):
        v = [torch.full((4,), torch.nan), torch.arange(10.0), torch.empty(0)]
        found = common_threshold(v, [torch.ones(len(x)) for x in v], 0.5)

        assert found.isnan().tolist() == [True, False, True]
        assert found[1] == 5
