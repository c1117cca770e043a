"""Pictures from pictures: variations, interpolation, text diffs, PCA probing and inpainting.

A picture is taken apart into the bipartite latent of the paper: its CLIP image embedding, and the noise x_T from which the
decoder draws it back (DDIM inversion). One of the two is changed, and the decoder draws again; frames of one row differ in
nothing else, the upsamplers' noise included. Nothing is trained for this.

Source: Ramesh et al. 2022, section 3 (variations, interpolations, text diffs) and section 4 (PCA probing); Dhariwal & Nichol
2021, appendix F (inversion).

Letters: B pictures, N frames of each, E CLIP embedding width, K principal components, s side of the decoder's pictures, S
side of the last upsampler's.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.config import require
from unclip.diffusion import samplers
from unclip.errors import InputError, ShapeError
from unclip.models.decoder import known_region
from unclip.models.degradations import shrink
from unclip.systems.unclip.sampling import SamplingConfig
from unclip.systems.unclip.stack import Stack
from unclip.training.precision import autocast

Progress = Callable[[int], None]
"""Told how many sampling steps have just been done, of those that `num_steps` counts."""

Noise = Literal["inverted", "fixed"]
"""x_T of a row of frames: from the inverted pictures, so that its ends are they, or one draw for the whole row."""


class Latents(NamedTuple):
    """The bipartite latent of pictures. Source: Ramesh et al. 2022, section 3."""

    image_embedding: Tensor
    """[B, E], what CLIP sees in them."""
    x_T: Tensor
    """[B, 3, s, s], all that the decoder needs besides to draw them again."""

    def repeat(self, num: int) -> "Latents":
        """Each picture `num` times, [B * num, ...]."""
        return Latents(self.image_embedding.repeat_interleave(num, 0), self.x_T.repeat_interleave(num, 0))


def ignore(_: int) -> None:
    """The `Progress` that nobody watches."""


def num_steps(stack: Stack, sampling: SamplingConfig, num_drawn: int, num_inverted: int = 0) -> int:
    """Sampling steps that `Progress` will be told of."""
    batches_drawn, batches_inverted = -(-num_drawn // sampling.batch_size), -(-num_inverted // sampling.batch_size)
    upsampler_steps = sum(each.num_steps for each in stack.upsampler_sampling(sampling))
    return (
        batches_drawn * (sampling.decoder.num_steps + upsampler_steps) + batches_inverted * sampling.decoder.num_steps
    )


# ------------------------------------------------------------------------------------------------ there and back


@torch.no_grad()
def invert(
    stack: Stack, images: Tensor, *, sampling: SamplingConfig | None = None, progress: Progress = ignore
) -> Latents:
    """Take pictures apart.

    The inversion is guided as the drawing will be. It is the closer, the more `inversion_iterations` it takes; in float32
    ("precision") it is closer than in bf16.

    Args:
        images: [B, 3, H, W] in [-1, 1], square.
        sampling: None takes the stack's; its `decoder.sampler` does not matter, inversion is DDIM's.

    Raises:
        ShapeError: pictures of another shape.

    Source: Dhariwal & Nichol 2021, appendix F; Ramesh et al. 2022, section 3.
    """
    settings = sampling or stack.sampling
    side = _check(images, "invert")
    decoder, embeddings, noises = stack.decoder, [], []
    for batch in torch.split(images.to(stack.device), settings.batch_size):
        image_embedding = stack.embed_images(batch)
        low_res = batch if side == decoder.config.unet.image_size else shrink(batch, decoder.config.unet.image_size)
        with autocast(settings.precision, stack.device):
            noises.append(
                samplers.ddim_inversion(
                    decoder.diffusion,
                    decoder.denoiser(image_embedding, settings.decoder),
                    low_res,
                    settings.decoder.num_steps,
                    settings.decoder.inversion_iterations,
                    _counting(progress),
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
    progress: Progress = ignore,
) -> Tensor:
    """Put latents together to pictures: with eta = 0 and inverted noise, those that they were taken from.

    Args:
        latents: of B pictures.
        eta: 0 follows x_T alone; more adds noise at every step, up to 1.
        seed: of that noise, and of the upsamplers', which is the same for all pictures.

    Returns:
        [B, 3, S, S] float32 in [-1, 1], on the CPU.

    Source: Song et al. 2021, eq. 12 and 16.
    """
    settings = sampling or stack.sampling
    generator = torch.Generator(stack.device).manual_seed(seed)
    x_T = [_noise(side, 1, generator) for side in stack.upsampled_sizes]
    pictures = []
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
                _counting(progress),
            )
        noise = [each.expand(len(low_res), -1, -1, -1) for each in x_T]
        counting = [_counting(progress)] * len(noise)
        pictures.append(stack.upsample(low_res, settings, generator, noise, counting).cpu())
    return torch.cat(pictures)


def slerp(first: Tensor, second: Tensor, theta: Tensor) -> Tensor:
    """Rotate from first to second along the great circle between them.

    Args:
        first, second: [B, ...]; all but the first dimension are one vector. Lengths that differ are blended.
        theta: [B], 0 for first and 1 for second, which come back exactly.

    Returns:
        [B, ...] float32. Source: Shoemake 1985; Ramesh et al. 2022, section 3.2.
    """
    a, b = first.float().flatten(1), second.float().flatten(1)  # [B, D]
    cosine = (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(dim=1, keepdim=True)
    angle = cosine.clamp(-1, 1).acos().clamp(1e-4, torch.pi - 1e-4)  # [B, 1]; of parallel vectors any circle is right
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
    progress: Progress = ignore,
) -> Tensor:
    """Other pictures with the same image embedding: what CLIP sees stays, what it does not see changes.

    Args:
        images: [B, 3, H, W] in [-1, 1], square.
        num: N.
        eta: None draws x_T anew; a number starts from the inverted picture and adds so much noise on the way, 0 to 1.
        seed: the same for every picture, so that its variations do not depend on those beside it.

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
            generator = torch.Generator(stack.device).manual_seed(seed)
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
    progress: Progress = ignore,
) -> Tensor:
    """Pictures between two.

    Args:
        first, second: [B, 3, H, W] in [-1, 1], square.
        thetas: N positions, 0 to 1.
        noise: "inverted" rotates x_T with the embedding, and draws the two pictures again at 0 and 1; "fixed" takes one
            draw of the seed for all.

    Returns:
        [B, N, 3, S, S] float32 in [-1, 1], on the CPU.

    Raises:
        ConfigError: a theta is not in [0, 1].
        ShapeError: pictures of another shape.

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
    progress: Progress = ignore,
) -> Tensor:
    """Move pictures the way that leads from one caption to another; x_T stays.

    Args:
        images: [B, 3, H, W] in [-1, 1], square.
        captions: B, of what is wanted.
        base_captions: B, of what there is; "a photo" or "" will do.
        thetas: N positions from the picture, 0, towards the difference alone, 1; the paper goes up to 0.25 to 0.5.

    Returns:
        [B, N, 3, S, S] float32 in [-1, 1], on the CPU; at theta 0 the picture itself, drawn again.

    Raises:
        ConfigError: a theta is not in [0, 1].
        InputError: CLIP sees no difference between a caption and its base.
        ShapeError: pictures of another shape, or as many captions as pictures are not given.

    Source: Ramesh et al. 2022, section 3.3.
    """
    _check_thetas(thetas)
    if not len(images) == len(captions) == len(base_captions):
        raise ShapeError(
            f"text_diff: got {len(images)} pictures, {len(captions)} captions and {len(base_captions)} base captions, "
            "expected as many of each."
        )
    difference = stack.embed_text(captions) - stack.embed_text(base_captions)  # [B, E]
    for caption, base, distance in zip(captions, base_captions, difference.norm(dim=1).tolist(), strict=True):
        if distance < 1e-4:
            raise InputError(f"text diff: CLIP sees no difference between {base!r} and {caption!r}. Say it otherwise.")
    if noise == "inverted":
        latents = invert(stack, images, sampling=sampling, progress=progress)
    else:
        latents = Latents(stack.embed_images(images), _fixed_noise(stack, len(images), seed))
    # as long as the embeddings themselves, which some CLIPs' decoders take unnormalised
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
    progress: Progress = ignore,
) -> Tensor:
    """What of a picture's embedding its leading principal components hold: drawn from these alone, with one x_T.

    Args:
        images: [B, 3, H, W] in [-1, 1], square.
        num_components: N numbers of components, 0 (the mean of the dataset) to E (all).

    Returns:
        [B, N, 3, S, S] float32 in [-1, 1], on the CPU.

    Raises:
        ConfigError: a number of components is out of range.
        InputError: the stack was published without principal components.
        ShapeError: pictures of another shape.

    Source: Ramesh et al. 2022, section 4 and figure 7.
    """
    if stack.dataset is None:
        raise InputError("probe: this stack was published without principal components. Publish it anew.")
    _check(images, "probe")
    mean, components = stack.dataset.mean.to(stack.device), stack.dataset.principal.components.to(stack.device)
    for num in num_components:
        require(0 <= num <= len(components), "num_components", num, f"0 to {len(components)}")
    centred = stack.embed_images(images) - mean  # [B, E]
    parts = [mean + centred @ components[:num].T @ components[:num] for num in num_components]  # N x [B, E]
    embeddings = torch.stack(parts, dim=1).flatten(0, 1)  # [B * N, E]
    latents = Latents(embeddings, _fixed_noise(stack, len(embeddings), seed))
    return _rows(draw(stack, latents, seed=seed, sampling=sampling, progress=progress), len(images))


@torch.no_grad()
def inpaint(
    stack: Stack,
    images: Tensor,
    known: Tensor,
    captions: Sequence[str],
    *,
    negative: Sequence[str] | None = None,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    progress: Progress = ignore,
) -> Tensor:
    """Repaint a part of pictures as captions say; the rest comes back as it was, to the last bit.

    A decoder that was trained for it is told what is known; any other, and the upsamplers, hold it at every step.

    Args:
        images: [B, 3, S, S] in [-1, 1], of the size that the stack draws.
        known: [B, 1, S, S] bool, True = keep.
        captions: B, of the whole pictures.
        negative: B, captions to be guided away from.

    Returns:
        [B, 3, S, S] float32 in [-1, 1], on the CPU.

    Raises:
        InputError: nothing that reads the negative captions is guided.
        ShapeError: pictures or masks of another shape, or not as many captions.

    Source: Nichol et al. 2022 (GLIDE), section 2.4; Lugmayr et al. 2022, eq. 8.
    """
    settings, decoder = sampling or stack.sampling, stack.decoder
    size = stack.image_size
    wanted = (len(captions), 3, size, size), (len(captions), 1, size, size)
    if (tuple(images.shape), tuple(known.shape)) != wanted or known.dtype != torch.bool:
        raise ShapeError(
            f"inpaint: got pictures {tuple(images.shape)}, masks {tuple(known.shape)} of {known.dtype} and {len(captions)} "
            f"captions, expected {wanted[0]}, {wanted[1]} of torch.bool."
        )
    generator = torch.Generator(stack.device).manual_seed(seed)
    side, pictures = decoder.config.unet.image_size, []
    for start in range(0, len(images), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        image, keep = images[part].to(stack.device), known[part].to(stack.device)
        low_res, low_keep = _known_at(side, image, keep)
        others = None if negative is None else negative[part]
        told_captions = stack.captions(captions[part], settings, others)
        image_embedding = stack.embed_captions(list(captions[part]), settings, generator, others)
        told = {"known": known_region(low_res, low_keep)} if decoder.config.inpainting else {}
        with autocast(settings.precision, stack.device):
            low_res = decoder.sample(
                image_embedding,
                settings.decoder,
                told_captions,
                generator=generator,
                on_step=_counting(
                    progress,
                    samplers.undisturbed
                    if told
                    else samplers.hold_known(decoder.diffusion, low_res, low_keep, generator),
                ),
                **told,
            )
        holding = [
            samplers.hold_known(upsampler.diffusion, *_known_at(upsampler.config.output_size, image, keep), generator)
            for upsampler in stack.upsamplers
        ]
        on_step = [_counting(progress, hold) for hold in holding]
        drawn = stack.upsample(low_res, settings, generator, on_step=on_step)
        pictures.append(torch.where(keep, image, drawn).cpu())
    return torch.cat(pictures)


def _known_at(side: int, image: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, side, side] and which of their pixels are known: those that cover nothing but known ones."""
    return shrink(image, side), shrink(keep.float(), side) == 1


