import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.diffusion import guidance, samplers
from unclip.diffusion.process import Denoised, Denoiser, DiffusionConfig, GaussianDiffusion, PredictionType
from unclip.errors import ConfigError

DIFFUSION = GaussianDiffusion(DiffusionConfig())
X_T = torch.zeros(2, 1)
T = torch.zeros(2, dtype=torch.int64)


def constant(*values: float, fraction: float | None = None) -> Denoiser:
    """Denoiser that returns the same x0 for every sample."""

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        x0 = torch.tensor(values).expand(len(x_t), len(values))
        return Denoised(x0, None if fraction is None else torch.full_like(x0, fraction))

    return denoise


def forbidden(x_t: Tensor, t: Tensor) -> Denoised:
    raise AssertionError("this denoiser must not be called")


def test_classifier_free_guidance() -> None:
    unguided = guidance.classifier_free(DIFFUSION, constant(1.0, fraction=0.3), forbidden, 1.0)(X_T, T)
    assert unguided.x0.tolist() == [[1.0], [1.0]]
    guided = guidance.classifier_free(DIFFUSION, constant(1.0, fraction=0.3), constant(0.5, fraction=0.9), 3.0)(X_T, T)
    assert guided.x0.tolist() == [[2.0], [2.0]]
    torch.testing.assert_close(guided.variance_fraction, torch.full((2, 1), 0.3))
    assert guidance.classifier_free(DIFFUSION, constant(1.0), constant(0.5), 0.0)(X_T, T).x0.tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 4.0])
def test_guiding_x0_equals_guiding_eps(guidance_scale: float) -> None:
    """Ho & Salimans 2022, eq. 6, as written: (1 + w) eps(c) - w eps, with 1 + w the scale."""
    diffusion = GaussianDiffusion(DiffusionConfig())
    x_t, t = torch.randn(4, 3).double(), torch.tensor([5, 300, 600, 900])
    conditioned, null = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    eps = diffusion.eps_from_x0(x_t, t, conditioned) * guidance_scale
    eps = eps + diffusion.eps_from_x0(x_t, t, null) * (1 - guidance_scale)
    guided = guidance.classifier_free(
        diffusion, lambda x_t, t: Denoised(conditioned), lambda x_t, t: Denoised(null), guidance_scale
    )
    torch.testing.assert_close(guided(x_t, t).x0, diffusion.predict_x0(x_t, t, eps), atol=1e-9, rtol=1e-9)


def test_two_conditions_have_separate_scales() -> None:
    both, first, null = constant(7.0, fraction=0.2), constant(3.0), constant(1.0)

    def guided(first_scale: float, second_scale: float) -> float:
        return (
            guidance.classifier_free_two(DIFFUSION, both, first, null, first_scale, second_scale)(X_T, T).x0[0].item()
        )

    assert guided(1, 1) == 7.0
    assert guided(0, 0) == 1.0
    assert guided(1, 0) == 3.0
    assert guided(2, 3) == 1 + 2 * 2 + 3 * 4
    result = guidance.classifier_free_two(DIFFUSION, both, first, null, 2, 3)(X_T, T)
    torch.testing.assert_close(result.variance_fraction, torch.full((2, 1), 0.2))


@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
@pytest.mark.parametrize("rescale", [0.4, 0.7, 1.0])
def test_f135_rescaling_acts_on_the_prediction_of_the_network(prediction_type: PredictionType, rescale: float) -> None:
    """Lin et al. 2023, eq. 15-16, as written, on what the network returns; x0 only follows."""
    diffusion = GaussianDiffusion(DiffusionConfig(1000, "linear", prediction_type))
    generator = torch.Generator().manual_seed(0)
    x_t, positive, negative = torch.randn(3, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 300, 600, 900])
    guided = guidance.classifier_free(
        diffusion,
        diffusion.denoiser(lambda x_t, t: 0.3 * x_t + 0.9 * positive),
        diffusion.denoiser(lambda x_t, t: 0.3 * x_t + 0.9 * negative),
        7.5,
        rescale,
    )(x_t, t)
    x_pos, x_neg = 0.3 * x_t + 0.9 * positive, 0.3 * x_t + 0.9 * negative
    x_cfg = x_neg + 7.5 * (x_pos - x_neg)
    x_rescaled = torch.stack([cfg * pos.std() / cfg.std() for cfg, pos in zip(x_cfg, x_pos, strict=True)])
    x_final = rescale * x_rescaled + (1 - rescale) * x_cfg
    torch.testing.assert_close(guided.x0, diffusion.predict_x0(x_t, t, x_final), atol=1e-7, rtol=1e-9)


