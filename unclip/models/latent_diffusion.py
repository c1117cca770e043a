"""Latent diffusion's network: P(latents | caption, image embedding), for the latents of an autoencoder.

Sources: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3 (diffusion of latents,
conditioned on the states of a text encoder); Ramesh et al. 2022, section 2.1 (conditioning on an image embedding, as the decoder
does it), which "Stable unCLIP" combines, with noise on the embedding. The U-Net is that of the other systems, whose attention
reads the context tokens together with the pixels, or that of Stable Diffusion, with a spatial Transformer in its place
(`unet.attention`). The latter reads the states of a frozen CLIP as they are, those of padding too, and no vector of the text; an
image embedding is a vector alone.

Inside, latents have mean 0 and variance 1 in every channel; the statistics of the training rows are part of the weights.

Letters: B batch, D latent channels, s latent size, E CLIP embedding width, L text tokens, X context width, T time-embedding
width.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import require
from unclip.diffusion import guidance, samplers, sampling
from unclip.diffusion.process import Denoiser, DiffusionConfig, GaussianDiffusion, augment_condition
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.diffusion.sampling import DiffusionSampling, Known
from unclip.errors import ShapeError
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.layers import timestep_embedding
from unclip.models.text import (
    ClipStates,
    ClipText,
    Text,
    TextContext,
    TextShape,
    TextSource,
    TextTransformer,
    TextTransformerConfig,
)
from unclip.models.unet import UNet, UNetConfig

NUM_IMAGE_TOKENS = 4
"""Context tokens that an image embedding is projected to."""
SMALLEST_STD = 1e-6


@dataclasses.dataclass(frozen=True)
class LatentDiffusionConfig:
    unet: UNetConfig = UNetConfig(image_size=32, attention_resolutions=(32, 16, 8))
    """The network; its image_size is that of the latents."""
    latent_channels: int = 4
    """D, channels of the latents."""
    context_dim: int = 768
    """Width of the context tokens."""
    text: TextSource = "clip"
    """Text encoder for captions: none, the frozen CLIP, or a Transformer trained with the network."""
    text_transformer: TextTransformerConfig = TextTransformerConfig()
    """The trained text Transformer; used only if `text` is "transformer"."""
    text_drop_prob: float = 0.1
    """Probability of replacing the caption by the empty one during training, for classifier-free guidance."""
    reads_image_embedding: bool = False
    """Condition on CLIP's image embedding too, which a prior samples."""
    image_drop_prob: float = 0.1
    """Probability of dropping the image embedding during training, for classifier-free guidance."""
    max_noise_level: int = 0
    """Largest timestep to which image embeddings are noised during training, as a timestep of the process; the network is told
    it. Then samples depend less on details that a prior gets wrong. 0 adds no noise. Source: Ho et al. 2021 (CDM), section
    4.2."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""

    def __post_init__(self) -> None:
        for name in ("text_drop_prob", "image_drop_prob"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a probability below 1")
        for name in ("latent_channels", "context_dim"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(bool(self.unet.attention_resolutions), "unet.attention_resolutions", (), "at least one resolution")
        reads_any = self.reads_image_embedding or self.text != "none"
        require(reads_any, "text", self.text, "clip or transformer, as the network reads no image embedding")
        has_tokens = self.unet.attention == "joint" or self.text != "none"
        require(
            has_tokens, "text", self.text, "clip or transformer, as spatial Transformers read the tokens of captions"
        )
        level, last = self.max_noise_level, self.diffusion.num_timesteps - 1
        require(0 <= level <= last, "max_noise_level", level, f"0 to {last}, the last timestep")
        expected = "0, as the network reads no image embedding"
        require(self.reads_image_embedding or level == 0, "max_noise_level", level, expected)

    @property
    def reads_padding(self) -> bool:
        """True if all text tokens are read, those of padding too, as in Stable Diffusion."""
        return self.text == "clip" and self.unet.attention == "spatial_transformer"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (D, s, s) of one image's latents."""
        return self.latent_channels, self.unet.image_size, self.unet.image_size


