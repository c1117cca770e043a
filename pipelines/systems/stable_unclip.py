"""The stable unCLIP pipeline: unCLIP's prior, an autoencoder, and a generator of its latents from image embeddings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.dag import Binder
from pipelines.dataset import dataset, finish
from pipelines.latents import LatentConfig, LatentResources, encoded, with_latent_shape
from pipelines.pipeline import Pipeline
from pipelines.upsampled import UpsampledEvaluateConfig
from tasks.stage import OwnResources
from tasks.stages.train import train
from unclip.config import require
from unclip.systems.latent_sizes import STABLE_UNCLIP_SIZES
from unclip.systems.stable_unclip import STABLE_UNCLIP, StableUnclipSampling, StableUnclipStageConfig
from unclip.systems.unclip.prior import PRIOR, PriorStageConfig
from unclip.systems.upsampler import UPSAMPLER, merge_over


@dataclasses.dataclass(frozen=True)
class StableUnclipResources(LatentResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    prior: OwnResources | None = None
    """Resources for training the prior."""
    stable_unclip: OwnResources | None = None
    """Resources for training the generator."""


@dataclasses.dataclass(frozen=True)
class StableUnclipEvaluateConfig(UpsampledEvaluateConfig):
    sampling: StableUnclipSampling = StableUnclipSampling()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class StableUnclipPipelineConfig(LatentConfig):
    """All settings of a run; the section `upsamplers.512` configures the stage `upsampler-512`."""

    resources: StableUnclipResources = StableUnclipResources()
    prior: PriorStageConfig = PriorStageConfig()
    stable_unclip: StableUnclipStageConfig = StableUnclipStageConfig()
    evaluate: StableUnclipEvaluateConfig = StableUnclipEvaluateConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_latents("stable_unclip", self.stable_unclip)
        level, most = self.evaluate.sampling.stable_unclip.noise_level, self.stable_unclip.model.max_noise_level
        expected = f"at most {most}, the max_noise_level of its training"
        require(level <= most, "evaluate.sampling.stable_unclip.noise_level", level, expected)


def stable_unclip(bind: Binder) -> Any:
    """Compose the DAG."""
    data = dataset(bind)
    prior = bind(train(PRIOR), data.snapshot, data.clip)
    autoencoder, latents = encoded(bind, data)
    generator = bind(train(STABLE_UNCLIP), data.snapshot, data.clip, autoencoder, latents)
    upsamplers = bind.each(train(UPSAMPLER), data.snapshot)
    return finish(bind, data, data.clip, prior, autoencoder, generator, *upsamplers)


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, the shape of the latents, and the resolutions that depend on each other.

    Raises:
        ConfigError: inconsistent resolutions; the message names the setting.
    """
    name = values.get("model_size")
    if name in (None, "none"):
        sections = {"stable_unclip": {"model": {"reads_image_embedding": True}}}
        return with_latent_shape(merge_over(sections, values), "stable_unclip")
    prior = values.get("prior")
    kind = prior.get("kind", "diffusion") if isinstance(prior, Mapping) else "diffusion"
    return with_latent_shape(merge_over(STABLE_UNCLIP_SIZES[name].sections(kind), values), "stable_unclip")


PIPELINE = Pipeline(StableUnclipPipelineConfig, stable_unclip, resolve, STABLE_UNCLIP_SIZES)
