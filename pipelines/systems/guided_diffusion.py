"""The pipeline of guided diffusion: a class-conditional denoiser, its classifier and upsamplers, trained independently."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.image_stacks import (
    ClassStackConfig,
    ImageStackResources,
    image_stack,
    with_classes,
    with_model_size,
    with_resolutions,
)
from pipelines.pipeline import Pipeline, Variant
from tasks.stage import OwnResources
from unclip import config
from unclip.config import require
from unclip.systems.classifier import CLASSIFIER, ClassifierStageConfig
from unclip.systems.denoiser import DENOISER, DenoiserStageConfig
from unclip.systems.guided_diffusion import MODEL_SIZES


@dataclasses.dataclass(frozen=True)
class GuidedDiffusionResources(ImageStackResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    classifier: OwnResources | None = None
    """Resources for training the classifier."""


@dataclasses.dataclass(frozen=True)
class GuidedDiffusionConfig(ClassStackConfig):
    """All settings of a run; the section `upsamplers.256` configures the stage `upsampler-256`."""

    resources: GuidedDiffusionResources = GuidedDiffusionResources()
    classifier: ClassifierStageConfig = ClassifierStageConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = self.denoiser.model.diffusion.noising
        for name, given in self.classifier.model.diffusion.noising.items():
            expected = f"{wanted[name]!r}, as in denoiser.model.diffusion, since the classifier guides the denoiser"
            require(given == wanted[name], f"classifier.model.diffusion.{name}", given, expected)


def _with_process(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give the classifier the noising process of the denoiser."""
    sections = [values.get(name, {}) for name in ("denoiser", "classifier")]
    if not all(isinstance(section, Mapping) for section in sections):
        return dict(values)  # `config.load` reports the error
    denoiser = config.load(DenoiserStageConfig, sections[0], "denoiser").model.diffusion
    process = denoiser.noising
    if denoiser.zero_terminal_snr:
        process["prediction_type"] = denoiser.prediction_type  # not eps, which such a process does not allow
    return config.merge({"classifier": {"model": {"diffusion": process}}}, values)


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, and what the parts share.

    Raises:
        ConfigError: inconsistent resolutions, or classes of one part; the message names the setting.
    """
    resolved = with_classes(with_model_size(values, MODEL_SIZES), ("denoiser",), ("classifier",))
    return with_resolutions(_with_process(resolved))


def _has_classifier_guidance(config: GuidedDiffusionConfig) -> bool:
    return config.evaluate.sampling.denoiser.classifier_scale > 0


def _has_both(config: GuidedDiffusionConfig) -> bool:
    return _has_classifier_guidance(config) and config.evaluate.sampling.denoiser.guidance_scale != 1


_CLASSIFIER_OFF = "evaluate.sampling.denoiser.classifier_scale=0"
_GUIDANCE_OFF = "evaluate.sampling.denoiser.guidance_scale=1"
VARIANTS = {
    "without_classifier": Variant(
        "guided_diffusion without its classifier", (_CLASSIFIER_OFF,), _has_classifier_guidance
    ),
    "classifier_alone": Variant(
        "guided_diffusion, classifier guidance alone", (_GUIDANCE_OFF,), _has_both, is_default=False
    ),
    "unguided": Variant(
        "guided_diffusion without guidance", (_GUIDANCE_OFF, _CLASSIFIER_OFF), _has_both, is_default=False
    ),
}
"""Sampling with one kind of guidance, or with none; classifier guidance alone is that of Dhariwal & Nichol 2021."""

PIPELINE = Pipeline(GuidedDiffusionConfig, image_stack(DENOISER, CLASSIFIER), resolve, MODEL_SIZES, VARIANTS)
