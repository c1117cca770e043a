from pathlib import Path

import pyarrow as pa
import torch

from tasks import tables
from tasks.snapshots import Snapshot, record_snapshot, save_statistics
from tasks.store import Store
from unclip.data import RowReader

SCHEMA = pa.schema({"key": pa.string(), "jpg": pa.binary()})


def append(uri: str, keys: list[str]) -> int:
    table = pa.table({"key": keys, "jpg": [key.encode() for key in keys]}, schema=SCHEMA)
    return tables.append_files(uri, [tables.write_part(uri, "-".join(keys), table)], SCHEMA)


def snapshot_of(folder: Path, version: int) -> Snapshot:
    selection = {"key": ["a", "b", "c"], "split": ["train", "holdout", None]}
    tables.write_file(f"{folder}/selection.parquet", pa.table(selection))
    images = f"{folder}/images"
    return Snapshot("d" * 64, f"{folder}/selection.parquet", images, version, 0, images, version, "", "", "", "")


def test_f33_a_snapshot_reads_its_version_while_the_table_grows(tmp_path: Path) -> None:
    version = append(f"{tmp_path}/images", ["a", "b"])
    snapshot = snapshot_of(tmp_path, version)
    before = snapshot.source("images", "jpg")
    append(f"{tmp_path}/images", ["c"])
    assert snapshot.source("images", "jpg") == before
    assert snapshot.keys("train") == ["a"] and snapshot.keys("holdout") == ["b"]
    assert RowReader((before,), ["a", "b"]).read(["b", "a"])["jpg"] == [b"b", b"a"]


def test_f35_snapshots_are_numbered_and_the_same_content_is_recorded_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    snapshot = {"images": "i", "images_version": 0, "embeddings": "e", "embeddings_version": 0}
    snapshot |= {"selection": "s", "scores": "c", "statistics": "t"}
    for digest in ("one", "two", "one", "three"):
        record_snapshot(store, "mine", {**snapshot, "digest": digest}, {"rows": {}, "reasons": {}})
    rows = sorted(tables.read_with_commit_times(store.uri("snapshots")).to_pylist(), key=lambda row: row["number"])
    assert [(row["number"], row["digest"]) for row in rows] == [(1, "one"), (2, "two"), (3, "three")]


def test_the_same_embeddings_give_the_same_statistics(tmp_path: Path) -> None:
    embeddings = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5.0, 1, 0.1, 0, 0])
    explained = [save_statistics(f"{tmp_path}/{name}", embeddings) for name in ("a", "b")]
    assert explained[0] == explained[1] and explained[0]["components_90"] == 2
    for name in ("statistics.safetensors", "pca.safetensors"):
        assert Path(tmp_path, "a", name).read_bytes() == Path(tmp_path, "b", name).read_bytes()
