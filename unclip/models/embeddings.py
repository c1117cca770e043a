"""Normalisation of CLIP's image embeddings for the models, and their quantisation to tokens and back.

Models take and return embeddings as CLIP returns them (unit norm); only this module decides how they are normalised inside.
The statistics of the training rows are part of the model's weights, so a checkpoint cannot be used with different ones.

Letters: B batch, N rows, E embedding width, K kept principal components.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from unclip.errors import CheckpointError, ConfigError, InputError, ShapeError

Normalization = Literal["standardise", "scale"]
"""standardise: every dimension to mean 0 and variance 1, as in published priors, which store clip_mean and clip_std with
their weights. scale: one factor for all dimensions, as in the paper, which preserves angles."""

IMAGE_STD = 17.2 / 1024**0.5
"""Standard deviation of pixels in [-1, 1] implied by the paper's factor: 17.2 for unit norm in 1,024 dimensions."""

SMALLEST_STD = 1e-6


@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over embeddings from which their statistics follow; the sums of parts add up to those of the whole."""

    count: int
    total: Tensor
    """[E] float64, sum of the embeddings."""
    products: Tensor
    """[E, E] float64, sum of the outer products of the embeddings with themselves."""

    @classmethod
    def of(cls, embeddings: Tensor) -> "Moments":
        """Moments of embeddings [N, E].

        Raises:
            ShapeError: embeddings is not [N, E].
        """
        if embeddings.dim() != 2:
            raise ShapeError(f"statistics: got embeddings {tuple(embeddings.shape)}, expected rows of [N, E].")
        values = embeddings.double()
        return cls(len(values), values.sum(dim=0), values.T @ values)

    def plus(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    def mean(self) -> Tensor:
        """Mean of the embeddings, [E] float64."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """Unbiased covariance of the embeddings, [E, E] float64.

        Raises:
            ShapeError: there are fewer than two embeddings.
        """
        if self.count < 2:
            raise ShapeError(f"statistics: got {self.count} embeddings, expected at least 2 rows of [N, E].")
        mean = self.mean()
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


class EmbeddingStatistics(nn.Module):
    """Mean and standard deviation of the training rows' image embeddings, and the normalisation based on them."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, normalization: Normalization = "standardise") -> None:
        """Args:
        mean: [E].
        std: [E].
        """
        super().__init__()
        self.normalization = normalization
        self.register_buffer("mean", mean.float())  # [E]
        self.register_buffer("std", std.float())  # [E]

    @classmethod
    def empty(cls, embedding_dim: int, normalization: Normalization = "standardise") -> "EmbeddingStatistics":
        """Placeholders, for a model whose weights are about to be loaded."""
        return cls(torch.zeros(embedding_dim), torch.ones(embedding_dim), normalization)

    @classmethod
    def of(cls, embeddings: Tensor, normalization: Normalization = "standardise") -> "EmbeddingStatistics":
        """Statistics of embeddings [N, E], summed in float64.

        Raises:
            ShapeError: embeddings is not [N, E], or has fewer than two rows.
        """
        return cls.of_moments(Moments.of(embeddings), normalization)

    @classmethod
    def of_moments(cls, moments: Moments, normalization: Normalization = "standardise") -> "EmbeddingStatistics":
        """Statistics of the embeddings with these moments.

        Raises:
            ShapeError: there are fewer than two embeddings.
        """
        std = moments.covariance().diagonal().clamp(min=0).sqrt()
        return cls(moments.mean(), std.clamp(min=SMALLEST_STD), normalization)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Shift and scale of the normalisation, [E] float32 each: `clip_mean` and `clip_std` of published priors.

        Source: Ramesh et al. 2022, section 2.2 and appendix C, for "scale".
        """
        if self.normalization == "standardise":
            return self.mean, self.std
        root_mean_square = (self.mean.double().square() + self.std.double().square()).mean().sqrt()
        return torch.zeros_like(self.mean), (root_mean_square / IMAGE_STD).float().expand_as(self.std)

    def normalize(self, embedding: Tensor) -> Tensor:
        """Normalise [B, E] as CLIP returns it to [B, E] float32 in the models' units; returns a new tensor."""
        shift, scale = self.affine()
        return (embedding.float() - shift) / scale

    def denormalize(self, embedding: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        shift, scale = self.affine()
        return embedding.float() * scale + shift

    def with_norm(self, embedding: Tensor) -> Tensor:
        """Scale normalised embeddings [B, E] so that they denormalise to the root-mean-square norm of the training rows'
        embeddings, which is 1 for CLIP's of unit norm."""
        raw = self.denormalize(embedding)  # [B, E]
        norm = (self.mean.square() + self.std.square()).sum().sqrt()
        return self.normalize(raw * (norm / raw.norm(dim=1, keepdim=True).clamp(min=1e-12)))

    def check(self, name: str) -> None:
        """Check that embeddings can be normalised and denormalised; raises `InputError` if not."""
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()):
            raise InputError(
                f"{name}: got a non-finite mean or a standard deviation that is not finite and positive, expected those of a "
                "dataset. This model was never given its statistics; take them from the dataset that it was trained on."
            )

    def is_identity(self) -> bool:
        """Return True if normalisation changes nothing."""
        return not self.mean.any() and bool((self.std == 1).all())

    def digest(self) -> str:
        """sha256 (hex) of mean and standard deviation; equal for all models of one dataset."""
        values = torch.cat([self.mean, self.std]).cpu().contiguous()
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def check_agreement(statistics: Mapping[str, EmbeddingStatistics]) -> None:
    """Check that the models and the dataset use the same embeddings.

    Args:
        statistics: name -> statistics used in training. Models that do not normalise, such as imported decoders, agree with
            all others.

    Raises:
        CheckpointError: the statistics differ; names the first two that do.
        InputError: see `EmbeddingStatistics.check`.
    """
    for name, own in statistics.items():
        own.check(name)
    normalising = [(name, own) for name, own in statistics.items() if not own.is_identity()]
    for name, own in normalising[1:]:
        first, expected = normalising[0]
        if own.digest() != expected.digest():
            raise CheckpointError(
                f"{name}: got embeddings of {len(own.mean)} dimensions with statistics {own.digest()[:12]}, expected "
                f"those of the {first}, {len(expected.mean)} with {expected.digest()[:12]}. They were trained on different "
                "datasets or with different CLIPs; take both from one run."
            )


