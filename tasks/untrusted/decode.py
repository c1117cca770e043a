"""Decode an untrusted image and re-encode it as a small upright sRGB JPEG without metadata.

`decode` does the work; `DecodingPool` runs it in child processes, as untrusted bytes require. The children import this
module, so it imports little.
"""

import dataclasses
import functools
import io
import math
import re
import struct
import time
import urllib.parse
import warnings
import zlib

import cv2
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError, features

# Pillow would otherwise import these when an image first needs them, and a confined child can open no file.
from PIL import (  # noqa: F401  # isort: skip
    GifImagePlugin, ImageColor, ImageFilter, ImagePalette, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, TiffImagePlugin,
    WebPImagePlugin,
)  # fmt: skip

from tasks.rows import REASONS, RowFault
from tasks.untrusted import local_files
from tasks.untrusted.domains import registrable_domain
from tasks.untrusted.sandbox import DEFAULT_LIMITS, Limits, Sandbox, SandboxFault

VERSION = 3
"""Increased whenever the same bytes decode to different pixels than before."""
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF")
"""Formats that are decoded, and AVIF where Pillow can."""
if features.check("avif"):  # Pillow 11.3 and later, unless it was built without
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a thread per core would count as the child's memory
    FORMATS = (*FORMATS, "AVIF")
CHROMA_SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
"""Chroma at full, at half the horizontal and at half the resolution; Pillow numbers them 0, 1 and 2."""
MAX_SCANS = 40
"""Scans of a JPEG. Encoders write at most about 15, and each costs a pass over all coefficients, however short it is."""
SLOW_SECONDS = 1.0
"""Decoding time that each image may take on average; a site is charged for more."""

MAX_PROFILE_BYTES = 16 << 20
"""Unpacked size of the colour profile of a PNG, as much as a JPEG can hold; a larger one is ignored."""
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE_BYTES  # Pillow has one limit for texts and profiles

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_ANCILLARY = (b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"fdAT")  # other optional chunks change no pixel
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_TEXTS_WITH_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif")
_MAX_TEXT_BYTES = 1 << 20  # unpacked
_ORIENTATION = 0x0112  # EXIF tag
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_FLAT_LEVELS = 2.0  # standard deviation of grey levels below which a perceptual hash is noise
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_REQUEST = struct.Struct(">IIQB")  # image_size, jpeg_quality, max_pixels, chroma subsampling; then the bytes to decode
_REPLY = struct.Struct(
    ">4I16s3s"
)  # sizes, perceptual hash (zeros for none) and colour of a DecodedImage; then its JPEG
_IMAGE, _FAULT = b"P", b"F"  # first byte of a reply
_START_OF_SCAN, _START_OF_IMAGE, _END_OF_IMAGE = b"\xda", b"\xd8", b"\xd9"
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # those of entropy-coded data excluded
_MAX_SEGMENTS = 10_000


@dataclasses.dataclass(frozen=True)
class DecodedImage:
    """A decoded image as it is stored."""

    jpg: bytes
    width: int
    height: int
    original_width: int
    """Width of the original after turning it upright; `original_height` likewise."""
    original_height: int
    phash: str | None
    """64-bit perceptual hash in hex; None for an image of one colour, whose hash would mean nothing."""
    colour: str
    """Mean red, green and blue of the stored pixels, as 6 hex digits: a perceptual hash knows no colours."""


