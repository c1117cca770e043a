"""Sampling options of `unclip sample`, from files to files, on a small untrained stack."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.command_line import call
from tests.unclip.systems import tiny_stacks
from unclip.errors import CheckpointError
from unclip.files import sha256
from unclip.models.clip import check_name, create, outline, tokenizer
from unclip.systems.system import seal
from unclip.systems.unclip.stack import SYSTEM

RESOLUTION = 8  # no upsampler, so that the files hold the decoder's samples


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    tiny_stacks.publish(folder, num_upsamplers=0, text="clip")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (RESOLUTION, RESOLUTION, 3), np.uint8)).save(folder / "given.png")
    (folder / "text.png").write_text("not an image")
    return folder


def sample(storage: Path, *options: object) -> subprocess.CompletedProcess[str]:
    shutil.rmtree(storage / "each", ignore_errors=True)
    files = ("--out", storage / "grid.png", "--each", storage / "each", "--storage", storage)
    return call("sample", "a red circle", "--num", 2, "--steps", 4, *options, *files)


def images(storage: Path, *options: object) -> np.ndarray:
    result = sample(storage, *options)
    assert result.returncode == 0, result.stderr
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in sorted((storage / "each").iterdir())])


def test_eta_and_negative_change_the_images(storage: Path) -> None:
    plain = images(storage)
    assert np.array_equal(plain, images(storage, "--eta", 0, "--sampler", "ddim"))
    assert np.array_equal(plain, images(storage, "--negative", ""))
    for options in (("--eta", 1), ("--negative", "a blue star"), ("--set", "decoder.clip_guidance_scale=20")):
        assert not np.array_equal(plain, images(storage, *options)), options


def test_seeds_go_to_the_largest_of_64_bits(storage: Path) -> None:
    largest = images(storage, "--seed", 2**64 - 1)
    assert np.array_equal(largest, images(storage, "--seed", 2**64 - 1))
    assert not np.array_equal(largest, images(storage, "--seed", 2**64 - 2))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--guidance-scale", "inf", "'inf' is not a finite number"),
        ("--eta", "nan", "'nan' is not a finite number"),
        ("--seed", 2**64, "is not in the range 0<=x<=18446744073709551615"),
        ("--seed", -1, "is not in the range 0<=x<=18446744073709551615"),
    ],
)
def test_numbers_that_are_none_are_refused(storage: Path, option: str, value: object, words: str) -> None:
    result = sample(storage, option, value)
    assert result.returncode == 2 and words in result.stderr, result.stderr


@pytest.mark.parametrize(("name", "kind"), [("grid.jpg", "JPEG"), ("grid.JPEG", "JPEG"), ("grid.webp", "WEBP")])
def test_the_format_of_the_grid_follows_its_name(storage: Path, name: str, kind: str) -> None:
    result = call("sample", "a star", "--num", 1, "--steps", 1, "--out", storage / name, "--storage", storage)
    assert result.returncode == 0 and Image.open(storage / name).format == kind, result.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is a folder, expected a file such as"),
        ("grid.tiff", "does not end in .png"),
        ("grid", "does not end in .png"),
    ],
)
def test_a_grid_that_could_not_be_written_is_refused_before_sampling(storage: Path, name: str, words: str) -> None:
    result = call("sample", "a star", "--num", 10**9, "--out", storage / name, "--storage", storage)
    assert result.returncode == 2 and words in result.stderr, result.stderr


def test_strength_is_the_noise_added_to_the_initial_image(storage: Path) -> None:
    given = np.asarray(Image.open(storage / "given.png")).astype(int)
    initial = ("--image", storage / "given.png")
    assert (images(storage, *initial, "--strength", 0) == given).all()
    assert np.array_equal(images(storage, *initial, "--strength", 1), images(storage))
    half = images(storage, *initial, "--strength", 0.5)
    assert not np.array_equal(half, images(storage)) and (half != given).any()
    assert np.array_equal(images(storage, *initial), images(storage, *initial, "--strength", 0.7))  # as published


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--strength", 0.5), "--strength: got 0.5 without an initial image. Add --image FILE."),
        (("--image", "none.png"), "none.png: does not exist"),
        (("--image", "text.png"), "not a JPEG, PNG, WebP, GIF or AVIF"),
        (("--image", "given.png", "--strength", 2), "strength: got 2.0, expected 0 to 1"),
        (("--eta", 0.5, "--sampler", "heun"), "eta: got 0.5, expected 0 with the sampler heun"),
        (("--sampler", "analytic_dpm"), "Train it again"),
        (("--negative", "a star", "--guidance-scale", 1), "nothing that reads captions is guided"),
        (("--set", "decoder.guidance_interval=[0.8,0.2]"), "guidance_interval: got (0.8, 0.2), expected two fractions"),
        (("--set", "decoder.guidance_scale=nan"), "guidance_scale: got nan, expected a finite number"),
    ],
)
def test_invalid_options_are_refused_in_one_line(
    storage: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], words: str
) -> None:
    monkeypatch.chdir(storage)
    result = sample(storage, *options)
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and words in line, line


def test_a_system_without_these_inputs_says_so(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYSTEM.__dict__, "inputs", ())
    for option, value in (("--negative", "a star"), ("--image", storage / "given.png")):
        result = sample(storage, option, value)
        assert (
            result.returncode == 2 and f"{option}: not supported by the system unclip. Leave it out." in result.stderr
        )


TOKENIZER = """
import pathlib
from transformers import PreTrainedTokenizer
pathlib.Path({canary!r}).write_text("run")
class Evil(PreTrainedTokenizer):
    vocab_files_names = {{}}
    vocab_size = 1
    def get_vocab(self): return {{"a": 0}}
