"""Imagen's networks: P(image | caption) at the base resolution, and text-conditioned super-resolution.

Source: Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding": section 2.4 and
appendix F.1 (base: an ADM U-Net whose attention layers append the text to their keys and values), section 2.5 and appendix F.2
(super-resolution: an efficient U-Net that reads the text too), section 2.5 (noise conditioning augmentation). Captions come as
the states of a frozen text encoder (`unclip.models.text_states`).

Letters: B batch, S image size, s low resolution, L text tokens, W width of the states.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unclip.config import require
from unclip.diffusion import samplers, sampling
from unclip.diffusion.process import Denoiser, DiffusionConfig, GaussianDiffusion
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.diffusion.sampling import DiffusionSampling, Thresholding
from unclip.models.degradations import DegradationConfig
from unclip.models.efficient_unet import EfficientUNet, EfficientUNetConfig
from unclip.models.layers import TimestepMLP
from unclip.models.small_images import ImageSampling, sample_images
from unclip.models.text import TextContext
from unclip.models.text_states import StatesReader, TextStates, no_text
from unclip.models.unet import UNet, UNetConfig
from unclip.models.upsampler import check_enlarging, enlarge, sample_enlarged


@dataclasses.dataclass(frozen=True)
class ImagenConfig:
    unet: UNetConfig = UNetConfig(attention_resolutions=(32, 16, 8))
    """The network."""
    context_dim: int = 512
    """Width of the context tokens that the states of the text are projected to."""
    pooling_heads: int = 8
    """Heads of the attention that pools the text for the timestep embedding."""
    text_drop_prob: float = 0.1
    """Probability of dropping the caption during training, for classifier-free guidance."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""

    def __post_init__(self) -> None:
        require(bool(self.unet.attention_resolutions), "unet.attention_resolutions", (), "at least one resolution")
        _check_text(self.context_dim, self.pooling_heads, self.text_drop_prob)

    @property
    def inpainting(self) -> bool:
        """The network reads no known pixels."""
        return False


@dataclasses.dataclass(frozen=True)
class ImagenSampling(ImageSampling):
    """Sampling settings of the base network."""

    thresholding: Thresholding = "dynamic"
    """Bounds on x0 after guidance. Source: Saharia et al. 2022 (Imagen), section 2.3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.clip_guidance_scale
        require(scale == 0, "clip_guidance_scale", scale, "0: Imagen's text encoder reads no images")


class Imagen(nn.Module):
    """Network that denoises images at the base resolution, given the states of their captions."""

    def __init__(self, config: ImagenConfig, text_width: int) -> None:
        """Args:
        text_width: W.
        """
        super().__init__()
        self.config, self.text_width = config, text_width
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.measured: dict[str, Tensor] = {}
        """Measurements from the end of training: `mean_squared_score` [T]."""
        self.text = StatesReader(text_width, config.context_dim, config.unet.time_dim, config.pooling_heads)
        self.unet = UNet(config.unet, 3, 3 * config.diffusion.outputs_per_channel, config.context_dim)

    def forward(
        self, x_t: Tensor, t: Tensor, states: Tensor, length: Tensor, text_drop: Tensor | None = None
    ) -> Tensor:
        """Predict eps, x0 or v, as configured.

        Args:
            x_t: [B, 3, S, S].
            t: [B] int64.
            states: [B, L, W], states of the captions.
            length: [B] int64, tokens of each caption.
            text_drop: [B] bool, True = drop the caption.

        Returns:
            [B, 3, S, S]; [B, 6, S, S] if the diffusion learns its variance.
        """
        return self._predict(x_t, t, self.text(TextStates(states, length), text_drop))

    def _predict(self, x_t: Tensor, t: Tensor, text: TextContext) -> Tensor:
        return self.unet(x_t, t, text.vector, text.tokens, text.mask)  # type: ignore[no-any-return]

    def denoiser(self, text: TextStates, settings: ImagenSampling, negative: TextStates | None = None) -> Denoiser:
        """Denoiser of images in [-1, 1], guided away from the negative captions, or from no caption.

        Captions are read once, not in every step.
        """

        def denoise(given: TextStates) -> Denoiser:
            context = self.text(given)
            return self.diffusion.denoiser(lambda x_t, t: self._predict(x_t, t, context))

        return _guided(self.diffusion, denoise, text, settings, negative)

    @torch.no_grad()
    def sample(
        self,
        text: TextStates,
        settings: ImagenSampling,
        *,
        negative: TextStates | None = None,
        known: Tensor | None = None,
        start: Tensor | None = None,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample images [B, 3, S, S] in [-1, 1]; arguments as for `denoiser` and `sample_images`."""
        return sample_images(
            self,
            self.denoiser(text, settings, negative),
            len(text.states),
            text.states.device,
            settings,
            known=known,
            start=start,
            x_T=x_T,
            generator=generator,
            on_step=on_step,
        )


