"""The pipeline of guided diffusion: a class-conditional denoiser, its classifier and upsamplers, trained independently."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.dag import Binder
from pipelines.dataset import DatasetResources, PipelineConfig, dataset, finish, with_image_size
from pipelines.pipeline import Pipeline, Variant
from tasks.stage import Resources
from tasks.stages.evaluate import EvaluateConfig
from tasks.stages.train import train
from unclip import config
from unclip.config import require, to_dict
from unclip.systems.classes import ClassesConfig
from unclip.systems.classifier import CLASSIFIER, ClassifierStageConfig
from unclip.systems.denoiser import DENOISER, DenoiserStageConfig
from unclip.systems.guided_diffusion import MODEL_SIZES
from unclip.systems.image_stack import NOISING, ImageStackSampling
from unclip.systems.upsampler import UPSAMPLER, UpsamplerStageConfig, chained, check_sections, merge_over


@dataclasses.dataclass(frozen=True)
class ImageStackResources(DatasetResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    denoiser: Resources | None = None
    """Resources for training the denoiser."""
    upsamplers: dict[str, Resources] = dataclasses.field(default_factory=dict)
    """Resources for training each upsampler, by its output resolution."""


@dataclasses.dataclass(frozen=True)
class GuidedDiffusionResources(ImageStackResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    classifier: Resources | None = None
    """Resources for training the classifier."""


@dataclasses.dataclass(frozen=True)
class ImageStackEvaluateConfig(EvaluateConfig):
    sampling: ImageStackSampling = ImageStackSampling()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class ImageStackConfig(PipelineConfig):
    """Settings of a run of a system whose small images come from a denoiser without text."""

    resources: ImageStackResources = ImageStackResources()
    denoiser: DenoiserStageConfig = DenoiserStageConfig()
    upsamplers: dict[str, UpsamplerStageConfig] = dataclasses.field(default_factory=dict)
    """One section per upsampler, by output resolution in ascending order. Each upsampler takes the images of the previous
    one; the first takes those of the denoiser. "none" instead of a section removes the upsampler."""
    evaluate: ImageStackEvaluateConfig = ImageStackEvaluateConfig()

    def __post_init__(self) -> None:
        sampling, resources = self.evaluate.sampling, self.resources.upsamplers
        check_sections(self.upsamplers, sampling, resources, self.upsampler_classes)

    @property
    def upsampler_classes(self) -> ClassesConfig:
        """Classes that upsamplers may read."""
        return ClassesConfig()


@dataclasses.dataclass(frozen=True)
class GuidedDiffusionConfig(ImageStackConfig):
    """All settings of a run; the section `upsamplers.256` configures the stage `upsampler-256`."""

    resources: GuidedDiffusionResources = GuidedDiffusionResources()
    classes: ClassesConfig = ClassesConfig("captions")
    """Classes of the captions, for the denoiser and the classifier."""
    classifier: ClassifierStageConfig = ClassifierStageConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.classes.source != "none", "classes.source", "none", "captions, scenes or names")
        given, wanted = self.classifier.model.diffusion, self.denoiser.model.diffusion
        for name in NOISING:
            expected = (
                f"{getattr(wanted, name)!r}, as in denoiser.model.diffusion, since the classifier guides the denoiser"
            )
            is_same = getattr(given, name) == getattr(wanted, name)
            require(is_same, f"classifier.model.diffusion.{name}", getattr(given, name), expected)

    @property
    def upsampler_classes(self) -> ClassesConfig:
        return self.classes


def guided_diffusion(bind: Binder) -> Any:
    """Compose the DAG."""
    data = dataset(bind)
    denoiser = bind(train(DENOISER), data.snapshot)
    classifier = bind(train(CLASSIFIER), data.snapshot)
    upsamplers = bind.each(train(UPSAMPLER), data.snapshot)
    return finish(bind, data, denoiser, classifier, *upsamplers)


def with_resolutions(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the resolutions that follow from the names of the upsamplers, and their sampling settings."""
    sections, denoiser_section = values.get("upsamplers", {}), values.get("denoiser", {})
    if not (isinstance(sections, Mapping) and isinstance(denoiser_section, Mapping)):
        return dict(values)  # `config.load` reports the error
    denoiser = config.load(DenoiserStageConfig, denoiser_section, "denoiser").model
    chain = chained(sections, denoiser.unet.image_size, "the denoiser")
    resolved = with_image_size({**values, "upsamplers": chain.sections}, chain.size, chain.last)
    return config.merge({"evaluate": {"sampling": {"upsamplers": chain.sampling}}}, resolved)


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


def _with_process(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give the classifier the noising process of the denoiser."""
    sections = [values.get(name, {}) for name in ("denoiser", "classifier")]
    if not all(isinstance(section, Mapping) for section in sections):
        return dict(values)  # `config.load` reports the error
    denoiser = config.load(DenoiserStageConfig, sections[0], "denoiser").model.diffusion
    process = {name: getattr(denoiser, name) for name in NOISING}
    if denoiser.zero_terminal_snr:
        process["prediction_type"] = denoiser.prediction_type  # not eps, which such a process does not allow
    return config.merge({"classifier": {"model": {"diffusion": process}}}, values)


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, and what the parts share.

    Raises:
        ConfigError: inconsistent resolutions, or classes of one part; the message names the setting.
    """
    name = values.get("model_size")
    sections = {} if name in (None, "none") else MODEL_SIZES[name]
    resolved = with_classes(merge_over(sections, values), ("denoiser",), ("classifier",))
    return with_resolutions(_with_process(resolved))


PIPELINE = Pipeline(
    GuidedDiffusionConfig,
    guided_diffusion,
    resolve,
    MODEL_SIZES,
    {
        "without_classifier": Variant(
            "guided_diffusion without its classifier",
            ("evaluate.sampling.denoiser.classifier_scale=0",),
            lambda config: config.evaluate.sampling.denoiser.classifier_scale > 0,
        )
    },
)
