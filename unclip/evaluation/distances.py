"""Distances between the distributions of two sets of images, by features such as CLIP embeddings.

The real images are the reference: `Statistics` hold all that is computed of them once. Each distance comes with the influence of
every sampled image, of which `intervals` makes an interval; the reference is taken as it is. Quadratic work is done on at most
`MAX_SAMPLE` rows of either set, in blocks.

Letters: N sampled images, M real ones, K at most `MAX_SAMPLE` of either, E width of features, B rows of a block.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor

from unclip.errors import ShapeError
from unclip.evaluation.intervals import Estimate

MAX_SAMPLE = 5_000
"""Rows of each set that are compared pair by pair; a seeded choice of larger sets."""
MANIFOLD_NEIGHBOURS = 3
"""Neighbours whose distance is the radius of precision and recall. Source: Kynkäänniemi et al. 2019, section 3.1."""
DENSITY_NEIGHBOURS = 5
"""Neighbours whose distance is the radius of density and coverage. Source: Naeem et al. 2020, section 4.2."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1_000.0
"""Width of the Gaussian kernel and factor of the distance. Source: Jayasumana et al. 2024, section 4."""
_BLOCK = 512
_SMALLEST = 1e-12  # variances below this share of the largest are rounding

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Function of features [B, E] and [K, E] that returns the kernel of all pairs, [B, K]."""
Distance = Callable[[Tensor, "Statistics"], Estimate]
"""Function of features [N, E] of sampled images and the statistics of real ones."""


def polynomial_kernel(first: Tensor, second: Tensor) -> Tensor:
    """(x y / E + 1)^3, the kernel of KID. Source: Bińkowski et al. 2018, section 4."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def gaussian_kernel(first: Tensor, second: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)), the kernel of CMMD. Source: Jayasumana et al. 2024, eq. 5."""
    return (-_squared_distances(first, second) / (2 * CMMD_SIGMA**2)).exp()


