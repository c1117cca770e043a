"""The downsampler: one filter, wherever a large image becomes a small one that a network sees.

It is the bicubic filter of Keys 1981 (a = -1/2), widened by the scale against aliasing, as Pillow has it. Training images are
shrunk by Pillow; low-resolution conditions, start images, inverted and inpainted images, which are tensors, by torch with the
same kernel. Both agree up to Pillow's rounding. CLIP has a preprocessing of its own, and so have downloads.

Letters: B batch, C channels, S resolution.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is slow to import, and readers of rows need none
    from PIL.Image import Image
    from torch import Tensor

REDUCING_GAP = 3.0
"""Pillow may first average whole pixels, down to this multiple of the size; far faster, and no difference can be seen."""


def shrink_square(image: "Image", size: int) -> "Image":
    """Crop the central square of an image and resize it to `size` pixels."""
    from PIL.Image import Resampling

    crop = min(image.size)
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    box = (left, top, left + crop, top + crop)
    return image.resize((size, size), Resampling.BICUBIC, box=box, reducing_gap=REDUCING_GAP)


def shrink(images: "Tensor", size: int) -> "Tensor":
    """Downscale [B, C, S, S] in [-1, 1] to [B, C, size, size] in [-1, 1]."""
    return images if images.shape[-1] == size else _filtered(images, size).clamp(-1, 1)


def shrink_known(images: "Tensor", known: "Tensor", size: int) -> tuple["Tensor", "Tensor"]:
    """Downscale the known part of images, from known pixels alone.

    Args:
        images: [B, C, S, S] in [-1, 1]; only the known part is read.
        known: [B, 1, S, S] bool.

    Returns:
        Images [B, C, size, size] and masks [B, 1, size, size] of their known pixels. A pixel is known if all pixels that it
        covers are; where the filter reaches beyond them, its weights are those of the known pixels.
    """
    import torch
    import torch.nn.functional as F

    if images.shape[-1] == size:
        return images, known
    share = F.interpolate(known.float(), size=(size, size), mode="area")  # [B, 1, size, size]
    weight = _filtered(known.float(), size)
    is_known = share == 1
    total = _filtered(torch.where(known, images, 0), size)
    return torch.where(is_known, total / torch.where(is_known, weight, 1), 0).clamp(-1, 1), is_known


def _filtered(images: "Tensor", size: int) -> "Tensor":
    import torch.nn.functional as F

    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
