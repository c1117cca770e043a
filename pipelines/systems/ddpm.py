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


VARIANTS = {
    "original": Variant(
        "ddpm, linear schedule, fixed variance",
        ("denoiser.model.diffusion.schedule=linear", "denoiser.model.diffusion.variance=fixed_large"),
        _is_improved,
    )
}
"""Schedule and variance of Ho et al. 2020, section 4, beside those of Nichol & Dhariwal 2021."""

PIPELINE = Pipeline(DdpmConfig, image_stack(DENOISER), resolve, MODEL_SIZES, VARIANTS)
