"""Distances of distributions: closed forms of Gaussians, loops in float64, torchmetrics, and sets with known answers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.image.kid import poly_mmd

from unclip.errors import ShapeError
from unclip.evaluation import distances
from unclip.evaluation.distances import Statistics, cmmd, frechet, frechet_distance, kernel_distance, manifold_overlap
from unclip.evaluation.intervals import intervals_of


def gaussian(count: int, mean: torch.Tensor, covariance: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return embeddings [count, E] with exactly this sample mean and covariance."""
    draws = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = draws - draws.mean(dim=0)
    white = draws @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(draws.T))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_with_common_axes() -> None:
    """|m1 - m2|^2 + the sum of (s1 - s2)^2 over standard deviations."""
    axes = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    stds = torch.tensor([[0.1, 0.5, 1.0, 2.0, 3.0], [0.2, 0.4, 1.5, 0.1, 3.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1, 2, 3, 4], [1.0, 1, 1, 1, 1]], dtype=torch.float64)
    first, second = (gaussian(40 + n, means[n], axes * stds[n] ** 2 @ axes.T, seed=n) for n in (0, 1))
    expected = (means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_gaussians_with_different_axes() -> None:
    """In two dimensions tr (C1 C2)^(1/2) = (tr C1 C2 + 2 (det C1 C2)^(1/2))^(1/2)."""
    covariances = torch.tensor([[[2.0, 0.8], [0.8, 1.0]], [[0.5, -0.3], [-0.3, 0.7]]], dtype=torch.float64)
    product = covariances[0] @ covariances[1]
    cross = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    expected = covariances[0].trace() + covariances[1].trace() - 2 * cross
    first, second = (gaussian(30, torch.zeros(2, dtype=torch.float64), covariances[n], seed=n) for n in (0, 1))
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_fewer_embeddings_than_dimensions() -> None:
    few = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(few, few.flip(0)) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(few, few + 0.5) == pytest.approx(64 * 0.25, rel=1e-6)
    with pytest.raises(ShapeError, match="embeddings: got"):
        frechet_distance(few, few[:, :3])
    with pytest.raises(ShapeError, match="embeddings: got"):
        frechet_distance(few, few[:1])


def normal(count: int, width: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Features [count, width] of a normal distribution, float32."""
    return shift + scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def unit(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return F.normalize(normal(count, width, seed, shift), dim=1)


def test_frechet_distance_from_statistics_is_that_of_the_features() -> None:
    sampled, real = normal(700, 6, 0, 0.3), normal(900, 6, 1)
    assert frechet(sampled, Statistics.of(real)).value == pytest.approx(frechet_distance(sampled, real), rel=1e-12)


@pytest.mark.parametrize("count", [60, 5], ids=["many", "fewer than dimensions"])
def test_influence_on_the_frechet_distance_is_its_derivative(count: int) -> None:
    """Oracle: central differences of the distance by the weight of one image, with weighted means and covariances."""
    sampled, real = normal(count, 8, 0, 0.3, 1.5).double(), Statistics.of(normal(200, 8, 1))
    found = frechet(sampled, real)

    def weighted(index: int, change: float) -> float:
        weights = torch.full((count,), (1 - change) / count, dtype=torch.float64)
        weights[index] += change
        mean = weights @ sampled
        covariance = (sampled - mean).T @ ((sampled - mean) * weights[:, None]) * count / (count - 1)
        return distances._frechet((mean, covariance), (real.mean, real.covariance))[0]

    rows = found.rows - found.rows.mean()
    for index in range(3):
        step = 1e-5
        slope = (weighted(index, step) - weighted(index, -step)) / (2 * step)
        assert rows[index].item() == pytest.approx(slope, rel=1e-4 if count > 8 else 1e-2)


def test_interval_of_the_frechet_distance_covers_the_closed_form() -> None:
    """Two standard normal distributions whose means differ by 1 in one of two dimensions: distance 1."""
    real = Statistics.of(gaussian(1_000, torch.zeros(2).double(), torch.eye(2).double()))
    covered = 0
    for seed in range(200):
        sampled = normal(300, 2, 10 + seed)
        sampled[:, 0] += 1
        low, high = intervals_of({"distance": frechet(sampled, real)})["distance"]
        covered += low <= 1 <= high
    assert 178 <= covered <= 199, "95 % of 200 are 190, with a standard error of 3"


def loop(first: torch.Tensor, second: torch.Tensor, kernel: str) -> float:
    """Unbiased squared maximum mean discrepancy in Python's floats, pair by pair."""

    def value(x: list[float], y: list[float]) -> float:
        if kernel == "polynomial":
            return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3
        return math.exp(-sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (2 * 10**2))

    one, other = first.double().tolist(), second.double().tolist()

    def own(rows: list[list[float]]) -> float:
        total = math.fsum(value(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j)
        return total / (len(rows) * (len(rows) - 1))

    across = math.fsum(value(x, y) for x in one for y in other) / (len(one) * len(other))
    return own(one) + own(other) - 2 * across


def test_kid_and_cmmd_against_loops_and_torchmetrics() -> None:
    sampled, real = unit(41, 16, 0, 0.2), unit(37, 16, 1)
    statistics = Statistics.of(real)
    assert kernel_distance(sampled, statistics).value == pytest.approx(loop(sampled, real, "polynomial"), abs=1e-9)
    assert cmmd(sampled, statistics).value == pytest.approx(1000 * loop(sampled, real, "gaussian"), abs=1e-6)
    expected = poly_mmd(sampled[:37].double(), real.double(), degree=3, gamma=None, coef=1.0).item()  # of equal counts
    assert kernel_distance(sampled[:37], statistics).value == pytest.approx(expected, abs=1e-9)


def test_cmmd_of_point_masses() -> None:
    """Two points at distance 2: both own kernels are 1, the other is exp(-4 / 200)."""
    first, second = torch.eye(3)[:1].expand(5, -1), -torch.eye(3)[:1].expand(4, -1)
    expected = 1000 * (2 - 2 * math.exp(-0.02))
    assert cmmd(first, Statistics.of(second)).value == pytest.approx(expected)
    assert cmmd(first, Statistics.of(first)).value == pytest.approx(0, abs=1e-9)


def test_unbiased_distances_of_one_distribution_are_zero_on_average() -> None:
    found = [
        kernel_distance(unit(50, 8, 2 * seed), Statistics.of(unit(50, 8, 2 * seed + 1))).value for seed in range(100)
    ]
    values = torch.tensor(found)
    assert abs(values.mean()) < 3 * values.std() / 10 and values.min() < 0 < values.max()


@pytest.mark.parametrize("distance", [kernel_distance, cmmd], ids=["kid", "cmmd"])
def test_intervals_of_kernel_distances_are_as_wide_as_repeated_samples_scatter(distance: distances.Distance) -> None:
    real = Statistics.of(unit(400, 8, 0))
    estimates = [distance(unit(200, 8, 1 + seed, 0.3), real) for seed in range(60)]
    scatter = torch.tensor([each.value for each in estimates]).std().item()
    widths = torch.tensor([each.rows.std().item() / math.sqrt(200) for each in estimates])
    assert widths.mean().item() == pytest.approx(scatter, rel=0.25)


def test_intervals_of_estimates_with_intervals() -> None:
    sampled, real = unit(300, 8, 0, 0.3), Statistics.of(unit(300, 8, 1))
    estimates = {"fd": frechet(sampled, real), "kid": kernel_distance(sampled, real), "cmmd": cmmd(sampled, real)}
    for name, (low, high) in intervals_of(estimates).items():
        assert 0 < low < estimates[name].value < high, name


def test_precision_recall_density_and_coverage_of_constructed_sets() -> None:
    """Real images on a grid of distance 1; every fourth neighbour or so is within reach, and far samples are off the manifold."""
    real = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), dim=-1).reshape(-1, 2)
    statistics = Statistics.of(real)
    assert {name: each.value for name, each in manifold_overlap(real, statistics).items()} == {
        "precision": 1.0,
        "recall": 1.0,
        "density": pytest.approx(loop_density(real, real, 5)),
        "coverage": 1.0,
    }
    far = {name: each.value for name, each in manifold_overlap(real + 100, statistics).items()}
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    half = torch.cat([real[:8], real[:8] + 100])
    found = manifold_overlap(half, statistics)
    assert found["precision"].value == 0.5 and found["precision"].rows.tolist() == [1.0] * 8 + [0.0] * 8
    assert found["density"].value == pytest.approx(loop_density(half, real, 5))
    assert found["coverage"].rows.tolist() == [float(is_covered) for is_covered in loop_covered(half, real, 5)]
    # All samples are one real image: precise, and nothing else is recalled.
    collapsed = {name: each.value for name, each in manifold_overlap(real[5:6].repeat(16, 1), statistics).items()}
    assert collapsed["precision"] == 1 and collapsed["recall"] == 1 / 16 and collapsed["coverage"] < 0.7
    # Samples far apart have wide radii that reach all real images.
    wide = {name: each.value for name, each in manifold_overlap(real * 40 - 60, statistics).items()}
    assert wide["precision"] == 0 and wide["recall"] == 1 and wide["coverage"] == 0


def radii_of(rows: torch.Tensor, count: int) -> list[float]:
    lists = rows.tolist()
    return [sorted(math.dist(row, other) for other in lists)[count] for row in lists]


def loop_density(sampled: torch.Tensor, real: torch.Tensor, count: int) -> float:
    radii = radii_of(real, count)
    inside = [
        math.dist(x, y) <= radius for x in sampled.tolist() for y, radius in zip(real.tolist(), radii, strict=True)
    ]
    return sum(inside) / (count * len(sampled))


def loop_covered(sampled: torch.Tensor, real: torch.Tensor, count: int) -> list[bool]:
    pairs = zip(real.tolist(), radii_of(real, count), strict=True)
    return [any(math.dist(x, y) <= radius for x in sampled.tolist()) for y, radius in pairs]


def test_too_few_images_have_no_manifold() -> None:
    few, many = normal(3, 4, 0), normal(20, 4, 1)
    assert set(manifold_overlap(few, Statistics.of(many))) == {"density", "coverage"}
    assert manifold_overlap(many, Statistics.of(few)) == {}
    assert set(manifold_overlap(many, Statistics.of(normal(5, 4, 2)))) == {"precision", "recall"}


def test_pairs_are_compared_for_a_seeded_choice_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "MAX_SAMPLE", 700)
    many, real = normal(1_500, 4, 0, 0.2), normal(1_600, 4, 1)
    statistics = Statistics.of(real)
    assert statistics.sample.shape == (700, 4) and statistics.num_images == 1_600
    assert torch.allclose(statistics.mean, real.double().mean(dim=0), rtol=0, atol=1e-12)
    assert torch.allclose(statistics.covariance, torch.cov(real.double().T), rtol=0, atol=1e-12)
    found = kernel_distance(many, statistics)
    assert found.count == 700 and found.value == kernel_distance(many, statistics).value
    assert found.value == pytest.approx(kernel_distance(distances.subset(many), statistics).value)
    assert torch.equal(distances.subset(many)[0], many[many.eq(distances.subset(many)[0]).all(dim=1)][0])
    assert frechet(many, statistics).count == 1_500 and manifold_overlap(many, statistics)["precision"].count == 700


@pytest.mark.parametrize("block", [7, 512])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled, real = normal(23, 4, 0, 0.2), normal(30, 4, 1)

    def measured() -> list[float]:
        statistics = Statistics.of(real)
        found = [frechet(sampled, statistics), kernel_distance(sampled, statistics), cmmd(sampled, statistics)]
        return [each.value for each in (*found, *manifold_overlap(sampled, statistics).values())]

    expected = measured()
    monkeypatch.setattr(distances, "_BLOCK", block)
    assert measured() == pytest.approx(expected, rel=1e-9)


def test_features_that_do_not_fit_are_refused() -> None:
    statistics = Statistics.of(normal(9, 4, 0))
    for distance in (frechet, kernel_distance, cmmd, manifold_overlap):
        with pytest.raises(ShapeError, match="embeddings: got"):
            distance(normal(9, 3, 0), statistics)
        with pytest.raises(ShapeError, match="embeddings: got"):
            distance(normal(1, 4, 0), statistics)
    with pytest.raises(ShapeError, match="embeddings: got"):
        Statistics.of(normal(1, 4, 0))
