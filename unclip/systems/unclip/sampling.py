"""Sampling settings of unCLIP: one section for each part, whose class is defined beside the part's network."""

import dataclasses
from typing import Literal

from unclip.config import added, require
from unclip.models.decoder import DecoderSampling
from unclip.models.prior import PriorSampling
from unclip.models.upsampler import UpsamplerSampling
from unclip.training.precision import Precision

__all__ = ["FIRST_UPSAMPLER", "DecoderSampling", "PriorSampling", "SamplingConfig", "UpsamplerSampling"]

ImageEmbeddingSource = Literal["prior", "text_embedding", "none"]
"""Source of the decoder's image embedding: the prior, CLIP's text embedding of the caption in its place, or nothing, that is
the embedding that training puts in the place of a dropped one."""

FIRST_UPSAMPLER = UpsamplerSampling(num_steps=27)
"""Default of the first upsampler; the others use 15 steps. Source: Ramesh et al. 2022, Table 3."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    prior: PriorSampling = PriorSampling()
    """Settings of the prior."""
    decoder: DecoderSampling = DecoderSampling()
    """Settings of the decoder."""
    upsamplers: dict[str, UpsamplerSampling] = dataclasses.field(default_factory=dict)
    """Settings of each upsampler, by the resolution of its images."""
    batch_size: int = 64
    """Captions sampled together."""
    precision: Precision = "auto"
    """Precision of the decoder and the upsamplers."""
    image_embedding: ImageEmbeddingSource = added("prior")
    """Source of the decoder's image embedding. Without the prior, its settings have no effect. Source: Ramesh et al. 2022,
    section 5.1 and figure 8."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")

    def upsampler(self, resolution: int, is_first: bool) -> UpsamplerSampling:
        """Settings of the upsampler that outputs this resolution."""
        default = FIRST_UPSAMPLER if is_first else UpsamplerSampling()
        return self.upsamplers.get(str(resolution), default)
