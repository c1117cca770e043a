"""Film strips: one row per preview, over all attempts of a training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unclip import files, imaging
from unclip.errors import InputError
from unclip.training import film


def preview(brightness: float, number: int = 16, size: int = 4) -> torch.Tensor:
    """White originals, and samples of one brightness in [0, 1]."""
    return torch.cat([torch.ones(number, 3, size, size), torch.full((number, 3, size, size), 2 * brightness - 1)])


def brightnesses(strip: bytes, num_rows: int, size: int = 96, gap: int = 4) -> list[int]:
    """Brightness of the last tile in each of `num_rows` rows."""
    pixels = imaging.from_png(strip)
    assert len(pixels) == num_rows * (size + gap) + gap
    centers = pixels[gap + size // 2 :: size + gap, -gap - size // 2]
    return [int(value) for value in centers[:, 0]]


def test_a_film_strip_has_a_row_per_preview_and_the_originals_last(tmp_path: Path) -> None:
    for samples_seen in (2000, 4000, 10_000):
        strip = film.add_preview(str(tmp_path), preview(samples_seen / 10_000), samples_seen)
    assert brightnesses(strip, 4) == [51, 102, 255, 255]
    assert (tmp_path / film.FILM_STRIP).read_bytes() == strip
    width = imaging.from_png(strip).shape[1]
    assert width - film.NUM_COLUMNS * 100 in range(40, 120), "eight columns, and labels"


def test_a_repeated_preview_replaces_its_row_and_hides_later_ones(tmp_path: Path) -> None:
    """Resume a training from a checkpoint before its last preview."""
    for samples_seen in (10, 20, 30):
        film.add_preview(str(tmp_path), preview(0.2), samples_seen)
    assert brightnesses(film.add_preview(str(tmp_path), preview(0.4), 20), 3) == [51, 102, 255]
    assert brightnesses(film.add_preview(str(tmp_path), preview(0.6), 30), 4) == [51, 102, 153, 255]


def test_a_long_film_strip_is_thinned_evenly(tmp_path: Path) -> None:
    names = [f"{number:012d}" for number in range(100)]
    thinned = film._thinned(names)
    assert len(thinned) == film.NUM_ROWS and (thinned[0], thinned[-1]) == (names[0], names[-1])
    steps = np.diff([int(name) for name in thinned])
    assert steps.min() >= 4 and steps.max() <= 5
    assert film._thinned(names[:24]) == names[:24] and film._thinned(names[:1]) == names[:1]


def test_a_damaged_row_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for samples_seen in (10, 20, 30):
        film.add_preview(str(tmp_path), preview(0.2), samples_seen)
    path = tmp_path / f"{20:012d}.png"
    path.write_bytes(path.read_bytes()[:40])
    assert len(brightnesses(film.add_preview(str(tmp_path), preview(0.4), 40), 4)) == 4
    assert f"{path} is left out of the film strip" in caplog.text


def test_large_images_are_shrunk_and_few_are_accepted(tmp_path: Path) -> None:
    strip = film.add_preview(str(tmp_path), preview(0.2, number=2, size=512), 10)
    assert imaging.from_png(files.read(f"{tmp_path}/{10:012d}.png")).shape == (128, 2 * 128, 3)
    assert brightnesses(strip, 2, size=128) == [51, 255]


def test_a_file_that_is_not_a_png_is_rejected() -> None:
    with pytest.raises(InputError, match="got 5 bytes, expected a PNG file"):
        imaging.from_png(b"GIF89")
