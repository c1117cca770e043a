"""Image files: conversion to and from tensors, grids of samples with captions, and film strips of trainings."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.errors import InputError

GAP = 6
"""Pixels between the images of a grid, and around them."""


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] float in [-1, 1] -> [B, H, W, 3] uint8."""
    pixels = (images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).numpy()


def from_uint8(pixels: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] float32 in [-1, 1]."""
    return torch.tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def grid(
    images: Tensor,
    *,
    columns: int = 0,
    captions: Sequence[str] | None = None,
    marks: Sequence[bool] | None = None,
    min_size: int = 96,
) -> np.ndarray:
    """Arrange images in a grid.

    Args:
        images: [B, 3, H, W] in [-1, 1].
        columns: number of columns; 0 for a square grid.
        captions: one per image, written below it.
        marks: one per image; images marked False get a red frame.
        min_size: smaller images are enlarged by an integer factor, to at least this many pixels.

    Returns:
        [H', W', 3] uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    pixels = to_uint8(images)
    factor = math.ceil(min_size / pixels.shape[1])
    size, gap = pixels.shape[1] * factor, GAP
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    font = ImageFont.load_default(size=11)
    wrapped = [_wrap(caption, max(12, size // 6)) for caption in captions or [""] * len(pixels)]
    text_height = max(text.count("\n") + 1 for text in wrapped) * 14 + 4 if captions else 0
    rows = math.ceil(len(pixels) / columns)
    canvas = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for index, image in enumerate(pixels):
        x = gap + index % columns * (size + gap)
        y = gap + index // columns * (size + text_height + gap)
        canvas.paste(Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST), (x, y))
        if marks is not None and not marks[index]:
            draw.rectangle((x - 2, y - 2, x + size + 1, y + size + 1), outline=(220, 30, 30), width=2)
        draw.multiline_text((x, y + size + 2), wrapped[index], fill=(40, 40, 40), font=font, spacing=2)
    return np.asarray(canvas)


def tiles(images: Tensor, max_size: int) -> np.ndarray:
    """Convert square images to uint8, shrinking those larger than `max_size` pixels.

    Args:
        images: [B, 3, S, S] in [-1, 1].

    Returns:
        [B, S', S', 3] uint8.
    """
    if images.shape[-1] > max_size:
        images = F.interpolate(images.float(), (max_size, max_size), mode="area")
    return to_uint8(images)


def film_strip(rows: Mapping[str, np.ndarray], min_size: int = 96) -> np.ndarray:
    """Stack rows of tiles, each with its label on the left.

    Args:
        rows: label -> [N, S, S, 3] uint8.
        min_size: smaller tiles are enlarged by an integer factor, to at least this many pixels.

    Returns:
        [H', W', 3] uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, gap = ImageFont.load_default(size=14), 4
    enlarged = {label: _enlarge(row, min_size) for label, row in rows.items()}
    left = math.ceil(max(font.getlength(label) for label in rows)) + 2 * gap
    width = max(len(row) * (row.shape[2] + gap) for row in enlarged.values())
    height = sum(row.shape[1] + gap for row in enlarged.values())
    canvas = Image.new("RGB", (left + width, height + gap), "white")
    draw, y = ImageDraw.Draw(canvas), gap
    for label, row in enlarged.items():
        size = row.shape[1]
        draw.text((left - gap, y + size / 2), label, fill=(40, 40, 40), font=font, anchor="rm")
        for index, tile in enumerate(row):
            canvas.paste(Image.fromarray(tile), (left + index * (size + gap), y))
        y += size + gap
    return np.asarray(canvas)


def png(pixels: np.ndarray) -> bytes:
    """Encode [H, W, 3] uint8 as a PNG file."""
    return encode(pixels, "PNG")


def encode(pixels: np.ndarray, kind: str) -> bytes:
    """Encode [H, W, 3] uint8 as a file of a format that Pillow knows: PNG, or JPEG or WEBP with slight losses."""
    from PIL import Image

    buffer = io.BytesIO()
    # PNG: 10 % larger than at the best compression, 100 times as fast
    options = {"compress_level": 3} if kind == "PNG" else {"quality": 95}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def from_png(data: bytes) -> np.ndarray:
    """Decode a PNG file to [H, W, 3] uint8.

    Raises:
        InputError: the file is damaged or not a PNG.
    """
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB"))
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise InputError(f"image: got {len(data):,} bytes, expected a PNG file: {error}. Write it again.") from None


def _enlarge(row: np.ndarray, min_size: int) -> np.ndarray:
    factor = math.ceil(min_size / row.shape[1])
    return row.repeat(factor, axis=1).repeat(factor, axis=2)


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
