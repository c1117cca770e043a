"""Bootstrap intervals: their coverage in simulations, paired differences, and intervals of values that are no means."""

import math

import pytest
import torch

from unclip.errors import ShapeError
from unclip.evaluation.intervals import (
    Estimate,
    bootstrap_interval,
    bootstrap_intervals,
    intervals_of,
    mean_of,
    paired_difference,
    share_interval,
)

SIMULATIONS = 1_000


def drawn(kind: str, size: int) -> tuple[torch.Tensor, float]:
    """Values [SIMULATIONS, size] of a distribution, and its mean."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(SIMULATIONS, size, generator=generator, dtype=torch.float64)
    if kind == "normal":
        return 3 + torch.randn(SIMULATIONS, size, generator=generator), 3.0
    if kind == "exponential":
        return -uniform.log(), 1.0
    values = (uniform < 0.3).double()
    if kind == "missing":  # the distribution of what is there, with a fifth missing
        values[torch.rand(values.shape, generator=generator) < 0.2] = math.nan
    return values, 0.3


@pytest.mark.parametrize(
    ("kind", "size"), [("normal", 30), ("normal", 256), ("exponential", 256), ("share", 256), ("missing", 256)]
)
def test_intervals_cover_the_mean_as_often_as_they_say(kind: str, size: int) -> None:
    """Within three standard errors of 1,000 simulations, and a percent for skewness and for the resamples."""
    values, mean = drawn(kind, size)
    slack = 3 * math.sqrt(0.95 * 0.05 / SIMULATIONS) + 0.01
    low, high = bootstrap_intervals(values, num_resamples=1_000).T
    covered = ((low <= mean) & (mean <= high)).double().mean().item()
    assert abs(covered - 0.95) < slack, covered
    low, high = bootstrap_intervals(values, 0.8, num_resamples=1_000).T
    covered = ((low <= mean) & (mean <= high)).double().mean().item()
    assert abs(covered - 0.8) < 3 * math.sqrt(0.8 * 0.2 / SIMULATIONS) + 0.015, covered


@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
def test_intervals_of_shares_cover_and_have_a_width_without_variation(share: float) -> None:
    uniform = torch.rand(SIMULATIONS, 120, generator=torch.Generator().manual_seed(2))
    counts = (uniform < share).sum(dim=1).tolist()
    covered = sum(low <= share <= high for low, high in (share_interval(count, 120) for count in counts)) / SIMULATIONS
    assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / SIMULATIONS) + 0.015, covered
    # Wilson's limits solve (p - share)^2 = z^2 p (1 - p) / n.
    for limit in share_interval(12, 40):
        assert (limit - 0.3) ** 2 == pytest.approx(1.959964**2 * limit * (1 - limit) / 40, rel=1e-6)
    found = intervals_of({"none": mean_of(torch.zeros(256)), "all": mean_of(torch.tensor([1.0, math.nan, 1.0]))})
    assert found["none"].low == 0 < found["none"].high < 0.02
    assert found["all"] == share_interval(2, 2) and found["all"].high == 1 > found["all"].low


def test_interval_of_two_values_by_enumeration() -> None:
    """Resamples of 0 and 1 have the means 0, 1/2, 1/2 and 1; deviations are widened by the root of 2."""
    low, high = bootstrap_interval(torch.tensor([0.0, 1.0]))
    assert (low, high) == pytest.approx((0.5 - math.sqrt(2) / 2, 0.5 + math.sqrt(2) / 2))
    assert bootstrap_interval(torch.tensor([0.0, math.nan, 1.0]), 0.1) == pytest.approx((0.5, 0.5))
    assert bootstrap_interval(torch.ones(9)) == (1, 1)


def test_intervals_depend_on_nothing_but_values_and_seed() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    first = bootstrap_interval(values)
    torch.manual_seed(6)
    assert bootstrap_interval(values) == first != bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values + 7) == pytest.approx([limit + 7 for limit in first], rel=1e-6)


def test_too_few_values_have_no_interval() -> None:
    with pytest.raises(ShapeError, match="got 1 that are not NaN"):
        bootstrap_interval(torch.tensor([1.0, math.nan]))
    with pytest.raises(ShapeError, match="got shape"):
        bootstrap_interval(torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="got 0 that are not NaN"):
        paired_difference(torch.tensor([1.0, math.nan]), torch.tensor([math.nan, 1.0]))
    with pytest.raises(ShapeError, match="got shapes"):
        paired_difference(torch.zeros(3), torch.zeros(2))


def test_pairs_show_what_single_values_hide() -> None:
    """A gain of 0.01 on captions that differ by 1 from each other."""
    generator = torch.Generator().manual_seed(0)
    champion = torch.randn(200, generator=generator)
    candidate = champion + 0.01 + 0.02 * torch.randn(200, generator=generator)
    found = paired_difference(candidate, champion)
    assert 0 < found.low < found.mean < found.high < 0.02 and found.count == 200
    assert bootstrap_interval(candidate).low < bootstrap_interval(champion).high
    back = paired_difference(champion, candidate)
    assert back.mean == pytest.approx(-found.mean) and back.high < 0
    same = paired_difference(champion, champion)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_pairs_without_a_value_are_left_out() -> None:
    candidate = torch.tensor([1.0, math.nan, 3.0, 5.0, 2.0])
    champion = torch.tensor([0.0, 9.0, math.nan, 1.0, 0.0])
    found = paired_difference(candidate, champion)
    expected = bootstrap_interval(torch.tensor([1.0, 4.0, 2.0]))
    assert found.count == 3 and found.mean == pytest.approx(7 / 3)
    assert (found.low, found.high) == pytest.approx(expected)


def test_estimates_have_the_interval_of_their_rows_around_their_value() -> None:
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    some = torch.where(torch.arange(50) < 20, scores, math.nan)
    estimates = {
        "mean": mean_of(scores),
        "some": mean_of(some),
        "shifted": Estimate(7.0, scores + 100),
        "other": Estimate(1.0, scores[:9]),
        "single": mean_of(scores[:1]),
    }
    assert estimates["some"].value == pytest.approx(scores[:20].mean().item()) and estimates["some"].count == 20
    found = intervals_of(estimates)
    assert list(found) == ["mean", "some", "shifted", "other"], "one row has no interval"
    assert found["mean"] == pytest.approx(bootstrap_interval(scores))
    assert found["some"] == pytest.approx(bootstrap_interval(some))
    mean = scores.mean().item()
    assert found["shifted"] == pytest.approx([limit - mean + 7 for limit in bootstrap_interval(scores)])
    mean = scores[:9].mean().item()
    assert found["other"] == pytest.approx([limit - mean + 1 for limit in bootstrap_interval(scores[:9])])


def test_a_distance_of_images_that_are_all_equal_has_an_interval_with_it() -> None:
    """No image moves it, so the influences are zeros; they are no share."""
    found = intervals_of({"distance": Estimate(2.0, torch.zeros(256)), "share": mean_of(torch.zeros(256))})
    assert found["distance"] == (2.0, 2.0)
    assert found["share"].low == 0 and 0 < found["share"].high < 0.02
