"""The autoregressive prior: P(image embedding | caption), one bucket of one principal component after another.

Source: Ramesh et al. 2022, section 2.2. A causal Transformer reads, in order, the encoded text tokens, the CLIP text
embedding, the bucket of the dot product of image and text embedding, and the buckets of the image embedding's principal
components by decreasing variance; the output at each token is the distribution of the next bucket. Dropped text is replaced
by the empty caption and an unknown dot product.

Letters: B batch, L text tokens, W width of the CLIP text encoder, E CLIP embedding width, D width of the prior, K principal
components, N candidates.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import added, require
from unclip.models.embeddings import EmbeddingQuantizer, EmbeddingStatistics
from unclip.models.layers import CausalTransformer, KeyValueCache
from unclip.models.prior import (
    DEFAULT_PRIOR_SAMPLING,
    PriorSampling,
    TextNorm,
    TextPrefix,
    best_candidate,
    repeat_captions,
)
from unclip.models.text import CaptionFeatures


@dataclasses.dataclass(frozen=True)
class AutoregressivePriorConfig:
    width: int = 512
    """Width of the Transformer."""
    depth: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads per block."""
    cond_drop_prob: float = 0.1
    """Probability of dropping the text during training, for classifier-free guidance."""
    explained_variance: float = 0.99
    """Share of the image embeddings' variance that the kept principal components explain; the paper loses less than 1 %."""
    num_buckets: int = 1024
    """Buckets per component and for the dot product."""
    text_norm: TextNorm = "none"
    """Normalisation of CLIP's text projection: none, a layer norm, or unit norm."""
    text_encodings: bool = added(True)
    """Read the encoded text tokens besides CLIP's text embedding."""

    def __post_init__(self) -> None:
        require(self.width % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of width {self.width}")
        require(self.depth >= 1, "depth", self.depth, "at least 1")
        require(0 <= self.cond_drop_prob < 1, "cond_drop_prob", self.cond_drop_prob, "a probability below 1")
        explained = self.explained_variance
        require(0 < explained <= 1, "explained_variance", explained, "a share above 0, at most 1")
        require(self.num_buckets >= 2, "num_buckets", self.num_buckets, "at least 2")


DALLE2_AUTOREGRESSIVE_PRIOR = AutoregressivePriorConfig(width=1664, depth=24, num_heads=26)
"""Ramesh et al. 2022, Table 3, "latent decoder": 0.81 B parameters with 319 components and a CLIP ViT-H, whose text encoder
replaces the separate one in the table (1.2 B); the table's "1 B" is not the sum of the two."""
BASE_AUTOREGRESSIVE_PRIOR = AutoregressivePriorConfig(width=1024, depth=16, num_heads=16)
"""205 M parameters with a ViT-L-14."""
SMALL_AUTOREGRESSIVE_PRIOR = AutoregressivePriorConfig(width=512, depth=12, num_heads=8)
"""40 M parameters with a ViT-L-14."""


class AutoregressivePrior(nn.Module):
    """Causal Transformer that predicts the buckets of CLIP image embeddings from text."""

    def __init__(
        self,
        config: AutoregressivePriorConfig,
        embedding_dim: int,
        text_width: int,
        text_length: int,
        num_components: int,
    ) -> None:
        """Args:
        embedding_dim: E.
        text_width: W, width of the text encodings.
        text_length: L, length of the text encodings.
        num_components: K.
        """
        super().__init__()
        self.config = config
        self.statistics = EmbeddingStatistics.empty(embedding_dim)
        self.quantizer = EmbeddingQuantizer(embedding_dim, num_components, config.num_buckets)
        width = config.width
        self.text = TextPrefix(width, embedding_dim, text_width, text_length, config.text_norm, config.text_encodings)
        self.from_similarity = nn.Embedding(config.num_buckets + 1, width)  # the last means unknown
        self.from_bucket = nn.Embedding(config.num_buckets, width)
        for embedding in (self.from_similarity, self.from_bucket):
            nn.init.normal_(embedding.weight, std=0.02)
        # the last component is never an input, so it needs no position
        self.positions = nn.Parameter(torch.randn(self.text.num_tokens + num_components, width) * 0.01)
        self.transformer = CausalTransformer(width, config.depth, config.num_heads)
        self.to_logits = nn.Linear(width, config.num_buckets)

    def forward(
        self,
        buckets: Tensor,
        similarity: Tensor,
        text_encodings: Tensor,
        text_mask: Tensor,
        text_embedding: Tensor,
        drop: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Predict each component's bucket from the buckets before it.

        Args:
            buckets: [B, K] int64, of the image embedding; the last is not used.
            similarity: [B] int64, bucket of the dot product of the image embedding and the unit-norm text embedding.
            text_encodings: [B, L, W].
            text_mask: [B, L] bool, True = keep.
            text_embedding: [B, E], CLIP's text projection before normalisation to unit norm.
            drop: [B] bool, True = drop the text and the dot product.
            kept: [N] int64, from `kept_tokens` for the same captions and `drop`; gives the same result faster.

        Returns:
            Logits [B, K, num_buckets].
        """
        prefix, keep = self._prefix(similarity, text_encodings, text_mask, text_embedding, drop)  # [B, L + 2, D]
        x = torch.cat([prefix, self.from_bucket(buckets[:, :-1])], dim=1) + self.positions  # [B, L + 1 + K, D]
        keep = F.pad(keep, (0, buckets.shape[1] - 1), value=True)  # [B, L + 1 + K]
        x = self.transformer(x, keep, num_outputs=buckets.shape[1], kept=kept)  # [B, K, D]
        return self.to_logits(x)  # type: ignore[no-any-return]

    def _prefix(
        self,
        similarity: Tensor,
        text_encodings: Tensor,
        text_mask: Tensor,
        text_embedding: Tensor,
        drop: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens before the first component [B, L + 2, D], and a mask [B, L + 2] that is False at padding."""
        text, keep = self.text(text_encodings, text_mask, text_embedding, drop)  # [B, L + 1, D], [B, L + 1]
        if drop is not None:
            similarity = torch.where(drop, self.config.num_buckets, similarity)
        similarity_token = self.from_similarity(similarity)[:, None]  # [B, 1, D]
        return torch.cat([text, similarity_token], dim=1), F.pad(keep, (0, 1), value=True)

    @torch.no_grad()
    def sample(
        self,
        text_encodings: Tensor,
        text_mask: Tensor,
        text_embedding: Tensor,
        settings: PriorSampling = DEFAULT_PRIOR_SAMPLING,
        *,
        negative: CaptionFeatures | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample image embeddings; of `num_candidates`, keep the one nearest to the text embedding.

        The dot product given to the Transformer is drawn from the upper half of those of the training rows.

        Args:
            text_encodings: [B, L, W].
            text_mask: [B, L] bool, True = keep.
            text_embedding: [B, E], CLIP's text projection before normalisation to unit norm.
            settings: `guidance_scale` pushes the logits away from those without text.
            negative: captions to push away from instead, with the same dot product.

        Returns:
            [B, E] float32, in CLIP's scale.

        Source: Ramesh et al. 2022, section 2.2; Ho & Salimans 2022, eq. 6, for logits.
        """
        num_candidates, guidance_scale = settings.num_candidates, settings.guidance_scale
        text = repeat_captions(CaptionFeatures(text_encodings, text_mask, text_embedding), num_candidates)
        count = len(text_mask) * num_candidates
        similarity = self.quantizer.draw_similarity(count, generator)  # [B * N]
        conditional = _CachedSequence(self, similarity, text, dropped=False)
        unconditional = None
        if guidance_scale != 1:
            others = text if negative is None else repeat_captions(negative, num_candidates)
            unconditional = _CachedSequence(self, similarity, others, dropped=negative is None)
        buckets: list[Tensor] = []
        for _ in range(self.quantizer.num_components):
            last = buckets[-1] if buckets else None
            logits = conditional.next_logits(last)  # [B * N, num_buckets]
            if unconditional is not None:
                null = unconditional.next_logits(last)
                logits = null + guidance_scale * (logits - null)
            buckets.append(_sample(logits, settings.temperature, generator))
        image_embedding = self.quantizer.decode(torch.stack(buckets, dim=1))  # [B * N, E]
        candidates = image_embedding.view(len(text_mask), num_candidates, -1)  # [B, N, E]
        return best_candidate(candidates, text_embedding, settings.best_by)


class _CachedSequence:
    """A partly processed sequence of the Transformer, with its key-value caches."""

    def __init__(self, prior: AutoregressivePrior, similarity: Tensor, text: Sequence[Tensor], dropped: bool) -> None:
        self.prior = prior
        drop = similarity.new_full((len(similarity),), dropped, dtype=torch.bool)
        self.pending, keep = prior._prefix(similarity, text[0], text[1], text[2], drop)  # [B, L + 2, D], [B, L + 2]
        self.keep = F.pad(keep, (0, prior.quantizer.num_components - 1), value=True)  # [B, L + 1 + K]
        self.caches: list[KeyValueCache] = prior.transformer.new_caches(len(prior.positions))
        self.length = 0

    def next_logits(self, last: Tensor | None) -> Tensor:
        """Logits [B, num_buckets] of the next component; `last` [B] holds the previous component's buckets, None at first."""
        if last is not None:
            self.pending = self.prior.from_bucket(last)[:, None]  # [B, 1, D]
        start, self.length = self.length, self.length + self.pending.shape[1]
        x = self.pending + self.prior.positions[start : self.length]
        x = self.prior.transformer(x, self.keep[:, : self.length], self.caches)
        return self.prior.to_logits(x[:, -1]).float()  # type: ignore[no-any-return]


def _sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Sample a bucket from each row: [B, num_buckets] -> [B] int64."""
    if temperature == 0:
        return logits.argmax(dim=1)
    return torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)[:, 0]
