"""The diffusion process that every model of the stack shares: noising, its inversion, and the training loss.

Letters: x0 clean sample, x_t noised sample, eps the noise, v the velocity; B batch. Timesteps t are int64 in
[0, num_timesteps). Sources: Ho et al. 2020; Salimans & Ho 2022 (v).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from unclip import schedules
from unclip.config import require
from unclip.errors import ShapeError

PredictionType = Literal["eps", "x0", "v"]

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B]) -> the expected x0 [B, ...]. Samplers and guidance know nothing else of a model."""


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    num_timesteps: int = 1000
    """Steps of the forward process."""
    schedule: schedules.Schedule = "cosine"
    """Noise schedule."""
    prediction_type: PredictionType = "eps"
    """What the network predicts."""

    def __post_init__(self) -> None:
        require(self.num_timesteps >= 2, "num_timesteps", self.num_timesteps, "at least 2")


class GaussianDiffusion:
    """q(x_t | x_0) = N(sqrt(alphas_cumprod_t) x_0, (1 - alphas_cumprod_t) I), and what follows from it."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.num_timesteps = config.num_timesteps
        self.betas = schedules.betas(config.schedule, config.num_timesteps)  # [T] float64
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)  # [T] float64

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t from q(x_t | x_0).

        Args:
            x0: [B, ...] float, clean sample; images in [-1, 1].
            t: [B] int64.
            noise: like x0, standard normal; passed in so that callers own the randomness.

        Returns:
            [B, ...] float32.

        Raises:
            ShapeError: noise and x0 differ, or t is not [B].

        Source: Ho et al. 2020, eq. 4.
        """
        if noise.shape != x0.shape or t.shape != x0.shape[:1]:
            raise ShapeError(
                f"q_sample: got x0 {tuple(x0.shape)}, noise {tuple(noise.shape)}, t {tuple(t.shape)}, "
                "expected noise like x0 and one t per sample."
            )
        signal, sigma = self._coefficients(t, x0.dim())
        return signal * x0.float() + sigma * noise.float()

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network must predict from x_t, [B, ...] float32.

        Source: Salimans & Ho 2022, section 4 (v = alpha eps - sigma x0).
        """
        if self.config.prediction_type == "x0":
            return x0.float()
        if self.config.prediction_type == "eps":
            return noise.float()
        signal, sigma = self._coefficients(t, x0.dim())
        return signal * noise.float() - sigma * x0.float()

    def predict_x0(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """x0 that the network's prediction implies, [B, ...] float32."""
        if self.config.prediction_type == "x0":
            return prediction.float()
        signal, sigma = self._coefficients(t, x_t.dim())
        if self.config.prediction_type == "eps":
            return (x_t.float() - sigma * prediction.float()) / signal
        return signal * x_t.float() - sigma * prediction.float()

    def eps_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise that leads from x0 to x_t, [B, ...] float32. Source: Ho et al. 2020, eq. 4 solved for eps."""
        signal, sigma = self._coefficients(t, x_t.dim())
        return (x_t.float() - signal * x0.float()) / sigma

    def loss(self, predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the network's prediction, per sample.

        Args:
            predict: network with its conditioning bound, (x_t, t) -> prediction.

        Returns:
            [B] float32. Source: Ho et al. 2020, eq. 14.
        """
        prediction = predict(self.q_sample(x0, t, noise), t)
        squared_error = (prediction.float() - self.target(x0, t, noise)) ** 2
        return squared_error.flatten(1).mean(dim=1)

    def denoiser(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        clip_range: float | None = None,
    ) -> Denoiser:
        """Turn a network with its conditioning bound into a denoiser.

        Args:
            clip_range: x0 is clamped to [-clip_range, clip_range]; 1 for images, None for no clamp.
        """

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            x0 = self.predict_x0(x_t, t, predict(x_t, t))
            return x0 if clip_range is None else x0.clamp(-clip_range, clip_range)

        return denoise

    def _coefficients(self, t: Tensor, num_dims: int) -> tuple[Tensor, Tensor]:
        """sqrt(alphas_cumprod_t) and sqrt(1 - alphas_cumprod_t), float32 [B, 1, ...]."""
        signal, sigma = self._square_roots(t.device)
        shape = (-1,) + (1,) * (num_dims - 1)
        return signal[t].view(shape), sigma[t].view(shape)

    @functools.cache  # noqa: B019 - a diffusion lives as long as its process
    def _square_roots(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return (
            self.alphas_cumprod.sqrt().float().to(device),
            (1 - self.alphas_cumprod).sqrt().float().to(device),
        )
