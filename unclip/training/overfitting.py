"""Overfitting test: a model that cannot memorise a few rows will not learn from millions either.

Diffusion models that sample only noise are the most common problem; this test finds most of its causes in a minute.
"""

import dataclasses
from collections.abc import Mapping

from unclip.errors import ConfigError
from unclip.training.objective import Monitor
from unclip.training.settings import TrainerConfig

NUM_STEPS = 400
LEARNING_RATE = 2e-3
MEMORISED = 0.15
"""Relative loss at or below which a model has memorised its rows; always predicting the mean gives 1."""


def settings(config: TrainerConfig, num_rows: int) -> TrainerConfig:
    """Change training settings to overfit `num_rows` rows, with all of them in each step."""
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
    """Monitor of an overfitting test; diagnoses problems."""

    def __init__(self) -> None:
        self.logged: list[Mapping[str, float]] = []

    def metrics(self, values: Mapping[str, float], samples_seen: int) -> None:
        self.logged.append(values)

    @property
    def relative_losses(self) -> list[float]:
        """Relative loss of each eighth of the training.

        Raises:
            ConfigError: the objective does not report any.
        """
        if not all("relative_loss" in values for values in self.logged):
            raise ConfigError(
                "--overfit: the objective of this part reports no relative_loss, which the test needs. Add it to its `metrics`."
            )
        return [values["relative_loss"] for values in self.logged]

    @property
    def has_memorised(self) -> bool:
        return self.relative_losses[-1] <= MEMORISED

    @property
    def verdict(self) -> str:
        """Result for users, with advice."""
        first, last = self.relative_losses[0], self.relative_losses[-1]
        if self.has_memorised:
            return f"The model has memorised the rows: its loss is {last:.3f} times that of predicting the mean."
        if max(values["gradient_norm"] for values in self.logged) == 0:
            return (
                "No gradient reaches the weights: the loss does not depend on them. Check detach() and requires_grad."
            )
        if last > 0.95:
            return (
                f"The model learns nothing: its loss is {last:.3f} times that of predicting the mean. "
                f"Check how the loss is computed, and that the model uses its inputs."
            )
        if last > 0.9 * first:
            return (
                f"The model stopped learning at {last:.3f} times the loss of predicting the mean: its inputs do not "
                f"distinguish the rows, or it is too small. Check the rows and their conditioning."
            )
        return (
            f"The model learns, but slowly: from {first:.3f} to {last:.3f} times the loss of predicting the mean, expected "
            f"{MEMORISED}. Try a larger model or a lower learning rate, or check how its inputs are scaled."
        )
