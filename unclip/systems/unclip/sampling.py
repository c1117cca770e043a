"""Sampling settings of unCLIP, a section for each part."""

import dataclasses

from unclip.config import require
from unclip.diffusion.samplers import SamplerName
from unclip.diffusion.sampling import DiffusionSampling
from unclip.training.precision import Precision


@dataclasses.dataclass(frozen=True)
class PriorSampling(DiffusionSampling):
    sampler: SamplerName = "ddpm"
    """Sampler of the diffusion prior."""
    num_steps: int = 64
    """Sampling steps of the diffusion prior."""
    temperature: float = 1.0
    """Divides the autoregressive prior's logits; 0 takes the likeliest values."""
    num_candidates: int = 2
    """Image embeddings sampled for a caption, of which the best is kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        require(self.num_candidates >= 1, "num_candidates", self.num_candidates, "at least 1")


@dataclasses.dataclass(frozen=True)
class DecoderSampling(DiffusionSampling):
    guidance_scale: float = 2.0
    """Scale of classifier-free guidance; 1 = off."""
    text_guidance_scale: float | None = None
    """Guidance by the caption alone, where the decoder reads it; None guides by image embedding and caption together."""
    inversion_iterations: int = 1
    """Iterations of each step of an inversion: the more, the closer is the image that is sampled from what it finds, and
    the less freely it follows a text diff."""

    def __post_init__(self) -> None:
        super().__post_init__()
        text_scale, iterations = self.text_guidance_scale, self.inversion_iterations
        require(text_scale is None or text_scale >= 0, "text_guidance_scale", text_scale, "at least 0")
        require(iterations >= 1, "inversion_iterations", iterations, "at least 1")


@dataclasses.dataclass(frozen=True)
class UpsamplerSampling(DiffusionSampling):
    num_steps: int = 15
    """Sampling steps."""
    noise_level: int = 0
    """Timestep that the low-resolution image is noised to first; for upsamplers trained with `max_noise_level`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.noise_level >= 0, "noise_level", self.noise_level, "at least 0")


FIRST_UPSAMPLER = UpsamplerSampling(num_steps=27)
"""Default of the first upsampler; the others take 15 steps. Source: Ramesh et al. 2022, Table 3."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    prior: PriorSampling = PriorSampling()
    """The prior."""
    decoder: DecoderSampling = DecoderSampling()
    """The decoder."""
    upsamplers: dict[str, UpsamplerSampling] = dataclasses.field(default_factory=dict)
    """Each upsampler, by the resolution of its images."""
    batch_size: int = 64
    """Captions that are sampled together."""
    precision: Precision = "auto"
    """Arithmetic of the decoder and the upsamplers."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")

    def upsampler(self, resolution: int, is_first: bool) -> UpsamplerSampling:
        """Settings of the upsampler to this resolution."""
        default = FIRST_UPSAMPLER if is_first else UpsamplerSampling()
        return self.upsamplers.get(str(resolution), default)
