"""Diffusion upsamplers: P(picture | smaller picture).

Source: Ramesh et al. 2022, section 2.1 and Table 3; Saharia et al. 2021 (SR3). A U-Net without attention and without text,
conditioned on the upsampled low-resolution picture by concatenation, trained on random crops, applied at full size. The
low-resolution picture is blurred in training, so that it resembles the decoder's samples.

Letters: B batch, S side of the output, s side of the input.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip import guidance, samplers
from unclip.config import require
from unclip.diffusion import Denoiser, DiffusionConfig, GaussianDiffusion
from unclip.unet import UNet, UNetConfig


@dataclasses.dataclass(frozen=True)
class UpsamplerConfig:
    unet: UNetConfig = UNetConfig()
    """The network; `image_size` is the side of the training crops."""
    low_res_size: int = 64
    """Side of the input, pixels."""
    scale: int = 4
    """Side of the output over side of the input."""
    blur_sigma: float = 0.6
    """Largest standard deviation of the blur of the low-resolution picture in training, input pixels."""
    blur_prob: float = 0.5
    """Probability of the blur, drawn for each picture."""
    noise_std: float = 0.0
    """Largest standard deviation of Gaussian noise on the low-resolution picture in training; pixels are in [-1, 1]."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""

    def __post_init__(self) -> None:
        require(
            not self.unet.attention_resolutions, "unet.attention_resolutions", self.unet.attention_resolutions, "none"
        )
        require(self.scale >= 2, "scale", self.scale, "at least 2")
        require(
            self.unet.image_size <= self.output_size and self.unet.image_size % self.scale == 0,
            "unet.image_size",
            self.unet.image_size,
            f"a crop of at most {self.output_size} pixels that is a multiple of {self.scale}",
        )
        require(0 <= self.blur_prob <= 1, "blur_prob", self.blur_prob, "a probability")

    @property
    def output_size(self) -> int:
        return self.low_res_size * self.scale


class Upsampler(nn.Module):
    """Small pictures in, `scale` times larger pictures out."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.unet = UNet(config.unet, in_channels=6, out_channels=3)

    def forward(self, x_t: Tensor, t: Tensor, low_res: Tensor) -> Tensor:
        """Predict eps, x0 or v, as configured.

        Args:
            x_t: [B, 3, S, S].
            t: [B] int64.
            low_res: [B, 3, s, s].

        Returns:
            [B, 3, S, S].
        """
        upsampled = F.interpolate(low_res, size=x_t.shape[-2:], mode="bicubic", antialias=True)  # [B, 3, S, S]
        return self.unet(torch.cat([x_t, upsampled], dim=1), t)  # type: ignore[no-any-return]

    def denoiser(self, low_res: Tensor) -> Denoiser:
        """A denoiser of pictures in [-1, 1], conditioned on one small picture per sample."""
        return guidance.clamped(self.diffusion.denoiser(lambda x_t, t: self(x_t, t, low_res)), 1.0)

    @torch.no_grad()
    def sample(self, low_res: Tensor, *, num_steps: int = 27, generator: torch.Generator | None = None) -> Tensor:
        """Draw pictures [B, 3, s * scale, s * scale] in [-1, 1] by DDIM."""
        side = low_res.shape[-1] * self.config.scale
        noise = torch.randn(len(low_res), 3, side, side, generator=generator, device=low_res.device)
        return samplers.ddim(self.diffusion, self.denoiser(low_res), noise, num_steps)


def degrade(
    low_res: Tensor, *, blur_sigma: float, blur_prob: float, noise_std: float, generator: torch.Generator
) -> Tensor:
    """Blur and noise some of the pictures of a batch, each by its own draw from the generator.

    Args:
        low_res: [B, C, s, s]; not changed.

    Returns:
        [B, C, s, s]. Source: Ramesh et al. 2022, section 2.1 (Gaussian blur, kernel 3).
    """
    batch, channels = low_res.shape[:2]
    draws = torch.rand(3, batch, generator=generator, device=low_res.device)
    sigma = torch.where(draws[0] < blur_prob, draws[1] * blur_sigma, 0.0).clamp(min=1e-3)  # [B]
    side_weight = torch.exp(-0.5 / sigma**2)  # [B]
    kernel = torch.stack([side_weight, torch.ones_like(sigma), side_weight], dim=1)  # [B, 3]
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    weight = (kernel[:, :, None] * kernel[:, None, :]).repeat_interleave(channels, dim=0)[:, None]  # [BC, 1, 3, 3]
    padded = F.pad(low_res, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[None]  # [1, BC, s + 2, s + 2]
    blurred = F.conv2d(padded, weight.to(low_res.dtype), groups=batch * channels)[0].view_as(low_res)
    noise = torch.randn(low_res.shape, generator=generator, device=low_res.device)
    return blurred + draws[2].view(-1, 1, 1, 1) * noise_std * noise
