"""The diffusion process shared by all models of the stack: noising, its inversion, losses and the likelihood bound.

Letters: x0 clean sample, x_t noised sample, eps the noise, v the velocity; B batch, C channels, T number of timesteps.
Timesteps t are int64 in [0, T). Arithmetic is float32, or float64 if the samples are. Sources: Ho et al. 2020 (DDPM);
Nichol & Dhariwal 2021 (learned variances); Salimans & Ho 2022 (v).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.config import added, require
from unclip.diffusion import schedules
from unclip.errors import ShapeError

PredictionType = Literal["eps", "x0", "v"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]
LossWeighting = Literal["none", "min_snr", "p2"]
Loss = Literal["l2", "l1", "huber"]
TimestepSampling = Literal["uniform", "loss_aware"]


class Denoised(NamedTuple):
    """Output of a denoiser: its estimate of the clean sample behind x_t."""

    x0: Tensor
    """[B, ...], expected clean sample."""
    variance_fraction: Tensor | None = None
    """[B, ...] in [0, 1], if the model learns variances: log variance of a reverse step, from the posterior's (0) to that of
    beta (1)."""


class Gaussian(NamedTuple):
    mean: Tensor
    """[B, ...]."""
    log_variance: Tensor
    """[B, ...] or [B, 1, ...]."""


class VariationalBound(NamedTuple):
    """Upper bound on the bits per dimension needed to code a sample with the model."""

    prior: Tensor
    """[B], for x_T."""
    terms: Tensor
    """[B, T], for each step t -> t - 1; the first is the reconstruction term."""

    @property
    def total(self) -> Tensor:
        """[B]. Source: Nichol & Dhariwal 2021, eq. 4."""
        return self.prior + self.terms.sum(dim=1)


Predict = Callable[[Tensor, Tensor], Tensor]
"""A network with its conditioning bound: (x_t [B, C, ...], t [B]) -> [B, C, ...], or twice the channels if it also learns
variances."""

Denoiser = Callable[[Tensor, Tensor], Denoised]
"""(x_t [B, ...], t [B]) -> Denoised. The only view that samplers and guidance have of a model."""


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    num_timesteps: int = 1000
    """Steps of the forward process."""
    schedule: schedules.Schedule = "cosine"
    """Noise schedule."""
    prediction_type: PredictionType = "eps"
    """Quantity that the network predicts."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that its last timestep is pure noise; not with eps, which does not determine x0 there."""
    variance: VarianceType = "fixed_small"
    """Variance of reverse steps: the posterior's, beta, or between the two, predicted by the network for every element.
    Learning it needs a network with `outputs_per_channel` times the channels, and images in [-1, 1]."""
    vlb_weight: float = 0.001
    """Weight of the variational bound in the loss (lambda of Nichol & Dhariwal 2021, eq. 16), with learned variances."""
    vlb_only: bool = added(False)
    """Train on the variational bound alone, L_vlb of Nichol & Dhariwal 2021, eq. 4, for images in [-1, 1]; use it with
    `timestep_sampling` "loss_aware" (section 3.3). The loss is then bits per dimension."""
    loss_weighting: LossWeighting = "none"
    """Weights of timesteps in the squared error: uniform, min-SNR (Hang et al. 2023) or P2 (Choi et al. 2022); the last two
    not with zero_terminal_snr."""
    min_snr_gamma: float = 5.0
    """Signal-to-noise ratio above which min-SNR stops increasing the weight of x0's error."""
    p2_gamma: float = 1.0
    """Exponent of P2; 0 = squared error of eps."""
    p2_k: float = 1.0
    """Offset of P2, in units of the signal-to-noise ratio."""
    timestep_sampling: TimestepSampling = "uniform"
    """Sampling of training timesteps: uniform, or by the losses observed there (`unclip/training/timesteps.py`)."""
    loss: Loss = added("l2")
    """Loss of every element of the network's prediction: its squared error, its absolute error, or Huber's, which is half the
    squared error up to 1 and grows like the absolute error beyond (Huber 1964). The variational bound stays as it is."""

    def __post_init__(self) -> None:
        require(self.num_timesteps >= 2, "num_timesteps", self.num_timesteps, "at least 2")
        require(
            not (self.zero_terminal_snr and self.prediction_type == "eps"),
            "prediction_type",
            self.prediction_type,
            "x0 or v with zero_terminal_snr",
        )
        # All weightings shrink with the signal, and the last timestep, where sampling starts, has none: it would not be trained.
        require(
            not (self.zero_terminal_snr and self.loss_weighting != "none"),
            "loss_weighting",
            self.loss_weighting,
            "none with zero_terminal_snr, whose last timestep would have the weight 0; or set zero_terminal_snr = false",
        )
        require(self.vlb_weight >= 0, "vlb_weight", self.vlb_weight, "at least 0")
        weighting = self.loss_weighting
        require(not self.vlb_only or weighting == "none", "loss_weighting", weighting, "none with vlb_only")
        require(self.min_snr_gamma > 0, "min_snr_gamma", self.min_snr_gamma, "above 0")
        require(self.p2_gamma >= 0, "p2_gamma", self.p2_gamma, "at least 0")
        require(self.p2_k > 0, "p2_k", self.p2_k, "above 0")
        has_weights = self.loss_weighting != "none"
        require(
            self.loss == "l2" or not has_weights, "loss", self.loss, f"l2 with loss_weighting {self.loss_weighting}"
        )

    @property
    def noising(self) -> dict[str, Any]:
        """Settings of q(x_t | x_0), which a network of noised images shares with the one that it guides."""
        return {name: getattr(self, name) for name in ("num_timesteps", "schedule", "zero_terminal_snr")}

    @property
    def outputs_per_channel(self) -> int:
        """Channels of the network's output over channels of x_t."""
        return 2 if self.variance == "learned_range" else 1


