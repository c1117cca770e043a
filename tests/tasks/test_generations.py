"""Refreshes that continue earlier ones: the same tables as from scratch, for any sequence of changes, from few rows."""

import dataclasses
import hashlib
import importlib
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from tasks import ranges, tables
from tasks.find_duplicates import KeepCaptions
from tasks.index import index_files, update_index
from tasks.lineage.takedown import take_down
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Call, Pinning, Run, execute
from tasks.stages.curate import CurateConfig, curate
from tasks.stages.dedup import DedupConfig, dedup
from tasks.stages.download import IMAGES, DownloadConfig, download
from tasks.stages.embed import EmbedConfig, embed, read_shard
from tasks.stages.filter import FilterConfig, filter
from tasks.stages.ingest import IngestConfig, ingest
from tasks.store import Store
from tasks.tombstones import Tombstone
from tasks.tracking import Tracker
from unclip.config import fingerprint
from unclip.data import RowReader

DOWNLOAD = DownloadConfig(tasks_in_flight=1)
Listed = tuple[str, str]
"""URL and caption."""


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "ROWS_PER_RANGE", 64)


def number_of(text: str, salt: str, below: int) -> int:
    return int(hashlib.sha256(f"{salt} {text}".encode()).hexdigest(), 16) % below


def image_row(key: str, url: str, caption: str, attempt: int) -> dict[str, Any]:
    """Row of the images table; a URL always has the same image, and some URLs share one, or a look."""
    if number_of(url, "failed", 20) == 0 and attempt < 1:
        return {"key": key, "url": url, "caption": caption, "status": "failed", "reason": "http_503"}
    content = number_of(url, "content", 150)
    sha256 = hashlib.sha256(str(content).encode()).hexdigest()
    look = None if content % 17 == 0 else f"{content % 60:016x}"
    return {
        "key": key, "url": url, "caption": caption, "status": "ok", "width": 64, "height": 64, "jpg": sha256.encode(),
        "original_width": 20 if content % 11 == 0 else 64, "original_height": 64, "sha256": sha256, "phash": look,
        "colour": f"{content % 7 * 32:02x}0000", "jpg_sha256": sha256,
    }  # fmt: skip


def fetch(store: Store, pairs: str, attempt: int) -> None:
    """Do what the download does: add the rows that the images table lacks, and replace those that failed before."""
    images = store.uri("images", DOWNLOAD.recipe)
    listed = ranges.read_all(pairs, ["key", "url", "caption", "status"])
    listed = listed.filter(pc.equal(listed["status"], "kept"))
    removed: list[str] = []
    parts: list[tables.Part] = []
    known: dict[str, Any] = {}
    version = tables.version(images)
    if version is not None:
        index = ranges.read_all(index_files(images, update_index(images, version)), ["key", "reason", "part"])
        known = {row["key"]: row for row in index.to_pylist()}
    new = []
    for row in listed.to_pylist():
        found = known.get(row["key"])
        if found is None or (found["reason"] == "http_503" and attempt):
            new.append(image_row(row["key"], row["url"], row["caption"], attempt))
    replaced: dict[str, list[str]] = {}
    for row in new:
        if row["key"] in known:
            replaced.setdefault(known[row["key"]]["part"], []).append(row["key"])
    for name, keys in replaced.items():
        removed.append(name)
        parts += tables.rewrite_without(f"{images}/{name}", pa.array(keys)) or []
    for start in range(0, len(new), 50):
        table = pa.Table.from_pylist(new[start : start + 50], schema=IMAGES)
        name = hashlib.sha256(repr(new[start : start + 50]).encode()).hexdigest()[:16]
        parts.append(tables.write_part(images, name, table))
    update_index(images, tables.append_files(images, parts, IMAGES, removed=removed))