class DecodingPool:
    """A pool of child processes that decode: an image that crashes, hangs or bloats a child costs only its own row."""

    def __init__(
        self,
        image_size: int,
        jpeg_quality: int,
        max_pixels: int,
        chroma_subsampling: str = "4:4:4",
        num_children: int = 1,
        limits: Limits = DEFAULT_LIMITS,
        site_seconds: float = math.inf,
    ) -> None:
        """Start the children; raises StageError if a child does not start.

        Args:
            site_seconds: time beyond `SLOW_SECONDS` an image that the images of one site may take; more are then refused.

        For the other arguments, see `decode`.
        """
        self._site_seconds = site_seconds
        self._spent: dict[str, float] = {}  # seconds by site, of sites that are slow on average
        self._head = _REQUEST.pack(image_size, jpeg_quality, max_pixels, CHROMA_SUBSAMPLINGS.index(chroma_subsampling))
        self._sandbox = Sandbox(answer, num_children, limits)

    def decode(self, data: bytes, url: str = "") -> DecodedImage:
        """Decode like the function `decode`.

        Args:
            url: source of the image, whose site is charged if decoding is slow.

        Raises:
            RowFault: as by `decode`; or decode_crash, decode_timeout, decode_memory or decode_budget.
        """
        site = _site(url)
        if site is not None and self._spent.get(site, 0.0) >= self._site_seconds:
            raise RowFault("decode_budget")
        started = time.monotonic()
        try:
            return _unpack(self._sandbox.call(self._head + data))
        except SandboxFault as fault:
            raise RowFault(f"decode_{fault.kind}") from None
        finally:
            self._charge(site, time.monotonic() - started - SLOW_SECONDS)

    def _charge(self, site: str | None, seconds: float) -> None:
        if site is not None:
            spent = self._spent.pop(site, 0.0) + seconds
            if spent > 0:
                self._spent[site] = spent

    @property
    def pids(self) -> list[int]:
        """Process ids of the children."""
        return self._sandbox.pids

    def __enter__(self) -> "DecodingPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._sandbox.close()


def decode(
    data: bytes, image_size: int, jpeg_quality: int, max_pixels: int, chroma_subsampling: str = "4:4:4"
) -> DecodedImage:
    """Decode the first frame, shrink it, convert it to sRGB on a white background, turn it upright and encode it.

    Args:
        image_size: length of the shorter side after resizing; smaller images keep their size.
        max_pixels: limit that is checked in the header, before any pixel is decoded.
        chroma_subsampling: one of `CHROMA_SUBSAMPLINGS`.

    Raises:
        RowFault: not_an_image, too_many_pixels, too_many_scans or decode_error.
        MemoryError: memory is exhausted.
    """
    rgb, original = decode_rgb(data, image_size, max_pixels)
    rgb.info.clear()  # otherwise comments and profiles would be written
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=jpeg_quality, subsampling=chroma_subsampling)
    return DecodedImage(buffer.getvalue(), *rgb.size, *original, perceptual_hash(rgb), mean_colour(rgb).hex())


def decode_rgb(data: bytes, image_size: int, max_pixels: int) -> tuple[Image.Image, tuple[int, int]]:
    """Decode without encoding; return the RGB image, and the width and height of the original turned upright."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata of an intact image
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(without_metadata(data)), formats=FORMATS)
            original = image.size
            if original[0] * original[1] > max_pixels:
                raise RowFault("too_many_pixels")
            if image.format in ("JPEG", "MPO") and _has_many_scans(data):
                raise RowFault("too_many_scans")
            size = _fit(original, image_size)
            # Decodes a JPEG at a half, quarter or eighth of its size if that is enough.
            image.draft(None, (2 * size[0], 2 * size[1]))
            image.load()
            orientation = _orientation(image)
            # Shrink before any other step that takes time and memory.
            rgb = _on_white(shrink(_to_8_bits(image), size), image.info.get("icc_profile"))
    except (RowFault, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RowFault("too_many_pixels") from None
    except UnidentifiedImageError:
        raise RowFault("not_an_image") from None
    except Exception:  # damaged bytes make Pillow raise almost any exception
        raise RowFault("decode_error") from None
    if orientation in _TO_UPRIGHT:
        rgb = rgb.transpose(_TO_UPRIGHT[orientation])
    return rgb, original[::-1] if orientation in (5, 6, 7, 8) else original


def decode_opacity(data: bytes) -> Image.Image:
    """Alpha channel of an image that `decode_rgb` has decoded, upright and in its full size; opaque if it has none.

    Raises:
        RowFault: decode_error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(without_metadata(data)), formats=FORMATS)
            image.load()
            opacity = _to_8_bits(image).convert("RGBA").getchannel("A")
            orientation = _orientation(image)
    except MemoryError:
        raise
    except Exception:
        raise RowFault("decode_error") from None
    return opacity.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else opacity


def perceptual_hash(image: Image.Image) -> str | None:
    """Return 64 bits in hex: which of the 8x8 lowest frequencies of the 32x32 grey image are above their median.

    The hash equals `imagehash.phash`, whose import is too slow for a child. Frequencies are rounded, so that those that
    are zero except for floating-point noise give the same bit on every machine.
    """
    pixels = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    if pixels.std() < _FLAT_LEVELS:
        return None
    cosines = _cosines()
    lowest = np.round(cosines @ pixels @ cosines.T, 6)
    bits = (lowest > np.median(lowest)).flatten()
    return np.packbits(bits).tobytes().hex()


