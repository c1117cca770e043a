"""The image denoiser as a part, shared by systems that sample small images without text: from classes, or from nothing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unclip.config import load, operational, require, to_dict
from unclip.data import Batch
from unclip.diffusion.sampling import require_preview_sampler
from unclip.models.image_denoiser import ImageDenoiser, ImageDenoiserConfig, ImageDenoiserSampling
from unclip.systems.classes import Classes, ClassesConfig, ClassShare, find_classes, reads_classes
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.training.batches import load_images
from unclip.training.diffusion_loss import DiffusionLoss, bernoulli, device_of, measure_scores
from unclip.training.memory import Network, example_images, example_indices
from unclip.training.objective import Tensors
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class DenoiserStageConfig:
    classes: ClassesConfig = ClassesConfig()
    """Classes of the captions; filled in from the section `classes` of the run."""
    model: ImageDenoiserConfig = ImageDenoiserConfig()
    """The network and its diffusion process."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""
    measures_bits_per_dim: bool = False
    """Measure `bits_per_dim` when the training is done: the variational bound of up to 16 held-out images, over all timesteps.
    Costs `diffusion.num_timesteps` forward passes of these images."""
    preview: ImageDenoiserSampling = operational(ImageDenoiserSampling())
    """Sampling settings of the previews."""

    def __post_init__(self) -> None:
        require_preview_sampler(self.preview)
        scale = self.preview.classifier_scale
        require(scale == 0, "preview.classifier_scale", scale, "0: previews have no classifier")


class DenoiserObjective:
    """Diffusion loss of small images, given the classes of their captions if there are any.

    Images without a class train the network without a class.
    """

    def __init__(self, config: DenoiserStageConfig, classes: Classes, preview: Batch) -> None:
        self.config, self.classes = config.model, classes
        self.model: ImageDenoiser = ImageDenoiser(config.model, len(classes)).to(memory_format=torch.channels_last)
        self.process = DiffusionLoss(self.model.diffusion)
        self.sample_size = {"pixels": self.config.unet.image_size**2}
        self.state = self.process.timesteps.state
        self.share = ClassShare(len(classes))
        self._preview, self._preview_sampling = self.prepare(preview), config.preview
        self._measures_bits_per_dim = config.measures_bits_per_dim

    def prepare(self, batch: Batch) -> Tensors:
        tensors = {"images": load_images(batch["jpg"], self.config.unet.image_size)}  # [B, 3, S, S]
        if len(self.classes):
            tensors["label"] = self.classes.labels(batch["caption"])  # [B]
        return tensors

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, label = tensors["images"], tensors.get("label")
        draw = self.process.draw(x0, generator, network.training)
        if label is not None:
            self.share.add(network.training, label)
            label = label.masked_fill(bernoulli(x0, self.config.class_drop_prob, generator), len(self.classes))
        return self.process.mean_loss(lambda x_t, t: network(x_t, t, label), x0, draw)

    def learn(self, step_taken: bool) -> None:
        self.process.learn(step_taken)

    def metrics(self, training: bool) -> dict[str, float]:
        return {**self.process.take(training), **self.share.take(training)}

    def preview(self, model: nn.Module) -> Tensor:
        """The original images, then samples of their classes."""
        generator = torch.Generator(device_of(model)).manual_seed(0)
        images, label = self._preview["images"], self._preview.get("label")
        if label is not None:
            label = label.to(device_of(model))
        samples = model.sample(len(images), label, self._preview_sampling, generator=generator)  # type: ignore[operator]
        return torch.cat([images, samples.cpu()])

    def measure(self, model: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensors:
        label = tensors.get("label")
        diffusion = self.model.diffusion
        measured = measure_scores(diffusion, lambda x_t, t: model(x_t, t, label), tensors["images"], generator)
        if self._measures_bits_per_dim:
            held_out = {name: value.to(device_of(model)) for name, value in self._preview.items()}
            label, images = held_out.get("label"), held_out["images"]
            bound = diffusion.bits_per_dim(lambda x_t, t: model(x_t, t, label), images, generator=generator)
            measured["bits_per_dim"] = bound.total.mean().cpu()
        return measured

    def facts(self) -> dict[str, Any]:
        return {"kind": "denoiser", "config": to_dict(self.config), "classes": list(self.classes.names)}


def _build(facts: Mapping[str, Any]) -> ImageDenoiser:
    classes = Classes(facts["classes"])
    model = ImageDenoiser(load(ImageDenoiserConfig, facts["config"]), len(classes))
    model.class_names = classes.names
    return model


def _objective(config: DenoiserStageConfig, inputs: TrainingInputs) -> DenoiserObjective:
    return DenoiserObjective(config, find_classes(config.classes, inputs), inputs.preview_rows())


def _network(config: DenoiserStageConfig, _: Shapes) -> Network:
    size, num_classes = config.model.unet.image_size, config.classes.expected_number

    def inputs(batch: int) -> tuple[Any, ...]:
        return example_images(batch, size), example_indices(batch), example_indices(batch)

    return Network(lambda: ImageDenoiser(config.model, num_classes), inputs)


DENOISER = Part(
    name="denoiser",
    help="Train the denoiser of small images, conditioned on the classes of their captions if there are any.",
    config=DenoiserStageConfig,
    build=_build,
    objective=_objective,
    reads=lambda config: reads_classes(config.classes),
    network=_network,
    needs=(),
    shows_rows=True,
)