def embed_rows(
    context: Any, config: Any, clip: Any, facts: Mapping[str, Any], places: str, num_rows: int, table: str
) -> None:
    """Do what the stage embed does in actors, with vectors that are functions of the keys in the place of CLIP's."""
    parts = []
    for shard in embed_stage._shards(facts, places):
        found = read_shard(shard)
        keys = [row["key"] for row in found]
        generators = [np.random.default_rng(int(key, 16)) for key in keys]
        vectors = [[generator.standard_normal(4), generator.standard_normal(4)] for generator in generators]
        image, text = np.array(vectors, np.float32).swapaxes(0, 1)
        image, text = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (image, text))
        columns = [keys, [row["caption"] for row in found], list(image), list(text), (image * text).sum(axis=1)]
        columns += [[[1, 2]] * len(keys), [0] * len(keys)]
        name = f"{shard.uri.rpartition('/')[2].removesuffix('.parquet')}-{fingerprint(keys)[:16]}"
        parts.append(tables.write_part(table, name, pa.table(columns, schema=embed_stage.SCHEMA)))
    tables.append_files(table, parts, embed_stage.SCHEMA)


@pytest.fixture(autouse=True)
def embedded_without_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_stage, "_embed_rows", embed_rows)


embed_stage = importlib.import_module("tasks.stages.embed")
CLIP = Artifact("clip", "", "", "vectors", {"model": "none", "pretrained": None}, 0.0)


class Refreshes:
    """A storage that is refreshed again and again."""

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        self.store, self.settings = Store(str(root)), settings

    def run(self, stage: Any, config: Any, *parents: Artifact) -> Artifact:
        run = Run("run", "test", self.store.root, Tracker("", ""), "0")
        if stage.pin:
            config = stage.pin(config, Pinning(self.store, _Pipeline()))
        result = execute(Call(stage, config), run, parents)
        assert isinstance(result, Artifact), result
        return result

    def refresh(self, urls: Path, attempt: int = 0) -> dict[str, Artifact]:
        found = {"ingest": self.run(ingest, IngestConfig(str(urls)))}
        fetch(self.store, found["ingest"].uri, attempt)
        found["download"] = self.run(download, dataclasses.replace(DOWNLOAD, attempt=attempt), found["ingest"])
        found["filter"] = self.run(filter, self.settings.get("filter", FilterConfig()), found["download"])
        found["dedup"] = self.run(dedup, self.settings.get("dedup", DedupConfig()), found["filter"])
        found["embed"] = self.run(embed, EmbedConfig(), found["dedup"], CLIP)
        found["curate"] = self.run(curate, self.settings.get("curate", CurateConfig()), found["embed"])
        return found


@dataclasses.dataclass(frozen=True)
class _Pipeline:
    """Settings that the stages' pins look at."""

    ingest: IngestConfig = IngestConfig("list")


def content(found: Mapping[str, Artifact]) -> dict[str, Any]:
    """Everything in the results that must not depend on earlier refreshes."""
    facts = ("rows", "reasons", "lines", "other_captions")
    result: dict[str, Any] = {
        name: (each.digest, {fact: each.facts.get(fact) for fact in facts}) for name, each in found.items()
    }
    for name in ("ingest", "filter", "dedup", "curate"):
        table = ranges.read_all(found[name].uri)
        order = [("key", "ascending"), ("position", "ascending")]
        result[f"rows of {name}"] = table.sort_by(order).to_pylist()
    snapshot = Snapshot.of(found["curate"].facts)
    scores = ranges.read_all(snapshot.scores)
    result["scores"] = scores.drop_columns(["embeddings_file", "embeddings_row"]).to_pylist()
    result["clip_score"] = found["curate"].facts["clip_score"]
    for split in ("train", "holdout"):
        places = snapshot.open_places(split)
        result[f"places of {split}"] = sorted(places.keys(np.arange(len(places))))
    sources = [snapshot.source("images", "url"), snapshot.source("embeddings", "caption", "clip_score")]
    reader = RowReader(sources, snapshot.open_places("train"))
    batch = reader.read(np.arange(len(reader)))
    result["training rows"] = sorted(
        zip(*(batch[name] for name in ("key", "url", "caption", "clip_score")), strict=True)
    )
    heldout = snapshot.heldout_rows()
    result["held out"] = heldout.select(["key", "caption", "split", "is_trained_on"]).to_pylist()
    statistics = snapshot.load_statistics()
    result["statistics"] = torch.cat([statistics.mean, statistics.std]).tolist()
    return result


