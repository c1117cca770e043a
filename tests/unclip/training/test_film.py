"""The film of a training: one row for each preview, from all attempts together."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unclip import files, imaging
from unclip.errors import InputError
from unclip.training import film


def preview(brightness: float, number: int = 16, side: int = 4) -> torch.Tensor:
    """White originals, and drawings of one brightness in [0, 1]."""
    return torch.cat([torch.ones(number, 3, side, side), torch.full((number, 3, side, side), 2 * brightness - 1)])


def brightnesses(strip: bytes, num_rows: int, side: int = 96, gap: int = 4) -> list[int]:
    """Of the last tile of each row, of which there must be so many."""
    picture = imaging.from_png(strip)
    assert len(picture) == num_rows * (side + gap) + gap
    middles = picture[gap + side // 2 :: side + gap, -gap - side // 2]
    return [int(value) for value in middles[:, 0]]


def test_a_film_has_a_row_for_each_preview_and_the_originals_last(tmp_path: Path) -> None:
    for samples_seen in (2000, 4000, 10_000):
        strip = film.add_preview(str(tmp_path), preview(samples_seen / 10_000), samples_seen)
    assert brightnesses(strip, 4) == [51, 102, 255, 255]
    assert (tmp_path / film.FILM_STRIP).read_bytes() == strip
    width = imaging.from_png(strip).shape[1]
    assert width - film.NUM_COLUMNS * 100 in range(40, 120), "eight columns, and labels"


def test_a_preview_that_is_drawn_again_is_one_row_and_later_ones_wait(tmp_path: Path) -> None:
    """As when a training is resumed from a checkpoint before its last preview."""
    for samples_seen in (10, 20, 30):
        film.add_preview(str(tmp_path), preview(0.2), samples_seen)
    assert brightnesses(film.add_preview(str(tmp_path), preview(0.4), 20), 3) == [51, 102, 255]
    assert brightnesses(film.add_preview(str(tmp_path), preview(0.6), 30), 4) == [51, 102, 153, 255]


def test_a_long_film_is_thinned_evenly(tmp_path: Path) -> None:
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
    assert f"{path} is left out of the film" in caplog.text


def test_large_pictures_are_kept_small_and_few_are_no_problem(tmp_path: Path) -> None:
    strip = film.add_preview(str(tmp_path), preview(0.2, number=2, side=512), 10)
    assert imaging.from_png(files.read(f"{tmp_path}/{10:012d}.png")).shape == (128, 2 * 128, 3)
    assert brightnesses(strip, 2, side=128) == [51, 255]


def test_what_is_no_png_is_refused() -> None:
    with pytest.raises(InputError, match="got 5 bytes, expected a PNG file"):
        imaging.from_png(b"GIF89")
