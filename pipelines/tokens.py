"""Settings and DAG of the pipelines of systems that sample an image token by token."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.dag import Binder
from pipelines.dataset import DatasetResources, PipelineConfig, dataset, finish, with_image_size
from pipelines.latents import encoded
from pipelines.pipeline import Pipeline, Variant
from tasks.stage import OwnResources
from tasks.stages.latents import LatentsConfig
from tasks.stages.train import train
from unclip import config
from unclip.config import require
from unclip.models.token_transformer import TokenTransformerConfig
from unclip.systems.autoencoder import AutoencoderStageConfig
from unclip.systems.part import Part


@dataclasses.dataclass(frozen=True)
class TokenResources(DatasetResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    autoencoder: OwnResources | None = None
    """Resources for training the autoencoder."""
    latents: OwnResources | None = None
    """Resources for encoding the images."""


@dataclasses.dataclass(frozen=True)
class TokenPipelineConfig(PipelineConfig):
    """Settings of a run; a system's pipeline adds the section of its model."""

    resources: TokenResources = TokenResources()
    autoencoder: AutoencoderStageConfig = AutoencoderStageConfig()
    latents: LatentsConfig = LatentsConfig()

    def check_model(self, name: str, model: TokenTransformerConfig) -> None:
        """Check that a model reads the tokens of the autoencoder.

        Raises:
            ConfigError: it does not.
        """
        autoencoder = self.autoencoder.model
        require(
            autoencoder.has_codes, "autoencoder.model.bottleneck", autoencoder.bottleneck, "vq or gumbel, for tokens"
        )
        for field, value in codes_of(self.autoencoder).items():
            expected = f"{value}, that of the autoencoder; leave it out"
            require(getattr(model, field) == value, f"{name}.model.{field}", getattr(model, field), expected)


def codes_of(section: AutoencoderStageConfig) -> dict[str, int]:
    """Settings of a model that follow from the autoencoder."""
    return {"grid_size": section.model.latent_size, "codebook_size": section.model.codebook_size}


def token_pipeline(
    settings: type[TokenPipelineConfig], part: Part[Any], sizes: Mapping[str, Mapping[str, Any]]
) -> Pipeline:
    """Pipeline of a system: the dataset, the autoencoder, the tokens of all images, and the model of tokens.

    Args:
        settings: class of the configuration.
        part: model of tokens.
        sizes: name -> sections of a run file.
    """

    def compose(bind: Binder) -> Any:
        data = dataset(bind)
        autoencoder, tokens = encoded(bind, data)
        model = bind(train(part), data.snapshot, data.clip, autoencoder, tokens)
        return finish(bind, data, data.clip, autoencoder, model)

    return Pipeline(settings, compose, _resolve(part.name, sizes), sizes, _variants(part.name))


def _resolve(name: str, sizes: Mapping[str, Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Function that fills in the sections of a model size, and the settings that follow from the autoencoder.

    Args:
        name: section of the model of tokens.
        sizes: name -> sections of a run file.
    """

    def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
        size = values.get("model_size")
        given = {"autoencoder": {"model": {"bottleneck": "vq"}}} if size in (None, "none") else sizes[size]
        filled = config.merge(given, values)
        section = filled.get("autoencoder", {})
        if not isinstance(section, Mapping):
            return filled  # `config.load` reports the error
        autoencoder = config.load(AutoencoderStageConfig, section, "autoencoder")
        filled = with_image_size(filled, autoencoder.model.image_size, "the autoencoder")
        return config.merge({name: {"model": codes_of(autoencoder)}}, filled)

    return resolved


def _variants(name: str) -> dict[str, Variant]:
    """Rows of a comparison besides the system's own: without CLIP's choice among candidates."""
    return {
        "one_candidate": Variant(
            f"{name} without CLIP's choice",
            (f"evaluate.sampling.{name}.num_candidates=1",),
            lambda config: getattr(config.evaluate.sampling, name).num_candidates > 1,
        )
    }
