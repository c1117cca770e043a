"""Degradations: each picture by its own draw, nothing else touched, and JPEG as it is."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.errors import ConfigError, ShapeError
from unclip.models.degradations import (
    BSRConfig,
    DegradationConfig,
    anisotropic_blur,
    bsr,
    degrade,
    degrade_picture,
    gaussian_blur,
    jpeg,
    shrink,
)

BLUR = DegradationConfig(kind="blur", blur_prob=0.5, max_blur_sigma=0.6)
BSR = DegradationConfig(kind="bsr")
HEAVY = BSRConfig(max_blur_sigma=2.0, resize_prob=1.0, max_noise_std=0.1, min_jpeg_quality=30)


def pictures(batch: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth pictures with some detail, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 5, 5, generator=generator)
    fine = torch.rand(batch, 3, side, side, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return ((smooth + 0.1 * fine) * 2 - 1).clamp(-1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("config", [BLUR, BSR, DegradationConfig(kind="bsr", bsr=HEAVY)])
def test_a_picture_is_degraded_by_its_own_draws_alone(config: DegradationConfig) -> None:
    images = pictures(6)
    original = images.clone()
    first, second = (degrade(images, 8, config, seeded(3)) for _ in range(2))
    assert first.shape == (6, 3, 8, 8) and torch.equal(first, second)
    assert torch.equal(images, original)
    assert not torch.equal(first, degrade(images, 8, config, seeded(4)))
    neighbours = pictures(6, seed=1)
    neighbours[2] = images[2]
    torch.testing.assert_close(degrade(neighbours, 8, config, seeded(3))[2], first[2])
    same = degrade(images[:1].expand(6, -1, -1, -1), 8, config, seeded(3))
    assert len({tuple(picture.flatten().tolist()) for picture in same}) >= 3  # each picture has its own draw


@pytest.mark.parametrize("config", [BLUR, DegradationConfig(kind="none")])
def test_a_plain_picture_stays_as_it_is(config: DegradationConfig) -> None:
    plain = torch.tensor([-1.0, 0.3, 1.0]).view(1, 3, 1, 1).expand(8, -1, 32, 32)
    torch.testing.assert_close(degrade(plain, 8, config, seeded()), plain[..., :8, :8])


def test_blurring_a_point_gives_the_gaussian_and_keeps_the_mean() -> None:
    images = torch.zeros(3, 2, 9, 9)
    images[:, :, 4, 4] = 1.0
    sigma = torch.tensor([0.0, 0.6, 2.0])
    blurred = gaussian_blur(images, sigma)
    assert torch.equal(blurred[0], images[0])
    torch.testing.assert_close(blurred.sum(dim=(2, 3)), images.sum(dim=(2, 3)))
    weight = np.exp(-0.5 / 0.6**2)
    assert blurred[1, 0, 4, 4].item() == pytest.approx(1 / (1 + 2 * weight) ** 2, rel=1e-5)
    assert blurred[1, 0, 4, 5].item() == pytest.approx(weight / (1 + 2 * weight) ** 2, rel=1e-5)
    assert not blurred[1, 0, 4, 6]  # beyond the kernel


def test_an_anisotropic_blur_is_wide_along_its_first_axis() -> None:
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
    with pytest.raises(ShapeError, match="one sigma per picture"):
        gaussian_blur(images, wide[:1])


def test_stripes_of_a_pixel_become_grey_and_not_one_of_their_colours() -> None:
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    assert torch.equal(shrink(stripes, 32), torch.zeros(1, 3, 32, 32))
    assert torch.equal(degrade(stripes, 16, DegradationConfig(kind="none"), seeded()), torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("quality", [30, 75, 92])
@pytest.mark.parametrize("size", [(32, 48), (29, 35)])
def test_jpeg_is_what_a_jpeg_file_would_be(quality: int, size: tuple[int, int]) -> None:
    image = pictures(1, 48)[..., : size[0], : size[1]]
    pixels = ((image[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    expected = np.asarray(Image.open(file)).astype(float)
    ours = ((jpeg(image, torch.tensor([quality]))[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    difference = np.abs(ours - expected)
    lost = np.abs(expected - pixels)
    assert difference.mean() < 1.5  # of 255; the library rounds in more places
    assert lost.mean() > 4 * difference.mean()


def test_bsr_makes_pictures_worse_but_leaves_them_recognisable() -> None:
    images = pictures(16, 64)
    clean = shrink(images, 16)
    light, heavy = (bsr(images, 16, settings, seeded()) for settings in (BSRConfig(), HEAVY))
    errors = [(degraded - clean).abs().mean().item() for degraded in (light, heavy)]
    assert 0.01 < errors[0] < errors[1] < 0.3
    assert heavy.abs().max() <= 1
    kept = torch.corrcoef(torch.stack([light.flatten(), clean.flatten()]))[0, 1]
    assert kept > 0.95


@pytest.mark.parametrize("config", [BLUR, BSR])
def test_degrading_under_autocast_is_the_same(config: DegradationConfig) -> None:
    images = pictures(4)
    expected = degrade(images, 8, config, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(degrade(images, 8, config, seeded()), expected)


def test_bytes_in_bytes_out() -> None:
    picture = ((pictures(1)[0].permute(1, 2, 0) + 1) * 127.5).byte().numpy()
    degraded = degrade_picture(picture, 8, BSR, seed=1)
    assert degraded.shape == (8, 8, 3) and degraded.dtype == np.uint8
    assert np.array_equal(degraded, degrade_picture(picture, 8, BSR, seed=1))
    assert abs(degraded.mean() - picture.mean()) < 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blur_prob": 1.5}, "blur_prob: got"),
        ({"min_blur_sigma": 0.7}, "min_blur_sigma, max_blur_sigma"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DegradationConfig(**settings)
    with pytest.raises(ConfigError, match="jpeg_quality"):
        BSRConfig(min_jpeg_quality=0)
    with pytest.raises(ConfigError, match="noise_std"):
        BSRConfig(min_noise_std=0.5, max_noise_std=0.1)
