"""Inpainting with any system whose images are small ones, enlarged by upsamplers; and the progress of such sampling.

Source: Nichol et al. 2022 (GLIDE), sections 2.1 and 4.3; Lugmayr et al. 2022, eq. 8.

Letters: B images, S resolution of the system's images.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion import samplers
from unclip.errors import ShapeError
from unclip.models.degradations import shrink
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


def counting(progress: Progress, on_step: samplers.OnStep = samplers.undisturbed) -> samplers.OnStep:
    """Wrap a hook so that it also reports progress."""

    def step(x_t: Tensor, t: int) -> Tensor:
        progress(1)
        return on_step(x_t, t)

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
    sampling: Any = None,
    progress: Progress = no_progress,
) -> Tensor:
    """Repaint part of each image to match its caption; known pixels are returned bit for bit.

    A network of small images that was trained for inpainting reads the known pixels as an input. Any other, and the
    upsamplers, put the known pixels back after every step.

    Args:
        images: [B, 3, S, S] in [-1, 1], at the system's resolution.
        known: [B, 1, S, S] bool, True = keep.
        captions: B captions of the whole images.
        negative: B captions to guide away from.
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
    settings, network = sampling or system.sampling, system.small_network
    size = system.image_size
    expected = (len(captions), 3, size, size), (len(captions), 1, size, size)
    if (tuple(images.shape), tuple(known.shape)) != expected or known.dtype != torch.bool:
        raise ShapeError(
            f"inpaint: got images {tuple(images.shape)}, masks {tuple(known.shape)} of {known.dtype} and {len(captions)} "
            f"captions, expected images {expected[0]} and masks {expected[1]} of torch.bool."
        )
    generator = seeded(system.device, seed)
    samples = []
    for start in range(0, len(images), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        image, keep = images[part].to(system.device), known[part].to(system.device)
        low_res, low_keep = _known_at(system.small_size, image, keep)
        reads_known = network.config.inpainting
        hold: samplers.OnStep = samplers.undisturbed
        if not reads_known:
            hold = samplers.keep_known(network.diffusion, low_res, low_keep, generator)
        low_res = system.sample_small(
            captions[part],
            settings,
            generator,
            negative=None if negative is None else negative[part],
            known=known_region(low_res, low_keep) if reads_known else None,
            on_step=counting(progress, hold),
        )
        holding = [
            samplers.keep_known(upsampler.diffusion, *_known_at(upsampler.config.output_size, image, keep), generator)
            for upsampler in system.upsamplers
        ]
        on_step = [counting(progress, hold) for hold in holding]
        label = system.labels(captions[part])
        sample = system.upsample(low_res, settings, generator, on_step=on_step, label=label)
        samples.append(torch.where(keep, image, sample).cpu())
    return torch.cat(samples)


def _known_at(resolution: int, image: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Shrink images and masks to a resolution; a pixel is known if all pixels that it covers are known."""
    return shrink(image, resolution), shrink(keep.float(), resolution) == 1
