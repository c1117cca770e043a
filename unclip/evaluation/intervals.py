"""Confidence intervals of means over images, and of paired differences, by the bootstrap; of shares, by Wilson's formula.

Images are resampled with replacement, and the interval lies between quantiles of the means of the resamples (Efron & Tibshirani
1993, section 13.3). Deviations from the mean are widened by (n / (n - 1))^(1/2), without which small samples give intervals
that are too narrow (Hesterberg 2015, section 3.2). Resamples depend on the seed and the number of values alone.

Letters: N images, S sets of values, R resamples.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from unclip.errors import ShapeError

NUM_RESAMPLES = 2_000
"""R: the level of a 95 % interval is then within about 0.5 % of it."""
_NUMBERS_AT_ONCE = 1 << 22
"""Numbers of resampled images in memory at once."""


class Interval(NamedTuple):
    """Confidence interval."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its confidence interval; above zero, the candidate's values are larger."""

    mean: float
    low: float
    high: float
    count: int
    """Pairs with both values."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Value of a metric, with what each row adds to it."""

    value: float
    rows: Tensor
    """[K], one for each image, or for each of the rows that the metric is about; NaN where it does not apply. The value moves as
    their mean does when rows are resampled, so their mean less the value is of no meaning."""
    is_per_image: bool = False
    """The value is the mean of `rows`, and these are scores of single images, NaN where an image has none."""

    @property
    def count(self) -> int:
        """Rows that the value is made of."""
        return int((~self.rows.isnan()).sum())


def mean_of(scores: Tensor) -> Estimate:
    """Return the mean of the scores [N] of single images; NaN stands for a missing one, and one at least is there."""
    return Estimate(scores.double().nanmean().item(), scores, is_per_image=True)


def intervals_of(estimates: Mapping[str, Estimate], confidence: float = 0.95) -> dict[str, Interval]:
    """Return the confidence intervals of estimates by name; those of fewer than two rows have none.

    Estimates of the same images share the resamples. The interval of a value that is no mean is that of its linear part: its
    rows are the influence of each image, as in the infinitesimal jackknife (Efron & Tibshirani 1993, section 21.5). Shares,
    means of rows that are 0 or 1, have the `share_interval`: all resamples of zeros are zeros.
    """
    by_size: dict[int, list[str]] = collections.defaultdict(list)
    found: dict[str, Interval] = {}
    for name, estimate in estimates.items():
        rows = estimate.rows[~estimate.rows.isnan()]
        if len(rows) < 2:
            continue
        # Influences are all zero where no image differs from another, whatever the value.
        is_mean = math.isclose(estimate.value, rows.double().mean().item(), rel_tol=1e-6)
        if is_mean and ((rows == 0) | (rows == 1)).all():
            found[name] = share_interval(int(rows.sum()), len(rows), confidence)
        else:
            by_size[len(estimate.rows)].append(name)
    for names in by_size.values():
        rows = torch.stack([estimates[name].rows.double() for name in names])  # [S, K]
        limits = bootstrap_intervals(rows, confidence) - rows.nanmean(dim=1, keepdim=True)
        for name, (low, high) in zip(names, limits.tolist(), strict=True):
            found[name] = Interval(estimates[name].value + low, estimates[name].value + high)
    return {name: found[name] for name in estimates if name in found}


def share_interval(successes: int, count: int, confidence: float = 0.95) -> Interval:
    """Return the confidence interval of a share of `count` images, Wilson's. Source: Brown, Cai & DasGupta 2001, eq. 4."""
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share, penalty = successes / count, z * z / count
    centre = (share + penalty / 2) / (1 + penalty)
    width = z / (1 + penalty) * math.sqrt((share * (1 - share) + penalty / 4) / count)
    return Interval(min(share, max(0.0, centre - width)), max(share, min(1.0, centre + width)))


def bootstrap_interval(
    values: Tensor, confidence: float = 0.95, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Return the confidence interval of the mean of values [N]; NaN stands for a missing value.

    Raises:
        ShapeError: the values are not [N], or fewer than two are there.
    """
    if values.dim() != 1:
        raise ShapeError(f"values: got shape {tuple(values.shape)}, expected [N].")
    low, high = bootstrap_intervals(values[None], confidence, num_resamples=num_resamples, seed=seed)[0].tolist()
    return Interval(low, high)


def bootstrap_intervals(
    values: Tensor, confidence: float = 0.95, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Tensor:
    """Return the confidence intervals [S, 2] of the means of S sets of values [S, N]; NaN stands for a missing value.

    All sets are measured on the same images, so they share the resamples. Memory does not grow with R times N.

    Raises:
        ShapeError: the values are not [S, N], or a set has fewer than two.
    """
    if values.dim() != 2:
        raise ShapeError(f"values: got shape {tuple(values.shape)}, expected [S, N].")
    is_there = ~values.isnan()  # [S, N]
    counts = is_there.sum(dim=1)  # [S]
    if len(counts) and counts.min() < 2:
        raise ShapeError(f"values: got {int(counts.min())} that are not NaN, expected at least 2 for an interval.")
    there = is_there.double()
    means = values.nan_to_num(0.0).double().sum(dim=1) / counts  # [S]
    centred = torch.where(is_there, values.double() - means[:, None], 0.0)  # [S, N]
    generator, (_, size) = torch.Generator().manual_seed(seed), values.shape
    deviations = []
    at_once = max(1, _NUMBERS_AT_ONCE // size)
    for start in range(0, num_resamples, at_once):
        chosen = torch.randint(size, (min(at_once, num_resamples - start), size), generator=generator)  # [r, N]
        times = torch.zeros(chosen.shape, dtype=torch.float64)
        times.scatter_add_(1, chosen, torch.ones(1, dtype=torch.float64).expand(chosen.shape))
        deviations.append((centred @ times.T) / (there @ times.T))  # [S, r]; NaN if no value was chosen
    tail = (1 - confidence) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    quantiles = torch.cat(deviations, dim=1).nanquantile(levels, dim=1).T  # [S, 2]
    return means[:, None] + (counts / (counts - 1)).sqrt()[:, None] * quantiles


def paired_difference(
    candidate: Tensor,
    champion: Tensor,
    confidence: float = 0.95,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Compare two models by values [N] of the same captions and noise; pairs in which either is NaN are left out.

    Raises:
        ShapeError: the values are not both [N], or fewer than two pairs are there.
    """
    if candidate.dim() != 1 or candidate.shape != champion.shape:
        shapes = f"{tuple(candidate.shape)} and {tuple(champion.shape)}"
        raise ShapeError(f"values: got shapes {shapes}, expected both [N].")
    differences = candidate.double() - champion.double()
    there = differences[~differences.isnan()]
    low, high = bootstrap_interval(there, confidence, num_resamples=num_resamples, seed=seed)
    return Difference(math.fsum(there.tolist()) / len(there), low, high, len(there))
