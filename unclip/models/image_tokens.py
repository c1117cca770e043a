"""Models that read a caption and predict the tokens of its image one after another: their common parts, and sampling.

Letters: B batch, L text tokens, N image tokens, K codebook size, R sequences.
"""

import abc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unclip.models.clip import Clip
from unclip.models.token_transformer import TextVocabulary, TokenSampling, TokenTransformerConfig, sample_tokens


class ImageTokenModel(nn.Module, abc.ABC):
    """Embeddings of text and image tokens, and the empty caption, which replaces dropped captions."""

    null_tokens: Tensor
    loss_names: tuple[str, ...]
    """Columns of the result of `forward`."""

    def __init__(self, config: TokenTransformerConfig, text_length: int) -> None:
        """Args:
        text_length: L.
        """
        super().__init__()
        self.config = config
        self.vocabulary = TextVocabulary(config.text_vocab_size)
        self.from_text = nn.Embedding(config.text_vocab_size, config.width)
        self.from_code = nn.Embedding(config.codebook_size, config.width)
        for embedding in (self.from_text, self.from_code):
            nn.init.normal_(embedding.weight, std=0.02)
        self.register_buffer("null_tokens", torch.zeros(text_length, dtype=torch.int64))  # [L]

    @property
    def text_length(self) -> int:
        """L."""
        return len(self.null_tokens)

    @property
    @abc.abstractmethod
    def loss_weights(self) -> tuple[float, ...]:
        """Weights of the losses that `forward` returns."""

    def set_null(self, tokens: Tensor) -> None:
        """Store the tokens of the empty caption, a batch of one."""
        self.null_tokens.copy_(tokens[0])

    def knows(self, clip: Clip) -> bool:
        """Return True if this CLIP's tokenizer gives the stored empty caption, so that it is that of the training."""
        return torch.equal(clip.tokenize([""])[0], self.null_tokens.cpu())

    def without(self, tokens: Tensor, drop: Tensor | None) -> Tensor:
        """Replace captions [B, L] by the empty one where drop [B] bool is True."""
        return tokens if drop is None else torch.where(drop[:, None], self.null_tokens, tokens)

    @abc.abstractmethod
    def forward(self, tokens: Tensor, codes: Tensor, drop: Tensor | None = None) -> Tensor:
        """Mean cross-entropies of each sample's tokens.

        Args:
            tokens: [B, L] int64; zeros after the last nonzero token are padding.
            codes: [B, N] int64, tokens of the image, row by row.
            drop: [B] bool, True = replace the text by the empty caption.

        Returns:
            [B, number of losses].
        """

    @abc.abstractmethod
    def begin(self, tokens: Tensor, num_candidates: int) -> Callable[[Tensor | None], Tensor]:
        """Read captions [B, L], to sample images of them.

        Returns:
            Function of the last token of each sequence, at first None, that returns the logits [R, K] of the next, with R =
            B * num_candidates; the candidates of a caption are next to each other. Fewer tokens than R are repeated.
        """

    @torch.no_grad()
    def sample(
        self,
        tokens: Tensor,
        settings: TokenSampling,
        *,
        negative: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample the tokens of `num_candidates` images for each caption.

        Args:
            tokens: [B, L] int64.
            settings: `guidance_scale` pushes the logits away from those without text.
            negative: [B, L] int64, captions to push away from instead.

        Returns:
            [B * num_candidates, N] int64; the candidates of a caption are next to each other.
        """
        if settings.guidance_scale != 1:
            away_from = self.null_tokens.expand_as(tokens) if negative is None else negative
            tokens = torch.cat([tokens, away_from])  # [2 B, L]
        next_logits = self.begin(tokens, settings.num_candidates)
        return sample_tokens(next_logits, self.config.num_image_tokens, settings, generator)
