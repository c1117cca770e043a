"""Decode a picture that nobody vouched for, and store it small: upright RGB JPEG without metadata."""

import dataclasses
import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from tasks.rows import RowFault

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_FLAT_LEVELS = 2.0  # a standard deviation of grey levels below which a perceptual hash is noise


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


def decode(data: bytes, image_size: int, jpeg_quality: int, max_pixels: int) -> Picture:
    """Decode the first frame, put it on white, shrink it, turn it upright and encode it.

    Args:
        image_size: the smaller side afterwards; a picture that is smaller keeps its size.
        max_pixels: checked in the header, before any pixel is decoded.

    Raises:
        RowFault: not_an_image, too_many_pixels or decode_error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        original = image.size
        if original[0] * original[1] > max_pixels:
            raise RowFault("too_many_pixels")
        size = _fit(original, image_size)
        image.draft(None, (2 * size[0], 2 * size[1]))  # decodes a JPEG at a half, quarter or eighth if that is enough
        rgb = _to_rgb(image)
    except RowFault:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RowFault("too_many_pixels") from None
    except UnidentifiedImageError:
        raise RowFault("not_an_image") from None
    except Exception:  # Pillow's decoders raise whatever damaged bytes make them
        raise RowFault("decode_error") from None
    if rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    orientation = _orientation(image)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    if orientation in (5, 6, 7, 8):
        original = original[::-1]
    rgb.info.clear()  # comments and profiles would be written otherwise
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    return Picture(buffer.getvalue(), *rgb.size, *original, _perceptual_hash(rgb))


def _fit(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    scale = min(1.0, image_size / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; 16-bit grey is scaled rather than clipped, what is transparent becomes white."""
    image.load()
    if image.mode.startswith("I"):
        levels = np.rint(np.asarray(image).astype(np.float32) / 257)
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of a sound picture
        return 1


def _perceptual_hash(image: Image.Image) -> str | None:
    import imagehash  # brings scipy, which only download workers need

    if np.asarray(image.convert("L")).std() < _FLAT_LEVELS:
        return None
    return str(imagehash.phash(image))
