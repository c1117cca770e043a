"""Text conditioning of the decoder: context tokens for its attention, and a vector for its timestep embedding.

Two modules return the same kind of result. `ClipText` projects a frozen CLIP's features of the caption; `TextTransformer`
reads the caption's tokens and is trained with the decoder. `ClipStates` returns the frozen CLIP's states as they are. All store
the empty caption, which replaces dropped text.

Sources: Ramesh et al. 2022, section 2.1 and Table 3; Nichol et al. 2022 (GLIDE), section 4 (trained text Transformer); Rombach
et al. 2022, section 3.3 (states of a text encoder).

Letters: B batch, L text tokens, W width of the text encoder, E CLIP embedding width, X context width, D time-embedding width.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from unclip.config import require
from unclip.models.clip import Clip, ClipShape, text_mask
from unclip.models.layers import TransformerBlock, without_autocast

TextSource = Literal["none", "clip", "transformer"]
"""Text encoder for captions: none, the frozen CLIP, or a Transformer trained with the decoder."""


@dataclasses.dataclass(frozen=True)
class TextTransformerConfig:
    width: int = 512
    """Width of the Transformer."""
    depth: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads per block."""

    def __post_init__(self) -> None:
        require(self.depth >= 1, "depth", self.depth, "at least 1")
        require(self.num_heads >= 1, "num_heads", self.num_heads, "at least 1")
        require(self.width % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of width {self.width}")


@dataclasses.dataclass(frozen=True)
class TextShape:
    """Sizes of the tokenizer and the text encoder, needed to build a decoder."""

    length: int
    """L, tokens per caption."""
    width: int
    """W, width of CLIP's text encodings."""
    vocab_size: int
    """Number of token ids."""

    @classmethod
    def of(cls, clip: Clip | ClipShape) -> "TextShape":
        """Sizes of a CLIP's text encoder."""
        return cls(clip.text_length, clip.text_width, clip.vocab_size)


class CaptionFeatures(NamedTuple):
    """Frozen CLIP features of a batch of captions, in the order of the prior's arguments."""

    text_encodings: Tensor
    """[B, L, W], the text encoder's last hidden states after its final norm."""
    text_mask: Tensor
    """[B, L] bool, True = keep."""
    text_embedding: Tensor
    """[B, E], CLIP's text projection before normalisation to unit norm, as diffusers pipelines use it."""


Text = CaptionFeatures | Tensor
"""A batch of captions as the text source reads them: CLIP features, or tokens [B, L] int64 for the trained Transformer."""


def read_captions(source: TextSource, clip: Clip, tokens: Tensor, reads_padding: bool = False) -> Text | None:
    """Convert captions to the input of a decoder.

    Args:
        source: the decoder's `text`.
        clip: frozen CLIP; it is moved to the tokens' device.
        tokens: [B, L] int64.
        reads_padding: as in `caption_features`.
    """
    if source == "none":
        return None
    if source == "transformer":
        return tokens
    return caption_features(clip, tokens, reads_padding)


def caption_features(clip: Clip, tokens: Tensor, reads_padding: bool = False) -> CaptionFeatures:
    """CLIP features of tokens [B, L] int64; the CLIP is moved to their device.

    They are computed in float32 even under autocast, so that a caption gives the same features in training and sampling.

    Args:
        reads_padding: encode and keep all L tokens, padding too.
    """
    with without_autocast(tokens.device):
        text = clip.to(tokens.device).encode_text(tokens, reads_padding)
    mask = torch.ones_like(text.text_mask) if reads_padding else text.text_mask
    return CaptionFeatures(text.text_encodings, mask, text.text_projection)


class TextContext(NamedTuple):
    """Text conditioning of the U-Net, for a batch of captions."""

    tokens: Tensor
    """[B, L, X]."""
    mask: Tensor
    """[B, L] bool, True = attend."""
    vector: Tensor
    """[B, D]."""


class EmptyCaption(nn.Module):
    """CLIP features of the empty caption, which replaces dropped captions; saved with the weights."""

    null_encodings: Tensor
    null_mask: Tensor
    null_embedding: Tensor
    reads_padding = False
    """Features are those of all L tokens, padding too."""

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
        """Store the features of the empty caption, a batch of one."""
        for stored, feature in zip(self._null(), text, strict=True):
            stored.copy_(feature[0])

    def null(self, batch: int) -> CaptionFeatures:
        """The empty caption, repeated `batch` times."""
        return CaptionFeatures(*(stored.expand(batch, *stored.shape) for stored in self._null()))

    def knows(self, clip: Clip) -> bool:
        """Return True if this CLIP gives the stored features of the empty caption, so that it is the CLIP of the training."""
        tokens = clip.tokenize([""]).to(self.null_mask.device)
        features = caption_features(clip, tokens, self.reads_padding)
        if any(one.shape != other.shape[1:] for one, other in zip(self._null(), features, strict=True)):
            return False
        kept = features.text_mask[0]  # stored features of padding are never read
        pairs = (
            (self.null_mask.float(), kept.float()),
            (self.null_encodings[kept], features.text_encodings[0, kept]),
            (self.null_embedding, features.text_embedding[0]),
        )
        return all(float((one - other).norm()) <= 0.02 * float(other.norm()) for one, other in pairs)

    def without(self, text: CaptionFeatures, drop: Tensor) -> CaptionFeatures:
        """Replace captions by the empty one where drop [B] bool is True."""
        chosen = (
            torch.where(drop.view(-1, *(1,) * stored.dim()), stored, feature)
            for stored, feature in zip(self._null(), text, strict=True)
        )
        return CaptionFeatures(*chosen)

    def _null(self) -> CaptionFeatures:
        return CaptionFeatures(self.null_encodings, self.null_mask, self.null_embedding)


class ClipText(EmptyCaption):
    """Projects the frozen text encoder's hidden states to normalised context tokens, and its embedding to a vector."""

    def __init__(self, shape: TextShape, embedding_dim: int, context_dim: int, time_dim: int) -> None:
        super().__init__(shape.length, shape.width, embedding_dim)
        self.to_time = nn.Linear(embedding_dim, time_dim)
        self.to_context = nn.Linear(shape.width, context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, text: CaptionFeatures, drop: Tensor | None = None) -> TextContext:
        """Args:
        text: captions.
        drop: [B] bool, True = replace by the empty caption, on both paths.
        """
        if drop is not None:
            text = self.without(text, drop)
        tokens = self.norm(self.to_context(text.text_encodings))  # [B, L, X]
        return TextContext(tokens, text.text_mask, self.to_time(text.text_embedding))


class ClipStates(EmptyCaption):
    """The frozen text encoder's states of all L tokens, as they are: the conditioning of Stable Diffusion.

    Published networks attend to padding as to any other token.
    """

    reads_padding = True

    def __init__(self, shape: TextShape, embedding_dim: int) -> None:
        super().__init__(shape.length, shape.width, embedding_dim)

    def forward(self, text: CaptionFeatures, drop: Tensor | None = None) -> Tensor:
        """Args:
            text: captions, from `caption_features` with their padding.
            drop: [B] bool, True = replace by the empty caption.

        Returns:
            [B, L, W].
        """
        return (text if drop is None else self.without(text, drop)).text_encodings


class TextTransformer(nn.Module):
    """Bidirectional Transformer over a caption's tokens. Source: Nichol et al. 2022 (GLIDE), section 4."""

    null_tokens: Tensor

    def __init__(self, config: TextTransformerConfig, shape: TextShape, context_dim: int | None, time_dim: int) -> None:
        """Args:
        context_dim: X; None for the width of the Transformer, without a projection.
        """
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = nn.Parameter(torch.randn(shape.length, config.width) * 0.01)
        self.blocks = nn.ModuleList([TransformerBlock(config.width, config.num_heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width)
        self.to_context = nn.Identity() if context_dim is None else nn.Linear(config.width, context_dim)
        self.to_time = nn.Linear(config.width, time_dim)
        self.register_buffer("null_tokens", torch.zeros(shape.length, dtype=torch.int64))  # [L]

    def set_null(self, tokens: Tensor) -> None:
        """Store the tokens of the empty caption, a batch of one."""
        self.null_tokens.copy_(tokens[0])

    def null(self, batch: int) -> Tensor:
        """The empty caption, repeated `batch` times: [B, L]."""
        return self.null_tokens.expand(batch, -1)

    def knows(self, clip: Clip) -> bool:
        """Return True if this CLIP's tokenizer gives the stored empty caption, so that it is that of the training."""
        return torch.equal(clip.tokenize([""])[0], self.null_tokens.cpu())

    def forward(self, tokens: Tensor, drop: Tensor | None = None) -> TextContext:
        """Args:
        tokens: [B, L] int64; zeros after the last nonzero token are padding.
        drop: [B] bool, True = replace by the empty caption, on both paths.
        """
        if drop is not None:
            tokens = torch.where(drop[:, None], self.null_tokens, tokens)
        mask = text_mask(tokens)  # [B, L]
        x = self.embedding(tokens) + self.positions  # [B, L, W]
        for block in self.blocks:
            x = block(x, mask[:, None, None])  # [B, L, W]
        x = self.norm(x)
        last = mask.sum(dim=1) - 1  # [B], position of the end-of-text token
        pooled = x[torch.arange(len(x), device=x.device), last]  # [B, W]
        return TextContext(self.to_context(x), mask, self.to_time(pooled))
