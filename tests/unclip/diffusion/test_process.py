import math
from typing import get_args

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from unclip.config import load
from unclip.diffusion import schedules
from unclip.diffusion.process import (
    Denoised,
    DiffusionConfig,
    Gaussian,
    GaussianDiffusion,
    Loss,
    LossWeighting,
    PredictionType,
    VarianceType,
    augment_condition,
    discretised_gaussian_log_likelihood,
    gaussian_kl,
)
from unclip.errors import ConfigError, ShapeError
from unclip.systems.unclip.decoder import DecoderStageConfig
from unclip.training.timesteps import LossAwareTimesteps, TimestepAccuracies, UniformTimesteps, timestep_sampler

SCHEDULES = ("cosine", "linear")
PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_x0_and_eps_are_recovered_from_the_target(prediction: PredictionType, schedule: schedules.Schedule) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(1000, schedule, prediction))
    x0, noise, t = randn(1000, 3), randn(1000, 3, seed=1), torch.arange(1000)
    x_t = diffusion.q_sample(x0, t, noise)
    recovered = diffusion.predict_x0(x_t, t, diffusion.target(x0, t, noise))
    torch.testing.assert_close(recovered, x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(diffusion.eps_from_x0(x_t, t, x0), noise, atol=1e-6, rtol=0)
    target = diffusion.target(x0, t, noise)
    torch.testing.assert_close(diffusion.prediction_of_x0(x_t, t, x0), target, atol=1e-6, rtol=0)


def test_half_precision_inputs_are_computed_in_float32() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig())
    x0, noise, t = torch.ones(2, 3).bfloat16(), torch.ones(2, 3).bfloat16(), torch.tensor([0, 999])
    for x in (diffusion.q_sample(x0, t, noise), diffusion.target(x0, t, noise), diffusion.predict_x0(x0, t, noise)):
        assert x.dtype == torch.float32
    assert diffusion.loss(lambda x_t, t: x_t.bfloat16(), x0, t, noise).dtype == torch.float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_prediction_has_zero_loss(prediction: PredictionType) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(prediction_type=prediction))
    x0, noise, t = torch.randn(8, 5), torch.randn(8, 5), torch.randint(0, 1000, (8,))
    target = diffusion.target(x0, t, noise)
    assert diffusion.loss(lambda x_t, t: target, x0, t, noise).tolist() == [0.0] * 8
    assert (diffusion.loss(lambda x_t, t: target + 1, x0, t, noise) > 0.99).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("l2", (0 + 0.25 + 9 + 1) / 4),
        ("l1", (0 + 0.5 + 3 + 1) / 4),
        ("huber", (0 + 0.125 + 2.5 + 0.5) / 4),  # half the square up to 1, then the magnitude less one half
    ],
)
def test_the_loss_is_that_of_each_element_of_the_prediction(
    prediction: PredictionType, loss: Loss, expected: float
) -> None:
    x0, noise, t = randn(2, 4), randn(2, 4, seed=1), torch.tensor([3, 80])
    error = torch.tensor([0, 0.5, -3, 1], dtype=torch.float64)
    found = {}
    for variance in ("fixed_small", "learned_range"):
        config = DiffusionConfig(100, prediction_type=prediction, variance=variance, loss=loss)
        diffusion = GaussianDiffusion(config)
        output = diffusion.target(x0, t, noise) + error
        fraction = torch.zeros(2, 4 * (config.outputs_per_channel - 1))
        found[variance] = diffusion.loss(lambda x_t, t, o=output, f=fraction: torch.cat([o, f], dim=1), x0, t, noise)
    torch.testing.assert_close(found["fixed_small"], torch.full_like(found["fixed_small"], expected))
    x_t = diffusion.q_sample(x0, t, noise)
    denoised = Denoised(diffusion.predict_x0(x_t, t, output), torch.full((2, 4), 0.5))
    bound = diffusion.vlb_terms(x0, x_t, t, denoised)  # the same whatever the loss
    torch.testing.assert_close(found["learned_range"], expected + 0.001 * 100 * bound)


