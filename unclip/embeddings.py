"""The one place that normalises CLIP embeddings for the diffusion models.

The paper scales unit-norm embeddings so that their elements have the variance of image pixels; standardising every
dimension does the same for any CLIP, and is what published unCLIP priors store with their weights.
"""

import torch
from torch import Tensor, nn

from unclip.errors import ShapeError


class EmbeddingStatistics(nn.Module):
    """Per-dimension mean and standard deviation of the image embeddings that a model was trained on."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())  # [E]
        self.register_buffer("std", std.float())  # [E]

    @classmethod
    def empty(cls, embedding_dim: int) -> "EmbeddingStatistics":
        """Placeholders, for a model whose weights are about to be loaded."""
        return cls(torch.zeros(embedding_dim), torch.ones(embedding_dim))

    @classmethod
    def of(cls, embeddings: Tensor) -> "EmbeddingStatistics":
        """Statistics of embeddings [N, E], summed in float64."""
        if embeddings.dim() != 2 or len(embeddings) < 2:
            raise ShapeError(
                f"statistics: got embeddings {tuple(embeddings.shape)}, expected at least 2 rows of [N, E]."
            )
        values = embeddings.double()
        return cls(values.mean(dim=0), values.std(dim=0).clamp(min=1e-6))

    def normalize(self, embedding: Tensor) -> Tensor:
        """[B, E] as CLIP gives it -> [B, E] with zero mean and unit variance; a new tensor."""
        return (embedding.float() - self.mean) / self.std

    def denormalize(self, embedding: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return embedding.float() * self.std + self.mean
