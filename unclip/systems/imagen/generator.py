"""Imagen's base network as a part: from the states of captions to small images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unclip.config import load, operational, to_dict
from unclip.data import Batch
from unclip.diffusion.sampling import require_preview_sampler
from unclip.models.imagen import Imagen, ImagenConfig, ImagenSampling
from unclip.models.text_states import TextStates
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.systems.text_encoder import COLUMNS, TEXT_STAGE, TextInput, text_arguments, text_tensors
from unclip.training.batches import load_images
from unclip.training.diffusion_loss import DiffusionLoss, bernoulli, device_of, measure_scores
from unclip.training.memory import Network, example_flags, example_images, example_indices
from unclip.training.objective import Tensors
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class ImagenStageConfig:
    model: ImagenConfig = ImagenConfig()
    """The network and its diffusion process."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""
    text: TextInput = operational(TextInput())
    """Sizes of the text encoder's states."""
    preview: ImagenSampling = operational(ImagenSampling(num_steps=25))
    """Sampling settings of the previews."""

    def __post_init__(self) -> None:
        require_preview_sampler(self.preview)


class ImagenObjective:
    """Diffusion loss of small images, given the states of their captions."""

    columns: Mapping[str, tuple[str, ...]] = {"images": ("jpg",), TEXT_STAGE: COLUMNS}

    def __init__(
        self, config: ImagenConfig, preview: Batch, preview_sampling: ImagenSampling = ImagenStageConfig.preview
    ) -> None:
        """Args: preview: rows for previews; the width of the network's text is that of their states."""
        self.config = config
        self._preview, self._preview_sampling = self.prepare(preview), preview_sampling
        text_width = self._preview["states"].shape[2]
        self.model: Imagen = Imagen(config, text_width).to(memory_format=torch.channels_last)
        self.process = DiffusionLoss(self.model.diffusion)
        self.sample_size = {"pixels": config.unet.image_size**2}
        self.state = self.process.timesteps.state

    def prepare(self, batch: Batch) -> Tensors:
        images = load_images(batch["jpg"], self.config.unet.image_size)  # [B, 3, S, S]
        return {"images": images, **text_tensors(batch)}

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, text = tensors["images"], text_arguments(tensors)
        draw = self.process.draw(x0, generator, network.training)
        text_drop = bernoulli(x0, self.config.text_drop_prob, generator)
        return self.process.mean_loss(lambda x_t, t: network(x_t, t, *text, text_drop), x0, draw)

    def learn(self, step_taken: bool) -> None:
        self.process.learn(step_taken)

    def metrics(self, training: bool) -> dict[str, float]:
        return self.process.take(training)

    def preview(self, model: nn.Module) -> Tensor:
        """The original images, then samples from their captions."""
        device = device_of(model)
        generator = torch.Generator(device).manual_seed(0)
        text = TextStates(*text_arguments(self._preview)).to(device)
        samples = model.sample(text, self._preview_sampling, generator=generator)  # type: ignore[operator]
        return torch.cat([self._preview["images"], samples.cpu()])

    def measure(self, model: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensors:
        text = text_arguments(tensors)
        return measure_scores(self.model.diffusion, lambda x_t, t: model(x_t, t, *text), tensors["images"], generator)

    def facts(self) -> dict[str, Any]:
        return {"kind": "imagen", "config": to_dict(self.config), "text_width": self.model.text_width}


def _build(facts: Mapping[str, Any]) -> Imagen:
    return Imagen(load(ImagenConfig, facts["config"]), facts["text_width"])


def _objective(config: ImagenStageConfig, inputs: TrainingInputs) -> ImagenObjective:
    return ImagenObjective(config.model, inputs.preview_rows(), config.preview)


def _network(config: ImagenStageConfig, shapes: Shapes) -> Network:
    size, (length, width) = config.model.unet.image_size, config.text.sizes(shapes)

    def inputs(batch: int) -> tuple[Any, ...]:
        text = torch.zeros(batch, length, width), torch.full((batch,), length)
        return example_images(batch, size), example_indices(batch), *text, example_flags(batch)

    return Network(lambda: Imagen(config.model, width), inputs)


IMAGEN = Part(
    name="imagen",
    help="Train Imagen's base network: from captions to small images.",
    config=ImagenStageConfig,
    build=_build,
    objective=_objective,
    reads=lambda _: ImagenObjective.columns,
    network=_network,
    needs=(TEXT_STAGE,),
    shows_rows=True,
)