def test_q_sample_reports_wrong_shapes() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig())
    with pytest.raises(ShapeError, match=r"x0 \(2, 3\), noise \(2, 4\)"):
        diffusion.q_sample(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_timesteps": 1}, "num_timesteps: got 1"),
        ({"vlb_weight": -1.0}, "vlb_weight: got -1.0"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma: got 0.0"),
        ({"p2_gamma": -0.5}, "p2_gamma: got -0.5"),
        ({"p2_k": 0.0}, "p2_k: got 0.0"),
        ({"loss": "huber", "loss_weighting": "p2"}, "loss: got 'huber', expected l2 with loss_weighting p2"),
    ],
)
def test_invalid_configurations_are_rejected(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiffusionConfig(**settings)


# Weights of timesteps


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_a_weighting_gives_the_same_loss_for_every_prediction_type(weighting: LossWeighting) -> None:
    """The same estimate of x0, expressed as eps, x0 or v, has the same loss."""
    x0, noise, error, t = randn(20, 3), randn(20, 3, seed=1), randn(20, 3, seed=2), torch.arange(0, 1000, 50)
    losses = []
    for prediction in PREDICTIONS:
        diffusion = GaussianDiffusion(DiffusionConfig(1000, "linear", prediction, loss_weighting=weighting))
        x_t = diffusion.q_sample(x0, t, noise)
        estimate = diffusion.target(x0 + error, t, diffusion.eps_from_x0(x_t, t, x0 + error))
        losses.append(diffusion.loss(lambda x_t, t, estimate=estimate: estimate, x0, t, noise))
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=1e-6)
    torch.testing.assert_close(losses[2], losses[1], atol=0, rtol=1e-6)


def test_weights_match_the_papers() -> None:
    config = DiffusionConfig(1000, "linear", "eps", loss_weighting="min_snr", min_snr_gamma=5.0)
    diffusion = GaussianDiffusion(config)
    snr = schedules.snr(diffusion.alphas_cumprod)
    torch.testing.assert_close(diffusion.loss_weights, (5 / snr).clamp(max=1))
    p2 = GaussianDiffusion(DiffusionConfig(1000, "linear", "eps", loss_weighting="p2", p2_gamma=0.5, p2_k=2.0))
    torch.testing.assert_close(p2.loss_weights, (2 + snr) ** -0.5)
    x0, noise, t = torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 900])
    torch.testing.assert_close(diffusion.loss(lambda x_t, t: x_t + 1, x0, t, noise), diffusion.loss_weights[t].float())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", get_args(LossWeighting))
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_f136_every_timestep_of_a_configuration_has_a_weight(
    prediction: PredictionType, weighting: LossWeighting, zero_terminal_snr: bool
) -> None:
    """A configuration that gives a timestep the weight 0, so that it is never trained, is refused."""
    chosen = {"prediction_type": prediction, "loss_weighting": weighting, "zero_terminal_snr": zero_terminal_snr}
    refused = zero_terminal_snr and (weighting != "none" or prediction == "eps")
    if not refused:
        weights = GaussianDiffusion(load(DiffusionConfig, chosen)).loss_weights
        assert (weights > 0).all() and weights.isfinite().all()
        return
    with pytest.raises(ConfigError, match=r"^(loss_weighting: got .*zero_terminal_snr|prediction_type: got 'eps')"):
        load(DiffusionConfig, chosen)


def test_f136_the_refusal_names_the_settings_of_a_run() -> None:
    chosen = {"model": {"diffusion": {"prediction_type": "v", "zero_terminal_snr": True, "loss_weighting": "min_snr"}}}
    expected = r"^decoder\.model\.diffusion\.loss_weighting: got 'min_snr', expected none with zero_terminal_snr"
    with pytest.raises(ConfigError, match=expected):
        load(DecoderStageConfig, chosen, "decoder")