def test_f135_rescaling_equals_that_of_diffusers() -> None:
    """With eps at t = 900, scale 7.5 and rescale 0.7, where a rescaled x0 would have far too little contrast."""
    their = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    diffusion = GaussianDiffusion(DiffusionConfig(1000))
    x_t, noise, other = torch.randn(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.full((2,), 900)
    positive, negative = 0.9 * x_t + 0.1 * noise, 0.9 * x_t + 0.1 * other
    ours = guidance.classifier_free(
        diffusion, diffusion.denoiser(lambda *_: positive), diffusion.denoiser(lambda *_: negative), 7.5, 0.7
    )(x_t, t).x0
    eps = their.rescale_noise_cfg(negative + 7.5 * (positive - negative), positive, guidance_rescale=0.7)
    torch.testing.assert_close(ours, diffusion.predict_x0(x_t, t, eps), atol=1e-7, rtol=1e-9)
    conditional, guided = (
        diffusion.predict_x0(x_t, t, eps) for eps in (positive, negative + 7.5 * (positive - negative))
    )
    of_x0 = guided * (0.3 + 0.7 * conditional.std() / guided.std())
    assert ours.std() > 1.5 * of_x0.std()


def test_two_scales_are_rescaled_alike_and_a_wrong_strength_is_refused() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(prediction_type="v"))
    x_t, t = torch.randn(2, 5, generator=torch.Generator().manual_seed(2)), torch.tensor([100, 800])
    both, first, null = (diffusion.denoiser(lambda x_t, t, n=n: (n + 1) * x_t.roll(n, 1)) for n in range(3))
    plain = guidance.classifier_free_two(diffusion, both, first, null, 4, 3)(x_t, t).x0
    full = guidance.classifier_free_two(diffusion, both, first, null, 4, 3, rescale=1.0)(x_t, t).x0
    v, rescaled, conditional = (diffusion.prediction_of_x0(x_t, t, x0) for x0 in (plain, full, both(x_t, t).x0))
    torch.testing.assert_close(rescaled.std(dim=1), conditional.std(dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(F.normalize(rescaled, dim=1), F.normalize(v, dim=1), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"rescale: got 1.5"):
        guidance.classifier_free(diffusion, both, null, 6.0, rescale=1.5)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.5])
def test_classifier_guidance_samples_the_product_of_model_and_classifier(guidance_scale: float) -> None:
    """For N(0, 1) data, p(y | x_t) has the gradient that turns them into N(0.8, 1) data: guidance moves the mean to 0.8."""
    diffusion = GaussianDiffusion(DiffusionConfig(1000, "linear"))

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(diffusion.alphas_cumprod[t][:, None].sqrt() * x_t)

    def log_probability(x_t: Tensor, t: Tensor) -> Tensor:
        return (0.8 * diffusion.alphas_cumprod[t].sqrt()[:, None] * x_t).sum(dim=1)

    guided = guidance.classifier(diffusion, denoise, log_probability, guidance_scale)
    samples = samplers.ddim(diffusion, guided, torch.tensor([[-1.0], [0.0], [1.0]]).double(), 600)
    # the noisiest timestep still contains a little of the mean, but these x_T do not
    shift = 0.8 * guidance_scale * (1 - diffusion.signal[-1])
    expected = torch.tensor([[-1.0], [0.0], [1.0]]).double() + shift
    torch.testing.assert_close(samples, expected, atol=0.01, rtol=0)


def test_classifier_guidance_shifts_eps_as_in_the_paper() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig())
    x_t, t = torch.randn(3, 2).double(), torch.tensor([10, 500, 990])
    x0 = torch.randn(3, 2).double()
    guided = guidance.classifier(
        diffusion, lambda x_t, t: Denoised(x0, torch.full_like(x0, 0.4)), lambda x_t, t: -(x_t**2).sum(dim=1), 3.0
    )(x_t, t)
    eps = diffusion.eps_from_x0(x_t, t, x0) - 3.0 * (1 - diffusion.alphas_cumprod[t, None]).sqrt() * (-2 * x_t)
    torch.testing.assert_close(guided.x0, diffusion.predict_x0(x_t, t, eps), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(guided.variance_fraction, torch.full_like(x0, 0.4))


def test_classifier_guidance_does_not_change_x0_at_pure_noise() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(10, prediction_type="v", zero_terminal_snr=True))
    guided = guidance.classifier(diffusion, constant(0.3), lambda x_t, t: x_t.sum(dim=1), 2.0)
    assert guided(X_T, torch.tensor([9, 9])).x0.tolist() == constant(0.3)(X_T, T).x0.tolist()
    assert (guided(X_T, torch.tensor([8, 8])).x0 > 0.3).all()


