"""The pipeline of DDPM and Improved DDPM: an unconditional denoiser, and upsamplers if wished."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.dag import Binder
from pipelines.dataset import dataset, finish
from pipelines.pipeline import Pipeline
from pipelines.systems.guided_diffusion import ImageStackConfig, with_resolutions
from tasks.stages.train import train
from unclip.config import require
from unclip.systems.ddpm import MODEL_SIZES
from unclip.systems.denoiser import DENOISER
from unclip.systems.upsampler import UPSAMPLER, merge_over


@dataclasses.dataclass(frozen=True)
class DdpmConfig(ImageStackConfig):
    """All settings of a run; the section `upsamplers.256` configures the stage `upsampler-256`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        source = self.denoiser.classes.source
        require(source == "none", "denoiser.classes.source", source, "none: captions do not count in this system")
        scale = self.evaluate.sampling.denoiser.classifier_scale
        require(scale == 0, "evaluate.sampling.denoiser.classifier_scale", scale, "0: this system has no classifier")


def ddpm(bind: Binder) -> Any:
    """Compose the DAG."""
    data = dataset(bind)
    denoiser = bind(train(DENOISER), data.snapshot)
    upsamplers = bind.each(train(UPSAMPLER), data.snapshot)
    return finish(bind, data, denoiser, *upsamplers)


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, and the resolutions that depend on each other.

    Raises:
        ConfigError: inconsistent resolutions; the message names the setting.
    """
    name = values.get("model_size")
    sections = {} if name in (None, "none") else MODEL_SIZES[name]
    return with_resolutions(merge_over(sections, values))


PIPELINE = Pipeline(DdpmConfig, ddpm, resolve, MODEL_SIZES)
