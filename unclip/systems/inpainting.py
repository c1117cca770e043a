"""Inpainting with any system whose images are small ones, enlarged by upsamplers; and the progress of such sampling.

Source: Nichol et al. 2022 (GLIDE), section 4.3; Lugmayr et al. 2022, algorithm 1.

Letters: B images, S resolution of the system's images.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion.samplers import OnStep
from unclip.diffusion.sampling import Known
from unclip.downscaling import shrink_known
from unclip.errors import ShapeError
from unclip.models.small_images import known_region
from unclip.systems.system import ChecksCaptions, seeded
from unclip.systems.upsampler import UpsampledSampling, UpsampledSystem

__all__ = ["Progress", "UpsampledSystem", "counting", "inpaint", "no_progress", "num_steps"]

Progress = Callable[[int], None]
"""Called with the number of sampling steps just done, of the total that `num_steps` returns."""


def no_progress(_: int) -> None:
    """`Progress` that does nothing."""


def num_steps(system: UpsampledSystem, sampling: UpsampledSampling, num_sampled: int, num_inverted: int = 0) -> int:
    """Count the sampling steps that `Progress` will report."""
    batches_sampled, batches_inverted = -(-num_sampled // sampling.batch_size), -(-num_inverted // sampling.batch_size)
    small_steps = system.small_steps(sampling)
    upsampler_steps = sum(each.num_steps for each in system.upsampler_sampling(sampling))
    return batches_sampled * (small_steps + upsampler_steps) + batches_inverted * small_steps


def counting(progress: Progress) -> OnStep:
    """Hook that reports progress."""

    def step(x_t: Tensor, t: int) -> Tensor:
        progress(1)
        return x_t

    return step


@torch.no_grad()
def inpaint(
    system: UpsampledSystem,
    images: Tensor,
    known: Tensor,
    captions: Sequence[str],
    *,
    negative: Sequence[str] | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
    sampling: Any = None,
    progress: Progress = no_progress,
) -> Tensor:
    """Repaint part of each image to match its caption; known pixels are returned bit for bit.

    A network of small images that was trained for inpainting reads the known pixels as an input. Any other, and the
    upsamplers, put the known pixels back after every step, and resample each step (`num_resamplings`) to fit the others to
    them.

    Args:
        images: [B, 3, S, S] in [-1, 1], at the system's resolution.
        known: [B, 1, S, S] bool, True = keep.
        captions: B captions of the whole images.
        negative: B captions to guide away from.
        generator: source of all randomness, on the system's device, instead of the seed.
        sampling: settings of the system's class; None uses those of the stack.

    Returns:
        [B, 3, S, S] float32 in [-1, 1], on the CPU.

    Raises:
        InputError: there are negative captions, but no part that reads captions is guided; or the system cannot sample a
            caption.
        ShapeError: images or masks have another shape, or the number of captions differs.
    """
    if isinstance(system, ChecksCaptions):
        system.check_captions(captions)
    settings = sampling or system.sampling
    size = system.image_size
    expected = (len(captions), 3, size, size), (len(captions), 1, size, size)
    if (tuple(images.shape), tuple(known.shape)) != expected or known.dtype != torch.bool:
        raise ShapeError(
            f"inpaint: got images {tuple(images.shape)}, masks {tuple(known.shape)} of {known.dtype} and {len(captions)} "
            f"captions, expected images {expected[0]} and masks {expected[1]} of torch.bool."
        )
    generator = generator or seeded(system.device, seed)
    samples = []
    for start in range(0, len(images), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        image, keep = images[part].to(system.device), known[part].to(system.device)
        low_res = system.sample_small(
            captions[part],
            settings,
            generator,
            negative=None if negative is None else negative[part],
            known=known_region(*shrink_known(image, keep, system.small_size)),
            on_step=counting(progress),
        )
        known_parts = [Known(*shrink_known(image, keep, each)) for each in system.upsampled_sizes]
        on_step = [counting(progress)] * len(known_parts)
        conditions = system.upsampler_conditions(captions[part])
        sample = system.upsample(
            low_res, settings, generator, on_step=on_step, known=known_parts, conditions=conditions
        )
        samples.append(torch.where(keep, image, sample).cpu())
    return torch.cat(samples)
