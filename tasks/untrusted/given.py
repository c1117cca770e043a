"""Pictures that a command was given: files of any kind and size, decoded in a child process, without loss.

This module is imported by that child, so it imports little.
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
from unclip.errors import InputError

MAX_BYTES = 1 << 27
MAX_PIXELS = 100_000_000
_REQUEST = struct.Struct(">I")  # side; then the bytes to decode
_REPLY = struct.Struct(">II")  # width and height of the original; then the pixels
_PICTURE, _FAULT = b"P", b"F"  # what a reply begins with


class GivenPicture(NamedTuple):
    pixels: np.ndarray
    """[side, side, 3] uint8 sRGB: the central square, resized unless it has that size; upright; on white."""
    width: int
    """Of the file's picture held upright, like `height`."""
    height: int


def read(paths: Sequence[str], side: int) -> list[GivenPicture]:
    """Read picture files.

    Args:
        side: of the squares, pixels.

    Raises:
        InputError: a file is missing, too large, or no picture that can be decoded; names it.
    """
    with Sandbox(answer) as sandbox:
        return [_read(sandbox, path, side) for path in paths]


def check(*paths: str) -> None:
    """Raise `InputError` for the first that is no file."""
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"{path}: {'no file' if Path(path).exists() else 'does not exist'}. Name a picture.")


def answer(request: bytes) -> bytes:
    """What the child does with a request."""
    (side,) = _REQUEST.unpack_from(request)
    try:
        image, (width, height) = decode.decode_rgb(request[_REQUEST.size :], side, MAX_PIXELS)
    except RowFault as fault:
        return _FAULT + fault.reason.encode()
    if image.size != (side, side):
        crop = min(image.size)
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + crop, top + crop))
    return _PICTURE + _REPLY.pack(width, height) + image.tobytes()


def warm_up() -> None:
    """What the child does before its first request."""
    decode.warm_up()


def _read(sandbox: Sandbox, path: str, side: int) -> GivenPicture:
    check(path)
    file = Path(path)
    if file.stat().st_size > MAX_BYTES:
        raise InputError(
            f"{path}: got {file.stat().st_size:,} bytes, expected at most {MAX_BYTES:,}. Shrink the picture."
        )
    try:
        reply = sandbox.call(_REQUEST.pack(side) + file.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
    except SandboxFault as fault:
        reply = _FAULT + f"decode_{fault.kind}".encode()
    kind, body = reply[:1], reply[1:]
    if kind == _PICTURE and len(body) == _REPLY.size + side * side * 3:
        width, height = _REPLY.unpack_from(body)
        pixels = np.frombuffer(body, np.uint8, offset=_REPLY.size).reshape(side, side, 3)
        return GivenPicture(pixels, width, height)
    reason = body.decode("ascii", "replace") if kind == _FAULT else "decode_crash"
    raise InputError(f"{path}: {_SAID.get(reason) or REASONS.get(reason, 'decoding failed')}. Name another picture.")


_SAID = {"too_many_pixels": f"more than {MAX_PIXELS:,} pixels"}
