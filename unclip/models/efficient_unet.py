"""The efficient U-Net of Imagen's super-resolution networks.

Source: Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", appendix B.1,
figures A.27 to A.30, and appendices D.3.1 and F.2. It differs from the U-Net of Dhariwal & Nichol 2021 (`unclip.models.unet`) in
four ways: each level has its own number of residual blocks, most of them at low resolutions, where channels are many and pixels
few; a level downsamples before its blocks, and upsamples after them; a level adds one skip connection instead of concatenating
one for each block; and all sums are scaled by 1 / sqrt 2, as in Song et al. 2021 (NCSN++) and Saharia et al. 2021 (SR3), so that
they keep their variance.

Figure A.30 leaves two things open. The first convolution is here another skip connection, to the last layer; and the lowest
level, whose two halves follow each other, has none.

Letters: B batch, C channels, H height, W width, L context tokens, X context width, D time-embedding width.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import require
from unclip.models.layers import GroupNorm, TimestepMLP, attention, zero_init
from unclip.models.unet import ResBlock, UNetConfig

Attention = Literal["none", "text", "full"]
"""Attention at the end of a level: none; to the text; or to the pixels and the text together."""
SCALE = 2**-0.5
"""Scale of a sum of two independent features that keeps their variance."""


@dataclasses.dataclass(frozen=True)
class EfficientUNetConfig:
    image_size: int = 256
    """Size of the square training image, pixels."""
    channels: int = 128
    """Channels of the first convolution."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    """Channels of each level, in multiples of `channels`; each level, the first too, halves the resolution."""
    num_res_blocks: tuple[int, ...] = (2, 4, 8, 8)
    """Residual blocks of each level, on the way down and again on the way up."""
    attention: tuple[Attention, ...] = ("none", "none", "none", "full")
    """Attention at the end of each level: "none", "text", or "full" for pixels and text."""
    num_heads: int = 8
    """Heads of every attention layer; together they are twice as wide as the level."""
    norm_groups: int = 32
    """Groups of every group norm."""
    dropout: float = 0.0
    """Dropout probability inside residual blocks."""

    def __post_init__(self) -> None:
        levels = len(self.channel_mult)
        require(levels >= 1, "channel_mult", self.channel_mult, "at least one level")
        for name in ("num_res_blocks", "attention"):
            given = getattr(self, name)
            require(len(given) == levels, name, given, f"{levels} values, one for each level of channel_mult")
        for name in ("channels", "num_heads", "norm_groups"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("channel_mult", "num_res_blocks"):
            given = getattr(self, name)
            require(all(number >= 1 for number in given), name, given, "numbers of at least 1")
        is_even = self.image_size >= 1 and self.image_size % 2**levels == 0
        expected = f"a multiple of {2**levels}, so that every level halves the resolution evenly"
        require(is_even, "image_size", self.image_size, expected)
        for width in {self.channels, *self.widths}:
            require(width % self.norm_groups == 0, "norm_groups", self.norm_groups, f"a divisor of {width}")
        for width, kind in zip(self.widths, self.attention, strict=True):
            fits = kind == "none" or 2 * width % self.num_heads == 0
            require(fits, "num_heads", self.num_heads, f"a divisor of {2 * width}")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a probability below 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiple for multiple in self.channel_mult)

    @property
    def time_dim(self) -> int:
        """D, width of the conditioning vector."""
        return self.block.time_dim

    @property
    def block(self) -> UNetConfig:
        """Settings of the residual blocks."""
        return UNetConfig(
            self.image_size, self.channels, (1,), norm_groups=self.norm_groups, dropout=self.dropout
        )  # scale-shift norm


class EfficientUNet(nn.Module):
    """U-Net from x_t, a conditioning vector and context tokens to a prediction of the same size."""

    def __init__(self, config: EfficientUNetConfig, in_channels: int, out_channels: int, context_dim: int) -> None:
        """Args:
        context_dim: X.
        """
        super().__init__()
        self.config = config
        channels, widths = config.channels, config.widths
        self.time_embedding = TimestepMLP(channels, config.time_dim)
        self.input = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.downsample, self.down = nn.ModuleList(), nn.ModuleList()
        self.upsample, self.up = nn.ModuleList(), nn.ModuleList()
        for above, (level, width) in zip((channels, *widths), enumerate(widths), strict=False):
            self.downsample.append(nn.Conv2d(above, width, 3, stride=2, padding=1))
            self.down.append(Level(config, level, context_dim))
            self.up.append(Level(config, level, context_dim))
            self.upsample.append(nn.ConvTranspose2d(width, above, 3, stride=2, padding=1, output_padding=1))
        self.output = nn.Sequential(
            GroupNorm(config.norm_groups, channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, out_channels, 3, padding=1)),
        )

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        vector: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Args:
            x_t: [B, in_channels, H, W]; H and W are multiples of 2 ** levels.
            t: [B].
            vector: [B, D], added to the timestep embedding.
            context: [B, L, X], read by every attention layer; needed by those of the text alone.
            context_mask: [B, L] bool, True = attend; None attends to all.

        Returns:
            [B, out_channels, H, W].
        """
        time = self.time_embedding(t)  # [B, D]
        time = time if vector is None else time + vector
        h = self.input(x_t.contiguous(memory_format=torch.channels_last))  # [B, C, H, W]
        skips = [h]
        for downsample, level in zip(self.downsample, self.down, strict=True):
            h = level(downsample(h), time, context, context_mask)  # [B, C', H / 2, W / 2]
            skips.append(h)
        skips.pop()
        for upsample, level in reversed(list(zip(self.upsample, self.up, strict=True))):
            h = upsample(level(h, time, context, context_mask))  # [B, C, H, W]
            h = (h + skips.pop()) * SCALE
        return self.output(h)  # type: ignore[no-any-return]  # [B, out_channels, H, W]


