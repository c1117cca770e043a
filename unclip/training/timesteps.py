"""Timestep samplers for training: uniform, or loss-aware; and statistics of the losses by timestep.

Letters: B batch, T number of timesteps, H number of recent losses kept per timestep. Source: Nichol & Dhariwal 2021, section 3.3.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import torch.distributed
from torch import Tensor

from unclip.diffusion.process import DiffusionConfig
from unclip.training import parallel


class TimestepDraw(NamedTuple):
    """Timesteps of a batch, and the weights of their losses."""

    t: Tensor
    """[B] int64."""
    weight: Tensor
    """[B] float32; the mean of weight * loss is an unbiased estimate of the loss under uniform timesteps."""


class TimestepSampler(Protocol):
    """Distribution of timesteps for training."""

    state: Mapping[str, Tensor]
    """Tensors that later draws depend on besides the generator; changed in place, equal on all ranks."""

    def draw(self, batch_size: int, generator: torch.Generator) -> TimestepDraw:
        """Draw timesteps and their weights, on the generator's device."""

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Learn from all unweighted losses [B] of this rank in a step, at t [B]; called once a step, on all ranks."""


def timestep_sampler(config: DiffusionConfig) -> TimestepSampler:
    """Build the sampler that a configuration selects, without any losses yet."""
    if config.timestep_sampling == "loss_aware":
        return LossAwareTimesteps(config.num_timesteps)
    return UniformTimesteps(config.num_timesteps)


class UniformTimesteps:
    """Sampler with the same probability for all timesteps, and weight 1."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self.state: Mapping[str, Tensor] = {}

    def draw(self, batch_size: int, generator: torch.Generator) -> TimestepDraw:
        t = torch.randint(self.num_timesteps, (batch_size,), generator=generator, device=generator.device)
        return TimestepDraw(t, torch.ones(batch_size, device=generator.device))

    def update(self, t: Tensor, loss: Tensor) -> None:
        return None  # does not depend on losses


