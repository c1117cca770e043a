"""Rows of a batch as tensors."""

import concurrent.futures
import functools
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.data import decode_image


def load_images(encoded: list[bytes], side: int) -> Tensor:
    """Stored JPEGs as float32 [B, 3, side, side] in [-1, 1], their central squares."""
    pixels = np.stack(
        list(_decoding_threads().map(lambda data: decode_image(data, side), encoded))
    )  # [B, side, side, 3] uint8
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@functools.cache
def _decoding_threads() -> concurrent.futures.ThreadPoolExecutor:
    """Pillow decodes without holding the interpreter."""
    return concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="decode")


def stack_rows(rows: list[Any]) -> Tensor:
    """Vectors of equal length as [B, ...], in their own dtype."""
    return torch.from_numpy(np.stack(rows))
