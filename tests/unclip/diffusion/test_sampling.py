"""Sampling settings: each has exactly its documented effect."""

import dataclasses

import pytest
import torch
from torch import Tensor

from unclip.config import load, to_dict
from unclip.diffusion import guidance, samplers, sampling
from unclip.diffusion.process import Denoised, Denoiser, DiffusionConfig, GaussianDiffusion
from unclip.diffusion.sampling import DiffusionSampling
from unclip.errors import ConfigError

DIFFUSION = GaussianDiffusion(DiffusionConfig(num_timesteps=200))
NOISE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.full((4,), 100)


def scaled(factor: float) -> Denoiser:
    return lambda x_t, t: Denoised(factor * x_t + 0.01 * t.view(-1, 1, 1, 1) / 200)


CONDITIONAL, UNCONDITIONAL = scaled(0.9), scaled(-0.4)


def guided_x0(t: Tensor = T, limit: float | None = 1.0, **settings: object) -> Tensor:
    values = DiffusionSampling(**{"guidance_scale": 3.0, "thresholding": "none", **settings})  # type: ignore[arg-type]
    return sampling.guided(DIFFUSION, CONDITIONAL, UNCONDITIONAL, values, limit)(NOISE, t).x0


def run(seed: int = 0, score: Tensor | None = None, x_T: Tensor = NOISE, **settings: object) -> Tensor:
    values = DiffusionSampling(**{"num_steps": 6, **settings})  # type: ignore[arg-type]
    denoise = sampling.limited(DIFFUSION, CONDITIONAL, CONDITIONAL, values, 1.0)
    generator = torch.Generator().manual_seed(seed)
    return sampling.sample(DIFFUSION, denoise, x_T, values, mean_squared_score=score, generator=generator)


def test_thresholding_bounds_x0() -> None:
    free = guided_x0()
    assert free.abs().max() > 3
    assert torch.equal(guided_x0(thresholding="static"), free.clamp(-1, 1))  # the model's bound
    assert torch.equal(guided_x0(thresholding="static", threshold=2.0), free.clamp(-2, 2))
    assert torch.equal(guided_x0(thresholding="static", limit=None), free)
    thresholded = guided_x0(thresholding="dynamic", threshold_quantile=0.9)
    for sample, expected in zip(thresholded, free, strict=True):
        limit = expected.abs().flatten().quantile(0.9)
        torch.testing.assert_close(sample, expected.clamp(-limit, limit) / limit)
    assert thresholded.abs().max() <= 1 + 1e-6
    assert not torch.allclose(thresholded, guided_x0(thresholding="dynamic", threshold_quantile=1.0))
    with pytest.raises(ConfigError, match="threshold: got none, expected a number"):
        guided_x0(thresholding="dynamic", limit=None)


def test_guidance_acts_only_in_its_interval() -> None:
    guided, conditional = guided_x0(), CONDITIONAL(NOISE, T).x0
    torch.testing.assert_close(guided, UNCONDITIONAL(NOISE, T).x0 + 3 * (conditional - UNCONDITIONAL(NOISE, T).x0))
    for interval, inside in {(0.0, 1.0): True, (0.5, 0.51): True, (0.0, 0.5): False, (0.51, 1.0): False}.items():
        assert torch.equal(guided_x0(guidance_interval=interval), guided if inside else conditional), interval
    # timestep 100 of 199 is at a fraction of 0.5025
    first, last = (torch.full((4,), t) for t in (0, 199))
    assert torch.equal(guided_x0(first, guidance_interval=(0.0, 0.5)), guided_x0(first))
    assert torch.equal(guided_x0(last, guidance_interval=(0.5, 1.0)), guided_x0(last))
    # an interval without timesteps turns guidance off
    assert torch.equal(guided_x0(guidance_interval=(0.501, 0.502)), guided_x0(guidance_scale=1.0))