class Statistics(NamedTuple):
    """Real images as a distance needs them; tensors, to be stored as they are. All float64 but the sample."""

    mean: Tensor
    """[E]."""
    covariance: Tensor
    """[E, E]."""
    sample: Tensor
    """[K, E] float32, features of K of the images."""
    manifold_radii: Tensor
    """[K], distance of each of these to its neighbour number `MANIFOLD_NEIGHBOURS`; NaN if there are too few."""
    density_radii: Tensor
    """[K], distance to its neighbour number `DENSITY_NEIGHBOURS` likewise."""
    kernel_means: Tensor
    """[2], means of the polynomial and of the Gaussian kernel over all pairs of different images of the sample."""
    num_images: Tensor
    """[], M."""

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Compute the statistics of features [M, E] of real images.

        Raises:
            ShapeError: they are not [M, E] with M >= 2.
        """
        _check(features)
        sample = subset(features)
        rows = sample.double()
        radii = [_radii(rows, count) for count in (MANIFOLD_NEIGHBOURS, DENSITY_NEIGHBOURS)]
        means = torch.stack([_own_means(rows, kernel).mean() for kernel in (polynomial_kernel, gaussian_kernel)])
        count = torch.tensor(len(features), dtype=torch.int64)
        mean, covariance = _moments(features)
        return cls(mean, covariance, sample.float().clone(), radii[0], radii[1], means, count)


def subset(features: Tensor) -> Tensor:
    """Return at most `MAX_SAMPLE` rows of features [N, E], in their order; larger sets are thinned by a fixed seed."""
    if len(features) <= MAX_SAMPLE:
        return features
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MAX_SAMPLE]
    return features[chosen.sort().values]


def frechet_distance(sampled: Tensor, real: Tensor) -> float:
    """Fréchet distance of two sets of features [N, E] and [M, E]; see `frechet`.

    Raises:
        ShapeError: the shapes are not [N, E] and [M, E], or a set has fewer than 2 rows.
    """
    _check(sampled, real)
    return _frechet(_moments(sampled), _moments(real))[0]


def frechet(sampled: Tensor, real: Statistics) -> Estimate:
    """Fréchet distance of features, each set modelled as a normal distribution with its mean and covariance.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64. It is biased upwards for few images: compare equal counts.

    Args:
        sampled: [N, E]. With Inception features, and 50,000 images, this is FID.

    Raises:
        ShapeError: the sampled features are not [N, E] with N >= 2.

    Source: Heusel et al. 2017, eq. 6; Dowson & Landau 1982. Its gradient by C1 is 1 - T for the linear map T that moves one
    distribution to the other; the influence of an image follows by the chain rule.
    """
    _check(sampled, real.sample)
    mean, covariance = _moments(sampled)
    value, whitening, singular = _frechet((mean, covariance), (real.mean, real.covariance))
    shift, influence = mean - real.mean, []
    unbiased = len(sampled) / (len(sampled) - 1)  # as the covariance is
    for block in _blocks(sampled):
        centred = block - mean  # [B, E]
        transported = ((centred @ whitening).square() * singular).sum(dim=1)  # x T x
        influence.append(2 * centred @ shift + unbiased * (centred.square().sum(dim=1) - transported))
    return Estimate(value, torch.cat(influence))


def kernel_distance(sampled: Tensor, real: Statistics) -> Estimate:
    """Unbiased estimate of the squared maximum mean discrepancy with the polynomial kernel; with Inception features, KID.

    Source: Bińkowski et al. 2018, eq. 4 and section 4.
    """
    return _discrepancy(sampled, real, polynomial_kernel, 0)


def cmmd(sampled: Tensor, real: Statistics) -> Estimate:
    """CMMD: unbiased estimate of the squared maximum mean discrepancy of CLIP embeddings with the Gaussian kernel, times 1,000.

    Source: Jayasumana et al. 2024, section 4. The authors' code keeps the pairs of each image with itself, which adds about
    1000 (1 - k) (1 / N + 1 / M) for a mean kernel k.
    """
    found = _discrepancy(sampled, real, gaussian_kernel, 1)
    return Estimate(CMMD_SCALE * found.value, CMMD_SCALE * found.rows)


def manifold_overlap(sampled: Tensor, real: Statistics) -> dict[str, Estimate]:
    """Precision, recall, density and coverage of K sampled images; empty with too few images of either kind.

    An image lies on the manifold of a set if it is within the radius of one of its images, the distance to a near neighbour of
    the same set. Precision is the share of sampled images on the manifold of the real ones, recall that of real images on the
    manifold of the sampled. Density counts the real images in whose radius a sampled one lies, as a share of the number of
    neighbours; coverage is the share of real images with a sampled one in their radius. The rows of recall and coverage are real
    images.

    Source: Kynkäänniemi et al. 2019, eq. 1 and 2; Naeem et al. 2020, eq. 4 and 5.
    """
    _check(sampled, real.sample)
    rows, others = subset(sampled).double(), real.sample.double()
    found: dict[str, Estimate] = {}
    if min(len(rows), len(others)) > MANIFOLD_NEIGHBOURS:
        radii = _radii(rows, MANIFOLD_NEIGHBOURS)
        is_real = _inside(rows, others, real.manifold_radii)
        precision, recall = is_real.any_rows, _inside(others, rows, radii).any_rows
        found = {"precision": _share(precision), "recall": _share(recall)}
    if len(others) > DENSITY_NEIGHBOURS:
        inside = _inside(rows, others, real.density_radii)
        density = inside.counts.double() / DENSITY_NEIGHBOURS
        found |= {"density": Estimate(density.mean().item(), density), "coverage": _share(inside.any_columns)}
    return found


def _check(*sets: Tensor) -> None:
    if any(each.dim() != 2 or each.shape[1] != sets[0].shape[1] or len(each) < 2 for each in sets):
        shapes = " and ".join(str(tuple(each.shape)) for each in sets)
        raise ShapeError(f"embeddings: got {shapes}, expected [N, E] and [M, E] with N, M >= 2.")


def _blocks(features: Tensor) -> Iterator[Tensor]:
    """Yield blocks [B, E] in float64, so that no copy of all features is made."""
    for start in range(0, len(features), _BLOCK):
        yield features[start : start + _BLOCK].double()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [E] and covariance [E, E] of features [N, E], in float64 without a copy of them."""
    mean = torch.stack([block.sum(dim=0) for block in _blocks(features)]).sum(dim=0) / len(features)
    products = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for block in _blocks(features):
        products += (block - mean).T @ (block - mean)
    return mean, products / (len(features) - 1)


