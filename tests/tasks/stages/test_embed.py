"""The embedding actor: its results equal open_clip's for every row, independent of batches and files."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tasks import tables
from tasks.stage import Artifact
from tasks.stages.download import IMAGES
from tasks.stages.embed import EmbedConfig, Embedder, Preprocess, _read_rows
from unclip.data import vectors
from unclip.errors import StageError
from unclip.models import clip
from unclip.models.clip import Clip

MODEL = "unclip-demo"
SIZES = [(64, 64), (96, 64), (64, 96), (200, 150), (31, 40)]


def jpg(number: int) -> bytes:
    """JPEG of noise in one of several sizes; every seventh is grey."""
    width, height = SIZES[number % len(SIZES)]
    image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))
    buffer = io.BytesIO()
    (image.convert("L") if number % 7 == 0 else image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def key(number: int) -> str:
    return f"{number:032x}"


def write_images(folder: Path, numbers: list[int], name: str) -> str:
    rows = [{"key": key(number), "caption": f"image {number}", "jpg": jpg(number)} for number in numbers]
    uri = str(folder / f"{name}.parquet")
    tables.write_file(uri, pa.Table.from_pylist(rows, schema=IMAGES))
    return uri


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    clip.save(clip.create(MODEL, None), MODEL, folder)
    return f"local-dir:{folder}"


def embed(model: str, images: list[str], keys: list[str], table: Path, batch_size: int = 4) -> pa.Table:
    """Part written by the actor, called in this process."""
    artifact = Artifact("clip", "", "", "", {"model": model, "pretrained": None}, 0.0)
    config = EmbedConfig(batch_size=batch_size)
    actor = Embedder.__ray_metadata__.modified_class(artifact, config, images, str(table), 2)  # type: ignore[attr-defined]
    part = actor.embed(keys)
    return tables.read_file(f"{table}/{part.name}")


def test_preprocessing_in_two_parts_equals_that_of_open_clip_bitwise(model: str) -> None:
    loaded = Clip.load(model)
    jpgs = [jpg(number) for number in range(10)]
    expected = torch.stack([loaded.preprocess(Image.open(io.BytesIO(image))) for image in jpgs])
    preprocess = Preprocess(loaded.preprocess)
    pixels = preprocess.standardize([preprocess.decode(image) for image in jpgs], torch.device("cpu"))
    assert torch.equal(pixels, expected) and pixels.is_contiguous()


def test_every_row_has_its_own_embeddings_in_the_order_of_the_keys(model: str, tmp_path: Path) -> None:
    images = [write_images(tmp_path, list(range(start, 30, 3)), f"images-{start}") for start in range(3)]
    numbers = list(range(1, 30, 2))  # 15 rows of 3 files in batches of 4: the last is padded
    part = embed(model, images, [key(number) for number in numbers], tmp_path / "embeddings")

    loaded = Clip.load(model)
    pixels = torch.stack([loaded.preprocess(Image.open(io.BytesIO(jpg(number)))) for number in numbers])
    captions = [f"image {number}" for number in numbers]
    assert part.column("key").to_pylist() == [key(number) for number in numbers]
    assert part.column("caption").to_pylist() == captions
    image, text = (vectors(part.column(name)) for name in ("image_embedding", "text_embedding"))
    np.testing.assert_allclose(image, loaded.embed_images(pixels).numpy(), atol=1e-5)
    np.testing.assert_allclose(text, loaded.encode_text(loaded.tokenize(captions)).text_embedding.numpy(), atol=1e-5)
    assert part.column("tokens").to_pylist() == loaded.tokenize(captions).tolist()
    np.testing.assert_allclose(part.column("clip_score").to_numpy(), (image * text).sum(axis=1), atol=1e-6)


def test_the_same_rows_give_the_same_bytes(model: str, tmp_path: Path) -> None:
    images = [write_images(tmp_path, list(range(12)), "images")]
    keys = [key(number) for number in range(12)]
    first, second = (embed(model, images, keys, tmp_path / name) for name in ("first", "again"))
    assert tables.parquet_bytes(first) == tables.parquet_bytes(second)


def test_a_missing_image_is_named_and_nothing_is_written(model: str, tmp_path: Path) -> None:
    images = [write_images(tmp_path, [1, 2], "images")]
    with pytest.raises(StageError, match=f"1 images are missing .* such as {key(3)}"):
        embed(model, images, [key(1), key(3)], tmp_path / "embeddings")
    assert not (tmp_path / "embeddings").exists()


def test_a_damaged_image_fails_the_shard_and_nothing_is_written(model: str, tmp_path: Path) -> None:
    rows = [{"key": key(number), "caption": "", "jpg": jpg(number)} for number in range(9)]
    rows[5]["jpg"] = b"not an image"
    uri = str(tmp_path / "images.parquet")
    tables.write_file(uri, pa.Table.from_pylist(rows, schema=IMAGES))
    with pytest.raises(OSError, match="cannot identify"):
        embed(model, [uri], [key(number) for number in range(9)], tmp_path / "embeddings")
    assert not (tmp_path / "embeddings").exists()


def test_rows_are_found_anywhere_in_the_files(tmp_path: Path) -> None:
    images = [write_images(tmp_path, [0, 5, 9], "a"), write_images(tmp_path, [3, 7], "b")]
    found = {row["key"]: row["caption"] for row in _read_rows(images, [key(9), key(3), key(0), key(4)])}
    assert found == {key(0): "image 0", key(3): "image 3", key(9): "image 9"}
