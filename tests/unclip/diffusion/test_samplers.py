"""Samplers on Gaussian data, whose denoiser and probability flow have closed forms, and parity with diffusers."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unclip.diffusion import guidance, samplers, schedules
from unclip.diffusion.process import (
    Denoised,
    Denoiser,
    DiffusionConfig,
    GaussianDiffusion,
    PredictionType,
    VarianceType,
)
from unclip.diffusion.samplers import undisturbed
from unclip.errors import ConfigError, ShapeError

MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
ROOT = torch.tensor([[0.8, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.3]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T
BASIS = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()  # an affine map is determined by its values here


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def marginal(alpha_bar: Tensor, covariance: Tensor = COVARIANCE) -> Tensor:
    """Covariance of x_t."""
    return alpha_bar * covariance + (1 - alpha_bar) * torch.eye(len(covariance)).double()


def gaussian_denoiser(diffusion: GaussianDiffusion, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE) -> Denoiser:
    """Exact denoiser, E[x0 | x_t]."""

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        alpha_bar = diffusion.alphas_cumprod[t[0]]
        gain = alpha_bar.sqrt() * covariance @ torch.linalg.inv(marginal(alpha_bar, covariance))
        return Denoised((mean + (x_t.double() - alpha_bar.sqrt() * mean) @ gain.T).to(x_t.dtype))

    return denoise


def flow(x: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor) -> Tensor:
    """Probability flow of the Gaussian data from one noise level to another."""
    gain = power(marginal(alpha_bar_next), 0.5) @ power(marginal(alpha_bar), -0.5)
    return alpha_bar_next.sqrt() * MEAN + (x - alpha_bar.sqrt() * MEAN) @ gain.T


def sample_at_zero(name: samplers.SamplerName, diffusion: GaussianDiffusion, num_steps: int) -> Tensor:
    """Image of BASIS under the sampler's map from the noisiest timestep to timestep 0."""
    seen: dict[int, Tensor] = {}

    def keep(x_t: Tensor, t: int) -> Tensor:
        seen[t] = x_t
        return x_t

    samplers.SAMPLERS[name](diffusion, gaussian_denoiser(diffusion), BASIS, num_steps, on_step=keep)
    return seen[0]


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm_solver_pp_2m", 2), ("heun", 2)])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("pure_noise", [False, True])
def test_error_falls_with_the_order_of_the_sampler(
    name: samplers.SamplerName, order: int, schedule: schedules.Schedule, pure_noise: bool
) -> None:
    """1,024 is a multiple of the number of strides, 64 or 256, so strides are exact."""
    diffusion = GaussianDiffusion(DiffusionConfig(1025, schedule, "v", zero_terminal_snr=pure_noise))
    exact = flow(BASIS, diffusion.alphas_cumprod[-1], diffusion.alphas_cumprod[0])
    coarse, fine = ((sample_at_zero(name, diffusion, n) - exact).abs().max().item() for n in (65, 257))
    assert math.log(coarse / fine, 4) > order - 0.12
    assert fine < {1: 1e-2, 2: 2e-3}[order]


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp_2m", "heun"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_steps", [1, 2, 25, 250])
def test_deterministic_samplers_recover_mean_and_covariance(
    name: samplers.SamplerName, schedule: schedules.Schedule, num_steps: int
) -> None:
    """The map is affine, x_0 = mean + gain x_T, so no Monte Carlo is needed."""
    diffusion = GaussianDiffusion(DiffusionConfig(1000, schedule))
    mapped = samplers.SAMPLERS[name](diffusion, gaussian_denoiser(diffusion), BASIS, num_steps)
    mean, gain = mapped[0], (mapped[1:] - mapped[:1]).T
    bound = {1: 0.8, 2: 0.8, 25: 0.2, 250: 0.02}[num_steps]
    # the last timestep of the linear schedule keeps sqrt(alphas_cumprod) = 0.006 of the mean
    assert (mean - MEAN).abs().max() < 0.02
    assert (gain @ gain.T - COVARIANCE).abs().max() < bound