@dataclasses.dataclass(frozen=True)
class LatentSampling(DiffusionSampling):
    """Sampling settings of a network of latents. Latents have no bound of their own, so thresholding needs a `threshold`."""

    guidance_scale: float = 3.0
    """Scale of classifier-free guidance; 1 = off. Source: Ho & Salimans 2022, eq. 6."""
    strength: float = 0.7
    """Fraction of the process applied to a given start image: 0 returns it, 1 ignores it. Source: Meng et al. 2022
    (SDEdit), section 3."""
    num_resamplings: int = samplers.NUM_RESAMPLINGS
    """Times that inpainting samples each step; 1 = no resampling. Source: Lugmayr et al. 2022, algorithm 1."""
    noise_level: int = 0
    """Timestep to which image embeddings are noised, at most the `max_noise_level` of the training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.strength <= 1, "strength", self.strength, "0 to 1")
        require(self.num_resamplings >= 1, "num_resamplings", self.num_resamplings, "at least 1")
        require(self.noise_level >= 0, "noise_level", self.noise_level, "at least 0")


class Conditions(NamedTuple):
    """Conditions of a batch of samples."""

    text: Text | None = None
    """Captions; None for empty captions, or a network that reads none."""
    negative: Text | None = None
    """Negative captions, which guidance pushes away from; None for empty captions."""
    image_embedding: Tensor | None = None
    """[B, E], as CLIP returns it; None for a network that reads none."""


class Context(NamedTuple):
    """Conditions as the U-Net reads them."""

    tokens: Tensor
    """[B, L, X], of the image embedding and of the caption."""
    mask: Tensor | None
    """[B, L] bool, True = attend; None attends to all."""
    vector: Tensor | None
    """[B, T], or None."""


class LatentDiffusion(nn.Module):
    """Network that denoises latents, given captions, image embeddings or both."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: LatentDiffusionConfig, embedding_dim: int, text_shape: TextShape | None = None) -> None:
        """Args:
            embedding_dim: E.
            text_shape: required unless `config.text` is "none".

        Raises:
            ConfigError: config.text needs a text_shape, and it is missing; or states that are read as they are have another width
                than config.context_dim.
        """
        super().__init__()
        require(config.text == "none" or text_shape is not None, "text_shape", None, f"one for text {config.text!r}")
        self.config, self.text_shape = config, text_shape
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.measured: dict[str, Tensor] = {}
        """Measurements from the end of training: `mean_squared_score` [T]."""
        self.autoencoder_digest = ""
        """Digest of the autoencoder whose latents it was trained on."""
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))  # [D]
        self.register_buffer("latent_std", torch.ones(config.latent_channels))  # [D]
        context_dim, time_dim = config.context_dim, config.unet.time_dim
        out_channels = config.latent_channels * config.diffusion.outputs_per_channel
        self.unet = UNet(config.unet, config.latent_channels, out_channels, context_dim)
        self.image: ImageCondition | ImageVector | None = None
        if config.reads_image_embedding and config.unet.attention == "spatial_transformer":
            self.image = ImageVector(embedding_dim, time_dim)
        elif config.reads_image_embedding:
            self.image = ImageCondition(embedding_dim, context_dim, time_dim, config.max_noise_level > 0)
        self.text: ClipStates | ClipText | TextTransformer | None = None
        if config.reads_padding and text_shape is not None:
            expected = f"{text_shape.width}, the width of the CLIP's text states, which a spatial Transformer reads as they are"
            require(context_dim == text_shape.width, "context_dim", context_dim, expected)
            self.text = ClipStates(text_shape, embedding_dim)
        elif config.text == "clip" and text_shape is not None:
            self.text = ClipText(text_shape, embedding_dim, context_dim, time_dim)
        if config.text == "transformer" and text_shape is not None:
            self.text = TextTransformer(config.text_transformer, text_shape, context_dim, time_dim)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the mean and the standard deviation [D] of the training rows' latents."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std.clamp(min=SMALLEST_STD))

    def normalize(self, latents: Tensor) -> Tensor:
        """Scale latents [B, D, s, s] of the autoencoder to mean 0 and variance 1; float32."""
        return (latents.float() - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalize(self, latents: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return latents.float() * self.latent_std[:, None, None] + self.latent_mean[:, None, None]

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        text: Text | None = None,
        text_drop: Tensor | None = None,
        image_embedding: Tensor | None = None,
        image_drop: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """Predict eps, x0 or v, as configured.

        Args:
            x_t: [B, D, s, s], normalised.
            t: [B] int64.
            text: captions; None for empty captions.
            text_drop: [B] bool, True = replace the caption by the empty one.
            image_embedding: [B, E], normalised and noised by `noised_embedding`; None drops all.
            image_drop: [B] bool, True = drop the image embedding.
            noise_level: [B] int64, timestep to which the embedding is noised; None for 0.

        Returns:
            [B, D, s, s]; [B, 2 D, s, s] if the diffusion learns its variance.

        Raises:
            ShapeError: the network does not take text or an image embedding, and it was given.
        """
        return self._predict(x_t, t, self._read(len(x_t), text, text_drop, image_embedding, image_drop, noise_level))

    def _predict(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        return self.unet(x_t, t, context.vector, context.tokens, context.mask)  # type: ignore[no-any-return]

    def _read(
        self,
        batch: int,
        text: Text | None = None,
        text_drop: Tensor | None = None,
        image_embedding: Tensor | None = None,
        image_drop: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Context:
        """Context of all conditions; arguments as for `forward`."""
        found: list[TextContext] = []
        vector = None
        if isinstance(self.image, ImageVector):
            vector = self.image(batch, image_embedding, image_drop, noise_level)  # [B, T]
        elif self.image is not None:
            found.append(self.image(batch, image_embedding, image_drop, noise_level))
        elif image_embedding is not None:
            raise ShapeError("latents: got image embeddings, expected none. Set reads_image_embedding and train again.")
        if self.text is None and text is not None:
            raise ShapeError(
                "latents: got captions, expected none. Set text = 'clip' or 'transformer' and train again."
            )
        if isinstance(self.text, ClipStates):
            states = self.text(self.text.null(batch) if text is None else text, text_drop)  # [B, L, X]
            return Context(states, None, vector)
        if self.text is not None:
            found.append(self.text(self.text.null(batch) if text is None else text, text_drop))
        tokens, masks, vectors = zip(*found, strict=True)
        vectors = vectors if vector is None else (*vectors, vector)
        return Context(torch.cat(tokens, dim=1), torch.cat(masks, dim=1), torch.stack(vectors).sum(dim=0))

    def noised_embedding(
        self, image_embedding: Tensor, levels: tuple[int, int], generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Normalise image embeddings and add noise, of which every sample draws its level.

        Args:
            image_embedding: [B, E], as CLIP returns it.
            levels: smallest and largest timestep, inclusive; equal for sampling.

        Returns:
            [B, E], and the levels [B] int64.
        """
        assert self.image is not None, "this network reads no image embedding"
        embedding = self.image.statistics.normalize(image_embedding)
        if levels == (0, 0):
            return embedding, torch.zeros(len(embedding), dtype=torch.int64, device=embedding.device)
        return augment_condition(self.diffusion, embedding, levels, generator)

    def denoiser(
        self,
        conditions: Conditions,
        batch: int,
        settings: LatentSampling = LatentSampling(),
        generator: torch.Generator | None = None,
    ) -> Denoiser:
        """Denoiser of normalised latents, guided away from the prediction without image embedding and caption.

        Captions are read once, not in every step.

        Raises:
            ConfigError: the noise level is above that of the training.
        """
        most, level = self.config.max_noise_level, settings.noise_level
        require(level <= most, "noise_level", level, f"at most {most}, the max_noise_level of the training")
        embedding, noise_levels = None, None
        if conditions.image_embedding is not None:
            embedding, noise_levels = self.noised_embedding(conditions.image_embedding, (level, level), generator)
        dropped = torch.ones(batch, dtype=torch.bool, device=self.latent_mean.device)

        def denoise(context: Context) -> Denoiser:
            return self.diffusion.denoiser(lambda x_t, t: self._predict(x_t, t, context))

        both = neither = denoise(self._read(batch, conditions.text, None, embedding, None, noise_levels))
        if settings.guidance_scale != 1:
            neither = denoise(self._read(batch, conditions.negative, None, embedding, dropped, noise_levels))
        guided = guidance.classifier_free(
            self.diffusion, both, neither, settings.guidance_scale, settings.guidance_rescale
        )
        return sampling.limited(self.diffusion, guided, both, settings, None)

    @torch.no_grad()
    def sample(
        self,
        conditions: Conditions,
        batch: int,
        settings: LatentSampling = LatentSampling(),
        *,
        known: Known | None = None,
        start: Tensor | None = None,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample latents [batch, D, s, s] of the autoencoder.

        Args:
            known: latents [B, D, s, s] and mask [B, 1, s, s] of those to keep; the others are fitted to them by resampling.
            start: [B, D, s, s], latents to start from, with the strength of the settings.
            x_T: [B, D, s, s], standard normal; None draws it from the generator.
        """
        if x_T is None:
            shape, device = self.config.latent_shape, self.latent_mean.device
            x_T = torch.randn(batch, *shape, generator=generator, device=device)
        samples = sampling.sample(
            self.diffusion,
            self.denoiser(conditions, batch, settings, generator),
            x_T,
            settings,
            mean_squared_score=self.measured.get("mean_squared_score"),
            start=None if start is None else self.normalize(start),
            strength=settings.strength,
            known=None if known is None else Known(self.normalize(known.x0), known.mask),
            num_resamplings=settings.num_resamplings,
            generator=generator,
            on_step=on_step,
        )
        return self.denormalize(samples)


class ImageCondition(nn.Module):
    """Projects image embeddings to a vector for the timestep embedding and to context tokens, as the decoder does."""

    def __init__(self, embedding_dim: int, context_dim: int, time_dim: int, reads_noise_level: bool) -> None:
        super().__init__()
        self.statistics = EmbeddingStatistics.empty(embedding_dim)
        self.reads_noise_level = reads_noise_level
        width = 2 * embedding_dim if reads_noise_level else embedding_dim
        self.to_time = nn.Linear(width, time_dim)
        self.to_tokens = nn.Linear(width, NUM_IMAGE_TOKENS * context_dim)
        self.null_embedding = nn.Parameter(torch.zeros(embedding_dim))

    def forward(
        self, batch: int, embedding: Tensor | None, drop: Tensor | None, noise_level: Tensor | None
    ) -> TextContext:
        """Args: as for `LatentDiffusion.forward`."""
        null = self.null_embedding.expand(batch, -1)  # [B, E]
        if embedding is None:
            embedding = null
        elif drop is not None:
            embedding = torch.where(drop[:, None], null, embedding)
        if self.reads_noise_level:
            level = torch.zeros(batch, device=embedding.device) if noise_level is None else noise_level
            even = embedding.shape[1] + embedding.shape[1] % 2
            embedding = torch.cat([embedding, timestep_embedding(level, even)[:, : embedding.shape[1]]], dim=1)
        tokens = self.to_tokens(embedding).unflatten(1, (NUM_IMAGE_TOKENS, -1))  # [B, 4, X]
        mask = torch.ones(batch, NUM_IMAGE_TOKENS, dtype=torch.bool, device=tokens.device)
        return TextContext(tokens, mask, self.to_time(embedding))


class ImageVector(nn.Module):
    """Projects image embeddings, with the embedding of their noise level, to a vector for the timestep embedding.

    A dropped embedding is zero before it is normalised, and its noise level is not told, as in the published Stable unCLIP.
    """

    def __init__(self, embedding_dim: int, time_dim: int) -> None:
        super().__init__()
        self.statistics = EmbeddingStatistics.empty(embedding_dim)
        self.layers = nn.Sequential(nn.Linear(2 * embedding_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))

    def forward(self, batch: int, embedding: Tensor | None, drop: Tensor | None, noise_level: Tensor | None) -> Tensor:
        """Args: as for `LatentDiffusion.forward`. Returns [B, T]."""
        mean = self.statistics.mean
        dropped = self.statistics.normalize(torch.zeros_like(mean)).expand(batch, -1)  # [B, E]
        if embedding is None:
            embedding, drop = dropped, torch.ones(batch, dtype=torch.bool, device=mean.device)
        level = torch.zeros(batch, device=mean.device) if noise_level is None else noise_level
        even = len(mean) + len(mean) % 2
        told = timestep_embedding(level, even)[:, : len(mean)]  # [B, E]
        if drop is not None:
            embedding = torch.where(drop[:, None], dropped, embedding)
            told = torch.where(drop[:, None], 0.0, told)
        return self.layers(torch.cat([embedding, told], dim=1))  # type: ignore[no-any-return]


def known_latents(mask: Tensor, factor: int) -> Tensor:
    """Latents [B, 1, s, s] bool all of whose pixels are known, from the mask [B, 1, S, S] of known pixels."""
    return F.max_pool2d((~mask).float(), factor) == 0
