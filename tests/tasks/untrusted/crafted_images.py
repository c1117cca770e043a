"""Image files as found in the wild or in attacks, each with the expected pixels or failure reason."""

import io
import itertools
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

Colour = tuple[int, int, int]
SIZE = 32
UNDO = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
        7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip


@dataclass(frozen=True)
class Crafted:
    """A file and its expected result: a reason, a colour, or the pixels [height, width, 3]."""

    name: str
    data: bytes
    expected: str | Colour | np.ndarray

    def __repr__(self) -> str:
        return self.name


FAULTS = {
    "F5": "half-|png-no-end",
    "F13": "html|json|zip|zeros|wave|jpeg-and-zip",
    "F14": "no-bytes|one-byte|.*-magic|png-no-data",
    "F15": "png-(7072|12000|60000|wide|largest|true-bomb)|jpeg-65000|gif-65535|avif-8000|.*-bomb",
    "F16": ".*orientation|exif-",
    "F17": "jpeg-(cmyk|ycck|grey)|png-1-|.*alpha|.*palette|.*trns|.*rgba|gif-transparent|icc-",
    "F18": "png-16-",
    "F19": ".*-animated|kind-TIFF",
    "F20": "svg|ps|psd|fits|heic|avif-magic|jxl|kind-",
}
"""Fault -> pattern of the file names that show it; the first match counts."""


def fault_of(file: Crafted) -> str:
    """Return the fault that a file shows, or "other"."""
    return next((fault for fault, names in FAULTS.items() if re.match(names, file.name)), "other")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ramp(width: int = 40, height: int = 20) -> Image.Image:
    """Return a gradient: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(depth: int, colour_type: int, row: bytes, *extra: bytes, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    """Build a PNG whose rows are all the same."""
    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    body = zlib.compress((b"\0" + row) * size[1])
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *extra, chunk(b"IDAT", body), chunk(b"IEND", b"")))


def header_only_png(width: int, height: int) -> bytes:
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """Return the same JPEG with another size in its frame header."""
    at = next(data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def with_avif_size(data: bytes, width: int, height: int) -> bytes:
    """Return the same AVIF with another size in its container; that of the coded frame stays."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


def icc_profile(description: bytes, space: bytes = b"RGB ", swapped: bool = True) -> bytes:
    """Build a display profile: RGB of gamma 2.2 with the primaries of sRGB, red and green optionally swapped, or linear grey."""

    def fixed(*numbers: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    red, green, blue = fixed(0.4360, 0.2225, 0.0139), fixed(0.3851, 0.7169, 0.0971), fixed(0.1431, 0.0606, 0.7141)
    red, green = (green, red) if swapped else (red, green)
    gamma = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round((2.2 if space == b"RGB " else 1.0) * 256))
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(description) + 1) + description + b"\0" * 79}
    tags |= {b"cprt": b"text\0\0\0\0none\0", b"wtpt": fixed(0.9642, 1.0, 0.8249)}
    colours = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, b"rTRC": gamma, b"gTRC": gamma, b"bTRC": gamma}
    tags |= colours if space == b"RGB " else {b"kTRC": gamma}
    index, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        index += name + struct.pack(">II", offset + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + index + body


def ycck(colour: Colour) -> bytes:
    """Build a CMYK JPEG as Adobe writes it: inverted, with C, M and Y stored as luminance and chrominance."""
    negative = (255 - colour[0], 255 - colour[1], 255 - colour[2])
    stored = Image.new("RGB", (SIZE, SIZE), negative).convert("YCbCr")
    planes = [Image.eval(plane, lambda level: 255 - level) for plane in stored.split()]  # the encoder inverts again
    data = encoded(Image.merge("CMYK", (*planes, Image.new("L", (SIZE, SIZE), 0))), "JPEG", quality=100)
    at = data.index(b"Adobe") + 11  # transform: none becomes YCCK
    assert data[at] == 0
    return data[:at] + b"\2" + data[at + 1 :]


def oriented(orientation: int, kind: str, **options: Any) -> bytes:
    """Encode `ramp` so that the orientation tag turns it upright."""
    undo = UNDO[orientation]
    stored = ramp().transpose(Image.Transpose[undo]) if undo else ramp()
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, kind, exif=exif, **options)