@pytest.mark.parametrize("name", [*samplers.SAMPLERS, "ddim, eta 1", "ddim, eta 0.5", "fixed_large", "analytic"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_samplers_recover_the_data_distribution(name: str, schedule: schedules.Schedule) -> None:
    """The Monte Carlo error of 20,000 samples is 0.006 for the mean and 0.007 for variances; 0.03 allows for step error."""
    variance: VarianceType = "fixed_large" if name == "fixed_large" else "fixed_small"
    diffusion = GaussianDiffusion(DiffusionConfig(1000, schedule, variance=variance))
    sampler = {
        **samplers.SAMPLERS,
        "ddim, eta 1": functools.partial(samplers.ddim, eta=1.0),
        "ddim, eta 0.5": functools.partial(samplers.ddim, eta=0.5),
        "fixed_large": samplers.ddpm,
        "analytic": functools.partial(samplers.analytic_dpm, mean_squared_score=mean_squared_score(diffusion)),
    }[name]
    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(20_000, 3, generator=generator)
    samples = sampler(diffusion, gaussian_denoiser(diffusion), x_T, 250, generator=generator)
    assert samples.dtype == torch.float32
    torch.testing.assert_close(samples.mean(dim=0).double(), MEAN, atol=0.03, rtol=0)
    torch.testing.assert_close(samples.T.cov().double(), COVARIANCE, atol=0.03, rtol=0)


def mean_squared_score(diffusion: GaussianDiffusion, covariance: Tensor = COVARIANCE) -> Tensor:
    """Closed form: the trace of the inverse covariance of x_t, divided by the number of dimensions."""
    return torch.stack([marginal(a, covariance).inverse().trace() / len(covariance) for a in diffusion.alphas_cumprod])


def test_the_mean_squared_score_is_estimated_from_data() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(20))
    generator = torch.Generator().manual_seed(0)
    data = MEAN + torch.randn(6000, 3, generator=generator).double() @ ROOT.T
    batches = [(batch, gaussian_denoiser(diffusion)) for batch in data.split(2000)]
    estimate = samplers.estimate_mean_squared_score(diffusion, batches, generator)
    torch.testing.assert_close(estimate, mean_squared_score(diffusion), atol=0, rtol=0.05)
    with pytest.raises(ShapeError, match="no batch"):
        samplers.estimate_mean_squared_score(diffusion, [])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_steps", [3, 5, 20])
def test_analytic_variance_is_exact_for_isotropic_data(schedule: schedules.Schedule, num_steps: int) -> None:
    """Samples have the true variance with any number of steps; with the posterior's variance alone it is too small."""
    diffusion = GaussianDiffusion(DiffusionConfig(1000, schedule))
    isotropic = 0.6 * torch.eye(2).double()
    denoise = gaussian_denoiser(diffusion, MEAN[:2], isotropic)
    score = mean_squared_score(diffusion, isotropic)
    noise = torch.randn(40_000, 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    analytic = samplers.analytic_dpm(diffusion, denoise, noise, num_steps, score, generator=generator)
    assert analytic.var().item() == pytest.approx(0.6 + MEAN[:2].var().item() / 2, abs=0.02)
    plain = samplers.ddpm(diffusion, denoise, noise, num_steps, generator)
    assert (plain.T.cov().double() - isotropic).abs().max() > 2 * (analytic.T.cov().double() - isotropic).abs().max()


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_analytic_variance_is_bounded_where_the_estimate_is_unreliable(zero_terminal_snr: bool) -> None:
    """Without a bound, a 1 % error of the score gives a variance of hundreds at the cosine schedule's noisiest step."""
    diffusion = GaussianDiffusion(DiffusionConfig(1000, "cosine", "v", zero_terminal_snr=zero_terminal_snr))
    score = mean_squared_score(diffusion) * 0.99
    seen: list[Tensor] = []

    def keep(x_t: Tensor, t: int) -> Tensor:
        seen.append(x_t)
        return x_t

    x_T = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    samplers.analytic_dpm(diffusion, gaussian_denoiser(diffusion), x_T, 10, score, generator=generator, on_step=keep)
    assert all(x_t.std() < 2 for x_t in seen)
    with pytest.raises(ShapeError, match=r"got mean_squared_score \(10,\), expected \(1000,\)"):
        samplers.analytic_dpm(diffusion, gaussian_denoiser(diffusion), x_T, 10, score[:10])


def test_learned_variances_are_exact_for_isotropic_data() -> None:
    """The optimal variance of each step, as a fraction between posterior and beta, in a process of 12 steps."""
    diffusion = GaussianDiffusion(DiffusionConfig(12, "linear", "x0", variance="learned_range"))
    isotropic = 0.6 * torch.eye(2).double()
    exact = gaussian_denoiser(diffusion, MEAN[:2], isotropic)
    steps = {step.t: step for step in samplers._steps(diffusion, 12)}

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        step = steps[int(t[0])]
        if step.t == 0:
            return exact(x_t, t)._replace(variance_fraction=torch.zeros_like(x_t))
        x0_variance = 0.6 * (1 - step.alpha_bar) / (step.alpha_bar * 0.6 + 1 - step.alpha_bar)
        optimal = step.posterior_variance + step.x0_coefficient**2 * x0_variance
        fraction = math.log(optimal / step.posterior_variance) / math.log(step.beta / step.posterior_variance)
        assert 0 <= fraction <= 1
        return exact(x_t, t)._replace(variance_fraction=torch.full_like(x_t, fraction))

    generator = torch.Generator().manual_seed(0)
    seen: dict[int, Tensor] = {}

    def keep(x_t: Tensor, t: int) -> Tensor:
        seen[t] = x_t
        return x_t

    x_T = torch.randn(40_000, 2, generator=generator)
    samplers.ddpm(diffusion, denoise, x_T, 12, generator, keep)
    for t in range(11):
        expected = diffusion.alphas_cumprod[t] * isotropic + (1 - diffusion.alphas_cumprod[t]) * torch.eye(2)
        torch.testing.assert_close(seen[t].T.cov().double(), expected, atol=0.03, rtol=0)
    with pytest.raises(ShapeError, match="no variance_fraction"):
        samplers.ddpm(diffusion, exact, x_T[:2], 3)


# Inversion


def test_inversion_then_sampling_reproduces_the_image() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(1000))
    denoise = gaussian_denoiser(diffusion)
    x0 = MEAN + torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).double() @ ROOT.T

    def error(num_steps: int, num_iterations: int) -> float:
        x_T = samplers.ddim_inversion(diffusion, denoise, x0, num_steps, num_iterations)
        return (samplers.ddim(diffusion, denoise, x_T, num_steps) - x0).abs().max().item()

    assert error(50, 40) < 1e-6
    assert error(50, 3) < error(50, 1) / 2
    assert error(400, 1) < error(100, 1) / 3 < 0.05


