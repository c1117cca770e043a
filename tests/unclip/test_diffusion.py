import pytest
import torch

from unclip import guidance, samplers, schedules
from unclip.diffusion import DiffusionConfig, GaussianDiffusion
from unclip.errors import ConfigError, ShapeError

SCHEDULES = ("cosine", "linear")
PREDICTIONS = ("eps", "x0", "v")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_schedules_end_in_noise(schedule: schedules.Schedule, num_timesteps: int) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps, schedule))
    assert ((diffusion.betas > 0) & (diffusion.betas < 1)).all()
    assert (diffusion.alphas_cumprod.diff() < 0).all()
    assert diffusion.alphas_cumprod[-1] < 5e-3


def test_cosine_schedule_is_the_papers() -> None:
    """Nichol & Dhariwal 2021, eq. 17, at half time: cos^2((0.5 + s) / (1 + s) * pi / 2) / f(0)."""
    alphas_cumprod = GaussianDiffusion(DiffusionConfig(1000, "cosine")).alphas_cumprod
    assert alphas_cumprod[499].item() == pytest.approx(0.4938, abs=2e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_q_sample_has_the_mean_and_variance_of_the_forward_process(schedule: schedules.Schedule) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(100, schedule))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.full((40_000, 1), 0.7)
    for t in (0, 50, 99):
        noise = torch.randn(x0.shape, generator=generator)
        x_t = diffusion.q_sample(x0, torch.full((len(x0),), t), noise)
        alpha_bar = diffusion.alphas_cumprod[t].item()
        assert x_t.mean().item() == pytest.approx(0.7 * alpha_bar**0.5, abs=0.02)
        assert x_t.var().item() == pytest.approx(1 - alpha_bar, abs=0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_leads_back_to_x0(prediction) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(1000, "cosine", prediction))
    x0, noise = torch.randn(64, 3, 4, 4), torch.randn(64, 3, 4, 4)
    t = torch.randint(0, 900, (64,))
    x_t = diffusion.q_sample(x0, t, noise)
    recovered = diffusion.predict_x0(x_t, t, diffusion.target(x0, t, noise))
    torch.testing.assert_close(recovered, x0, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(diffusion.eps_from_x0(x_t, t, x0), noise, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_right_prediction_has_no_loss(prediction) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(prediction_type=prediction))
    x0, noise, t = torch.randn(8, 5), torch.randn(8, 5), torch.randint(0, 1000, (8,))
    target = diffusion.target(x0, t, noise)
    assert diffusion.loss(lambda x_t, t: target, x0, t, noise).tolist() == [0.0] * 8
    assert (diffusion.loss(lambda x_t, t: target + 1, x0, t, noise) > 0.99).all()


def test_q_sample_names_wrong_shapes() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig())
    with pytest.raises(ShapeError, match=r"x0 \(2, 3\), noise \(2, 4\)"):
        diffusion.q_sample(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4))


def test_impossible_timesteps_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_timesteps: got 1"):
        DiffusionConfig(num_timesteps=1)


def gaussian_denoiser(diffusion: GaussianDiffusion, mean: float, std: float):
    """The exact E[x0 | x_t] when the data are N(mean, std^2)."""

    def denoise(x_t, t):
        alpha_bar = diffusion.alphas_cumprod[t].float()[:, None]
        gain = alpha_bar.sqrt() * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        return mean + gain * (x_t - alpha_bar.sqrt() * mean)

    return denoise


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samplers_draw_the_data_distribution(sampler: str, schedule: schedules.Schedule) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(1000, schedule))
    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(20_000, 1, generator=generator)
    draw = getattr(samplers, sampler)
    options = {"generator": generator} if sampler == "ddpm" else {}
    samples = draw(diffusion, gaussian_denoiser(diffusion, 2.0, 0.5), x_T, 250, **options)
    assert samples.mean().item() == pytest.approx(2.0, abs=0.03)
    assert samples.std().item() == pytest.approx(0.5, abs=0.03)


def test_a_sampler_visits_distinct_timesteps_from_noise_to_data() -> None:
    seen = []
    diffusion = GaussianDiffusion(DiffusionConfig(50))

    def denoise(x_t, t):
        seen.append(int(t[0]))
        return torch.zeros_like(x_t)

    samplers.ddim(diffusion, denoise, torch.randn(1, 2), 10)
    assert seen == sorted(set(seen), reverse=True)
    assert (seen[0], seen[-1], len(seen)) == (49, 0, 10)


def test_guidance() -> None:
    def conditional(x_t, t):
        return x_t + 1

    def unconditional(x_t, t):
        raise AssertionError("not needed")

    x_t, t = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
    assert guidance.classifier_free(conditional, unconditional, 1.0)(x_t, t).tolist() == [[1.0], [1.0]]
    guided = guidance.classifier_free(conditional, lambda x_t, t: x_t, 3.0)
    assert guided(x_t, t).tolist() == [[3.0], [3.0]]
    assert guidance.clamped(guided, 1.0)(x_t, t).tolist() == [[1.0], [1.0]]
