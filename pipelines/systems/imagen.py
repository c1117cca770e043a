"""The Imagen pipeline: a frozen text encoder and the table of its states, a base network and upsamplers that read them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.dag import Binder
from pipelines.dataset import dataset, finish
from pipelines.pipeline import Pipeline
from pipelines.upsampled import UpsampledConfig, UpsampledEvaluateConfig, UpsampledResources, with_chain
from tasks.stage import OwnResources
from tasks.stages.text_encoder import CLIP, TextEncoderConfig, text_encoder
from tasks.stages.text_states import TextStatesConfig, text_states
from tasks.stages.train import train
from unclip import config
from unclip.config import require, to_dict
from unclip.systems.imagen.generator import IMAGEN, ImagenStageConfig
from unclip.systems.imagen.sizes import MODEL_SIZES
from unclip.systems.imagen.stack import ImagenStackSampling
from unclip.systems.imagen.super_resolution import TEXT_UPSAMPLER, TextUpsamplerStageConfig
from unclip.systems.text_encoder import TextInput
from unclip.systems.upsampler import check_names, merge_over


@dataclasses.dataclass(frozen=True)
class ImagenResources(UpsampledResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    text_states: OwnResources | None = None
    """Resources for encoding the captions."""
    imagen: OwnResources | None = None
    """Resources for training the base network."""


@dataclasses.dataclass(frozen=True)
class ImagenEvaluateConfig(UpsampledEvaluateConfig):
    sampling: ImagenStackSampling = ImagenStackSampling()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class ImagenPipelineConfig(UpsampledConfig):
    """All settings of a run; the section `upsamplers.256` configures the stage `upsampler-256`."""

    resources: ImagenResources = ImagenResources()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    text_states: TextStatesConfig = TextStatesConfig()
    imagen: ImagenStageConfig = ImagenStageConfig()
    upsamplers: dict[str, TextUpsamplerStageConfig] = dataclasses.field(default_factory=dict)  # type: ignore[assignment]
    """One section per upsampler, by output resolution in ascending order. Each upsampler takes the images of the previous
    one; the first takes the small images. "none" instead of a section removes the upsampler."""
    evaluate: ImagenEvaluateConfig = ImagenEvaluateConfig()

    def __post_init__(self) -> None:
        check_names(self.upsamplers, self.evaluate.sampling, self.resources.upsamplers)
        texts = {f"upsamplers.{name}": each.text for name, each in self.upsamplers.items()}
        expected = "nothing here, but the section text_encoder of the run"
        for name, text in texts.items():
            require(text == self.imagen.text, f"{name}.text", text, expected)


def imagen(bind: Binder) -> Any:
    """Compose the DAG."""
    data = dataset(bind)
    encoder = data.clip if bind.config.text_encoder.name == CLIP else bind(text_encoder)
    states = bind(text_states, data.snapshot, encoder)
    base = bind(train(IMAGEN), data.snapshot, states)
    upsamplers = bind.each(train(TEXT_UPSAMPLER), data.snapshot, states)
    return finish(bind, data, encoder, base, *upsamplers)


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, the sizes of the text's states, and the resolutions that depend on each other.

    Raises:
        CheckpointError: the folder of the text encoder has no readable configuration.
        ConfigError: inconsistent resolutions; the message names the setting.
    """
    resolved = _with_text(_with_model_size(values))
    section = resolved.get("imagen", {})
    if not isinstance(section, Mapping):
        return resolved  # `config.load` reports the error
    size = config.load(ImagenStageConfig, section, "imagen").model.unet.image_size
    return with_chain(resolved, size, "imagen", ImagenStackSampling())


def _with_model_size(values: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `values` over those of the named model size; without one, over a single upsampler to 256 pixels."""
    name = values.get("model_size")
    if name in (None, "none"):
        return merge_over({"upsamplers": {"256": {}}}, values)
    return merge_over(MODEL_SIZES[name].sections(), values)


def _with_text(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give the networks the sizes of the text encoder's states."""
    given, upsamplers = values.get("text_encoder", {}), values.get("upsamplers", {})
    if not isinstance(given, Mapping) or not isinstance(upsamplers, Mapping):
        return dict(values)  # `config.load` reports the error
    encoder = config.load(TextEncoderConfig, given, "text_encoder")
    if encoder.name == CLIP:
        return dict(values)
    text = {"text": to_dict(TextInput(encoder.states_width(), encoder.max_length))}
    filled = {name: text for name, section in upsamplers.items() if isinstance(section, Mapping)}
    return config.merge({"imagen": text, "upsamplers": filled}, values)


PIPELINE = Pipeline(ImagenPipelineConfig, imagen, resolve, MODEL_SIZES)
