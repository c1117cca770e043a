"""The ADM U-Net of the decoder, the upsamplers and the networks of latents.

Sources: Dhariwal & Nichol 2021 (blocks, scale-shift norm, up/down in residual blocks); Nichol et al. 2022, GLIDE (context
tokens appended to the keys and values of self-attention); Rombach et al. 2022 (spatial Transformers in place of attention). The
order of layers, skips and norms is that of the published networks of unCLIP and of Stable Diffusion, so that weights convert
one to one (`unclip.interop.decoder`, `unclip.interop.latent_diffusion`).

Letters: B batch, C channels, H height, W width, L context tokens, X context width, D time-embedding width.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import added, require
from unclip.models.layers import Conv3x3, GroupNorm, TimestepMLP, attention, zero_init
from unclip.models.spatial_transformer import SpatialTransformer

Resample = Literal["none", "down", "up"]
Attention = Literal["joint", "spatial_transformer"]
Resampling = Literal["residual", "convolution"]


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    image_size: int = 64
    """Size of the square training image, pixels; attention_resolutions are relative to it."""
    channels: int = 128
    """Channels of the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    """Channels of each level, in multiples of `channels`; each level halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks per level."""
    attention_resolutions: tuple[int, ...] = ()
    """Resolutions in pixels at which attention follows each residual block; empty for a purely convolutional network."""
    head_channels: int = 64
    """Channels per attention head."""
    scale_shift_norm: bool = True
    """Let the timestep scale and shift the second norm of a residual block; False adds it before that norm."""
    norm_groups: int = 32
    """Groups of every group norm."""
    dropout: float = 0.0
    """Dropout probability inside residual blocks."""
    attention: Attention = added("joint")
    """Attention layers: joint, self-attention whose keys and values include the context tokens (Nichol et al. 2022, GLIDE,
    section 4); spatial_transformer, a Transformer block with self-attention, cross-attention to the context tokens and a gated
    feed-forward network (Rombach et al. 2022, section 3.3 and appendix E.2.1)."""
    num_heads: int | None = added(None)
    """Attention heads of every layer, as in Stable Diffusion 1; None divides the channels by `head_channels`."""
    resampling: Resampling = added("residual")
    """Layers that halve and double the resolution: residual, inside a residual block (Dhariwal & Nichol 2021, section 3);
    convolution, one of stride 2, and one after nearest-neighbour upsampling (Ho et al. 2020, appendix B)."""

    def __post_init__(self) -> None:
        smallest = self.image_size // 2 ** (len(self.channel_mult) - 1)
        require(len(self.channel_mult) >= 1, "channel_mult", self.channel_mult, "at least one level")
        require(
            smallest * 2 ** (len(self.channel_mult) - 1) == self.image_size,
            "image_size",
            self.image_size,
            f"a multiple of {2 ** (len(self.channel_mult) - 1)}, so that every level halves the resolution evenly",
        )
        resolutions = [self.image_size // 2**level for level in range(len(self.channel_mult))]
        for resolution in self.attention_resolutions:
            require(
                resolution in resolutions,
                "attention_resolutions",
                resolution,
                f"resolutions of the levels, {resolutions}",
            )
            self._check_heads(self.channels * self.channel_mult[resolutions.index(resolution)])
        for multiple in self.channel_mult:
            width = self.channels * multiple
            require(width % self.norm_groups == 0, "norm_groups", self.norm_groups, f"a divisor of {width}")
        if self.attention_resolutions:  # the middle attends too, at any resolution
            self._check_heads(width)
        require(self.num_res_blocks >= 1, "num_res_blocks", self.num_res_blocks, "at least 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a probability below 1")

    @property
    def time_dim(self) -> int:
        """Width of the conditioning vector."""
        return 4 * self.channels

    def heads(self, width: int) -> int:
        """Attention heads of a layer of `width` channels."""
        return width // self.head_channels if self.num_heads is None else self.num_heads

    def _check_heads(self, width: int) -> None:
        name = "head_channels" if self.num_heads is None else "num_heads"
        divisor = getattr(self, name)
        require(divisor >= 1 and width % divisor == 0, name, divisor, f"a divisor of {width}")


class UNet(nn.Module):
    """U-Net from x_t, a conditioning vector and optional context tokens to a prediction of the same size."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, context_dim: int = 0) -> None:
        """Args:
            context_dim: X; 0 for a network without context tokens.

        Raises:
            ConfigError: the network has spatial Transformers, but no context tokens.
        """
        super().__init__()
        kind = config.attention
        require(kind == "joint" or context_dim > 0, "attention", kind, "joint, as this network reads no context tokens")
        self.config = config
        self.time_embedding = TimestepMLP(config.channels, config.time_dim)
        widths = [config.channels * multiple for multiple in config.channel_mult]
        resolution, width = config.image_size, widths[0]

        def step(in_width: int, out_width: int, resample: Resample = "none") -> UNetBlock:
            attend = resample == "none" and resolution in config.attention_resolutions
            return UNetBlock(config, in_width, out_width, resample, context_dim, attend)

        self.input = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        skip_widths = [width]
        for level, level_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down.append(step(width, level_width))
                width = level_width
                skip_widths.append(width)
            if level < len(widths) - 1:
                self.down.append(step(width, width, "down"))
                skip_widths.append(width)
                resolution //= 2

        attend = bool(config.attention_resolutions)
        self.middle = nn.ModuleList(
            [UNetBlock(config, width, width, "none", context_dim, attend), ResBlock(config, width, width)]
        )

        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.up.append(step(width + skip_widths.pop(), level_width))
                width = level_width
            if level > 0:
                self.up.append(step(width, width, "up"))
                resolution *= 2

        self.output = nn.Sequential(
            GroupNorm(config.norm_groups, width), nn.SiLU(), zero_init(nn.Conv2d(width, out_channels, 3, padding=1))
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
            x_t: [B, in_channels, H, W]; H and W are multiples of 2 ** (levels - 1).
            t: [B].
            vector: [B, D], added to the timestep embedding.
            context: [B, L, X], read by every attention layer.
            context_mask: [B, L] bool, True = attend; None attends to all.

        Returns:
            [B, out_channels, H, W].
        """
        time = self.time_embedding(t)  # [B, D]
        time = time if vector is None else time + vector
        # convolutions are fastest in this layout, even if the weights are not stored in it, as in shards
        h = self.input(x_t.contiguous(memory_format=torch.channels_last))  # [B, C, H, W]
        skips = [h]
        for step in self.down:
            h = step(h, time, context, context_mask)
            skips.append(h)
        first, second = self.middle
        h = second(first(h, time, context, context_mask), time)
        for step in self.up:
            if step.resample == "none":
                h = torch.cat([h, skips.pop()], dim=1)
            h = step(h, time, context, context_mask)
        return self.output(h)  # type: ignore[no-any-return]  # [B, out_channels, H, W]


class UNetBlock(nn.Module):
    """A residual block and, at the configured resolutions, attention."""

    def __init__(
        self, config: UNetConfig, in_width: int, out_width: int, resample: Resample, context_dim: int, attend: bool
    ) -> None:
        super().__init__()
        self.resample = resample
        self.block: ResBlock | Resampler
        if resample == "none" or config.resampling == "residual":
            self.block = ResBlock(config, in_width, out_width, resample)
        else:
            self.block = Resampler(out_width, resample)
        self.attend: ContextAttention | SpatialTransformer | None = None
        if attend and config.attention == "joint":
            self.attend = ContextAttention(config, out_width, context_dim)
        elif attend:
            self.attend = SpatialTransformer(out_width, context_dim, config.heads(out_width), config.norm_groups)

    def forward(self, h: Tensor, time: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        h = self.block(h, time)
        return h if self.attend is None else self.attend(h, context, context_mask)


class ResBlock(nn.Module):
    """Residual block modulated by the timestep, with optional up- or downsampling inside."""

    def __init__(self, config: UNetConfig, in_width: int, out_width: int, resample: Resample = "none") -> None:
        super().__init__()
        self.resample = resample
        self.scale_shift_norm = config.scale_shift_norm
        self.norm1 = GroupNorm(config.norm_groups, in_width)
        self.conv1 = Conv3x3(in_width, out_width)
        self.time = nn.Linear(config.time_dim, (2 if config.scale_shift_norm else 1) * out_width)
        self.norm2 = GroupNorm(config.norm_groups, out_width)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zero_init(Conv3x3(out_width, out_width))
        self.skip = nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self._resize(F.silu(self.norm1(x)).to(x.dtype))  # [B, C_in, H', W']
        h = self.conv1(h)  # [B, C_out, H', W']
        time = self.time(F.silu(time))[:, :, None, None]  # [B, C_out or 2 C_out, 1, 1]
        if self.scale_shift_norm:
            scale, shift = time.float().chunk(2, dim=1)  # 2 x [B, C_out, 1, 1]
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)).to(x.dtype))
        return self.skip(self._resize(x)) + h  # type: ignore[no-any-return]

    def _resize(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x


class Resampler(nn.Module):
    """Convolution that halves or doubles the resolution and does not read the timestep. Source: Ho et al. 2020, appendix B."""

    def __init__(self, width: int, resample: Resample) -> None:
        super().__init__()
        self.resample = resample
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1) if resample == "down" else Conv3x3(width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Args: x [B, C, H, W]; time is not read. Returns [B, C, H / 2, W / 2] or [B, C, 2 H, 2 W]."""
        x = x if self.resample == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x)  # type: ignore[no-any-return]


class ContextAttention(nn.Module):
    """Self-attention over pixels whose keys and values also include the context tokens."""

    def __init__(self, config: UNetConfig, width: int, context_dim: int) -> None:
        super().__init__()
        self.num_heads = config.heads(width)
        self.norm = GroupNorm(config.norm_groups, width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.context_to_kv = nn.Linear(context_dim, 2 * width) if context_dim else None
        self.to_out = zero_init(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None, context_mask: Tensor | None = None) -> Tensor:
        """Args: x [B, C, H, W]; context [B, L, X]; context_mask [B, L] bool, True = attend. Returns [B, C, H, W]."""
        batch, channels, height, width = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = self.to_qkv(pixels).chunk(3, dim=2)  # 3 x [B, HW, C]
        mask = None
        if self.context_to_kv is not None and context is not None:
            context_k, context_v = self.context_to_kv(context).chunk(2, dim=2)  # 2 x [B, L, C]
            k, v = torch.cat([context_k, k], dim=1), torch.cat([context_v, v], dim=1)  # [B, L + HW, C]
            if context_mask is not None:
                mask = F.pad(context_mask, (0, pixels.shape[1]), value=True)[:, None, None]  # [B, 1, 1, L + HW]
        q, k, v = (tensor.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for tensor in (q, k, v))
        attended = attention(q, k, v, mask)  # [B, heads, HW, C / heads]
        attended = self.to_out(attended.transpose(1, 2).flatten(2))  # [B, HW, C]
        return x + attended.transpose(1, 2).reshape(batch, channels, height, width)  # type: ignore[no-any-return]
