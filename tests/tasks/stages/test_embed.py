"""The embedding actor: its results equal open_clip's for every row, independent of batches and files."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tasks import tables
from tasks.derived import Shard, read_shard
from tasks.lineage.takedown import parse
from tasks.progress import Progress
from tasks.stage import Artifact, Call, Failure, Resources, Run, execute
from tasks.stages.download import IMAGES
from tasks.stages.embed import SCHEMA, EmbedConfig, Embedder, Preprocess
from tasks.stages.embed import embed as embed_stage
from tasks.store import Store
from tasks.tombstones import forget, record
from tasks.tracking import Tracker
from tests.tasks.datasets import kept_selection, key, write_folder, write_kept_places
from tests.tasks.datasets import write_images as write_table
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


def embed(model: str, images: str, rows: list[int], table: Path, batch_size: int = 4) -> pa.Table:
    """Part written by the actor, called in this process."""
    artifact = Artifact("clip", "", "", "", {"model": model, "pretrained": None}, 0.0)
    config = EmbedConfig(batch_size=batch_size)
    progress = Progress(f"{table}.json", len(rows), "pairs")
    actor = Embedder.__ray_metadata__.modified_class(artifact, config, str(table), 2, progress)  # type: ignore[attr-defined]
    part = actor.embed(Shard(images, np.array(rows, np.int32)))
    return tables.read_file(f"{table}/{part.name}")


def test_preprocessing_in_two_parts_equals_that_of_open_clip_bitwise(model: str) -> None:
    loaded = Clip.load(model)
    jpgs = [jpg(number) for number in range(10)]
    expected = torch.stack([loaded.preprocess(Image.open(io.BytesIO(image))) for image in jpgs])
    preprocess = Preprocess(loaded.preprocess)
    pixels = preprocess.standardize([preprocess.decode(image) for image in jpgs], torch.device("cpu"))
    assert torch.equal(pixels, expected) and pixels.is_contiguous()


def test_every_row_has_its_own_embeddings_in_the_order_of_the_images(model: str, tmp_path: Path) -> None:
    images = write_images(tmp_path, list(range(30)), "images")
    numbers = list(range(1, 30, 2))  # 15 rows in batches of 4: the last is padded
    part = embed(model, images, numbers, tmp_path / "embeddings")

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


def test_f102_tokens_of_long_captions_that_clip_does_not_read_are_counted(model: str, tmp_path: Path) -> None:
    """A caption of one-token words fits with its two marks or loses the words beyond; CLIP's text is of 77 tokens or fewer."""
    length = Clip.load(model).text_length
    words = [1, length - 3, length - 2, length - 1, length + 40, 499]
    rows = [{"key": key(number), "caption": "a " * count, "jpg": jpg(1)} for number, count in enumerate(words)]
    rows.append({"key": key(9), "caption": "\U0001f388" * 1000, "jpg": jpg(1)})
    uri = str(tmp_path / "images.parquet")
    tables.write_file(uri, pa.Table.from_pylist(rows, schema=IMAGES))
    part = embed(model, uri, list(range(len(rows))), tmp_path / "embeddings")
    *lost, last = part.column("tokens_lost").to_pylist()
    assert lost == [max(0, count + 2 - length) for count in words] and last > 900


def test_the_same_rows_give_the_same_bytes(model: str, tmp_path: Path) -> None:
    images = write_images(tmp_path, list(range(12)), "images")
    first, second = (embed(model, images, list(range(12)), tmp_path / name) for name in ("first", "again"))
    assert tables.parquet_bytes(first) == tables.parquet_bytes(second)


def test_a_missing_image_is_named_and_nothing_is_written(model: str, tmp_path: Path) -> None:
    rows = [{"key": key(number), "caption": "", "jpg": jpg(number) if number < 2 else None} for number in range(3)]
    uri = str(tmp_path / "images.parquet")
    tables.write_file(uri, pa.Table.from_pylist(rows, schema=IMAGES))
    with pytest.raises(StageError, match=f"1 rows of .* have no image, such as {key(2)}"):
        embed(model, uri, [1, 2], tmp_path / "embeddings")
    assert not (tmp_path / "embeddings").exists()