@dataclasses.dataclass(frozen=True)
class TextUpsamplerConfig:
    unet: EfficientUNetConfig = EfficientUNetConfig()
    """The network; `image_size` is the size of the training crops."""
    low_res_size: int = 64
    """Input size, pixels."""
    scale: int = 4
    """Output size divided by input size."""
    degradation: DegradationConfig = DegradationConfig(kind="none")
    """Degradation of the low-resolution image in training, besides its noise."""
    max_noise_level: int = 999
    """Largest noise level of the low-resolution image in training. The level, a timestep of `diffusion`, is drawn per image
    and read by the network, so that it can be chosen at sampling. 0 for a network that reads no noise level. Source: Saharia
    et al. 2022 (Imagen), section 2.5, with all levels of the process."""
    context_dim: int = 512
    """Width of the context tokens that the states of the text are projected to."""
    pooling_heads: int = 8
    """Heads of the attention that pools the text for the timestep embedding."""
    text_drop_prob: float = 0.1
    """Probability of dropping the caption during training, for classifier-free guidance."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""

    def __post_init__(self) -> None:
        check_enlarging(self)
        step = 2 ** len(self.unet.channel_mult)
        fits = self.output_size % step == 0
        require(
            fits,
            "unet.channel_mult",
            self.unet.channel_mult,
            f"fewer levels, as {self.output_size} is no multiple of {step}",
        )
        _check_text(self.context_dim, self.pooling_heads, self.text_drop_prob)

    @property
    def output_size(self) -> int:
        return self.low_res_size * self.scale

    @property
    def name(self) -> str:
        """Name that tells upsamplers apart; upsampler-256 outputs images of 256 pixels."""
        return f"upsampler-{self.output_size}"


@dataclasses.dataclass(frozen=True)
class TextUpsamplerSampling(DiffusionSampling):
    """Sampling settings of a text-conditioned upsampler."""

    num_steps: int = 15
    """Sampling steps."""
    thresholding: Thresholding = "dynamic"
    """Bounds on x0 after guidance. Source: Saharia et al. 2022 (Imagen), section 2.3."""
    noise_level: int = 0
    """Timestep to which the low-resolution image is noised first; a later one hides more of its artefacts, but also more of
    its detail, which the network then invents. For upsamplers trained with `max_noise_level`. Source: Saharia et al. 2022
    (Imagen), section 2.5 and figure A.11, which sweeps it."""
    num_resamplings: int = samplers.NUM_RESAMPLINGS
    """Times that inpainting samples each step, as upsamplers know no masks; 1 = no resampling. Source: Lugmayr et al. 2022,
    algorithm 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.noise_level >= 0, "noise_level", self.noise_level, "at least 0")
        require(self.num_resamplings >= 1, "num_resamplings", self.num_resamplings, "at least 1")


