"""The Imagen stack, from files to images.

Letters: B batch, s resolution of the base network's images, S resolution of the last upsampler's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.errors import CheckpointError
from unclip.models.imagen import Imagen, ImagenSampling, TextUpsampler, TextUpsamplerSampling
from unclip.models.text_states import TextEncoder, TextStates
from unclip.systems.imagen.generator import IMAGEN
from unclip.systems.imagen.super_resolution import TEXT_UPSAMPLER
from unclip.systems.system import StackFiles, SystemSpec, check_negative, load_model, sampling_of
from unclip.systems.text_encoder import ENCODER_STAGE, load_encoder
from unclip.systems.upsampler import UpsampledSampling, UpsampledSystem
from unclip.training.precision import autocast


@dataclasses.dataclass(frozen=True)
class ImagenStackSampling(UpsampledSampling):
    imagen: ImagenSampling = ImagenSampling(guidance_scale=3.0)
    """Settings of the base network."""
    upsamplers: dict[str, TextUpsamplerSampling] = dataclasses.field(default_factory=dict)  # type: ignore[assignment]
    """Settings of each upsampler, by the resolution of its images."""

    def upsampler(self, resolution: int, is_first: bool) -> TextUpsamplerSampling:  # type: ignore[override]
        """Settings of the upsampler that outputs this resolution."""
        return self.upsamplers.get(str(resolution), TextUpsamplerSampling())


class ImagenStack(UpsampledSystem):
    """The frozen text encoder, the base network, and any number of upsamplers, each for the images of the one before."""

    def __init__(self, encoder: TextEncoder, imagen: Imagen, upsamplers: Sequence[TextUpsampler] = ()) -> None:
        """Raises:
        CheckpointError: a network was trained with states of another width, or an upsampler for a resolution other than it
            gets here.
        """
        super().__init__(imagen.config.unet.image_size, "imagen", upsamplers)
        named = [("imagen", imagen), *((each.config.name, each) for each in upsamplers)]
        for name, network in named:
            if network.text_width != encoder.text_width:
                raise CheckpointError(
                    f"{name}: reads text states of width {network.text_width}, but this text encoder's have "
                    f"{encoder.text_width}. Take the text encoder and the networks from the same stack."
                )
        self.encoder, self.imagen = encoder, imagen
        self.sampling = ImagenStackSampling()

    @classmethod
    def load(cls, files: StackFiles) -> "ImagenStack":
        """Load the text encoder, a CLIP or a T5, and the parts.

        Raises:
            CheckpointError: files are missing or damaged, or do not fit each other.
        """
        remaining = dict(files.models)
        encoder = load_encoder(remaining.pop(ENCODER_STAGE, None), files.clip)
        if "imagen" not in remaining:
            raise CheckpointError(f"stack: got {', '.join(files.models)}, expected a part imagen.")
        imagen = load_model(remaining.pop("imagen"), (IMAGEN,))
        upsamplers = [load_model(folder, (TEXT_UPSAMPLER,)) for folder in remaining.values()]
        stack = cls(encoder, imagen, upsamplers)  # type: ignore[arg-type]
        stack.sampling = sampling_of(files, ImagenStackSampling)
        return stack

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str],
        sampling: ImagenStackSampling,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None = None,
        start: Tensor | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample one image for each caption, [len(captions), 3, S, S] in [-1, 1].

        Args:
            negative: captions to guide the base network away from.
            start: [B, 3, S, S], images for the base network to start from, shrunk to its resolution and noised by its strength.
            on_step: hook of the base network and the upsamplers, called after every step.

        Raises:
            ConfigError: there are settings for an upsampler that the stack does not have.
            InputError: there are negative captions, but no guidance.
            ShapeError: start or negative does not match the captions.
        """
        self.check_sampling(sampling)
        if start is not None:
            start = self.small_start(start, len(captions))
        text = self.encoder.encode(captions)  # once for all networks
        low_res = self._sample_small(text, sampling, generator, negative=negative, start=start, on_step=on_step)
        hooks = [on_step] * len(self.upsamplers)
        return self.upsample(low_res, sampling, generator, on_step=hooks, conditions={"text": text})

    def small_steps(self, sampling: ImagenStackSampling) -> int:
        return sampling.imagen.num_steps

    def upsampler_conditions(self, captions: Sequence[str]) -> Mapping[str, Any]:
        return {"text": self.encoder.encode(captions)}

    @torch.no_grad()
    def sample_small(
        self,
        captions: Sequence[str],
        sampling: ImagenStackSampling,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None = None,
        start: Tensor | None = None,
        known: Tensor | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample small images [B, 3, s, s]; see `Imagen.sample`."""
        inputs = {"negative": negative, "known": known, "start": start, "on_step": on_step}
        return self._sample_small(self.encoder.encode(captions), sampling, generator, **inputs)

    def _sample_small(
        self,
        text: TextStates,
        sampling: ImagenStackSampling,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None,
        **inputs: Any,
    ) -> Tensor:
        """Sample small images of captions that are encoded already."""
        away = None
        if negative is not None:
            check_negative(negative, len(text.length), [sampling.imagen.guidance_scale], "imagen.guidance_scale")
            away = self.encoder.encode(negative)
        with autocast(sampling.precision, self.device):
            return self.imagen.sample(text, sampling.imagen, negative=away, generator=generator, **inputs)


SYSTEM = SystemSpec(
    name="imagen",
    parts=(IMAGEN, TEXT_UPSAMPLER),
    sampling=ImagenStackSampling,
    load=ImagenStack.load,
    shortcuts={
        "steps": "imagen.num_steps",
        "guidance_scale": "imagen.guidance_scale",
        "sampler": "imagen.sampler",
        "eta": "imagen.eta",
        "strength": "imagen.strength",
    },
    inputs=("negative", "start"),
)
