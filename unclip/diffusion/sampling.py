"""Sampling settings of one diffusion process."""

import dataclasses

from unclip.config import require
from unclip.diffusion.samplers import SamplerName


@dataclasses.dataclass(frozen=True)
class DiffusionSampling:
    sampler: SamplerName = "ddim"
    """Sampler."""
    num_steps: int = 50
    """Sampling steps."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance; 1 = off."""

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, "num_steps", self.num_steps, "at least 1")
        require(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "at least 0")
