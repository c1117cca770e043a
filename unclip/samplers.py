"""Samplers: plain functions from noise to samples over a `Denoiser`.

All take x_T [B, ...] (standard normal, owned by the caller) and return x_0 [B, ...] float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from unclip.diffusion import Denoiser, GaussianDiffusion
from unclip.schedules import strided_timesteps


@torch.no_grad()
def ddim(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x_T: Tensor,
    num_steps: int,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Denoising diffusion implicit models; eta = 0 is deterministic, eta = 1 is DDPM's ancestral sampling.

    Source: Song et al. 2021, eq. 12 and 16.
    """
    x_t = x_T.float()
    for t, alpha_bar, alpha_bar_next in _steps(diffusion, num_steps):
        timesteps = torch.full(x_t.shape[:1], t, dtype=torch.int64, device=x_t.device)
        x0 = denoise(x_t, timesteps)
        eps = (x_t - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
        sigma = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)) ** 0.5
        x_t = alpha_bar_next**0.5 * x0 + max(1 - alpha_bar_next - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            x_t = x_t + sigma * torch.randn(x_t.shape, generator=generator, device=x_t.device)
    return x_t


@torch.no_grad()
def ddpm(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x_T: Tensor,
    num_steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ancestral sampling with the posterior's variance, over strided timesteps.

    Source: Ho et al. 2020, eq. 6-7; Nichol & Dhariwal 2021, section 4 (strides). It equals DDIM with eta = 1.
    """
    return ddim(diffusion, denoise, x_T, num_steps, eta=1.0, generator=generator)


def _steps(diffusion: GaussianDiffusion, num_steps: int) -> Iterator[tuple[int, float, float]]:
    """(t, alphas_cumprod at t, alphas_cumprod at the next, less noisy, timestep; 1 after the last)."""
    timesteps = strided_timesteps(diffusion.num_timesteps, num_steps)
    values = [float(diffusion.alphas_cumprod[t]) for t in timesteps] + [1.0]
    yield from zip(timesteps, values[:-1], values[1:], strict=True)