def _frechet(sampled: tuple[Tensor, Tensor], real: tuple[Tensor, Tensor]) -> tuple[float, Tensor, Tensor]:
    """Fréchet distance of two means and covariances, and the map T between them.

    Returns:
        The distance; a matrix W [E, E] and numbers s [E] such that x T x is the sum of s (x W)^2 for a centred sampled x.
    """
    (mean, covariance), (real_mean, real_covariance) = sampled, real
    variances, directions = torch.linalg.eigh(covariance)
    deviations = variances.clamp(min=0).sqrt()  # [E]
    # The eigenvalues of (C1 C2)^(1/2) are the singular values of root1^T root2, which avoids the root of a rounded product.
    left, singular, _ = torch.linalg.svd((directions * deviations).T @ _root(real_covariance))
    distance = (mean - real_mean).square().sum() + covariance.trace() + real_covariance.trace() - 2 * singular.sum()
    is_there = variances > _SMALLEST * variances[-1]
    inverse = torch.where(is_there, 1 / deviations.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return float(distance), (directions * inverse) @ left, singular


def _root(covariance: Tensor) -> Tensor:
    """Return a matrix [E, E] whose product with its transpose is the covariance."""
    variances, directions = torch.linalg.eigh(covariance)
    root: Tensor = directions * variances.clamp(min=0).sqrt()
    return root


def _discrepancy(sampled: Tensor, real: Statistics, kernel: Kernel, number: int) -> Estimate:
    """Squared maximum mean discrepancy of K sampled rows; `number` is that of the kernel in `Statistics.kernel_means`."""
    _check(sampled, real.sample)
    rows, others = subset(sampled).double(), real.sample.double()
    own = _own_means(rows, kernel)  # [K]
    across = torch.cat([kernel(block, others).mean(dim=1) for block in _blocks(rows)])  # [K]
    value = own.mean() + real.kernel_means[number] - 2 * across.mean()
    return Estimate(value.item(), 2 * (own - across))


def _own_means(rows: Tensor, kernel: Kernel) -> Tensor:
    """Mean kernel [K] of each of K rows with all others."""
    sums = []
    for number, block in enumerate(_blocks(rows)):
        values = kernel(block, rows)  # [B, K]
        sums.append(values.sum(dim=1) - values.diagonal(number * _BLOCK))
    return torch.cat(sums) / (len(rows) - 1)


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Squared distances [B, K] of all pairs."""
    squares = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)
    return (squares - 2 * first @ second.T).clamp(min=0)


def _radii(rows: Tensor, count: int) -> Tensor:
    """Distance [K] of each row to its neighbour number `count`, not counting itself; NaN if there are too few."""
    if len(rows) <= count:
        return torch.full((len(rows),), math.nan, dtype=torch.float64)
    nearest = [_squared_distances(block, rows).kthvalue(count + 1, dim=1).values for block in _blocks(rows)]
    return torch.cat(nearest).sqrt()  # the row itself is the nearest, at distance zero


class _Inside(NamedTuple):
    """Rows inside of balls."""

    counts: Tensor
    """[B], balls around each row."""
    any_columns: Tensor
    """[K], True for balls with a row."""

    @property
    def any_rows(self) -> Tensor:
        """[B], True for rows in some ball."""
        return self.counts > 0


def _inside(rows: Tensor, centres: Tensor, radii: Tensor) -> _Inside:
    """Count the balls around centres [K, E] with radii [K] that rows [B, E] lie in."""
    counts, has_row = [], torch.zeros(len(centres), dtype=torch.bool)
    for block in _blocks(rows):
        is_in = _squared_distances(block, centres).sqrt() <= radii
        counts.append(is_in.sum(dim=1))
        has_row |= is_in.any(dim=0)
    return _Inside(torch.cat(counts), has_row)


def _share(is_so: Tensor) -> Estimate:
    return Estimate(is_so.double().mean().item(), is_so.double())