def test_f139_inversion_of_clamped_steps_needs_the_same_clamps() -> None:
    """Sampling that clamps x0 reproduces samples that were inverted with the clamps, and no others."""
    diffusion = GaussianDiffusion(DiffusionConfig(1000))
    free = gaussian_denoiser(diffusion)
    clamped = guidance.clamped(free, 0.9)
    x0 = (MEAN + torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).double() @ ROOT.T).clamp(-0.9, 0.9)

    def error(inverted_with: Denoiser) -> float:
        x_T = samplers.ddim_inversion(diffusion, inverted_with, x0, 50, 60)
        return (samplers.ddim(diffusion, clamped, x_T, 50) - x0).abs().max().item()

    assert error(clamped) < 1e-4 and error(free) > 0.05


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_inversion_reaches_pure_noise(schedule: schedules.Schedule) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(1000, schedule, "v", zero_terminal_snr=True))
    denoise = gaussian_denoiser(diffusion)
    x_T = samplers.ddim_inversion(diffusion, denoise, BASIS, 200, 15)
    torch.testing.assert_close(samplers.ddim(diffusion, denoise, x_T, 200), BASIS, atol=1e-6, rtol=0)
    exact = flow(BASIS, torch.tensor(1.0).double(), torch.tensor(0.0).double())
    torch.testing.assert_close(x_T, exact, atol=0.1, rtol=0)


