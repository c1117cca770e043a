"""Settings and DAG that the pipelines of systems on an autoencoder share."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipelines.dag import Binder
from pipelines.dataset import Dataset
from pipelines.upsampled import UpsampledConfig, UpsampledResources, with_chain
from tasks.stage import OwnResources
from tasks.stages.latents import LatentsConfig, latents
from tasks.stages.train import train
from unclip import config
from unclip.config import require
from unclip.systems.autoencoder import AUTOENCODER, AutoencoderStageConfig
from unclip.systems.latent_diffusion import LatentDiffusionStageConfig


@dataclasses.dataclass(frozen=True)
class LatentResources(UpsampledResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    autoencoder: OwnResources | None = None
    """Resources for training the autoencoder."""
    latents: OwnResources | None = None
    """Resources for encoding images."""


@dataclasses.dataclass(frozen=True)
class LatentConfig(UpsampledConfig):
    """Settings of a run of a system that samples latents."""

    resources: LatentResources = LatentResources()
    autoencoder: AutoencoderStageConfig = AutoencoderStageConfig()
    latents: LatentsConfig = LatentsConfig()

    def require_latents(self, name: str, stage: LatentDiffusionStageConfig) -> None:
        """Check that a generator fits the autoencoder.

        Args:
            name: section of the generator.

        Raises:
            ConfigError: its latents have another shape, or the autoencoder has codes instead of latents.
        """
        model, generator = self.autoencoder.model, stage.model
        expected = "kl: this system samples continuous latents"
        require(not model.has_codes, "autoencoder.model.bottleneck", model.bottleneck, expected)
        expected = f"{model.latent_size}, the size of the autoencoder's latents"
        require(
            generator.unet.image_size == model.latent_size,
            f"{name}.model.unet.image_size",
            generator.unet.image_size,
            expected,
        )
        channels, expected = (
            generator.latent_channels,
            f"{model.latent_channels}, as many as the autoencoder's latents have",
        )
        require(channels == model.latent_channels, f"{name}.model.latent_channels", channels, expected)


class Encoded(NamedTuple):
    """DAG nodes of an autoencoder and of its latents."""

    autoencoder: Any
    latents: Any


def encoded(bind: Binder, data: Dataset) -> Encoded:
    """Add the autoencoder's training, and the stage that encodes the images."""
    autoencoder = bind(train(AUTOENCODER), data.snapshot, data.clip)
    return Encoded(autoencoder, bind(latents, data.snapshot, autoencoder))


def with_latent_shape(values: Mapping[str, Any], *generators: str) -> dict[str, Any]:
    """Fill in the shape of the latents, and the resolutions of upsamplers and of the stored images.

    Args:
        generators: sections of the generators.
    """
    section = values.get("autoencoder", {})
    if not isinstance(section, Mapping):
        return dict(values)  # `config.load` reports the error
    model = config.load(AutoencoderStageConfig, section, "autoencoder").model
    size = model.latent_size
    unet = {"image_size": size, "attention_resolutions": [size, size // 2, size // 4]}
    shape = {"latent_channels": model.latent_channels, "unet": unet}
    filled = {name: {"model": shape} for name in generators}
    return config.merge(filled, with_chain(values, model.image_size, "the autoencoder"))