def test_a_damaged_image_fails_the_shard_and_nothing_is_written(model: str, tmp_path: Path) -> None:
    rows = [{"key": key(number), "caption": "", "jpg": jpg(number)} for number in range(9)]
    rows[5]["jpg"] = b"not an image"
    uri = str(tmp_path / "images.parquet")
    tables.write_file(uri, pa.Table.from_pylist(rows, schema=IMAGES))
    with pytest.raises(OSError, match="cannot identify"):
        embed(model, uri, list(range(9)), tmp_path / "embeddings")
    assert not (tmp_path / "embeddings").exists()


def test_a_shard_has_its_rows_in_any_row_group(tmp_path: Path) -> None:
    rows = [{"key": key(number), "caption": str(number), "jpg": b"x"} for number in range(2500)]
    uri = str(tmp_path / "images.parquet")
    tables.write_file(uri, pa.Table.from_pylist(rows, schema=IMAGES))
    wanted = [0, 7, 999, 1000, 2000, 2499]
    read = read_shard(Shard(uri, np.array(wanted, np.int32)), ("caption", "jpg"), "embed")
    assert [int(caption) for caption in read["caption"].to_pylist()] == wanted


@pytest.mark.usefixtures("cluster")
def test_rows_that_are_kept_later_are_embedded_alone_in_the_order_of_the_images(model: str, tmp_path: Path) -> None:
    """F74: rows that another owner committed a second time are removed."""
    files = [
        [{"key": key(n), "caption": f"image {n}", "status": "ok", "jpg": jpg(n)} for n in range(start, 24, 2)]
        for start in (0, 1)
    ]
    facts = write_table(str(tmp_path), *files)
    clip_artifact = Artifact("clip", "", "", "c", {"model": model, "pretrained": None}, 0.0)
    run = Run("r", "p", str(tmp_path), Tracker("", ""), "", {"embed": Resources(1, 2)})
    embedded: list[Artifact] = []
    for number, kept in enumerate((range(0, 24, 3), range(24))):
        root = f"{tmp_path}/{number}"
        selection = write_folder(f"{root}/selection", kept_selection({key(n): "train" for n in kept}))
        counts = {"rows": {"in": 24, "kept": len(kept), "dropped": 24 - len(kept), "failed": 0}}
        dedup_facts = {**facts, **counts, "places": write_kept_places(root, selection, facts)}
        dedup = Artifact("dedup", "f", selection, f"d{number}", dedup_facts, 0.0)
        if embedded:
            first = tables.read(embedded[0].uri)
            late = first.slice(2, 3).set_column(1, "caption", pa.array(["late"] * 3))
            version = tables.append_files(embedded[0].uri, [tables.write_part(embedded[0].uri, "0-late", late)], SCHEMA)
            store = Store(str(tmp_path))
            request = record(store, [parse("domain", "example.com")], None)
            result = execute(Call(embed_stage, EmbedConfig(batch_size=4)), run, [dedup, clip_artifact])
            assert isinstance(result, Failure) and "a takedown was recorded meanwhile" in result.message
            assert tables.version(embedded[0].uri) == version, "nothing is committed before it is carried out"
            forget(store, request)
        result = execute(Call(embed_stage, EmbedConfig(batch_size=4)), run, [dedup, clip_artifact])
        assert isinstance(result, Artifact), result
        embedded.append(result)
    assert [artifact.facts["embedded_now"] for artifact in embedded] == [8, 16]
    version = embedded[1].facts["embeddings_version"]
    assert "late" not in tables.read(embedded[1].uri, version, ["key", "caption"])["caption"].to_pylist()
    assert tables.read(embedded[1].uri, version, ["key"])["key"].to_pylist() == [key(n) for n in range(24)]
    for uri in tables.files(embedded[1].uri, version):
        numbers = [int(each, 16) >> 116 for each in tables.read_file(uri, ["key"])["key"].to_pylist()]
        assert numbers == sorted(numbers) and len({n % 2 for n in numbers}) == 1, "rows of one image file, in its order"