# Steps and hooks


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_sampler_visits_distinct_timesteps_from_noise_to_data(name: samplers.SamplerName) -> None:
    """The sample passed to on_step after the last step is the result."""
    visited: list[int] = []
    reached: list[int] = []
    seen: list[Tensor] = []
    diffusion = GaussianDiffusion(DiffusionConfig(50))

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        visited.extend(set(t.tolist()))
        return Denoised(0.3 * x_t)

    def watch(x_t: Tensor, t: int) -> Tensor:
        reached.append(t)
        seen.append(x_t)
        return x_t

    result = samplers.SAMPLERS[name](diffusion, denoise, torch.randn(3, 2), 10, on_step=watch)
    timesteps = schedules.strided_timesteps(50, 10)
    assert list(dict.fromkeys(visited)) == timesteps
    assert reached == [*timesteps[1:], -1]
    assert torch.equal(result, seen[-1])
    torch.testing.assert_close(result, 0.3 * seen[-2])  # exactly the clean sample


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_timesteps_can_be_given(name: samplers.SamplerName) -> None:
    sampler, diffusion = samplers.SAMPLERS[name], GaussianDiffusion(DiffusionConfig(100))
    denoise, x_T = gaussian_denoiser(diffusion), torch.randn(4, 3)
    given = schedules.sectioned_timesteps(100, (7, 3))
    visited: list[int] = []

    def record(x_t: Tensor, t: Tensor) -> Denoised:
        visited.append(int(t[0]))
        return denoise(x_t, t)

    sampler(diffusion, record, x_T, given, generator=torch.Generator().manual_seed(0))
    assert list(dict.fromkeys(visited)) == given
    first, second = (
        sampler(diffusion, denoise, x_T, steps, generator=torch.Generator().manual_seed(0))
        for steps in (9, schedules.strided_timesteps(100, 9))
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("timesteps", [[], [5, 9], [5, 5], [10, 3], [3, -1]])
def test_invalid_timesteps_are_rejected(timesteps: list[int]) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(10))
    with pytest.raises(ConfigError, match="num_steps: got"):
        samplers.ddim(diffusion, gaussian_denoiser(diffusion), torch.randn(1, 3), timesteps)


PAIR = torch.tensor([[0.5, 0.48], [0.48, 0.5]]).double()
"""Covariance of two dimensions that correlate by 0.96."""


def inpainted_pair(name: str, schedule: schedules.Schedule = "cosine", **resampling: int) -> Tensor:
    """Samples [2000, 2] in 50 steps, with the first dimension held at 0.9."""
    diffusion, generator = GaussianDiffusion(DiffusionConfig(1000, schedule)), torch.Generator().manual_seed(0)
    denoise = gaussian_denoiser(diffusion, torch.zeros(2).double(), PAIR)
    x0, known = torch.tensor([[0.9, 0.0]]).expand(2000, 2), torch.tensor([True, False])
    hold = samplers.keep_known(diffusion, denoise, x0, known, 50, **resampling, generator=generator)
    x_T = torch.randn(2000, 2, generator=generator)
    sampler = {
        **samplers.SAMPLERS,
        "analytic": functools.partial(samplers.analytic_dpm, mean_squared_score=mean_squared_score(diffusion, PAIR)),
    }[name]
    filled = sampler(diffusion, denoise, x_T, 50, generator=generator, on_step=hold)
    assert torch.equal(filled[:, 0], x0[:, 0])
    return filled