"""


@pytest.fixture
def hostile(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage whose stack, sealed by its author, asks transformers to run the Python file beside its CLIP."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(storage, tmp_path / "storage")
    clip = tmp_path / "storage" / "stack" / "clip"
    configuration = json.loads((clip / "open_clip_config.json").read_text())
    configuration["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": "bert-base-uncased",
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    (clip / "open_clip_config.json").write_text(json.dumps(configuration))
    (clip / "evil.py").write_text(TOKENIZER.format(canary=str(tmp_path / "canary")))
    map_of_classes = {"AutoTokenizer": ["evil.Evil", None]}
    (clip / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": map_of_classes}))
    hashes = {path.name: sha256(path.read_bytes()) for path in clip.iterdir() if path.name != "manifest.json"}
    (clip / "manifest.json").write_text(json.dumps({"sha256": hashes}))
    folders = [path.name for path in clip.parent.iterdir() if path.is_dir()]
    seal(str(clip.parent), folders)
    published = tmp_path / "storage" / "published" / "tiny.json"
    published.write_text(json.dumps({"stack": str(clip.parent), "at": 0}))
    return tmp_path / "storage"


def test_f49_a_stack_cannot_run_its_own_code(hostile: Path) -> None:
    canary, clip = hostile.parent / "canary", hostile / "stack" / "clip"
    result = sample(hostile)
    assert result.returncode == 1 and not canary.exists(), result.stderr
    assert "hf_tokenizer_name" in result.stderr.replace("\n", " ") and "not allowed here" in result.stderr
    for use in (check_name, create, tokenizer, outline):
        with pytest.raises(CheckpointError, match="'hf_tokenizer_name', which is not allowed here"):
            use(*([f"local-dir:{clip}", None] if use in (check_name, create) else [f"local-dir:{clip}"]))
    assert not canary.exists()

    import open_clip  # on its own, it does run the file: should that change, this test shows nothing any more

    open_clip.get_tokenizer(f"local-dir:{clip}")
    assert canary.read_text() == "run"


def test_settings_are_published_with_the_stack(storage: Path) -> None:
    sampling = json.loads((storage / "stack" / "stack.json").read_text())["sampling"]
    assert sampling["decoder"]["strength"] == 0.7 and sampling["prior"]["thresholding"] == "static"
