"""GLIDE's network: P(image | caption), at the base resolution.

Source: Nichol et al. 2022, "GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models",
sections 4.1 (text), 4.2 (classifier-free guidance) and 4.3 (inpainting). An ADM U-Net (Dhariwal & Nichol 2021) that reads a
caption through a Transformer trained with it: the state of the last token is added to the timestep embedding, where ADM adds
a class embedding, and every attention layer projects the states of all tokens to keys and values of its own.

Letters: B batch, S image size, L text tokens.
"""

import dataclasses

import torch
from torch import Tensor, nn

from unclip.config import require
from unclip.diffusion import guidance, sampling
from unclip.diffusion.process import Denoiser, DiffusionConfig, GaussianDiffusion
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.models.small_images import (
    KNOWN_CHANNELS,
    Captions,
    ImageSampling,
    guided_by_clip,
    sample_images,
    with_known,
)
from unclip.models.text import TextContext, TextShape, TextTransformer, TextTransformerConfig
from unclip.models.unet import UNet, UNetConfig


@dataclasses.dataclass(frozen=True)
class GlideConfig:
    unet: UNetConfig = UNetConfig(attention_resolutions=(32, 16, 8))
    """The network."""
    text: TextTransformerConfig = TextTransformerConfig()
    """The text Transformer, trained with it."""
    text_drop_prob: float = 0.2
    """Probability of replacing the caption by the empty one during training, for classifier-free guidance."""
    inpainting: bool = False
    """Give the network a partly known image and the mask of its known pixels as extra inputs."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""

    def __post_init__(self) -> None:
        require(0 <= self.text_drop_prob < 1, "text_drop_prob", self.text_drop_prob, "a probability below 1")
        require(bool(self.unet.attention_resolutions), "unet.attention_resolutions", (), "at least one resolution")


class Glide(nn.Module):
    """Network that denoises images at the base resolution, given the tokens of captions."""

    def __init__(self, config: GlideConfig, text_shape: TextShape) -> None:
        super().__init__()
        self.config, self.text_shape = config, text_shape
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.measured: dict[str, Tensor] = {}
        """Measurements from the end of training: `mean_squared_score` [T]."""
        self.text = TextTransformer(config.text, text_shape, None, config.unet.time_dim)
        in_channels = 3 + (KNOWN_CHANNELS if config.inpainting else 0)
        self.unet = UNet(config.unet, in_channels, 3 * config.diffusion.outputs_per_channel, config.text.width)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        tokens: Tensor,
        text_drop: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Predict eps, x0 or v, as configured.

        Args:
            x_t: [B, 3, S, S].
            t: [B] int64.
            tokens: [B, L] int64.
            text_drop: [B] bool, True = replace the caption by the empty one.
            known: [B, 4, S, S] from `known_region`, for inpainting; None if nothing is known.

        Returns:
            [B, 3, S, S]; [B, 6, S, S] if the diffusion learns its variance.

        Raises:
            ShapeError: known is given, and the network was not built for it.
        """
        return self._predict(x_t, t, self.text(tokens, text_drop), known)

    def _predict(self, x_t: Tensor, t: Tensor, text: TextContext, known: Tensor | None) -> Tensor:
        x_t = with_known(x_t, known, self.config.inpainting, "glide")
        return self.unet(x_t, t, text.vector, text.tokens, text.mask)  # type: ignore[no-any-return]

    def denoiser(self, captions: Captions, settings: ImageSampling, known: Tensor | None = None) -> Denoiser:
        """Denoiser of images in [-1, 1], guided away from the negative or the empty captions.

        Captions are read once, not in every step.

        Args:
            captions: with tokens [B, L] as text and negative text.
            known: [B, 4, S, S] from `known_region`.

        Raises:
            ConfigError: CLIP guidance is on, and captions has no similarity.
        """
        tokens = captions.text
        assert isinstance(tokens, Tensor), "glide reads tokens"
        negative = self.text.null(len(tokens)) if captions.negative is None else captions.negative

        def denoise(text: TextContext) -> Denoiser:
            return self.diffusion.denoiser(lambda x_t, t: self._predict(x_t, t, text, known))

        conditional = denoise(self.text(tokens))
        unconditional = conditional if settings.guidance_scale == 1 else denoise(self.text(negative))
        guided = guidance.classifier_free(
            self.diffusion, conditional, unconditional, settings.guidance_scale, settings.guidance_rescale
        )
        guided = guided_by_clip(self.diffusion, guided, conditional, captions, settings.clip_guidance_scale)
        return sampling.limited(self.diffusion, guided, conditional, settings, 1.0)

    @torch.no_grad()
    def sample(
        self,
        captions: Captions,
        settings: ImageSampling,
        *,
        known: Tensor | None = None,
        start: Tensor | None = None,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample images [B, 3, S, S] in [-1, 1]; arguments as for `denoiser` and `sample_images`."""
        tokens = captions.text
        assert isinstance(tokens, Tensor), "glide reads tokens"
        return sample_images(
            self,
            self.denoiser(captions, settings, known if self.config.inpainting else None),
            len(tokens),
            tokens.device,
            settings,
            known=known,
            start=start,
            x_T=x_T,
            generator=generator,
            on_step=on_step,
        )
