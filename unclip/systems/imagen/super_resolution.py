"""Imagen's super-resolution network as a part: from small images and the states of captions to large images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unclip.config import load, operational, to_dict
from unclip.data import Batch
from unclip.diffusion.process import augment_condition
from unclip.diffusion.sampling import require_preview_sampler
from unclip.downscaling import shrink
from unclip.models.imagen import TextUpsampler, TextUpsamplerConfig, TextUpsamplerSampling
from unclip.models.text_states import TextStates
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.systems.text_encoder import COLUMNS, TEXT_STAGE, TextInput, text_arguments, text_tensors
from unclip.systems.upsampler import random_crops
from unclip.training.batches import load_images
from unclip.training.diffusion_loss import DiffusionLoss, bernoulli, device_of, measure_scores
from unclip.training.memory import Network, example_flags, example_images, example_indices
from unclip.training.objective import Tensors
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class TextUpsamplerStageConfig:
    model: TextUpsamplerConfig = TextUpsamplerConfig()
    """The network and its diffusion process."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""
    text: TextInput = operational(TextInput())
    """Sizes of the text encoder's states."""
    preview: TextUpsamplerSampling = operational(TextUpsamplerSampling())
    """Sampling settings of the previews."""

    def __post_init__(self) -> None:
        require_preview_sampler(self.preview)


class TextUpsamplerObjective:
    """Diffusion loss of image crops, given the same crops at low resolution, noised to a level drawn for each, and captions.

    Source: Saharia et al. 2022 (Imagen), section 2.5 and figure A.32.
    """

    columns: Mapping[str, tuple[str, ...]] = {"images": ("jpg",), TEXT_STAGE: COLUMNS}

    def __init__(
        self,
        config: TextUpsamplerConfig,
        preview: Batch,
        preview_sampling: TextUpsamplerSampling = TextUpsamplerStageConfig.preview,
    ) -> None:
        """Args: preview: rows for previews; the width of the network's text is that of their states."""
        self.config = config
        self._preview, self._preview_sampling = self.prepare(preview), preview_sampling
        text_width = self._preview["states"].shape[2]
        self.model: TextUpsampler = TextUpsampler(config, text_width).to(memory_format=torch.channels_last)
        self.process = DiffusionLoss(self.model.diffusion)
        self.sample_size = {"pixels": config.unet.image_size**2}
        self.state = self.process.timesteps.state

    def prepare(self, batch: Batch) -> Tensors:
        return {"images": load_images(batch["jpg"], self.config.output_size), **text_tensors(batch)}

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, low_res = random_crops(tensors["images"], self.config, generator)
        text, level = text_arguments(tensors), None
        if self.config.max_noise_level > 0:
            levels = (0, self.config.max_noise_level)
            low_res, level = augment_condition(self.model.diffusion, low_res, levels, generator)
        draw = self.process.draw(x0, generator, network.training)
        text_drop = bernoulli(x0, self.config.text_drop_prob, generator)
        return self.process.mean_loss(lambda x_t, t: network(x_t, t, low_res, level, *text, text_drop), x0, draw)

    def learn(self, step_taken: bool) -> None:
        self.process.learn(step_taken)

    def metrics(self, training: bool) -> dict[str, float]:
        return self.process.take(training)

    def preview(self, model: nn.Module) -> Tensor:
        """The original images, then their low-resolution versions upsampled."""
        device = device_of(model)
        generator = torch.Generator(device).manual_seed(0)
        low_res = shrink(self._preview["images"].to(device), self.config.low_res_size)
        text = TextStates(*text_arguments(self._preview)).to(device)
        samples = model.sample(low_res, self._preview_sampling, text, generator=generator)  # type: ignore[operator]
        return torch.cat([self._preview["images"], samples.cpu()])

    def measure(self, model: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensors:
        """Mean squared score, with low-resolution images degraded as in training but not noised."""
        x0, low_res = random_crops(tensors["images"], self.config, generator)
        text = text_arguments(tensors)
        return measure_scores(self.model.diffusion, lambda x_t, t: model(x_t, t, low_res, None, *text), x0, generator)

    def facts(self) -> dict[str, Any]:
        return {"kind": "text_upsampler", "config": to_dict(self.config), "text_width": self.model.text_width}


def _build(facts: Mapping[str, Any]) -> TextUpsampler:
    return TextUpsampler(load(TextUpsamplerConfig, facts["config"]), facts["text_width"])


def _objective(config: TextUpsamplerStageConfig, inputs: TrainingInputs) -> TextUpsamplerObjective:
    return TextUpsamplerObjective(config.model, inputs.preview_rows(), config.preview)


def _network(config: TextUpsamplerStageConfig, shapes: Shapes) -> Network:
    model, (length, width) = config.model, config.text.sizes(shapes)
    size = model.unet.image_size

    def inputs(batch: int) -> tuple[Any, ...]:
        small = example_images(batch, size // model.scale), example_indices(batch)
        text = torch.zeros(batch, length, width), torch.full((batch,), length)
        return example_images(batch, size), example_indices(batch), *small, *text, example_flags(batch)

    return Network(lambda: TextUpsampler(model, width), inputs)


TEXT_UPSAMPLER = Part(
    name="upsampler",
    help="Train a super-resolution network: from small images and captions to large images.",
    config=TextUpsamplerStageConfig,
    build=_build,
    objective=_objective,
    reads=lambda _: TextUpsamplerObjective.columns,
    network=_network,
    needs=(TEXT_STAGE,),
    shows_rows=True,
    kinds=("text_upsampler",),
)
