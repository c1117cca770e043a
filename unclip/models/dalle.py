"""DALL·E's Transformer: a caption and an image as one sequence of tokens.

Source: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.2 and appendix B. The text tokens come first, then
those of the image, row by row; the output at each token is the distribution of the next one. Text and image tokens have
separate vocabularies. A position without a text token has a padding token of its own, which is learned, and which later
tokens attend to. Each token attends to all tokens before it; the paper's sparse attention is left out.

Letters: B batch, L text tokens, N image tokens, D width, K codebook size, V size of the text vocabulary, R sequences.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unclip.config import require
from unclip.models.clip import text_mask
from unclip.models.image_tokens import ImageTokenModel
from unclip.models.token_transformer import (
    GridPositions,
    TokenTransformer,
    TokenTransformerConfig,
    mean_cross_entropy,
)


@dataclasses.dataclass(frozen=True)
class DalleConfig(TokenTransformerConfig):
    """Settings of DALL·E; the paper trains with all captions, and its samples are not guided."""

    text_loss_weight: float = 0.125
    """Weight of the text tokens in the loss; the image tokens have the rest. Source: Ramesh et al. 2021, section 2.2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = self.text_loss_weight
        require(0 <= weight < 1, "text_loss_weight", weight, "at least 0 and below 1")


class DalleLogits(NamedTuple):
    """Logits of the tokens of a batch."""

    text: Tensor
    """[B, L - 1, V], of all text tokens but the first, which is the same for all captions."""
    image: Tensor
    """[B, N, K]."""


class Dalle(ImageTokenModel):
    """Causal Transformer over the tokens of a caption and of its image."""

    config: DalleConfig
    loss_names = ("text", "image")

    def __init__(self, config: DalleConfig, text_length: int) -> None:
        """Args:
        text_length: L.
        """
        super().__init__(config, text_length)
        width = config.width
        self.padding = nn.Parameter(torch.randn(text_length, width) * 0.02)
        self.text_positions = nn.Parameter(torch.randn(text_length, width) * 0.01)
        self.image_positions = GridPositions(config.grid_size, width)
        self.transformer = TokenTransformer(width, config.depth, config.num_heads, config.dropout)
        self.to_text_logits = nn.Linear(width, config.text_vocab_size)
        self.to_logits = nn.Linear(width, config.codebook_size)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        return self.config.text_loss_weight, 1 - self.config.text_loss_weight

    def forward(self, tokens: Tensor, codes: Tensor, drop: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of each sample's text tokens and of its image tokens.

        Args:
            tokens: [B, L] int64; zeros after the last nonzero token are padding, which is not predicted.
            codes: [B, N] int64, tokens of the image, row by row.
            drop: [B] bool, True = replace the text by the empty caption, and leave it out of the loss.

        Returns:
            [B, 2].
        """
        logits = self.logits(tokens, codes, drop)
        predicted = text_mask(tokens)[:, 1:]  # [B, L - 1]
        if drop is not None:
            predicted = predicted & ~drop[:, None]
        text = mean_cross_entropy(logits.text, self.vocabulary(tokens)[:, 1:], predicted)  # [B]
        return torch.stack([text, mean_cross_entropy(logits.image, codes)], dim=1)

    def logits(self, tokens: Tensor, codes: Tensor, drop: Tensor | None = None) -> DalleLogits:
        """Logits of each token, given the tokens before it; arguments as for `forward`, the last code is not used."""
        tokens = self.without(tokens, drop)  # [B, L]
        image = self.from_code(codes[:, :-1]) + self.image_positions(0, codes.shape[1] - 1)  # [B, N - 1, D]
        x = self.transformer(torch.cat([self._text(tokens), image], dim=1))  # [B, L + N - 1, D]
        text, image = x.split([self.text_length - 1, codes.shape[1]], dim=1)
        return DalleLogits(self.to_text_logits(text), self.to_logits(image))

    def _text(self, tokens: Tensor) -> Tensor:
        """Inputs [B, L, D] for text tokens [B, L]."""
        embedded = self.from_text(self.vocabulary(tokens))  # [B, L, D]
        text = torch.where(text_mask(tokens)[:, :, None], embedded, self.padding)  # [B, L, D]
        return text + self.text_positions

    def begin(self, tokens: Tensor, num_candidates: int) -> Callable[[Tensor | None], Tensor]:
        caches = self.transformer.new_caches(self.text_length + self.config.num_image_tokens - 1)

        def next_logits(last: Tensor | None) -> Tensor:
            if last is None:
                x = self.transformer(self._text(tokens), caches=caches)  # [B, L, D]
                caches.repeat(num_candidates)
                x = x[:, -1].repeat_interleave(num_candidates, dim=0)  # [R, D]
            else:
                place = caches.length - self.text_length
                last = last.repeat(len(tokens) * num_candidates // len(last))  # [R]
                x = self.from_code(last)[:, None] + self.image_positions(place, place + 1)  # [R, 1, D]
                x = self.transformer(x, caches=caches)[:, 0]  # [R, D]
            return self.to_logits(x)  # type: ignore[no-any-return]

        return next_logits