# Posteriors and the variational bound


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_follows_bayes_rule(schedule: schedules.Schedule) -> None:
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), a product of two Gaussians."""
    diffusion = GaussianDiffusion(DiffusionConfig(1000, schedule))
    t = torch.arange(1, 1000)
    x0, x_t = randn(999, 2), randn(999, 2, seed=1)
    beta, before = diffusion.betas[t, None], diffusion.alphas_cumprod[t - 1, None]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() * x_t / beta + before.sqrt() * x0 / (1 - before)) / precision
    posterior = diffusion.q_posterior(x0, x_t, t)
    torch.testing.assert_close(posterior.mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(posterior.log_variance, -precision.log(), atol=1e-6, rtol=0)
    first, second = (diffusion.q_posterior(x0[:1], x_t[:1], torch.tensor([t])) for t in (0, 1))
    torch.testing.assert_close(first.mean, x0[:1], atol=1e-12, rtol=0)
    assert first.log_variance == second.log_variance


def test_kl_matches_torch() -> None:
    q, p = Gaussian(randn(50, 2), randn(50, 2, seed=1)), Gaussian(randn(50, 2, seed=2), randn(50, 2, seed=3))
    expected = kl_divergence(*(Normal(g.mean, (g.log_variance / 2).exp()) for g in (q, p)))
    torch.testing.assert_close(gaussian_kl(q, p), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("log_variance", [-9.0, -4.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bin_probabilities_sum_to_one(log_variance: float, dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=dtype)[:, None] / 127.5 - 1  # [256, 1]
    means = torch.tensor([[-1.2, -1.0, 0.0, 0.3, 0.999, 1.0, 1.5]], dtype=dtype)
    p = Gaussian(means, torch.full_like(means, log_variance))
    probability = discretised_gaussian_log_likelihood(levels, p).exp()  # [256, 7]
    torch.testing.assert_close(probability.sum(dim=0), torch.ones(7, dtype=dtype), atol=2e-5, rtol=0)
    normal = Normal(means.double(), math.exp(log_variance / 2))
    bins = normal.cdf(levels[1:-1] + 1 / 255) - normal.cdf(levels[1:-1] - 1 / 255)
    torch.testing.assert_close(probability[1:-1].double(), bins, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_terms_match_closed_forms(variance: VarianceType) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(50, "linear", "x0", variance=variance))
    x0, estimate, fraction = (
        randn(50, 4).clamp(-1, 1),
        randn(50, 4, seed=1).clamp(-1, 1),
        torch.full((50, 4), 0.3).double(),
    )
    t = torch.arange(50)
    x_t = diffusion.q_sample(x0, t, randn(50, 4, seed=2))
    terms = diffusion.vlb_terms(x0, x_t, t, Denoised(estimate, fraction)) * math.log(2)

    q, p_mean = diffusion.q_posterior(x0, x_t, t), diffusion.q_posterior(estimate, x_t, t).mean
    small, beta = q.log_variance.exp(), diffusion.betas[:, None]
    p_variance = {
        "fixed_small": small,
        "fixed_large": torch.cat([small[:1], beta[1:]]),
        "learned_range": beta**0.3 * small**0.7,
    }[variance]
    kl = kl_divergence(Normal(q.mean, small.sqrt()), Normal(p_mean, p_variance.sqrt())).mean(dim=1)
    torch.testing.assert_close(terms[1:], kl[1:], atol=1e-6, rtol=1e-6)
    decoder = Normal(p_mean[0], p_variance[0].sqrt())
    bins = torch.stack([decoder.cdf(x0[0] + 1 / 255), decoder.cdf(x0[0] - 1 / 255)])
    bins = torch.where(x0[0] > 0.999, torch.ones(()), bins[0]) - torch.where(x0[0] < -0.999, torch.zeros(()), bins[1])
    torch.testing.assert_close(terms[0], -bins.clamp(min=1e-12).log().mean(), atol=1e-6, rtol=1e-6)


def test_bits_per_dim_adds_prior_and_terms() -> None:
    """With the exact model of one image, terms at t > 0 are zero; only the prior and the reconstruction cost bits."""
    diffusion = GaussianDiffusion(DiffusionConfig(30, "linear", "x0"))
    x0 = torch.tensor([[[0.0, 0.5]], [[-1.0, 1.0]]])
    bound = diffusion.bits_per_dim(lambda x_t, t: x0, x0, generator=torch.Generator().manual_seed(0))
    assert bound.terms.shape == (2, 30)
    torch.testing.assert_close(bound.terms[:, 1:], torch.zeros(2, 29), atol=1e-5, rtol=0)
    alpha_bar = diffusion.alphas_cumprod[-1]
    x_T = Normal(alpha_bar.sqrt() * x0.double(), (1 - alpha_bar).sqrt())
    prior = kl_divergence(x_T, Normal(0.0, 1.0)).mean(dim=(1, 2)) / math.log(2)
    torch.testing.assert_close(bound.prior.double(), prior, atol=1e-6, rtol=0)
    torch.testing.assert_close(bound.total, bound.prior + bound.terms.sum(dim=1))
    wrong = diffusion.bits_per_dim(lambda x_t, t: -x0, x0, generator=torch.Generator().manual_seed(0))
    assert (wrong.total > bound.total + 1).all()


# Learned variances


def test_hybrid_loss_trains_x0_by_squared_error_and_variances_by_the_bound() -> None:
    config = DiffusionConfig(100, prediction_type="eps", variance="learned_range", vlb_weight=0.01)
    diffusion = GaussianDiffusion(config)
    x0, noise, t = randn(6, 3).clamp(-1, 1), randn(6, 3, seed=1), torch.tensor([0, 1, 5, 40, 80, 99])
    output = randn(6, 6, seed=2).clamp(-0.9, 0.9).requires_grad_()
    loss = diffusion.loss(lambda x_t, t: output, x0, t, noise)
    simple = ((output[:, :3] - noise) ** 2).mean(dim=1)
    x_t = diffusion.q_sample(x0, t, noise)
    denoised = Denoised(diffusion.predict_x0(x_t, t, output[:, :3]), (output[:, 3:] + 1) / 2)
    bound = diffusion.vlb_terms(x0, x_t, t, denoised)
    torch.testing.assert_close(loss, simple + 0.01 * 100 * bound, atol=1e-9, rtol=1e-9)

    (loss_gradient,) = torch.autograd.grad(loss.sum(), output)
    (simple_gradient,) = torch.autograd.grad(simple.sum(), output)
    (bound_gradient,) = torch.autograd.grad(bound.sum(), output)
    torch.testing.assert_close(loss_gradient[:, :3], simple_gradient[:, :3])
    torch.testing.assert_close(loss_gradient[:, 3:], bound_gradient[:, 3:])
    assert (loss_gradient[:, 3:] != 0).all()


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4, 1e15])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_extreme_outputs_give_finite_losses_and_gradients(size: float, prediction: PredictionType) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(1000, prediction_type=prediction, variance="learned_range"))
    t = torch.tensor([0, 1, 2, 500, 998, 999])
    x0 = torch.tensor([-1.0, 1.0, 0.0]).expand(6, 3)
    for sign in (1, -1):
        output = torch.full((6, 6), sign * size).requires_grad_()
        loss = diffusion.loss(lambda x_t, t, output=output: output, x0, t, torch.randn(6, 3))
        (gradient,) = torch.autograd.grad(loss.sum(), output)
        assert loss.isfinite().all() and gradient.isfinite().all()


def test_a_variance_out_of_range_is_clamped_but_has_a_gradient() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(100, prediction_type="x0", variance="learned_range"))
    x_t, t = torch.zeros(1, 2), torch.tensor([50])
    for raw, fraction in ((-1.0, 0.0), (0.0, 0.5), (1.0, 1.0), (7.0, 1.0), (-1e30, 0.0)):
        output = torch.tensor([[0.0, 0.0, raw, raw]], requires_grad=True)
        denoised = diffusion.denoiser(lambda x_t, t, output=output: output)(x_t, t)
        assert denoised.variance_fraction.tolist() == [[fraction, fraction]]
        (gradient,) = torch.autograd.grad(denoised.variance_fraction.sum(), output)
        assert gradient.tolist() == [[0.0, 0.0, 0.5, 0.5]]


def test_the_bound_is_lowest_at_the_true_variance() -> None:
    """With exact x0 the best variance is the posterior's; with an uninformed x0 it is larger."""
    diffusion = GaussianDiffusion(DiffusionConfig(10, prediction_type="x0", variance="learned_range"))
    x0, t = randn(400, 1).clamp(-1, 1), torch.full((400,), 5)
    x_t = diffusion.q_sample(x0, t, randn(400, 1, seed=1))

    def cost(estimate: torch.Tensor, fraction: float) -> float:
        return diffusion.vlb_terms(x0, x_t, t, Denoised(estimate, torch.full_like(x0, fraction))).mean().item()

    assert cost(x0, 0.0) < cost(x0, 0.5) < cost(x0, 1.0)
    assert cost(torch.zeros_like(x0), 0.5) < cost(torch.zeros_like(x0), 0.0)


