"""Pictures for people: grids of samples, with captions."""

import io
import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] float in [-1, 1] -> [B, H, W, 3] uint8."""
    pixels = (images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).numpy()


def grid(
    images: Tensor,
    *,
    columns: int = 0,
    captions: Sequence[str] | None = None,
    marks: Sequence[bool] | None = None,
    min_side: int = 96,
) -> np.ndarray:
    """Images side by side.

    Args:
        images: [B, 3, H, W] in [-1, 1].
        columns: of the grid; 0 for a square one.
        captions: one for each image, written below it.
        marks: one for each image; those with False get a red frame.
        min_side: smaller images are enlarged by a whole factor.

    Returns:
        [H', W', 3] uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    pixels = to_uint8(images)
    factor = math.ceil(min_side / pixels.shape[1])
    side, gap = pixels.shape[1] * factor, 6
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    font = ImageFont.load_default(size=11)
    wrapped = [_wrap(caption, max(12, side // 6)) for caption in captions or [""] * len(pixels)]
    text_height = max(text.count("\n") + 1 for text in wrapped) * 14 + 4 if captions else 0
    rows = math.ceil(len(pixels) / columns)
    canvas = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for index, image in enumerate(pixels):
        x = gap + index % columns * (side + gap)
        y = gap + index // columns * (side + text_height + gap)
        canvas.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        if marks is not None and not marks[index]:
            draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=(220, 30, 30), width=2)
        draw.multiline_text((x, y + side + 2), wrapped[index], fill=(40, 40, 40), font=font, spacing=2)
    return np.asarray(canvas)


def png(picture: np.ndarray) -> bytes:
    """[H, W, 3] uint8 as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
