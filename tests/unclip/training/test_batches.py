"""Batches of images: each is decoded once while there is memory for it."""

import io

import cachetools
import numpy as np
import pytest
import torch
from PIL import Image

from unclip.data import decode_image
from unclip.training import batches


def jpegs(count: int) -> list[bytes]:
    encoded = []
    for seed in range(count):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        encoded.append(file.getvalue())
    return encoded


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes that images were decoded to, with memory for some twenty images of 8 pixels."""
    calls: list[int] = []

    def decode(data: bytes, size: int) -> np.ndarray:
        calls.append(size)
        return decode_image(data, size)

    monkeypatch.setattr(batches, "decode_image", decode)
    num_bytes = 20 * batches._Decoded(max(jpegs(50), key=len), np.zeros((8, 8, 3), np.uint8)).num_bytes
    memory = cachetools.LRUCache(num_bytes, getsizeof=lambda decoded: decoded.num_bytes)
    again = cachetools.cached(memory, batches.decoded.cache_key, batches.decoded.cache_lock)
    monkeypatch.setattr(batches, "decoded", again(batches.decoded.__wrapped__))
    return calls


def expected(encoded: list[bytes], size: int) -> torch.Tensor:
    pixels = np.stack([decode_image(data, size) for data in encoded])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_images_are_decoded_once_for_each_size(decoded: list[int]) -> None:
    encoded = jpegs(4)
    for size in (8, 8, 6, 6, 8):
        assert torch.equal(batches.load_images(encoded, size), expected(encoded, size))
    assert sorted(decoded) == [6] * 4 + [8] * 4


def test_decoded_images_take_bounded_memory(decoded: list[int]) -> None:
    encoded = jpegs(50)
    for _ in range(2):
        assert torch.equal(batches.load_images(encoded, 8), expected(encoded, 8))
    assert 20 <= len(batches.decoded.cache) < 25
    assert len(decoded) > 75, "there is memory for twenty to twenty-five of them"


def test_an_image_that_is_larger_than_the_memory_is_decoded(decoded: list[int]) -> None:
    encoded = jpegs(1)
    for _ in range(2):
        assert torch.equal(batches.load_images(encoded, 300), expected(encoded, 300))
    assert decoded == [300, 300]