def _check(images: Tensor, function: str) -> int:
    """The side of square pictures."""
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ShapeError(f"{function}: got pictures {tuple(images.shape)}, expected [B, 3, H, W] with H = W.")
    return images.shape[3]


def _check_thetas(thetas: Sequence[float]) -> None:
    require(len(thetas) >= 1, "theta", tuple(thetas), "at least one")
    for theta in thetas:
        require(0 <= theta <= 1, "theta", theta, "0 to 1")


def _noise(side: int, num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num, 3, side, side, generator=generator, device=generator.device)


def _fixed_noise(stack: Stack, num: int, seed: int) -> Tensor:
    """The same noise `num` times, [num, 3, s, s]."""
    generator = torch.Generator(stack.device).manual_seed(seed)
    return _noise(stack.decoder.config.unet.image_size, 1, generator).expand(num, -1, -1, -1)


def _rows(pictures: Tensor, num_rows: int) -> Tensor:
    """[B * N, ...] -> [B, N, ...]."""
    return pictures.view(num_rows, -1, *pictures.shape[1:])


def _counting(progress: Progress, on_step: samplers.OnStep = samplers.undisturbed) -> samplers.OnStep:
    def step(x_t: Tensor, t: int) -> Tensor:
        progress(1)
        return on_step(x_t, t)

    return step
