"""Noise schedules of discrete-time diffusion: betas in, everything derived from them out.

Sources: Ho et al. 2020 (linear); Nichol & Dhariwal 2021, eq. 17 (cosine).
"""

import math
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["cosine", "linear"]


def betas(schedule: Schedule, num_timesteps: int) -> Tensor:
    """Forward-process variances.

    Returns:
        [num_timesteps] float64, in (0, 1).
    """
    if schedule == "cosine":
        steps = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        alpha_bar = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    scale = 1000 / num_timesteps  # keeps the total noise of Ho et al.'s 1,000 steps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64).clamp(max=0.999)


def strided_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` timesteps spread evenly over [0, num_timesteps), from the noisiest to 0.

    Source: Nichol & Dhariwal 2021, section 4.
    """
    if num_steps == 1:
        return [num_timesteps - 1]
    stride = (num_timesteps - 1) / (min(num_steps, num_timesteps) - 1)
    return [round(index * stride) for index in range(min(num_steps, num_timesteps))][::-1]
