"""Code shared by all networks of small images that captions steer: captions, guidance by CLIP, known pixels and sampling.

Letters: B batch, S image size, E CLIP embedding width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.config import added, require
from unclip.diffusion import guidance, samplers, sampling
from unclip.diffusion.guidance import LogProbability
from unclip.diffusion.process import Denoiser, GaussianDiffusion
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.diffusion.sampling import DiffusionSampling
from unclip.errors import ShapeError
from unclip.models.clip import Clip
from unclip.models.layers import without_autocast
from unclip.models.text import Text

KNOWN_CHANNELS = 4
"""Extra input channels of an inpainting network: the known pixels and their mask."""


@dataclasses.dataclass(frozen=True)
class ImageSampling(DiffusionSampling):
    """Sampling settings of a network of small images."""

    guidance_scale: float = 2.0
    """Scale of classifier-free guidance; 1 = off. Source: Ho & Salimans 2022, eq. 6."""
    clip_guidance_scale: float = 0.0
    """Scale of CLIP guidance: the gradient of the dot product of the caption's text embedding with CLIP's image embedding; 0
    = off. The image is x0, or x_t for a CLIP that was trained on noised images. Source: Dhariwal & Nichol 2021, algorithm
    2; Nichol et al. 2022 (GLIDE), section 2.4."""
    strength: float = 0.7
    """Fraction of the process applied to a given start image: 0 returns it, 1 ignores it. Source: Meng et al. 2022
    (SDEdit), section 3."""
    num_resamplings: int = added(samplers.NUM_RESAMPLINGS)
    """Times that inpainting samples each step, with a network that was built without it; 1 = no resampling. Source: Lugmayr
    et al. 2022, algorithm 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.clip_guidance_scale >= 0, "clip_guidance_scale", self.clip_guidance_scale, "at least 0")
        require(0 <= self.strength <= 1, "strength", self.strength, "0 to 1")
        require(self.num_resamplings >= 1, "num_resamplings", self.num_resamplings, "at least 1")


class Captions(NamedTuple):
    """A batch of captions, in every form that steers a network."""

    text: Text | None = None
    """Captions for the network; None for empty captions."""
    negative: Text | None = None
    """Negative captions, which guidance pushes away from; None for empty captions."""
    caption_similarity: Callable[[Tensor], Tensor] | None = None
    """x0 [B, 3, S, S] in [-1, 1] -> similarity of each image to its caption [B], differentiable; for CLIP guidance."""
    noised_similarity: LogProbability | None = None
    """The same of noised images, by a CLIP that was trained on them; used in its place."""


NO_CAPTIONS = Captions()


def similarity_by_clip(clip: Clip, text_embedding: Tensor) -> Callable[[Tensor], Tensor]:
    """Function from images x0 [B, 3, S, S] to the cosine similarity [B] of their CLIP embeddings and text_embedding [B, E]."""

    def caption_similarity(x0: Tensor) -> Tensor:
        with without_autocast(x0.device):
            image_embedding = F.normalize(clip.encode_images(clip.resize(x0)), dim=-1)  # [B, E]
        return (image_embedding * text_embedding).sum(dim=1)

    return caption_similarity


def guided_by_clip(
    diffusion: GaussianDiffusion, guided: Denoiser, conditional: Denoiser, captions: Captions, scale: float
) -> Denoiser:
    """Add CLIP guidance to a guided denoiser; scale 0 leaves it as it is.

    Args:
        conditional: denoiser without guidance, whose x0 an ordinary CLIP reads.

    Raises:
        ConfigError: the scale is above 0, and there is no similarity to guide by.
    """
    if not scale:
        return guided
    log_probability = captions.noised_similarity
    if log_probability is None:
        caption_similarity = captions.caption_similarity
        require(caption_similarity is not None, "clip_guidance_scale", scale, "0 if no caption is given")
        log_probability = guidance.on_x0(guidance.clamped(conditional, 1.0), caption_similarity)  # type: ignore[arg-type]
    return guidance.classifier(diffusion, guided, log_probability, scale)


