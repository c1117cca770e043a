"""Interfaces of the trainer: the objective to train, and the monitor that follows the training."""

import logging
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unclip.data import Batch

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


class Objective(Protocol):
    """Model to train, and its loss."""

    @property
    def model(self) -> nn.Module:
        """Network to train."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Tensors besides the model that losses depend on; changed in place and equal on all ranks. Often empty; if not, the
        objective is `Learning`."""

    @property
    def sample_size(self) -> Mapping[str, int]:
        """Units per sample, such as pixels or tokens, for reporting speed."""

    def prepare(self, batch: Batch) -> Tensors:
        """Convert rows from the reader to tensors, on the CPU."""

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        """Mean loss of a batch.

        `network` is the model, or a wrapper or copy with the same call signature. If it is not in training mode
        (`network.training`), the objective must not learn from the loss either.
        """

    def metrics(self, training: bool) -> Mapping[str, float]:
        """Further statistics of the losses since the last call: of training (called on all ranks) or of validation (called
        on rank 0). `relative_loss`, if given, is the loss divided by that of predicting the mean; `unclip train --overfit`
        needs it."""

    def preview(self, model: nn.Module) -> Tensor | None:
        """Sample a preview, always of the same rows: images [2 B, 3, H, W] in [-1, 1], originals, then a sample for each."""

    def facts(self) -> dict[str, Any]:
        """Facts needed to build the model again."""


@runtime_checkable
class Learning(Protocol):
    """Objective whose `state` learns from the losses of training."""

    def learn(self, step_taken: bool) -> None:
        """Update `state` from the losses of all micro-batches of a step, of all ranks in rank order.

        Called on all ranks at the end of every step. Losses must not change `state`, so that all micro-batches of a step see
        the same one, however they are divided among ranks.

        Args:
            step_taken: False if the optimiser took no step, because a loss or gradient was not finite: forget the losses.
        """


@runtime_checkable
class Paced(Protocol):
    """Objective some of whose modules learn with another learning rate than the rest."""

    @property
    def learning_rate_factors(self) -> Mapping[str, float]:
        """Name of a module of the model -> factor of the learning rate of its parameters."""


@runtime_checkable
class Measuring(Protocol):
    """Objective that measures the finished model once, for use in sampling."""

    def measure(self, model: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensors:
        """Tensors to save beside the weights; `load_model` passes them to the model as `measured`. Numbers, which have no
        dimension, are logged as metrics too.

        Args:
            model: model with the EMA weights, in evaluation mode.
            tensors: a few training rows, as returned by `prepare`, on the model's device.
            generator: source of all randomness, on the same device.
        """


class Monitor:
    """Follows a training; this base class only logs warnings."""

    def start(self, samples_seen: int, num_samples: int) -> None:
        """Called when training starts or resumes at `samples_seen`."""

    def step(self, samples_seen: int, loss: float) -> None:
        """Called after every step."""

    def metrics(self, values: Mapping[str, float], samples_seen: int) -> None:
        """Called with metrics, periodically and after validation."""

    def preview(self, images: Tensor, samples_seen: int) -> None:
        """Called with images [2 B, 3, H, W] in [-1, 1]: originals, then a sample for each from the EMA weights."""

    def warn(self, message: str) -> None:
        """Called for problems that do not stop the training."""
        log.warning("training: %s", message)

    def wants_stop(self) -> bool:
        """Return True to write a checkpoint and stop; called in every step, on all ranks."""
        return False

    def wants_checkpoint(self) -> bool:
        """Return True to write an extra checkpoint and continue; called in every step, on all ranks."""
        return False
