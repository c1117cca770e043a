"""Normalisation and quantisation of CLIP's image embeddings."""

import pytest
import torch
import torch.nn.functional as F

from unclip.errors import CheckpointError, InputError, ShapeError
from unclip.models.embeddings import EmbeddingQuantizer, EmbeddingStatistics, PrincipalComponents, check_agreement


def unit_embeddings(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Unit-norm embeddings with decreasing variances along rotated axes, and a nonzero mean."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    values = torch.randn(rows, width, generator=generator) * 0.7 ** torch.arange(width) @ axes
    return F.normalize(values + 0.5 * axes[0], dim=1)


def test_the_scale_matches_the_paper() -> None:
    """17.2 for unit norm in 1,024 dimensions (Ramesh et al. 2022), whatever the mean."""
    embeddings = unit_embeddings(4000, 1024)
    normalized = EmbeddingStatistics.of(embeddings, "scale").normalize(embeddings)
    torch.testing.assert_close(normalized, 17.2 * embeddings, rtol=1e-3, atol=0)
    cosine = F.cosine_similarity(normalized[:1], normalized[1:2])
    torch.testing.assert_close(cosine, F.cosine_similarity(embeddings[:1], embeddings[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", ["standardise", "scale"])
@pytest.mark.parametrize("width", [8, 64])
def test_denormalize_inverts_normalize_and_inputs_are_not_changed(normalization, width: int) -> None:
    embeddings = unit_embeddings(500, width)
    statistics, before = EmbeddingStatistics.of(embeddings, normalization), embeddings.clone()
    once, twice = statistics.normalize(embeddings), statistics.normalize(embeddings)
    assert torch.equal(once, twice) and torch.equal(embeddings, before)
    torch.testing.assert_close(statistics.denormalize(once), embeddings)
    std = once.std(dim=0) if normalization == "standardise" else once.square().mean().sqrt() * torch.ones(width)
    torch.testing.assert_close(
        std, torch.full((width,), 1.0 if normalization == "standardise" else 0.5375), rtol=1e-3, atol=0
    )


def test_models_must_share_the_dataset_but_not_the_normalisation() -> None:
    embeddings = unit_embeddings(100, 8)
    statistics = EmbeddingStatistics.of(embeddings)
    check_agreement(
        {"prior": EmbeddingStatistics.of(embeddings, "scale"), "decoder": statistics, "dataset": statistics}
    )
    check_agreement({"prior": statistics, "decoder": EmbeddingStatistics.empty(8)})
    other = EmbeddingStatistics.of(embeddings[:99])
    with pytest.raises(
        CheckpointError, match=f"^dataset: got embeddings of 8 .* {other.digest()[:12]}, .* of the prior"
    ):
        check_agreement({"prior": statistics, "decoder": EmbeddingStatistics.empty(8), "dataset": other})
    with pytest.raises(InputError, match=r"^decoder: .* never given its statistics"):
        check_agreement({"prior": statistics, "decoder": EmbeddingStatistics(torch.zeros(8), torch.zeros(8))})


def test_a_digest_depends_on_the_values_and_survives_saving() -> None:
    statistics = EmbeddingStatistics.of(unit_embeddings(100, 8))
    loaded = EmbeddingStatistics.empty(8)
    assert loaded.digest() != statistics.digest()
    loaded.load_state_dict(statistics.state_dict())
    assert loaded.digest() == statistics.digest()


def fitted(embeddings: torch.Tensor, explained: float = 0.99, num_buckets: int = 1024) -> EmbeddingQuantizer:
    similarity = embeddings[:, 0]
    statistics, principal = EmbeddingStatistics.of(embeddings), PrincipalComponents.of(embeddings)
    return EmbeddingQuantizer.fit(
        embeddings, similarity, statistics, principal, explained=explained, num_buckets=num_buckets
    )


@pytest.mark.parametrize("explained", [0.9, 0.99, 0.999])
def test_quantisation_loses_at_most_the_allowed_variance(explained: float) -> None:
    embeddings = unit_embeddings(2000, 48)
    quantizer = fitted(embeddings, explained)
    lost = (quantizer.decode(quantizer.encode(embeddings)) - embeddings).square().sum()
    share = (lost / (embeddings - embeddings.mean(dim=0)).square().sum()).item()
    assert share <= 1 - explained + 1e-4
    one_less = PrincipalComponents.of(embeddings).explained_variance_ratio[: quantizer.num_components - 1].sum()
    assert one_less < explained, "one component more than needed"


def test_buckets_cover_the_range_of_each_component_and_clamp_the_rest() -> None:
    embeddings = unit_embeddings(2000, 16)
    quantizer = fitted(embeddings, explained=1.0, num_buckets=8)
    buckets = quantizer.encode(embeddings)
    assert buckets.amin(dim=0).eq(0).all() and buckets.amax(dim=0).eq(7).all()
    outside = quantizer.encode(100 * embeddings)
    assert outside.min() == 0 and outside.max() == 7
    assert torch.equal(quantizer.encode(quantizer.decode(buckets)), buckets)


def test_the_dot_product_is_drawn_from_the_upper_half_of_the_training_rows() -> None:
    embeddings = unit_embeddings(5001, 16)
    quantizer = fitted(embeddings, num_buckets=32)
    drawn = quantizer.draw_similarity(20_000, torch.Generator().manual_seed(0))
    similarity = embeddings[:, 0].sort().values
    upper = quantizer.encode_similarity(similarity[2500:])
    assert drawn.min() == upper.min()
    expected, found = (torch.bincount(buckets, minlength=32) / len(buckets) for buckets in (upper, drawn))
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
    assert torch.equal(drawn, quantizer.draw_similarity(20_000, torch.Generator().manual_seed(0)))


def test_principal_components_are_orthonormal_and_ordered() -> None:
    embeddings = unit_embeddings(1000, 16)
    principal = PrincipalComponents.of(embeddings)
    torch.testing.assert_close(principal.components @ principal.components.T, torch.eye(16), atol=1e-5, rtol=0)
    variances = ((embeddings - embeddings.mean(dim=0)) @ principal.components.T).var(dim=0)
    torch.testing.assert_close(variances / variances.sum(), principal.explained_variance_ratio, atol=1e-5, rtol=0)
    assert principal.num_components(1e-6) == 1 and principal.num_components(1.0) <= 16


def test_mismatched_shapes_are_rejected() -> None:
    embeddings = unit_embeddings(10, 4)
    statistics, principal = EmbeddingStatistics.of(embeddings), PrincipalComponents.of(embeddings)
    with pytest.raises(ShapeError, match=r"dot products \(9,\)"):
        EmbeddingQuantizer.fit(embeddings, embeddings[:9, 0], statistics, principal, explained=0.9, num_buckets=4)
