"""The decoder as a part: from CLIP image embeddings, and captions if configured, to small images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unclip.config import load, operational, require, to_dict
from unclip.data import Batch
from unclip.diffusion.sampling import require_preview_sampler
from unclip.models import clip as clip_models
from unclip.models.decoder import Decoder, DecoderConfig, DecoderSampling
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.small_images import Captions, known_region, random_masks
from unclip.models.text import Text, TextShape, read_captions
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.training.batches import load_images, stack_rows
from unclip.training.diffusion_loss import DiffusionLoss, bernoulli, device_of, measure_scores
from unclip.training.memory import Network, example_features, example_flags, example_images, example_indices
from unclip.training.objective import Tensors
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class DecoderStageConfig:
    model: DecoderConfig = DecoderConfig()
    """The network and its diffusion process."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""
    preview: DecoderSampling = operational(DecoderSampling(num_steps=25))
    """Sampling settings of the previews."""

    def __post_init__(self) -> None:
        require_preview_sampler(self.preview)
        scale = self.preview.clip_guidance_scale
        require(scale == 0, "preview.clip_guidance_scale", scale, "0: previews have no captions to guide to")


class DecoderObjective:
    """Diffusion loss of small images, given their CLIP embeddings and, if configured, their captions."""

    def __init__(
        self,
        config: DecoderConfig,
        statistics: EmbeddingStatistics,
        preview: Batch,
        clip: clip_models.Clip | None = None,
        preview_sampling: DecoderSampling = DecoderStageConfig.preview,
    ) -> None:
        """Args: clip: gives the tokenizer and, if `config.text` is "clip", the text encoder; None if text is "none"."""
        embedding_dim = len(statistics.mean)
        statistics.check("decoder")
        clip = None if config.text == "none" else clip
        self.config, self.clip = config, clip
        shape = None if clip is None else TextShape.of(clip)
        self.model: Decoder = Decoder(config, embedding_dim, shape).to(memory_format=torch.channels_last)
        self.model.statistics.load_state_dict(statistics.state_dict())
        if clip is not None and self.model.text is not None:
            self.model.text.set_null(read_captions(config.text, clip, clip.tokenize([""])))  # type: ignore[arg-type]
        self.process = DiffusionLoss(self.model.diffusion)
        self.sample_size = {"pixels": config.unet.image_size**2}
        self.state = self.process.timesteps.state
        self._preview, self._preview_sampling = self.prepare(preview), preview_sampling

    @staticmethod
    def columns(config: DecoderConfig) -> tuple[str, ...]:
        """Columns of the embeddings table that a decoder is trained on, besides the images."""
        return ("image_embedding",) if config.text == "none" else ("image_embedding", "tokens")

    def prepare(self, batch: Batch) -> Tensors:
        tensors = {
            "images": load_images(batch["jpg"], self.config.unet.image_size),  # [B, 3, S, S]
            "image_embedding": stack_rows(batch["image_embedding"]),  # [B, E]
        }
        if self.config.text != "none":
            tensors["tokens"] = stack_rows(batch["tokens"]).long()  # [B, L]
        return tensors

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, config = tensors["images"], self.config
        draw = self.process.draw(x0, generator, network.training)
        image_drop = bernoulli(x0, config.image_drop_prob, generator)
        text = self._text(tensors)
        text_drop = None if text is None else bernoulli(x0, config.text_drop_prob, generator)
        known = known_region(x0, random_masks(len(x0), x0.shape[-1], generator)) if config.inpainting else None

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return network(x_t, t, tensors["image_embedding"], image_drop, text, text_drop, known)  # type: ignore[no-any-return]

        return self.process.mean_loss(predict, x0, draw)

    def learn(self, step_taken: bool) -> None:
        self.process.learn(step_taken)

    def metrics(self, training: bool) -> dict[str, float]:
        return self.process.take(training)

    def preview(self, model: nn.Module) -> Tensor:
        """The original images, then samples from their embeddings."""
        generator = torch.Generator(device_of(model)).manual_seed(0)
        tensors = {name: value.to(device_of(model)) for name, value in self._preview.items()}
        samples = model.sample(  # type: ignore[operator]
            tensors["image_embedding"], self._preview_sampling, Captions(self._text(tensors)), generator=generator
        )
        return torch.cat([self._preview["images"], samples.cpu()])

    def measure(self, model: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensors:
        text = self._text(tensors)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return model(x_t, t, tensors["image_embedding"], text=text)  # type: ignore[no-any-return]

        return measure_scores(self.model.diffusion, predict, tensors["images"], generator)

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "decoder",
            "config": to_dict(self.config),
            "embedding_dim": len(self.model.statistics.mean),
            "text_shape": None if self.model.text_shape is None else to_dict(self.model.text_shape),
        }

    def _text(self, tensors: Tensors) -> Text | None:
        return None if self.clip is None else read_captions(self.config.text, self.clip, tensors["tokens"])


def _build(facts: Mapping[str, Any]) -> Decoder:
    text_shape = load(TextShape, facts["text_shape"]) if facts["text_shape"] else None
    return Decoder(load(DecoderConfig, facts["config"]), facts["embedding_dim"], text_shape)


def _objective(config: DecoderStageConfig, inputs: TrainingInputs) -> DecoderObjective:
    clip = None if config.model.text == "none" else inputs.clip()
    return DecoderObjective(config.model, inputs.statistics(), inputs.preview_rows(), clip, config.preview)


def _reads(config: DecoderStageConfig) -> Mapping[str, tuple[str, ...]]:
    return {"images": ("jpg",), "embeddings": DecoderObjective.columns(config.model)}


def _network(config: DecoderStageConfig, shapes: Shapes) -> Network:
    model, dim, text = config.model, shapes.embedding_dim, shapes.text

    def captions(batch: int) -> Text | None:
        if model.text == "transformer":
            return example_indices(batch, text.length)
        return example_features(batch, text, dim) if model.text == "clip" else None

    def inputs(batch: int) -> tuple[Any, ...]:
        images, embeddings = example_images(batch, model.unet.image_size), torch.zeros(batch, dim)
        text_drop = None if model.text == "none" else example_flags(batch)
        return images, example_indices(batch), embeddings, example_flags(batch), captions(batch), text_drop

    return Network(lambda: Decoder(model, dim, text), inputs)


DECODER = Part(
    name="decoder",
    help="Train the decoder: from CLIP image embeddings, and captions if configured, to small images.",
    config=DecoderStageConfig,
    build=_build,
    objective=_objective,
    reads=_reads,
    network=_network,
    shows_rows=True,
)
