"""Settings and DAG of the pipelines of systems whose small images come from a denoiser without text."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.dag import Binder
from pipelines.dataset import dataset, finish
from pipelines.upsampled import UpsampledConfig, UpsampledEvaluateConfig, UpsampledResources, with_chain
from tasks.stage import OwnResources
from tasks.stages.train import train
from unclip import config
from unclip.config import require, to_dict
from unclip.systems.classes import ClassesConfig
from unclip.systems.denoiser import DenoiserStageConfig
from unclip.systems.image_stack import ImageStackSampling
from unclip.systems.part import Part
from unclip.systems.upsampler import UPSAMPLER, merge_over


@dataclasses.dataclass(frozen=True)
class ImageStackResources(UpsampledResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    denoiser: OwnResources | None = None
    """Resources for training the denoiser."""


@dataclasses.dataclass(frozen=True)
class ImageStackEvaluateConfig(UpsampledEvaluateConfig):
    sampling: ImageStackSampling = ImageStackSampling()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class ImageStackConfig(UpsampledConfig):
    """Settings of a run."""

    resources: ImageStackResources = ImageStackResources()
    denoiser: DenoiserStageConfig = DenoiserStageConfig()
    evaluate: ImageStackEvaluateConfig = ImageStackEvaluateConfig()

    def require_no_classifier(self) -> None:
        """Raises:
        ConfigError: the sampling settings guide by a classifier.
        """
        scale = self.evaluate.sampling.denoiser.classifier_scale
        require(scale == 0, "evaluate.sampling.denoiser.classifier_scale", scale, "0: this system has no classifier")


@dataclasses.dataclass(frozen=True)
class ClassStackConfig(ImageStackConfig):
    """Settings of a run of a system that reads the class of a caption."""

    classes: ClassesConfig = ClassesConfig("captions")
    """Classes of the captions, for all parts that read them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.classes.source != "none", "classes.source", "none", "captions, scenes or names")

    @property
    def upsampler_classes(self) -> ClassesConfig:
        return self.classes


def image_stack(*parts: Part[Any]) -> Callable[[Binder], Any]:
    """Function that composes the DAG: the dataset, these parts and upsamplers, trained independently."""

    def compose(bind: Binder) -> Any:
        data = dataset(bind)
        trained = [bind(train(part), data.snapshot) for part in parts]
        return finish(bind, data, *trained, *bind.each(train(UPSAMPLER), data.snapshot))

    return compose


def with_model_size(values: Mapping[str, Any], sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merge `values` over the sections of the named model size, if they name one."""
    name = values.get("model_size")
    return merge_over({} if name in (None, "none") else sizes[name], values)


def with_resolutions(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the resolutions that follow from the names of the upsamplers, and their sampling settings."""
    section = values.get("denoiser", {})
    if not isinstance(section, Mapping):
        return dict(values)  # `config.load` reports the error
    size = config.load(DenoiserStageConfig, section, "denoiser").model.unet.image_size
    return with_chain(values, size, "the denoiser")


def with_classes(values: Mapping[str, Any], *paths: tuple[str, ...]) -> dict[str, Any]:
    """Give the classes of a run to the sections at these paths.

    Raises:
        ConfigError: a section has other classes.
    """
    given = values.get("classes", {})
    if not isinstance(given, Mapping):
        return dict(values)  # `config.load` reports the error
    classes = to_dict(config.load(ClassesConfig, {"source": "captions", **given}, "classes"))
    resolved: dict[str, Any] = config.merge(values, {"classes": classes})
    for path in paths:
        section: Any = resolved
        for name in path:
            section = section.get(name, {}) if isinstance(section, Mapping) else None
        if not isinstance(section, Mapping):
            return resolved  # `config.load` reports the error
        expected = "nothing here, but the section classes of the run"
        found = section.get("classes", classes)
        require(found == classes, f"{'.'.join(path)}.classes", found, expected)
        filled: Any = {"classes": classes}
        for name in reversed(path):
            filled = {name: filled}
        resolved = config.merge(resolved, filled)
    return resolved