class SmallImageNetwork(Protocol):
    """Network of small images."""

    @property
    def config(self) -> Any:
        """Settings with `unet`, the U-Net, and `inpainting`, True if it reads known pixels."""

    diffusion: GaussianDiffusion
    measured: dict[str, Tensor]


def sample_images(
    network: SmallImageNetwork,
    denoise: Denoiser,
    batch: int,
    device: torch.device,
    settings: ImageSampling,
    *,
    known: Tensor | None = None,
    start: Tensor | None = None,
    x_T: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep = undisturbed,
) -> Tensor:
    """Sample images [batch, 3, S, S] in [-1, 1]; known pixels are returned unchanged.

    With a network that was trained without inpainting, the other pixels are fitted to the known ones by resampling.

    Args:
        denoise: denoiser of the network, with its conditions.
        known: [B, 4, S, S] from `known_region`.
        start: [B, 3, S, S], images to start from, with the strength of the settings.
        x_T: [B, 3, S, S]; None draws it from the generator.
    """
    if x_T is None:
        size = network.config.unet.image_size
        x_T = torch.randn(batch, 3, size, size, generator=generator, device=device)
    samples = sampling.sample(
        network.diffusion,
        denoise,
        x_T,
        settings,
        mean_squared_score=network.measured.get("mean_squared_score"),
        start=start,
        strength=settings.strength,
        known=None if known is None or network.config.inpainting else known_part(known),
        num_resamplings=settings.num_resamplings,
        generator=generator,
        on_step=on_step,
    )
    return samples if known is None else torch.where(known[:, 3:] > 0, known[:, :3], samples)


def with_known(x_t: Tensor, known: Tensor | None, inpainting: bool, name: str) -> Tensor:
    """Input of a network: x_t, and the known pixels if it was built for inpainting; None if nothing is known.

    Raises:
        ShapeError: the network was built without inpainting, and there are known pixels.
    """
    if inpainting:
        nothing = x_t.new_zeros(len(x_t), KNOWN_CHANNELS, *x_t.shape[2:]) if known is None else known
        return torch.cat([x_t, nothing], dim=1)
    if known is not None:
        raise ShapeError(f"{name}: got known pixels, expected none. Set inpainting = true and train again.")
    return x_t


def known_region(images: Tensor, mask: Tensor) -> Tensor:
    """Extra inputs of an inpainting network: the image with unknown pixels set to 0, and the mask of known pixels.

    Args:
        images: [B, 3, S, S] in [-1, 1]; not changed.
        mask: [B, 1, S, S] bool, True = known.

    Returns:
        [B, 4, S, S], 0 at unknown pixels. Source: Nichol et al. 2022 (GLIDE), section 4.3.
    """
    return torch.cat([images * mask, mask.to(images.dtype)], dim=1)


def known_part(region: Tensor) -> sampling.Known:
    """Known part [B, 3, S, S] of images, from `known_region`."""
    return sampling.Known(region[:, :3], region[:, 3:] > 0)


def random_masks(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Random masks for inpainting training, [batch, 1, size, size] bool, True = known.

    Each mask is independent: nothing known (one in four), a random rectangle unknown (three in eight), or a random rectangle
    known and the rest unknown (three in eight).
    """
    draws = torch.rand(5, batch, generator=generator, device=generator.device)
    low, high = draws[1:3].T.sort(dim=1).values.unbind(1)  # 2 x [B], edges as fractions of the size
    left, right = draws[3:5].T.sort(dim=1).values.unbind(1)
    centres = (torch.arange(size, device=generator.device) + 0.5) / size  # [S]
    rows = (centres >= low[:, None]) & (centres < high[:, None])  # [B, S]
    columns = (centres >= left[:, None]) & (centres < right[:, None])  # [B, S]
    inside = rows[:, :, None] & columns[:, None, :]  # [B, S, S]
    kind = draws[0, :, None, None]
    return torch.where(kind < 0.25, torch.zeros_like(inside), inside ^ (kind < 0.625))[:, None]
