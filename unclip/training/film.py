"""Film strip of a training: previews of the same rows over time, in one image.

    previews/000000012800.png    first samples of the preview after 12,800 training samples, side by side
             original.png        their originals
             film_strip.png      all previews from the oldest down to the newest, then the originals

Previews are kept as files, so that a resumed training continues its film strip.

Letters: N columns, S side of a tile.
"""

import logging

import numpy as np
from torch import Tensor

from unclip import files, imaging
from unclip.errors import InputError

log = logging.getLogger(__name__)

FILM_STRIP = "film_strip.png"
NUM_COLUMNS = 8
NUM_ROWS = 24
MAX_SIZE = 128
"""Largest size of a tile, in pixels."""


def add_preview(folder: str, images: Tensor, samples_seen: int) -> bytes:
    """Save a preview, replacing an earlier one of the same `samples_seen`, and render the film strip again.

    Args:
        folder: URI of a folder for the previews of this training only.
        images: [2 B, 3, H, W] in [-1, 1], originals, then a sample for each.

    Returns:
        The film strip as a PNG file: at most `NUM_ROWS` evenly spaced previews, always with the first and the last.

    Raises:
        StorageError: the folder cannot be written.
        OSError: the folder cannot be read.
    """
    originals, samples = images.chunk(2)
    files.write(f"{folder}/original.png", _row(originals))
    files.write(f"{folder}/{samples_seen:012d}.png", _row(samples))
    stems = [name.removesuffix(".png") for name in files.names(folder)]
    kept = [stem for stem in stems if stem.isdigit() and int(stem) <= samples_seen]
    rows = {f"{int(stem):,}": _read(f"{folder}/{stem}.png") for stem in _thinned(kept)}
    rows["original"] = _read(f"{folder}/original.png")
    strip = imaging.png(imaging.film_strip({label: row for label, row in rows.items() if row is not None}))
    files.write(f"{folder}/{FILM_STRIP}", strip)
    return strip


def _thinned(names: list[str]) -> list[str]:
    """Choose at most `NUM_ROWS` evenly spaced names, always with the first and the last."""
    last, number = len(names) - 1, min(len(names), NUM_ROWS)
    return [names[round(index * last / max(1, number - 1))] for index in range(number)]


def _row(images: Tensor) -> bytes:
    """Encode the first `NUM_COLUMNS` images [B, 3, S, S] in [-1, 1], side by side, as a PNG file."""
    return imaging.png(np.concatenate(imaging.tiles(images[:NUM_COLUMNS], MAX_SIZE), axis=1))


def _read(uri: str) -> np.ndarray | None:
    """Read the tiles [N, S, S, 3] of a row; None if the file is damaged."""
    try:
        row = imaging.from_png(files.read(uri))  # [S, N S, 3]
    except InputError as error:
        log.warning("%s is left out of the film strip: %s", uri, error)
        return None
    return np.stack(np.split(row, row.shape[1] // row.shape[0], axis=1))
