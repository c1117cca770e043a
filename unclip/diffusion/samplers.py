"""Samplers: plain functions that turn noise into samples with a `Denoiser`.

All take x_T [B, ...] (standard normal, drawn by the caller) and return x_0 [B, ...] in float32, or in float64 if x_T is.
All visit the same timesteps and end exactly at the clean sample. Letters: B batch, T number of timesteps.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from unclip.config import require
from unclip.diffusion.process import Denoised, Denoiser, GaussianDiffusion, full_precision, learned_fraction
from unclip.diffusion.schedules import strided_timesteps
from unclip.errors import ShapeError

Steps = int | Sequence[int]
"""Number of timesteps, spread evenly; or the timesteps themselves, the noisiest first (`schedules.sectioned_timesteps`)."""

OnStep = Callable[[Tensor, int], Tensor]
"""Called after every step with the sample [B, ...] and its new timestep, -1 for the clean sample. The sampler continues with
the returned sample: film strips record it and return the same tensor; inpainting returns another, with the known pixels."""

NUM_RESAMPLINGS = 10
"""Default number of times that inpainting samples each step, as in Lugmayr et al. 2022, section 5."""

LARGEST_SIGMA = 80.0
"""Largest noise-to-signal ratio at which a Heun step's second call pays off."""


MeanShift = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B]) -> shift of the mean of a reverse step, in units of its variance [B, ...]."""


def undisturbed(x_t: Tensor, t: int) -> Tensor:
    """Default `OnStep`: returns the sample unchanged."""
    return x_t


@torch.no_grad()
def ddpm(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x_T: Tensor,
    num_steps: Steps,
    generator: torch.Generator | None = None,
    on_step: OnStep = undisturbed,
    mean_shift: MeanShift | None = None,
) -> Tensor:
    """Ancestral sampling over strided timesteps, with the configured variance of the diffusion.

    Variances, including learned ones, are those of the respaced process. The last step adds no noise.

    Args:
        mean_shift: from `guidance.gradient`, for guidance by a classifier.

    Raises:
        ShapeError: variances are learned, but the denoiser returns none.

    Source: Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, section 4; Dhariwal & Nichol 2021, algorithm 1 (mean_shift).
    """

    variance = functools.partial(_configured_variance, diffusion)
    return _ancestral(diffusion, denoise, x_T, num_steps, variance, generator, on_step, mean_shift)


@torch.no_grad()
def analytic_dpm(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x_T: Tensor,
    num_steps: Steps,
    mean_squared_score: Tensor,
    max_variance: float = 1.0,
    generator: torch.Generator | None = None,
    on_step: OnStep = undisturbed,
) -> Tensor:
    """Ancestral sampling with the optimal isotropic variance of every step, computed from the scores of the data.

    It is the posterior's variance, plus the variance that the uncertainty of x0 given x_t adds to the posterior's mean.

    Args:
        mean_squared_score: [T], from `estimate_mean_squared_score`.
        max_variance: bound on the variance of x0; 1 for images in [-1, 1] and for standardised embeddings. It applies
            where the score is nearly that of noise, so that the estimate is unreliable.

    Raises:
        ShapeError: mean_squared_score is not [T].

    Source: Bao et al. 2022, eq. 7 (variance) and theorem 2 (bounds).
    """
    if mean_squared_score.shape != (diffusion.num_timesteps,):
        raise ShapeError(
            f"analytic_dpm: got mean_squared_score {tuple(mean_squared_score.shape)}, "
            f"expected ({diffusion.num_timesteps},)."
        )
    squared_scores = mean_squared_score.tolist()

    def variance(step: Step, denoised: Denoised) -> float:
        x0_variance = max_variance
        if step.alpha_bar > 0:
            unexplained = max(1 - (1 - step.alpha_bar) * squared_scores[step.t], 0.0)
            x0_variance = min((1 - step.alpha_bar) / step.alpha_bar * unexplained, max_variance)
        return step.posterior_variance + step.x0_coefficient**2 * x0_variance

    return _ancestral(diffusion, denoise, x_T, num_steps, variance, generator, on_step)


@torch.no_grad()
def estimate_mean_squared_score(
    diffusion: GaussianDiffusion,
    batches: Iterable[tuple[Tensor, Denoiser]],
    generator: torch.Generator | None = None,
    num_measured: int | None = None,
) -> Tensor:
    """Mean squared norm of the score per dimension at every timestep, averaged over the data.

    Args:
        batches: clean samples [B, ...], each with a denoiser bound to their conditioning; every batch is denoised once
            per measured timestep.
        num_measured: number of evenly spread timesteps to measure; between them the log mean square of eps is
            interpolated over the log noise variance. None for all T.

    Returns:
        [T] float64; all that `analytic_dpm` needs to know about the data, saved with the model.

    Raises:
        ShapeError: batches is empty.

    Source: Bao et al. 2022, eq. 8.
    """
    num_timesteps = diffusion.num_timesteps
    measured = strided_timesteps(num_timesteps, num_timesteps if num_measured is None else num_measured)[::-1]
    total = torch.zeros(len(measured), dtype=torch.float64)
    num_samples = 0
    for batch, denoise in batches:
        x0 = full_precision(batch)
        squared_norms = []
        for timestep in measured:
            t = torch.full(x0.shape[:1], timestep, dtype=torch.int64, device=x0.device)
            x_t = diffusion.q_sample(x0, t, _noise_like(x0, generator))
            eps = diffusion.eps_from_x0(x_t, t, denoise(x_t, t).x0)
            squared_norms.append(eps.double().pow(2).mean())
        total += len(x0) * torch.stack(squared_norms).cpu()
        num_samples += len(x0)
    if num_samples == 0:
        raise ShapeError("estimate_mean_squared_score: got no batch, expected at least one.")
    noise_variance = 1 - diffusion.alphas_cumprod
    squared_eps = total / num_samples
    if len(measured) < num_timesteps:
        known = noise_variance[measured].log(), squared_eps.clamp(min=1e-12).log()
        squared_eps = torch.from_numpy(np.exp(np.interp(noise_variance.log(), *known)))  # [T]
    return squared_eps / noise_variance  # the score is -eps / sqrt(1 - alphas_cumprod)


@torch.no_grad()
def ddim(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x_T: Tensor,
    num_steps: Steps,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    on_step: OnStep = undisturbed,
) -> Tensor:
    """Denoising diffusion implicit models; eta = 0 is deterministic, eta = 1 is ancestral sampling (fixed_small).

    First order in the step size. Source: Song et al. 2021, eq. 12 and 16.
    """
    x_t = full_precision(x_T)
    for step in _steps(diffusion, num_steps):
        x0 = denoise(x_t, step.batch(x_t)).x0
        std = eta * step.posterior_variance**0.5
        eps = (x_t - step.alpha_bar**0.5 * x0) / (1 - step.alpha_bar) ** 0.5
        x_t = step.alpha_bar_next**0.5 * x0 + max(1 - step.alpha_bar_next - std**2, 0.0) ** 0.5 * eps
        if std > 0:
            x_t = x_t + std * _noise_like(x_t, generator)
        x_t = on_step(x_t, step.t_next)
    return x_t


@torch.no_grad()
def ddim_inversion(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x0: Tensor,
    num_steps: Steps,
    num_iterations: int = 1,
    on_step: OnStep = undisturbed,
) -> Tensor:
    """Find the noise x_T from which `ddim` with eta = 0 and the same steps samples x0.

    Each step up inverts a step down: it solves that step for x_t by fixed-point iteration from the less noisy sample.

    Args:
        denoise: that of the sampling, with its guidance and thresholding. A step stays invertible where x0 is clamped, as eps
            is computed from the clamped x0; the inverse of other steps would lead elsewhere.
        x0: [B, ...] clean samples.
        num_iterations: 1 is the plain inversion, accurate to first order in the step size; more iterations let sampling
            reproduce x0 more closely. Each calls the denoiser once.
        on_step: called with the timestep just reached.

    Source: Song et al. 2021, section 4.3; Dhariwal & Nichol 2021, appendix F; Pan et al. 2023, section 3 (iterations).
    """
    x_next = full_precision(x0)
    for step in reversed(list(_steps(diffusion, num_steps))):
        x_t = x_next
        for _ in range(num_iterations):
            estimate = denoise(x_t, step.batch(x_t)).x0
            # eps can be computed from x_next or from x_t; choose the form for which the iteration contracts
            if step.alpha_bar < 0.5 and step.alpha_bar_next < 1:
                clean = estimate
                eps = (x_next - step.alpha_bar_next**0.5 * clean) / (1 - step.alpha_bar_next) ** 0.5
            else:
                eps = (x_t - step.alpha_bar**0.5 * estimate) / (1 - step.alpha_bar) ** 0.5
                clean = (x_next - (1 - step.alpha_bar_next) ** 0.5 * eps) / step.alpha_bar_next**0.5
            x_t = step.alpha_bar**0.5 * clean + (1 - step.alpha_bar) ** 0.5 * eps
        x_next = on_step(x_t, step.t)
    return x_next


@torch.no_grad()
def dpm_solver_pp_2m(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x_T: Tensor,
    num_steps: Steps,
    generator: torch.Generator | None = None,
    on_step: OnStep = undisturbed,
) -> Tensor:
    """DPM-Solver++(2M): second order, one call of the denoiser per step.

    x0 is extrapolated linearly in log(signal / sigma) from the current step and the one before. The first and the last step
    cannot be extrapolated and are DDIM's, and so are steps after an `on_step` that changed the sample, as x0 changed with it.
    Deterministic: the generator is not used.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """
    x_t = full_precision(x_T)
    x0_before: Tensor | None = None
    width_before = 0.0
    for step in _steps(diffusion, num_steps):
        x0 = denoise(x_t, step.batch(x_t)).x0
        # infinite for a step from pure noise or to the clean sample
        width = _minus_log(step.sigma_next) - _minus_log(step.sigma)
        along = x0
        if x0_before is not None and step.alpha_bar_next < 1:
            along = x0 + width / width_before / 2 * (x0 - x0_before)
        shrink = ((1 - step.alpha_bar_next) / (1 - step.alpha_bar)) ** 0.5
        x_t = shrink * x_t + (step.alpha_bar_next**0.5 - shrink * step.alpha_bar**0.5) * along
        stepped, x_t = x_t, on_step(x_t, step.t_next)
        x0_before, width_before = x0 if x_t is stepped else None, width
    return x_t


@torch.no_grad()
def heun(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x_T: Tensor,
    num_steps: Steps,
    generator: torch.Generator | None = None,
    on_step: OnStep = undisturbed,
) -> Tensor:
    """Heun's method: second order, two calls of the denoiser per step.

    The equation is dx / dsigma = (x - x0) / sigma for x = x_t / sqrt(alphas_cumprod) and sigma^2 = (1 - alphas_cumprod) /
    alphas_cumprod, on the grid of the timesteps. The step to the clean sample and steps from above the largest sigma of
    Karras et al. are Euler steps, as in DDIM: the cosine schedule falls from 20,000 to below 100 in one step, and pure noise
    has infinite sigma, so the mean of both slopes would be far off. Deterministic: the generator is not used.

    Source: Karras et al. 2022, algorithm 1, eq. 4 and Table 1 (largest sigma).
    """
    x_t = full_precision(x_T)
    for step in _steps(diffusion, num_steps):
        x0 = denoise(x_t, step.batch(x_t)).x0
        slope = (x_t - step.alpha_bar**0.5 * x0) / (1 - step.alpha_bar) ** 0.5  # dx / dsigma, which is eps
        x_next = step.alpha_bar_next**0.5 * x0 + (1 - step.alpha_bar_next) ** 0.5 * slope
        if step.sigma <= LARGEST_SIGMA and step.alpha_bar_next < 1:
            next_t = torch.full_like(step.batch(x_t), step.t_next)
            next_x0 = denoise(x_next, next_t).x0
            next_slope = (x_next - step.alpha_bar_next**0.5 * next_x0) / (1 - step.alpha_bar_next) ** 0.5
            width = step.sigma_next - step.sigma
            x_next = x_next + step.alpha_bar_next**0.5 * width * (next_slope - slope) / 2
        x_t = on_step(x_next, step.t_next)
    return x_t


def keep_known(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x0: Tensor,
    known: Tensor,
    num_steps: Steps,
    num_resamplings: int = NUM_RESAMPLINGS,
    generator: torch.Generator | None = None,
    mean_shift: MeanShift | None = None,
) -> OnStep:
    """Inpainting with any sampler and a denoiser that knows no masks.

    After every step the known part is put back, noised to the sample's timestep. The rest then still fits the known part of
    the step before. So each step is resampled: the sample is noised again and denoised by an ancestral step, which makes the
    rest fit. Without that, the rest is sampled from something between its conditional and its marginal distribution.

    Args:
        x0: [B, ...] clean samples; only the known part is read.
        known: bool, broadcasts to x0; True = keep.
        num_steps: those of the sampler.
        num_resamplings: times that each step is sampled, the sampler's own step included; at least 1.
        mean_shift: that of the sampler, if it has one.

    Source: Lugmayr et al. 2022, eq. 8 and algorithm 1.
    """
    require(num_resamplings >= 1, "num_resamplings", num_resamplings, "at least 1")
    steps = {step.t_next: step for step in _steps(diffusion, num_steps)}
    variance = functools.partial(_configured_variance, diffusion)

    def put_back(x_t: Tensor, t: int) -> Tensor:
        timesteps = torch.full(x_t.shape[:1], t, dtype=torch.int64, device=x_t.device)
        noised = diffusion.q_sample(x0.to(x_t.dtype), timesteps, _noise_like(x_t, generator))
        return torch.where(known, noised, x_t)

    def hold(x_t: Tensor, t: int) -> Tensor:
        if t < 0:
            return torch.where(known, x0.to(x_t.dtype), x_t)
        step, x_next = steps[t], put_back(x_t, t)
        for _ in range(num_resamplings - 1):
            x_t = (1 - step.beta) ** 0.5 * x_next + step.beta**0.5 * _noise_like(x_next, generator)
            x_next = put_back(_ancestral_step(step, denoise, x_t, variance, generator, mean_shift), t)
        return x_next

    return hold


class Sampler(Protocol):
    """Signature of samplers that need only a denoiser."""

    def __call__(
        self,
        diffusion: GaussianDiffusion,
        denoise: Denoiser,
        x_T: Tensor,
        num_steps: Steps,
        *,
        generator: torch.Generator | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor: ...


SamplerName = Literal["ddpm", "ddim", "dpm_solver_pp_2m", "heun", "analytic_dpm"]
"""Samplers that settings can name (`unclip.diffusion.sampling.sample`)."""

SAMPLERS: dict[SamplerName, Sampler] = {"ddpm": ddpm, "ddim": ddim, "dpm_solver_pp_2m": dpm_solver_pp_2m, "heun": heun}
"""Samplers that need only a denoiser; `analytic_dpm` also needs the scores of the data."""


class Step(NamedTuple):
    """One step down of a sampler, from timestep t to the less noisy t_next, which is -1 for the clean sample."""

    t: int
    alpha_bar: float
    """alphas_cumprod at t; 0 at pure noise."""
    t_next: int
    alpha_bar_next: float
    """alphas_cumprod at t_next; 1 at the clean sample."""

    @property
    def beta(self) -> float:
        """Variance of the respaced forward process. Source: Nichol & Dhariwal 2021, eq. 19."""
        return 1 - self.alpha_bar / self.alpha_bar_next

    @property
    def posterior_variance(self) -> float:
        """Source: Ho et al. 2020, eq. 7."""
        return (1 - self.alpha_bar_next) / (1 - self.alpha_bar) * self.beta

    @property
    def x0_coefficient(self) -> float:
        """Factor of x0 in the posterior's mean. Source: Ho et al. 2020, eq. 7."""
        return math.sqrt(self.alpha_bar_next) * self.beta / (1 - self.alpha_bar)

    @property
    def x_t_coefficient(self) -> float:
        """Factor of x_t in the posterior's mean. Source: Ho et al. 2020, eq. 7."""
        return math.sqrt(self.alpha_bar / self.alpha_bar_next) * (1 - self.alpha_bar_next) / (1 - self.alpha_bar)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise relative to the signal at t."""
        return _sigma(self.alpha_bar)

    @property
    def sigma_next(self) -> float:
        return _sigma(self.alpha_bar_next)

    def batch(self, x_t: Tensor) -> Tensor:
        """t for every sample, [B] int64."""
        return torch.full(x_t.shape[:1], self.t, dtype=torch.int64, device=x_t.device)


def _steps(diffusion: GaussianDiffusion, num_steps: Steps) -> Iterator[Step]:
    """Steps from the noisiest timestep to the clean sample.

    Raises:
        ConfigError: timesteps are given that do not decrease, or that the process does not have.
    """
    if isinstance(num_steps, int):
        num_steps = strided_timesteps(diffusion.num_timesteps, num_steps)
    timesteps = [*num_steps, -1]
    decreasing = all(t > t_next for t, t_next in itertools.pairwise([diffusion.num_timesteps, *timesteps]))
    require(
        decreasing and len(num_steps) > 0,
        "num_steps",
        num_steps,
        f"decreasing timesteps below {diffusion.num_timesteps}",
    )
    alpha_bars = [float(diffusion.alphas_cumprod[t]) for t in num_steps] + [1.0]
    pairs = list(zip(timesteps, alpha_bars, strict=True))
    for (t, alpha_bar), (t_next, alpha_bar_next) in itertools.pairwise(pairs):
        yield Step(t, alpha_bar, t_next, alpha_bar_next)


Variance = Callable[[Step, Denoised], Tensor | float]
"""Variance of an ancestral step."""


def _configured_variance(diffusion: GaussianDiffusion, step: Step, denoised: Denoised) -> Tensor | float:
    """Variance of an ancestral step, as the diffusion is configured."""
    if diffusion.config.variance == "fixed_small":
        return step.posterior_variance
    if diffusion.config.variance == "fixed_large":
        return step.beta
    fraction = learned_fraction(denoised)
    return step.beta**fraction * step.posterior_variance ** (1 - fraction)


def _ancestral(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x_T: Tensor,
    num_steps: Steps,
    variance: Variance,
    generator: torch.Generator | None,
    on_step: OnStep,
    mean_shift: MeanShift | None = None,
) -> Tensor:
    x_t = full_precision(x_T)
    for step in _steps(diffusion, num_steps):
        x_t = on_step(_ancestral_step(step, denoise, x_t, variance, generator, mean_shift), step.t_next)
    return x_t


def _ancestral_step(
    step: Step,
    denoise: Denoiser,
    x_t: Tensor,
    variance: Variance,
    generator: torch.Generator | None,
    mean_shift: MeanShift | None,
) -> Tensor:
    """Sample x_{t-1} from a Gaussian with the posterior's mean, shifted if asked, and the given variance."""
    denoised = denoise(x_t, step.batch(x_t))
    mean, of_step = step.x0_coefficient * denoised.x0 + step.x_t_coefficient * x_t, variance(step, denoised)
    if mean_shift is not None:
        mean = mean + of_step * mean_shift(x_t, step.batch(x_t))
    return mean + of_step**0.5 * _noise_like(x_t, generator) if step.alpha_bar_next < 1 else mean


def _sigma(alpha_bar: float) -> float:
    return math.sqrt(1 / alpha_bar - 1) if alpha_bar > 0 else math.inf


def _minus_log(sigma: float) -> float:
    """Lambda of DPM-Solver, log(signal / noise)."""
    return -math.log(sigma) if sigma > 0 else math.inf


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