class LossAwareTimesteps:
    """Importance sampler with p_t proportional to sqrt(E[L_t^2]), from the recent losses of each timestep.

    Uniform until every timestep has H losses.
    """

    def __init__(self, num_timesteps: int, num_losses: int = 10, uniform_prob: float = 0.001) -> None:
        """Args:
        num_losses: H, number of recent losses kept per timestep.
        uniform_prob: probability of a uniform draw, so that every timestep is visited.
        """
        self.uniform_prob = uniform_prob
        self.losses = torch.zeros(num_timesteps, num_losses, dtype=torch.float64)  # [T, H]
        self.num_updates = torch.zeros(num_timesteps, dtype=torch.int64)  # [T]
        self.state: Mapping[str, Tensor] = {"losses": self.losses, "num_updates": self.num_updates}

    def probabilities(self) -> Tensor:
        """Probabilities p_t, [T] float64, summing to 1."""
        num_timesteps, num_losses = self.losses.shape
        uniform = torch.full((num_timesteps,), 1 / num_timesteps, dtype=torch.float64)
        root_mean_square = (self.losses**2).mean(dim=1).sqrt()  # [T]
        if (self.num_updates < num_losses).any() or root_mean_square.sum() == 0:
            return uniform
        importance = root_mean_square / root_mean_square.sum()
        return (1 - self.uniform_prob) * importance + self.uniform_prob * uniform

    def draw(self, batch_size: int, generator: torch.Generator) -> TimestepDraw:
        """Draw timesteps, with weights 1 / (T p_t), on the generator's device."""
        probabilities = self.probabilities().to(generator.device)
        t = torch.multinomial(probabilities, batch_size, replacement=True, generator=generator)
        return TimestepDraw(t, (1 / (len(probabilities) * probabilities[t])).float())

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Record the losses of all ranks, in rank order.

        Args:
            t: [B] int64, of all micro-batches of a step.
            loss: [B], unweighted.
        """
        pairs = torch.stack([t.double(), loss.detach().double()])  # [2, B]
        if torch.distributed.is_initialized():
            gathered = [torch.empty_like(pairs) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(gathered, pairs)
            pairs = torch.cat(gathered, dim=1)
        num_losses = self.losses.shape[1]
        for timestep, value in pairs.T.tolist():
            self.losses[int(timestep), self.num_updates[int(timestep)] % num_losses] = value
            self.num_updates[int(timestep)] += 1


NUM_RANGES = 4
"""Equal ranges of timesteps whose losses are logged."""


class _SumsByRange:
    """Sums of values of samples, for each range of timesteps."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self._sums: Tensor | None = None  # [NUM_RANGES, K]

    @torch.no_grad()
    def add(self, t: Tensor, *values: Tensor) -> None:
        """Add K values [B] of the samples at t [B] int64."""
        if self._sums is None:
            self._sums = torch.zeros(NUM_RANGES, len(values), device=t.device)
        self._sums.index_add_(0, t * NUM_RANGES // self.num_timesteps, torch.stack(values, dim=1).float())

    def take(self, all_ranks: bool) -> list[tuple[str, list[float]]]:
        """Return and reset the sums since the last call, each with the name of its range; empty if there were no samples."""
        if self._sums is None:
            return []
        sums = (parallel.all_reduce_sum(self._sums) if all_ranks else self._sums).tolist()
        self._sums = None
        ends = [index * self.num_timesteps // NUM_RANGES for index in range(NUM_RANGES + 1)]
        return [(f"t_{ends[index]:04d}_{ends[index + 1] - 1:04d}", row) for index, row in enumerate(sums)]


class TimestepLosses:
    """Mean losses by range of timesteps, and relative to the loss of predicting zeros."""

    def __init__(self, num_timesteps: int) -> None:
        self._sums = _SumsByRange(num_timesteps)

    def add(self, t: Tensor, loss: Tensor, loss_of_zeros: Tensor) -> None:
        """Add losses [B] at t [B] int64, and the losses [B] of predicting zeros for the same samples and noise."""
        self._sums.add(t, loss, loss_of_zeros, torch.ones_like(loss))

    def take(self, all_ranks: bool = False) -> dict[str, float]:
        """Return and reset the means since the last call: `loss_t_FIRST_LAST` for each visited range, and `relative_loss`.

        The relative loss is 1 for a network that predicts the mean of its targets; a training that learns nothing stays
        at 1.

        Args:
            all_ranks: combine the losses of all ranks; all of them must call it.
        """
        rows = self._sums.take(all_ranks)
        values = {f"loss_{name}": loss / count for name, (loss, _, count) in rows if count}
        total, total_of_zeros = (sum(row[column] for _, row in rows) for column in (0, 1))
        return {**values, "relative_loss": total / total_of_zeros} if total_of_zeros else values


class TimestepAccuracies:
    """Mean losses and accuracies of choices by range of timesteps, and the loss relative to that of a blind choice."""

    def __init__(self, num_timesteps: int) -> None:
        self._sums = _SumsByRange(num_timesteps)

    @torch.no_grad()
    def add(
        self, t: Tensor, loss: Tensor, is_correct: Tensor, blind_loss: Tensor, counts: Tensor | None = None
    ) -> None:
        """Add samples at t [B] int64.

        Args:
            loss: [B], cross-entropy of each sample's choice.
            is_correct: [B] bool.
            blind_loss: [B], cross-entropy if all choices are equally likely.
            counts: [B] bool, False for samples to leave out; None for none.
        """
        counted = torch.ones_like(loss) if counts is None else counts.to(loss.dtype)
        self._sums.add(t, loss * counted, is_correct * counted, blind_loss * counted, counted)

    def take(self, all_ranks: bool = False) -> dict[str, float]:
        """Return and reset `loss_t_FIRST_LAST` and `accuracy_t_FIRST_LAST` of each visited range, and `relative_loss`.

        The relative loss is that of the least noisy range, since the noisiest images cannot be told apart; 1 for a network
        that has learnt nothing.

        Args:
            all_ranks: combine the samples of all ranks; all of them must call it.
        """
        values: dict[str, float] = {}
        for index, (name, (loss, correct, blind, count)) in enumerate(self._sums.take(all_ranks)):
            if count:
                values |= {f"loss_{name}": loss / count, f"accuracy_{name}": correct / count}
                if index == 0 and blind:
                    values["relative_loss"] = loss / blind
        return values
