"""Diffusion upsamplers: P(picture | smaller picture).

Source: Ramesh et al. 2022, section 2.1 and Table 3; Saharia et al. 2021 (SR3). A U-Net without attention and without text,
conditioned on the upsampled low-resolution picture by concatenation, trained on random crops, applied at full size. The
low-resolution picture is degraded in training (`unclip.models.degradations`), so that it resembles the decoder's samples.

Letters: B batch, S side of the output, s side of the input, D time-embedding width.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import require
from unclip.diffusion import sampling
from unclip.diffusion.process import Denoiser, DiffusionConfig, GaussianDiffusion, augment_condition
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.diffusion.sampling import DiffusionSampling
from unclip.models.degradations import DegradationConfig
from unclip.models.layers import TimestepMLP
from unclip.models.unet import UNet, UNetConfig


@dataclasses.dataclass(frozen=True)
class UpsamplerConfig:
    unet: UNetConfig = UNetConfig()
    """The network; `image_size` is the side of the training crops."""
    low_res_size: int = 64
    """Side of the input, pixels."""
    scale: int = 4
    """Side of the output over side of the input."""
    degradation: DegradationConfig = DegradationConfig()
    """What is done to the low-resolution picture in training."""
    max_noise_level: int = 0
    """Noise on the low-resolution picture in training: that of a timestep of `diffusion` up to this one, drawn for each
    picture and told to the network, so that it can be chosen at sampling. 0 for a network that knows of none."""
    last_step_unet: bool = False
    """Whether a second network of the same shape takes the last step of sampling, as in published unCLIP upsamplers, where
    it was tuned for sharpness. It comes with them (`unclip.interop.pipeline`) and is not trained here."""
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
        num_timesteps = self.diffusion.num_timesteps
        require(0 <= self.max_noise_level < num_timesteps, "max_noise_level", self.max_noise_level, "a timestep")

    @property
    def output_size(self) -> int:
        return self.low_res_size * self.scale

    @property
    def name(self) -> str:
        """What it is called beside others: upsampler-256 makes pictures of 256 pixels."""
        return f"upsampler-{self.output_size}"


@dataclasses.dataclass(frozen=True)
class UpsamplerSampling(DiffusionSampling):
    """Sampling settings of an upsampler, which reads nothing that guidance could strengthen: its scale stays 1."""

    num_steps: int = 15
    """Sampling steps."""
    noise_level: int = 0
    """Timestep that the low-resolution image is noised to first: a later one hides more of its faults, and of itself. For
    upsamplers trained with `max_noise_level`. Source: Ho et al. 2021 (CDM), section 4.2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.noise_level >= 0, "noise_level", self.noise_level, "at least 0")
        is_off = self.guidance_scale == 1 and self.guidance_rescale == 0 and tuple(self.guidance_interval) == (0, 1)
        require(is_off, "guidance_scale", self.guidance_scale, "no guidance of upsamplers, which read no caption")


class Upsampler(nn.Module):
    """Small pictures in, `scale` times larger pictures out."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.measured: dict[str, Tensor] = {}
        """What was measured when training ended: `mean_squared_score` [T]."""
        out_channels = 3 * config.diffusion.outputs_per_channel
        self.unet = UNet(config.unet, in_channels=6, out_channels=out_channels)
        self.last_unet: UNet | None = None
        if config.last_step_unet:
            self.last_unet = UNet(config.unet, in_channels=6, out_channels=out_channels).requires_grad_(False)
        self.noise_level_embedding: TimestepMLP | None = None
        if config.max_noise_level > 0:
            self.noise_level_embedding = TimestepMLP(config.unet.channels, config.unet.time_dim)

    def forward(
        self, x_t: Tensor, t: Tensor, low_res: Tensor, noise_level: Tensor | None = None, last_step: bool = False
    ) -> Tensor:
        """Predict eps, x0 or v, as configured.

        Args:
            x_t: [B, 3, S, S].
            t: [B] int64.
            low_res: [B, 3, s, s], noised already where its level says so.
            noise_level: [B] int64, the timestep that it was noised to; None for 0.
            last_step: whether the second network is asked, where there is one.

        Returns:
            [B, 3, S, S]; [B, 6, S, S] where the diffusion learns its variance.
        """
        # in float32: there is no such kernel for bf16 on CPUs
        upsampled = F.interpolate(low_res.float(), size=x_t.shape[-2:], mode="bicubic", antialias=True)  # [B, 3, S, S]
        vector = None
        if self.noise_level_embedding is not None:
            vector = self.noise_level_embedding(torch.zeros_like(t) if noise_level is None else noise_level)  # [B, D]
        unet = self.last_unet if last_step and self.last_unet is not None else self.unet
        return unet(torch.cat([x_t, upsampled], dim=1), t, vector)  # type: ignore[no-any-return]

    def denoiser(
        self,
        low_res: Tensor,
        noise_level: Tensor | None = None,
        settings: DiffusionSampling = UpsamplerSampling(),
    ) -> Denoiser:
        """A denoiser of images in [-1, 1], conditioned on one small image (and its level) per sample."""

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            last_step = self.last_unet is not None and not t.any()  # where strided timesteps end
            return self(x_t, t, low_res, noise_level, last_step)  # type: ignore[no-any-return]

        denoise = self.diffusion.denoiser(predict)
        return sampling.limited(self.diffusion, denoise, denoise, settings, 1.0)

    @torch.no_grad()
    def sample(
        self,
        low_res: Tensor,
        settings: UpsamplerSampling = UpsamplerSampling(),
        *,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample images [B, 3, s * scale, s * scale] in [-1, 1].

        Args:
            low_res: [B, 3, s, s] in [-1, 1]; not changed.
            x_T: [B, 3, s * scale, s * scale]; None takes it from the generator.

        Raises:
            ConfigError: a noise level beyond those of the training.
        """
        noise_level, most = settings.noise_level, self.config.max_noise_level
        require(noise_level <= most, "noise_level", noise_level, f"at least 0, at most {most} as in training")
        level = None
        if most > 0:
            low_res, level = augment_condition(self.diffusion, low_res, (noise_level, noise_level), generator)
        size = low_res.shape[-1] * self.config.scale
        if x_T is None:
            x_T = torch.randn(len(low_res), 3, size, size, generator=generator, device=low_res.device)
        return sampling.sample(
            self.diffusion,
            self.denoiser(low_res, level, settings),
            x_T,
            settings,
            mean_squared_score=self.measured.get("mean_squared_score"),
            generator=generator,
            on_step=on_step,
        )
