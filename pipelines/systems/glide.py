"""The GLIDE pipeline: a generator that reads captions, and upsamplers, trained independently on one dataset."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.dag import Binder
from pipelines.dataset import dataset, finish
from pipelines.pipeline import Pipeline, Variant
from pipelines.upsampled import UpsampledConfig, UpsampledEvaluateConfig, UpsampledResources, with_chain
from tasks.stage import OwnResources
from tasks.stages.train import train
from unclip import config
from unclip.config import require, to_dict
from unclip.systems.glide.generator import GLIDE, GlideStageConfig
from unclip.systems.glide.noised_clip import NOISED_CLIP, NoisedClipStageConfig
from unclip.systems.glide.sizes import MODEL_SIZES
from unclip.systems.glide.stack import GlideSampling
from unclip.systems.upsampler import UPSAMPLER, merge_over


@dataclasses.dataclass(frozen=True)
class GlideResources(UpsampledResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    glide: OwnResources | None = None
    """Resources for training the generator."""
    noised_clip: OwnResources | None = None
    """Resources for training the image encoder for noised images."""


@dataclasses.dataclass(frozen=True)
class GlideEvaluateConfig(UpsampledEvaluateConfig):
    sampling: GlideSampling = GlideSampling()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class GlidePipelineConfig(UpsampledConfig):
    """All settings of a run; the section `upsamplers.256` configures the stage `upsampler-256`."""

    resources: GlideResources = GlideResources()
    glide: GlideStageConfig = GlideStageConfig()
    with_noised_clip: bool = False
    """Also train CLIP's image encoder on noised images, for CLIP guidance. Without it, CLIP guidance uses the frozen CLIP on
    the denoised image. Source: Nichol et al. 2022, section 4.4."""
    noised_clip: NoisedClipStageConfig = NoisedClipStageConfig()
    evaluate: GlideEvaluateConfig = GlideEvaluateConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.with_noised_clip:
            noised_clip, glide = self.noised_clip.model, self.glide.model
            expected = f"{glide.unet.image_size}, the resolution of the generator"
            is_same = noised_clip.image_size == glide.unet.image_size
            require(is_same, "noised_clip.model.image_size", noised_clip.image_size, expected)
            is_same = noised_clip.diffusion == glide.diffusion
            require(is_same, "noised_clip.model.diffusion", noised_clip.diffusion, "that of glide.model; leave it out")


def glide(bind: Binder) -> Any:
    """Compose the DAG."""
    data = dataset(bind)
    parts = [bind(train(GLIDE), data.snapshot, data.clip), *bind.each(train(UPSAMPLER), data.snapshot)]
    if bind.config.with_noised_clip:
        parts.append(bind(train(NOISED_CLIP), data.snapshot))
    return finish(bind, data, data.clip, *parts)


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, and the settings that follow from others.

    Raises:
        ConfigError: inconsistent resolutions; the message names the setting.
    """
    return _with_resolutions(_with_model_size(values))


def _with_model_size(values: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `values` over those of the named model size; without one, over a single upsampler to 256 pixels."""
    name = values.get("model_size")
    if name in (None, "none"):
        return merge_over({"upsamplers": {"256": {}}}, values)
    return merge_over(MODEL_SIZES[name].sections(), values)


def _with_resolutions(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the resolutions of the upsamplers and of the stored images, and the process of the noised images."""
    section = values.get("glide", {})
    if not isinstance(section, Mapping):
        return dict(values)  # `config.load` reports the error
    model = config.load(GlideStageConfig, section, "glide").model
    noised = {"image_size": model.unet.image_size, "diffusion": to_dict(model.diffusion)}
    return config.merge({"noised_clip": {"model": noised}}, with_chain(values, model.unet.image_size, "glide"))


VARIANTS = {
    "clip_guidance": Variant(
        "glide, CLIP guidance",
        (
            "with_noised_clip=true",
            "evaluate.sampling.glide.guidance_scale=1",
            "evaluate.sampling.glide.clip_guidance_scale=100",
        ),
        lambda config: not config.evaluate.sampling.glide.clip_guidance_scale,
        is_default=False,
    ),
    "inpainting": Variant(
        "glide, inpainting network",
        ("glide.model.inpainting=true",),
        lambda config: not config.glide.model.inpainting,
        is_default=False,
    ),
}
"""CLIP guidance in the place of classifier-free guidance, as in Nichol et al. 2022, section 4.4; and the network of section 3.2
that fills in masks, which samples whole images here."""

PIPELINE = Pipeline(GlidePipelineConfig, glide, resolve, MODEL_SIZES, VARIANTS)
