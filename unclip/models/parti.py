"""Parti's Transformer: an encoder of the caption and a decoder of the image's tokens.

Source: Yu et al. 2022, "Scaling Autoregressive Models for Content-Rich Text-to-Image Generation", section 2. The encoder is
bidirectional. The decoder is causal over the image tokens, row by row, and attends to the encoder's outputs. Text is dropped
in training, for classifier-free guidance on logits. All image tokens attend to all tokens before them; the paper's
sparse attention and its pretraining of the encoder are left out.

Letters: B batch, L text tokens, N image tokens, D width, K codebook size, R sequences.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unclip.config import require
from unclip.models.clip import text_mask
from unclip.models.image_tokens import ImageTokenModel
from unclip.models.layers import TransformerBlock
from unclip.models.token_transformer import (
    GridPositions,
    TokenTransformer,
    TokenTransformerConfig,
    mean_cross_entropy,
)


@dataclasses.dataclass(frozen=True)
class PartiConfig(TokenTransformerConfig):
    """Settings of Parti."""

    encoder_depth: int = 12
    """Transformer blocks over the text tokens."""
    text_vocab_size: int = 16_000
    """Text tokens that the model tells apart: the most frequent ones of the training captions; all others are one."""
    cond_drop_prob: float = 0.1
    """Probability of dropping the text during training, for classifier-free guidance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.encoder_depth >= 1, "encoder_depth", self.encoder_depth, "at least 1")


class Parti(ImageTokenModel):
    """Transformer encoder of a caption, and causal Transformer decoder of the tokens of its image."""

    loss_names = ("image",)

    def __init__(self, config: PartiConfig, text_length: int) -> None:
        """Args:
        text_length: L.
        """
        super().__init__(config, text_length)
        width = config.width
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.text_positions = nn.Parameter(torch.randn(text_length, width) * 0.01)
        self.image_positions = GridPositions(config.grid_size, width)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList([TransformerBlock(width, config.num_heads) for _ in range(config.encoder_depth)])
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = TokenTransformer(width, config.depth, config.num_heads, config.dropout, has_context=True)
        self.to_logits = nn.Linear(width, config.codebook_size)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        return (1.0,)

    def forward(self, tokens: Tensor, codes: Tensor, drop: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of each sample's image tokens, [B, 1]; arguments as for `ImageTokenModel.forward`."""
        return mean_cross_entropy(self.logits(tokens, codes, drop), codes)[:, None]

    def logits(self, tokens: Tensor, codes: Tensor, drop: Tensor | None = None) -> Tensor:
        """Logits [B, N, K] of each image token, given the tokens before it; arguments as for `forward`."""
        tokens = self.without(tokens, drop)  # [B, L]
        before = self.from_code(codes[:, :-1])  # [B, N - 1, D]
        x = torch.cat([self.start.expand(len(codes), 1, -1), before], dim=1) + self.image_positions(
            0, codes.shape[1]
        )  # [B, N, D]
        return self.to_logits(self.decoder(x, self.encode(tokens), text_mask(tokens)))  # type: ignore[no-any-return]

    def encode(self, tokens: Tensor) -> Tensor:
        """Outputs of the text encoder: [B, L] int64 -> [B, L, D]."""
        mask = text_mask(tokens)[:, None, None]  # [B, 1, 1, L]
        x = self.dropout(self.from_text(self.vocabulary(tokens)) + self.text_positions)  # [B, L, D]
        for block in self.encoder:
            x = block(x, mask)  # [B, L, D]
        return self.encoder_norm(x)  # type: ignore[no-any-return]

    def begin(self, tokens: Tensor, num_candidates: int) -> Callable[[Tensor | None], Tensor]:
        context = self.encode(tokens).repeat_interleave(num_candidates, dim=0)  # [R, L, D]
        mask = text_mask(tokens).repeat_interleave(num_candidates, dim=0)  # [R, L]
        caches = self.decoder.new_caches(self.config.num_image_tokens, self.text_length)
        start = self.start.expand(len(mask), 1, -1)  # [R, 1, D]

        def next_logits(last: Tensor | None) -> Tensor:
            x = start if last is None else self.from_code(last.repeat(len(mask) // len(last)))[:, None]
            x = x + self.image_positions(caches.length, caches.length + 1)  # [R, 1, D]
            return self.to_logits(self.decoder(x, context, mask, caches)[:, 0])  # type: ignore[no-any-return]

        return next_logits
