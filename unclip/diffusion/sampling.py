"""Sampling settings of one diffusion process, and the functions that apply them: `guided`, `limited` and `sample`.

Letters: B batch, T number of timesteps.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unclip.config import require
from unclip.diffusion import guidance, samplers
from unclip.diffusion.process import Denoiser, GaussianDiffusion, full_precision
from unclip.diffusion.samplers import MeanShift, OnStep, SamplerName, Steps, undisturbed
from unclip.diffusion.schedules import strided_timesteps
from unclip.errors import ConfigError

Thresholding = Literal["none", "static", "dynamic"]
"""Bounds on x0 at every sampling step: none, a clamp, or a clamp at each sample's quantile followed by rescaling."""


class Known(NamedTuple):
    """Known part of samples, for inpainting."""

    x0: Tensor
    """[B, ...]; only the known part is read."""
    mask: Tensor
    """bool, broadcasts to x0; True = known."""


@dataclasses.dataclass(frozen=True)
class DiffusionSampling:
    sampler: SamplerName = "ddim"
    """Sampler. `analytic_dpm` needs a model whose mean squared score was measured at the end of its training."""
    num_steps: int = 50
    """Sampling steps."""
    eta: float = 0.0
    """Noise of DDIM's steps: 0 is deterministic, 1 is ancestral sampling; only for the sampler ddim. Source: Song et al.
    2021, eq. 16."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance; 1 = off. Source: Ho & Salimans 2022, eq. 6."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the process in which guidance acts, as two fractions of its timesteps: 0 is the clean sample, 1 pure noise.
    Source: Kynkäänniemi et al. 2024, eq. 5."""
    guidance_rescale: float = 0.0
    """Strength in [0, 1] of rescaling each guided prediction (eps, x0 or v) to the standard deviation of the conditional one;
    0 = off. Source: Lin et al. 2023, eq. 15-16."""
    thresholding: Thresholding = "static"
    """Bounds on x0 after guidance. Source: Saharia et al. 2022 (Imagen), section 2.3."""
    threshold: float | None = None
    """Bound on the magnitude of x0; None uses the model's own, such as 1 for images."""
    threshold_quantile: float = 0.995
    """Quantile of each sample's x0 magnitudes at which dynamic thresholding clamps."""

    def __post_init__(self) -> None:
        require(1 <= self.num_steps <= 100_000, "num_steps", self.num_steps, "1 to 100000")
        require(0 <= self.eta <= 1, "eta", self.eta, "0 to 1")
        require(
            self.eta == 0 or self.sampler == "ddim", "eta", self.eta, f"0 with the sampler {self.sampler}, not ddim"
        )
        require(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "at least 0")
        interval = self.guidance_interval
        in_order = len(interval) == 2 and 0 <= interval[0] <= interval[-1] <= 1
        require(in_order, "guidance_interval", interval, "two fractions of the process in order, such as [0.2, 0.8]")
        require(0 <= self.guidance_rescale <= 1, "guidance_rescale", self.guidance_rescale, "0 to 1")
        require(self.threshold is None or self.threshold > 0, "threshold", self.threshold, "above 0, or none")
        require(0 < self.threshold_quantile <= 1, "threshold_quantile", self.threshold_quantile, "above 0, at most 1")


def guided(
    diffusion: GaussianDiffusion,
    conditional: Denoiser,
    unconditional: Denoiser,
    settings: DiffusionSampling,
    limit: float | None,
) -> Denoiser:
    """Denoiser with classifier-free guidance inside the settings' interval, and thresholding.

    Args:
        conditional, unconditional: plain denoisers, neither guided nor thresholded.
        limit: the model's own bound on x0, used if the settings give none; None for no bound.

    Raises:
        ConfigError: dynamic thresholding has no bound.
    """
    push = guidance.classifier_free(
        diffusion, conditional, unconditional, settings.guidance_scale, settings.guidance_rescale
    )
    return limited(diffusion, push, conditional, settings, limit)


def limited(
    diffusion: GaussianDiffusion,
    push: Denoiser,
    conditional: Denoiser,
    settings: DiffusionSampling,
    limit: float | None,
) -> Denoiser:
    """Denoiser with any kind of guidance inside the settings' interval, and thresholding; see `guided`.

    Args:
        push: guided denoiser.
        conditional: denoiser without guidance, for timesteps outside the interval.
    """
    denoise = push
    if tuple(settings.guidance_interval) != (0, 1) and push is not conditional:
        denoise = guidance.in_interval(push, conditional, *guided_timesteps(diffusion, settings))
    bound = limit if settings.threshold is None else settings.threshold
    if settings.thresholding == "dynamic":
        if bound is None:
            raise ConfigError(
                "threshold: got none, expected a number, because this model has no bound of its own. "
                "Set threshold, or set thresholding to 'none'."
            )
        return guidance.dynamically_clamped(denoise, bound, settings.threshold_quantile)
    if settings.thresholding == "none" or bound is None:
        return denoise
    return guidance.clamped(denoise, bound)


