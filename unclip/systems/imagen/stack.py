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
from unclip.systems.captions import check_negative
from unclip.systems.imagen.generator import IMAGEN
from unclip.systems.imagen.super_resolution import TEXT_UPSAMPLER
from unclip.systems.system import StackFiles, SystemSpec, load_model, sampling_of
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
        self._encoded: tuple[tuple[str, ...], torch.device, TextStates] | None = None

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

    @property
    def device(self) -> torch.device:
        return next(self.imagen.parameters()).device

    def small_steps(self, sampling: ImagenStackSampling) -> int:
        return sampling.imagen.num_steps

    def upsampler_conditions(self, captions: Sequence[str]) -> Mapping[str, Any]:
        return {"text": self._encode(captions)}

    def _encode(self, captions: Sequence[str]) -> TextStates:
        """States of captions. The last ones are remembered: the base network and the upsamplers read the same, and a large T5
        takes longer than a sampling step."""
        key, found = (tuple(captions), self.device), self._encoded
        if found is None or found[:2] != key:
            found = self._encoded = (*key, self.encoder.encode(captions))
        return found[2]

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
        if negative is not None:
            check_negative(negative, captions, [sampling.imagen.guidance_scale], "imagen.guidance_scale")
        text = self._encode(captions)
        away = None if negative is None else self.encoder.encode(negative)
        with autocast(sampling.precision, self.device):
            return self.imagen.sample(
                text, sampling.imagen, negative=away, known=known, start=start, generator=generator, on_step=on_step
            )


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
