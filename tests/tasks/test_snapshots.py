from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tasks import tables
from tasks.snapshots import Snapshot, record_snapshot, save_statistics
from tasks.stages.download import IMAGES
from tasks.store import Store
from tests.tasks.datasets import kept_selection, key, write_folder, write_images, write_kept_places
from unclip.data import RowReader
from unclip.models.embeddings import Moments

SNAPSHOT = {"images": "i", "images_version": 0, "index_version": 0, "embeddings": "e", "embeddings_version": 0}
SNAPSHOT |= {"selection": "s", "scores": "c", "places": "p", "heldout": "h", "statistics": "t"}


def image(number: int) -> dict[str, Any]:
    return {"key": key(number), "status": "ok", "jpg": b"%d" % number}


def test_f33_a_snapshot_reads_its_version_while_the_table_grows(tmp_path: Path) -> None:
    facts = write_images(str(tmp_path), [image(0), image(1)])
    selection = write_folder(f"{tmp_path}/selection", kept_selection({key(0): "train", key(1): "holdout"}))
    places = write_kept_places(str(tmp_path), selection, facts)
    snapshot = Snapshot(**{**SNAPSHOT, **facts, "digest": "d", "selection": selection, "places": places})
    before = snapshot.source("images", "jpg")
    part = tables.write_part(facts["images"], "later", pa.Table.from_pylist([image(2)], schema=IMAGES))
    tables.append_files(facts["images"], [part], IMAGES)
    assert snapshot.source("images", "jpg") == before
    for split, number in (("train", 0), ("holdout", 1)):
        reader = RowReader((before,), snapshot.open_places(split))
        assert reader.read(np.array([0])) == {"key": [key(number)], "jpg": [b"%d" % number]} and len(reader) == 1
    assert len(snapshot.open_places("train", "holdout")) == 2


def test_f35_snapshots_are_numbered_and_the_same_content_is_recorded_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for digest in ("one", "two", "one", "three"):
        record_snapshot(store, "mine", {**SNAPSHOT, "digest": digest}, {"rows": {}, "reasons": {}})
    rows = sorted(tables.read_with_commit_times(store.uri("snapshots")).to_pylist(), key=lambda row: row["number"])
    assert [(row["number"], row["digest"]) for row in rows] == [(1, "one"), (2, "two"), (3, "three")]


def test_the_same_embeddings_give_the_same_statistics(tmp_path: Path) -> None:
    embeddings = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5.0, 1, 0.1, 0, 0])
    explained = [save_statistics(f"{tmp_path}/{name}", Moments.of(embeddings)) for name in ("a", "b")]
    assert explained[0] == explained[1] and explained[0]["components_90"] == 2
    for name in ("statistics.safetensors", "pca.safetensors"):
        assert Path(tmp_path, "a", name).read_bytes() == Path(tmp_path, "b", name).read_bytes()


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    embeddings = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)) + torch.arange(6)
    moments = Moments.of(embeddings[:13]).plus(Moments.of(embeddings[13:14])).plus(Moments.of(embeddings[14:]))
    values = embeddings.double()
    assert torch.allclose(moments.mean(), values.mean(0), rtol=1e-12)
    assert torch.allclose(moments.covariance(), values.T.cov(), rtol=1e-10, atol=1e-12)
