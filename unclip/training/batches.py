"""Conversion of batch rows to tensors."""

import concurrent.futures
import functools
import hashlib
import math
import os
import threading
from collections.abc import Callable
from typing import Any

import cachetools
import numpy as np
import torch
from torch import Tensor

from unclip.data import decode_image
from unclip.errors import InputError

_Decode = Callable[[bytes, int], np.ndarray]

DECODED_BYTES = 1 << 26
"""Memory for decoded images that a process keeps, so that a small dataset is decoded in the first epoch alone."""
_ENTRY_BYTES = 400
"""Memory of a key and its place among the others."""


def load_images(encoded: list[bytes], size: int) -> Tensor:
    """Decode stored JPEGs to float32 [B, 3, size, size] in [-1, 1], center-cropped."""
    pixels = np.stack(
        list(_decoding_threads().map(lambda data: decoded(data, size), encoded))
    )  # [B, size, size, 3] uint8
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _remembering(num_bytes: int) -> Callable[[_Decode], Any]:
    """Decorator of a function that decodes an image to a size; keeps the results that were used last."""
    return cachetools.cached(
        cachetools.LRUCache(num_bytes, getsizeof=lambda pixels: pixels.nbytes + _ENTRY_BYTES),
        key=lambda data, size: (size, hashlib.blake2b(data, digest_size=16).digest()),
        lock=threading.Lock(),
    )


@_remembering(DECODED_BYTES)
def decoded(data: bytes, size: int) -> np.ndarray:
    """Result of `decode_image`, perhaps of an earlier call: uint8 [size, size, 3], not to be changed."""
    return decode_image(data, size)


@functools.cache
def _decoding_threads() -> concurrent.futures.ThreadPoolExecutor:
    """Threads that decode in parallel: Pillow releases the GIL."""
    return concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="decode")


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
