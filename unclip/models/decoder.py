"""The decoder: P(image | image embedding, caption), at the base resolution.

Source: Ramesh et al. 2022, section 2.1. An ADM U-Net conditioned on the CLIP image embedding in two ways: projected and
added to the timestep embedding, and projected to four extra context tokens that every attention layer reads. The caption, if
used, enters through the same two paths (`unclip.models.text`). Inpainting: Nichol et al. 2022 (GLIDE), section 4.3.

Letters: B batch, E CLIP embedding width, S image size, L text tokens, X context width, D time-embedding width.
"""

import dataclasses

import torch
from torch import Tensor, nn

from unclip.config import added, require
from unclip.diffusion import guidance, sampling
from unclip.diffusion.process import Denoiser, DiffusionConfig, GaussianDiffusion
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.errors import ShapeError
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.small_images import (
    KNOWN_CHANNELS,
    NO_CAPTIONS,
    Captions,
    ImageSampling,
    guided_by_clip,
    sample_images,
    with_known,
)
from unclip.models.text import ClipText, Text, TextShape, TextSource, TextTransformer, TextTransformerConfig
from unclip.models.unet import UNet, UNetConfig

NUM_IMAGE_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    unet: UNetConfig = UNetConfig(attention_resolutions=(32, 16, 8))
    """The network."""
    context_dim: int = 512
    """Width of the context tokens."""
    text: TextSource = "none"
    """Text encoder for captions: none, the frozen CLIP, or a Transformer trained with the decoder."""
    text_transformer: TextTransformerConfig = TextTransformerConfig()
    """The trained text Transformer; used only if `text` is "transformer"."""
    image_drop_prob: float = 0.1
    """Probability of dropping the image embedding during training, for classifier-free guidance."""
    text_drop_prob: float = 0.5
    """Probability of dropping the caption during training, independently of the image embedding."""
    inpainting: bool = False
    """Give the network a partly known image and the mask of its known pixels as extra inputs."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""

    def __post_init__(self) -> None:
        for name in ("image_drop_prob", "text_drop_prob"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a probability below 1")
        require(bool(self.unet.attention_resolutions), "unet.attention_resolutions", (), "at least one resolution")
        require(self.context_dim >= 1, "context_dim", self.context_dim, "at least 1")


@dataclasses.dataclass(frozen=True)
class DecoderSampling(ImageSampling):
    text_guidance_scale: float | None = None
    """Separate guidance scale for the caption, for decoders that read it; `guidance_scale` is then for the image embedding.
    None guides by both together, at two thirds of the cost. Source: Brooks et al. 2022, eq. 3."""
    reads_captions: bool = added(True)
    """Give captions to a decoder that reads them; false gives it the empty caption, as training does when it drops one.
    Source: Ramesh et al. 2022, section 5.1."""
    inversion_iterations: int = 1
    """Iterations per step of an inversion. More iterations reproduce the image more closely, but let it follow a text diff
    less freely. Source: Pan et al. 2023, section 3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        text_scale, iterations = self.text_guidance_scale, self.inversion_iterations
        require(text_scale is None or text_scale >= 0, "text_guidance_scale", text_scale, "at least 0")
        require(iterations >= 1, "inversion_iterations", iterations, "at least 1")


