"""Manipulations of images: variations, interpolation, text diffs and PCA probing.

They work on the paper's bipartite latent of an image: its CLIP image embedding, and the noise x_T from which
the decoder reconstructs it (found by DDIM inversion). They change the embedding, x_T or both, and sample again. The frames of
a row differ in nothing else: they also share the upsamplers' noise. No training is needed.

Source: Ramesh et al. 2022, section 3 (variations, interpolations, text diffs) and section 4 (PCA probing); Dhariwal & Nichol
2021, appendix F (inversion).

Letters: B images, N frames of each, E CLIP embedding width, K principal components, s resolution of the decoder's images, S
resolution of the last upsampler's.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.config import require
from unclip.diffusion import samplers
from unclip.errors import InputError, ShapeError
from unclip.models.degradations import shrink
from unclip.systems.inpainting import Progress, counting, no_progress
from unclip.systems.system import seeded
from unclip.systems.unclip.sampling import SamplingConfig
from unclip.systems.unclip.stack import Stack
from unclip.training.precision import autocast

Noise = Literal["inverted", "fixed"]
"""Source of x_T for a row of frames: inverting the images, so that the row ends in them, or one random draw for all."""


class Latents(NamedTuple):
    """Bipartite latents of images. Source: Ramesh et al. 2022, section 3."""

    image_embedding: Tensor
    """[B, E], the CLIP image embeddings."""
    x_T: Tensor
    """[B, 3, s, s], the noise from which the decoder samples the images again."""

    def repeat(self, num: int) -> "Latents":
        """Repeat each image `num` times, [B * num, ...]."""
        return Latents(self.image_embedding.repeat_interleave(num, 0), self.x_T.repeat_interleave(num, 0))


# ----------------------------------------------------------------------------------- inversion and reconstruction


@torch.no_grad()
def invert(
    stack: Stack, images: Tensor, *, sampling: SamplingConfig | None = None, progress: Progress = no_progress
) -> Latents:
    """Invert images to their latents.

    The inversion uses the same guidance as sampling. More `inversion_iterations` make it more exact, and so does float32
    ("precision") compared with bf16.

    Args:
        images: [B, 3, H, W] in [-1, 1], square.
        sampling: None uses the stack's settings; `decoder.sampler` is ignored, as inversion always uses DDIM.

    Raises:
        ShapeError: the images have another shape.

    Source: Dhariwal & Nichol 2021, appendix F; Ramesh et al. 2022, section 3.
    """
    settings = sampling or stack.sampling
    resolution = _check(images, "invert")
    decoder, embeddings, noises = stack.decoder, [], []
    for batch in torch.split(images.to(stack.device), settings.batch_size):
        image_embedding = stack.embed_images(batch)
        same_size = resolution == decoder.config.unet.image_size
        low_res = batch if same_size else shrink(batch, decoder.config.unet.image_size)
        with autocast(settings.precision, stack.device):
            noises.append(
                samplers.ddim_inversion(
                    decoder.diffusion,
                    decoder.denoiser(image_embedding, settings.decoder),
                    low_res,
                    settings.decoder.num_steps,
                    settings.decoder.inversion_iterations,
                    counting(progress),
                )
            )
        embeddings.append(image_embedding)
    return Latents(torch.cat(embeddings), torch.cat(noises))


@torch.no_grad()
def draw(
    stack: Stack,
    latents: Latents,
    *,
    eta: float = 0.0,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    progress: Progress = no_progress,
) -> Tensor:
    """Sample images from latents; with eta = 0 and inverted noise, this reconstructs the inverted images.

    Args:
        latents: latents of B images.
        eta: noise added at every step, 0 to 1; with 0, the result depends on the latents alone.
        seed: seed of that noise and of the upsamplers' noise, which all images share.

    Returns:
        [B, 3, S, S] float32 in [-1, 1], on the CPU.

    Source: Song et al. 2021, eq. 12 and 16.
    """
    settings = sampling or stack.sampling
    generator = seeded(stack.device, seed)
    x_T = [_noise(resolution, 1, generator) for resolution in stack.upsampled_sizes]
    samples = []
    for start in range(0, len(latents.x_T), settings.batch_size):
        batch = Latents(*(part[start : start + settings.batch_size] for part in latents))
        with autocast(settings.precision, stack.device):
            low_res = samplers.ddim(
                stack.decoder.diffusion,
                stack.decoder.denoiser(batch.image_embedding, settings.decoder),
                batch.x_T,
                settings.decoder.num_steps,
                eta,
                generator,
                counting(progress),
            )
        noise = [each.expand(len(low_res), -1, -1, -1) for each in x_T]
        on_step = [counting(progress)] * len(noise)
        samples.append(stack.upsample(low_res, settings, generator, noise, on_step).cpu())
    return torch.cat(samples)


def slerp(first: Tensor, second: Tensor, theta: Tensor) -> Tensor:
    """Rotate from first to second along the great circle between them.

    Args:
        first, second: [B, ...]; all dimensions but the first form one vector. If their lengths differ, they are blended.
        theta: [B], 0 for first and 1 for second, which are returned exactly.

    Returns:
        [B, ...] float32. Source: Shoemake 1985; Ramesh et al. 2022, section 3.2.
    """
    a, b = first.float().flatten(1), second.float().flatten(1)  # [B, D]
    cosine = (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(dim=1, keepdim=True)
    angle = (
        cosine.clamp(-1, 1).acos().clamp(1e-4, torch.pi - 1e-4)
    )  # [B, 1]; between parallel vectors, any circle will do
    theta = theta.to(a)[:, None]  # [B, 1]
    blend = ((1 - theta) * angle).sin() / angle.sin() * a + (theta * angle).sin() / angle.sin() * b
    return torch.where(theta == 0, a, torch.where(theta == 1, b, blend)).view_as(first)


# ------------------------------------------------------------------------------------------------- manipulations


@torch.no_grad()
def variations(
    stack: Stack,
    images: Tensor,
    num: int,
    *,
    eta: float | None = None,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    progress: Progress = no_progress,
) -> Tensor:
    """Sample other images with the same image embedding: only what CLIP does not encode changes.

    Args:
        images: [B, 3, H, W] in [-1, 1], square.
        num: N.
        eta: None draws a new x_T; a number, 0 to 1, starts from the inverted image and adds that much noise at every step.
        seed: used for every image, so that its variations do not depend on the other images.

    Returns:
        [B, N, 3, S, S] float32 in [-1, 1], on the CPU.

    Raises:
        ConfigError: num or eta is out of range.

    Source: Ramesh et al. 2022, section 3.1.
    """
    require(num >= 1, "num", num, "at least 1")
    require(eta is None or 0 <= eta <= 1, "eta", eta, "0 to 1")
    _check(images, "variations")
    rows = []
    for image in torch.split(images, 1):
        if eta is None:
            generator = seeded(stack.device, seed)
            x_T = _noise(stack.decoder.config.unet.image_size, num, generator)
            latents = Latents(stack.embed_images(image).expand(num, -1), x_T)
        else:
            latents = invert(stack, image, sampling=sampling, progress=progress).repeat(num)
        rows.append(draw(stack, latents, eta=eta or 0, seed=seed, sampling=sampling, progress=progress))
    return torch.stack(rows)


@torch.no_grad()
def interpolate(
    stack: Stack,
    first: Tensor,
    second: Tensor,
    thetas: Sequence[float],
    *,
    noise: Noise = "inverted",
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    progress: Progress = no_progress,
) -> Tensor:
    """Interpolate between two images.

    Args:
        first, second: [B, 3, H, W] in [-1, 1], square.
        thetas: N positions, 0 to 1.
        noise: "inverted" rotates x_T along with the embedding, which reconstructs the two images at 0 and 1; "fixed" uses
            one x_T, drawn with the seed, for all.

    Returns:
        [B, N, 3, S, S] float32 in [-1, 1], on the CPU.

    Raises:
        ConfigError: a theta is not in [0, 1].
        ShapeError: the images have another shape.

    Source: Ramesh et al. 2022, section 3.2.
    """
    _check_thetas(thetas)
    ends = torch.cat([first, second])
    if noise == "inverted":
        latents = invert(stack, ends, sampling=sampling, progress=progress)
    else:
        latents = Latents(stack.embed_images(ends), _fixed_noise(stack, len(ends), seed))
    a, b = (Latents(*parts).repeat(len(thetas)) for parts in zip(*(part.chunk(2) for part in latents), strict=True))
    theta = torch.tensor(list(thetas)).repeat(len(first))  # [B * N]
    between = Latents(*(slerp(one, other, theta) for one, other in zip(a, b, strict=True)))
    return _rows(draw(stack, between, seed=seed, sampling=sampling, progress=progress), len(first))


@torch.no_grad()
def text_diff(
    stack: Stack,
    images: Tensor,
    captions: Sequence[str],
    base_captions: Sequence[str],
    thetas: Sequence[float],
    *,
    noise: Noise = "inverted",
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    progress: Progress = no_progress,
) -> Tensor:
    """Move images in the direction from one caption to another; x_T stays fixed.

    Args:
        images: [B, 3, H, W] in [-1, 1], square.
        captions: B captions of the wanted images.
        base_captions: B captions of the given images; "a photo" or "" will do.
        thetas: N positions, from 0, the image, to 1, the text difference alone; the paper stops between 0.25 and 0.5.

    Returns:
        [B, N, 3, S, S] float32 in [-1, 1], on the CPU; at theta 0, the reconstructed image.

    Raises:
        ConfigError: a theta is not in [0, 1].
        InputError: a caption and its base caption have the same CLIP embedding.
        ShapeError: the images have another shape, or the numbers of images and captions differ.

    Source: Ramesh et al. 2022, section 3.3.
    """
    _check_thetas(thetas)
    if not len(images) == len(captions) == len(base_captions):
        raise ShapeError(
            f"text_diff: got {len(images)} images, {len(captions)} captions and {len(base_captions)} base captions, "
            "expected the same number of each."
        )
    difference = stack.embed_text(captions) - stack.embed_text(base_captions)  # [B, E]
    for caption, base, distance in zip(captions, base_captions, difference.norm(dim=1).tolist(), strict=True):
        if distance < 1e-4:
            raise InputError(
                f"text_diff: CLIP sees no difference between {base!r} and {caption!r}. Change the wording of one of them."
            )
    if noise == "inverted":
        latents = invert(stack, images, sampling=sampling, progress=progress)
    else:
        latents = Latents(stack.embed_images(images), _fixed_noise(stack, len(images), seed))
    # scale the direction to the length of the image embeddings, which some decoders read unnormalised
    length = latents.image_embedding.norm(dim=1, keepdim=True)  # [B, 1]
    direction = (F.normalize(difference, dim=1) * length).repeat_interleave(len(thetas), 0)  # [B * N, E]
    frames = latents.repeat(len(thetas))
    theta = torch.tensor(list(thetas)).repeat(len(images))  # [B * N]
    moved = frames._replace(image_embedding=slerp(frames.image_embedding, direction, theta))
    return _rows(draw(stack, moved, seed=seed, sampling=sampling, progress=progress), len(images))


@torch.no_grad()
def probe(
    stack: Stack,
    images: Tensor,
    num_components: Sequence[int],
    *,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    progress: Progress = no_progress,
) -> Tensor:
    """Reconstruct images from only the leading principal components of their embeddings, all with the same x_T.

    Args:
        images: [B, 3, H, W] in [-1, 1], square.
        num_components: N numbers of components to keep, from 0 (the dataset's mean) to E (all).

    Returns:
        [B, N, 3, S, S] float32 in [-1, 1], on the CPU.

    Raises:
        ConfigError: a number of components is out of range.
        InputError: the stack was published without principal components.
        ShapeError: the images have another shape.

    Source: Ramesh et al. 2022, section 4 and figure 7.
    """
    if stack.dataset is None:
        raise InputError("probe: this stack was published without principal components. Publish it again.")
    _check(images, "probe")
    mean, components = stack.dataset.mean.to(stack.device), stack.dataset.principal.components.to(stack.device)
    for num in num_components:
        require(0 <= num <= len(components), "num_components", num, f"0 to {len(components)}")
    centred = stack.embed_images(images) - mean  # [B, E]
    parts = [mean + centred @ components[:num].T @ components[:num] for num in num_components]  # N x [B, E]
    embeddings = torch.stack(parts, dim=1).flatten(0, 1)  # [B * N, E]
    latents = Latents(embeddings, _fixed_noise(stack, len(embeddings), seed))
    return _rows(draw(stack, latents, seed=seed, sampling=sampling, progress=progress), len(images))


def _check(images: Tensor, function: str) -> int:
    """Check that images are square, and return their resolution."""
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ShapeError(f"{function}: got images {tuple(images.shape)}, expected [B, 3, H, W] with H = W.")
    return images.shape[3]


def _check_thetas(thetas: Sequence[float]) -> None:
    require(len(thetas) >= 1, "theta", tuple(thetas), "at least one")
    for theta in thetas:
        require(0 <= theta <= 1, "theta", theta, "0 to 1")


def _noise(resolution: int, num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num, 3, resolution, resolution, generator=generator, device=generator.device)


def _fixed_noise(stack: Stack, num: int, seed: int) -> Tensor:
    """One noise image, repeated `num` times, [num, 3, s, s]."""
    generator = seeded(stack.device, seed)
    return _noise(stack.decoder.config.unet.image_size, 1, generator).expand(num, -1, -1, -1)


def _rows(samples: Tensor, num_rows: int) -> Tensor:
    """Reshape [B * N, ...] to [B, N, ...]."""
    return samples.view(num_rows, -1, *samples.shape[1:])