def test_rescaled_guidance_keeps_the_standard_deviation_of_each_sample() -> None:
    def std(x0: Tensor) -> Tensor:
        """Standard deviation of eps, which the network predicts."""
        return DIFFUSION.eps_from_x0(NOISE, T, x0).flatten(1).std(dim=1)

    conditional, guided = std(CONDITIONAL(NOISE, T).x0), std(guided_x0())
    assert (guided > 2 * conditional).all()
    torch.testing.assert_close(std(guided_x0(guidance_rescale=1.0)), conditional)
    torch.testing.assert_close(std(guided_x0(guidance_rescale=0.4)), 0.6 * guided + 0.4 * conditional)


def test_eta_is_the_noise_of_ddim() -> None:
    assert torch.equal(run(seed=1), run(seed=2))
    assert not torch.allclose(run(seed=1, eta=0.5), run(seed=2, eta=0.5))
    assert torch.equal(run(seed=1, eta=0.5), run(seed=1, eta=0.5))
    torch.testing.assert_close(run(seed=1, eta=1.0), run(seed=1, sampler="ddpm"))  # Song et al. 2021, section 4.1
    with pytest.raises(ConfigError, match=r"eta: got 0\.5, expected 0 with the sampler ddpm"):
        DiffusionSampling(sampler="ddpm", eta=0.5)


def test_every_sampler_name_selects_its_function() -> None:
    denoise = sampling.limited(DIFFUSION, CONDITIONAL, CONDITIONAL, DiffusionSampling(), 1.0)
    for name, function in samplers.SAMPLERS.items():
        expected = function(DIFFUSION, denoise, NOISE, 6, generator=torch.Generator().manual_seed(0))
        assert torch.equal(run(sampler=name), expected), name


def test_analytic_dpm_recovers_the_variance_of_data_in_few_steps() -> None:
    variance = 0.25

    def exact(x_t: Tensor, t: Tensor) -> Denoised:
        signal = DIFFUSION.alphas_cumprod[t].view(-1, 1).to(x_t.dtype)
        return Denoised(signal.sqrt() * variance / (signal * variance + 1 - signal) * x_t)

    data = variance**0.5 * torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    scores = [
        samplers.estimate_mean_squared_score(DIFFUSION, [(data, exact)], torch.Generator().manual_seed(2), num)
        for num in (None, 32)
    ]
    true_score = 1 / (variance * DIFFUSION.alphas_cumprod + 1 - DIFFUSION.alphas_cumprod)
    for score in scores:  # measured at all timesteps and at some
        torch.testing.assert_close(score, true_score, rtol=0.03, atol=0)
    x_T = torch.randn(4000, 8, generator=torch.Generator().manual_seed(3))

    def error(name: samplers.SamplerName) -> float:
        settings = DiffusionSampling(sampler=name, num_steps=5)
        generator = torch.Generator().manual_seed(4)
        samples = sampling.sample(DIFFUSION, exact, x_T, settings, mean_squared_score=scores[1], generator=generator)
        return abs(float(samples.var()) - variance)

    assert error("analytic_dpm") < error("ddpm") / 3


def test_analytic_dpm_needs_a_measured_score() -> None:
    with pytest.raises(ConfigError, match=r"sampler: got 'analytic_dpm', .* Train it again"):
        run(sampler="analytic_dpm")


def test_a_start_goes_through_the_fraction_of_the_process_given_by_strength() -> None:
    start, settings = NOISE.flip(0).clamp(-1, 1), DiffusionSampling(num_steps=6)
    seen: list[tuple[Tensor, int]] = []

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        seen.append((x_t, int(t[0])))
        return CONDITIONAL(x_t, t)

    def run_from_start(strength: float) -> Tensor:
        seen.clear()
        return sampling.sample(DIFFUSION, denoise, NOISE, settings, start=start, strength=strength)

    assert torch.equal(run_from_start(0.0), start) and not seen
    assert torch.equal(run_from_start(1.0), samplers.ddim(DIFFUSION, CONDITIONAL, NOISE, 6))
    run_from_start(0.5)
    assert [t for _, t in seen] == [99, 79, 59, 40, 20, 0]  # the same number of steps over half of the process
    torch.testing.assert_close(seen[0][0], DIFFUSION.q_sample(start, torch.full((4,), 99), NOISE))
    run_from_start(0.01)
    assert [t for _, t in seen] == [1, 0]


