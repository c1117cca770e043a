"""Image files given to a command: any format and size, decoded losslessly in a child process.

The child imports this module, so it imports little.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tasks.rows import REASONS, RowFault
from tasks.untrusted import decode
from tasks.untrusted.sandbox import Sandbox, SandboxFault
from unclip.downscaling import shrink_square
from unclip.errors import InputError

MAX_BYTES = 1 << 27
MAX_PIXELS = 100_000_000
_REQUEST = struct.Struct(">IQB")  # size, most pixels, 1 to add the opacity; then the bytes to decode
_REPLY = struct.Struct(">II")  # width and height of the original; then the pixels
_IMAGE, _FAULT = b"P", b"F"  # first byte of a reply


class GivenImage(NamedTuple):
    pixels: np.ndarray
    """[size, size, 3] uint8 sRGB: the central square, upright, on white, resized if its size differs."""
    width: int
    """Width of the upright original; `height` likewise."""
    height: int
    opacity: np.ndarray | None = None
    """[size, size] uint8, 255 = opaque; only where it was asked for."""


def read(paths: Sequence[str], size: int) -> list[GivenImage]:
    """Read image files.

    Args:
        size: height and width of the results in pixels.

    Raises:
        InputError: a file is missing, too large, or cannot be decoded as an image; names it.
    """
    with Sandbox(answer) as sandbox:
        return [_read(sandbox, path, size) for path in paths]


def check(*paths: str) -> None:
    """Raise `InputError` for the first path that is not a file."""
    for path in paths:
        if not Path(path).is_file():
            raise InputError(
                f"{path}: {'not a file' if Path(path).exists() else 'does not exist'}. Name an image file."
            )


def decode_bytes(sandbox: Sandbox, data: bytes, size: int, max_pixels: int, with_opacity: bool = False) -> GivenImage:
    """Decode the bytes of an image in a child that runs `answer`.

    Args:
        size: height and width of the result in pixels.
        max_pixels: most pixels of the original.
        with_opacity: read the alpha channel, too; 255 everywhere if there is none.

    Raises:
        InputError: they cannot be decoded as an image; says why.
    """
    try:
        reply = sandbox.call(_REQUEST.pack(size, max_pixels, with_opacity) + data)
    except SandboxFault as fault:
        reply = _FAULT + f"decode_{fault.kind}".encode()
    kind, body = reply[:1], reply[1:]
    channels = 3 + with_opacity
    if kind == _IMAGE and len(body) == _REPLY.size + size * size * channels:
        width, height = _REPLY.unpack_from(body)
        pixels = np.frombuffer(body, np.uint8, offset=_REPLY.size)
        opacity = pixels[size * size * 3 :].reshape(size, size) if with_opacity else None
        return GivenImage(pixels[: size * size * 3].reshape(size, size, 3), width, height, opacity)
    reason = body.decode("ascii", "replace") if kind == _FAULT else "decode_crash"
    if reason == "too_many_pixels":
        raise InputError(f"more than {max_pixels:,} pixels")
    raise InputError(REASONS.get(reason, "decoding failed"))


def answer(request: bytes) -> bytes:
    """Handle one request in the child."""
    size, max_pixels, with_opacity = _REQUEST.unpack_from(request)
    data = request[_REQUEST.size :]
    try:
        image, (width, height) = decode.decode_rgb(data, size, max_pixels)
        opacity = _square(decode.decode_opacity(data), size).tobytes() if with_opacity else b""
    except RowFault as fault:
        return _FAULT + fault.reason.encode()
    return _IMAGE + _REPLY.pack(width, height) + _square(image, size).tobytes() + opacity


def _square(image: Image.Image, size: int) -> Image.Image:
    return image if image.size == (size, size) else shrink_square(image, size)


def warm_up() -> None:
    """Prepare the child before its first request."""
    decode.warm_up()


def _read(sandbox: Sandbox, path: str, size: int) -> GivenImage:
    check(path)
    file = Path(path)
    if file.stat().st_size > MAX_BYTES:
        raise InputError(
            f"{path}: got {file.stat().st_size:,} bytes, expected at most {MAX_BYTES:,}. Shrink the image."
        )
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
    try:
        return decode_bytes(sandbox, data, size, MAX_PIXELS)
    except InputError as error:
        raise InputError(f"{path}: {error}. Name another image.") from None
