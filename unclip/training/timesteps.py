"""Which timesteps training visits: all alike, or more often those with a large loss.

Letters: B batch, T number of timesteps, H losses remembered for a timestep. Source: Nichol & Dhariwal 2021, section 3.3.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import torch.distributed
from torch import Tensor

from unclip.diffusion.process import DiffusionConfig
from unclip.training import parallel


class TimestepDraw(NamedTuple):
    t: Tensor
    """[B] int64."""
    weight: Tensor
    """[B] float32; the mean of weight * loss is an unbiased estimate of the loss under uniform timesteps."""


class TimestepSampler(Protocol):
    """What training needs of a distribution of timesteps."""

    state: Mapping[str, Tensor]
    """All that later draws depend on besides the generator; changed in place, the same in all processes."""

    def draw(self, batch_size: int, generator: torch.Generator) -> TimestepDraw:
        """Timesteps on the generator's device, and their weights."""

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Learn from the losses [B], not weighted, that this process met at t [B]."""


def timestep_sampler(config: DiffusionConfig) -> TimestepSampler:
    """The sampler that a configuration asks for, without memory of any loss."""
    if config.timestep_sampling == "loss_aware":
        return LossAwareTimesteps(config.num_timesteps)
    return UniformTimesteps(config.num_timesteps)


class UniformTimesteps:
    """Every timestep with the same probability and weight 1."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self.state: Mapping[str, Tensor] = {}

    def draw(self, batch_size: int, generator: torch.Generator) -> TimestepDraw:
        t = torch.randint(self.num_timesteps, (batch_size,), generator=generator, device=generator.device)
        return TimestepDraw(t, torch.ones(batch_size, device=generator.device))

    def update(self, t: Tensor, loss: Tensor) -> None:
        return None  # nothing is learned from losses


class LossAwareTimesteps:
    """Importance sampling with p_t in proportion to sqrt(E[L_t^2]), over the last losses of every timestep.

    Uniform until every timestep has a full memory.
    """

    def __init__(self, num_timesteps: int, num_losses: int = 10, uniform_prob: float = 0.001) -> None:
        """Args:
        num_losses: H, losses remembered for each timestep.
        uniform_prob: share of uniform draws, so that no timestep is ever forgotten.
        """
        self.uniform_prob = uniform_prob
        self.losses = torch.zeros(num_timesteps, num_losses, dtype=torch.float64)  # [T, H]
        self.num_updates = torch.zeros(num_timesteps, dtype=torch.int64)  # [T]
        self.state: Mapping[str, Tensor] = {"losses": self.losses, "num_updates": self.num_updates}

    def probabilities(self) -> Tensor:
        """p_t, [T] float64, summing to 1."""
        num_timesteps, num_losses = self.losses.shape
        uniform = torch.full((num_timesteps,), 1 / num_timesteps, dtype=torch.float64)
        root_mean_square = (self.losses**2).mean(dim=1).sqrt()  # [T]
        if (self.num_updates < num_losses).any() or root_mean_square.sum() == 0:
            return uniform
        importance = root_mean_square / root_mean_square.sum()
        return (1 - self.uniform_prob) * importance + self.uniform_prob * uniform

    def draw(self, batch_size: int, generator: torch.Generator) -> TimestepDraw:
        """Timesteps and the weights 1 / (T p_t), on the generator's device."""
        probabilities = self.probabilities().to(generator.device)
        t = torch.multinomial(probabilities, batch_size, replacement=True, generator=generator)
        return TimestepDraw(t, (1 / (len(probabilities) * probabilities[t])).float())

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Remember losses, those of all processes that train together, in the order of their ranks.

        Args:
            t: [B] int64.
            loss: [B], not weighted.
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


class TimestepLosses:
    """What losses were at early and late timesteps, and beside what predicting zeros would have cost."""

    def __init__(self, num_timesteps: int, num_buckets: int = 4) -> None:
        """Args: num_buckets: equal parts of the timesteps, told apart."""
        self.num_timesteps, self.num_buckets = num_timesteps, num_buckets
        self._sums: Tensor | None = None  # [num_buckets, 3]: losses, losses of zeros, samples

    @torch.no_grad()
    def add(self, t: Tensor, loss: Tensor, loss_of_zeros: Tensor) -> None:
        """Args: t [B] int64; loss [B]; loss_of_zeros [B], of the same samples and noise. All on one device."""
        if self._sums is None:
            self._sums = torch.zeros(self.num_buckets, 3, device=t.device)
        bucket = t * self.num_buckets // self.num_timesteps  # [B]
        values = torch.stack([loss, loss_of_zeros, torch.ones_like(loss)], dim=1).float()  # [B, 3]
        self._sums.index_add_(0, bucket, values)

    def take(self, of_all_workers: bool = False) -> dict[str, float]:
        """Means since the last time: `loss_t_FIRST_LAST` of each bucket that was met, and `relative_loss`.

        The relative loss is 1 for a network that predicts the mean of what is to be predicted, and no better than that is
        what a training that learns nothing stays at.

        Args:
            of_all_workers: that train together; all of them must ask.
        """
        if self._sums is None:
            return {}
        sums = (parallel.all_reduce_sum(self._sums) if of_all_workers else self._sums).tolist()
        self._sums = None
        values = {}
        for bucket, (loss, _, count) in enumerate(sums):
            edges = (number * self.num_timesteps // self.num_buckets for number in (bucket, bucket + 1))
            first, after = edges
            if count:
                values[f"loss_t_{first:04d}_{after - 1:04d}"] = loss / count
        total, of_zeros = (sum(row[column] for row in sums) for column in (0, 1))
        return {**values, "relative_loss": total / of_zeros} if of_zeros else values
