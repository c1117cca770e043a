"""The one place that normalises CLIP's image embeddings for the models, and turns them into tokens and back.

Models are handed embeddings as CLIP gives them (unit norm) and return such; what they compute with inside is decided here.
The statistics of the training rows lie in the model's weights, so a checkpoint cannot be used with others.

Letters: B batch, N rows, E embedding width, K kept principal components.
"""

import hashlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from unclip.errors import CheckpointError, ConfigError, InputError, ShapeError

Normalization = Literal["standardise", "scale"]
"""standardise: every dimension to mean 0 and variance 1, as published priors store it with their weights (clip_mean,
clip_std). scale: one factor for all, as in the paper, which keeps angles."""

IMAGE_STD = 17.2 / 1024**0.5
"""Standard deviation of pixels in [-1, 1] that the paper's factor stands for: 17.2 for unit norm in 1,024 dimensions."""

SMALLEST_STD = 1e-6


class EmbeddingStatistics(nn.Module):
    """Mean and standard deviation of the image embeddings of the training rows, and the normalisation that follows."""

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
            ShapeError: fewer than two rows, or not [N, E].
        """
        if embeddings.dim() != 2 or len(embeddings) < 2:
            raise ShapeError(
                f"statistics: got embeddings {tuple(embeddings.shape)}, expected at least 2 rows of [N, E]."
            )
        values = embeddings.double()
        return cls(values.mean(dim=0), values.std(dim=0).clamp(min=SMALLEST_STD), normalization)

    def affine(self) -> tuple[Tensor, Tensor]:
        """What is subtracted and what is divided by, [E] float32 each: `clip_mean` and `clip_std` of published priors.

        Source: Ramesh et al. 2022, section 2.2 and appendix C, for "scale".
        """
        if self.normalization == "standardise":
            return self.mean, self.std
        root_mean_square = (self.mean.double().square() + self.std.double().square()).mean().sqrt()
        return torch.zeros_like(self.mean), (root_mean_square / IMAGE_STD).float().expand_as(self.std)

    def normalize(self, embedding: Tensor) -> Tensor:
        """[B, E] as CLIP gives it -> [B, E] float32 in the models' units; a new tensor."""
        shift, scale = self.affine()
        return (embedding.float() - shift) / scale

    def denormalize(self, embedding: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        shift, scale = self.affine()
        return embedding.float() * scale + shift

    def check(self, name: str) -> None:
        """Raise `InputError` unless embeddings can be normalised with these numbers and back."""
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()):
            raise InputError(
                f"{name}: got a mean or standard deviation that is zero or no number, expected those of a dataset. "
                "This model was never given its statistics; take them from the dataset that it was trained on."
            )

    def is_identity(self) -> bool:
        """Whether normalising changes nothing."""
        return not self.mean.any() and bool((self.std == 1).all())

    def digest(self) -> str:
        """sha256 (hex) of mean and standard deviation: the same for all models of one dataset."""
        values = torch.cat([self.mean, self.std]).cpu().contiguous()
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def check_agreement(statistics: Mapping[str, EmbeddingStatistics]) -> None:
    """Check that models, and the dataset, speak of the same embeddings.

    Args:
        statistics: name -> those that it was trained with. Models that take embeddings as they are, as imported decoders
            do, agree with all.

    Raises:
        CheckpointError: they differ; names the first two that do.
        InputError: see `EmbeddingStatistics.check`.
    """
    for name, found in statistics.items():
        found.check(name)
    normalising = [(name, found) for name, found in statistics.items() if not found.is_identity()]
    for name, found in normalising[1:]:
        first, expected = normalising[0]
        if found.digest() != expected.digest():
            raise CheckpointError(
                f"{name}: got embeddings of {len(found.mean)} dimensions with statistics {found.digest()[:12]}, expected "
                f"those of the {first}, {len(expected.mean)} with {expected.digest()[:12]}. They were trained on different "
                "datasets or with different CLIPs; take both from one run."
            )


class PrincipalComponents(NamedTuple):
    """Directions in which the image embeddings of the training rows vary."""

    components: Tensor
    """[E, E] float32, a row each, orthonormal, by falling variance."""
    explained_variance_ratio: Tensor
    """[E] float32, share of the variance along each."""

    @classmethod
    def of(cls, embeddings: Tensor) -> "PrincipalComponents":
        """Of embeddings [N, E], in float64; a component's sign is that of its largest element, so that the same
        embeddings always give the same components.
        """
        centred = embeddings.double() - embeddings.double().mean(dim=0)
        variances, vectors = torch.linalg.eigh(centred.T @ centred / (len(centred) - 1))
        variances, components = variances.flip(0).clamp(min=0), vectors.T.flip(0)
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        explained = variances / variances.sum().clamp(min=1e-12)
        return cls((components * largest.sign()).float(), explained.float())

    def num_components(self, explained: float) -> int:
        """How many leading components hold this share of the variance."""
        cumulated = self.explained_variance_ratio.double().cumsum(0)
        return min(int((cumulated < explained).sum()) + 1, len(cumulated))


class EmbeddingQuantizer(nn.Module):
    """Image embeddings as K numbers below `num_buckets`, and their agreement with the caption as one more.

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
        """Buckets that cover what training rows hold.

        Args:
            image_embedding: [N, E], training rows or a sample of them.
            similarity: [N], their dot products with their captions' unit-norm text embeddings.
            statistics: of all training rows.
            principal: of all training rows.
            explained: share of the variance that the kept components hold; the rest of the squared error is lost.
            num_buckets: of each component, and of the dot product.

        Raises:
            ShapeError: shapes that do not fit each other.
            ConfigError: fewer than two buckets.
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
        """[B, E] as CLIP gives it -> [B, K] int64 below `num_buckets`; what lies outside takes the outermost bucket."""
        coordinates = (image_embedding.float() - self.mean) @ self.components.T  # [B, K]
        return _bucket(coordinates, self.low, self.high, self.num_buckets)

    def decode(self, buckets: Tensor) -> Tensor:
        """[B, K] int64 -> [B, E] float32, the middles of the buckets."""
        middle = (buckets + 0.5) / self.num_buckets  # [B, K]
        return (self.low + middle * (self.high - self.low)) @ self.components + self.mean

    def encode_similarity(self, similarity: Tensor) -> Tensor:
        """Dot products [B] of unit-norm image and text embeddings -> [B] int64 below `num_buckets`."""
        return _bucket(similarity.float(), self.similarity_range[0], self.similarity_range[1], self.num_buckets)

    def draw_similarity(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Buckets [count] int64, from the upper half of the training rows'.

        Source: Ramesh et al. 2022, section 2.2 ("a dot product from the top half of the distribution").
        """
        from_above = self.similarity_counts.flip(0).cumsum(0)  # rows in this bucket and those above it
        before = from_above - self.similarity_counts.flip(0)
        share = (from_above[-1] / 2 - before).clamp(min=0)
        upper = torch.minimum(self.similarity_counts.flip(0), share).flip(0)  # [num_buckets]
        return torch.multinomial(upper, count, replacement=True, generator=generator)


def _bucket(values: Tensor, low: Tensor, high: Tensor, num_buckets: int) -> Tensor:
    return ((values - low) / (high - low) * num_buckets).floor().clamp(0, num_buckets - 1).long()
