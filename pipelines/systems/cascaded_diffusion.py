"""The pipeline of cascaded diffusion: a denoiser and upsamplers that all read the class, trained independently."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.image_stacks import ClassStackConfig, image_stack, with_classes, with_model_size, with_resolutions
from pipelines.pipeline import Pipeline
from unclip.systems.cascaded_diffusion import MODEL_SIZES
from unclip.systems.denoiser import DENOISER


@dataclasses.dataclass(frozen=True)
class CascadedDiffusionConfig(ClassStackConfig):
    """All settings of a run; the section `upsamplers.256` configures the stage `upsampler-256`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_no_classifier()


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, and what the parts share.

    Raises:
        ConfigError: inconsistent resolutions, or classes of one part; the message names the setting.
    """
    resolved = with_resolutions(with_model_size(values, MODEL_SIZES))
    upsamplers = resolved.get("upsamplers")
    names = upsamplers if isinstance(upsamplers, Mapping) else ()
    return with_classes(resolved, ("denoiser",), *(("upsamplers", name) for name in names))


PIPELINE = Pipeline(CascadedDiffusionConfig, image_stack(DENOISER), resolve, MODEL_SIZES)