def solid(mode: str, colour: Any, kind: str, **options: Any) -> bytes:
    return encoded(Image.new(mode, (SIZE, SIZE), colour), kind, **options)


def palette(kind: str, colours: list[int], **options: Any) -> bytes:
    """Encode an image filled with entry 1 of the palette."""
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette(colours)
    image.paste(1, (0, 0, SIZE, SIZE))
    return encoded(image, kind, **options)


def crafted() -> Iterator[Crafted]:
    yield from itertools.starmap(Crafted, _valid())
    yield from itertools.starmap(Crafted, _refused())


def _valid() -> Iterator[tuple[str, bytes, Colour | np.ndarray]]:
    upright, white, red, half = np.asarray(ramp()), (255, 255, 255), (255, 0, 0), (255, 127, 127)
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("JPEG", {"quality": 95, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
    )  # fmt: skip
    for (kind, options), orientation in itertools.product(kinds, UNDO):
        yield f"{kind}-orientation-{orientation}", oriented(orientation, kind, **options), upright
    yield "exif-orientation-9", oriented_out_of_range(), upright
    yield "exif-garbage", encoded(ramp(), "JPEG", exif=b"Exif\0\0garbage", quality=95, subsampling=0), upright

    levels = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
    grey = np.repeat((levels / 257)[..., None], 3, 2)
    yield "png-16-grey", encoded(Image.fromarray(levels), "PNG"), grey
    yield "png-16-rgb", png(16, 2, struct.pack(">3H", 0xFFFF, 0x8000, 0) * SIZE), (255, 128, 0)
    yield "png-16-rgba", png(16, 6, struct.pack(">4H", 0xFFFF, 0, 0, 0x8000) * SIZE), half
    yield "png-16-grey-alpha", png(16, 4, struct.pack(">2H", 0, 0x8000) * SIZE), (127, 127, 127)
    yield "png-16-grey-dark", png(16, 0, b"\x01\xff" * SIZE), (1, 1, 1)
    yield "png-16-grey-trns", png(16, 0, b"\x12\x34" * SIZE, chunk(b"tRNS", b"\x12\x34")), white
    yield "png-16-grey-trns-other", png(16, 0, b"\x12\x34" * SIZE, chunk(b"tRNS", b"\x12\x35")), (18, 18, 18)
    yield "png-16-rgb-trns", png(16, 2, b"\xff\xff\0\0\0\0" * SIZE, chunk(b"tRNS", b"\xff\xff" + bytes(4))), white
    for depth, level in ((1, 255), (2, 170), (4, 102)):
        packed = {1: b"\xff", 2: b"\xaa", 4: b"\x66"}[depth] * (SIZE * depth // 8)
        yield f"png-{depth}-grey", png(depth, 0, packed), (level, level, level)
        blue = chunk(b"PLTE", bytes(3 * ((1 << depth) - 1)) + b"\0\0\xff")
        yield f"png-{depth}-palette", png(depth, 3, b"\xff" * (SIZE * depth // 8), blue), (0, 0, 255)
    yield "png-1-grey-trns", png(1, 0, bytes(SIZE // 8), chunk(b"tRNS", b"\0\0")), white
    yield "png-8-grey-trns", png(8, 0, b"\x07" * SIZE, chunk(b"tRNS", b"\0\7")), white
    yield "png-rgb-trns", png(8, 2, b"\xff\0\0" * SIZE, chunk(b"tRNS", b"\0\xff\0\0\0\0")), white
    yield "png-palette-trns", palette("PNG", [9, 9, 9, 0, 0, 255], transparency=1), white
    yield "png-palette-trns-other", palette("PNG", [9, 9, 9, 0, 0, 255], transparency=0), (0, 0, 255)
    yield "png-palette-half", palette("PNG", [9, 9, 9, 255, 0, 0], transparency=bytes([255, 128])), half
    yield "png-grey-alpha", solid("LA", (0, 0), "PNG"), white
    yield "png-grey-half-alpha", solid("LA", (0, 128), "PNG"), (127, 127, 127)
    yield "png-rgba-clear", solid("RGBA", (255, 0, 0, 0), "PNG"), white
    yield "png-rgba-half", solid("RGBA", (255, 0, 0, 128), "PNG"), half
    yield "png-animated", solid("RGB", "red", "PNG", save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE))]), red
    yield "png-no-end", solid("RGB", "red", "PNG")[:-12], red
    yield "png-text-and-trailing", solid("RGB", "red", "PNG") + b"<script>alert(1)</script>" * 50, red
    yield "png-gamma", png(8, 2, b"\x80\x80\x80" * SIZE, chunk(b"gAMA", struct.pack(">I", 100_000))), (128, 128, 128)
    yield "png-one-pixel", png(8, 2, b"\xff\0\0", size=(1, 1)), red
    yield "png-one-row", png(8, 2, b"\xff\0\0" * 3000, size=(3000, 1)), red

    yield "jpeg-grey", solid("L", 77, "JPEG"), (77, 77, 77)
    yield "jpeg-progressive", encoded(ramp(), "JPEG", progressive=True, quality=95, subsampling=0), upright
    yield "jpeg-420", solid("RGB", (200, 100, 50), "JPEG", subsampling=2), (200, 100, 50)
    yield "jpeg-restart-markers", encoded(ramp(), "JPEG", restart_marker_blocks=1, quality=95, subsampling=0), upright
    yield "jpeg-cmyk", solid("CMYK", (0, 255, 255, 0), "JPEG"), red
    yield "jpeg-cmyk-black", solid("CMYK", (0, 0, 0, 255), "JPEG"), (0, 0, 0)
    yield "jpeg-cmyk-paper", solid("CMYK", (0, 0, 0, 0), "JPEG"), white
    yield "jpeg-ycck", ycck((200, 60, 30)), (200, 60, 30)
    yield "jpeg-and-zip", solid("RGB", "red", "JPEG") + b"PK\x03\x04" + bytes(200), red
    yield "jpeg-comment", solid("RGB", "red", "JPEG", comment=b"<?php system(1) ?>"), red

    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "lime", "blue")]
    yield "gif-animated", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), red
    yield "gif-palette", palette("GIF", [9, 9, 9, 0, 0, 255]), (0, 0, 255)
    yield "gif-transparent", palette("GIF", [9, 9, 9, 0, 0, 255], transparency=1), white
    yield "gif-grey", solid("L", 77, "GIF"), (77, 77, 77)
    yield "gif-interlaced", encoded(ramp().quantize(256), "GIF", interlace=1), upright
    yield "webp-animated", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), red
    yield "avif-animated", encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:], quality=95), red
    yield "avif-lossy", solid("RGB", (200, 100, 50), "AVIF"), (200, 100, 50)
    yield "avif-alpha", solid("RGBA", (255, 0, 0, 128), "AVIF", quality=100), half
    yield "webp-lossy", solid("RGB", (200, 100, 50), "WEBP", quality=95), (200, 100, 50)
    yield "webp-alpha", solid("RGBA", (255, 0, 0, 128), "WEBP", lossless=True), half
    yield "webp-lossy-alpha", solid("RGBA", (255, 0, 0, 0), "WEBP"), white

    swapped = icc_profile(b"red and green swapped")
    for kind, options in kinds:
        yield f"{kind}-icc-swapped", solid("RGB", (255, 0, 0), kind, icc_profile=swapped, **options), (0, 255, 0)
    same = icc_profile(b"same primaries", swapped=False)
    yield "icc-same-primaries", solid("RGB", (200, 100, 50), "PNG", icc_profile=same), (200, 100, 50)
    yield "icc-named-srgb", solid("RGB", "red", "PNG", icc_profile=icc_profile(b"sRGB IEC61966-2.1")), red
    yield "icc-rgba", solid("RGBA", (255, 0, 0, 128), "PNG", icc_profile=swapped), (127, 255, 127)
    yield "icc-palette", palette("PNG", [9, 9, 9, 255, 0, 0], icc_profile=swapped), (0, 255, 0)
    linear = icc_profile(b"linear grey", b"GRAY")
    yield "icc-grey", solid("L", 55, "PNG", icc_profile=linear), (128, 128, 128)
    yield "icc-grey-alpha", solid("LA", (55, 255), "PNG", icc_profile=linear), (128, 128, 128)
    yield "icc-rgb-on-grey", solid("L", 77, "JPEG", icc_profile=swapped), (77, 77, 77)
    yield "icc-grey-on-rgb", solid("RGB", "red", "PNG", icc_profile=linear), red
    yield "icc-rgb-on-cmyk", solid("CMYK", (0, 255, 255, 0), "JPEG", icc_profile=swapped), red
    yield "icc-truncated", solid("RGB", "red", "PNG", icc_profile=swapped[:150]), red
    yield "icc-garbage", solid("RGB", "red", "JPEG", icc_profile=b"garbage" * 40), red


