"""The pipeline of cascaded diffusion: a denoiser and upsamplers that all read the class, trained independently."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.dag import Binder
from pipelines.dataset import dataset, finish
from pipelines.pipeline import Pipeline
from pipelines.systems.guided_diffusion import ImageStackConfig, with_classes, with_resolutions
from tasks.stages.train import train
from unclip.config import require
from unclip.systems.cascaded_diffusion import MODEL_SIZES
from unclip.systems.classes import ClassesConfig
from unclip.systems.denoiser import DENOISER
from unclip.systems.upsampler import UPSAMPLER, merge_over


@dataclasses.dataclass(frozen=True)
class CascadedDiffusionConfig(ImageStackConfig):
    """All settings of a run; the section `upsamplers.256` configures the stage `upsampler-256`."""

    classes: ClassesConfig = ClassesConfig("captions")
    """Classes of the captions, for all parts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.classes.source != "none", "classes.source", "none", "captions, scenes or names")
        scale = self.evaluate.sampling.denoiser.classifier_scale
        require(scale == 0, "evaluate.sampling.denoiser.classifier_scale", scale, "0: this system has no classifier")

    @property
    def upsampler_classes(self) -> ClassesConfig:
        return self.classes


def cascaded_diffusion(bind: Binder) -> Any:
    """Compose the DAG."""
    data = dataset(bind)
    denoiser = bind(train(DENOISER), data.snapshot)
    upsamplers = bind.each(train(UPSAMPLER), data.snapshot)
    return finish(bind, data, denoiser, *upsamplers)


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, and what the parts share.

    Raises:
        ConfigError: inconsistent resolutions, or classes of one part; the message names the setting.
    """
    name = values.get("model_size")
    sections = {} if name in (None, "none") else MODEL_SIZES[name]
    resolved = with_resolutions(merge_over(sections, values))
    upsamplers = resolved.get("upsamplers")
    names = upsamplers if isinstance(upsamplers, Mapping) else ()
    return with_classes(resolved, ("denoiser",), *(("upsamplers", name) for name in names))


PIPELINE = Pipeline(CascadedDiffusionConfig, cascaded_diffusion, resolve, MODEL_SIZES)
