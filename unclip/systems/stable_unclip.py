"""Stable unCLIP: captions to image embeddings by a prior, these to latents of an autoencoder, and latents to images.

The prior is unCLIP's own part. The network of latents is that of `unclip.systems.latent_diffusion`, conditioned on the image
embedding, and on the caption too if configured.

Sources: Ramesh et al. 2022, section 2; Rombach et al. 2022, section 3.

Letters: B batch, E CLIP embedding width, S resolution of the system's images.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from unclip.config import require
from unclip.models import embeddings
from unclip.models.autoencoder import Autoencoder
from unclip.models.autoregressive_prior import AutoregressivePrior
from unclip.models.clip import Clip
from unclip.models.latent_diffusion import Conditions, LatentDiffusion, LatentDiffusionConfig, LatentSampling
from unclip.models.prior import DiffusionPrior, PriorSampling
from unclip.models.text import caption_features
from unclip.models.upsampler import Upsampler
from unclip.systems.autoencoder import AUTOENCODER
from unclip.systems.latent_diffusion import (
    LatentDiffusionStageConfig,
    LatentSystem,
    latent_part,
    load_latent_parts,
    shortcuts_of,
)
from unclip.systems.system import StackFiles, SystemSpec, check_negative, load_model, sampling_of
from unclip.systems.unclip.prior import PRIOR
from unclip.systems.upsampler import UPSAMPLER, UpsampledSampling


@dataclasses.dataclass(frozen=True)
class StableUnclipStageConfig(LatentDiffusionStageConfig):
    model: LatentDiffusionConfig = LatentDiffusionConfig(text="none", reads_image_embedding=True)
    """The network and its diffusion process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        reads = self.model.reads_image_embedding
        require(
            reads, "model.reads_image_embedding", reads, "true: the prior's embedding is what this system samples from"
        )


STABLE_UNCLIP = latent_part(
    "stable_unclip",
    "Train stable unCLIP's generator: from CLIP image embeddings, and captions if configured, to latents of the autoencoder.",
    StableUnclipStageConfig,
)


@dataclasses.dataclass(frozen=True)
class StableUnclipSampling(UpsampledSampling):
    prior: PriorSampling = PriorSampling()
    """Settings of the prior."""
    stable_unclip: LatentSampling = LatentSampling()
    """Settings of the generator."""


class StableUnclipStack(LatentSystem):
    """CLIP, a prior, a generator of latents from image embeddings, and the autoencoder."""

    def __init__(
        self,
        clip: Clip,
        prior: DiffusionPrior | AutoregressivePrior,
        generator: LatentDiffusion,
        autoencoder: Autoencoder,
        upsamplers: Sequence[Upsampler] = (),
    ) -> None:
        """Raises:
        CheckpointError: the parts do not fit each other, or the prior and the generator were trained on embeddings of
            different datasets or CLIPs.
        """
        super().__init__("stable_unclip", clip, generator, autoencoder, upsamplers)
        assert generator.image is not None, "its settings require an image embedding"
        embeddings.check_agreement({"prior": prior.statistics, "stable_unclip": generator.image.statistics})
        self.prior = prior
        self.sampling = StableUnclipSampling()

    @classmethod
    def load(cls, files: StackFiles) -> "StableUnclipStack":
        """Load CLIP and the parts.

        Raises:
            CheckpointError: files are missing or damaged, or do not fit each other.
        """
        parts = load_latent_parts(files, STABLE_UNCLIP, "prior")
        prior = load_model(files.models["prior"], (PRIOR,))
        assert files.clip is not None and isinstance(prior, DiffusionPrior | AutoregressivePrior)
        stack = cls(files.clip.load(), prior, *parts)
        stack.sampling = sampling_of(files, StableUnclipSampling)
        return stack

    def settings_of(self, sampling: StableUnclipSampling) -> LatentSampling:
        return sampling.stable_unclip

    def conditions(
        self,
        captions: Sequence[str],
        sampling: StableUnclipSampling,
        generator: torch.Generator,
        negative: Sequence[str] | None = None,
    ) -> Conditions:
        if negative is not None:
            scales = [sampling.prior.guidance_scale]
            scales += [sampling.stable_unclip.guidance_scale] if self.generator.text is not None else []
            check_negative(negative, len(captions), scales, "prior.guidance_scale")
        return Conditions(
            self.read_captions(captions),
            None if negative is None else self.read_captions(negative),
            self.sample_embeddings(captions, sampling, generator, negative),
        )

    @torch.no_grad()
    def sample_embeddings(
        self,
        captions: Sequence[str],
        sampling: StableUnclipSampling,
        generator: torch.Generator,
        negative: Sequence[str] | None = None,
    ) -> Tensor:
        """Image embeddings [B, E] that the prior samples for captions."""
        given = None if negative is None else caption_features(self.clip, self.tokenize(negative))
        features = caption_features(self.clip, self.tokenize(captions))
        return self.prior.sample(*features, sampling.prior, negative=given, generator=generator)

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """CLIP's unit-norm text embeddings [B, E]."""
        return self.clip.encode_text(self.tokenize(captions)).text_embedding

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images [B, 3, H, W] in [-1, 1] as image embeddings [B, E], as the generator reads them."""
        return self.clip.embed_images(self.clip.resize(images.to(self.device)))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, sampling: StableUnclipSampling, generator: torch.Generator) -> Tensor:
        """Sample an image [B, 3, S, S] for the embedding of each image [B, 3, H, W] in [-1, 1], from fresh noise."""
        self.check_sampling(sampling)
        conditions = Conditions(image_embedding=self.embed_images(images))
        samples = self.decode_samples(conditions, len(images), sampling, generator)
        return self.upsample(samples, sampling, generator)


SYSTEM = SystemSpec(
    name="stable_unclip",
    parts=(PRIOR, STABLE_UNCLIP, AUTOENCODER, UPSAMPLER),
    sampling=StableUnclipSampling,
    load=StableUnclipStack.load,
    shortcuts=shortcuts_of(STABLE_UNCLIP),
    inputs=("negative", "start"),
    reconstructs=True,
)
