"""The latent diffusion pipeline: an autoencoder, the latents of the dataset, and a generator of latents from captions."""

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
from unclip.systems.latent_diffusion import LATENT_DIFFUSION, LatentDiffusionSampling, LatentDiffusionStageConfig
from unclip.systems.latent_sizes import LATENT_DIFFUSION_SIZES
from unclip.systems.upsampler import UPSAMPLER, merge_over


@dataclasses.dataclass(frozen=True)
class LatentDiffusionResources(LatentResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    latent_diffusion: OwnResources | None = None
    """Resources for training the generator."""


@dataclasses.dataclass(frozen=True)
class LatentDiffusionEvaluateConfig(UpsampledEvaluateConfig):
    sampling: LatentDiffusionSampling = LatentDiffusionSampling()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class LatentDiffusionPipelineConfig(LatentConfig):
    """All settings of a run; the section `upsamplers.512` configures the stage `upsampler-512`."""

    resources: LatentDiffusionResources = LatentDiffusionResources()
    latent_diffusion: LatentDiffusionStageConfig = LatentDiffusionStageConfig()
    evaluate: LatentDiffusionEvaluateConfig = LatentDiffusionEvaluateConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_latents("latent_diffusion", self.latent_diffusion)
        model = self.latent_diffusion.model
        reads = model.reads_image_embedding
        expected = "false: this system has no prior to sample embeddings"
        require(not reads, "latent_diffusion.model.reads_image_embedding", reads, expected)


def latent_diffusion(bind: Binder) -> Any:
    """Compose the DAG."""
    data = dataset(bind)
    autoencoder, latents = encoded(bind, data)
    generator = bind(train(LATENT_DIFFUSION), data.snapshot, data.clip, autoencoder, latents)
    upsamplers = bind.each(train(UPSAMPLER), data.snapshot)
    return finish(bind, data, data.clip, autoencoder, generator, *upsamplers)


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, the shape of the latents, and the resolutions that depend on each other.

    Raises:
        ConfigError: inconsistent resolutions; the message names the setting.
    """
    name = values.get("model_size")
    sections = {} if name in (None, "none") else LATENT_DIFFUSION_SIZES[name].sections()
    return with_latent_shape(merge_over(sections, values), "latent_diffusion")


PIPELINE = Pipeline(LatentDiffusionPipelineConfig, latent_diffusion, resolve, LATENT_DIFFUSION_SIZES)
