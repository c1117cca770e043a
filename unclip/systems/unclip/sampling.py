"""Sampling settings of unCLIP: those of each part, which are defined beside its network, in one."""

import dataclasses

from unclip.config import require
from unclip.models.decoder import DecoderSampling
from unclip.models.prior import PriorSampling
from unclip.models.upsampler import UpsamplerSampling
from unclip.training.precision import Precision

__all__ = ["FIRST_UPSAMPLER", "DecoderSampling", "PriorSampling", "SamplingConfig", "UpsamplerSampling"]

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
