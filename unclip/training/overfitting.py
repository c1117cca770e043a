"""Can a model learn a few rows by heart? If it cannot, it will learn nothing from millions, and something is wrong with it.

The commonest complaint about diffusion models is that they draw only noise; this finds most reasons for it in a minute.
"""

import dataclasses
from collections.abc import Mapping

from unclip.errors import ConfigError
from unclip.training.objective import Monitor
from unclip.training.settings import TrainerConfig

NUM_STEPS = 400
LEARNING_RATE = 2e-3
MEMORISED = 0.15
"""Relative loss below which a model knows its rows: that of always predicting the mean is 1."""


def settings(config: TrainerConfig, num_rows: int) -> TrainerConfig:
    """How a training with these settings is made to learn `num_rows` rows by heart: each step sees all of them."""
    return dataclasses.replace(
        config,
        batch_size=num_rows,
        micro_batch_size=0,
        num_samples=NUM_STEPS * num_rows,
        checkpoint_samples=NUM_STEPS * num_rows,
        log_samples=NUM_STEPS // 8 * num_rows,
        warmup_samples=NUM_STEPS // 20 * num_rows,
        preview_samples=NUM_STEPS * num_rows,
        validation_rows=0,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        nonfinite="stop",
        reference_curve=None,
    )


class Diagnosis(Monitor):
    """Hears how such a training goes, and says what is wrong."""

    def __init__(self) -> None:
        self.logged: list[Mapping[str, float]] = []

    def metrics(self, values: Mapping[str, float], samples_seen: int) -> None:
        self.logged.append(values)

    @property
    def relative_losses(self) -> list[float]:
        """Of each eighth of the training.

        Raises:
            ConfigError: the objective tells none.
        """
        if not all("relative_loss" in values for values in self.logged):
            raise ConfigError(
                "--overfit: the objective of this part tells no relative_loss to judge by. Add it to its `metrics`."
            )
        return [values["relative_loss"] for values in self.logged]

    @property
    def has_memorised(self) -> bool:
        return self.relative_losses[-1] <= MEMORISED

    @property
    def verdict(self) -> str:
        """One sentence, and what to do."""
        first, last = self.relative_losses[0], self.relative_losses[-1]
        if self.has_memorised:
            return f"It knows them by heart: its loss is {last:.3f} of that of predicting the mean."
        if max(values["gradient_norm"] for values in self.logged) == 0:
            return (
                "No gradient reaches the weights: the loss does not depend on them. Look at detach() and requires_grad."
            )
        if last > 0.95:
            return (
                f"It learns nothing: its loss is {last:.3f} of that of predicting the mean. "
                f"Look at how the loss is computed, and whether the model sees what it is given."
            )
        if last > 0.9 * first:
            return (
                f"It stopped learning at {last:.3f} of the loss of predicting the mean: what it is given does not tell the "
                f"rows apart, or the model is too small. Look at the rows and their conditions."
            )
        return (
            f"It learns, but slowly: from {first:.3f} to {last:.3f} of the loss of predicting the mean, expected "
            f"{MEMORISED}. Try a larger model, a smaller learning rate, or look at how its inputs are scaled."
        )
