"""The pipeline of DDPM and Improved DDPM: an unconditional denoiser, and upsamplers if wished."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.image_stacks import ImageStackConfig, image_stack, with_model_size, with_resolutions
from pipelines.pipeline import Pipeline, Variant
from unclip.config import require
from unclip.systems.ddpm import MODEL_SIZES
from unclip.systems.denoiser import DENOISER


@dataclasses.dataclass(frozen=True)
class DdpmConfig(ImageStackConfig):
    """All settings of a run; the section `upsamplers.256` configures the stage `upsampler-256`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        source = self.denoiser.classes.source
        require(source == "none", "denoiser.classes.source", source, "none: captions do not count in this system")
        self.require_no_classifier()


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, and the resolutions that depend on each other.

    Raises:
        ConfigError: inconsistent resolutions; the message names the setting.
    """
    return with_resolutions(with_model_size(values, MODEL_SIZES))


def _is_improved(config: DdpmConfig) -> bool:
    diffusion = config.denoiser.model.diffusion
    return diffusion.schedule == "cosine" and diffusion.variance == "learned_range"


_LINEAR = "denoiser.model.diffusion.schedule=linear"
_FIXED = "denoiser.model.diffusion.variance=fixed_large"
_BOUND = ("denoiser.model.diffusion.vlb_only=true", "denoiser.model.diffusion.timestep_sampling=loss_aware")
VARIANTS = {
    "original": Variant("ddpm, linear schedule, fixed variance", (_LINEAR, _FIXED), _is_improved),
    "linear": Variant("ddpm, linear schedule", (_LINEAR,), _is_improved, is_default=False),
    "fixed_variance": Variant("ddpm, fixed variance", (_FIXED,), _is_improved, is_default=False),
    "bound": Variant("ddpm, variational bound as loss", _BOUND, _is_improved, is_default=False),
}
"""Schedule and variance of Ho et al. 2020, section 4, together and one by one, beside those of Nichol & Dhariwal 2021; and
their L_vlb with loss-aware timesteps, section 3.3."""

PIPELINE = Pipeline(DdpmConfig, image_stack(DENOISER), resolve, MODEL_SIZES, VARIANTS)
