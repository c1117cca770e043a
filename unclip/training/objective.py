"""The two interfaces of the trainer: the objective that is trained, and the monitor that hears how it goes."""

import logging
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unclip.data import Batch

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


class Objective(Protocol):
    """What is trained: a model and its loss."""

    @property
    def model(self) -> nn.Module:
        """The network that is trained."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Tensors that losses depend on besides the model, changed in place and the same on all ranks; often none."""

    @property
    def sample_size(self) -> Mapping[str, int]:
        """Units in a sample, to tell the speed by: pixels or tokens."""

    def prepare(self, batch: Batch) -> Tensors:
        """Rows as the reader gives them -> tensors, on the CPU."""

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        """Mean loss of a batch.

        `network` is the model, or a wrapper or copy of it that is called the same way. When it is not in training mode
        (`network.training`), nothing is learned from the loss, not by the objective either.
        """

    def metrics(self, training: bool) -> Mapping[str, float]:
        """What else the losses tell since the last time it was asked: of training, where all workers ask, or of validation,
        where the first one does. `relative_loss`, where there is one, is the loss beside that of predicting the mean;
        `unclip train --overfit` judges by it."""

    def preview(self, model: nn.Module) -> Tensor | None:
        """Something to look at while training, always of the same content: images [2 B, 3, H, W] in [-1, 1], originals and
        then a drawing of each."""

    def facts(self) -> dict[str, Any]:
        """What is needed to build the model again."""


@runtime_checkable
class Measuring(Protocol):
    """An objective that measures something of the finished model, once, for its sampling."""

    def measure(self, model: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensors:
        """Tensors to save beside the weights; `load_model` gives them to the model as `measured`.

        Args:
            model: with the EMA weights, in evaluation mode.
            tensors: a few training rows as `prepare` makes them, on the model's device.
            generator: source of all randomness, on that device.
        """


class Monitor:
    """Hears how the training goes; this one ignores it."""

    def start(self, samples_seen: int, num_samples: int) -> None:
        """Training begins, or goes on, at `samples_seen`."""

    def step(self, samples_seen: int, loss: float) -> None:
        """After every step."""

    def metrics(self, values: Mapping[str, float], samples_seen: int) -> None:
        """Now and then."""

    def preview(self, images: Tensor, samples_seen: int) -> None:
        """Images [2 B, 3, H, W] in [-1, 1]: originals, and what the averaged weights draw of each."""

    def warn(self, message: str) -> None:
        """Something is wrong, but the training goes on."""
        log.warning("training: %s", message)

    def wants_stop(self) -> bool:
        """Asked in every step, of every worker: whether to write a checkpoint and stop."""
        return False

    def wants_checkpoint(self) -> bool:
        """Asked in every step, of every worker: whether to write a checkpoint besides those that are due, and go on."""
        return False
