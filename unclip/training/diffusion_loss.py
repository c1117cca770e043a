"""Loss of a diffusion process on a batch: timesteps, noise, weights, and statistics of the losses by timestep."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from unclip.diffusion import samplers
from unclip.diffusion.process import GaussianDiffusion, Predict
from unclip.training.timesteps import TimestepLosses, UniformTimesteps, timestep_sampler

MEASURED_TIMESTEPS = 32
"""Number of timesteps at which the mean squared score of a finished model is measured; values between are interpolated."""


class Draw(NamedTuple):
    """Random inputs of the diffusion loss of one batch."""

    t: Tensor
    """Timestep of each sample, [B]."""
    weight: Tensor
    """Weight of each sample's loss, [B]."""
    noise: Tensor
    """Standard normal, like x0."""
    training: bool


class DiffusionLoss:
    """Diffusion process of an objective, with its timestep sampler and the losses by timestep."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion
        self.timesteps = timestep_sampler(diffusion.config)
        self.uniform = UniformTimesteps(diffusion.config.num_timesteps)
        self._unlearned: list[tuple[Tensor, Tensor]] = []  # t and losses of the step's micro-batches
        self.losses = {training: TimestepLosses(diffusion.config.num_timesteps) for training in (True, False)}

    def draw(self, x0: Tensor, generator: torch.Generator, training: bool) -> Draw:
        """Draw timesteps and noise. Outside of training, timesteps are uniform and teach the sampler nothing."""
        t, weight = (self.timesteps if training else self.uniform).draw(len(x0), generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        return Draw(t, weight, noise, training)

    def mean_loss(self, predict: Predict, x0: Tensor, draw: Draw) -> Tensor:
        """Weighted mean loss of a micro-batch; the timestep sampler learns from the unweighted losses at `learn`."""
        losses = self.diffusion.loss(predict, x0, draw.t, draw.noise)  # [B]
        if draw.training and self.timesteps.state:
            self._unlearned.append((draw.t, losses.detach()))
        with torch.no_grad():
            zeros = x0.new_zeros(()).expand(
                len(x0), self.diffusion.config.outputs_per_channel * x0.shape[1], *x0.shape[2:]
            )
            loss_of_zeros = self.diffusion.loss(lambda *_: zeros, x0, draw.t, draw.noise)
        self.losses[draw.training].add(draw.t, losses.detach(), loss_of_zeros)
        return (draw.weight * losses).mean()

    def learn(self, step_taken: bool) -> None:
        """Teach the timestep sampler the losses of the step that ends, or forget them; see `objective.Learning`."""
        unlearned, self._unlearned = self._unlearned, []
        if step_taken and unlearned:
            t, losses = (torch.cat(parts) for parts in zip(*unlearned, strict=True))
            self.timesteps.update(t, losses)

    def take(self, training: bool) -> dict[str, float]:
        """Return and reset the statistics of the losses, as `TimestepLosses.take`."""
        return self.losses[training].take(all_ranks=training)


def measure_scores(
    diffusion: GaussianDiffusion, predict: Predict, x0: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Measure `mean_squared_score` [T] of a finished model, for Analytic-DPM; see `objective.Measuring`.

    Args:
        predict: network, with the conditioning for x0 bound.
        x0: [B, ...], clean samples of a few training rows.
    """
    batches = [(x0, diffusion.denoiser(predict))]
    score = samplers.estimate_mean_squared_score(diffusion, batches, generator, MEASURED_TIMESTEPS)
    return {"mean_squared_score": score}


def bernoulli(x0: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    return torch.rand(x0.shape[:1], generator=generator, device=x0.device) < probability


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
