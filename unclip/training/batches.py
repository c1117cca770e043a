"""Conversion of batch rows to tensors."""

import concurrent.futures
import functools
import math
import threading
from typing import Any, NamedTuple

import cachetools
import numpy as np
import torch
from torch import Tensor

from unclip.background import usable_cpus
from unclip.data import decode_image
from unclip.errors import InputError

DECODED_BYTES = 1 << 26
"""Memory for decoded images that a process keeps, so that a small dataset is decoded in the first epoch alone."""
_ENTRY_BYTES = 400
"""Memory of an entry besides its image."""


class _Decoded(NamedTuple):
    encoded: bytes
    pixels: np.ndarray
    """[size, size, 3] uint8."""

    @property
    def num_bytes(self) -> int:
        return len(self.encoded) + self.pixels.nbytes + _ENTRY_BYTES


def load_images(encoded: list[bytes], size: int) -> Tensor:
    """Decode stored JPEGs to float32 [B, 3, size, size] in [-1, 1], center-cropped."""
    pixels = np.stack(
        list(_decoding_threads().map(lambda data: decoded(data, size).pixels, encoded))
    )  # [B, size, size, 3] uint8
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@cachetools.cached(
    # Bytes are compared: hashing them safely would take a tenth of the time of decoding them.
    cachetools.LRUCache(DECODED_BYTES, getsizeof=lambda decoded: decoded.num_bytes),
    key=lambda data, size: (size, data),
    lock=threading.Lock(),
)
def decoded(data: bytes, size: int) -> _Decoded:
    """A JPEG and its pixels from `decode_image`, perhaps those of an earlier call, which are not to be changed."""
    return _Decoded(data, decode_image(data, size))


@functools.cache
def _decoding_threads() -> concurrent.futures.ThreadPoolExecutor:
    """Threads that decode in parallel: Pillow releases the GIL."""
    return concurrent.futures.ThreadPoolExecutor(max_workers=usable_cpus(), thread_name_prefix="decode")


def stack_halves(rows: list[bytes], *shape: int) -> Tensor:
    """Stack rows that `unclip.data.half_bytes` stored to float32 [B, *shape].

    Raises:
        InputError: a row has another number of values.
    """
    expected = math.prod(shape)
    for row in rows:
        if len(row) != 2 * expected:
            raise InputError(
                f"table: got a row of {len(row)} bytes, expected {2 * expected}, those of {list(shape)} in half precision. "
                "The table was made with other settings; run the pipeline again."
            )
    return torch.from_numpy(np.frombuffer(b"".join(rows), "<f2").astype(np.float32)).view(-1, *shape)


def stack_rows(rows: list[Any]) -> Tensor:
    """Stack arrays of equal shape to [B, ...], keeping their dtype."""
    return torch.from_numpy(np.stack(rows))
