"""Image files given to commands are read losslessly, whatever their format; errors name files that are not images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.untrusted import given
from unclip.errors import InputError


def test_an_image_of_the_right_size_is_unchanged_and_others_are_cropped_to_the_centre(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fits = rng.integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(fits).save(tmp_path / "fits.png")
    wide = np.zeros((24, 60, 3), np.uint8)
    wide[:, 18:42] = fits
    Image.fromarray(wide).save(tmp_path / "wide.webp", lossless=True)
    halves = np.zeros((480, 240, 3), np.uint8)
    halves[240:] = (255, 0, 0)
    Image.fromarray(halves).save(tmp_path / "large.jpg", quality=95)
    Image.fromarray(np.full((3, 5), 7, np.uint8)).save(tmp_path / "tiny.gif")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # must be rotated clockwise
    Image.fromarray(wide).save(tmp_path / "rotated.png", exif=rotated)
    names = ["fits.png", "wide.webp", "large.jpg", "tiny.gif", "rotated.png"]
    found = given.read([str(tmp_path / name) for name in names], 24)
    assert all(image.pixels.shape == (24, 24, 3) and image.pixels.dtype == np.uint8 for image in found)
    assert [(image.width, image.height) for image in found] == [(24, 24), (60, 24), (240, 480), (5, 3), (24, 60)]
    assert (found[0].pixels == fits).all() and (found[1].pixels == fits).all()
    assert (found[2].pixels[:10] < 30).all() and (found[2].pixels[14:, :, 0] > 220).all()
    assert (found[3].pixels == 7).all()
    assert (found[4].pixels == np.rot90(fits, -1)).all()


def test_files_that_are_not_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    Image.new("1", (20_000, 6_000)).save(tmp_path / "bomb.png")
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(given.MAX_BYTES + 1)
    for name, words in {
        "text.png": "not a JPEG, PNG, WebP, GIF or AVIF",
        "bomb.png": "more than 100,000,000 pixels",
        "long.png": "expected at most 134,217,728",
        "none.png": "does not exist",
    }.items():
        with pytest.raises(InputError, match=f"{name}: .*{words}"):
            given.read([str(tmp_path / name)], 24)
