"""Diffusion upsamplers: P(image | low-resolution image).

Source: Ramesh et al. 2022, section 2.1 and Table 3; Saharia et al. 2021 (SR3). A U-Net without attention and without text,
conditioned on the upsampled low-resolution image by concatenation, trained on random crops, applied at full size. The
low-resolution image is degraded in training (`unclip.models.degradations`), so that it resembles the decoder's samples.

Letters: B batch, S output size, s input size, D time-embedding width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import added, require
from unclip.diffusion import samplers, sampling
from unclip.diffusion.process import Denoiser, DiffusionConfig, GaussianDiffusion, augment_condition
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.diffusion.sampling import DiffusionSampling
from unclip.models.degradations import DegradationConfig, gaussian_blur
from unclip.models.layers import TimestepMLP
from unclip.models.unet import UNet, UNetConfig


@dataclasses.dataclass(frozen=True)
class UpsamplerConfig:
    unet: UNetConfig = UNetConfig()
    """The network; `image_size` is the size of the training crops."""
    low_res_size: int = 64
    """Input size, pixels."""
    scale: int = 4
    """Output size divided by input size."""
    degradation: DegradationConfig = DegradationConfig()
    """Degradation of the low-resolution image in training."""
    max_noise_level: int = 0
    """Largest noise level of the low-resolution image in training. The level, a timestep of `diffusion`, is drawn per image
    and read by the network, so that it can be chosen at sampling. 0 for a network that reads no noise level."""
    reads_blur: bool = added(False)
    """Tell the network the strength of the low-resolution image's blur, so that it can be chosen at sampling; for the
    degradation "blur"."""
    last_step_unet: bool = False
    """Use a second network of the same shape for the last sampling step, as in published unCLIP upsamplers, where it was
    tuned for sharpness. It is imported with them (`unclip.interop.pipeline`) and not trained here."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""

    def __post_init__(self) -> None:
        require(
            not self.unet.attention_resolutions, "unet.attention_resolutions", self.unet.attention_resolutions, "none"
        )
        check_enlarging(self)
        kind = self.degradation.kind
        require(not self.reads_blur or kind == "blur", "degradation.kind", kind, "blur with reads_blur")

    @property
    def output_size(self) -> int:
        return self.low_res_size * self.scale

    @property
    def name(self) -> str:
        """Name that tells upsamplers apart; upsampler-256 outputs images of 256 pixels."""
        return f"upsampler-{self.output_size}"


