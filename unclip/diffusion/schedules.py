"""Noise schedules of discrete-time diffusion.

Letters: T number of timesteps. Timestep 0 is the least noisy, T - 1 the noisiest. Everything is float64 on the CPU.
Sources: Ho et al. 2020 (linear); Nichol & Dhariwal 2021 (cosine, respacing); Rombach et al. 2022 (scaled_linear); Lin et al.
2023 (zero terminal SNR).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from unclip.config import require

Schedule = Literal["cosine", "linear", "scaled_linear"]

BETA_ENDS: dict[Schedule, tuple[float, float]] = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
"""First and last beta of 1,000 timesteps."""


def betas(schedule: Schedule, num_timesteps: int) -> Tensor:
    """Forward-process variances, [T] float64 in (0, 1).

    Source: Nichol & Dhariwal 2021, eq. 17 (cosine); Ho et al. 2020, section 4 (linear), scaled to T timesteps; the published
    settings of Rombach et al. 2022 for Stable Diffusion (scaled_linear: square roots on a line).
    """
    if schedule == "cosine":
        steps = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        alpha_bar = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    scale = 1000 / num_timesteps  # keeps the total noise of 1,000 steps
    first, last = (scale * beta for beta in BETA_ENDS[schedule])
    if schedule == "linear":
        return torch.linspace(first, last, num_timesteps, dtype=torch.float64).clamp(max=0.999)
    return torch.linspace(first**0.5, last**0.5, num_timesteps, dtype=torch.float64).square().clamp(max=0.999)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale a schedule so that its last timestep is pure noise; returns its betas [T].

    The first alphas_cumprod is kept; the last becomes 0 and the last beta 1.

    Source: Lin et al. 2023, algorithm 1.
    """
    signal = torch.cumprod(1 - betas, dim=0).sqrt()  # [T]
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alphas_cumprod = signal**2
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / previous


def snr(alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod), same shape. Source: Kingma et al. 2021, eq. 2."""
    return alphas_cumprod / (1 - alphas_cumprod)


def strided_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` timesteps spread evenly over [0, num_timesteps), from the noisiest to 0.

    One step gives the noisiest timestep only. More steps than timesteps give all timesteps.

    Raises:
        ConfigError: num_steps is below 1.

    Source: Nichol & Dhariwal 2021, section 4.
    """
    require(num_steps >= 1, "num_steps", num_steps, "at least 1")
    if num_steps == 1:
        return [num_timesteps - 1]
    stride = (num_timesteps - 1) / (min(num_steps, num_timesteps) - 1)
    return [round(index * stride) for index in range(min(num_steps, num_timesteps))][::-1]


def sectioned_timesteps(num_timesteps: int, section_counts: Sequence[int]) -> list[int]:
    """Timesteps with a separate density in each of equal sections of [0, num_timesteps), from the noisiest down.

    Args:
        section_counts: steps in each section, the least noisy section first; if the division leaves a remainder, the
            first sections are one timestep longer. A section of one step takes its least noisy timestep.

    Raises:
        ConfigError: a section is given no steps, or more steps than it has timesteps.

    Source: Nichol & Dhariwal 2021, section 4 and its published code (sections of one step).
    """
    require(len(section_counts) >= 1, "section_counts", tuple(section_counts), "at least one section")
    size, remainder = divmod(num_timesteps, len(section_counts))
    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(section_counts):
        length = size + (section < remainder)
        require(1 <= count <= length, f"section_counts[{section}]", count, f"1 to {length} steps")
        chosen = [0] if count == 1 else strided_timesteps(length, count)
        timesteps = [start + t for t in chosen] + timesteps
        start += length
    return timesteps


def respaced_betas(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> Tensor:
    """Variances of the shorter process that visits only `timesteps`, in their order.

    Args:
        alphas_cumprod: [T], of the full process.
        timesteps: the noisiest first; the last one steps to the clean sample.

    Returns:
        [len(timesteps)] float64. Source: Nichol & Dhariwal 2021, eq. 19.
    """
    visited = alphas_cumprod[list(timesteps)]
    return 1 - visited / torch.cat([visited[1:], visited.new_ones(1)])
