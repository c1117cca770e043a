"""Sampling settings of unCLIP: one section for each part, whose class is defined beside the part's network."""

import dataclasses

from unclip.models.decoder import DecoderSampling
from unclip.models.prior import PriorSampling
from unclip.models.upsampler import UpsamplerSampling
from unclip.systems.upsampler import UpsampledSampling

__all__ = ["DecoderSampling", "PriorSampling", "SamplingConfig", "UpsamplerSampling"]


@dataclasses.dataclass(frozen=True)
class SamplingConfig(UpsampledSampling):
    prior: PriorSampling = PriorSampling()
    """Settings of the prior."""
    decoder: DecoderSampling = DecoderSampling()
    """Settings of the decoder."""
