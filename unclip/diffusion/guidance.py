"""Guidance: denoisers made from denoisers.

Everything is written for x0, which is affine in eps and v at a fixed x_t. What a guided denoiser says of the variance is
what the conditional one says. Letters: B batch, E width of an embedding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unclip.config import require
from unclip.diffusion.process import Denoised, Denoiser, GaussianDiffusion, in_full

LogProbability = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B]) -> log probability of what is wanted, up to a constant, nats [B]; differentiable in x_t."""


def classifier_free(
    conditional: Denoiser, unconditional: Denoiser, guidance_scale: float, rescale: float = 0.0
) -> Denoiser:
    """Push the conditional denoiser away from the unconditional one.

    Args:
        guidance_scale: 1 is no guidance (the unconditional denoiser is not called), 0 is unconditional.
        rescale: share in [0, 1] to which each sample's standard deviation is brought back to the conditional one's;
            large scales overexpose without.

    Raises:
        ConfigError: rescale is not in [0, 1].

    Source: Ho & Salimans 2022, eq. 6; Lin et al. 2023, eq. 15-16 (rescale).
    """
    require(0 <= rescale <= 1, "rescale", rescale, "between 0 and 1")
    if guidance_scale == 1:
        return conditional

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        wanted = conditional(x_t, t)
        null = unconditional(x_t, t).x0
        guided = null + guidance_scale * (wanted.x0 - null)
        return wanted._replace(x0=_rescaled(guided, wanted.x0, rescale))

    return denoise


def classifier_free_two(
    both: Denoiser,
    first_alone: Denoiser,
    neither: Denoiser,
    first_scale: float,
    second_scale: float,
    rescale: float = 0.0,
) -> Denoiser:
    """Guidance by two conditions with a scale each, such as a picture and a text.

    Args:
        both: conditioned on the first and the second.
        first_alone: conditioned on the first.
        neither: without conditions.
        first_scale, second_scale: 1 is no guidance.
        rescale: as in `classifier_free`.

    Source: Brooks et al. 2022, eq. 3.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        wanted = both(x_t, t)
        first, null = first_alone(x_t, t).x0, neither(x_t, t).x0
        guided = null + first_scale * (first - null) + second_scale * (wanted.x0 - first)
        return wanted._replace(x0=_rescaled(guided, wanted.x0, rescale))

    return denoise


def classifier(
    diffusion: GaussianDiffusion, denoise: Denoiser, log_probability: LogProbability, guidance_scale: float
) -> Denoiser:
    """Shift eps by -guidance_scale sqrt(1 - alphas_cumprod) times the gradient of log p(y | x_t), and x0 with it.

    At pure noise, where alphas_cumprod is 0 and x_t shows nothing, x0 is left as it is.

    Args:
        log_probability: of a noise-aware classifier (`classifier.log_probability`), or any other preference.
        guidance_scale: 0 = off.

    Source: Dhariwal & Nichol 2021, algorithm 2.
    """

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        denoised = denoise(x_t, t)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_probability(x, t).sum(), x)
        alphas_cumprod = diffusion.alphas_cumprod.to(x_t.device)[t]  # [B]
        gain = torch.where(alphas_cumprod > 0, (1 - alphas_cumprod) / alphas_cumprod.sqrt(), 0.0)
        gain = gain.to(denoised.x0.dtype).view((-1,) + (1,) * (x_t.dim() - 1))  # [B, 1, ...]
        return denoised._replace(x0=denoised.x0 + guidance_scale * gain * in_full(gradient))

    return guided


def clip_similarity(encode_image: Callable[[Tensor, Tensor], Tensor], text_embedding: Tensor) -> LogProbability:
    """CLIP guidance: the dot product of image and text embedding as the log probability of `classifier`.

    Args:
        encode_image: (x_t [B, ...], t [B]) -> image embedding [B, E]; a CLIP that knows noised pictures, or one for clean
            pictures made to see x0 (`on_x0`).
        text_embedding: [B, E].

    Source: Nichol et al. 2022 (GLIDE), section 2.3.
    """
    return lambda x_t, t: (encode_image(x_t, t) * text_embedding).sum(dim=1)


def on_x0(denoise: Denoiser, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of clean samples as one of noised samples, by way of the denoiser; gradients pass through both."""
    return lambda x_t, t: function(denoise(x_t, t).x0)


def clamped(denoise: Denoiser, clip_range: float) -> Denoiser:
    """Keep x0 in [-clip_range, clip_range]: guidance pushes it out of the range of the data.

    Source: Saharia et al. 2022 (Imagen), section 2.3, static thresholding.
    """

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        denoised = denoise(x_t, t)
        return denoised._replace(x0=denoised.x0.clamp(-clip_range, clip_range))

    return guided


def dynamically_clamped(denoise: Denoiser, clip_range: float, quantile: float = 0.995) -> Denoiser:
    """Clamp each sample at a quantile of its own magnitudes and shrink it into [-clip_range, clip_range].

    Samples whose quantile is within the range are clamped only.

    Raises:
        ConfigError: quantile is not in (0, 1].

    Source: Saharia et al. 2022 (Imagen), section 2.3, dynamic thresholding.
    """
    require(0 < quantile <= 1, "quantile", quantile, "above 0 and at most 1")

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        denoised = denoise(x_t, t)
        rows = denoised.x0.abs().flatten(1)  # [B, ...]
        limit = torch.stack([row.quantile(quantile) for row in rows]).clamp(
            min=clip_range
        )  # torch limits one call's size
        limit = limit.view((-1,) + (1,) * (x_t.dim() - 1))  # [B, 1, ...]
        return denoised._replace(x0=denoised.x0.clamp(-limit, limit) * (clip_range / limit))

    return guided


def within(guided: Denoiser, otherwise: Denoiser, t_min: int, t_max: int) -> Denoiser:
    """Guidance in an interval of noise levels alone; elsewhere it harms, and costs a call.

    Args:
        guided: used at t_min <= t <= t_max.
        otherwise: used at all other timesteps, the conditional denoiser as a rule.

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


def _rescaled(guided: Tensor, wanted: Tensor, rescale: float) -> Tensor:
    """Guided x0 with the standard deviation of each sample brought back to the conditional one's."""
    if not rescale:
        return guided
    gain = _std(wanted) / _std(guided).clamp(min=1e-12)  # [B, 1, ...]
    return guided * (1 - rescale + rescale * gain)


def _std(x0: Tensor) -> Tensor:
    """Standard deviation of each sample, [B, 1, ...]."""
    return x0.std(dim=tuple(range(1, x0.dim())), keepdim=True)
