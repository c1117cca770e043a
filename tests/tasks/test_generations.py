"""Refreshes that continue earlier ones: the same tables as from scratch, for any sequence of changes, from few rows."""

import dataclasses
import functools
import hashlib
import importlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from benchmarks import refresh
from tasks import duplicates, garbage, generations, ranges, tables, verification
from tasks.derived import read_shard, shards
from tasks.find_duplicates import KeepCaptions
from tasks.index import index_files, index_uri, update_index
from tasks.lineage.takedown import take_down
from tasks.report_page import render
from tasks.report_summary import Tables
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Call, Pinning, Run, execute
from tasks.stages.curate import CurateConfig, curate
from tasks.stages.dedup import DedupConfig, dedup
from tasks.stages.download import IMAGES, DownloadConfig, download
from tasks.stages.embed import EmbedConfig, embed
from tasks.stages.filter import FilterConfig, filter
from tasks.stages.ingest import IngestConfig, ingest
from tasks.stages.report import ReportConfig, report, summarise
from tasks.store import Store
from tasks.tombstones import Tombstone
from tasks.tracking import Tracker
from tests.tasks.datasets import write_folder
from unclip import files
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
        "key": key, "url": url, "caption": caption, "status": "ok", "width": 8, "height": 8, "jpg": jpeg(content),
        "original_width": 20 if content % 11 == 0 else 64, "original_height": 64, "sha256": sha256, "phash": look,
        "colour": f"{content % 7 * 32:02x}0000", "jpg_sha256": sha256,
    }  # fmt: skip