LOSSES: dict[Loss, Callable[..., Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
"""Name -> (prediction, target, reduction="none") -> loss of every element."""


class GaussianDiffusion:
    """q(x_t | x_0) = N(sqrt(alphas_cumprod_t) x_0, (1 - alphas_cumprod_t) I), and the quantities derived from it.

    The tables betas, alphas_cumprod, loss_weights, ... are [T] float64.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.num_timesteps = config.num_timesteps
        with torch.device("cpu"):  # even if the model is built on the meta device
            self._make_tables(config)

    def _make_tables(self, config: DiffusionConfig) -> None:
        betas = schedules.betas(config.schedule, config.num_timesteps)
        self.betas = schedules.zero_terminal_snr(betas) if config.zero_terminal_snr else betas
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.signal = self.alphas_cumprod.sqrt()
        self.sigma = (1 - self.alphas_cumprod).sqrt()

        previous = torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])
        posterior_variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        # the first is 0, which has no logarithm; Ho et al. use the second instead
        posterior_variance = torch.cat([posterior_variance[1:2], posterior_variance[1:]])
        self.log_posterior_variance = posterior_variance.log()
        self.log_betas = self.betas.log()
        self.log_large_variance = torch.cat([posterior_variance[:1], self.betas[1:]]).log()
        self.posterior_x0_coefficient = previous.sqrt() * self.betas / (1 - self.alphas_cumprod)
        self.posterior_x_t_coefficient = (1 - self.betas).sqrt() * (1 - previous) / (1 - self.alphas_cumprod)
        self.loss_weights = loss_weights(config, self.alphas_cumprod)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t from q(x_t | x_0).

        Args:
            x0: [B, ...] float, clean sample; images in [-1, 1].
            t: [B] int64.
            noise: like x0, standard normal; passed in so that callers control the randomness.

        Returns:
            [B, ...] float32, or float64 if x0 is.

        Raises:
            ShapeError: noise and x0 differ, or t is not [B].

        Source: Ho et al. 2020, eq. 4.
        """
        if noise.shape != x0.shape or t.shape != x0.shape[:1]:
            raise ShapeError(
                f"q_sample: got x0 {tuple(x0.shape)}, noise {tuple(noise.shape)}, t {tuple(t.shape)}, "
                "expected noise like x0 and one t per sample."
            )
        x0 = full_precision(x0)
        return self._at("signal", t, x0) * x0 + self._at("sigma", t, x0) * noise.to(x0.dtype)

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Training target of the network at x_t, [B, ...] float32.

        Source: Salimans & Ho 2022, section 4 (v = alpha eps - sigma x0).
        """
        if self.config.prediction_type == "x0":
            return full_precision(x0)
        if self.config.prediction_type == "eps":
            return full_precision(noise)
        x0, noise = full_precision(x0), full_precision(noise)
        return self._at("signal", t, x0) * noise - self._at("sigma", t, x0) * x0

    def predict_x0(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """x0 implied by the network's prediction, [B, ...] float32. Source: Salimans & Ho 2022, section 4."""
        x_t, prediction = full_precision(x_t), full_precision(prediction)
        if self.config.prediction_type == "x0":
            return prediction
        signal, sigma = self._at("signal", t, x_t), self._at("sigma", t, x_t)
        if self.config.prediction_type == "eps":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def eps_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """Noise that turns x0 into x_t, [B, ...] float32. Source: Ho et al. 2020, eq. 4 solved for eps."""
        x_t = full_precision(x_t)
        return (x_t - self._at("signal", t, x_t) * full_precision(x0)) / self._at("sigma", t, x_t)

    def prediction_of_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """Network's prediction that implies x0, [B, ...] float32; inverse of `predict_x0`."""
        if self.config.prediction_type == "x0":
            return full_precision(x0)
        if self.config.prediction_type == "eps":
            return self.eps_from_x0(x_t, t, x0)
        x_t = full_precision(x_t)
        return (self._at("signal", t, x_t) * x_t - full_precision(x0)) / self._at("sigma", t, x_t)

    def denoiser(self, predict: Predict, clip_range: float | None = None) -> Denoiser:
        """Turn a network with its conditioning bound into a denoiser.

        Args:
            clip_range: clamp x0 to [-clip_range, clip_range]; 1 for images, None for no clamp.

        Raises:
            ShapeError (when called): the network's output does not have `outputs_per_channel` times x_t's channels.
        """

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            prediction, variance_fraction = self._split(predict(x_t, t), x_t)
            x0 = self.predict_x0(x_t, t, prediction)
            return Denoised(x0 if clip_range is None else x0.clamp(-clip_range, clip_range), variance_fraction)

        return denoise

    def loss(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Weighted loss of the network's prediction, its squared error by default; with learned variances, plus the
        variational bound.

        The bound trains only the variances: its x0 is detached. Multiplying by T turns the mean over uniform timesteps into
        the sum over all of them. With `vlb_only` the bound is the whole loss, and nothing is detached.

        Args:
            predict: network with its conditioning bound.
            x0: [B, ...]; t: [B] int64; noise: like x0, standard normal.

        Returns:
            [B] float32.

        Raises:
            ShapeError: as in `q_sample` and `denoiser`.

        Source: Ho et al. 2020, eq. 14; Nichol & Dhariwal 2021, eq. 14-16.
        """
        x_t = self.q_sample(x0, t, noise)
        prediction, variance_fraction = self._split(predict(x_t, t), x_t)
        if self.config.vlb_only:
            denoised = Denoised(self.predict_x0(x_t, t, prediction), variance_fraction)
            return self.num_timesteps * self.vlb_terms(x0, x_t, t, denoised)
        loss = LOSSES[self.config.loss](full_precision(prediction), self.target(x0, t, noise), reduction="none")
        loss = loss.flatten(1).mean(dim=1)  # [B]
        if self.config.loss_weighting != "none":
            loss = loss * self._at("loss_weights", t, loss)
        if variance_fraction is None:
            return loss
        detached = Denoised(self.predict_x0(x_t, t, prediction.detach()), variance_fraction)
        return loss + self.config.vlb_weight * self.num_timesteps * self.vlb_terms(x0, x_t, t, detached)

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | x_t, x_0); at t = 0, where the variance is 0, the log variance is that at t = 1.

        Args:
            x0: [B, ...]; x_t: [B, ...]; t: [B] int64.

        Returns:
            Mean [B, ...] and log variance [B, 1, ...] float32. Source: Ho et al. 2020, eq. 6-7.
        """
        x0, x_t = full_precision(x0), full_precision(x_t)
        mean = self._at("posterior_x0_coefficient", t, x_t) * x0 + self._at("posterior_x_t_coefficient", t, x_t) * x_t
        return Gaussian(mean, self._at("log_posterior_variance", t, x_t))

    def p_posterior(self, denoised: Denoised, x_t: Tensor, t: Tensor) -> Gaussian:
        """p(x_{t-1} | x_t) of the model, with the configured variance.

        Raises:
            ShapeError: variances are learned, but the denoiser returns none.

        Source: Ho et al. 2020, section 3.2; Nichol & Dhariwal 2021, eq. 15.
        """
        mean, small = self.q_posterior(denoised.x0, x_t, t)
        if self.config.variance == "fixed_small":
            return Gaussian(mean, small)
        if self.config.variance == "fixed_large":
            return Gaussian(mean, self._at("log_large_variance", t, mean))
        fraction = learned_fraction(denoised)
        return Gaussian(mean, fraction * self._at("log_betas", t, mean) + (1 - fraction) * small)

    def vlb_terms(self, x0: Tensor, x_t: Tensor, t: Tensor, denoised: Denoised) -> Tensor:
        """One term of the variational bound per sample: KL(q || p) of the step from t; at t = 0, the reconstruction term.

        Args:
            x0: [B, ...] images with 256 levels in [-1, 1].
            x_t: [B, ...]; t: [B] int64; denoised: the model's output at x_t.

        Returns:
            [B] bits per dimension. Source: Nichol & Dhariwal 2021, eq. 4-7.
        """
        p = self.p_posterior(denoised, x_t, t)
        kl = gaussian_kl(self.q_posterior(x0, x_t, t), p).flatten(1).mean(dim=1)  # [B]
        log_likelihood = discretised_gaussian_log_likelihood(full_precision(x0), p).flatten(1).mean(dim=1)  # [B]
        return torch.where(t == 0, -log_likelihood, kl) / math.log(2)

    def prior_bits_per_dim(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)), [B] bits per dimension. Source: Nichol & Dhariwal 2021, eq. 7."""
        x0 = full_precision(x0)
        last = torch.full(x0.shape[:1], self.num_timesteps - 1, device=x0.device)
        log_variance = 2 * self._at("sigma", last, x0).log()
        x_T = Gaussian(self._at("signal", last, x0) * x0, log_variance)
        kl = gaussian_kl(x_T, Gaussian(torch.zeros_like(x0), torch.zeros_like(log_variance)))
        return kl.flatten(1).mean(dim=1) / math.log(2)

    @torch.no_grad()
    def bits_per_dim(
        self, predict: Predict, x0: Tensor, clip_range: float | None = 1.0, generator: torch.Generator | None = None
    ) -> VariationalBound:
        """Variational bound of images, from one noise sample at each of the T timesteps.

        Args:
            predict: network with its conditioning bound; called T times.
            x0: [B, ...] images with 256 levels in [-1, 1].
            clip_range: as in `denoiser`.

        Source: Nichol & Dhariwal 2021, section 3.
        """
        denoise = self.denoiser(predict, clip_range)
        terms = []
        for timestep in range(self.num_timesteps):
            t = torch.full(x0.shape[:1], timestep, device=x0.device)
            noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=full_precision(x0).dtype)
            x_t = self.q_sample(x0, t, noise)
            terms.append(self.vlb_terms(x0, x_t, t, denoise(x_t, t)))
        return VariationalBound(self.prior_bits_per_dim(x0), torch.stack(terms, dim=1))

    def _split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the network's output into its prediction and, if learned, the fraction of the log variance in [0, 1]."""
        expected = (x_t.shape[0], x_t.shape[1] * self.config.outputs_per_channel, *x_t.shape[2:])
        if output.shape != expected:
            raise ShapeError(
                f"denoiser: got {tuple(output.shape)} from the network, expected {expected}. "
                f"With variance {self.config.variance} the network needs {self.config.outputs_per_channel} outputs per channel."
            )
        if self.config.variance != "learned_range":
            return output, None
        prediction, fraction = output.chunk(2, dim=1)
        fraction = (full_precision(fraction) + 1) / 2  # networks start by predicting 0, the middle of the range
        # the gradient passes through the clamp, so that an output outside the range can return to it
        return prediction, fraction.detach().clamp(0, 1) + (fraction - fraction.detach())

    def _at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """Values of a table at t, with the dtype and the number of dimensions of `like`: [B, 1, ...]."""
        return self._table(table, like.device, like.dtype)[t].view((-1,) + (1,) * (like.dim() - 1))

    @functools.cache  # noqa: B019 - a diffusion lives as long as its process
    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        table: Tensor = getattr(self, name)
        return table.to(dtype).to(device)


def full_precision(x: Tensor) -> Tensor:
    """Convert x to float32; float64 is kept. Half precision is for networks, not for the process."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def learned_fraction(denoised: Denoised) -> Tensor:
    """Variance fraction of a model that learns it.

    Raises:
        ShapeError: denoised has none.
    """
    if denoised.variance_fraction is None:
        raise ShapeError(
            "denoiser: got no variance_fraction, expected one with variance learned_range. "
            "Create denoisers with `GaussianDiffusion.denoiser`, and return the fraction from wrappers too."
        )
    return denoised.variance_fraction


def loss_weights(config: DiffusionConfig, alphas_cumprod: Tensor) -> Tensor:
    """Weight of every timestep in the squared error of the network's prediction, [T] float64.

    Weightings are defined for the error of x0. The error of eps is SNR times as large, that of v SNR + 1 times.

    Source: Hang et al. 2023, section 3.4 (min-SNR); Choi et al. 2022, eq. 8 (P2).
    """
    if config.loss_weighting == "none":
        return torch.ones_like(alphas_cumprod)
    snr = schedules.snr(alphas_cumprod)
    if config.loss_weighting == "min_snr":
        x0_weights = snr.clamp(max=config.min_snr_gamma)
    else:
        x0_weights = snr / (config.p2_k + snr) ** config.p2_gamma
    return x0_weights / {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[config.prediction_type]


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of every element, nats."""
    log_ratio = p.log_variance - q.log_variance
    return 0.5 * (log_ratio - 1 + torch.exp(-log_ratio) + (q.mean - p.mean) ** 2 * torch.exp(-p.log_variance))


def discretised_gaussian_log_likelihood(x0: Tensor, p: Gaussian) -> Tensor:
    """Log probability of every pixel's bin under p, nats: 256 bins over [-1, 1], the outer two unbounded.

    The result is at least log(1e-12), so that a very unlikely pixel gives neither infinities nor gradients.

    Source: Ho et al. 2020, eq. 13.
    """
    inverse_std = torch.exp(-0.5 * p.log_variance)
    centred = x0 - p.mean
    # compute both sides in the lower tail, where the normal CDF is far from 1 and loses no digits
    lower_tail = -centred.abs()
    half_bin = 1 / 255
    inside = torch.special.ndtr((lower_tail + half_bin) * inverse_std) - torch.special.ndtr(
        (lower_tail - half_bin) * inverse_std
    )
    darkest = torch.special.ndtr((centred + half_bin) * inverse_std)
    brightest = torch.special.ndtr(-(centred - half_bin) * inverse_std)
    probability = torch.where(x0 < -0.999, darkest, torch.where(x0 > 0.999, brightest, inside))
    return probability.clamp(min=1e-12).log()


def augment_condition(
    diffusion: GaussianDiffusion, condition: Tensor, levels: tuple[int, int], generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Add noise to a conditioning image, so that the network learns not to trust its details.

    Args:
        condition: [B, C, h, w] in [-1, 1]; not changed.
        levels: smallest and largest timestep, inclusive; each sample draws its own. Equal for sampling.

    Returns:
        The noised image [B, C, h, w] and its timesteps [B] int64, which the network must receive too.

    Raises:
        ConfigError: levels are out of order or are not timesteps of the process.

    Source: Ho et al. 2021 (CDM), section 4.2.
    """
    low, high = levels
    require(
        0 <= low <= high < diffusion.num_timesteps, "levels", levels, f"0 <= low <= high < {diffusion.num_timesteps}"
    )
    t = torch.randint(low, high + 1, condition.shape[:1], generator=generator, device=condition.device)
    noise = torch.randn(condition.shape, generator=generator, device=condition.device)
    return diffusion.q_sample(condition, t, noise), t
