"""The loss of a diffusion process on a batch: timesteps, noise, weights, and the losses that were met at each timestep."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from unclip.diffusion import samplers
from unclip.diffusion.process import GaussianDiffusion, Predict
from unclip.training.timesteps import TimestepLosses, UniformTimesteps, timestep_sampler

MEASURED_TIMESTEPS = 64
"""Timesteps at which a finished model's mean squared score is measured; between them it is interpolated."""


class Draw(NamedTuple):
    """What a batch of a diffusion loss is computed with."""

    t: Tensor
    """Timestep of each sample, [B]."""
    weight: Tensor
    """Of each sample's loss, [B]."""
    noise: Tensor
    """Like x0."""
    training: bool


class DiffusionLoss:
    """The diffusion process of an objective: which timesteps it trains, and what the losses there were."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion
        self.timesteps = timestep_sampler(diffusion.config)
        self.uniform = UniformTimesteps(diffusion.config.num_timesteps)
        self.losses = {training: TimestepLosses(diffusion.config.num_timesteps) for training in (True, False)}

    def draw(self, x0: Tensor, generator: torch.Generator, training: bool) -> Draw:
        """Outside of training timesteps are uniform, and nothing is learned from their losses."""
        t, weight = (self.timesteps if training else self.uniform).draw(len(x0), generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        return Draw(t, weight, noise, training)

    def mean_loss(self, predict: Predict, x0: Tensor, draw: Draw) -> Tensor:
        """The loss of a batch from those of its samples; timesteps learn from them as they are."""
        losses = self.diffusion.loss(predict, x0, draw.t, draw.noise)  # [B]
        if draw.training:
            self.timesteps.update(draw.t, losses)
        with torch.no_grad():
            zeros = x0.new_zeros(()).expand(
                len(x0), self.diffusion.config.outputs_per_channel * x0.shape[1], *x0.shape[2:]
            )
            loss_of_zeros = self.diffusion.loss(lambda *_: zeros, x0, draw.t, draw.noise)
        self.losses[draw.training].add(draw.t, losses.detach(), loss_of_zeros)
        return (draw.weight * losses).mean()

    def take(self, training: bool) -> dict[str, float]:
        return self.losses[training].take(of_all_workers=training)


def measure_scores(
    diffusion: GaussianDiffusion, predict: Predict, x0: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """`mean_squared_score` [T] of a finished model, which Analytic-DPM needs; see `objective.Measuring`.

    Args:
        predict: network with the conditioning of x0 bound.
        x0: [B, ...], a few training rows.
    """
    batches = [(x0, diffusion.denoiser(predict))]
    score = samplers.estimate_mean_squared_score(diffusion, batches, generator, MEASURED_TIMESTEPS)
    return {"mean_squared_score": score}


def bernoulli(x0: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    return torch.rand(x0.shape[:1], generator=generator, device=x0.device) < probability


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
