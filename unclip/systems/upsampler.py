"""The upsampler as a part, shared by all systems that enlarge images by diffusion."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from unclip.config import load, operational, require, to_dict
from unclip.data import Batch
from unclip.diffusion.process import augment_condition
from unclip.models.degradations import degrade, shrink
from unclip.models.upsampler import Upsampler, UpsamplerConfig, UpsamplerSampling
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.training.batches import load_images
from unclip.training.diffusion_loss import DiffusionLoss, device_of, measure_scores
from unclip.training.memory import Network, example_images, example_indices
from unclip.training.objective import Tensors
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class UpsamplerStageConfig:
    model: UpsamplerConfig = UpsamplerConfig()
    """The network and its diffusion process."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""
    preview: UpsamplerSampling = operational(UpsamplerSampling())
    """Sampling settings of the previews."""

    def __post_init__(self) -> None:
        expected = "another sampler: its score is measured after the training"
        require(self.preview.sampler != "analytic_dpm", "preview.sampler", self.preview.sampler, expected)


class UpsamplerObjective:
    """Diffusion loss of image crops, given the same crops at low resolution."""

    columns = ("jpg",)

    def __init__(
        self,
        config: UpsamplerConfig,
        preview: Batch,
        preview_sampling: UpsamplerSampling = UpsamplerStageConfig.preview,
    ) -> None:
        self.config = config
        self.model: Upsampler = Upsampler(config).to(memory_format=torch.channels_last)
        self.process = DiffusionLoss(self.model.diffusion)
        self.sample_size = {"pixels": config.unet.image_size**2}
        self.state = self.process.timesteps.state
        self._preview, self._preview_sampling = self.prepare(preview)["images"], preview_sampling

    def prepare(self, batch: Batch) -> Tensors:
        return {"images": load_images(batch["jpg"], self.config.output_size)}  # [B, 3, S, S]

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, low_res = self._crops(tensors["images"], generator)
        level = None
        if self.config.max_noise_level > 0:
            levels = (0, self.config.max_noise_level)
            low_res, level = augment_condition(self.model.diffusion, low_res, levels, generator)
        draw = self.process.draw(x0, generator, network.training)
        return self.process.mean_loss(lambda x_t, t: network(x_t, t, low_res, level), x0, draw)

    def learn(self, step_taken: bool) -> None:
        self.process.learn(step_taken)

    def metrics(self, training: bool) -> dict[str, float]:
        return self.process.take(training)

    def preview(self, model: nn.Module) -> Tensor:
        """The original images, then their low-resolution versions upsampled."""
        generator = torch.Generator(device_of(model)).manual_seed(0)
        low_res = shrink(self._preview, self.config.low_res_size).to(device_of(model))
        samples = model.sample(low_res, self._preview_sampling, generator=generator)  # type: ignore[operator]
        return torch.cat([self._preview, samples.cpu()])

    def measure(self, model: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensors:
        """Mean squared score, with low-resolution images degraded as in training but not noised."""
        x0, low_res = self._crops(tensors["images"], generator)
        return measure_scores(self.model.diffusion, lambda x_t, t: model(x_t, t, low_res), x0, generator)

    def facts(self) -> dict[str, Any]:
        return {"kind": "upsampler", "config": to_dict(self.config)}

    def _crops(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Crop each image and its degraded low-resolution version at random: [B, 3, S, S], [B, 3, S / scale, S / scale].

        Whole images are degraded before cropping, so that the edges of a crop look as they do in a whole image.
        """
        scale, crop = self.config.scale, self.config.unet.image_size // self.config.scale
        low_res = degrade(images, self.config.low_res_size, self.config.degradation, generator)
        offsets = torch.randint(
            self.config.low_res_size - crop + 1, (2, len(images)), generator=generator, device=images.device
        ).tolist()
        corners = list(zip(*offsets, strict=True))
        high = [
            image[:, scale * y : scale * (y + crop), scale * x : scale * (x + crop)]
            for image, (y, x) in zip(images, corners, strict=True)
        ]
        low = [image[:, y : y + crop, x : x + crop] for image, (y, x) in zip(low_res, corners, strict=True)]
        return torch.stack(high), torch.stack(low)


def _network(config: UpsamplerStageConfig, _: Shapes) -> Network:
    model = config.model
    size = model.unet.image_size

    def inputs(batch: int) -> tuple[Any, ...]:
        small = example_images(batch, size // model.scale)
        return example_images(batch, size), example_indices(batch), small, example_indices(batch)

    return Network(lambda: Upsampler(model), inputs)


def _objective(config: UpsamplerStageConfig, inputs: TrainingInputs) -> UpsamplerObjective:
    return UpsamplerObjective(config.model, inputs.preview_rows(), config.preview)


UPSAMPLER = Part(
    name="upsampler",
    help="Train an upsampler: from small images to large ones.",
    config=UpsamplerStageConfig,
    build=lambda facts: Upsampler(load(UpsamplerConfig, facts["config"])),
    objective=_objective,
    reads=lambda _: {"images": UpsamplerObjective.columns},
    network=_network,
    needs=(),
    shows_rows=True,
)
