"""Sampling commands, from files to files, on a small untrained stack."""

import shutil
import subprocess
import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.command_line import call
from tests.unclip.systems import tiny_stacks, tiny_tokens

RESOLUTION = 16  # of the small stack's images


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    tiny_stacks.publish(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of images: one of the right size, one in a photo's format, one with an alpha channel; and masks."""
    rng = np.random.default_rng(0)
    square = rng.integers(0, 256, (RESOLUTION, RESOLUTION, 3), np.uint8)
    Image.fromarray(square).save(tmp_path / "square.png")
    Image.fromarray(rng.integers(0, 256, (30, 50, 3), np.uint8)).save(tmp_path / "photo.jpg")
    Image.fromarray(rng.integers(0, 256, (40, 20, 4), np.uint8), "RGBA").save(tmp_path / "tall.webp")
    mask = np.zeros((RESOLUTION, RESOLUTION), np.uint8)
    mask[4:12, 3:9] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask * 0).save(tmp_path / "black.png")
    Image.fromarray(np.zeros((RESOLUTION, RESOLUTION + 1), np.uint8)).save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("not an image")
    whole = (tmp_path / "square.png").read_bytes()
    (tmp_path / "damaged.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def run(storage: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return call(*arguments, "--storage", storage)


COMMANDS = {
    "sample": ("sample", "a red circle", "--num", 3, "--sampler", "dpm_solver_pp_2m"),
    "vary": ("vary", "photo.jpg", "--num", 3),
    "vary a little": ("vary", "tall.webp", "--num", 3, "--eta", 0.3),
    "interpolate": ("interpolate", "square.png", "photo.jpg", "--num", 3),
    "interpolate, fixed": ("interpolate", "square.png", "photo.jpg", "--num", 3, "--noise", "fixed"),
    "edit": ("edit", "square.png", "a blue star", "--from", "a red star", "--theta", 0.4, "--num", 3),
    "probe": ("probe", "tall.webp", "--components", "1,8,64"),
    "inpaint": ("inpaint", "square.png", "mask.png", "a blue star", "--num", 3),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_the_same_grid_for_the_same_seed(storage: Path, folder: Path, name: str) -> None:
    command = [folder / part if (folder / str(part)).is_file() else part for part in COMMANDS[name]]
    written = []
    for seed in (1, 1, 2):
        out, each = folder / "grid.png", folder / "each"
        shutil.rmtree(each, ignore_errors=True)
        result = run(storage, *command, "--seed", seed, "--steps", 3, "--out", out, "--each", each)
        assert result.returncode == 0 and str(out) in result.stdout, result.stderr
        files = sorted(each.iterdir())
        assert [file.name for file in files[:3]] == ["000.png", "001.png", "002.png"]
        assert all(Image.open(file).size == (RESOLUTION, RESOLUTION) for file in files)
        written.append([out.read_bytes(), *(file.read_bytes() for file in files)])
    assert written[0] == written[1] != written[2]


def test_black_pixels_of_the_mask_stay_unchanged(storage: Path, folder: Path) -> None:
    names = [folder / name for name in ("square.png", "mask.png")]
    result = run(storage, "inpaint", *names, "a blue star", "--num", 2, "--out", folder / "g.png", "--each", folder)
    assert result.returncode == 0, result.stderr
    given, known = np.asarray(Image.open(names[0])), np.asarray(Image.open(names[1])) == 0
    for number in range(2):
        inpainted = np.asarray(Image.open(folder / f"{number:03d}.png"))
        assert (inpainted[known] == given[known]).all()
        assert (inpainted[~known] != given[~known]).mean() > 0.5


@pytest.mark.parametrize("kind", ["dalle", "parti"])
def test_systems_of_tokens_cannot_inpaint(folder: Path, kind: str) -> None:
    stack = tiny_tokens.publish(folder / "tokens", kind, tiny_tokens.demo_clip())
    result = call(
        "inpaint", folder / "square.png", folder / "mask.png", "a star", "--out", folder / "i.png", "--model", stack
    )
    assert result.returncode == 2 and "All systems of this package but dalle and parti can" in result.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("vary", "none.png"), ("none.png", "does not exist")),
        (("vary", "."), ("not a file",)),
        (("vary", "text.png"), ("text.png", "not a JPEG, PNG, WebP, GIF or AVIF")),
        (("vary", "damaged.png"), ("damaged.png", "a damaged image")),
        (("vary", "square.png", "--num", 0), ("--num: got 0",)),
        (("vary", "square.png", "--eta", 1.5), ("--eta: got 1.5, expected 0 to 1",)),
        (("vary", "square.png", "--steps", 0), ("decoder.num_steps: got 0",)),
        (("vary", "square.png", "--out", "nowhere/v.png"), ("nowhere", "does not exist")),
        (("vary", "square.png", "--each", "square.png"), ("--each", "is a file")),
        (("interpolate", "square.png", "none.png"), ("none.png", "does not exist")),
        (("interpolate", "square.png", "photo.jpg", "--num", 1), ("--num: got 1, expected at least 2",)),
        (("edit", "square.png", " "), ("caption: got an empty caption",)),
        (("edit", "square.png", "a star", "--theta", -0.1), ("--theta: got -0.1, expected 0 to 1",)),
        (("edit", "square.png", "a star", "--from", "a star"), ("CLIP sees no difference",)),
        (("probe", "square.png", "--components", "1,many"), ("--components: got '1,many'", "1,4,16")),
        (("probe", "square.png", "--components", "99"), ("num_components: got 99, expected 0 to 64",)),
        (("inpaint", "square.png", "mask.png", ""), ("caption: got an empty caption",)),
        (("inpaint", "square.png", "other.png", "a star"), ("other.png", "got 17 x 16 pixels, expected 16 x 16")),
        (("inpaint", "square.png", "black.png", "a star"), ("black.png", "the mask has no white pixels")),
    ],
)
def test_invalid_input_is_refused_in_one_line(
    storage: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(folder)
    result = run(storage, *command)
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not list(folder.glob("variations.png"))


@pytest.mark.parametrize("command", ["sample", "vary", "interpolate", "edit", "probe", "inpaint"])
def test_help(command: str) -> None:
    result = call(command, "--help")
    assert result.returncode == 0
    for option in ("--seed", "--steps", "--guidance-scale", "--out", "--each", "--model", "--storage"):
        assert option in result.stdout


def test_the_sampler_option_offers_all_samplers() -> None:
    from pipelines.sampling import SAMPLERS as OFFERED
    from unclip.diffusion.samplers import SamplerName

    assert typing.get_args(SamplerName) == OFFERED