def test_wrong_output_shapes_are_reported() -> None:
    x_t, t = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    learned = GaussianDiffusion(DiffusionConfig(variance="learned_range"))
    with pytest.raises(ShapeError, match=r"got \(2, 3, 4, 4\) from the network, expected \(2, 6, 4, 4\)"):
        learned.denoiser(lambda x_t, t: x_t)(x_t, t)
    with pytest.raises(ShapeError, match=r"expected \(2, 3, 4, 4\)"):
        GaussianDiffusion(DiffusionConfig()).denoiser(lambda x_t, t: torch.cat([x_t, x_t], dim=1))(x_t, t)
    with pytest.raises(ShapeError, match="no variance_fraction"):
        learned.vlb_terms(x_t, x_t, t, Denoised(x_t))


def test_denoiser_clamps_x0() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(prediction_type="x0"))
    x_t, t = torch.tensor([[3.0, -0.5]]), torch.tensor([10])
    assert diffusion.denoiser(lambda x_t, t: x_t)(x_t, t).x0.tolist() == [[3.0, -0.5]]
    assert diffusion.denoiser(lambda x_t, t: x_t, clip_range=1.0)(x_t, t).x0.tolist() == [[1.0, -0.5]]


# Training timesteps


def test_uniform_timesteps_cover_the_process() -> None:
    sampler = timestep_sampler(DiffusionConfig(8))
    assert isinstance(sampler, UniformTimesteps)
    t, weight = sampler.draw(400, torch.Generator().manual_seed(0))
    assert (t.bincount(minlength=8) > 20).all() and (weight == 1).all()
    sampler.update(t, losses_at(t))
    assert not sampler.state