@pytest.mark.parametrize("name", [*samplers.SAMPLERS, "analytic"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_f132_inpainting_samples_the_conditional_distribution(name: str, schedule: schedules.Schedule) -> None:
    """Oracle: a normal distribution with mean 0.9 * 0.48 / 0.5 and variance 0.5 - 0.48^2 / 0.5."""
    second = inpainted_pair(name, schedule)[:, 1]
    assert second.mean().item() == pytest.approx(0.9 * 0.48 / 0.5, abs=0.03)
    assert second.var().item() == pytest.approx(0.5 - 0.48**2 / 0.5, abs=0.02)


def test_f132_without_resampling_the_rest_does_not_fit() -> None:
    assert inpainted_pair("ddim", num_resamplings=1)[:, 1].mean() < 0.6
    with pytest.raises(ConfigError, match="num_resamplings: got 0, expected at least 1"):
        inpainted_pair("ddim", num_resamplings=0)


def test_multistep_samplers_forget_their_history_if_a_hook_changes_the_sample() -> None:
    """Then each step is DDIM's; a hook that only looks on changes nothing."""
    diffusion = GaussianDiffusion(DiffusionConfig(1000))
    denoise, x_T = gaussian_denoiser(diffusion), torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()

    def run(sampler: Any, on_step: samplers.OnStep) -> Tensor:
        return sampler(diffusion, denoise, x_T, 10, on_step=on_step)  # type: ignore[no-any-return]

    def moved(x_t: Tensor, t: int) -> Tensor:
        return x_t + 0.1 * t / 1000

    assert torch.equal(run(samplers.dpm_solver_pp_2m, lambda x_t, t: x_t), run(samplers.dpm_solver_pp_2m, undisturbed))
    torch.testing.assert_close(run(samplers.dpm_solver_pp_2m, moved), run(samplers.ddim, moved))


def test_eta_one_is_ancestral_sampling() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(1000))
    denoise, x_T = gaussian_denoiser(diffusion), torch.randn(8, 3).double()
    first = samplers.ddpm(diffusion, denoise, x_T, 20, torch.Generator().manual_seed(3))
    second = samplers.ddim(diffusion, denoise, x_T, 20, 1.0, torch.Generator().manual_seed(3))
    torch.testing.assert_close(first, second, atol=1e-9, rtol=0)


# Parity with diffusers over a whole run, with a strongly nonlinear network

X_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
THEIR_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def network(x_t: Tensor, t: Tensor, outputs: int = 1) -> Tensor:
    prediction = torch.tanh(x_t.roll(1, dims=2)) * 0.5 + 0.3 * torch.cos(3 * x_t + t.view(-1, 1, 1, 1) / 300)
    return torch.cat([prediction, torch.sin(5 * x_t)], dim=1) if outputs == 2 else prediction


def their_run(
    scheduler: Any, diffusion: GaussianDiffusion, outputs: int = 1, scale: float = 1.0, **options: Any
) -> Tensor:
    """Sample with a scheduler of diffusers, in double precision, so that rounding hides no difference."""
    set_double_precision(scheduler, diffusion)
    generator = torch.Generator().manual_seed(5)
    if "generator" in options:
        options["generator"] = generator
    x_t = X_T * scale
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x_t, t)
        output = network(x_in, t.expand(len(x_t)).to(torch.int64), outputs)
        x_t = scheduler.step(output, t, x_t, **options).prev_sample
    return x_t


