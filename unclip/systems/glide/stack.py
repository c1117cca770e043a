"""The GLIDE stack, from files to images.

Letters: B batch, s resolution of the generator's images, S resolution of the last upsampler's.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from unclip.diffusion import guidance
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.errors import CheckpointError
from unclip.models.clip import Clip
from unclip.models.glide import Glide
from unclip.models.noised_clip import NoisedClip
from unclip.models.small_images import Captions, ImageSampling, similarity_by_clip
from unclip.models.upsampler import Upsampler
from unclip.systems.captions import check_negative
from unclip.systems.glide.generator import GLIDE
from unclip.systems.glide.noised_clip import NOISED_CLIP
from unclip.systems.system import StackFiles, SystemSpec, load_model, sampling_of
from unclip.systems.upsampler import UPSAMPLER, UpsampledSampling, UpsampledSystem
from unclip.training.precision import autocast


@dataclasses.dataclass(frozen=True)
class GlideSampling(UpsampledSampling):
    glide: ImageSampling = ImageSampling(guidance_scale=3.0)
    """Settings of the generator."""


class GlideStack(UpsampledSystem):
    """The generator, any number of upsamplers, each for the images of the one before, and CLIP for its tokenizer and for CLIP
    guidance: captions to images."""

    def __init__(
        self, clip: Clip, glide: Glide, upsamplers: Sequence[Upsampler] = (), noised_clip: NoisedClip | None = None
    ) -> None:
        """Raises:
        CheckpointError: the generator was trained with another tokenizer, the noised CLIP for another generator or CLIP, or an
            upsampler for a resolution other than it gets here.
        """
        super().__init__(glide.config.unet.image_size, "glide", upsamplers)
        _check_tokenizer(clip, glide)
        if noised_clip is not None:
            _check_noised_clip(clip, glide, noised_clip)
        self.clip, self.glide, self.noised_clip = clip, glide, noised_clip
        self.sampling = GlideSampling()

    @classmethod
    def load(cls, files: StackFiles) -> "GlideStack":
        """Load CLIP and the parts.

        Raises:
            CheckpointError: files are missing or damaged, or do not fit each other.
        """
        if files.clip is None or "glide" not in files.models:
            raise CheckpointError(f"stack: got {', '.join(files.models)}, expected a CLIP and a part glide.")
        remaining = dict(files.models)
        glide = load_model(remaining.pop("glide"), (GLIDE,))
        noised_clip = None
        if folder := remaining.pop("noised_clip", None):
            noised_clip = load_model(folder, (NOISED_CLIP,))
        upsamplers = [load_model(folder, (UPSAMPLER,)) for folder in remaining.values()]
        stack = cls(files.clip.load(), glide, upsamplers, noised_clip)  # type: ignore[arg-type]
        stack.sampling = sampling_of(files, GlideSampling)
        return stack

    def small_steps(self, sampling: GlideSampling) -> int:
        return sampling.glide.num_steps

    def sample_small(
        self,
        captions: Sequence[str],
        sampling: GlideSampling,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None = None,
        start: Tensor | None = None,
        known: Tensor | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample small images [B, 3, s, s]; see `Glide.sample`."""
        given = self._read_captions(captions, sampling, negative)
        with autocast(sampling.precision, self.device):
            return self.glide.sample(
                given, sampling.glide, known=known, start=start, generator=generator, on_step=on_step
            )

    def _read_captions(
        self, captions: Sequence[str], sampling: GlideSampling, negative: Sequence[str] | None
    ) -> Captions:
        """Prepare everything that the generator needs of captions: tokens, negative captions and CLIP guidance."""
        tokens = self._tokenize(captions)
        given = Captions(tokens)
        if negative is not None:
            check_negative(negative, captions, [sampling.glide.guidance_scale], "glide.guidance_scale")
            given = given._replace(negative=self._tokenize(negative))
        if not sampling.glide.clip_guidance_scale:
            return given
        text_embedding = self.clip.encode_text(tokens).text_embedding  # [B, E]
        if self.noised_clip is None:
            return given._replace(caption_similarity=similarity_by_clip(self.clip, text_embedding))
        similarity = guidance.clip_similarity(self.noised_clip.embed, text_embedding)
        return given._replace(noised_similarity=similarity)

    def _tokenize(self, captions: Sequence[str]) -> Tensor:
        return self.clip.tokenize(list(captions)).to(self.device)  # [B, L]


def _check_tokenizer(clip: Clip, glide: Glide) -> None:
    shape = glide.text_shape
    is_same = (shape.length, shape.vocab_size) == (clip.text_length, clip.vocab_size)
    if not is_same or not glide.text.knows(clip):
        raise CheckpointError(
            f"glide: reads {shape.length} tokens out of {shape.vocab_size:,}, but this CLIP's tokenizer is another, with "
            f"{clip.text_length} out of {clip.vocab_size:,}. Take the CLIP and the generator from the same stack."
        )


def _check_noised_clip(clip: Clip, glide: Glide, noised_clip: NoisedClip) -> None:
    config, size = noised_clip.config, glide.config.unet.image_size
    pairs = {
        "image_size": (config.image_size, size),
        "embedding_dim": (noised_clip.embedding_dim, clip.embedding_dim),
        **{name: (value, glide.config.diffusion.noising[name]) for name, value in config.diffusion.noising.items()},
    }
    for name, (got, expected) in pairs.items():
        if got != expected:
            raise CheckpointError(
                f"noised_clip: got {name} {got!r}, expected {expected!r}. Take it and the generator from the same stack."
            )


SYSTEM = SystemSpec(
    name="glide",
    parts=(GLIDE, UPSAMPLER, NOISED_CLIP),
    sampling=GlideSampling,
    load=GlideStack.load,
    shortcuts={
        "steps": "glide.num_steps",
        "guidance_scale": "glide.guidance_scale",
        "clip_guidance_scale": "glide.clip_guidance_scale",
        "sampler": "glide.sampler",
        "eta": "glide.eta",
        "strength": "glide.strength",
    },
    inputs=("negative", "start"),
)
