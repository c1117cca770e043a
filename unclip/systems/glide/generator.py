"""GLIDE's generator as a part: from captions to small images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unclip.config import load, operational, require, to_dict
from unclip.data import Batch
from unclip.diffusion.sampling import require_preview_sampler
from unclip.models.clip import Clip
from unclip.models.glide import Glide, GlideConfig
from unclip.models.small_images import Captions, ImageSampling, known_region, random_masks
from unclip.models.text import TextShape
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.training.batches import load_images, stack_rows
from unclip.training.diffusion_loss import DiffusionLoss, bernoulli, device_of, measure_scores
from unclip.training.memory import Network, example_flags, example_images, example_indices
from unclip.training.objective import Tensors
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class GlideStageConfig:
    model: GlideConfig = GlideConfig()
    """The network and its diffusion process."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""
    text_learning_rate: float = 1.0
    """Learning rate of the text Transformer, as a factor of the trainer's. If a short training has a high one, the states of
    words that the U-Net does not read yet change faster than it learns to read them."""
    preview: ImageSampling = operational(ImageSampling(num_steps=25))
    """Sampling settings of the previews."""

    def __post_init__(self) -> None:
        require(self.text_learning_rate > 0, "text_learning_rate", self.text_learning_rate, "a positive number")
        require_preview_sampler(self.preview)
        scale = self.preview.clip_guidance_scale
        require(scale == 0, "preview.clip_guidance_scale", scale, "0: trainings load no image encoder")


class GlideObjective:
    """Diffusion loss of small images, given their captions."""

    columns: Mapping[str, tuple[str, ...]] = {"images": ("jpg",), "embeddings": ("tokens",)}

    def __init__(
        self,
        config: GlideConfig,
        clip: Clip,
        preview: Batch,
        preview_sampling: ImageSampling = GlideStageConfig.preview,
        text_learning_rate: float = 1.0,
    ) -> None:
        """Args: clip: gives the tokenizer."""
        self.learning_rate_factors = {"text": text_learning_rate}
        self.config = config
        shape = TextShape.of(clip)
        self.model: Glide = Glide(config, shape).to(memory_format=torch.channels_last)
        self.model.text.set_null(clip.tokenize([""]))
        self.process = DiffusionLoss(self.model.diffusion)
        self.sample_size = {"pixels": config.unet.image_size**2}
        self.state = self.process.timesteps.state
        self._preview, self._preview_sampling = self.prepare(preview), preview_sampling

    def prepare(self, batch: Batch) -> Tensors:
        return {
            "images": load_images(batch["jpg"], self.config.unet.image_size),  # [B, 3, S, S]
            "tokens": stack_rows(batch["tokens"]).long(),  # [B, L]
        }

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, tokens = tensors["images"], tensors["tokens"]
        draw = self.process.draw(x0, generator, network.training)
        text_drop = bernoulli(x0, self.config.text_drop_prob, generator)
        known = None
        if self.config.inpainting:
            known = known_region(x0, random_masks(len(x0), x0.shape[-1], generator))
        return self.process.mean_loss(lambda x_t, t: network(x_t, t, tokens, text_drop, known), x0, draw)

    def learn(self, step_taken: bool) -> None:
        self.process.learn(step_taken)

    def metrics(self, training: bool) -> dict[str, float]:
        return self.process.take(training)

    def preview(self, model: nn.Module) -> Tensor:
        """The original images, then samples from their captions."""
        generator = torch.Generator(device_of(model)).manual_seed(0)
        captions = Captions(self._preview["tokens"].to(device_of(model)))
        samples = model.sample(captions, self._preview_sampling, generator=generator)  # type: ignore[operator]
        return torch.cat([self._preview["images"], samples.cpu()])

    def measure(self, model: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensors:
        tokens = tensors["tokens"]
        return measure_scores(self.model.diffusion, lambda x_t, t: model(x_t, t, tokens), tensors["images"], generator)

    def facts(self) -> dict[str, Any]:
        return {"kind": "glide", "config": to_dict(self.config), "text_shape": to_dict(self.model.text_shape)}


def _build(facts: Mapping[str, Any]) -> Glide:
    return Glide(load(GlideConfig, facts["config"]), load(TextShape, facts["text_shape"]))


def _objective(config: GlideStageConfig, inputs: TrainingInputs) -> GlideObjective:
    preview = inputs.preview_rows()
    return GlideObjective(config.model, inputs.clip(), preview, config.preview, config.text_learning_rate)


def _network(config: GlideStageConfig, shapes: Shapes) -> Network:
    model, text = config.model, shapes.text

    def inputs(batch: int) -> tuple[Any, ...]:
        images, tokens = example_images(batch, model.unet.image_size), example_indices(batch, text.length)
        return images, example_indices(batch), tokens, example_flags(batch)

    return Network(lambda: Glide(model, text), inputs)


GLIDE = Part(
    name="glide",
    help="Train GLIDE's generator: from captions to small images.",
    config=GlideStageConfig,
    build=_build,
    objective=_objective,
    reads=lambda _: GlideObjective.columns,
    network=_network,
    shows_rows=True,
)
