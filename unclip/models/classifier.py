"""Classifier of noised images, for classifier guidance: the downsampling half of the U-Net and its middle, and an attention pool.

Sources: Dhariwal & Nichol 2021, section 4; Radford et al. 2021 (CLIP), section 2.4, for the attention pool.

Letters: B batch, C channels, S image size, s size of the last feature map, K classes, D time-embedding width.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import require
from unclip.diffusion.guidance import LogProbability
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.errors import ShapeError
from unclip.models.layers import GroupNorm, TimestepMLP, attention
from unclip.models.unet import ContextAttention, ResBlock, UNetConfig


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    unet: UNetConfig = UNetConfig(attention_resolutions=(32, 16, 8))
    """The U-Net whose downsampling half is used."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The noising process; the same as that of the model to guide."""

    def __post_init__(self) -> None:
        width = self.unet.channels * self.unet.channel_mult[-1]
        heads = self.unet.head_channels
        require(
            width % heads == 0, "unet.head_channels", heads, f"a divisor of {width}, the channels of the last level"
        )
        for name, only in (("attention", "joint"), ("num_heads", None), ("resampling", "residual")):
            got = getattr(self.unet, name)
            require(got == only, f"unet.{name}", got, f"{only}, as a classifier has no other layers")


class Classifier(nn.Module):
    """Network from noised images and timesteps to logits."""

    def __init__(self, config: ClassifierConfig, num_classes: int, in_channels: int = 3) -> None:
        """Args:
            num_classes: K.

        Raises:
            ConfigError: there are fewer than 2 classes.
        """
        super().__init__()
        require(num_classes >= 2, "num_classes", num_classes, "at least 2")
        self.config, self.num_classes = config, num_classes
        self.class_names: tuple[str, ...] = ()
        """Names of the K classes, if the network was loaded from a file."""
        self.diffusion = GaussianDiffusion(config.diffusion)
        unet = config.unet
        widths = [unet.channels * multiple for multiple in unet.channel_mult]
        resolution, width = unet.image_size, widths[0]
        self.time_embedding = TimestepMLP(unet.channels, unet.time_dim)
        self.input = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList()
        for level, level_width in enumerate(widths):
            for _ in range(unet.num_res_blocks):
                self.blocks.append(ResBlock(unet, width, level_width))
                width = level_width
                if resolution in unet.attention_resolutions:
                    self.blocks.append(ContextAttention(unet, width, 0))
            if level < len(widths) - 1:
                self.blocks.append(ResBlock(unet, width, width, "down"))
                resolution //= 2
        self.blocks.extend(
            [ResBlock(unet, width, width), ContextAttention(unet, width, 0), ResBlock(unet, width, width)]
        )
        self.norm = GroupNorm(unet.norm_groups, width)
        self.output = AttentionPool(resolution, width, unet.head_channels, num_classes)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Args:
            x_t: [B, in_channels, S, S].
            t: [B] int64.

        Returns:
            Logits [B, K].
        """
        time = self.time_embedding(t)  # [B, D]
        h = self.input(x_t)  # [B, C, S, S]
        for block in self.blocks:
            h = block(h, None) if isinstance(block, ContextAttention) else block(h, time)
        return self.output(F.silu(self.norm(h)))  # type: ignore[no-any-return]  # [B, K]


class AttentionPool(nn.Module):
    """Attention of the mean pixel to itself and all pixels, with learned positions: [B, C, s, s] -> [B, K]."""

    def __init__(self, size: int, width: int, head_channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = width // head_channels
        self.positions = nn.Parameter(torch.randn(size * size + 1, width) / width**0.5)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_logits = nn.Linear(width, num_classes)

    def forward(self, h: Tensor) -> Tensor:
        pixels = h.flatten(2).transpose(1, 2)  # [B, ss, C]
        tokens = torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1) + self.positions  # [B, 1 + ss, C]
        qkv = self.to_qkv(tokens).unflatten(2, (3, self.num_heads, -1))  # [B, 1 + ss, 3, heads, C / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, heads, 1 + ss, C / heads]
        pooled = attention(q[:, :, :1], k, v)  # [B, heads, 1, C / heads]
        return self.to_logits(pooled.flatten(1))  # type: ignore[no-any-return]  # [B, K]


def classification_loss(
    diffusion: GaussianDiffusion,
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    labels: Tensor,
    t: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the classes of noised images, and the logits.

    Args:
        network: (x_t, t) -> logits [B, K].
        x0: [B, C, S, S] in [-1, 1]; labels: [B] int64; t: [B] int64; noise: like x0, standard normal.

    Returns:
        [B] float32, nats; [B, K] float32.

    Raises:
        ShapeError: see `q_sample`, or labels is not [B].

    Source: Dhariwal & Nichol 2021, section 4 (trained on the noising process of the model it guides).
    """
    if labels.shape != x0.shape[:1]:
        raise ShapeError(f"classification_loss: got labels {tuple(labels.shape)}, expected ({len(x0)},).")
    logits = network(diffusion.q_sample(x0, t, noise), t).float()
    return F.cross_entropy(logits, labels, reduction="none"), logits


def log_probability(network: Callable[[Tensor, Tensor], Tensor], labels: Tensor) -> LogProbability:
    """log p(labels | x_t), the form that `guidance.classifier` takes.

    Args:
        network: (x_t, t) -> logits [B, K].
        labels: [B] int64, target class of each sample.
    """
    return lambda x_t, t: -F.cross_entropy(network(x_t, t).float(), labels, reduction="none")