class Level(nn.Module):
    """Residual blocks at one resolution and, if configured, attention after them. Source: figures A.28 and A.29."""

    def __init__(self, config: EfficientUNetConfig, level: int, context_dim: int) -> None:
        super().__init__()
        width, kind = config.widths[level], config.attention[level]
        block = config.block
        self.blocks = nn.ModuleList([ScaledResBlock(block, width, width) for _ in range(config.num_res_blocks[level])])
        self.attend = None if kind == "none" else TextAttention(config, width, context_dim, reads_pixels=kind == "full")

    def forward(self, h: Tensor, time: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            h = block(h, time)
        return h if self.attend is None else self.attend(h, context, context_mask)


class ScaledResBlock(ResBlock):
    """Residual block whose sum is scaled by 1 / sqrt 2. Source: figure A.27."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return super().forward(x, time) * SCALE


class TextAttention(nn.Module):
    """Attention of pixels to context tokens, and to the pixels themselves, with one softmax.

    Its heads are together twice as wide as its input (figure A.28). The keys and values of the text are appended to those of
    the pixels; without those of pixels it is cross attention (appendix D.3.1).
    """

    def __init__(self, config: EfficientUNetConfig, width: int, context_dim: int, reads_pixels: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = GroupNorm(config.norm_groups, width)
        self.to_q = nn.Linear(width, 2 * width)
        self.pixels_to_kv = nn.Linear(width, 4 * width) if reads_pixels else None
        self.context_to_kv = nn.Linear(context_dim, 4 * width)
        self.to_out = zero_init(nn.Linear(2 * width, width))

    def forward(self, x: Tensor, context: Tensor | None, context_mask: Tensor | None = None) -> Tensor:
        """Args: x [B, C, H, W]; context [B, L, X]; context_mask [B, L] bool, True = attend. Returns [B, C, H, W]."""
        batch, channels, height, width = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q = self.to_q(pixels)  # [B, HW, 2C]
        kv, mask = [], None
        if context is not None:
            kv.append(self.context_to_kv(context))  # [B, L, 4C]
        if self.pixels_to_kv is not None:
            kv.append(self.pixels_to_kv(pixels))  # [B, HW, 4C]
        k, v = torch.cat(kv, dim=1).chunk(2, dim=2)  # 2 x [B, K, 2C], K = L + HW, L or HW
        if context is not None and context_mask is not None:
            mask = F.pad(context_mask, (0, k.shape[1] - context.shape[1]), value=True)[:, None, None]  # [B, 1, 1, K]
        q, k, v = (tensor.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for tensor in (q, k, v))
        attended = attention(q, k, v, mask)  # [B, heads, HW, 2C / heads]
        attended = self.to_out(attended.transpose(1, 2).flatten(2)).transpose(1, 2)  # [B, C, HW]
        return (x + attended.reshape(batch, channels, height, width)) * SCALE  # type: ignore[no-any-return]