def set_double_precision(scheduler: Any, diffusion: GaussianDiffusion) -> None:
    scheduler.betas, scheduler.alphas = diffusion.betas, 1 - diffusion.betas
    scheduler.alphas_cumprod = diffusion.alphas_cumprod


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_matches_diffusers(
    prediction: PredictionType, variance: VarianceType, schedule: schedules.Schedule
) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = DiffusionConfig(1000, schedule, prediction, variance=variance)
    scheduler = diffusers.DDPMScheduler(
        1000,
        beta_schedule=THEIR_SCHEDULE[schedule],
        prediction_type=THEIR_PREDICTION[prediction],
        variance_type=variance,
        clip_sample=True,
    )
    scheduler.set_timesteps(timesteps=schedules.strided_timesteps(1000, 12))
    diffusion = GaussianDiffusion(config)
    theirs = their_run(scheduler, diffusion, config.outputs_per_channel, generator=None)
    denoise = diffusion.denoiser(functools.partial(network, outputs=config.outputs_per_channel), clip_range=1.0)
    ours = samplers.ddpm(diffusion, denoise, X_T, 12, torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_ddpm_matches_published_unclip_pipelines(variance: VarianceType, prediction: PredictionType) -> None:
    diffusers = pytest.importorskip("diffusers")
    their_variance = {"fixed_small": "fixed_small_log"}.get(variance, variance)
    scheduler = diffusers.UnCLIPScheduler(
        1000, variance_type=their_variance, prediction_type=THEIR_PREDICTION[prediction]
    )
    scheduler.set_timesteps(25)
    config = DiffusionConfig(1000, "cosine", prediction, variance=variance)
    diffusion = GaussianDiffusion(config)
    set_double_precision(scheduler, diffusion)
    generator, x_t = torch.Generator().manual_seed(5), X_T
    for t, before in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        output = network(x_t, t.expand(2), config.outputs_per_channel)
        # at the last step the published pipelines pass None, which means t - 1 = -1 there
        x_t = scheduler.step(output, int(t), x_t, before, generator).prev_sample
    denoise = diffusion.denoiser(functools.partial(network, outputs=config.outputs_per_channel), clip_range=1.0)
    ours = samplers.ddpm(diffusion, denoise, X_T, 25, torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, x_t, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_matches_diffusers(prediction: PredictionType, eta: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        1000, beta_schedule="linear", prediction_type=THEIR_PREDICTION[prediction], clip_sample=False
    )
    scheduler.set_timesteps(20)
    diffusion = GaussianDiffusion(DiffusionConfig(1000, "linear", prediction))
    theirs = their_run(scheduler, diffusion, eta=eta, generator=None)
    timesteps = scheduler.timesteps.tolist()
    denoise, generator = diffusion.denoiser(network), torch.Generator().manual_seed(5)
    ours = samplers.ddim(diffusion, denoise, X_T, timesteps, eta, generator)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("num_steps", [6, 20])
def test_dpm_solver_matches_diffusers(prediction: PredictionType, num_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, beta_start=1e-4, beta_end=0.02, prediction_type=THEIR_PREDICTION[prediction]
    )
    timesteps = schedules.strided_timesteps(1000, num_steps)
    scheduler.set_timesteps(timesteps=timesteps)
    diffusion = GaussianDiffusion(DiffusionConfig(1000, "linear", prediction))
    ours = samplers.dpm_solver_pp_2m(diffusion, diffusion.denoiser(network), X_T, timesteps)
    torch.testing.assert_close(ours, their_run(scheduler, diffusion), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_heun_matches_diffusers(prediction: PredictionType) -> None:
    """The run starts below the largest sigma, because ours takes Euler steps above it."""
    diffusers = pytest.importorskip("diffusers")
    timesteps = schedules.strided_timesteps(900, 12)
    scheduler = diffusers.HeunDiscreteScheduler(
        1000, beta_start=1e-4, beta_end=0.02, prediction_type=THEIR_PREDICTION[prediction]
    )
    scheduler.set_timesteps(timesteps=timesteps)
    diffusion = GaussianDiffusion(DiffusionConfig(1000, "linear", prediction))
    scale = float(diffusion.alphas_cumprod[899]) ** -0.5  # theirs works with x_t / sqrt(alphas_cumprod)
    sigmas = torch.cat([(1 / diffusion.alphas_cumprod[timesteps] - 1).sqrt(), torch.zeros(1)])
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])  # in double precision
    ours = samplers.heun(diffusion, diffusion.denoiser(network), X_T, timesteps)
    torch.testing.assert_close(ours, their_run(scheduler, diffusion, scale=scale), atol=1e-6, rtol=1e-6)
