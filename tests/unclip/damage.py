"""Flipped bits."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def flipped(data: bytes, bit: int) -> bytes:
    """Return the data with one bit flipped."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flip(path: str | Path, bit: int) -> None:
    """Flip one bit of a file, in place."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = flipped(file.read(1), bit % 8)
        file.seek(bit // 8)
        file.write(byte)


@contextlib.contextmanager
def damaged(path: str | Path, bit: int) -> Iterator[None]:
    """Flip one bit of a file for the duration of a block."""
    flip(path, bit)
    try:
        yield
    finally:
        flip(path, bit)
