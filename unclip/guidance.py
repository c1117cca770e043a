"""Guidance: denoisers made from denoisers."""

from torch import Tensor

from unclip.diffusion import Denoiser


def classifier_free(conditional: Denoiser, unconditional: Denoiser, guidance_scale: float) -> Denoiser:
    """Push the conditional denoiser away from the unconditional one.

    Args:
        guidance_scale: 1 is no guidance (the unconditional denoiser is not called), 0 is unconditional.

    Source: Ho & Salimans 2022, eq. 6; written for x0, which is affine in eps at a fixed x_t.
    """
    if guidance_scale == 1:
        return conditional

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        null = unconditional(x_t, t)
        return null + guidance_scale * (conditional(x_t, t) - null)

    return denoise


def clamped(denoise: Denoiser, clip_range: float) -> Denoiser:
    """Keep x0 in [-clip_range, clip_range]: guidance pushes it out of the range of the data.

    Source: Saharia et al. 2022 (Imagen), section 2.3, static thresholding.
    """
    return lambda x_t, t: denoise(x_t, t).clamp(-clip_range, clip_range)