def losses_at(t: torch.Tensor) -> torch.Tensor:
    return (t.double() + 1) ** 2


def trained_timesteps() -> LossAwareTimesteps:
    sampler = timestep_sampler(DiffusionConfig(8, timestep_sampling="loss_aware"))
    assert isinstance(sampler, LossAwareTimesteps)
    for _ in range(10):
        t = torch.arange(8)
        sampler.update(t, losses_at(t))
    return sampler


def test_loss_aware_timesteps_follow_the_losses_without_bias() -> None:
    sampler = LossAwareTimesteps(8)
    sampler.update(torch.zeros(50, dtype=torch.int64), torch.full((50,), 9.0))
    torch.testing.assert_close(
        sampler.probabilities(), torch.full((8,), 1 / 8).double()
    )  # losses at the other timesteps are not known yet

    sampler = trained_timesteps()
    expected = losses_at(torch.arange(8))
    expected = 0.999 * expected / expected.sum() + 0.001 / 8
    torch.testing.assert_close(sampler.probabilities(), expected)
    t, weight = sampler.draw(20_000, torch.Generator().manual_seed(0))
    assert (t.bincount(minlength=8) / 20_000 - expected).abs().max() < 0.015
    # losses are proportional to the probabilities, so every weighted loss is nearly the mean over uniform timesteps
    weighted = weight * losses_at(t)
    assert weighted.mean().item() == pytest.approx(losses_at(torch.arange(8)).mean().item(), rel=0.01)
    assert weighted.std() < 0.1 * losses_at(torch.arange(8)).std()


