"""Degradations: independent per image, inputs unchanged, and JPEG compression true to real files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.downscaling import shrink
from unclip.errors import ConfigError, ShapeError
from unclip.models.degradations import (
    BSRConfig,
    DegradationConfig,
    anisotropic_blur,
    bsr,
    degrade,
    degrade_image,
    gaussian_blur,
    jpeg,
)

BLUR = DegradationConfig(kind="blur", blur_prob=0.5, max_blur_sigma=0.6)
BSR = DegradationConfig(kind="bsr")
HEAVY = BSRConfig(max_blur_sigma=2.0, resize_prob=1.0, max_noise_std=0.1, min_jpeg_quality=30)


def smooth_images(batch: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth images with some detail, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 5, 5, generator=generator)
    fine = torch.rand(batch, 3, size, size, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return ((smooth + 0.1 * fine) * 2 - 1).clamp(-1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("config", [BLUR, BSR, DegradationConfig(kind="bsr", bsr=HEAVY)])
def test_each_image_is_degraded_independently(config: DegradationConfig) -> None:
    images = smooth_images(6)
    original = images.clone()
    first, second = (degrade(images, 8, config, seeded(3)) for _ in range(2))
    assert first.shape == (6, 3, 8, 8) and torch.equal(first, second)
    assert torch.equal(images, original)
    assert not torch.equal(first, degrade(images, 8, config, seeded(4)))
    neighbours = smooth_images(6, seed=1)
    neighbours[2] = images[2]
    torch.testing.assert_close(degrade(neighbours, 8, config, seeded(3))[2], first[2])
    same = degrade(images[:1].expand(6, -1, -1, -1), 8, config, seeded(3))
    assert len({tuple(image.flatten().tolist()) for image in same}) >= 3  # each image has its own random values


@pytest.mark.parametrize("config", [BLUR, DegradationConfig(kind="none")])
def test_a_plain_image_is_not_changed(config: DegradationConfig) -> None:
    plain = torch.tensor([-1.0, 0.3, 1.0]).view(1, 3, 1, 1).expand(8, -1, 32, 32)
    torch.testing.assert_close(degrade(plain, 8, config, seeded()), plain[..., :8, :8])


def test_blurring_a_point_gives_a_gaussian_and_keeps_the_mean() -> None:
    images = torch.zeros(3, 2, 9, 9)
    images[:, :, 4, 4] = 1.0
    sigma = torch.tensor([0.0, 0.6, 2.0])
    blurred = gaussian_blur(images, sigma)
    assert torch.equal(blurred[0], images[0])
    torch.testing.assert_close(blurred.sum(dim=(2, 3)), images.sum(dim=(2, 3)))
    weight = np.exp(-0.5 / 0.6**2)
    assert blurred[1, 0, 4, 4].item() == pytest.approx(1 / (1 + 2 * weight) ** 2, rel=1e-5)
    assert blurred[1, 0, 4, 5].item() == pytest.approx(weight / (1 + 2 * weight) ** 2, rel=1e-5)
    assert not blurred[1, 0, 4, 6]  # outside the kernel


def test_an_anisotropic_blur_is_wider_along_its_first_axis() -> None:
    images = torch.zeros(2, 1, 15, 15)
    images[:, :, 7, 7] = 1.0
    wide, narrow = torch.full((2,), 2.0), torch.full((2,), 0.5)
    blurred = anisotropic_blur(images, wide, narrow, torch.tensor([0.0, torch.pi / 2]), 13)
    offsets = torch.arange(15.0) - 7
    along_x = (blurred * offsets**2).sum(dim=(1, 2, 3)).sqrt()  # standard deviation along x
    along_y = (blurred * offsets[:, None] ** 2).sum(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(along_x, torch.tensor([2.0, 0.5]), atol=0.05, rtol=0)
    torch.testing.assert_close(along_y, torch.tensor([0.5, 2.0]), atol=0.05, rtol=0)
    with pytest.raises(ShapeError, match="odd kernel"):
        gaussian_blur(images, wide, kernel_size=4)
    with pytest.raises(ShapeError, match="one sigma per image"):
        gaussian_blur(images, wide[:1])


def test_one_pixel_stripes_average_to_grey() -> None:
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    for size in (32, 16):
        shrunk = degrade(stripes, size, DegradationConfig(kind="none"), seeded())
        assert shrunk[..., 2:-2].abs().max() < 1e-6 and shrunk.abs().max() < 0.2  # the filter is one-sided at edges


@pytest.mark.parametrize("quality", [30, 75, 92])
@pytest.mark.parametrize("size", [(32, 48), (29, 35)])
def test_jpeg_matches_a_real_jpeg_file(quality: int, size: tuple[int, int]) -> None:
    image = smooth_images(1, 48)[..., : size[0], : size[1]]
    pixels = ((image[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    expected = np.asarray(Image.open(file)).astype(float)
    ours = ((jpeg(image, torch.tensor([quality]))[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    difference = np.abs(ours - expected)
    lost = np.abs(expected - pixels)
    assert difference.mean() < 1.5  # of 255; the library rounds more often
    assert lost.mean() > 4 * difference.mean()


def test_bsr_degrades_images_but_leaves_them_recognisable() -> None:
    images = smooth_images(16, 64)
    clean = shrink(images, 16)
    light, heavy = (bsr(images, 16, settings, seeded()) for settings in (BSRConfig(), HEAVY))
    errors = [(degraded - clean).abs().mean().item() for degraded in (light, heavy)]
    assert 0.01 < errors[0] < errors[1] < 0.3
    assert heavy.abs().max() <= 1
    correlation = torch.corrcoef(torch.stack([light.flatten(), clean.flatten()]))[0, 1]
    assert correlation > 0.95


@pytest.mark.parametrize("config", [BLUR, BSR])
def test_autocast_does_not_change_degradations(config: DegradationConfig) -> None:
    images = smooth_images(4)
    expected = degrade(images, 8, config, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(degrade(images, 8, config, seeded()), expected)


def test_degrade_image_takes_and_returns_bytes() -> None:
    image = ((smooth_images(1)[0].permute(1, 2, 0) + 1) * 127.5).byte().numpy()
    degraded = degrade_image(image, 8, BSR, seed=1)
    assert degraded.shape == (8, 8, 3) and degraded.dtype == np.uint8
    assert np.array_equal(degraded, degrade_image(image, 8, BSR, seed=1))
    assert abs(degraded.mean() - image.mean()) < 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blur_prob": 1.5}, "blur_prob: got"),
        ({"min_blur_sigma": 0.7}, "min_blur_sigma, max_blur_sigma"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DegradationConfig(**settings)
    with pytest.raises(ConfigError, match="jpeg_quality"):
        BSRConfig(min_jpeg_quality=0)
    with pytest.raises(ConfigError, match="noise_std"):
        BSRConfig(min_noise_std=0.5, max_noise_std=0.1)
