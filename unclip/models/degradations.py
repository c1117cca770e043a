"""Degradations of an upsampler's low-resolution training images, so that they resemble a decoder's samples.

Random parameters are drawn per image from a `torch.Generator`; operations run on batches of tensors, on any device.

Sources: Ramesh et al. 2022, section 2.1 (blur for the first upsampler, BSR for the second); Saharia et al. 2021 (SR3), for
the blur; Zhang et al. 2021 (BSRGAN), section 3, for BSR: "Designing a practical degradation model for deep blind image
super-resolution", whose light variant Rombach et al. 2022 (LDM) train with. Noise whose level the network reads is added by
`diffusion.process.augment_condition`.

Letters: B batch, C channels, H height, W width, S image size, K kernel size.
"""

import dataclasses
import functools
import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.config import require
from unclip.downscaling import shrink
from unclip.errors import ShapeError
from unclip.models.layers import without_autocast


@dataclasses.dataclass(frozen=True)
class BSRConfig:
    """Blind super-resolution degradation; the defaults are light, for images that are already clean."""

    max_blur_sigma: float = 1.2
    """Largest standard deviation of each of the two blurs along either axis, pixels."""
    resize_prob: float = 0.5
    """Probability of an extra resize down and up with random filters."""
    min_noise_std: float = 0.004
    """Smallest standard deviation of the Gaussian noise; pixels are in [-1, 1], so 1/255 of the range is 0.0078."""
    max_noise_std: float = 0.016
    """Largest standard deviation of the Gaussian noise."""
    jpeg_prob: float = 0.9
    """Probability of JPEG compression among the other steps; a final JPEG compression always comes last."""
    min_jpeg_quality: int = 80
    """Lowest quality of JPEG compression, 1 to 100."""
    max_jpeg_quality: int = 95
    """Highest quality of JPEG compression, 1 to 100."""

    def __post_init__(self) -> None:
        require(self.max_blur_sigma > 0, "max_blur_sigma", self.max_blur_sigma, "a positive number")
        for name in ("resize_prob", "jpeg_prob"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a probability")
        for low, high, least, most in (
            ("min_noise_std", "max_noise_std", 0, 1),
            ("min_jpeg_quality", "max_jpeg_quality", 1, 100),
        ):
            bounds = getattr(self, low), getattr(self, high)
            require(least <= bounds[0] <= bounds[1] <= most, f"{low}, {high}", bounds, f"{least} to {most}, in order")


@dataclasses.dataclass(frozen=True)
class DegradationConfig:
    kind: Literal["none", "blur", "bsr"] = "blur"
    """Degradation of the low-resolution image besides downscaling."""
    blur_prob: float = 0.5
    """Probability of the blur, drawn per image."""
    min_blur_sigma: float = 0.0
    """Smallest standard deviation of the blur (kernel 3), pixels of the low-resolution image."""
    max_blur_sigma: float = 0.6
    """Largest standard deviation of the blur (kernel 3), pixels of the low-resolution image."""
    bsr: BSRConfig = BSRConfig()
    """Settings of `kind` "bsr"."""

    def __post_init__(self) -> None:
        require(0 <= self.blur_prob <= 1, "blur_prob", self.blur_prob, "a probability")
        sigmas = self.min_blur_sigma, self.max_blur_sigma
        require(0 <= sigmas[0] <= sigmas[1], "min_blur_sigma, max_blur_sigma", sigmas, "two in order, at least 0")


def degrade(
    images: Tensor,
    size: int,
    config: DegradationConfig,
    generator: torch.Generator,
    blur_sigma: Tensor | None = None,
) -> Tensor:
    """Downscale images and degrade them as configured.

    Args:
        images: [B, 3, S, S] in [-1, 1]; not changed.
        size: size of the result, pixels; a divisor of S.
        generator: on the images' device; the same state gives the same result.
        blur_sigma: [B], from `draw_blur`, for the kind "blur"; None draws it.

    Returns:
        [B, 3, size, size] in [-1, 1].
    """
    with without_autocast(images.device):  # bf16 is coarser than the levels of an image
        if config.kind == "bsr":
            return bsr(images, size, config.bsr, generator)
        small = shrink(images, size)
        if config.kind == "none":
            return small
        return gaussian_blur(small, draw_blur(len(images), config, generator) if blur_sigma is None else blur_sigma)


def draw_blur(batch: int, config: DegradationConfig, generator: torch.Generator) -> Tensor:
    """Standard deviation of each image's blur, [batch], pixels of the low-resolution image; 0 for no blur."""
    draws = torch.rand(2, batch, generator=generator, device=generator.device)
    sigma = config.min_blur_sigma + draws[1] * (config.max_blur_sigma - config.min_blur_sigma)
    return torch.where(draws[0] < config.blur_prob, sigma, 0.0)


def degrade_image(image: np.ndarray, size: int, config: DegradationConfig, seed: int) -> np.ndarray:
    """Degrade one image for viewing: [S, S, 3] uint8 -> [size, size, 3] uint8."""
    images = torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1  # [1, 3, S, S]
    degraded = degrade(images, size, config, torch.Generator().manual_seed(seed))
    return ((degraded[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int = 3) -> Tensor:
    """Blur each image with its own Gaussian.

    Args:
        images: [B, C, H, W]; not changed. Edges are repeated outwards.
        sigma: [B] standard deviations in pixels; 0 leaves an image unchanged.
        kernel_size: odd.

    Source: Saharia et al. 2021 (SR3), section 2.3; Ramesh et al. 2022, section 2.1 (kernel 3, sigma 0.6).
    """
    return anisotropic_blur(images, sigma, sigma, torch.zeros_like(sigma), kernel_size)


def anisotropic_blur(images: Tensor, sigma_u: Tensor, sigma_v: Tensor, angle: Tensor, kernel_size: int) -> Tensor:
    """Blur each image with its own rotated Gaussian.

    Args:
        images: [B, C, H, W]; not changed. Edges are repeated outwards.
        sigma_u, sigma_v: [B] standard deviations along the kernel's axes, pixels.
        angle: [B] from the x axis to the first kernel axis, radians.
        kernel_size: odd.

    Source: Zhang et al. 2021, section 3.1.
    """
    if kernel_size % 2 == 0 or sigma_u.shape != images.shape[:1]:
        raise ShapeError(
            f"blur: got kernel {kernel_size} and sigma {tuple(sigma_u.shape)} for images {tuple(images.shape)}, "
            "expected an odd kernel and one sigma per image."
        )
    offsets = torch.arange(kernel_size, device=images.device) - kernel_size // 2.0
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")  # 2 x [K, K]
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)  # 2 x [B, 1, 1]
    # a Gaussian far narrower than a pixel is a single point; the clamp avoids a division by 0
    width_u, width_v = (sigma.clamp(min=1e-3).view(-1, 1, 1) for sigma in (sigma_u, sigma_v))  # 2 x [B, 1, 1]
    exponent = ((x * cos + y * sin) / width_u) ** 2 + ((y * cos - x * sin) / width_v) ** 2  # [B, K, K]
    kernel = torch.exp(-0.5 * exponent)
    kernel = kernel / kernel.sum(dim=(1, 2), keepdim=True)
    batch, channels = images.shape[:2]
    weight = kernel.repeat_interleave(channels, dim=0)[:, None].to(images.dtype)  # [BC, 1, K, K]
    padding = (kernel_size // 2,) * 4
    padded = F.pad(images, padding, mode="replicate").flatten(0, 1)[None]  # [1, BC, H + K - 1, W + K - 1]
    return F.conv2d(padded, weight, groups=batch * channels)[0].reshape(images.shape)


def bsr(images: Tensor, size: int, config: BSRConfig, generator: torch.Generator) -> Tensor:
    """Downscale images through a random sequence of degradations.

    Each image gets two blurs, a resize down and up, Gaussian noise and JPEG compression in its own order. It is downscaled
    at a random point between them, and a final JPEG compression comes last.

    Args:
        images: [B, 3, S, S] in [-1, 1]; not changed.
        size: size of the result, pixels.

    Returns:
        [B, 3, size, size] in [-1, 1].

    Source: Zhang et al. 2021, section 3 and figure 1, without its camera's noise model.
    """
    batch, device = len(images), images.device
    steps = (_random_blur, _random_blur, _random_resize, _random_noise, _random_jpeg)
    # draw the same number of values per image and step, whatever the order, so that images do not affect each other
    draws = torch.rand(len(steps) + 1, 5, batch, generator=generator, device=device)
    order = torch.rand(batch, len(steps), generator=generator, device=device).argsort(dim=1)  # [B, steps]
    num_before = torch.randint(len(steps) + 1, (batch,), generator=generator, device=device)  # [B]
    noise = torch.randn(images.shape, generator=generator, device=device)

    def run(x: Tensor, position: int, chosen: Tensor) -> Tensor:
        x = x.clone()
        for number, step in enumerate(steps):
            rows = (chosen & (order[:, position] == number)).nonzero()[:, 0]
            if len(rows):
                x[rows] = step(x[rows], noise[rows], draws[number][:, rows], config)
        return x

    x = images
    for position in range(len(steps)):
        x = run(x, position, position < num_before)
    x = shrink(x, size)
    for position in range(len(steps)):
        x = run(x, position, position >= num_before)
    return jpeg(x, _quality(draws[-1][0], config)).clamp(-1, 1)


def _random_blur(x: Tensor, noise: Tensor, draws: Tensor, config: BSRConfig) -> Tensor:
    """Blur, isotropic for half of the images and anisotropic for the others. Source: Zhang et al. 2021, section 3.1."""
    sigma_u, sigma_v = draws[0] * config.max_blur_sigma, draws[1] * config.max_blur_sigma
    sigma_v = torch.where(draws[2] < 0.5, sigma_u, sigma_v)
    kernel_size = 2 * math.ceil(3 * config.max_blur_sigma) + 1
    return anisotropic_blur(x, sigma_u, sigma_v, draws[3] * math.pi, kernel_size)


def _random_resize(x: Tensor, noise: Tensor, draws: Tensor, config: BSRConfig) -> Tensor:
    """Resize down to between half and all of the size, then up again. Source: Zhang et al. 2021, section 3.2."""
    size = x.shape[-1]
    smaller = (size * (0.5 + 0.5 * draws[1])).round().clamp(min=1).int().tolist()
    filters = [(int(down * 3), int(up * 2)) for down, up in zip(draws[2].tolist(), draws[3].tolist(), strict=True)]
    chosen = (draws[0] < config.resize_prob).tolist()
    resized = []
    for image, small_size, (down, up), resize in zip(x, smaller, filters, chosen, strict=True):
        if resize:
            small = _interpolate(image[None], small_size, ("area", "bilinear", "bicubic")[down])
            image = _interpolate(small, size, ("bilinear", "bicubic")[up])[0]
        resized.append(image)
    return torch.stack(resized)


def _interpolate(x: Tensor, size: int, mode: str) -> Tensor:
    return F.interpolate(x, size=(size, size), mode=mode, antialias=mode != "area")


def _random_noise(x: Tensor, noise: Tensor, draws: Tensor, config: BSRConfig) -> Tensor:
    """Add noise, half of the images independently per channel, the others grey. Source: Zhang et al. 2021, section 3.3."""
    std = config.min_noise_std + draws[0] * (config.max_noise_std - config.min_noise_std)
    noise = noise[..., : x.shape[-2], : x.shape[-1]]
    noise = torch.where(draws[1].view(-1, 1, 1, 1) < 0.5, noise, noise[:, :1])
    return x + std.view(-1, 1, 1, 1) * noise


def _random_jpeg(x: Tensor, noise: Tensor, draws: Tensor, config: BSRConfig) -> Tensor:
    """Compress with the configured probability. Source: Zhang et al. 2021, section 3.3."""
    compressed = jpeg(x, _quality(draws[0], config))
    return torch.where(draws[1].view(-1, 1, 1, 1) < config.jpeg_prob, compressed, x)


def _quality(draw: Tensor, config: BSRConfig) -> Tensor:
    levels = config.max_jpeg_quality - config.min_jpeg_quality + 1
    return config.min_jpeg_quality + (draw * levels).floor()


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Simulate baseline JPEG compression with halved chroma (4:2:0).

    Rounding has no gradient, so use it for conditioning images, not in losses.

    Args:
        images: [B, 3, H, W] in [-1, 1], any H and W; not changed.
        quality: [B] from 1 to 100, on the scale of the IJG library.

    Returns:
        [B, 3, H, W] in [-1, 1].

    Source: ITU-T T.81, sections A.3.3 to A.3.4 and annex K.1; ITU-T T.871 (YCbCr).
    """
    height, width = images.shape[-2:]
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round()  # [B, 3, H, W] in 0 ... 255
    padded = F.pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate")
    to_ycc = padded.new_tensor(_RGB_TO_YCC)
    ycc = torch.einsum("oc,bchw->bohw", to_ycc, padded)  # luma in 0 ... 255, chroma around 0
    ycc = ycc.round()
    luma = _quantise(ycc[:, :1] - 128, _LUMA_TABLE, quality) + 128
    chroma = _quantise(F.avg_pool2d(ycc[:, 1:], 2).round(), _CHROMA_TABLE, quality)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear")
    rgb = torch.einsum("oc,bchw->bohw", torch.linalg.inv(to_ycc), torch.cat([luma, chroma], dim=1))
    return rgb[..., :height, :width].round().clamp(0, 255) / 127.5 - 1


def _quantise(plane: Tensor, table: tuple[int, ...], quality: Tensor) -> Tensor:
    """Round the cosine transform of each 8 x 8 block of [B, C, H, W] to multiples of the scaled table of its image."""
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None]  # [B, 1]
    steps = ((plane.new_tensor(table) * scale + 50) / 100).floor().clamp(1, 255)  # [B, 64]
    dct = _dct_matrix().to(plane)  # [8, 8]
    batch, channels, height, width = plane.shape
    blocks = plane.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)  # [B, C, H/8, W/8, 8, 8]
    steps = steps.view(batch, 1, 1, 1, 8, 8)
    coefficients = ((dct @ blocks @ dct.T) / steps).round() * steps
    return (dct.T @ coefficients @ dct).transpose(3, 4).reshape(plane.shape)


@functools.cache
def _dct_matrix() -> Tensor:
    """Orthonormal DCT-II of length 8, [8, 8]."""
    frequency, position = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    matrix = torch.cos(math.pi / 8 * frequency * (position + 0.5)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


_RGB_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
# fmt: off
_LUMA_TABLE = (
    16, 11, 10, 16, 24, 40, 51, 61,
    12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77,
    24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)
_CHROMA_TABLE = (
    17, 18, 24, 47, 99, 99, 99, 99,
    18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99,
    *(99,) * 32,
)
# fmt: on