class PrincipalComponents(NamedTuple):
    """Directions in which the image embeddings of the training rows vary."""

    components: Tensor
    """[E, E] float32, one per row, orthonormal, by decreasing variance."""
    explained_variance_ratio: Tensor
    """[E] float32, share of the variance along each component."""

    @classmethod
    def of(cls, embeddings: Tensor) -> "PrincipalComponents":
        """Principal components of embeddings [N, E], computed in float64.

        Signs are chosen so that each component's largest element is positive; the same embeddings always give the same
        components.
        """
        return cls.of_moments(Moments.of(embeddings))

    @classmethod
    def of_moments(cls, moments: Moments) -> "PrincipalComponents":
        """Principal components of the embeddings with these moments; see `of`."""
        variances, vectors = torch.linalg.eigh(moments.covariance())
        variances, components = variances.flip(0).clamp(min=0), vectors.T.flip(0)
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        explained = variances / variances.sum().clamp(min=1e-12)
        return cls((components * largest.sign()).float(), explained.float())

    def num_components(self, explained: float) -> int:
        """Number of leading components that explain this share of the variance."""
        cumulative = self.explained_variance_ratio.double().cumsum(0)
        return min(int((cumulative < explained).sum()) + 1, len(cumulative))


class EmbeddingQuantizer(nn.Module):
    """Quantises image embeddings to K buckets, and their dot product with the caption's embedding to one more.

    Source: Ramesh et al. 2022, section 2.2 (autoregressive prior).
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor
    similarity_range: Tensor
    similarity_counts: Tensor

    def __init__(self, embedding_dim: int, num_components: int, num_buckets: int) -> None:
        """Placeholders, for a model whose weights are about to be loaded."""
        super().__init__()
        self.num_buckets = num_buckets
        self.register_buffer("mean", torch.zeros(embedding_dim))  # [E]
        self.register_buffer("components", torch.zeros(num_components, embedding_dim))  # [K, E]
        self.register_buffer("low", torch.zeros(num_components))  # [K]
        self.register_buffer("high", torch.ones(num_components))  # [K]
        self.register_buffer("similarity_range", torch.tensor([-1.0, 1.0]))  # [2]
        self.register_buffer("similarity_counts", torch.zeros(num_buckets))  # [num_buckets]

    @classmethod
    def fit(
        cls,
        image_embedding: Tensor,
        similarity: Tensor,
        statistics: EmbeddingStatistics,
        principal: PrincipalComponents,
        *,
        explained: float,
        num_buckets: int,
    ) -> "EmbeddingQuantizer":
        """Fit buckets that cover the training rows.

        Args:
            image_embedding: [N, E], training rows or a sample of them.
            similarity: [N], dot products with the unit-norm text embeddings of their captions.
            statistics: of all training rows.
            principal: of all training rows.
            explained: share of the variance that the kept components explain; the rest is lost.
            num_buckets: number of buckets per component and for the dot product.

        Raises:
            ShapeError: the shapes do not match.
            ConfigError: num_buckets is below 2.
        """
        if image_embedding.dim() != 2 or similarity.shape != image_embedding.shape[:1] or len(similarity) < 2:
            raise ShapeError(
                f"quantizer: got embeddings {tuple(image_embedding.shape)} and dot products {tuple(similarity.shape)}, "
                "expected [N, E] and [N] of at least 2 rows."
            )
        if num_buckets < 2:
            raise ConfigError(f"num_buckets: got {num_buckets}, expected at least 2.")
        quantizer = cls(image_embedding.shape[1], principal.num_components(explained), num_buckets)
        quantizer.mean.copy_(statistics.mean)
        quantizer.components.copy_(principal.components[: len(quantizer.components)])
        coordinates = (image_embedding.float() - quantizer.mean) @ quantizer.components.T  # [N, K]
        quantizer.low.copy_(coordinates.amin(dim=0))
        quantizer.high.copy_(torch.maximum(coordinates.amax(dim=0), quantizer.low + SMALLEST_STD))
        lowest = similarity.min().float()
        quantizer.similarity_range.copy_(
            torch.stack([lowest, torch.maximum(similarity.max().float(), lowest + SMALLEST_STD)])
        )
        found = quantizer.encode_similarity(similarity)  # [N]
        quantizer.similarity_counts.copy_(torch.bincount(found, minlength=num_buckets))
        return quantizer

    @property
    def num_components(self) -> int:
        return len(self.components)

    def encode(self, image_embedding: Tensor) -> Tensor:
        """Quantise [B, E] as CLIP returns it to [B, K] int64 below `num_buckets`, clamping values out of range."""
        coordinates = (image_embedding.float() - self.mean) @ self.components.T  # [B, K]
        return _bucket(coordinates, self.low, self.high, self.num_buckets)

    def decode(self, buckets: Tensor) -> Tensor:
        """Convert buckets [B, K] int64 to embeddings [B, E] float32, at the midpoints of the buckets."""
        middle = (buckets + 0.5) / self.num_buckets  # [B, K]
        return (self.low + middle * (self.high - self.low)) @ self.components + self.mean

    def encode_similarity(self, similarity: Tensor) -> Tensor:
        """Quantise dot products [B] of unit-norm image and text embeddings to [B] int64 below `num_buckets`."""
        return _bucket(similarity.float(), self.similarity_range[0], self.similarity_range[1], self.num_buckets)

    def draw_similarity(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw buckets [count] int64 from the upper half of the training rows' dot products.

        Source: Ramesh et al. 2022, section 2.2 ("a dot product from the top half of the distribution").
        """
        from_above = self.similarity_counts.flip(0).cumsum(0)  # rows in this bucket and above
        before = from_above - self.similarity_counts.flip(0)
        share = (from_above[-1] / 2 - before).clamp(min=0)
        upper = torch.minimum(self.similarity_counts.flip(0), share).flip(0)  # [num_buckets]
        return torch.multinomial(upper, count, replacement=True, generator=generator)


def _bucket(values: Tensor, low: Tensor, high: Tensor, num_buckets: int) -> Tensor:
    return ((values - low) / (high - low) * num_buckets).floor().clamp(0, num_buckets - 1).long()