def test_loss_aware_timesteps_forget_old_losses() -> None:
    sampler = trained_timesteps()
    for _ in range(10):
        sampler.update(torch.arange(8), torch.ones(8))
    torch.testing.assert_close(sampler.probabilities(), torch.full((8,), 1 / 8).double())


def test_loss_aware_timesteps_are_restored_from_their_state() -> None:
    sampler, restored = trained_timesteps(), LossAwareTimesteps(8)
    for name, tensor in restored.state.items():
        tensor.copy_(sampler.state[name])
    for _ in range(3):
        draws = [s.draw(16, torch.Generator().manual_seed(4)) for s in (sampler, restored)]
        assert torch.equal(draws[0].t, draws[1].t) and torch.equal(draws[0].weight, draws[1].weight)
        for s in (sampler, restored):
            s.update(draws[0].t, torch.rand(16, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(sampler.losses, restored.losses)


# Noise-conditioning augmentation


def test_conditions_are_noised_to_the_returned_level() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(1000, "linear"))
    condition = torch.full((500, 1, 4, 4), 0.5)
    noised, level = augment_condition(diffusion, condition, (100, 300), torch.Generator().manual_seed(0))
    assert level.min() >= 100 and level.max() <= 300 and len(level.unique()) > 100
    noise = diffusion.eps_from_x0(noised, level, condition)
    assert noise.mean().item() == pytest.approx(0, abs=0.05) and noise.std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(condition, torch.full_like(condition, 0.5))
    again = augment_condition(diffusion, condition, (100, 300), torch.Generator().manual_seed(0))
    assert torch.equal(again[0], noised) and torch.equal(again[1], level)
    assert augment_condition(diffusion, condition, (7, 7), torch.Generator())[1].unique().tolist() == [7]
    with pytest.raises(ConfigError, match="levels: got"):
        augment_condition(diffusion, condition, (0, 1000), torch.Generator())


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_training_on_the_bound_alone_minimises_bits_per_dimension(variance: VarianceType) -> None:
    """L_vlb of Nichol & Dhariwal 2021, eq. 4: its mean over all timesteps, and the prior's term, are the bound itself."""
    diffusion = GaussianDiffusion(DiffusionConfig(10, "linear", "eps", variance=variance, vlb_only=True))
    x0 = randn(3, 2, 4, 4).clamp(-1, 1)
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (scale * x_t).repeat(1, diffusion.config.outputs_per_channel, 1, 1).clamp(-0.9, 0.9)

    generator = torch.Generator().manual_seed(0)
    losses = []
    for timestep in range(10):
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        losses.append(diffusion.loss(predict, x0, torch.full((3,), timestep), noise))
    bound = diffusion.bits_per_dim(predict, x0, clip_range=None, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.stack(losses).mean(dim=0) + bound.prior, bound.total)
    (gradient,) = torch.autograd.grad(losses[5].sum(), scale)
    assert gradient != 0  # the bound trains x0, too
    with pytest.raises(ConfigError, match=r"loss_weighting: got 'p2', expected none with vlb_only"):
        DiffusionConfig(vlb_only=True, loss_weighting="p2")


def test_accuracies_are_means_by_range_of_timesteps() -> None:
    accuracies = TimestepAccuracies(100)
    t, loss = torch.tensor([0, 24, 25, 99]), torch.tensor([1.0, 2.0, 4.0, 9.0])
    is_correct, counts = torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False])
    accuracies.add(t, loss, is_correct, torch.full((4,), 3.0), counts)
    accuracies.add(t[:1], loss[:1], is_correct[:1], torch.tensor([6.0]))
    expected = {"loss_t_0000_0024": 4 / 3, "accuracy_t_0000_0024": 2 / 3, "relative_loss": 4 / 12}
    assert accuracies.take() == pytest.approx({**expected, "loss_t_0025_0049": 4.0, "accuracy_t_0025_0049": 1.0})
    assert accuracies.take() == {}
