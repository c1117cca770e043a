"""One downsampler: the images that networks train on, and all that is shrunk for them later, go through the same filter."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip import imaging
from unclip.data import decode_image
from unclip.downscaling import shrink, shrink_known, shrink_square
from unclip.evaluation import scenes
from unclip.models.degradations import DegradationConfig, degrade
from unclip.training.batches import load_images


def rendered(num: int, size: int = 64) -> np.ndarray:
    """Scenes with sharp edges, [num, size, size, 3] uint8."""
    generators = [np.random.default_rng(seed) for seed in range(num)]
    return np.stack([scenes.render(scenes.random_scene(rng), rng, size) for rng in generators])


def rms(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference, levels of 255."""
    return float((one - other).square().mean().sqrt() * 127.5)


@pytest.mark.parametrize(("size", "small"), [(64, 16), (64, 32), (96, 24), (128, 8)])
def test_f138_training_images_and_conditions_are_shrunk_alike(size: int, small: int) -> None:
    """Oracle: what a decoder trains on. An average of areas, another filter, is far from it."""
    encoded = []
    for pixels in rendered(12, size):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling="4:4:4")
        encoded.append(file.getvalue())
    large, trained_on = load_images(encoded, size), load_images(encoded, small)
    condition = degrade(large, small, DegradationConfig(kind="none"), torch.Generator())
    for shrunk in (shrink(large, small), condition):
        assert rms(shrunk, trained_on) < 0.8
        assert rms(F.interpolate(large, small, mode="area"), trained_on) > 4 * rms(shrunk, trained_on)
    assert shrink(large, size) is large


def test_f138_a_photo_given_to_a_command_is_shrunk_as_one_of_the_dataset() -> None:
    image = Image.fromarray(rendered(1, 96)[0]).crop((0, 8, 96, 88))  # 96 x 80 pixels
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    stored = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    assert np.array_equal(np.asarray(shrink_square(stored, 16)), decode_image(file.getvalue(), 16))


def test_f138_known_pixels_are_shrunk_without_the_unknown_ones() -> None:
    images = imaging.from_uint8(rendered(3, 64))
    known = torch.ones(3, 1, 64, 64, dtype=torch.bool)
    known[0, :, :, 24:40] = False
    known[1, :, 5:50, :33] = False
    known[2] = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.97
    found, mask = shrink_known(images, known, 16)
    others, _ = shrink_known(torch.where(known, images, -images), known, 16)
    assert torch.equal(found, others) and found.abs().max() <= 1
    assert torch.equal(mask, F.max_pool2d((~known).float(), 4) == 0) and 0 < mask.float().mean() < 1
    # far from unknown pixels it is the downsampler; beside them it is near to it
    clear = F.max_pool2d((~known).float(), 16, stride=4, padding=6) == 0  # the reach of the filter
    assert clear.any() and (clear & ~mask).sum() == 0
    expected = shrink(images, 16)
    assert torch.allclose(found.where(clear, 0), expected.where(clear, 0), atol=1e-5)
    assert rms(found.where(mask, 0), expected.where(mask, 0)) < 4
