"""Image files given to a command: any format and size, decoded losslessly in a child process.

The child imports this module, so it imports little.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.rows import REASONS, RowFault
from tasks.untrusted import decode
from tasks.untrusted.sandbox import Sandbox, SandboxFault
from unclip.downscaling import shrink_square
from unclip.errors import InputError

MAX_BYTES = 1 << 27
MAX_PIXELS = 100_000_000
_REQUEST = struct.Struct(">I")  # size; then the bytes to decode
_REPLY = struct.Struct(">II")  # width and height of the original; then the pixels
_IMAGE, _FAULT = b"P", b"F"  # first byte of a reply


class GivenImage(NamedTuple):
    pixels: np.ndarray
    """[size, size, 3] uint8 sRGB: the central square, upright, on white, resized if its size differs."""
    width: int
    """Width of the upright original; `height` likewise."""
    height: int


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


def answer(request: bytes) -> bytes:
    """Handle one request in the child."""
    (size,) = _REQUEST.unpack_from(request)
    try:
        image, (width, height) = decode.decode_rgb(request[_REQUEST.size :], size, MAX_PIXELS)
    except RowFault as fault:
        return _FAULT + fault.reason.encode()
    if image.size != (size, size):
        image = shrink_square(image, size)
    return _IMAGE + _REPLY.pack(width, height) + image.tobytes()


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
        reply = sandbox.call(_REQUEST.pack(size) + file.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
    except SandboxFault as fault:
        reply = _FAULT + f"decode_{fault.kind}".encode()
    kind, body = reply[:1], reply[1:]
    if kind == _IMAGE and len(body) == _REPLY.size + size * size * 3:
        width, height = _REPLY.unpack_from(body)
        pixels = np.frombuffer(body, np.uint8, offset=_REPLY.size).reshape(size, size, 3)
        return GivenImage(pixels, width, height)
    reason = body.decode("ascii", "replace") if kind == _FAULT else "decode_crash"
    raise InputError(f"{path}: {_MESSAGES.get(reason) or REASONS.get(reason, 'decoding failed')}. Name another image.")


_MESSAGES = {"too_many_pixels": f"more than {MAX_PIXELS:,} pixels"}