class TextUpsampler(nn.Module):
    """Network that denoises images, given the same images `scale` times smaller and the states of their captions."""

    def __init__(self, config: TextUpsamplerConfig, text_width: int) -> None:
        """Args:
        text_width: W.
        """
        super().__init__()
        self.config, self.text_width = config, text_width
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.measured: dict[str, Tensor] = {}
        """Measurements from the end of training: `mean_squared_score` [T]."""
        self.text = StatesReader(text_width, config.context_dim, config.unet.time_dim, config.pooling_heads)
        self.unet = EfficientUNet(config.unet, 6, 3 * config.diffusion.outputs_per_channel, config.context_dim)
        self.noise_level_embedding: TimestepMLP | None = None
        if config.max_noise_level > 0:
            self.noise_level_embedding = TimestepMLP(config.unet.channels, config.unet.time_dim)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        low_res: Tensor,
        noise_level: Tensor | None,
        states: Tensor,
        length: Tensor,
        text_drop: Tensor | None = None,
    ) -> Tensor:
        """Predict eps, x0 or v, as configured.

        Args:
            x_t: [B, 3, S, S].
            t: [B] int64.
            low_res: [B, 3, s, s], already noised to noise_level.
            noise_level: [B] int64, the timestep to which low_res was noised; None for 0.
            states: [B, L, W], states of the captions.
            length: [B] int64, tokens of each caption.
            text_drop: [B] bool, True = drop the caption.

        Returns:
            [B, 3, S, S]; [B, 6, S, S] if the diffusion learns its variance.
        """
        text = self.text(TextStates(states, length), text_drop)
        return self._predict(x_t, t, enlarge(low_res, x_t.shape[-1]), noise_level, text)

    def _predict(
        self, x_t: Tensor, t: Tensor, enlarged: Tensor, noise_level: Tensor | None, text: TextContext
    ) -> Tensor:
        vector = text.vector  # [B, D]
        if self.noise_level_embedding is not None:
            level = torch.zeros_like(t) if noise_level is None else noise_level
            vector = vector + self.noise_level_embedding(level)
        images = torch.cat([x_t, enlarged], dim=1)  # [B, 6, S, S]
        return self.unet(images, t, vector, text.tokens, text.mask)  # type: ignore[no-any-return]

    def denoiser(
        self, low_res: Tensor, noise_level: Tensor | None, text: TextStates, settings: TextUpsamplerSampling
    ) -> Denoiser:
        """Denoiser of images in [-1, 1], guided away from no caption.

        Args:
            low_res: [B, 3, s, s] in [-1, 1], already noised to noise_level [B].
            text: captions.
        """
        enlarged = enlarge(low_res, low_res.shape[-1] * self.config.scale)

        def denoise(given: TextStates) -> Denoiser:
            context = self.text(given)
            return self.diffusion.denoiser(lambda x_t, t: self._predict(x_t, t, enlarged, noise_level, context))

        return _guided(self.diffusion, denoise, text, settings)

    @torch.no_grad()
    def sample(
        self,
        low_res: Tensor,
        settings: TextUpsamplerSampling,
        text: TextStates,
        *,
        known: sampling.Known | None = None,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample images [B, 3, s * scale, s * scale] in [-1, 1].

        Args:
            low_res: [B, 3, s, s] in [-1, 1]; not changed.
            text: B captions.
            known: pixels to return unchanged; the others are fitted to them by resampling.
            x_T: [B, 3, s * scale, s * scale]; None draws it from the generator.

        Raises:
            ConfigError: the noise level is above the largest of the training.
        """
        return sample_enlarged(
            self,
            low_res,
            lambda noised, level: self.denoiser(noised, level, text, settings),
            settings,
            known=known,
            x_T=x_T,
            generator=generator,
            on_step=on_step,
        )


def _guided(
    diffusion: GaussianDiffusion,
    denoise: Callable[[TextStates], Denoiser],
    text: TextStates,
    settings: DiffusionSampling,
    negative: TextStates | None = None,
) -> Denoiser:
    """Denoiser with guidance away from the negative captions or none, and thresholding."""
    conditional = denoise(text)
    is_guided = settings.guidance_scale != 1
    unconditional = denoise(no_text(text) if negative is None else negative) if is_guided else conditional
    return sampling.guided(diffusion, conditional, unconditional, settings, 1.0)


def _check_text(context_dim: int, pooling_heads: int, text_drop_prob: float) -> None:
    require(context_dim >= 1, "context_dim", context_dim, "at least 1")
    fits = pooling_heads >= 1 and context_dim % pooling_heads == 0
    require(fits, "pooling_heads", pooling_heads, f"a divisor of context_dim, {context_dim}")
    require(0 <= text_drop_prob < 1, "text_drop_prob", text_drop_prob, "a probability below 1")
