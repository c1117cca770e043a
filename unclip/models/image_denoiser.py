"""Denoising network of images, unconditional or conditioned on classes.

Sources: Ho et al. 2020 (DDPM) and Nichol & Dhariwal 2021 (Improved DDPM), unconditional; Dhariwal & Nichol 2021 (ADM),
section 3.1, for the class embedding, which is added to that of the timestep; Ho & Salimans 2022 for dropped classes.

Letters: B batch, S image size, K classes, D time-embedding width.
"""

import dataclasses

import torch
from torch import Tensor, nn

from unclip.config import added, require
from unclip.diffusion import guidance, samplers, sampling
from unclip.diffusion.guidance import LogProbability
from unclip.diffusion.process import Denoiser, DiffusionConfig, GaussianDiffusion
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.diffusion.sampling import DiffusionSampling
from unclip.models.unet import UNet, UNetConfig


@dataclasses.dataclass(frozen=True)
class ImageDenoiserConfig:
    unet: UNetConfig = UNetConfig(attention_resolutions=(32, 16, 8))
    """The network."""
    class_drop_prob: float = 0.1
    """Probability of dropping the class during training, for classifier-free guidance; 0 as in ADM."""
    diffusion: DiffusionConfig = DiffusionConfig(variance="learned_range")
    """The diffusion process."""

    def __post_init__(self) -> None:
        require(0 <= self.class_drop_prob < 1, "class_drop_prob", self.class_drop_prob, "a probability below 1")


@dataclasses.dataclass(frozen=True)
class ImageDenoiserSampling(DiffusionSampling):
    num_steps: int = 25
    """Sampling steps."""
    classifier_scale: float = 0.0
    """Scale of classifier guidance, for systems with a classifier: higher scales give images that are more typical of the class,
    and less diverse; 0 = off. Source: Dhariwal & Nichol 2021, algorithm 1 (the sampler ddpm) and 2 (all others)."""

    num_resamplings: int = added(samplers.NUM_RESAMPLINGS)
    """Times that inpainting samples each step, as the network knows no masks; 1 = no resampling. Source: Lugmayr et al. 2022,
    algorithm 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.classifier_scale >= 0, "classifier_scale", self.classifier_scale, "at least 0")
        require(self.num_resamplings >= 1, "num_resamplings", self.num_resamplings, "at least 1")


class ImageDenoiser(nn.Module):
    """Network that denoises images, given their classes if it has any."""

    def __init__(self, config: ImageDenoiserConfig, num_classes: int = 0) -> None:
        """Args:
        num_classes: K; 0 for an unconditional network.
        """
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.class_names: tuple[str, ...] = ()
        """Names of the K classes, if the network was loaded from a file."""
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.measured: dict[str, Tensor] = {}
        """Measurements from the end of training: `mean_squared_score` [T], and `bits_per_dim` if configured."""
        self.unet = UNet(config.unet, 3, 3 * config.diffusion.outputs_per_channel)
        # the last row is for images without a class, and dropped classes
        self.class_embedding = nn.Embedding(num_classes + 1, config.unet.time_dim) if num_classes else None

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict eps, x0 or v, as configured.

        Args:
            x_t: [B, 3, S, S].
            t: [B] int64.
            label: [B] int64 in [0, K], K for no class; None for no class in all samples.

        Returns:
            [B, 3, S, S]; [B, 6, S, S] if the diffusion learns its variance.
        """
        vector = None
        if self.class_embedding is not None:
            vector = self.class_embedding(torch.full_like(t, self.num_classes) if label is None else label)  # [B, D]
        return self.unet(x_t, t, vector)  # type: ignore[no-any-return]

    def denoiser(
        self,
        label: Tensor | None,
        settings: ImageDenoiserSampling = ImageDenoiserSampling(),
        log_probability: LogProbability | None = None,
    ) -> Denoiser:
        """Denoiser of images in [-1, 1].

        Args:
            label: [B] int64, as for `forward`.
            log_probability: of the labels, from a classifier of noised images; guides as algorithm 2 of ADM.

        Raises:
            ConfigError: classifier-free guidance is on, and classes were not dropped in training.
        """
        scale, dropped = settings.guidance_scale, self.config.class_drop_prob
        can_guide = self.num_classes > 0 and dropped > 0
        require(scale == 1 or can_guide, "guidance_scale", scale, "1 for a network without classes or class_drop_prob")
        conditional = self.diffusion.denoiser(lambda x_t, t: self(x_t, t, label))
        unconditional = self.diffusion.denoiser(lambda x_t, t: self(x_t, t))
        guided = guidance.classifier_free(self.diffusion, conditional, unconditional, scale, settings.guidance_rescale)
        if log_probability is not None and settings.classifier_scale:
            guided = guidance.classifier(self.diffusion, guided, log_probability, settings.classifier_scale)
        return sampling.limited(self.diffusion, guided, conditional, settings, 1.0)

    @torch.no_grad()
    def sample(
        self,
        batch: int,
        label: Tensor | None = None,
        settings: ImageDenoiserSampling = ImageDenoiserSampling(),
        log_probability: LogProbability | None = None,
        *,
        known: sampling.Known | None = None,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample images [batch, 3, S, S] in [-1, 1].

        Args (in addition to those of `denoiser`):
            known: pixels to return unchanged; the others are fitted to them by resampling.
            x_T: [batch, 3, S, S]; None draws it from the generator.
        """
        size, device = self.config.unet.image_size, next(self.parameters()).device
        if x_T is None:
            x_T = torch.randn(batch, 3, size, size, generator=generator, device=device)
        mean_shift = None
        if settings.sampler == "ddpm" and log_probability is not None and settings.classifier_scale:
            mean_shift = guidance.gradient(log_probability, settings.classifier_scale)
            log_probability = None  # the sampler shifts the means instead of eps
        return sampling.sample(
            self.diffusion,
            self.denoiser(label, settings, log_probability),
            x_T,
            settings,
            mean_squared_score=self.measured.get("mean_squared_score"),
            mean_shift=mean_shift,
            known=known,
            num_resamplings=settings.num_resamplings,
            generator=generator,
            on_step=on_step,
        )
