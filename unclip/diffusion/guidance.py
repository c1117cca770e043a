"""Guidance: functions that wrap denoisers in new denoisers.

Affine guidance is written for x0, which is affine in eps and v at a fixed x_t. Rescaling is not affine, so it acts on the
quantity that the network predicts. A guided denoiser returns the variance of the conditional one. Letters: B batch, E width
of an embedding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unclip.config import require
from unclip.diffusion.process import Denoised, Denoiser, GaussianDiffusion, full_precision

LogProbability = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B]) -> log probability of the condition, up to a constant, nats [B]; differentiable in x_t."""


def classifier_free(
    diffusion: GaussianDiffusion,
    conditional: Denoiser,
    unconditional: Denoiser,
    guidance_scale: float,
    rescale: float = 0.0,
) -> Denoiser:
    """Push the conditional denoiser away from the unconditional one.

    Args:
        guidance_scale: 1 is no guidance (the unconditional denoiser is not called), 0 is unconditional.
        rescale: in [0, 1], strength of rescaling each guided prediction (eps, x0 or v, as the network makes it) to the
            standard deviation of the conditional one; large guidance scales overexpose without it.

    Raises:
        ConfigError: rescale is not in [0, 1].

    Source: Ho & Salimans 2022, eq. 6; Lin et al. 2023, eq. 15-16 (rescale).
    """
    require(0 <= rescale <= 1, "rescale", rescale, "between 0 and 1")
    if guidance_scale == 1:
        return conditional

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        conditioned = conditional(x_t, t)
        null = unconditional(x_t, t).x0
        guided = null + guidance_scale * (conditioned.x0 - null)
        return conditioned._replace(x0=_rescaled(diffusion, x_t, t, guided, conditioned.x0, rescale))

    return denoise


def classifier_free_two(
    diffusion: GaussianDiffusion,
    both: Denoiser,
    first_only: Denoiser,
    neither: Denoiser,
    first_scale: float,
    second_scale: float,
    rescale: float = 0.0,
) -> Denoiser:
    """Guidance by two conditions with a scale each, such as an image and a text.

    Args:
        both: conditioned on both conditions.
        first_only: conditioned on the first only.
        neither: unconditional.
        first_scale, second_scale: 1 is no guidance.
        rescale: as in `classifier_free`.

    Source: Brooks et al. 2022, eq. 3.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        conditioned = both(x_t, t)
        first, null = first_only(x_t, t).x0, neither(x_t, t).x0
        guided = null + first_scale * (first - null) + second_scale * (conditioned.x0 - first)
        return conditioned._replace(x0=_rescaled(diffusion, x_t, t, guided, conditioned.x0, rescale))

    return denoise


def classifier(
    diffusion: GaussianDiffusion, denoise: Denoiser, log_probability: LogProbability, guidance_scale: float
) -> Denoiser:
    """Shift eps by -guidance_scale sqrt(1 - alphas_cumprod) times the gradient of log p(y | x_t), and x0 with it.

    At pure noise alphas_cumprod is 0 and x_t carries no information, so x0 is left unchanged.

    Args:
        log_probability: from a noise-aware classifier (`classifier.log_probability`) or any other preference.
        guidance_scale: 0 = off.

    Source: Dhariwal & Nichol 2021, algorithm 2.
    """

    shift = gradient(log_probability, guidance_scale)

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        denoised = denoise(x_t, t)
        alphas_cumprod = diffusion.alphas_cumprod.to(x_t.device)[t]  # [B]
        gain = torch.where(alphas_cumprod > 0, (1 - alphas_cumprod) / alphas_cumprod.sqrt(), 0.0)
        gain = gain.to(denoised.x0.dtype).view((-1,) + (1,) * (x_t.dim() - 1))  # [B, 1, ...]
        return denoised._replace(x0=denoised.x0 + gain * shift(x_t, t))

    return guided


def gradient(log_probability: LogProbability, guidance_scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """guidance_scale times the gradient of log p(y | x_t) at x_t, [B, ...] float32: the mean shift of `samplers.ddpm`.

    Source: Dhariwal & Nichol 2021, algorithm 1.
    """

    def shift(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (found,) = torch.autograd.grad(log_probability(x, t).sum(), x)
        return guidance_scale * full_precision(found)

    return shift


def clip_similarity(encode_image: Callable[[Tensor, Tensor], Tensor], text_embedding: Tensor) -> LogProbability:
    """CLIP guidance: the dot product of image and text embeddings, as the log probability for `classifier`.

    Args:
        encode_image: (x_t [B, ...], t [B]) -> image embedding [B, E]; a CLIP trained on noised images, or an ordinary one
            applied to x0 (`on_x0`).
        text_embedding: [B, E].

    Source: Nichol et al. 2022 (GLIDE), section 2.4.
    """
    return lambda x_t, t: (encode_image(x_t, t) * text_embedding).sum(dim=1)


def on_x0(denoise: Denoiser, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Turn a function of clean samples into one of noised samples by denoising first; gradients pass through both."""
    return lambda x_t, t: function(denoise(x_t, t).x0)


