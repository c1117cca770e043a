"""Decode a picture that nobody vouched for, and store it small: upright sRGB JPEG without metadata.

`decode` is the work itself; `DecodingPool` has it done in child processes, which is the only way to do it with strangers'
bytes. This module is imported by those children, so it imports little.
"""

import dataclasses
import functools
import io
import math
import struct
import warnings

import cv2
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

# Pillow would import the plugins of all formats when it meets a picture of one that it has not imported.
from PIL import GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401  # isort: skip

from tasks.rows import REASONS, RowFault
from tasks.untrusted.sandbox import DEFAULT_LIMITS, Limits, Sandbox, SandboxFault

VERSION = 3
"""Raised when the same bytes are stored as other pixels than before."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
CHROMA_SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
"""Colours at full, at half the horizontal and at half the resolution; Pillow's numbers for them are 0, 1 and 2."""

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_FLAT_LEVELS = 2.0  # a standard deviation of grey levels below which a perceptual hash is noise
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_REQUEST = struct.Struct(">IIQB")  # image_size, jpeg_quality, max_pixels, chroma subsampling; then the bytes to decode
_REPLY = struct.Struct(">4I16s")  # sizes and perceptual hash of a Picture, zeros for none; then its JPEG
_PICTURE, _FAULT = b"P", b"F"  # what a reply begins with


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as it is stored."""

    jpg: bytes
    width: int
    height: int
    original_width: int
    """Of the original held upright, like `original_height`."""
    original_height: int
    phash: str | None
    """64-bit perceptual hash in hex; None for a picture of one colour, whose hash would mean nothing."""


class DecodingPool:
    """Decodes in child processes: a picture that crashes, hangs or bloats a child costs its own row and no other."""

    def __init__(
        self,
        image_size: int,
        jpeg_quality: int,
        max_pixels: int,
        chroma_subsampling: str = "4:4:4",
        num_children: int = 1,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """For the arguments, see `decode`; raises StageError when a child does not start."""
        self._head = _REQUEST.pack(image_size, jpeg_quality, max_pixels, CHROMA_SUBSAMPLINGS.index(chroma_subsampling))
        self._sandbox = Sandbox(answer, num_children, limits)

    def decode(self, data: bytes) -> Picture:
        """As the function `decode`; raises RowFault, also for decode_crash, decode_timeout and decode_memory."""
        try:
            return _unpack(self._sandbox.call(self._head + data))
        except SandboxFault as fault:
            raise RowFault(f"decode_{fault.kind}") from None

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
) -> Picture:
    """Decode the first frame, shrink it, convert it to sRGB, put it on white, turn it upright and encode it.

    Args:
        image_size: the smaller side afterwards; a picture that is smaller keeps its size.
        max_pixels: checked in the header, before any pixel is decoded.
        chroma_subsampling: one of `CHROMA_SUBSAMPLINGS`.

    Raises:
        RowFault: not_an_image, too_many_pixels or decode_error.
        MemoryError: there is not enough of it.
    """
    rgb, original = decode_rgb(data, image_size, max_pixels)
    rgb.info.clear()  # comments and profiles would be written otherwise
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=jpeg_quality, subsampling=chroma_subsampling)
    return Picture(buffer.getvalue(), *rgb.size, *original, perceptual_hash(rgb))


def decode_rgb(data: bytes, image_size: int, max_pixels: int) -> tuple[Image.Image, tuple[int, int]]:
    """As `decode`, but for the encoding: the picture in RGB, and the width and height of the original held upright."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata of a sound picture
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            original = image.size
            if original[0] * original[1] > max_pixels:
                raise RowFault("too_many_pixels")
            size = _fit(original, image_size)
            # Decodes a JPEG at a half, quarter or eighth if that is enough.
            image.draft(None, (2 * size[0], 2 * size[1]))
            image.load()
            orientation = _orientation(image)
            # Small first, before anything else that takes time and memory.
            rgb = _on_white(shrink(_in_eight_bits(image), size), image.info.get("icc_profile"))
    except (RowFault, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RowFault("too_many_pixels") from None
    except UnidentifiedImageError:
        raise RowFault("not_an_image") from None
    except Exception:  # Pillow raises whatever damaged bytes make it
        raise RowFault("decode_error") from None
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    return rgb, original[::-1] if orientation in (5, 6, 7, 8) else original


def perceptual_hash(image: Image.Image) -> str | None:
    """64 bits in hex: which of the 8x8 lowest frequencies of the 32x32 grey picture are above their median.

    The same as `imagehash.phash`, whose import takes longer than the start of a child may. Frequencies are rounded, so
    that those which are zero but for the noise of floating point give the same bit on every machine.
    """
    pixels = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    if pixels.std() < _FLAT_LEVELS:
        return None
    waves = _waves()
    lowest = np.round(waves @ pixels @ waves.T, 6)
    bits = (lowest > np.median(lowest)).flatten()
    return np.packbits(bits).tobytes().hex()


def answer(request: bytes) -> bytes:
    """What a child of `DecodingPool` does with a request."""
    try:
        image_size, jpeg_quality, max_pixels, subsampling = _REQUEST.unpack_from(request)
        body = request[_REQUEST.size :]
        picture = decode(body, image_size, jpeg_quality, max_pixels, CHROMA_SUBSAMPLINGS[subsampling])
    except RowFault as fault:
        return _FAULT + fault.reason.encode()
    sizes = (picture.width, picture.height, picture.original_width, picture.original_height)
    return _PICTURE + _REPLY.pack(*sizes, (picture.phash or "").encode()) + picture.jpg


def warm_up() -> None:
    """Import and build what the first picture would."""
    cv2.setNumThreads(1)
    ramp = Image.linear_gradient("L")
    buffer = io.BytesIO()
    ramp.save(buffer, "JPEG", icc_profile=_srgb().tobytes())
    answer(_REQUEST.pack(64, 95, 1 << 20, 0) + buffer.getvalue())


def _unpack(reply: bytes) -> Picture:
    """The picture of a reply.

    Raises:
        RowFault: the reason in the reply; decode_crash when it is no reply that `answer` gives.
    """
    kind, body = reply[:1], reply[1:]
    if kind == _FAULT and (reason := body.decode("ascii", "replace")) in REASONS:
        raise RowFault(reason)
    if kind != _PICTURE or len(body) <= _REPLY.size:
        raise RowFault("decode_crash")
    width, height, original_width, original_height, phash = _REPLY.unpack_from(body)
    sizes = (width, height, original_width, original_height)
    jpg, text = body[_REPLY.size :], phash.rstrip(b"\0").decode("ascii", "replace")
    is_sound = min(sizes) >= 1 and max(sizes) < 1 << 31 and jpg.startswith(b"\xff\xd8")
    if not is_sound or (text and (len(text) != 16 or set(text) - set("0123456789abcdef"))):
        raise RowFault("decode_crash")
    return Picture(jpg, width, height, original_width, original_height, text or None)


def _fit(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    scale = min(1.0, image_size / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """The loaded picture as L, LA, RGB, RGBA or CMYK of 8 bits."""
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.has_transparency_data and image.mode not in ("LA", "RGBA"):
        return image.convert("RGBA")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image.convert("L" if image.mode == "1" else "RGB")
    return image


def shrink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An 8-bit picture at a smaller size.

    Up to four times as small, Gaussian blur and bicubic interpolation: as near to an ideal low-pass filter as Pillow's
    Hamming and OpenCV's area filter, in half their time (`python -m benchmarks.resize`). OpenCV sees decoded pixels only.
    """
    if image.size == size:
        return image
    scale = image.width / size[0]
    if scale >= 4 or image.mode in ("LA", "RGBA"):  # Pillow weighs colours by their alpha
        return image.resize(size, Image.Resampling.HAMMING, reducing_gap=2.0)
    pixels = np.asarray(image)
    sigma = 0.36 * math.sqrt(max(scale**2 - 1, 0.0))
    if sigma > 0.1:
        side = 2 * max(1, round(2 * sigma)) + 1
        pixels = cv2.GaussianBlur(pixels, (side, side), sigma)
    return Image.fromarray(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC), image.mode)


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey levels scaled rather than clipped; the one that the file calls transparent is."""
    levels = np.asarray(image)
    grey = Image.fromarray((levels.clip(0, 65535) >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        opaque = Image.fromarray((levels != transparent).astype(np.uint8) * np.uint8(255))
        grey = Image.merge("LA", (grey, opaque))
    return grey


def _on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    """sRGB; what is transparent becomes white."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colour = image.convert({"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode))
    rgb = (_to_srgb(colour, profile) if profile else None) or colour.convert("RGB")
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The picture in sRGB; None when its profile is sRGB, or is damaged or for another kind of picture."""
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
def _waves() -> np.ndarray:
    """The eight lowest cosines over 32 samples, [8, 32]."""
    frequency, sample = np.arange(8)[:, None], np.arange(32)[None, :]
    return 2 * np.cos(math.pi * frequency * (2 * sample + 1) / 64)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # damaged metadata of a sound picture
        return 1