class Decoder(nn.Module):
    """Network that denoises images at the base resolution, given CLIP image embeddings and, if configured, captions."""

    def __init__(self, config: DecoderConfig, embedding_dim: int, text_shape: TextShape | None = None) -> None:
        """Args:
            embedding_dim: E.
            text_shape: required unless `config.text` is "none".

        Raises:
            ConfigError: config.text needs a text_shape, and it is missing.
        """
        super().__init__()
        require(config.text == "none" or text_shape is not None, "text_shape", None, f"one for text {config.text!r}")
        self.config = config
        self.text_shape = text_shape
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.measured: dict[str, Tensor] = {}
        """Measurements from the end of training: `mean_squared_score` [T]."""
        self.statistics = EmbeddingStatistics.empty(embedding_dim)
        context_dim, time_dim = config.context_dim, config.unet.time_dim
        in_channels = 3 + (KNOWN_CHANNELS if config.inpainting else 0)
        self.unet = UNet(config.unet, in_channels, 3 * config.diffusion.outputs_per_channel, context_dim)
        self.to_time = nn.Linear(embedding_dim, time_dim)
        self.to_tokens = nn.Linear(embedding_dim, NUM_IMAGE_TOKENS * context_dim)
        self.null_embedding = nn.Parameter(torch.zeros(embedding_dim))
        self.text: ClipText | TextTransformer | None = None
        if config.text == "clip" and text_shape is not None:
            self.text = ClipText(text_shape, embedding_dim, context_dim, time_dim)
        if config.text == "transformer" and text_shape is not None:
            self.text = TextTransformer(config.text_transformer, text_shape, context_dim, time_dim)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        image_embedding: Tensor,
        image_drop: Tensor | None = None,
        text: Text | None = None,
        text_drop: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Predict eps, x0 or v, as configured.

        Args:
            x_t: [B, 3, S, S].
            t: [B] int64.
            image_embedding: [B, E], as CLIP returns it.
            image_drop: [B] bool, True = drop the image embedding on both paths.
            text: captions; None for empty captions.
            text_drop: [B] bool, True = drop the caption on both paths.
            known: [B, 4, S, S] from `known_region`, for inpainting; None if nothing is known.

        Returns:
            [B, 3, S, S]; [B, 6, S, S] if the diffusion learns its variance.

        Raises:
            ShapeError: this decoder does not take text or known, and it was given.
        """
        embedding = self.statistics.normalize(image_embedding)  # [B, E]
        if image_drop is not None:
            embedding = torch.where(image_drop[:, None], self.null_embedding, embedding)
        vector = self.to_time(embedding)  # [B, D]
        # channel-major, like published unCLIP decoders
        context = self.to_tokens(embedding).unflatten(1, (-1, NUM_IMAGE_TOKENS)).transpose(1, 2)  # [B, 4, X]
        mask = None
        if self.text is not None:
            caption = self.text(self.text.null(len(x_t)) if text is None else text, text_drop)
            vector = vector + caption.vector
            context = torch.cat([context, caption.tokens], dim=1)  # [B, 4 + L, X]
            mask = torch.cat([caption.mask.new_ones(len(x_t), NUM_IMAGE_TOKENS), caption.mask], dim=1)  # [B, 4 + L]
        elif text is not None:
            raise ShapeError(
                "decoder: got captions, expected none. Set text = 'clip' or 'transformer' and train again."
            )
        x_t = with_known(x_t, known, self.config.inpainting, "decoder")
        return self.unet(x_t, t, vector, context, mask)  # type: ignore[no-any-return]

    def null_image_embedding(self, batch: int) -> Tensor:
        """Null image embedding, [batch, E] in CLIP's scale, for sampling from captions alone."""
        return self.statistics.denormalize(self.null_embedding).expand(batch, -1)

    def denoiser(
        self,
        image_embedding: Tensor,
        settings: DecoderSampling = DecoderSampling(),
        captions: Captions = NO_CAPTIONS,
        known: Tensor | None = None,
    ) -> Denoiser:
        """Denoiser of images in [-1, 1], guided away from the prediction without image embedding and caption.

        Args:
            image_embedding: [B, E], one per sample.
            known: [B, 4, S, S] from `known_region`; given to both the conditional and the unconditional prediction.

        Raises:
            ConfigError: CLIP guidance is on, and captions has no caption_similarity.
        """
        batch, device = len(image_embedding), image_embedding.device
        caption = captions.text if settings.reads_captions else None

        def predict(image_dropped: bool, text: Text | None, text_dropped: bool) -> Denoiser:
            image_drop = torch.full((batch,), image_dropped, device=device)
            text_drop = torch.full((batch,), text_dropped, device=device)
            return self.diffusion.denoiser(
                lambda x_t, t: self(x_t, t, image_embedding, image_drop, text, text_drop, known)
            )

        def without_caption(image_dropped: bool) -> Denoiser:
            if captions.negative is None:
                return predict(image_dropped, caption, True)
            return predict(image_dropped, captions.negative, False)

        both, neither = predict(False, caption, False), without_caption(True)
        scale, text_scale, rescale = settings.guidance_scale, settings.text_guidance_scale, settings.guidance_rescale
        if text_scale is None:
            guided = guidance.classifier_free(self.diffusion, both, neither, scale, rescale)
        else:
            image_alone = without_caption(False)
            guided = guidance.classifier_free_two(
                self.diffusion, both, image_alone, neither, scale, text_scale, rescale
            )
        guided = guided_by_clip(self.diffusion, guided, both, captions, settings.clip_guidance_scale)
        return sampling.limited(self.diffusion, guided, both, settings, 1.0)

    @torch.no_grad()
    def sample(
        self,
        image_embedding: Tensor,
        settings: DecoderSampling = DecoderSampling(),
        captions: Captions = NO_CAPTIONS,
        *,
        known: Tensor | None = None,
        start: Tensor | None = None,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample images [B, 3, S, S] in [-1, 1]; arguments as for `denoiser` and `sample_images`."""
        return sample_images(
            self,
            self.denoiser(image_embedding, settings, captions, known if self.config.inpainting else None),
            len(image_embedding),
            image_embedding.device,
            settings,
            known=known,
            start=start,
            x_T=x_T,
            generator=generator,
            on_step=on_step,
        )