def test_f132_known_parts_are_held_and_then_shown_to_the_hook() -> None:
    mask = torch.zeros(4, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    known, seen = sampling.Known(NOISE.flip(0).clamp(-1, 1), mask), list[Tensor]()

    def run_known(num_resamplings: int) -> Tensor:
        seen.clear()
        return sampling.sample(
            DIFFUSION,
            CONDITIONAL,
            NOISE,
            DiffusionSampling(num_steps=6),
            known=known,
            num_resamplings=num_resamplings,
            generator=torch.Generator().manual_seed(0),
            on_step=lambda x_t, t: seen.append(x_t) or x_t,  # type: ignore[func-returns-value]
        )

    once, often = run_known(1), run_known(4)
    assert len(seen) == 6 and torch.equal(seen[-1], often)
    for samples in (once, often):
        assert torch.equal(samples[..., :4], known.x0[..., :4])
    assert not torch.allclose(once[..., 4:], often[..., 4:], atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps: got 0, expected 1 to 100000"),
        ({"eta": 1.5}, "eta: got 1.5, expected 0 to 1"),
        ({"guidance_scale": -1.0}, "guidance_scale: got -1.0"),
        ({"guidance_interval": [0.5]}, r"guidance_interval: got \(0.5,\), expected two fractions"),
        ({"guidance_interval": [0.8, 0.2]}, "guidance_interval: got .* in order"),
        ({"guidance_interval": [0.0, 1.5]}, "guidance_interval: got"),
        ({"guidance_rescale": 1.5}, "guidance_rescale: got 1.5, expected 0 to 1"),
        ({"thresholding": "statik"}, "thresholding: got 'statik'. Did you mean 'static'"),
        ({"threshold": 0.0}, "threshold: got 0.0, expected above 0"),
        ({"threshold_quantile": 0.0}, "threshold_quantile: got 0.0"),
    ],
)
def test_invalid_settings_are_rejected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(DiffusionSampling, changes)


def test_f132_a_shift_of_the_mean_guides_the_resampling_too() -> None:
    """Oracle: a standard normal distribution tilted by exp(x) has the mean 1, whatever is known of another dimension."""
    diffusion = GaussianDiffusion(DiffusionConfig(variance="fixed_large"))
    settings, generator = DiffusionSampling("ddpm", num_steps=50), torch.Generator().manual_seed(0)
    held = sampling.Known(torch.zeros(2000, 2), torch.tensor([[True, False]]))

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(diffusion.alphas_cumprod[t].sqrt().float().view(-1, 1) * x_t)

    def tilted(mean_shift: samplers.MeanShift | None) -> float:
        x_T = torch.randn(2000, 2, generator=generator)
        samples = sampling.sample(
            diffusion, denoise, x_T, settings, known=held, mean_shift=mean_shift, generator=generator
        )
        return samples[:, 1].mean().item()

    assert abs(tilted(None)) < 0.1
    # E[exp(x0) | x_t] is exp(sqrt(alpha_bar) x_t) times a constant
    log_probability = lambda x_t, t: (diffusion.alphas_cumprod[t].sqrt() * x_t[:, 1]).float()  # noqa: E731
    assert tilted(guidance.gradient(log_probability, 1.0)) == pytest.approx(1, abs=0.1)


def test_settings_survive_json() -> None:
    settings = DiffusionSampling(guidance_interval=(0.2, 0.8), threshold=2.0)
    assert load(DiffusionSampling, to_dict(settings)) == settings
    assert dataclasses.replace(settings, guidance_interval=(0.0, 1.0)) != settings