def clamped(denoise: Denoiser, clip_range: float) -> Denoiser:
    """Clamp x0 to [-clip_range, clip_range], because guidance pushes it out of the range of the data.

    Source: Saharia et al. 2022 (Imagen), section 2.3, static thresholding.
    """

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        denoised = denoise(x_t, t)
        return denoised._replace(x0=denoised.x0.clamp(-clip_range, clip_range))

    return guided


def dynamically_clamped(denoise: Denoiser, clip_range: float, quantile: float = 0.995) -> Denoiser:
    """Clamp each sample at a quantile of its own magnitudes, then scale it into [-clip_range, clip_range].

    If the quantile lies within the range, the sample is only clamped.

    Raises:
        ConfigError: quantile is not in (0, 1].

    Source: Saharia et al. 2022 (Imagen), section 2.3, dynamic thresholding.
    """
    require(0 < quantile <= 1, "quantile", quantile, "above 0 and at most 1")

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        denoised = denoise(x_t, t)
        rows = denoised.x0.abs().flatten(1)  # [B, ...]
        # one row at a time: torch limits the size of a quantile's input
        limit = torch.stack([row.quantile(quantile) for row in rows]).clamp(min=clip_range)
        limit = limit.view((-1,) + (1,) * (x_t.dim() - 1))  # [B, 1, ...]
        return denoised._replace(x0=denoised.x0.clamp(-limit, limit) * (clip_range / limit))

    return guided


def in_interval(guided: Denoiser, otherwise: Denoiser, t_min: int, t_max: int) -> Denoiser:
    """Guidance in an interval of noise levels only; outside it guidance does harm and costs an extra call.

    Args:
        guided: used at t_min <= t <= t_max.
        otherwise: used at all other timesteps; usually the conditional denoiser.

    Source: Kynkäänniemi et al. 2024, eq. 5; their noise levels are sqrt((1 - alphas_cumprod) / alphas_cumprod).
    """

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        inside = (t >= t_min) & (t <= t_max)  # [B]
        if inside.all():
            return guided(x_t, t)
        if not inside.any():
            return otherwise(x_t, t)
        inside = inside.view((-1,) + (1,) * (x_t.dim() - 1))
        plain = otherwise(x_t, t)
        return plain._replace(x0=torch.where(inside, guided(x_t, t).x0, plain.x0))

    return denoise


def _rescaled(
    diffusion: GaussianDiffusion, x_t: Tensor, t: Tensor, guided: Tensor, conditioned: Tensor, rescale: float
) -> Tensor:
    """x0 of the guided prediction, rescaled toward the standard deviation of each conditional prediction.

    Source: Lin et al. 2023, eq. 15-16, which rescale the network's output.
    """
    if not rescale:
        return guided
    prediction, reference = (diffusion.prediction_of_x0(x_t, t, x0) for x0 in (guided, conditioned))  # [B, ...]
    gain = _std(reference) / _std(prediction).clamp(min=1e-12)  # [B, 1, ...]
    return diffusion.predict_x0(x_t, t, prediction * (1 - rescale + rescale * gain))


def _std(prediction: Tensor) -> Tensor:
    """Standard deviation of each sample, [B, 1, ...]."""
    return prediction.std(dim=tuple(range(1, prediction.dim())), keepdim=True)