def mean_colour(image: Image.Image) -> bytes:
    """Mean red, green and blue of an RGB image, rounded."""
    share = 1 / (image.width * image.height)
    return bytes(round(total * share) for total in cv2.sumElems(np.asarray(image))[:3])  # faster than cv2.mean


def answer(request: bytes) -> bytes:
    """Handle one request in a child of `DecodingPool`."""
    try:
        image_size, jpeg_quality, max_pixels, subsampling = _REQUEST.unpack_from(request)
        body = request[_REQUEST.size :]
        decoded = decode(body, image_size, jpeg_quality, max_pixels, CHROMA_SUBSAMPLINGS[subsampling])
    except RowFault as fault:
        return _FAULT + fault.reason.encode()
    sizes = (decoded.width, decoded.height, decoded.original_width, decoded.original_height)
    colour = bytes.fromhex(decoded.colour)
    return _IMAGE + _REPLY.pack(*sizes, (decoded.phash or "").encode(), colour) + decoded.jpg


def warm_up() -> None:
    """Import and build everything that the first image needs."""
    cv2.setNumThreads(1)
    ramp = Image.linear_gradient("L")
    buffer = io.BytesIO()
    ramp.save(buffer, "JPEG", icc_profile=_srgb().tobytes())
    answer(_REQUEST.pack(64, 95, 1 << 20, 0) + buffer.getvalue())


def _unpack(reply: bytes) -> DecodedImage:
    """Parse a reply of `answer`.

    Raises:
        RowFault: with the reason in the reply; decode_crash if the reply is malformed.
    """
    kind, body = reply[:1], reply[1:]
    if kind == _FAULT and (reason := body.decode("ascii", "replace")) in REASONS:
        raise RowFault(reason)
    if kind != _IMAGE or len(body) <= _REPLY.size:
        raise RowFault("decode_crash")
    width, height, original_width, original_height, phash, colour = _REPLY.unpack_from(body)
    sizes = (width, height, original_width, original_height)
    jpg, text = body[_REPLY.size :], phash.rstrip(b"\0").decode("ascii", "replace")
    is_valid = min(sizes) >= 1 and max(sizes) < 1 << 31 and jpg.startswith(b"\xff\xd8")
    if not is_valid or (text and (len(text) != 16 or set(text) - set("0123456789abcdef"))):
        raise RowFault("decode_crash")
    return DecodedImage(jpg, width, height, original_width, original_height, text or None, colour.hex())


def _site(url: str) -> str | None:
    """Site that is charged for decoding; None for images of the operator's own."""
    if not url or url.startswith(local_files.SCHEME):
        return None
    return registrable_domain(urllib.parse.urlsplit(url).hostname or "")


def without_metadata(data: bytes) -> bytes:
    """A PNG without the chunks that change no pixel of it, however much they unpack to; other bytes as they are.

    Pillow unpacks texts and profiles, up to a limit beyond which it refuses the image, and checks other chunks.
    """
    if not data.startswith(_PNG):
        return data
    view, kept = memoryview(data), [memoryview(_PNG)]
    start, position = len(_PNG), len(_PNG)  # of the chunks to keep, of the next chunk
    while position + 12 <= len(data):
        name = data[position + 4 : position + 8]
        end = position + 12 + int.from_bytes(view[position : position + 4])
        is_optional = bool(name[:1].islower()) and end <= len(data)
        if is_optional and not _is_needed(name, view[position + 8 : end - 4]):
            kept.append(view[start:position])
            start = end
        position = end
    return data if start == len(_PNG) and len(kept) == 1 else b"".join([*kept, view[start:]])