def oriented_out_of_range() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 9
    return encoded(ramp(), "PNG", exif=exif)


def _refused() -> Iterator[tuple[str, bytes, str]]:
    upright = ramp()
    for kind in ("BMP", "TIFF", "ICO", "PPM", "TGA", "PCX", "EPS", "PDF", "JPEG2000", "DDS"):
        yield f"kind-{kind}", encoded(upright, kind), "not_an_image"
    for name, data in (
        ("html", b"<html>sold out</html>"),
        ("svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
        ("json", b'{"error": 404}'),
        ("zip", b"PK\x03\x04" + bytes(100)),
        ("ps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch /tmp/x) (w) file\n"),
        ("psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 32, 32, 8, 3) + bytes(400)),
        ("fits", b"SIMPLE  =                    T".ljust(2880)),
        ("heic", b"\0\0\0\x18ftypheic" + bytes(100)),
        ("avif-magic", b"\0\0\0\x18ftypavif" + bytes(100)),
        ("jxl", b"\xff\x0a" + bytes(100)),
        ("one-byte", b"\xff"),
        ("no-bytes", b""),
        ("zeros", bytes(1000)),
        ("jpeg-magic", b"\xff\xd8\xff"),
        ("png-magic", b"\x89PNG\r\n\x1a\n"),
        ("gif-magic", b"GIF89a"),
        ("wave", b"RIFF\x1a\0\0\0WAVEfmt "),
    ):
        yield name, data, "not_an_image"

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("WEBP", {})):
        data = encoded(noise, kind, **options)
        yield f"half-{kind}{'-progressive' * bool(options)}", data[: len(data) // 2], "decode_error"
    data = encoded(noise, "PNG")
    yield "webp-magic", b"RIFF\x1a\0\0\0WEBPVP8 ", "decode_error"
    yield "png-bad-crc", data[:-20] + bytes([data[-20] ^ 1]) + data[-19:], "decode_error"
    yield "png-no-data", png(8, 2, b"")[: 8 + 25] + chunk(b"IEND", b""), "decode_error"
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(20_000_000)))
    yield "png-icc-bomb", png(8, 2, b"\xff\0\0" * SIZE, profile), (255, 0, 0)
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "x" * 30_000_000, zip=True)
    yield "png-text-bomb", encoded(upright, "PNG", pnginfo=text), np.asarray(upright)

    for size in (7_072, 12_000, 60_000):
        yield f"png-{size}", header_only_png(size, size), "too_many_pixels"
    yield "png-wide", header_only_png(50_000_001, 1), "too_many_pixels"
    yield "png-largest", header_only_png(2**31 - 1, 2**31 - 1), "too_many_pixels"
    yield "jpeg-65000", with_jpeg_size(encoded(upright, "JPEG"), 65_000, 65_000), "too_many_pixels"
    yield "gif-65535", b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"," + bytes(20), "too_many_pixels"
    yield "avif-8000", with_avif_size(encoded(upright, "AVIF"), 8_000, 8_000), "too_many_pixels"
    yield "avif-60000-bomb", with_avif_size(encoded(upright, "AVIF"), 60_000, 60_000), "not_an_image"
    yield "half-AVIF", encoded(noise, "AVIF")[:1000], "not_an_image"
    bomb = encoded(Image.new("1", (12_000, 12_000)), "PNG", optimize=True)
    yield "png-true-bomb", bomb, "too_many_pixels"
