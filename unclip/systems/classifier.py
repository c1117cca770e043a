"""The classifier of noised images as a part, for systems that guide by it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unclip.config import load, to_dict
from unclip.data import Batch
from unclip.errors import ConfigError
from unclip.models.classifier import Classifier, ClassifierConfig, classification_loss
from unclip.systems.classes import Classes, ClassesConfig, ClassShare, find_classes, reads_classes
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.training.batches import load_images
from unclip.training.memory import Network, example_images, example_indices
from unclip.training.objective import Tensors
from unclip.training.settings import TrainerConfig
from unclip.training.timesteps import TimestepAccuracies


@dataclasses.dataclass(frozen=True)
class ClassifierStageConfig:
    classes: ClassesConfig = ClassesConfig()
    """Classes of the captions; filled in from the section `classes` of the run."""
    model: ClassifierConfig = ClassifierConfig()
    """The network and the noising process; that process is filled in from the model to guide."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""


class ClassifierObjective:
    """Cross-entropy of the classes of noised images, at uniform timesteps; images without a class are left out.

    Source: Dhariwal & Nichol 2021, section 4.
    """

    def __init__(self, config: ClassifierStageConfig, classes: Classes) -> None:
        """Raises:
        ConfigError: there are fewer than 2 classes.
        """
        if len(classes) < 2:
            raise ConfigError(
                "classes.source: got no classes, expected captions, scenes or names to train a classifier."
            )
        self.config, self.classes = config.model, classes
        self.model: Classifier = Classifier(config.model, len(classes)).to(memory_format=torch.channels_last)
        self.sample_size = {"pixels": self.config.unet.image_size**2}
        self.state: Tensors = {}
        self.share = ClassShare(len(classes))
        num_timesteps = config.model.diffusion.num_timesteps
        self._accuracies = {training: TimestepAccuracies(num_timesteps) for training in (True, False)}

    def prepare(self, batch: Batch) -> Tensors:
        images = load_images(batch["jpg"], self.config.unet.image_size)  # [B, 3, S, S]
        return {"images": images, "label": self.classes.labels(batch["caption"])}

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, label = tensors["images"], tensors["label"]
        diffusion = self.model.diffusion
        t = torch.randint(diffusion.num_timesteps, (len(x0),), generator=generator, device=x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        has_class = label < len(self.classes)  # [B]
        some_class = label.clamp(max=len(self.classes) - 1)  # [B]
        losses, logits = classification_loss(diffusion, network, x0, some_class, t, noise)  # [B], [B, K]
        self.share.add(network.training, label)
        blind = torch.full_like(losses, math.log(len(self.classes)))
        self._accuracies[network.training].add(t, losses, logits.argmax(dim=1) == label, blind, has_class)
        return (losses * has_class).sum().div(has_class.sum().clamp(min=1))

    def metrics(self, training: bool) -> dict[str, float]:
        return {**self._accuracies[training].take(all_ranks=training), **self.share.take(training)}

    def preview(self, model: nn.Module) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"kind": "classifier", "config": to_dict(self.config), "classes": list(self.classes.names)}


def _build(facts: Mapping[str, Any]) -> Classifier:
    classes = Classes(facts["classes"])
    model = Classifier(load(ClassifierConfig, facts["config"]), len(classes))
    model.class_names = classes.names
    return model


def _objective(config: ClassifierStageConfig, inputs: TrainingInputs) -> ClassifierObjective:
    return ClassifierObjective(config, find_classes(config.classes, inputs))


def _network(config: ClassifierStageConfig, _: Shapes) -> Network:
    size, num_classes = config.model.unet.image_size, max(2, config.classes.expected_number)
    return Network(
        lambda: Classifier(config.model, num_classes),
        lambda batch: (example_images(batch, size), example_indices(batch)),
    )


CLASSIFIER = Part(
    name="classifier",
    help="Train the classifier of noised images that guides samples to their classes.",
    config=ClassifierStageConfig,
    build=_build,
    objective=_objective,
    reads=lambda config: reads_classes(config.classes),
    network=_network,
    needs=(),
)
