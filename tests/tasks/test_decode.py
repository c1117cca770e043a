import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tasks.decode import Picture, decode
from tasks.rows import RowFault


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(data: bytes, image_size: int = 64) -> tuple[Picture, np.ndarray]:
    picture = decode(data, image_size, jpeg_quality=95, max_pixels=1_000_000)
    image = Image.open(io.BytesIO(picture.jpg))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (picture.width, picture.height))
    return picture, np.asarray(image).astype(int)


def reason(data: bytes) -> str:
    with pytest.raises(RowFault) as fault:
        decode(data, 64, 95, max_pixels=1_000_000)
    return fault.value.reason


def ramp(width: int = 40, height: int = 20) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_size_keeps_the_ratio_and_never_grows() -> None:
    for size, expected in (
        ((400, 200), (128, 64)),
        ((200, 400), (64, 128)),
        ((30, 20), (30, 20)),
        ((500, 3), (500, 3)),
    ):
        picture, _ = stored(encoded(ramp(*size), "JPEG"))
        assert (picture.width, picture.height) == expected
        assert (picture.original_width, picture.original_height) == size


def test_16_bit_grey_is_scaled() -> None:
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    _, pixels = stored(encoded(Image.fromarray(levels), "PNG"))
    assert np.abs(pixels[..., 0] - levels / 257).max() < 4


def test_16_bit_colour_is_scaled() -> None:
    row = b"\0" + struct.pack(">3H", 0xFFFF, 0x8000, 0) * 32
    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row * 32)), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    _, pixels = stored(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    assert np.abs(pixels - [255, 128, 0]).max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation: int) -> None:
    upright = ramp()
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    held = upright.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (("JPEG", {"quality": 95, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True})):
        picture, pixels = stored(encoded(held, kind, exif=exif, **options))
        assert (picture.original_width, picture.original_height) == (40, 20)
        assert np.abs(pixels - np.asarray(upright)).mean() < 3, kind


def test_colour_modes_become_rgb_on_white() -> None:
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    half = Image.new("RGBA", (32, 32), (255, 0, 0, 128))
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([9, 9, 9, 0, 0, 255])
    palette.paste(1, (0, 0, 32, 32))
    for data, colour in (
        (encoded(clear, "PNG"), (255, 255, 255)),
        (encoded(half, "WEBP", lossless=True), (255, 127, 127)),
        (encoded(Image.new("LA", (32, 32), (0, 0)), "PNG"), (255, 255, 255)),
        (encoded(palette, "GIF"), (0, 0, 255)),
        (encoded(palette, "PNG", transparency=1), (255, 255, 255)),
        (encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
        (encoded(Image.new("1", (32, 32), 1), "PNG"), (255, 255, 255)),
        (encoded(Image.new("L", (32, 32), 77), "JPEG"), (77, 77, 77)),
    ):
        picture, pixels = stored(data)
        assert np.abs(pixels - colour).max() <= 4, colour
        assert picture.phash is None, "a picture of one colour has no perceptual hash"


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime")]
    _, pixels = stored(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert np.abs(pixels - [255, 0, 0]).max() <= 4


def test_nothing_but_pixels_is_stored() -> None:
    exif = Image.Exif()
    exif[0x010E] = "SECRET"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "SECRET")
    for data in (
        encoded(ramp(), "JPEG", exif=exif, comment=b"SECRET", icc_profile=b"SECRET" * 40),
        encoded(ramp(), "PNG", exif=exif, pnginfo=text, icc_profile=b"SECRET" * 40),
    ):
        assert b"SECRET" in data or data.startswith(b"\x89PNG")
        picture, _ = stored(data)
        assert b"SECRET" not in picture.jpg
        assert not set(Image.open(io.BytesIO(picture.jpg)).info) - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_what_is_no_picture_or_a_damaged_one() -> None:
    jpeg, png = encoded(ramp(), "JPEG"), encoded(ramp(), "PNG")
    assert reason(b"<html>sold out</html>") == reason(b"x") == "not_an_image"
    assert reason(encoded(ramp(), "BMP")) == reason(encoded(ramp(), "TIFF")) == "not_an_image"
    assert reason(b'<svg xmlns="http://www.w3.org/2000/svg"/>') == "not_an_image"
    assert reason(jpeg[: len(jpeg) // 2]) == reason(png[: len(png) // 2]) == "decode_error"


def test_a_bomb_is_refused_by_its_header() -> None:
    for side in (1_001, 12_000, 60_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + header
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
        assert reason(data) == "too_many_pixels"