@functools.cache
def jpeg(content: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (content, 255 - content, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


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
    for shard in shards(facts["images"], facts["images_version"], places):
        found = read_shard(shard, ("caption",), "embed").to_pylist()
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
            settings = {name: self.settings[name] for name in ("filter", "curate") if name in self.settings}
            config = stage.pin(config, Pinning(self.store, _Pipeline(**settings)))
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
        found["report"] = self.run(report, self.settings.get("report", ReportConfig()), found["curate"])
        return found


@dataclasses.dataclass(frozen=True)
class _Pipeline:
    """Settings that the stages' pins look at."""

    ingest: IngestConfig = IngestConfig("list")
    filter: FilterConfig = FilterConfig()
    curate: CurateConfig = CurateConfig()


def content(found: Mapping[str, Artifact]) -> dict[str, Any]:
    """Everything in the results that must not depend on earlier refreshes."""
    facts = ("rows", "reasons", "lines", "other_captions")
    result: dict[str, Any] = {
        name: (each.digest, {fact: each.facts.get(fact) for fact in facts}) for name, each in found.items()
    }
    result["page"] = files.read(found["report"].uri).decode()
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


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    floats = ("clip_score", "statistics")  # sums, whose order differs
    for name in floats:
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
    assert {name: found[name] for name in found if name not in floats} == {
        name: expected[name] for name in expected if name not in floats
    }


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


@pytest.mark.parametrize(
    ("seed", "num_steps"),
    [(0, 3), *(pytest.param(seed, 8, marks=pytest.mark.slow) for seed in range(1, 9))],
)
def test_any_sequence_of_refreshes_gives_the_tables_of_a_first_run(tmp_path: Path, seed: int, num_steps: int) -> None:
    source = random.Random(seed)
    captions: KeepCaptions = source.choice(["url", "image", "one"])
    settings: dict[str, Any] = {
        "filter": FilterConfig(min_side=32, max_caption_characters=13),
        "dedup": DedupConfig(phash_distance=-1 if seed % 4 == 3 else 0, keep_captions=captions, holdout=0.2),
        "curate": CurateConfig(min_clip_score=-0.8),
    }
    urls, actions = tmp_path / "list", ["new", "new", "new", "new", "changed", "retry", "takedown"]
    written = random_rows(source, 300, [])
    write_file(urls, 0, written)
    refreshes = Refreshes(tmp_path / "storage", settings)
    found, attempt, number = refreshes.refresh(urls), 0, 0
    num_layers = []
    for step in range(num_steps):
        action = source.choice(actions) if step else "new"
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
            key = ranges.read_all(found["ingest"].uri, ["key"])["key"][source.randrange(250)].as_py()
            take_down(refreshes.store, [Tombstone("key", key)], None, [])
        found = refreshes.refresh(urls, attempt)
        layers = [len(ranges.layers(found[name].uri)) for name in ("ingest", "filter", "dedup", "curate")]
        num_layers.append(min(layers))
        expected = from_scratch(refreshes.store, tmp_path / f"scratch{step}", settings, urls, attempt)
        assert_same(content(found), expected)
    assert max(num_layers) > 1, "no refresh continued another"


CONTINUED = [
    "ingest/.*/pairs-since-.*/_keys/00001", "ingest/.*/pairs-since-.*/_earlier", "ingest/.*/generation", "stages/ingest",
    "filter/.*/selection-since-.*/00002", "filter/.*/selection-since-.*/_earlier", "dedup/.*/lookups-since-.*/looks/00001",
    "dedup/.*/selection-since-.*/placed/00001", "dedup/.*/selection-since-.*/_earlier", "dedup/.*/places/", "stages/dedup",
    "embed/.*/embedded-since-", "curate/.*/scores-since-.*/_removed/00001", "curate/.*/scores-since-.*/_earlier",
    "curate/.*/selection-since-.*/_earlier", "curate/.*/heldout", "curate/.*/generation", "stages/curate",
    "report/.*/hosts-since-.*/00001", "report/.*/report.html", "report/.*/summary.json", "report/.*/generation", "stages/report",
]  # fmt: skip
"""Writes of a refresh that continues another."""


def refresh_in_this_process(root: str, urls: str) -> None:
    """Refresh a storage in a process that may be killed."""
    ranges.ROWS_PER_RANGE = 64
    embed_stage._embed_rows = embed_rows
    Refreshes(Path(root), {}).refresh(Path(urls))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_f190_a_refresh_that_is_killed_anywhere_continues(tmp_path: Path) -> None:
    source, urls, root = random.Random(0), tmp_path / "list", tmp_path / "storage"
    written = random_rows(source, 300, [])
    write_file(urls, 0, written)
    Refreshes(root, {}).refresh(urls)
    write_file(urls, 1, random_rows(source, 30, written))
    armed = tmp_path / "armed"
    armed.mkdir()
    points = [f"{('before', 'after')[number % 2]} .*{path}" for number, path in enumerate(CONTINUED)]
    for number, point in enumerate(points):
        (armed / f"{number:03d}").write_text(point)
    code = f"from tests.tasks.test_generations import *; refresh_in_this_process({str(root)!r}, {str(urls)!r})"
    environment = {**os.environ, "UNCLIP_FAILPOINTS": str(armed)}
    for _ in points:
        left = len(list(armed.iterdir()))
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert len(list(armed.iterdir())) < left
    assert not list(armed.iterdir()), "all points were reached"
    found = Refreshes(root, {}).refresh(urls)
    assert len(ranges.layers(found["curate"].uri)) == 2
    assert_same(content(found), from_scratch(Store(str(root)), tmp_path / "scratch", {}, urls, 0))


def test_nothing_that_a_later_layer_needs_is_garbage_and_all_of_it_is_verified(tmp_path: Path) -> None:
    source, urls = random.Random(0), tmp_path / "list"
    written = random_rows(source, 200, [])
    refreshes = Refreshes(tmp_path / "storage", {})
    for number in range(2):
        write_file(urls, number, written if number == 0 else random_rows(source, 10, written))
        found = refreshes.refresh(urls)
    before = content(found)
    folders = {each.path for each in garbage.find(refreshes.store, [], 0)}
    bases = [layer for name in ("ingest", "dedup", "curate") for layer in ranges.layers(found[name].uri)]
    assert len(bases) == 6
    for base in bases:
        assert not any(base.startswith(f"{refreshes.store.root}/{folder}") for folder in folders)
    items = verification.survey(refreshes.store)
    states = dict(zip((item.uri for item in items), verification.check_all(items, 1), strict=True))
    assert {state for uri, state in states.items() if uri.startswith(tuple(bases))} == {"sound"}
    damaged = next(uri for uri in ranges.range_files(bases[2]) if uri in states)
    Path(damaged).write_bytes(Path(damaged).read_bytes()[:-100])
    items = verification.survey(refreshes.store)
    problems = [
        verification.Problem(item, state)
        for item, state in zip(items, verification.check_all(items, 1), strict=True)
        if state == "damaged"
    ]
    assert [problem.item.uri for problem in problems] == [damaged]
    verification.drop(refreshes.store, problems)
    again = refreshes.refresh(urls)
    assert_same(content(again), before)


def test_results_that_have_read_a_table_which_was_removed_are_not_continued(tmp_path: Path) -> None:
    source, urls, refreshes = random.Random(0), tmp_path / "list", Refreshes(tmp_path / "storage", {})
    written = random_rows(source, 200, [])
    write_file(urls, 0, written)
    before = refreshes.refresh(urls)
    images = refreshes.store.uri("images", DOWNLOAD.recipe)
    for uri in (images, index_uri(images)):  # the download deletes the index of a table that is gone
        shutil.rmtree(uri)
    write_file(urls, 1, random_rows(source, 10, written))
    found = refreshes.refresh(urls, attempt=1)  # images that failed are there now
    versions = {each["download"].facts["index_version"] for each in (before, found)}
    assert len(versions) == 1, "the version does not tell the tables apart"
    assert_same(content(found), from_scratch(refreshes.store, tmp_path / "scratch", {}, urls, 1))


@pytest.mark.parametrize("rows", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_refresh_reads_hashes_and_writes_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(ranges, "ROWS_PER_RANGE", 1 << 17)
    first, found = refresh.measure_size(str(tmp_path / "data"), rows, 16).values()
    for work in found:
        # curate's have the held-out rows, 2 % of so short a list
        most = {"download": 0.04, "curate": 0.04, "report": 0.05}.get(work.stage, 0.035)
        for kind in ("read", "hashed", "written"):
            assert work.counts.get(kind, 0) <= most * rows, f"{work.stage}: {kind} {work.counts}"
    assert sum(work.counts["written"] for work in found if work.stage == "ingest") >= 0.01 * rows
    total, total_of_first = (sum((Counter(work.counts) for work in works), Counter()) for works in (found, first))
    assert 0.005 < refresh.share_of_first(total, total_of_first) <= refresh.MAX_SHARE


def page_of_all_rows(found: Mapping[str, Artifact], config: ReportConfig, folder: Path) -> str:
    """Page that is made without an earlier one, of the same tables."""
    facts, lists = found["curate"].facts, config.lists()
    whole = summarise(Tables.of(facts), lists, f"{folder}/hosts", f"{folder}/scratch")
    return render("test", facts, config.limits, lists, whole)


def test_pages_that_continue_earlier_ones_are_those_of_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New rows, rows that give way to new ones, fetched again and taken down; a page begins anew after a takedown, and when
    the layers of its tables do."""
    monkeypatch.setattr(generations, "MAX_LAYERS", 3)
    monkeypatch.setattr(ranges, "ROWS_PER_RANGE", 128)
    source, urls, searches = random.Random(3), tmp_path / "list", list[Any]()
    settings = {
        "filter": FilterConfig(min_side=32, max_caption_characters=13),
        "curate": CurateConfig(min_clip_score=-0.6),
        "report": ReportConfig(num_pictures=5, num_at_edges=4, num_clusters=6),
    }
    refreshes = Refreshes(tmp_path / "storage", settings)
    of_url, read_kept = image_row, duplicates._read_kept
    one_colour = {"colour": "100000"}  # so that images of one look are duplicates
    monkeypatch.setattr(sys.modules[__name__], "image_row", lambda *given: of_url(*given) | one_colour)
    monkeypatch.setattr(duplicates, "_read_kept", lambda *given: searches.append(given) or read_kept(*given))
    written = random_rows(source, 250, [])
    write_file(urls, 0, written)
    began_anew, shown, changed_before, num_searches = list[bool](), list[int](), 0, 0
    selected: dict[str, str] = {}
    for step, action in enumerate(["new", "new", "retry", "takedown", "new", "new", "new"]):
        if step and action != "retry":
            write_file(urls, step, random_rows(source, 14, written))
        if action == "takedown":
            take_down(refreshes.store, [Tombstone("key", min(selected))], None, [])
        searches.clear()
        found = refreshes.refresh(urls, attempt=int(step >= 2))
        folder = refreshes.store.uri("artifacts", "report", found["report"].fingerprint)
        generation = generations.read(refreshes.store, folder)
        assert generation is not None
        began_anew.append(generation.others["hosts"] == f"{folder}/hosts")
        num_searches += len(searches) * (not began_anew[-1])
        settled = settings["report"]
        assert isinstance(settled, ReportConfig)
        config = report.pin(
            settled, Pinning(refreshes.store, _Pipeline(**{n: settings[n] for n in ("filter", "curate")}))
        )
        page = files.read(found["report"].uri).decode()
        assert page == page_of_all_rows(found, config, tmp_path / f"whole{step}")
        shown += [page.count("same bytes"), page.count("of 64 bits differ"), page.count("<figure")]
        fates = ranges.read_all(found["curate"].uri, ["key", "status"]).to_pylist()
        now = {row["key"]: row["status"] for row in fates}
        changed_before += sum(selected.get(key, status) != status for key, status in now.items()) * (
            action != "takedown"
        )
        selected = now
    # Fetched again, so many files of the index are written again that it may begin anew.
    assert [*began_anew[:2], *began_anew[3:]] == [True, False, True, False, False, True] and changed_before > 10
    assert min(shown) > 0, "no duplicates are shown"
    assert not num_searches, "all rows were searched for duplicates"


def test_rows_of_an_earlier_layer_can_be_removed_replaced_and_added(tmp_path: Path) -> None:
    keys = sorted(hashlib.md5(str(number).encode()).hexdigest() for number in range(500))
    base, first, second = (f"{tmp_path}/{number}/table" for number in range(3))
    write_folder(base, pa.table({"key": keys[:400], "value": [0] * 400}), 4)
    write_folder(first, pa.table({"key": keys[390:450], "value": [1] * 60}), 4)
    ranges.write_earlier(first, [base])
    write_folder(second, pa.table({"key": keys[449:], "value": [2] * 51}), 4)
    for key_range, gone in zip(ranges.ranges(4), ranges.split_by_key(pa.table({"key": keys[:3]}), 4), strict=True):
        ranges.write_removed(second, key_range, gone["key"])
    ranges.write_earlier(second, [base, first])
    values = dict(zip(keys[3:], [0] * 387 + [1] * 59 + [2] * 51, strict=True))
    assert ranges.layers(second) == [base, first, second]
    for count in (1, 4, 16):
        parts = [ranges.read_range(second, key_range) for key_range in ranges.ranges(count)]
        found = pa.concat_tables(parts)
        assert dict(zip(found["key"].to_pylist(), found["value"].to_pylist(), strict=True)) == values
        assert found["key"].to_pylist() == keys[3:]
    wanted = [keys[1], keys[10], keys[395], keys[449], "f" * 32]
    assert ranges.find_rows(second, wanted)["value"].to_pylist() == [0, 1, 2]
    moved = shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    shutil.rmtree(tmp_path / "0")
    assert ranges.read_all(f"{moved}/2/table").num_rows == len(values), "layers are found wherever they are"
