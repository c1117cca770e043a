"""What the decoder reads of a caption: context tokens for its attention, and a vector for its timestep embedding.

Two sources, one shape of result. `ClipText` projects what a frozen CLIP makes of the caption; `TextTransformer` reads the
caption's tokens itself and is trained with the decoder. Both know the empty caption, which stands where text is dropped.

Sources: Ramesh et al. 2022, section 2.1 and Table 3; Nichol et al. 2022 (GLIDE), section 4 (trained text Transformer).

Letters: B batch, L text tokens, W width of the text encoder, E CLIP embedding width, X context width, D time-embedding width.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from unclip.config import require
from unclip.models.clip import Clip, text_mask
from unclip.models.layers import TransformerBlock

TextSource = Literal["none", "clip", "transformer"]
"""How captions are read: not at all, through the frozen CLIP, or by a Transformer trained with the decoder."""


@dataclasses.dataclass(frozen=True)
class TextTransformerConfig:
    width: int = 512
    """Width of the Transformer."""
    depth: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads a block."""

    def __post_init__(self) -> None:
        require(self.depth >= 1, "depth", self.depth, "at least 1")
        require(self.num_heads >= 1, "num_heads", self.num_heads, "at least 1")
        require(self.width % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of width {self.width}")


@dataclasses.dataclass(frozen=True)
class TextShape:
    """What a decoder must know of the tokenizer and the text encoder before it sees a caption."""

    length: int
    """L, tokens of a caption."""
    width: int
    """W, width of CLIP's text encodings."""
    vocab_size: int
    """Number of token ids."""


class CaptionFeatures(NamedTuple):
    """A batch of captions as a frozen CLIP sees them, in the order in which the prior takes them."""

    text_encodings: Tensor
    """[B, L, W], the text encoder's last hidden states after its final norm."""
    text_mask: Tensor
    """[B, L] bool, True = keep."""
    text_embedding: Tensor
    """[B, E], CLIP's text projection before it is brought to unit norm, as the pipelines of diffusers take it."""


Text = CaptionFeatures | Tensor
"""A batch of captions as the configured source takes them: features, or for the trained Transformer tokens [B, L] int64."""


def read_captions(source: TextSource, clip: Clip, tokens: Tensor) -> Text | None:
    """What a decoder is to be given of captions.

    Args:
        source: the decoder's `text`.
        clip: moved to the tokens' device.
        tokens: [B, L] int64.
    """
    if source == "none":
        return None
    if source == "transformer":
        return tokens
    return caption_features(clip, tokens)


def caption_features(clip: Clip, tokens: Tensor) -> CaptionFeatures:
    """Tokens [B, L] int64 as a frozen CLIP sees them; it is moved to their device.

    In float32 whatever the autocast, so that a caption is the same in training and in sampling.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        text = clip.to(tokens.device).encode_text(tokens)
    return CaptionFeatures(text.text_encodings, text.text_mask, text.text_projection)


class TextContext(NamedTuple):
    """A batch of captions as the U-Net reads it."""

    tokens: Tensor
    """[B, L, X]."""
    mask: Tensor
    """[B, L] bool, True = read."""
    vector: Tensor
    """[B, D]."""


class EmptyCaption(nn.Module):
    """Remembers what CLIP makes of the empty caption, which stands where a caption is dropped; saved with the weights."""

    null_encodings: Tensor
    null_mask: Tensor
    null_embedding: Tensor

    def __init__(self, length: int, width: int, embedding_dim: int) -> None:
        """Args:
        length: L.
        width: W.
        embedding_dim: E.
        """
        super().__init__()
        self.register_buffer("null_encodings", torch.zeros(length, width))  # [L, W]
        self.register_buffer("null_mask", torch.ones(length, dtype=torch.bool))  # [L]
        self.register_buffer("null_embedding", torch.zeros(embedding_dim))  # [E]

    def set_null(self, text: CaptionFeatures) -> None:
        """Take the features of the empty caption, a batch of one."""
        for remembered, feature in zip(self._null(), text, strict=True):
            remembered.copy_(feature[0])

    def null(self, batch: int) -> CaptionFeatures:
        """The empty caption, `batch` times."""
        return CaptionFeatures(*(remembered.expand(batch, *remembered.shape) for remembered in self._null()))

    def knows(self, clip: Clip) -> bool:
        """Whether this CLIP makes of the empty caption what is remembered: whether it is the one that was trained with."""
        tokens = clip.tokenize([""]).to(self.null_mask.device)
        features = caption_features(clip, tokens)
        if any(one.shape != other.shape[1:] for one, other in zip(self._null(), features, strict=True)):
            return False
        kept = features.text_mask[0]  # nobody reads what is remembered of padding
        pairs = (
            (self.null_mask.float(), kept.float()),
            (self.null_encodings[kept], features.text_encodings[0, kept]),
            (self.null_embedding, features.text_embedding[0]),
        )
        return all(float((one - other).norm()) <= 0.02 * float(other.norm()) for one, other in pairs)

    def without(self, text: CaptionFeatures, drop: Tensor) -> CaptionFeatures:
        """Captions, where drop [B] bool is True the empty one."""
        chosen = (
            torch.where(drop.view(-1, *(1,) * remembered.dim()), remembered, feature)
            for remembered, feature in zip(self._null(), text, strict=True)
        )
        return CaptionFeatures(*chosen)

    def _null(self) -> CaptionFeatures:
        return CaptionFeatures(self.null_encodings, self.null_mask, self.null_embedding)


class ClipText(EmptyCaption):
    """The frozen text encoder's hidden states, projected and normalised, and its embedding, projected."""

    def __init__(self, shape: TextShape, embedding_dim: int, context_dim: int, time_dim: int) -> None:
        super().__init__(shape.length, shape.width, embedding_dim)
        self.to_time = nn.Linear(embedding_dim, time_dim)
        self.to_context = nn.Linear(shape.width, context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, text: CaptionFeatures, drop: Tensor | None = None) -> TextContext:
        """Args:
        text: captions.
        drop: [B] bool, True = the empty caption instead, on all of its paths.
        """
        if drop is not None:
            text = self.without(text, drop)
        tokens = self.norm(self.to_context(text.text_encodings))  # [B, L, X]
        return TextContext(tokens, text.text_mask, self.to_time(text.text_embedding))


class TextTransformer(nn.Module):
    """A bidirectional Transformer over a caption's tokens. Source: Nichol et al. 2022 (GLIDE), section 4."""

    null_tokens: Tensor

    def __init__(self, config: TextTransformerConfig, shape: TextShape, context_dim: int, time_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = nn.Parameter(torch.randn(shape.length, config.width) * 0.01)
        self.blocks = nn.ModuleList([TransformerBlock(config.width, config.num_heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width)
        self.to_context = nn.Linear(config.width, context_dim)
        self.to_time = nn.Linear(config.width, time_dim)
        self.register_buffer("null_tokens", torch.zeros(shape.length, dtype=torch.int64))  # [L]

    def set_null(self, tokens: Tensor) -> None:
        """Remember the tokens of the empty caption, a batch of one."""
        self.null_tokens.copy_(tokens[0])

    def null(self, batch: int) -> Tensor:
        """The empty caption, `batch` times: [B, L]."""
        return self.null_tokens.expand(batch, -1)

    def forward(self, tokens: Tensor, drop: Tensor | None = None) -> TextContext:
        """Args:
        tokens: [B, L] int64; 0 after the last other token is padding.
        drop: [B] bool, True = the empty caption instead, on all of its paths.
        """
        if drop is not None:
            tokens = torch.where(drop[:, None], self.null_tokens, tokens)
        mask = text_mask(tokens)  # [B, L]
        x = self.embedding(tokens) + self.positions  # [B, L, W]
        for block in self.blocks:
            x = block(x, mask[:, None, None])  # [B, L, W]
        x = self.norm(x)
        last = mask.sum(dim=1) - 1  # [B], where the end of the text is
        pooled = x[torch.arange(len(x), device=x.device), last]  # [B, W]
        return TextContext(self.to_context(x), mask, self.to_time(pooled))
