"""Settings of the pipelines of systems with upsamplers, and the resolutions that follow from each other."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.dataset import DatasetResources, PipelineConfig, with_image_size
from tasks.stage import OwnResources
from tasks.stages.evaluate import EvaluateConfig
from unclip import config
from unclip.systems.classes import ClassesConfig
from unclip.systems.upsampler import UpsampledSampling, UpsamplerStageConfig, chained, check_sections


@dataclasses.dataclass(frozen=True)
class UpsampledResources(DatasetResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    upsamplers: dict[str, OwnResources] = dataclasses.field(default_factory=dict)
    """Resources for training each upsampler, by its output resolution."""


@dataclasses.dataclass(frozen=True)
class UpsampledEvaluateConfig(EvaluateConfig):
    sampling: UpsampledSampling = UpsampledSampling()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class UpsampledConfig(PipelineConfig):
    """Settings of a run; the section `upsamplers.256` configures the stage `upsampler-256`.

    A system's pipeline extends this class with the section of the part that samples the small images, and of other parts.
    """

    resources: UpsampledResources = UpsampledResources()
    upsamplers: dict[str, UpsamplerStageConfig] = dataclasses.field(default_factory=dict)
    """One section per upsampler, by output resolution in ascending order. Each upsampler takes the images of the previous
    one; the first takes the small images. "none" instead of a section removes the upsampler."""
    evaluate: UpsampledEvaluateConfig = UpsampledEvaluateConfig()

    def __post_init__(self) -> None:
        sampling, resources = self.evaluate.sampling, self.resources.upsamplers
        check_sections(self.upsamplers, sampling, resources, self.upsampler_classes)

    @property
    def upsampler_classes(self) -> ClassesConfig:
        """Classes that upsamplers may read."""
        return ClassesConfig()


def with_chain(
    values: Mapping[str, Any], size: int, source: str, sampling: UpsampledSampling | None = None
) -> dict[str, Any]:
    """Fill in the resolutions that follow from the names of the upsamplers, and their sampling settings.

    An upsampler is named after its output resolution; its input resolution is the output of the previous part. Images are
    stored at the resolution of the last part or larger.

    Args:
        size: resolution of the small images.
        source: name of the part that samples them, as in "the decoder".
        sampling: sampling settings of the system, which give the defaults of each upsampler's; None for those of the class.

    Raises:
        ConfigError: inconsistent resolutions; the message names the setting.
    """
    sections = values.get("upsamplers", {})
    if not isinstance(sections, Mapping):
        return dict(values)  # `config.load` reports the error
    chain = chained(sections, size, source, sampling)
    resolved = with_image_size({**values, "upsamplers": chain.sections}, chain.size, chain.last)
    return config.merge({"evaluate": {"sampling": {"upsamplers": chain.sampling}}}, resolved)
