"""States of a frozen text encoder, one vector for each token of a caption, and the form in which a table holds them.

Captions are much shorter than the longest that an encoder reads, so a table holds the states of their tokens alone, in half
precision: padding to 256 tokens of a T5-XXL would be 2 MiB for each caption.

Letters: B batch, L text tokens, l tokens of one caption, W width of the states, X context width, D time-embedding width.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from unclip.data import half_bytes
from unclip.errors import InputError
from unclip.models.clip import LENGTH_STEP, Clip
from unclip.models.layers import attention, without_autocast
from unclip.models.text import TextContext, caption_features

BYTES_PER_VALUE = 2


class TextStates(NamedTuple):
    """States of a batch of captions."""

    states: Tensor
    """[B, L, W]; those of padding are not read."""
    length: Tensor
    """[B] int64, number of tokens of each caption, at least 1."""

    def to(self, device: torch.device) -> "TextStates":
        return TextStates(self.states.to(device), self.length.to(device))


class TextEncoder(Protocol):
    """Frozen text encoder."""

    @property
    def text_width(self) -> int:
        """W."""

    def encode(self, captions: Sequence[str]) -> TextStates:
        """States of captions, in float32 rounded to half precision, on the encoder's device; long captions are truncated."""


class ClipTextEncoder(nn.Module):
    """Text encoder of a frozen CLIP: the last hidden states after its final norm."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip

    @property
    def text_width(self) -> int:
        return self.clip.text_width

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextStates:
        device = next(self.clip.parameters()).device
        features = caption_features(self.clip, self.clip.tokenize(list(captions)).to(device))
        length = features.text_mask.sum(dim=1)  # [B]
        return TextStates(rounded(features.text_encodings[:, : int(length.max())]), length)


def rounded(states: Tensor) -> Tensor:
    """States in float32, rounded to half precision, so that captions have the same states in training, from a table, and in
    sampling."""
    return states.half().float()


def to_bytes(states: TextStates) -> list[bytes]:
    """States of each caption as half-precision numbers, token by token, without padding: l x W x 2 bytes, little-endian.

    Raises:
        NonFiniteError: a state is not finite, or too large for half precision.
    """
    rows = states.states.float().cpu().numpy()  # [B, L, W]
    return [half_bytes(rows[number, :length]) for number, length in enumerate(states.length.tolist())]


def from_bytes(rows: Sequence[bytes], lengths: Sequence[int]) -> TextStates:
    """Pad the stored states of a batch to the longest of its captions, rounded up to a multiple of `LENGTH_STEP`.

    Args:
        rows: bytes of `to_bytes`.
        lengths: tokens of each caption, at least one caption.

    Raises:
        InputError: the bytes are not the states of so many tokens, or widths differ.
    """
    width = len(rows[0]) // (BYTES_PER_VALUE * max(lengths[0], 1))
    for row, length in zip(rows, lengths, strict=True):
        if width < 1 or length < 1 or len(row) != BYTES_PER_VALUE * width * length:
            raise InputError(
                f"text_states: got {len(row)} bytes for {length} tokens, expected {BYTES_PER_VALUE} for each number, as many "
                "of every token. The table is damaged; delete it and run again."
            )
    longest = -(-max(lengths) // LENGTH_STEP) * LENGTH_STEP  # so that a compiled network sees few lengths
    states = torch.zeros(len(rows), longest, width)  # [B, L, W]
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        values = np.frombuffer(row, "<f2").reshape(length, width)
        states[number, :length] = torch.from_numpy(values.astype(np.float32))
    return TextStates(states, torch.tensor(lengths))


class StatesReader(nn.Module):
    """Reads the states of a frozen text encoder for a U-Net: context tokens, and a vector for its timestep embedding.

    The states are normed before they are projected to context tokens, and these before attention reads them. The vector is
    pooled from the context tokens by attention with one learned query for each head. Dropped captions are one token of zeros.

    Source: Saharia et al. 2022 (Imagen), section 2.4 (norms, pooled vector) and appendix F.1 (attention pooling), section 3.1
    (captions dropped as zeros).
    """

    def __init__(self, text_width: int, context_dim: int, time_dim: int, num_heads: int) -> None:
        """Args:
        text_width: W.
        context_dim: X.
        time_dim: D.
        num_heads: heads of the attention pooling.
        """
        super().__init__()
        self.norm = nn.LayerNorm(text_width)
        self.to_context = nn.Linear(text_width, context_dim)
        self.context_norm = nn.LayerNorm(context_dim)
        self.query = nn.Parameter(torch.randn(num_heads, context_dim // num_heads))
        self.to_kv = nn.Linear(context_dim, 2 * context_dim)
        self.to_time = nn.Linear(context_dim, time_dim)

    def forward(self, text: TextStates, drop: Tensor | None = None) -> TextContext:
        """Args:
        text: captions.
        drop: [B] bool, True = replace by one token of zeros, on both paths.
        """
        states, length = text
        if drop is not None:
            states = states.masked_fill(drop[:, None, None], 0)
            length = length.masked_fill(drop, 1)
        mask = torch.arange(states.shape[1], device=states.device) < length[:, None]  # [B, L]
        with without_autocast(states.device):
            states = self.norm(states.float())  # [B, L, W]
        tokens = self.context_norm(self.to_context(states))  # [B, L, X]
        k, v = (
            each.unflatten(2, (len(self.query), -1)).transpose(1, 2)  # [B, heads, L, X / heads]
            for each in self.to_kv(tokens).chunk(2, dim=2)
        )
        query = self.query.to(k.dtype).expand(len(k), -1, -1)[:, :, None]  # [B, heads, 1, X / heads]
        pooled = attention(query, k, v, mask[:, None, None]).flatten(1)  # [B, X]
        return TextContext(tokens, mask, self.to_time(pooled))


def no_text(like: TextStates) -> TextStates:
    """Captions of one token of zeros, as many as there are in `like`, for guidance."""
    states = like.states[:, :1]
    return TextStates(torch.zeros_like(states), torch.ones_like(like.length))