def _is_needed(name: bytes, content: memoryview) -> bool:
    """Return True for an optional chunk of a PNG that may change its pixels or turn it, and that is not too large."""
    if name not in _PNG_TEXTS:
        if name == b"iCCP":
            _, _, packed = bytes(content).partition(b"\0")
            return packed[:1] == b"\0" and _unpacks_to(packed[1:], MAX_PROFILE_BYTES)
        return name in _PNG_ANCILLARY
    keyword, _, text = bytes(content[:80]).partition(b"\0")
    if keyword not in _TEXTS_WITH_ORIENTATION:
        return False
    if name == b"tEXt" or (name == b"iTXt" and text[:1] == b"\0"):
        return len(content) <= _MAX_TEXT_BYTES
    packed = bytes(content[len(keyword) + 1 :])
    packed = packed[1:] if name == b"zTXt" else packed[2:].split(b"\0", 2)[-1]
    return _unpacks_to(packed, _MAX_TEXT_BYTES)


def _unpacks_to(packed: bytes, limit: int) -> bool:
    """Return True if these bytes unpack to no more than `limit` bytes; what is damaged unpacks to what comes before."""
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, limit)
    except zlib.error:
        return True
    return not unpacking.unconsumed_tail


def _has_many_scans(data: bytes) -> bool:
    """Return True if a JPEG has more than `MAX_SCANS` scans, or so many segments that they are not counted.

    Pillow offers no limit. Most files hold too few of these bytes for a second look, which skips those in metadata.
    """
    values = np.frombuffer(data, np.uint8)
    if np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == _START_OF_SCAN[0])) <= MAX_SCANS:
        return False
    position = scans = 0
    for _ in range(_MAX_SEGMENTS):
        marker = _JPEG_MARKER.search(data, position)
        if marker is None or marker[1] == _END_OF_IMAGE:
            return False
        position = marker.end()
        if marker[1] != _START_OF_IMAGE:  # which has no length
            scans += marker[1] == _START_OF_SCAN
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
        if scans > MAX_SCANS:
            return True
    return True


def _fit(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    scale = min(1.0, image_size / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert a loaded image to 8-bit L, LA, RGB, RGBA or CMYK."""
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.has_transparency_data and image.mode not in ("LA", "RGBA"):
        return image.convert("RGBA")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image.convert("L" if image.mode == "1" else "RGB")
    return image


def shrink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an 8-bit image to a smaller size; the result is another image in any case.

    Below a factor of four it uses Gaussian blur and bicubic interpolation: as close to an ideal low-pass filter as Pillow's
    Hamming and OpenCV's area filter, in half their time (`python -m benchmarks.resize`). OpenCV sees decoded pixels only.
    """
    if image.size == size:
        return image.copy()
    scale = image.width / size[0]
    if scale >= 4 or image.mode in ("LA", "RGBA"):  # Pillow weights colours by their alpha
        return image.resize(size, Image.Resampling.HAMMING, reducing_gap=2.0)
    pixels = np.asarray(image)
    sigma = 0.36 * math.sqrt(max(scale**2 - 1, 0.0))
    if sigma > 0.1:
        kernel_size = 2 * max(1, round(2 * sigma)) + 1
        pixels = cv2.GaussianBlur(pixels, (kernel_size, kernel_size), sigma)
    return Image.fromarray(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC), image.mode)


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey levels to 8 bits instead of clipping them; keep the level that the file declares transparent."""
    levels = np.asarray(image)
    grey = Image.fromarray((levels.clip(0, 65535) >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        opaque = Image.fromarray((levels != transparent).astype(np.uint8) * np.uint8(255))
        grey = Image.merge("LA", (grey, opaque))
    return grey


def _on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB on a white background."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colour = _in_mode(image, {"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode))
    rgb = (_to_srgb(colour, profile) if profile else None) or _in_mode(colour, "RGB")
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image; without a copy, unlike Pillow, if it has the mode."""
    return image if image.mode == mode else image.convert(mode)


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert to sRGB; return None if the profile is sRGB already, is damaged or is for another colour space."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PROFILE_MODES[source.profile.xcolor_space.strip()]
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        if image.mode == "L" and mode == "RGB":
            image = image.convert("RGB")
        return ImageCms.profileToProfile(image, source, _srgb(), outputMode="RGB") if image.mode == mode else None
    except MemoryError:
        raise
    except Exception:
        return None


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@functools.cache
def _cosines() -> np.ndarray:
    """Return the eight lowest cosines over 32 samples, [8, 32]."""
    frequency, sample = np.arange(8)[:, None], np.arange(32)[None, :]
    return 2 * np.cos(math.pi * frequency * (2 * sample + 1) / 64)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # damaged metadata of an intact image
        return 1