def from_scratch(store: Store, root: Path, settings: Mapping[str, Any], urls: Path, attempt: int) -> dict[str, Any]:
    """Content of a refresh in a storage that has the same tables, but no results of stages."""
    for name in ("images", "index", "embeddings"):
        if store.exists(name):
            shutil.copytree(store.uri(name), root / name)
    for name in ("tombstones.parquet", "attempts"):
        if store.exists(name):
            copy = shutil.copytree if name == "attempts" else shutil.copy
            copy(store.uri(name), root / name)
    return content(Refreshes(root, settings).refresh(urls, attempt))


def write_file(folder: Path, number: int, rows: Sequence[Listed]) -> None:
    folder.mkdir(exist_ok=True)
    table = pa.table({"url": [url for url, _ in rows], "caption": [caption for _, caption in rows]})
    (folder / f"{number:03d}.parquet").write_bytes(tables.parquet_bytes(table))


def random_rows(source: random.Random, count: int, known: Sequence[Listed]) -> list[Listed]:
    """New rows: some repeat a row, some have the URL of another row, some are unusable."""
    rows = []
    for _ in range(count):
        url, caption = (
            f"http://site{source.randrange(9)}.org/{source.randrange(10**9)}.jpg",
            f"a thing {source.randrange(500)}",
        )
        if known and source.random() < 0.1:
            url = source.choice(known)[0]
        if known and source.random() < 0.05:
            url, caption = source.choice(known)
        rows.append(("nothing" if source.random() < 0.03 else url, "" if source.random() < 0.03 else caption))
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_refreshes_gives_the_tables_of_a_first_run(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    captions: tuple[KeepCaptions, ...] = ("url", "image", "one", "url")
    settings: dict[str, Any] = {
        "dedup": DedupConfig(phash_distance=-1 if seed == 3 else 0, keep_captions=captions[seed], holdout=0.2)
    }
    settings["curate"] = CurateConfig(min_clip_score=-0.8)
    urls = tmp_path / "list"
    written = random_rows(source, 400, [])
    write_file(urls, 0, written)
    refreshes = Refreshes(tmp_path / "storage", settings)
    found, attempt, number = refreshes.refresh(urls), 0, 0
    num_layers = []
    for step in range(6):
        action = source.choice(["new", "new", "new", "changed", "retry", "takedown"])
        if action == "new":
            number += 1
            new = random_rows(source, source.randrange(1, 20), written)
            write_file(urls, number, new)
            written += new
        elif action == "changed":
            written = [
                (url, f"{caption} changed") if source.random() < 0.02 else (url, caption) for url, caption in written
            ]
            number = 0
            shutil.rmtree(urls)
            write_file(urls, 0, written)
        elif action == "retry":
            attempt = 1
        else:
            key = ranges.read_all(found["ingest"].uri, ["key"])["key"][source.randrange(300)].as_py()
            take_down(refreshes.store, [Tombstone("key", key)], None, [])
        found = refreshes.refresh(urls, attempt)
        num_layers.append(min(len(ranges.layers(found[name].uri)) for name in ("filter", "dedup", "curate")))
        expected = from_scratch(refreshes.store, tmp_path / f"scratch{step}", settings, urls, attempt)
        got = content(found)
        for name in ("clip_score", "statistics"):  # sums of floats, whose order differs
            assert got.pop(name) == pytest.approx(expected.pop(name), abs=1e-6), f"step {step}: {action}"
        assert got == expected, f"step {step}: {action}"
    assert max(num_layers) > 1, "no refresh continued another"
