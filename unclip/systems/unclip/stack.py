"""The unCLIP stack, from files to images. Manipulations of existing images are in `unclip.systems.unclip.manipulations`.

Letters: B batch, E CLIP embedding width, s resolution of the decoder's images, S resolution of the last upsampler's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.errors import CheckpointError
from unclip.models import embeddings
from unclip.models.autoregressive_prior import AutoregressivePrior
from unclip.models.clip import Clip
from unclip.models.decoder import Decoder
from unclip.models.embeddings import EmbeddingStatistics, PrincipalComponents
from unclip.models.prior import DiffusionPrior
from unclip.models.small_images import NO_CAPTIONS, Captions, similarity_by_clip
from unclip.models.text import CaptionFeatures, EmptyCaption, Text, caption_features, read_captions
from unclip.models.upsampler import Upsampler
from unclip.systems.system import StackFiles, SystemSpec, check_negative, load_model, sampling_of
from unclip.systems.unclip.decoder import DECODER
from unclip.systems.unclip.prior import PRIOR
from unclip.systems.unclip.sampling import SamplingConfig
from unclip.systems.upsampler import UPSAMPLER, UpsampledSystem
from unclip.training import checkpoints
from unclip.training.precision import autocast

PARTS = (PRIOR, DECODER, UPSAMPLER)


class EmbeddingFacts(NamedTuple):
    """Statistics of the image embeddings that a stack was trained on."""

    mean: Tensor
    """[E], mean of the embeddings."""
    principal: PrincipalComponents
    """Principal components of the embeddings."""


class Stack(UpsampledSystem):
    """CLIP, a prior, a decoder and any number of upsamplers, each for the images of the one before: captions to images."""

    upsamplers: Sequence[Upsampler]

    def __init__(
        self,
        clip: Clip,
        prior: DiffusionPrior | AutoregressivePrior,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler] = (),
    ) -> None:
        """Raises:
        CheckpointError: the prior and the decoder were trained on embeddings of different datasets or CLIPs, or with a
            CLIP other than this one; or an upsampler was trained for a resolution other than it gets here.
        """
        super().__init__(decoder.config.unet.image_size, "the decoder", upsamplers)
        embeddings.check_agreement({"prior": prior.statistics, "decoder": decoder.statistics})
        _check_clip(clip, {"prior": prior, "decoder": decoder})
        self.clip, self.prior, self.decoder = clip, prior, decoder
        self.sampling = SamplingConfig()
        self.dataset: EmbeddingFacts | None = None

    @classmethod
    def load(cls, files: StackFiles) -> "Stack":
        """Load CLIP and the parts.

        Raises:
            CheckpointError: files are missing or damaged, or do not fit each other.
        """
        if files.clip is None or not {"prior", "decoder"} <= files.models.keys():
            raise CheckpointError(f"stack: got {', '.join(files.models)}, expected a CLIP, a prior and a decoder.")
        remaining = dict(files.models)
        prior, decoder = (load_model(remaining.pop(name), PARTS) for name in ("prior", "decoder"))
        upsamplers = [load_model(folder, (UPSAMPLER,)) for folder in remaining.values()]
        stack = cls(files.clip.load(), prior, decoder, upsamplers)  # type: ignore[arg-type]
        stack.sampling = sampling_of(files, SamplingConfig)
        if files.statistics is not None:
            tensors, _ = checkpoints.load(files.statistics)
            statistics = EmbeddingStatistics(tensors["statistics"]["mean"], tensors["statistics"]["std"])
            embeddings.check_agreement({"dataset": statistics, "prior": stack.prior.statistics})
            stack.dataset = EmbeddingFacts(tensors["statistics"]["mean"], PrincipalComponents(**tensors["pca"]))
        return stack

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str],
        sampling: SamplingConfig,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None = None,
        start: Tensor | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample one image for each caption, [len(captions), 3, S, S] in [-1, 1].

        Args:
            negative: captions to guide away from, in the prior and in a decoder that reads captions.
            start: [B, 3, S, S], images for the decoder to start from, shrunk to its resolution and noised by its strength.
            on_step: hook of the decoder and the upsamplers, called after every step.

        Raises:
            ConfigError: there are settings for an upsampler that the stack does not have.
            InputError: there are negative captions, but no part that reads captions is guided.
            ShapeError: start or negative does not match the captions.

        Source: Ramesh et al. 2022, section 2: prior, decoder, upsamplers.
        """
        self.check_sampling(sampling)
        decoder_captions = self.captions(captions, sampling, negative)
        embedding = self.embed_captions(list(captions), sampling, generator, negative)
        return self.decode(embedding, sampling, generator, decoder_captions, start=start, on_step=on_step)

    def small_steps(self, sampling: SamplingConfig) -> int:
        return sampling.decoder.num_steps

    @torch.no_grad()
    def sample_small(
        self,
        captions: Sequence[str],
        sampling: SamplingConfig,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None = None,
        known: Tensor | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        given = self.captions(captions, sampling, negative)
        embedding = self.embed_captions(list(captions), sampling, generator, negative)
        with autocast(sampling.precision, self.device):
            return self.decoder.sample(
                embedding, sampling.decoder, given, known=known, generator=generator, on_step=on_step
            )

    def embed_captions(
        self,
        captions: list[str],
        sampling: SamplingConfig,
        generator: torch.Generator,
        negative: Sequence[str] | None = None,
    ) -> Tensor:
        """Image embeddings [B, E] for captions, from the source that the settings name; by default sampled from the prior."""
        if sampling.image_embedding == "text_embedding":
            return self._text_as_image_embedding(captions)
        if sampling.image_embedding == "none":
            return self.decoder.null_image_embedding(len(captions))
        negative_features = None if negative is None else self._features(negative)
        return self.prior.sample(
            *self._features(captions), sampling.prior, negative=negative_features, generator=generator
        )

    @torch.no_grad()
    def sample_embeddings(
        self, captions: Sequence[str], sampling: SamplingConfig, generator: torch.Generator
    ) -> Tensor | None:
        """Image embeddings [B, E] that the prior samples for captions; None if the settings take them from elsewhere."""
        if sampling.image_embedding != "prior":
            return None
        return self.embed_captions(list(captions), sampling, generator)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
        """Sample an image [B, 3, S, S] for the embedding of each image [B, 3, H, W] in [-1, 1], from fresh noise."""
        self.check_sampling(sampling)
        return self.decode(self.embed_images(images), sampling, generator)

    def _features(self, captions: Sequence[str]) -> CaptionFeatures:
        return caption_features(self.clip, self.clip.tokenize(list(captions)).to(self.device))

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images [B, 3, H, W] in [-1, 1] as image embeddings [B, E], as the decoder reads them."""
        return self.clip.embed_images(self.clip.resize(images.to(self.device)))

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """CLIP's unit-norm text embeddings [B, E]."""
        return self.clip.encode_text(self.clip.tokenize(list(captions)).to(self.device)).text_embedding

    def _text_as_image_embedding(self, captions: Sequence[str]) -> Tensor:
        """CLIP's text embeddings [B, E] in the scale of its image embeddings, which is not unit norm in every stack."""
        if self.clip.image_embeddings == "unit":
            return self.embed_text(captions)
        return self._features(captions).text_embedding

    def read_captions(self, captions: Sequence[str]) -> Text | None:
        """Encode captions as the decoder reads them; None if it reads no captions."""
        tokens = self.clip.tokenize(list(captions)).to(self.device)  # [B, L]
        return read_captions(self.decoder.config.text, self.clip, tokens)

    def captions(
        self, captions: Sequence[str], sampling: SamplingConfig, negative: Sequence[str] | None = None
    ) -> Captions:
        """Prepare everything that the decoder needs of captions: conditioning, negative captions and CLIP guidance.

        Raises:
            InputError: there are negative captions, but no part that reads captions is guided.
            ShapeError: the number of negative captions differs from that of the captions.
        """
        caption_similarity = None
        if sampling.decoder.clip_guidance_scale:
            caption_similarity = similarity_by_clip(self.clip, self.embed_text(captions))
        if negative is None:
            return Captions(self.read_captions(captions), None, caption_similarity)
        scales = [sampling.prior.guidance_scale] if sampling.image_embedding == "prior" else []
        if self.decoder.text is not None:
            text_scale = sampling.decoder.text_guidance_scale
            scales += [sampling.decoder.guidance_scale, 1.0 if text_scale is None else text_scale]
        check_negative(negative, len(captions), scales, "prior.guidance_scale")
        return Captions(self.read_captions(captions), self.read_captions(negative), caption_similarity)

    def decode(
        self,
        image_embedding: Tensor,
        sampling: SamplingConfig,
        generator: torch.Generator,
        captions: Captions = NO_CAPTIONS,
        *,
        start: Tensor | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample images [B, 3, S, S] for image embeddings [B, E], and for captions if the decoder reads them.

        Args:
            start: [B, 3, S, S], images to start from.
            on_step: hook of the decoder and the upsamplers, called after every step.
        """
        if start is not None:
            start = self.small_start(start, len(image_embedding))
        with autocast(sampling.precision, self.device):
            low_res = self.decoder.sample(
                image_embedding, sampling.decoder, captions, start=start, generator=generator, on_step=on_step
            )
        return self.upsample(low_res, sampling, generator, on_step=[on_step] * len(self.upsamplers))


def _check_clip(clip: Clip, models: dict[str, nn.Module]) -> None:
    for name, model in models.items():
        if not all(module.knows(clip) for module in model.modules() if isinstance(module, EmptyCaption)):
            raise CheckpointError(
                f"{name}: was trained with a CLIP other than this one, which encodes the empty caption differently, so its "
                f"samples would not match captions. Take the CLIP and the {name} from the same stack."
            )


SYSTEM = SystemSpec(
    name="unclip",
    parts=PARTS,
    sampling=SamplingConfig,
    load=Stack.load,
    shortcuts={
        "steps": "decoder.num_steps",
        "guidance_scale": "decoder.guidance_scale",
        "sampler": "decoder.sampler",
        "eta": "decoder.eta",
        "strength": "decoder.strength",
    },
    inputs=("negative", "start"),
    reconstructs=True,
)