@dataclasses.dataclass(frozen=True)
class UpsamplerSampling(DiffusionSampling):
    """Sampling settings of an upsampler; it reads no caption, so guidance stays off."""

    num_steps: int = 15
    """Sampling steps."""
    noise_level: int = 0
    """Timestep to which the low-resolution image is noised first; a later one hides more of its artefacts, but also more of
    its detail. For upsamplers trained with `max_noise_level`. Source: Ho et al. 2021 (CDM), section 4.2."""
    num_resamplings: int = added(samplers.NUM_RESAMPLINGS)
    """Times that inpainting samples each step, as upsamplers know no masks; 1 = no resampling. Source: Lugmayr et al. 2022,
    algorithm 1."""

    blur_sigma: float = added(0.0)
    """Standard deviation of a blur of the low-resolution image, its pixels; hides artefacts like `noise_level`. For upsamplers
    trained with `reads_blur`. Source: Ho et al. 2021 (CDM), section 4.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.noise_level >= 0, "noise_level", self.noise_level, "at least 0")
        require(self.num_resamplings >= 1, "num_resamplings", self.num_resamplings, "at least 1")
        require(self.blur_sigma >= 0, "blur_sigma", self.blur_sigma, "at least 0")
        is_off = self.guidance_scale == 1 and self.guidance_rescale == 0 and tuple(self.guidance_interval) == (0, 1)
        require(is_off, "guidance_scale", self.guidance_scale, "no guidance of upsamplers, which read no caption")


class Upsampler(nn.Module):
    """Network that denoises images, given the same images `scale` times smaller."""

    def __init__(self, config: UpsamplerConfig, num_classes: int = 0) -> None:
        """Args:
        num_classes: K; 0 for a network that reads no class.
        """
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.class_names: tuple[str, ...] = ()
        """Names of the K classes, if the network was loaded from a file."""
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.measured: dict[str, Tensor] = {}
        """Measurements from the end of training: `mean_squared_score` [T]."""
        out_channels = 3 * config.diffusion.outputs_per_channel
        self.unet = UNet(config.unet, in_channels=6, out_channels=out_channels)
        self.last_unet: UNet | None = None
        if config.last_step_unet:
            self.last_unet = UNet(config.unet, in_channels=6, out_channels=out_channels).requires_grad_(False)
        self.noise_level_embedding: TimestepMLP | None = None
        if config.max_noise_level > 0:
            self.noise_level_embedding = TimestepMLP(config.unet.channels, config.unet.time_dim)
        self.blur_embedding: TimestepMLP | None = None
        if config.reads_blur:
            self.blur_embedding = TimestepMLP(config.unet.channels, config.unet.time_dim)
        # the last row is for images without a class
        self.class_embedding = nn.Embedding(num_classes + 1, config.unet.time_dim) if num_classes else None

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        low_res: Tensor,
        noise_level: Tensor | None = None,
        last_step: bool = False,
        blur_sigma: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """Predict eps, x0 or v, as configured.

        Args:
            x_t: [B, 3, S, S].
            t: [B] int64.
            low_res: [B, 3, s, s], already noised to noise_level.
            noise_level: [B] int64, the timestep to which low_res was noised; None for 0.
            last_step: use the second network, if there is one.
            blur_sigma: [B], strength of low_res's blur; None for 0.
            label: [B] int64 in [0, K], K for no class; None for no class in all samples.

        Returns:
            [B, 3, S, S]; [B, 6, S, S] if the diffusion learns its variance.
        """
        enlarged = enlarge(low_res, x_t.shape[-1])  # [B, 3, S, S]
        vector = None
        if self.noise_level_embedding is not None:
            vector = self.noise_level_embedding(torch.zeros_like(t) if noise_level is None else noise_level)  # [B, D]
        if self.blur_embedding is not None:
            blur = self.blur_embedding(torch.zeros_like(t) if blur_sigma is None else 1000 * blur_sigma)  # [B, D]
            vector = blur if vector is None else vector + blur
        if self.class_embedding is not None:
            of_class = self.class_embedding(torch.full_like(t, self.num_classes) if label is None else label)  # [B, D]
            vector = of_class if vector is None else vector + of_class
        unet = self.last_unet if last_step and self.last_unet is not None else self.unet
        return unet(torch.cat([x_t, enlarged], dim=1), t, vector)  # type: ignore[no-any-return]

    def denoiser(
        self,
        low_res: Tensor,
        noise_level: Tensor | None = None,
        settings: DiffusionSampling = UpsamplerSampling(),
        blur_sigma: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Denoiser:
        """Denoiser of images in [-1, 1], conditioned on one low-resolution image (its noise level, blur and class) per sample."""

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            last_step = self.last_unet is not None and not t.any()  # strided timesteps end at 0
            return self(x_t, t, low_res, noise_level, last_step, blur_sigma, label)  # type: ignore[no-any-return]

        denoise = self.diffusion.denoiser(predict)
        return sampling.limited(self.diffusion, denoise, denoise, settings, 1.0)

    @torch.no_grad()
    def sample(
        self,
        low_res: Tensor,
        settings: UpsamplerSampling = UpsamplerSampling(),
        *,
        known: sampling.Known | None = None,
        label: Tensor | None = None,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample images [B, 3, s * scale, s * scale] in [-1, 1].

        Args:
            low_res: [B, 3, s, s] in [-1, 1]; not changed.
            known: pixels to return unchanged; the others are fitted to them by resampling.
            label: [B] int64, as for `forward`.
            x_T: [B, 3, s * scale, s * scale]; None draws it from the generator.

        Raises:
            ConfigError: the noise level or the blur is above the largest of the training.
        """
        strongest = self.config.degradation.max_blur_sigma if self.config.reads_blur else 0.0
        expected = f"at least 0, at most {strongest:g} as in training"
        require(settings.blur_sigma <= strongest, "blur_sigma", settings.blur_sigma, expected)
        blur_sigma = low_res.new_full(low_res.shape[:1], settings.blur_sigma)
        if settings.blur_sigma > 0:
            low_res = gaussian_blur(low_res, blur_sigma)
        return sample_enlarged(
            self,
            low_res,
            lambda noised, level: self.denoiser(noised, level, settings, blur_sigma, label),
            settings,
            known=known,
            x_T=x_T,
            generator=generator,
            on_step=on_step,
        )


# Parts of all upsamplers, whatever else they read


def check_enlarging(config: Any) -> None:
    """Check the scale, the size of the crops and the noise level of an upsampler's settings.

    Raises:
        ConfigError: names the setting.
    """
    require(config.scale >= 2, "scale", config.scale, "at least 2")
    size, largest = config.unet.image_size, config.output_size
    expected = f"a crop of at most {largest} pixels that is a multiple of {config.scale}"
    require(size <= largest and size % config.scale == 0, "unet.image_size", size, expected)
    level = config.max_noise_level
    require(0 <= level < config.diffusion.num_timesteps, "max_noise_level", level, "a timestep")


def enlarge(low_res: Tensor, size: int) -> Tensor:
    """Enlarge images [B, 3, s, s] to [B, 3, size, size], in float32, because CPUs have no bf16 kernel for it."""
    return F.interpolate(low_res.float(), size=(size, size), mode="bicubic", antialias=True)


def sample_enlarged(
    upsampler: Any,
    low_res: Tensor,
    denoiser: Callable[[Tensor, Tensor | None], Denoiser],
    settings: Any,
    *,
    known: sampling.Known | None,
    x_T: Tensor | None,
    generator: torch.Generator | None,
    on_step: OnStep,
) -> Tensor:
    """Noise low-resolution images to the level of the settings, if the upsampler knows levels, and sample enlarged ones.

    Args:
        low_res: [B, 3, s, s] in [-1, 1]; not changed.
        denoiser: low-resolution images and their noise levels [B], None for upsamplers that know none -> denoiser.

    Raises:
        ConfigError: the noise level is above the largest of the training.
    """
    noise_level, most = settings.noise_level, upsampler.config.max_noise_level
    require(noise_level <= most, "noise_level", noise_level, f"at least 0, at most {most} as in training")
    level = None
    if most > 0:
        low_res, level = augment_condition(upsampler.diffusion, low_res, (noise_level, noise_level), generator)
    size = low_res.shape[-1] * upsampler.config.scale
    if x_T is None:
        x_T = torch.randn(len(low_res), 3, size, size, generator=generator, device=low_res.device)
    return sampling.sample(
        upsampler.diffusion,
        denoiser(low_res, level),
        x_T,
        settings,
        mean_squared_score=upsampler.measured.get("mean_squared_score"),
        known=known,
        num_resamplings=settings.num_resamplings,
        generator=generator,
        on_step=on_step,
    )
