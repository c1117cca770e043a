"""Classifier of noised images, for classifier guidance: the downsampling half of the U-Net and a mean over pixels.

Source: Dhariwal & Nichol 2021, section 4. Letters: B batch, C channels, S image size, K classes, D time-embedding width.
"""

import dataclasses
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import require
from unclip.diffusion.guidance import LogProbability
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.errors import ShapeError
from unclip.models.layers import GroupNorm, TimestepMLP
from unclip.models.unet import ContextAttention, ResBlock, UNetConfig


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    num_classes: int = 1000
    """Number of classes."""
    unet: UNetConfig = UNetConfig(attention_resolutions=(32, 16, 8))
    """The U-Net whose downsampling half is used."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process; the same as that of the model to guide."""

    def __post_init__(self) -> None:
        require(self.num_classes >= 2, "num_classes", self.num_classes, "at least 2")


class Classifier(nn.Module):
    """Network from noised images and timesteps to logits."""

    def __init__(self, config: ClassifierConfig, in_channels: int = 3) -> None:
        super().__init__()
        self.config = config
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
        self.norm = GroupNorm(unet.norm_groups, width)
        self.output = nn.Linear(width, config.num_classes)

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
        return self.output(F.silu(self.norm(h)).mean(dim=(2, 3)))  # type: ignore[no-any-return]  # [B, K]


def classification_loss(
    diffusion: GaussianDiffusion,
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    labels: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Cross-entropy of the classes of noised images.

    Args:
        network: (x_t, t) -> logits [B, K].
        x0: [B, C, S, S] in [-1, 1]; labels: [B] int64; t: [B] int64; noise: like x0, standard normal.

    Returns:
        [B] float32, nats.

    Raises:
        ShapeError: see `q_sample`, or labels is not [B].

    Source: Dhariwal & Nichol 2021, section 4 (trained on the noising process of the model it guides).
    """
    if labels.shape != x0.shape[:1]:
        raise ShapeError(f"classification_loss: got labels {tuple(labels.shape)}, expected ({len(x0)},).")
    return F.cross_entropy(network(diffusion.q_sample(x0, t, noise), t).float(), labels, reduction="none")


def log_probability(network: Callable[[Tensor, Tensor], Tensor], labels: Tensor) -> LogProbability:
    """log p(labels | x_t), the form that `guidance.classifier` takes.

    Args:
        network: (x_t, t) -> logits [B, K].
        labels: [B] int64, target class of each sample.
    """
    return lambda x_t, t: -F.cross_entropy(network(x_t, t).float(), labels, reduction="none")