def guided_timesteps(diffusion: GaussianDiffusion, settings: DiffusionSampling) -> tuple[int, int]:
    """First and last timestep of the settings' interval."""
    low, high = (fraction * (diffusion.num_timesteps - 1) for fraction in settings.guidance_interval)
    return math.ceil(low), math.floor(high)


def require_preview_sampler(settings: DiffusionSampling) -> None:
    """Check the sampling settings of a training's previews, at the setting `preview`.

    Raises:
        ConfigError: the sampler needs measurements of the finished model.
    """
    expected = "another sampler: its score is measured after the training"
    require(settings.sampler != "analytic_dpm", "preview.sampler", settings.sampler, expected)


def sample(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x_T: Tensor,
    settings: DiffusionSampling,
    *,
    mean_squared_score: Tensor | None = None,
    start: Tensor | None = None,
    strength: float = 1.0,
    known: Known | None = None,
    num_resamplings: int = samplers.NUM_RESAMPLINGS,
    mean_shift: MeanShift | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep = undisturbed,
) -> Tensor:
    """Run the sampler that the settings name.

    Args:
        denoise: with guidance and thresholding already applied.
        x_T: [B, ...] standard normal.
        mean_squared_score: [T] from `samplers.estimate_mean_squared_score`, for Analytic-DPM.
        start: [B, ...] clean sample to start from, noised with x_T to the timestep given by `strength`; None starts from
            x_T itself.
        strength: fraction of the process applied to the start; 0 returns it unchanged, 1 ignores it. The steps are spread
            over that fraction.
        known: part of the samples to keep, for a denoiser that knows no masks.
        num_resamplings: as in `samplers.keep_known`.
        mean_shift: for the sampler ddpm only; acts inside the settings' interval of guidance.

    Returns:
        [B, ...], as from the sampler itself.

    Raises:
        ConfigError: Analytic-DPM is chosen and mean_squared_score is None.

    Source: Meng et al. 2022 (SDEdit), section 3 (start).
    """
    steps: Steps = settings.num_steps
    if start is not None and strength < 1:
        noisiest = round(strength * diffusion.num_timesteps) - 1
        if noisiest < 0:
            return full_precision(start)
        steps = strided_timesteps(noisiest + 1, settings.num_steps)
        t = torch.full(start.shape[:1], noisiest, dtype=torch.int64, device=start.device)
        x_T = diffusion.q_sample(start, t, x_T)
    shift = None if mean_shift is None else _in_interval(mean_shift, *guided_timesteps(diffusion, settings))
    if known is not None:
        hold = samplers.keep_known(diffusion, denoise, *known, steps, num_resamplings, generator, shift)
        on_step = _after(hold, on_step)
    if settings.sampler == "analytic_dpm":
        if mean_squared_score is None:
            raise ConfigError(
                "sampler: got 'analytic_dpm', which needs the model's mean squared score, but this model was saved without it. "
                "Train it again, which measures the score at the end (with another trainer.seed: a finished model is kept), or "
                "choose another sampler."
            )
        return samplers.analytic_dpm(
            diffusion, denoise, x_T, steps, mean_squared_score, generator=generator, on_step=on_step
        )
    if shift is not None:
        return samplers.ddpm(diffusion, denoise, x_T, steps, generator, on_step, shift)
    if settings.sampler == "ddim":
        return samplers.ddim(diffusion, denoise, x_T, steps, settings.eta, generator, on_step)
    return samplers.SAMPLERS[settings.sampler](diffusion, denoise, x_T, steps, generator=generator, on_step=on_step)


def _after(first: OnStep, then: OnStep) -> OnStep:
    """Apply two hooks in this order."""

    def both(x_t: Tensor, t: int) -> Tensor:
        return then(first(x_t, t), t)

    return both


def _in_interval(mean_shift: MeanShift, t_min: int, t_max: int) -> MeanShift:
    """Mean shift that is 0 at timesteps outside of [t_min, t_max]."""

    def shift(x_t: Tensor, t: Tensor) -> Tensor:
        inside = ((t >= t_min) & (t <= t_max)).view((-1,) + (1,) * (x_t.dim() - 1))  # [B, 1, ...]
        return torch.where(inside, mean_shift(x_t, t), 0.0) if inside.any() else torch.zeros_like(x_t)

    return shift
