"""Sampling settings of unCLIP: one section for each part, whose class is defined beside the part's network."""

import dataclasses
from typing import Literal

from unclip.config import added
from unclip.models.decoder import DecoderSampling
from unclip.models.prior import PriorSampling
from unclip.models.upsampler import UpsamplerSampling
from unclip.systems.upsampler import UpsampledSampling

__all__ = ["DecoderSampling", "PriorSampling", "SamplingConfig", "UpsamplerSampling"]

ImageEmbeddingSource = Literal["prior", "text_embedding", "none"]
"""Source of the decoder's image embedding: the prior, CLIP's text embedding of the caption in its place, or nothing, that is
the embedding that training puts in the place of a dropped one."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig(UpsampledSampling):
    prior: PriorSampling = PriorSampling()
    """Settings of the prior."""
    decoder: DecoderSampling = DecoderSampling()
    """Settings of the decoder."""
    image_embedding: ImageEmbeddingSource = added("prior")
    """Source of the decoder's image embedding. Without the prior, its settings have no effect. Source: Ramesh et al. 2022,
    section 5.1 and figure 8."""