@pytest.mark.parametrize("on_clean_samples", [False, True])
def test_clip_guidance_raises_similarity(on_clean_samples: bool) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(1000, "linear"))
    weight, text_embedding = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([[0.6, 0.8]]).expand(5, 2)

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(diffusion.alphas_cumprod[t][:, None].sqrt().float() * x_t)

    def encode(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x @ weight, dim=1)

    encode_image = guidance.on_x0(denoise, encode) if on_clean_samples else (lambda x_t, t: encode(x_t))
    log_probability = guidance.clip_similarity(encode_image, text_embedding)
    x_T = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def similarity(guidance_scale: float) -> float:
        guided = guidance.classifier(diffusion, denoise, log_probability, guidance_scale)
        samples = samplers.ddim(diffusion, guided, x_T, 30)
        return (encode(samples) * text_embedding).sum(dim=1).mean().item()

    assert similarity(0.0) < similarity(1.0) < similarity(5.0)
    assert similarity(5.0) > similarity(0.0) + 0.3


def test_static_thresholding() -> None:
    clamped = guidance.clamped(constant(3.0, -0.5, -7.0, fraction=0.1), 1.0)(X_T, T)
    assert clamped.x0.tolist() == [[1.0, -0.5, -1.0]] * 2
    torch.testing.assert_close(clamped.variance_fraction, torch.full((2, 3), 0.1))


def test_dynamic_thresholding_scales_saturated_samples_down() -> None:
    assert (
        guidance.dynamically_clamped(constant(4.0, -2.0, 1.0), 1.0, quantile=1.0)(X_T, T).x0.tolist()
        == [[1.0, -0.5, 0.25]] * 2
    )
    within_range = guidance.dynamically_clamped(constant(0.5, -0.2, 0.1), 1.0)(X_T, T)
    torch.testing.assert_close(within_range.x0, constant(0.5, -0.2, 0.1)(X_T, T).x0)
    half = guidance.dynamically_clamped(constant(4.0, -2.0, 1.0, fraction=0.1), 1.0, quantile=0.5)(X_T, T)
    assert half.x0.tolist() == [[1.0, -1.0, 0.5]] * 2 and half.variance_fraction is not None
    assert guidance.dynamically_clamped(constant(40.0, -20.0), 10.0, quantile=1.0)(X_T, T).x0[0].tolist() == [10, -5]
    with pytest.raises(ConfigError, match="quantile: got 0"):
        guidance.dynamically_clamped(constant(1.0), 1.0, quantile=0)


def test_dynamic_thresholding_matches_diffusers_per_sample() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)
    x0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 3, 9]).view(
        4, 1, 1, 1
    )
    ours = guidance.dynamically_clamped(lambda x_t, t: Denoised(x0), 1.0, quantile=0.9)(x0, torch.zeros(4)).x0
    torch.testing.assert_close(ours, scheduler._threshold_sample(x0), atol=1e-6, rtol=1e-6)


def test_guidance_in_an_interval() -> None:
    denoise = guidance.in_interval(constant(1.0), constant(0.0), 100, 200)
    t = torch.tensor([99, 100, 150, 200, 201])
    assert denoise(torch.zeros(5, 1), t).x0.flatten().tolist() == [0, 1, 1, 1, 0]
    only = guidance.in_interval(constant(1.0), forbidden, 0, 10)
    assert only(X_T, T).x0.tolist() == [[1.0], [1.0]]
    never = guidance.in_interval(forbidden, constant(0.0), 5, 10)
    assert never(X_T, T).x0.tolist() == [[0.0], [0.0]]


def test_learned_variances_survive_every_wrapper() -> None:
    """Ancestral sampling with learned variances runs through a chain of all wrappers."""
    diffusion = GaussianDiffusion(DiffusionConfig(20, variance="learned_range"))
    conditional = diffusion.denoiser(lambda x_t, t: torch.cat([x_t, x_t.tanh()], dim=1))
    null = diffusion.denoiser(lambda x_t, t: torch.cat([0.9 * x_t, -x_t], dim=1))
    guided = guidance.classifier_free(diffusion, conditional, null, 3.0, rescale=0.7)
    guided = guidance.classifier(diffusion, guided, lambda x_t, t: x_t.sum(dim=1), 0.1)
    guided = guidance.in_interval(guidance.dynamically_clamped(guided, 1.0), guidance.clamped(conditional, 1.0), 3, 15)
    samples = samplers.ddpm(diffusion, guided, torch.randn(4, 3), 10)
    assert samples.isfinite().all() and samples.abs().max() <= 1
