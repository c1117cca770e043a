"""The film of a training: what its model drew of the same rows, preview after preview, in one picture.

    previews/000000012800.png    the first drawings of the preview after so many samples, side by side
             original.png        what they are drawings of
             film_strip.png      the previews below each other, the oldest first, and the originals

The previews are kept as files, so that a training that was stopped goes on with its film.

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
MAX_SIDE = 128
"""Of a tile, in pixels."""


def add_preview(folder: str, images: Tensor, samples_seen: int) -> bytes:
    """Keep a preview, in the place of one after as many samples, and draw the film strip anew.

    Args:
        folder: URI for the previews of this training alone.
        images: [2 B, 3, H, W] in [-1, 1], originals and then a drawing of each.

    Returns:
        The film strip, a PNG file, with up to `NUM_ROWS` previews evenly chosen; the first and the last are among them.

    Raises:
        StorageError: the folder cannot be written.
        OSError: or not be read.
    """
    originals, drawings = images.chunk(2)
    files.write(f"{folder}/original.png", _row(originals))
    files.write(f"{folder}/{samples_seen:012d}.png", _row(drawings))
    stems = [name.removesuffix(".png") for name in files.names(folder)]
    kept = [stem for stem in stems if stem.isdigit() and int(stem) <= samples_seen]
    rows = {f"{int(stem):,}": _read(f"{folder}/{stem}.png") for stem in _thinned(kept)}
    rows["original"] = _read(f"{folder}/original.png")
    strip = imaging.png(imaging.film_strip({label: row for label, row in rows.items() if row is not None}))
    files.write(f"{folder}/{FILM_STRIP}", strip)
    return strip


def _thinned(names: list[str]) -> list[str]:
    """At most `NUM_ROWS` of them, evenly chosen, with the first and the last."""
    last, number = len(names) - 1, min(len(names), NUM_ROWS)
    return [names[round(index * last / max(1, number - 1))] for index in range(number)]


def _row(images: Tensor) -> bytes:
    """The first images [B, 3, S, S] in [-1, 1] side by side, as a PNG file."""
    return imaging.png(np.concatenate(imaging.tiles(images[:NUM_COLUMNS], MAX_SIDE), axis=1))


def _read(uri: str) -> np.ndarray | None:
    """The tiles [N, S, S, 3] of a row; None when its file is damaged."""
    try:
        row = imaging.from_png(files.read(uri))  # [S, N S, 3]
    except InputError as error:
        log.warning("%s is left out of the film: %s", uri, error)
        return None
    return np.stack(np.split(row, row.shape[1] // row.shape[0], axis=1))
