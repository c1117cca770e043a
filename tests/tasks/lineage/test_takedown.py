import collections
import contextlib
import dataclasses
import functools
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from pipelines.config import load
from pipelines.records import close_run, open_run
from pipelines.takedowns import carry_out_recorded
from tasks import index, ranges, tables
from tasks.lineage import previews, traces
from tasks.lineage.provenance import difference, find_version, show, versions
from tasks.lineage.takedown import find_keys, find_rows, parse, parse_file, take_down
from tasks.lock import lock
from tasks.snapshots import record_snapshot
from tasks.stage import Artifact, Call, Output, Run, Stage, StageContext, execute, stage
from tasks.stages.download import IMAGES
from tasks.stages.embed import SCHEMA as EMBEDDINGS
from tasks.stages.ingest import LISTED as LISTED_SCHEMA
from tasks.stages.ingest import clean, drop_duplicates
from tasks.store import Store
from tasks.tombstones import (
    Entry,
    Tombstone,
    gather,
    load_tombstones,
    look_value,
    recorded,
    refuse,
    tombstones_digest,
    write_entries,
)
from tasks.tracking import PREVIEW_KEYS, PREVIEWS, Tracker, checked_client, client
from tests.pipelines.command_line import ROOT, call, call_json
from tests.tasks.datasets import holders, write_folder
from unclip import files, seals
from unclip.errors import AlreadyRunningError, DamagedError, InputError, StageError
from unclip.systems.unclip.prior import PRIOR
from unclip.training.film import add_preview

NUM_RANGES = 4
LISTED = [(f"https://a{index % 3}.example.org/{index}.jpg", f"caption number {index}") for index in range(12)]


def pairs_of(listed: Sequence[tuple[str, str]]) -> pa.Table:
    """Pairs that ingest makes of a list of URLs and captions."""
    rows = [{"url": url, "caption": caption, "sha256": ""} for url, caption in listed]
    return drop_duplicates(clean(pa.Table.from_pylist(rows, LISTED_SCHEMA)))


def stored_image(index: int) -> dict[str, Any]:
    """Return a stored image; 3 and 4 are identical, and 5 looks like them."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (20 * index, 7, 77)).save(buffer, "JPEG")
    same = 3 if index == 4 else index
    phash = {3: 0b111, 4: 0b111, 5: 0b110}.get(index, 1 << (5 * index + 5) if index else 1 << 60)
    return {"status": "ok", "sha256": f"{same:064x}", "phash": f"{phash & 2**64 - 1:016x}", "jpg": buffer.getvalue()}


def make_store(root: Path) -> Store:
    """Make a storage with 12 rows of 3 hosts in 4 ranges of keys, one dataset version, and a report."""
    store = Store(str(root))
    pairs = pairs_of(LISTED)
    write_folder(store.uri("artifacts", "ingest", "f", "pairs"), pairs, NUM_RANGES)
    order = {row["key"]: row["position"] for row in pairs.to_pylist()}
    listed = sorted(order)
    images = [
        {"key": row["key"], "url": row["url"], "caption": row["caption"], **stored_image(row["position"])}
        for row in pairs.to_pylist()
    ]
    uri = store.uri("images", "recipe")
    halves = [pa.Table.from_pylist(half, schema=IMAGES) for half in (images[:6], images[6:])]
    parts = [tables.write_part(uri, str(number), half) for number, half in enumerate(halves)]
    version = tables.append_files(uri, parts, IMAGES)
    embeddings = store.uri("embeddings", "clip")
    embedded = pa.Table.from_pylist(
        [{"key": key, "caption": "c", "image_embedding": [1.0]} for key in listed], schema=EMBEDDINGS
    )
    embeddings_version = tables.append_files(embeddings, [tables.write_part(embeddings, "x", embedded)], EMBEDDINGS)
    selection = pa.table(
        {
            "key": listed,
            "position": [order[key] for key in listed],
            "status": ["kept"] * 11 + ["dropped"],
            "reason": [None] * 11 + ["too_small"],
            "split": ["train"] * 11 + [None],
        }
    )
    write_folder(store.uri("artifacts", "curate", "f", "selection"), selection, NUM_RANGES)
    scores = pa.table(
        {"key": listed, "clip_score": [0.5] * 12, "embeddings_file": [""] * 12, "embeddings_row": range(12)}
    )
    write_folder(store.uri("artifacts", "curate", "f", "scores"), scores, NUM_RANGES)
    heldout = store.uri("artifacts", "curate", "f", "heldout.parquet")
    captions = {row["key"]: row["caption"] for row in pairs.to_pylist()}
    tables.write_file(heldout, pa.table({"key": listed, "caption": [captions[key] for key in listed]}))
    snapshot = {
        "digest": "d1" * 32,
        "images": uri,
        "images_version": version,
        "embeddings": embeddings,
        "embeddings_version": embeddings_version,
    }
    snapshot |= {"index_version": index.update_index(uri, version), "places": "", "heldout": heldout, "statistics": ""}
    snapshot |= {name: store.uri("artifacts", "curate", "f", name) for name in ("selection", "scores")}
    record_snapshot(
        store,
        "mine",
        snapshot,
        {"rows": {"in": 12, "kept": 11, "dropped": 1, "failed": 0}, "reasons": {"too_small": 1}},
    )
    store.write_json({"uri": snapshot["selection"], "digest": "d1" * 32}, "stages", "curate", "f.json")
    page = "".join(f'<figure data-key="{key}"><img src="data:x">{key} caption</figure>' for key in listed)
    files.write(store.uri("artifacts", "report", "f", "report.html"), page.encode())
    return store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "storage")


def key_at(store: Store, position: int) -> str:
    pairs = ranges.read_all(store.uri("artifacts", "ingest", "f", "pairs")).to_pylist()
    return next(row["key"] for row in pairs if row["position"] == position)


def test_bytes_urls_and_captions_are_deleted_everywhere_and_do_not_return(store: Store) -> None:
    key, jpg = key_at(store, 7), stored_image(7)["jpg"]
    assert holders(jpg, store.root)
    ledger = take_down(store, [parse("url", "HTTPS://A1.example.org/7.jpg")], None, [])
    assert ledger.keys == (key,) and ledger.datasets == ("d1" * 32,)
    assert ledger.deleted == {"images/recipe": 1, "embeddings/clip": 1}
    assert not holders(jpg, store.root)
    for uri in (store.uri("images", "recipe"), store.uri("embeddings", "clip")):
        assert key not in tables.read(uri)["key"].to_pylist() and tables.read(uri).num_rows == 11
    pairs = ranges.read_all(store.uri("artifacts", "ingest", "f", "pairs"))
    assert pairs.num_rows == 12 and "https://a1.example.org/7.jpg" not in pairs["url"].to_pylist()
    assert "caption number 7" not in pairs["caption"].to_pylist()
    page = files.read(store.uri("artifacts", "report", "f", "report.html")).decode()
    assert key not in page and page.count("<figure") == 12 and page.count("caption") == 11

    again = refuse(pairs_of(LISTED), load_tombstones(store)).to_pylist()
    assert [row["reason"] for row in again if row["key"] == key] == ["taken_down"]
    assert sum(row["status"] == "kept" for row in again) == 11


def stored_texts(store: Store) -> str:
    """Return all texts in the Parquet files of the storage, of committed and other versions, except the tombstones."""
    paths = [path for path in sorted(Path(store.root).rglob("*.parquet")) if path.name != "tombstones.parquet"]
    columns = [column for path in paths for column in tables.read_file(str(path)).columns]
    return "\n".join(value for column in columns for value in column.to_pylist() if isinstance(value, str))


def test_no_file_keeps_the_url_caption_or_hashes_of_a_row(store: Store) -> None:
    row = (f"{7:064x}", stored_image(7)["phash"], "https://a1.example.org/7.jpg", "caption number 7")
    assert all(text in stored_texts(store) for text in row)
    take_down(store, [Tombstone("key", key_at(store, 7))], None, [])
    assert not [text for text in row if text in stored_texts(store)]
    remaining = index.find_rows(store.uri("images", "recipe"), [key_at(store, 8)], ["key", "part", "row"]).to_pylist()
    stored = tables.read_rows(store.uri("images", "recipe", remaining[0]["part"]), [remaining[0]["row"]], ["key"])
    assert stored["key"].to_pylist() == [key_at(store, 8)]


def test_a_takedown_writes_only_the_files_that_hold_the_row(store: Store) -> None:
    def state() -> dict[str, tuple[int, int]]:
        paths = [path for path in Path(store.root).rglob("*.parquet") if path.name != "tombstones.parquet"]
        return {str(path.relative_to(store.root)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    before, key = state(), key_at(store, 7)
    take_down(store, [Tombstone("key", key)], None, [])
    [place] = ranges.of_keys(pa.array([key]), NUM_RANGES)
    changed = {name for name, written in before.items() if state().get(name) != written}
    assert changed == {
        f"artifacts/ingest/f/pairs/{ranges.KeyRange(int(place), NUM_RANGES)}.parquet",
        "artifacts/curate/f/heldout.parquet",
        "images/recipe/1.parquet",
        "embeddings/clip/x.parquet",
        *(name for name in before if name.startswith("index/")),  # one file, with rows of that part
    }


KILL = """
import sys
from tasks.lineage.takedown import parse, take_down
from tasks.lock import lock
from tasks.store import Store
take_down(Store(sys.argv[1]), [parse("url", "https://a1.example.org/7.jpg"), parse("domain", "a0.example.org")], 1, [])
"""
KILLED_AT = (
    r"before .*/tombstones\.parquet",
    r"after .*/tombstones\.parquet",
    r"after .*/images/recipe/[\w-]+\.parquet",
    r"before .*/images/recipe/_delta_log",
    r"after .*/images/recipe/_delta_log",
    r"after .*/index/recipe/.*\.parquet",
    r"before .*/index/recipe/_delta_log",
    r"after .*/index/recipe/_delta_log",
    r"before .*/embeddings/clip/_delta_log",
    r"after .*/embeddings/clip/_delta_log",
    r"after .*/pairs/.*\.parquet",
    r"after .*/heldout\.parquet",
    r"before .*/report\.html",
)


def test_a_takedown_that_was_killed_at_any_write_is_completed_by_the_next(store: Store, tmp_path: Path) -> None:
    undisturbed = make_store(tmp_path / "undisturbed")
    requested = [parse("url", "https://a1.example.org/7.jpg"), parse("domain", "a0.example.org")]
    expected = take_down(undisturbed, requested, 1, [])
    armed = tmp_path / "armed"
    armed.mkdir()
    for number, point in enumerate(KILLED_AT):
        (armed / str(number)).write_text(point)
        environment = {**os.environ, "UNCLIP_FAILPOINTS": str(armed), "PYTHONPATH": str(ROOT)}
        killed = subprocess.run([sys.executable, "-c", KILL, store.root], env=environment, capture_output=True)
        assert killed.returncode == -signal.SIGKILL and not list(armed.iterdir()), (point, killed.stderr)
    found = take_down(store, requested, 1, [])
    assert (found.keys, found.datasets) == (expected.keys, expected.datasets)
    files.sweep(store.root)

    def content(store: Store) -> dict[str, bytes]:
        paths = [path for path in Path(store.root).rglob("*.*") if path.suffix in (".parquet", ".html")]
        names = {str(path.relative_to(store.root)): path.read_bytes() for path in paths}
        return {name: data for name, data in names.items() if not name.startswith("snapshots/")}

    assert content(store) == content(undisturbed)


def write_orphan(store: Store, table: str, number: int) -> bytes:
    """Write a part that was never committed, with the image of a row under another address; returns the image."""
    row = {**stored_image(number), "key": f"{number + 100:032x}", "url": f"https://b.example/{number}.jpg"}
    tables.write_part(store.uri("images", table), f"orphan{number}", pa.Table.from_pylist([row], schema=IMAGES))
    return bytes(row["jpg"])


@pytest.mark.parametrize("table", ["recipe", "another"])
@pytest.mark.parametrize("kind", ["sha256", "url", "key"])
def test_f83_parts_that_were_not_committed_are_searched_and_deleted(store: Store, table: str, kind: str) -> None:
    """Also in a folder where nothing was ever committed; the committed copy of the image goes as well."""
    jpg = write_orphan(store, table, 7)
    left = Path(store.uri("images", "recipe", f"x.parquet.{'0' * 32}.tmp"))
    left.write_bytes(jpg)  # of a writer that was killed
    value = {"sha256": f"{7:064x}", "url": "https://b.example/7.jpg", "key": f"{107:032x}"}[kind]
    [found] = find_keys(store, [parse(kind, value)]).values()
    assert found == {f"{107:032x}", key_at(store, 7)}
    assert holders(jpg, store.root)
    ledger = take_down(store, [parse(kind, value)], None, [])
    assert set(ledger.keys) == found and ledger.deleted["images/recipe"] == 1
    assert not holders(jpg, store.root) and not left.exists()
    assert {f"{7:064x}"} == load_tombstones(store).sha256s
    assert tables.read(store.uri("images", "recipe")).num_rows == 11


def test_f87_a_key_covers_its_address_under_another_caption(store: Store) -> None:
    key, (url, _) = key_at(store, 7), LISTED[7]
    other = pairs_of([(url, "another caption"), (LISTED[8][0], "a third caption")])
    [found] = find_rows(store, [Tombstone("key", key)]).values()
    assert found.urls == {url}
    take_down(store, [Tombstone("key", key)], None, [])
    assert refuse(other, load_tombstones(store))["reason"].to_pylist().count("taken_down") == 1
    # A row that was listed and not downloaded has an address, too.
    ranges.write_range(store.uri("artifacts", "ingest", "g", "pairs"), ranges.KeyRange(0, 1), other)
    [again] = [row["key"] for row in other.to_pylist() if row["url"] == LISTED[8][0]]
    [found] = find_rows(store, [Tombstone("key", again)]).values()
    assert found.urls == {LISTED[8][0]} and found.keys == {again, key_at(store, 8)}


def test_f86_looks_are_kept_so_that_copies_stay_away(store: Store) -> None:
    take_down(store, [Tombstone("key", key_at(store, 3))], 1, [])
    assert load_tombstones(store).looks == {look_value(f"{0b111:016x}", None, 1)}
    remaining = set(tables.read(store.uri("images", "recipe"))["key"].to_pylist())
    assert remaining == {key_at(store, number) for number in range(12) if number not in (3, 4, 5)}
    copy = {**stored_image(5), "key": "c" * 32, "url": "https://elsewhere.example/copy.webp", "sha256": "c" * 64}
    images = pa.Table.from_pylist([copy, {**copy, "phash": stored_image(8)["phash"]}], schema=IMAGES)
    assert load_tombstones(store).cover(images).to_pylist() == [True, False]


def test_f86_near_on_the_command_line_takes_down_copies_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    arguments = ("takedown", "--key", key_at(store, 5), "--near", 1, "--storage", store.root)
    [request] = call_json(*arguments, "--dry-run")["requests"]
    assert request == {"kind": "key", "value": key_at(store, 5), "rows": 3}
    assert not recorded(store) and tables.read(store.uri("images", "recipe")).num_rows == 12
    found = call_json(*arguments)
    copies = {key_at(store, position) for position in (3, 4, 5)}
    assert set(found["keys"]) == copies and found["deleted"]["images/recipe"] == 3
    assert load_tombstones(store).looks == {look_value(f"{0b110:016x}", None, 1)}


def test_f84_a_takedown_during_a_run_is_recorded_and_carried_out_when_the_lock_is_free(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    jpg, key = stored_image(7)["jpg"], key_at(store, 7)
    arguments = ("--url", "https://a1.example.org/7.jpg", "--storage", store.root)
    with lock(store):
        found = call_json("takedown", *arguments, "--wait", "0")
        assert found["state"] == "recorded" and found["keys"] == [key] and found["ledger"] is None
        assert f"{7:064x}" in load_tombstones(store).sha256s and key in load_tombstones(store).keys
        assert holders(jpg, store.root)
        [old] = versions(store)
        snapshot = {**old.facts, "digest": "f3" * 32}
        with pytest.raises(StageError, match="a takedown was recorded meanwhile"):
            record_snapshot(store, "mine", snapshot, {"rows": {}, "reasons": {}})
        printed = call("takedown", *arguments, "--wait", "0")
        assert printed.returncode == 0 and "recorded: 1 rows are known, and blocked from now on" in printed.stdout
        assert "another run is using this storage (pid" in printed.stdout
        waiting = recorded(store)
    assert len(waiting) == 2 and show(store, key)["fate"].startswith("taken down because of url")
    ledgers = carry_out_recorded(store)
    assert [ledgers[request.id].keys for request in waiting] == [(key,), (key,)]
    assert not holders(jpg, store.root) and recorded(store) == []
    assert all(Path(store.uri("takedowns", f"{request.id}.json")).is_file() for request in waiting)


def test_f84_a_takedown_waits_for_the_lock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of the lock leaves it to the command, or carries it out right after."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for number, run_carries_out in enumerate((False, True)):
        is_held = threading.Event()

        def work(is_held: threading.Event = is_held, carries_out: bool = run_carries_out) -> None:
            with lock(store):
                is_held.set()
                while not recorded(store):
                    time.sleep(0.01)
                time.sleep(0.2)
            if carries_out:
                with contextlib.suppress(AlreadyRunningError):  # the takedown was quicker
                    carry_out_recorded(store)

        thread = threading.Thread(target=work)
        thread.start()
        assert is_held.wait(60)
        found = call_json("takedown", "--sha256", f"{7 + number:064x}", "--wait", "60", "--storage", store.root)
        thread.join()
        assert (found["state"], found["keys"]) == ("done", [key_at(store, 7 + number)])
        assert Path(found["ledger"]).is_file() and not recorded(store)


@dataclasses.dataclass(frozen=True)
class Making:
    """Settings of a stage that reads a dataset or makes one."""

    digest: str = "0"
    uri: str = ""
    writes: bool = False
    is_killed: bool = False


@stage("making", version=1, reads_snapshot=True)
def making(context: StageContext, config: Making, *parents: Artifact) -> Output:
    """Make an artifact of this digest, with a model if the settings say so."""
    if config.writes:
        files.write_json(f"{context.folder}/model/manifest.json", {})
    if config.is_killed:
        raise KeyboardInterrupt
    return Output(config.uri or context.folder, config.digest)


TRAINING = dataclasses.replace(making, part=PRIOR)


def test_f88_the_ledger_names_checkpoints_of_runs_that_mlflow_did_not_track(
    store: Store, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them one of a single training, and one that was killed; runs of other versions are not named."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    shutil.copy(empty_database, tmp_path / "mlflow.db")

    def started(tracking_uri: str = "http://127.0.0.1:9") -> Run:
        return open_run("mine", load("tiny", None, [f"tracking_uri={tracking_uri}"], store.root), store)

    def made(run: Run, made_by: Stage, name: str, config: Making, *parents: Artifact) -> Artifact:
        artifact = execute(Call(dataclasses.replace(made_by, name=name), config), run, parents)
        assert isinstance(artifact, Artifact), artifact
        return artifact

    selection = store.uri("artifacts", "curate", "f", "selection")
    others = ranges.read_all(selection)
    others = others.filter(pc.not_equal(others["key"], key_at(store, 7)))
    others_uri = write_folder(store.uri("artifacts", "curate", "g", "selection"), others)
    whole, single, clips, other = started(f"sqlite:///{tmp_path}/mlflow.db"), started(), started(), started()
    dataset = made(whole, making, "curate", Making("d1" * 32, selection))
    prior = made(whole, TRAINING, "prior", Making(), dataset)
    with pytest.raises(KeyboardInterrupt):
        made(single, TRAINING, "decoder", Making(is_killed=True), dataset)
    unique = made(clips, making, "dedup", Making("d1" * 32, selection))
    clip = made(clips, making, "clip", Making(writes=True), unique)
    made(started(), making, "clip", Making("given"), unique)
    made(other, TRAINING, "decoder", Making(), made(other, making, "curate", Making("e2" * 32, others_uri)))
    for run, state in ((whole, "done"), (single, "failed"), (clips, "done"), (other, "done")):
        close_run(run, store, state)
    killed = store.read_json("runs", single.id, "decoder.json")["fingerprint"]
    found = take_down(store, [Tombstone("key", key_at(store, 7))], None, []).checkpoints
    assert {(each["run"], each["stage"], each["folder"], each["state"], each["mlflow_run"]) for each in found} == {
        (whole.id, "prior", f"artifacts/prior/{prior.fingerprint}", "done", whole.tracker.run_id),
        (single.id, "decoder", f"artifacts/decoder/{killed}", "killed", None),
        (clips.id, "clip", f"artifacts/clip/{clip.fingerprint}", "done", None),
    }
    assert whole.tracker.run_id and not single.tracker.run_id


def test_duplicates_of_an_image_are_deleted_with_it(store: Store) -> None:
    ledger = take_down(store, [Tombstone("key", key_at(store, 3))], None, [])
    assert set(ledger.keys) == {key_at(store, 3), key_at(store, 4)}
    assert f"{3:064x}" in load_tombstones(store).sha256s
    near = find_keys(store, [Tombstone("key", key_at(store, 5))], near=1)
    assert near[Tombstone("key", key_at(store, 5))] == {key_at(store, 5)}  # its lookalikes are gone


def test_near_duplicates_are_found_on_request(store: Store) -> None:
    [keys] = find_keys(store, [Tombstone("key", key_at(store, 5))], near=1).values()
    assert keys == {key_at(store, position) for position in (3, 4, 5)}
    [keys] = find_keys(store, [Tombstone("key", key_at(store, 5))]).values()
    assert keys == {key_at(store, 5)}


@pytest.mark.parametrize(
    ("domain", "expected"), [("example.org", 12), ("a2.example.org", 4), ("le.org", 0), ("org", 12)]
)
def test_a_domain_includes_its_subdomains(store: Store, domain: str, expected: int) -> None:
    [keys] = find_keys(store, [parse("domain", domain)]).values()
    assert len(keys) == expected
    refused = refuse(pairs_of(LISTED), gather([parse("domain", domain)]))
    assert refused["reason"].to_pylist().count("taken_down") == expected


def test_f58_a_takedown_finds_what_redirects_led_to(store: Store) -> None:
    uri, final = store.uri("images", "recipe"), "https://cdn.evil.example/1.jpg"
    schema = pa.schema([field for field in IMAGES if field.name != "key"])
    new = pa.Table.from_pylist(
        [{"url": f"https://fine.example/{number}", "status": "ok", "final_url": final, "redirect_hosts": hosts,
          "sha256": f"{100 + number:064x}"} for number, hosts in enumerate(["a.b.example cdn.evil.example", "x.example", None])],
        schema=schema,
    ).add_column(0, IMAGES.field("key"), [[f"{number:032x}" for number in range(3)]])  # fmt: skip
    version = tables.append_files(uri, [tables.write_part(uri, "redirected", new)], IMAGES)
    index.update_index(uri, version)
    for requested, expected in (
        (parse("domain", "evil.example"), {0, 1, 2}), (parse("domain", "b.example"), {0}), (parse("domain", "le"), set()),
        (parse("url", final), {0, 1, 2}),
    ):  # fmt: skip
        [keys] = find_keys(store, [requested]).values()
        assert keys == {f"{number:032x}" for number in expected}
    take_down(store, [parse("domain", "evil.example")], None, [])
    assert f"{0:032x}" not in tables.read(uri, columns=["key"])["key"].to_pylist()
    assert f"{100:064x}" in load_tombstones(store).sha256s


def test_tombstones_cover_urls_by_their_host_in_any_form() -> None:
    urls = [
        "https://A.Example.org:8443/x?y=z@other.example", "http://a.example/x", "https://[2001:DB8::1]:80/x",
        "http://other.example/?https://a.example/", "http://user:p@b.a.example/x", "http://xa.example/x", "", "a.example",
    ]  # fmt: skip
    pairs = pa.table({"key": [f"{number:032x}" for number in range(len(urls))], "url": urls})
    stones = [Tombstone("domain", "a.example"), Tombstone("domain", "example.org"), Tombstone("domain", "2001:db8::1")]
    assert gather(stones).cover(pairs).to_pylist() == [True, True, True, False, True, False, False, False]
    stones = [Tombstone("key", f"{6:032x}"), Tombstone("url", "http://xa.example/x")]
    assert [number for number, hit in enumerate(gather(stones).cover(pairs).to_pylist()) if hit] == [5, 6]


def test_a_repeated_takedown_returns_the_same_and_changes_nothing(store: Store) -> None:
    requested = [parse("domain", "a0.example.org"), parse("sha256", f"{8:064X}")]
    first = take_down(store, requested, None, [])
    digest = tombstones_digest(store)
    second = take_down(store, requested, None, [])
    assert (second.keys, second.datasets) == (first.keys, first.datasets) and len(first.keys) == 6
    assert set(second.deleted.values()) == {0} and tombstones_digest(store) == digest


def test_all_rows_can_be_deleted(store: Store) -> None:
    take_down(store, [parse("domain", "example.org")], None, [])
    assert tables.read(store.uri("images", "recipe")).num_rows == 0
    assert not holders(b"JFIF", store.root)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow database without runs, shared because creating one takes a second."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client(f"sqlite:///{path}")
    return path


@dataclasses.dataclass
class Mlflow:
    """An MLflow store with one experiment."""

    uri: str
    experiment: str

    @classmethod
    def new(cls, empty_database: Path, folder: Path, artifacts: str) -> "Mlflow":
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(empty_database, folder / "mlflow.db")
        uri = f"sqlite:///{folder}/mlflow.db"
        return cls(uri, client(uri).create_experiment("mine", artifact_location=artifacts))

    def run(self, name: str, dataset: str | None = None, stage: str = "prior") -> Tracker:
        tags = {"unclip.stage": stage}
        tracker = Tracker(self.uri, client(self.uri).create_run(self.experiment, run_name=name, tags=tags).info.run_id)
        if dataset:
            tracker.dataset("mine", dataset, "uri", {})
        return tracker

    def files(self, tracker: Tracker, folder: str = "") -> set[str]:
        return {file.path for file in client(self.uri).list_artifacts(tracker.run_id, folder)}


def register(tracker: Tracker, folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    assert tracker.register(str(folder), name) == "1"


def test_runs_and_models_that_read_a_row_are_named_and_tagged_in_every_mlflow(
    store: Store, empty_database: Path, tmp_path: Path
) -> None:
    own = Mlflow.new(empty_database, Path(store.root), store.uri("mlflow-artifacts"))
    other = Mlflow.new(empty_database, tmp_path / "other", str(tmp_path / "other" / "artifacts"))
    seen, unseen, elsewhere = own.run("seen", "d1" * 32), own.run("unseen", "d2" * 32), other.run("b", "d1" * 32)
    register(seen, tmp_path / "good", "good")
    register(unseen, tmp_path / "unseen", "unseen")
    register(elsewhere, tmp_path / "second", "second")
    page = files.read(store.uri("artifacts", "report", "f", "report.html"))
    reports = own.run("report", stage="report"), other.run("report", stage="report")
    for report in reports:
        report.bytes(page, "report.html")

    key = key_at(store, 7)
    traces = take_down(store, [Tombstone("key", key)], None, [own.uri, other.uri]).traces
    assert [(run["name"], run["tracking_uri"]) for run in traces.runs] == [("seen", own.uri), ("b", other.uri)]
    assert [(model["name"], model["tracking_uri"]) for model in traces.models] == [
        ("good", own.uri),
        ("second", other.uri),
    ]
    assert not traces.unanswered and not traces.remaining
    for mlflow, tracker, name in ((own, seen, "good"), (other, elsewhere, "second")):
        assert "unclip.takedown" in client(mlflow.uri).get_run(tracker.run_id).data.tags
        assert "unclip.takedown" in client(mlflow.uri).get_model_version(name, "1").tags
    assert "unclip.takedown" not in client(own.uri).get_run(unseen.run_id).data.tags
    assert key.encode() in page
    for mlflow, report in zip((own, other), reports, strict=True):
        redacted = Path(client(mlflow.uri).download_artifacts(report.run_id, "report.html", str(tmp_path)))
        assert key not in redacted.read_text()


def test_only_previews_that_show_a_row_are_deleted_from_mlflow(
    store: Store, empty_database: Path, tmp_path: Path
) -> None:
    own = Mlflow.new(empty_database, Path(store.root), store.uri("mlflow-artifacts"))
    keys = [key_at(store, position) for position in range(12)]

    def run_with_previews(name: str, dataset: str, stage: str, shown: list[str] | None) -> Tracker:
        tracker = own.run(name, dataset, stage)
        if shown is not None:
            tracker.json(shown, PREVIEW_KEYS)
        tracker.bytes(b"picture", f"{PREVIEWS}/000000000512.png")
        tracker.bytes(b"weights", "model/weights")
        return tracker

    shows = run_with_previews("shows", "d1" * 32, "decoder", keys[5:9])
    other_rows = run_with_previews("other rows", "d1" * 32, "upsampler-64", keys[:5])
    unrecorded = run_with_previews("not recorded", "d1" * 32, "decoder", None)
    unrecorded_unread = run_with_previews("not recorded, not read", "d2" * 32, "decoder", None)
    unlogged = run_with_previews("dataset not logged", "", "upsampler-64", keys[7:])
    deleted = run_with_previews("deleted in MLflow", "d1" * 32, "decoder", keys[7:])
    client(own.uri).delete_run(deleted.run_id)
    forgotten = store.uri("mlflow-artifacts", "0" * 32, "artifacts", PREVIEWS)
    files.write_json(f"{forgotten}/keys.json", keys[7:])
    grid = own.run("grid", "d1" * 32, "evaluate")
    grid.bytes(b"sampled", "heldout.png")

    traces = take_down(store, [Tombstone("key", keys[7])], None, [own.uri]).traces
    gone = [shows, unrecorded, unlogged, deleted]
    assert set(traces.deleted_previews) == {tracker.run_id for tracker in gone} | {"0" * 32}
    assert not traces.remaining and not files.exists(forgotten)
    for tracker in gone[:-1]:
        assert own.files(tracker) == {"model"}
    for tracker in (other_rows, unrecorded_unread):
        assert f"{PREVIEWS}/000000000512.png" in own.files(tracker, PREVIEWS)
    assert own.files(grid) == {"heldout.png"}
    assert b"picture" not in b"".join(
        path.read_bytes() for path in Path(store.root).rglob(f"{deleted.run_id}/**/*.png")
    )


@pytest.mark.parametrize("moment", ["never", "before", "while they are logged"])
def test_images_that_show_rows_do_not_stay_if_one_is_taken_down_meanwhile(
    tmp_path: Path, empty_database: Path, moment: str
) -> None:
    store, shown = Store(f"{tmp_path}/storage"), ["0" * 32, "1" * 32]
    own = Mlflow.new(empty_database, Path(store.root), store.uri("mlflow-artifacts"))
    tracker, folder = own.run("evaluate", stage="evaluate"), store.uri("results", "mine")

    class TakenDown(Tracker):
        """A tracker in whose first moment a row is taken down."""

        def json(self, value: Any, name: str) -> None:
            write_entries(store, {Entry("key", shown[1], "")})
            super().json(value, name)

    if moment == "before":
        write_entries(store, {Entry("key", shown[1], "")})
    if moment == "while they are logged":
        tracker = TakenDown(tracker.tracking_uri, tracker.run_id)
    previews.publish(store, tracker, folder, {"heldout": b"grid", "images": b"picture"}, shown)
    expected = {f"{PREVIEWS}/{name}" for name in ("heldout.png", "images.png", "keys.json")}
    assert own.files(tracker, PREVIEWS) == (expected if moment == "never" else set())
    assert {f"{PREVIEWS}/{name}" for name in files.names(f"{folder}/{PREVIEWS}")} == own.files(tracker, PREVIEWS)
    if moment == "never":
        assert files.read_json(f"{folder}/{PREVIEW_KEYS}") == shown


def test_only_previews_that_show_a_row_are_deleted_from_the_storage(store: Store) -> None:
    keys = [key_at(store, position) for position in range(12)]
    films = {"shows": keys[5:9], "other rows": keys[:5], "does not say": None}
    for name, shown in films.items():
        folder = store.uri("artifacts", "decoder", name)
        add_preview(f"{folder}/{PREVIEWS}", torch.zeros(2, 3, 8, 8), 512)
        files.write(f"{folder}/model/model.safetensors", b"weights")
        if shown is not None:
            files.write_json(f"{folder}/{PREVIEW_KEYS}", shown)
    for name in ("shows", "other rows"):
        figure = store.uri("results", f"tiny-{name}")
        files.write(f"{figure}/{PREVIEWS}/images.png", b"picture")
        files.write_json(f"{figure}/{PREVIEW_KEYS}", films[name])
        files.write(f"{figure}/table.md", b"table")
        seals.cover(figure)
    take_down(store, [Tombstone("key", keys[7])], None, [])
    assert store.list("results", "tiny-shows") == ["manifest.json", "table.md"], "the figure of a comparison"
    assert store.list("results", "tiny-other rows", PREVIEWS) == ["images.png", "keys.json"]
    left = {name: store.list("artifacts", "decoder", name) for name in films}
    assert left == {"shows": ["model"], "other rows": ["model", PREVIEWS], "does not say": ["model"]}
    expected = ["000000000512.png", "film_strip.png", "keys.json", "original.png"]
    assert store.list("artifacts", "decoder", "other rows", PREVIEWS) == expected


def test_previews_of_a_moved_storage_are_found_and_unreachable_artifacts_are_named(
    store: Store, empty_database: Path, tmp_path: Path
) -> None:
    moved = Mlflow.new(empty_database, Path(store.root), "/where/it/was/mlflow-artifacts")
    away = Mlflow.new(empty_database, tmp_path / "away", "file:///on/another/machine")
    key = key_at(store, 7)
    here, there = moved.run("here", stage="decoder"), away.run("there", stage="decoder")
    files.write_json(store.uri("mlflow-artifacts", here.run_id, "artifacts", *PREVIEW_KEYS.split("/")), [key])
    traces = take_down(store, [Tombstone("key", key)], None, [moved.uri, away.uri]).traces
    assert traces.deleted_previews == (here.run_id,)
    assert list(traces.remaining) == [there.run_id] and "/on/another/machine" in traces.remaining[there.run_id]


def test_an_mlflow_that_does_not_answer_is_named_and_the_others_are_searched(
    store: Store, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Mlflow.new(empty_database, Path(store.root), store.uri("mlflow-artifacts"))
    own.run("seen", "d1" * 32)
    missing = f"sqlite:///{store.root}/none.db"
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        hangs, refuses = (f"http://127.0.0.1:{server.getsockname()[1]}" for server in (silent, closed))
        closed.close()
        monkeypatch.setattr(traces, "checked_client", functools.partial(checked_client, seconds=1.0))
        started = time.monotonic()
        uris = [hangs, refuses, missing, own.uri]
        found = take_down(store, [Tombstone("key", key_at(store, 7))], None, uris).traces
        assert time.monotonic() - started < 60
    assert list(found.unanswered) == uris[:3] and [run["name"] for run in found.runs] == ["seen"]
    assert found.unanswered[hangs] == "no answer within 1 s" and "does not exist" in found.unanswered[missing]
    assert not Path(store.root, "none.db").exists()


def test_f101_lists_may_mix_kinds_and_bad_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"# requested by mail\n\nhttps://a.example/x.jpg\nexample.com\n{'a' * 32}\n{'B' * 64}\n")
    kinds = [tombstone.kind for tombstone in parse_file(str(path))]
    assert kinds == ["url", "domain", "key", "sha256"] and parse_file(str(path))[3].value == "b" * 64
    for encoding in ("utf-8-sig", "utf-16"):  # as some editors write
        path.write_text("example.com\n", encoding)
        assert [tombstone.value for tombstone in parse_file(str(path))] == ["example.com"]
    path.write_text("example.com\nnot a domain\n")
    with pytest.raises(InputError, match=r"list.txt, line 2: .*'not a domain', expected a host"):
        parse_file(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        parse_file(str(tmp_path / "none"))
    for kind, value in (("key", "abc"), ("sha256", "0" * 63), ("url", "ftp://a/b"), ("domain", "https://a.example")):
        with pytest.raises(InputError, match=re.escape(f"got {kind} {value!r}")):
            parse(kind, value)


@pytest.fixture
def fates(store: Store) -> Store:
    """The storage with a second version, in which rows have many different fates, and one run for each version."""
    reasons = {1: "http_404", 2: "too_small", 4: "duplicate_image", 5: "near_duplicate", 6: "semantic_duplicate"}
    [old] = versions(store)
    selection = ranges.read_all(old.facts["selection"])
    changed = []
    for row in selection.to_pylist():
        reason = reasons.get(row["position"])
        status = "kept" if reason is None else "failed" if reason == "http_404" else "dropped"
        changed.append({**row, "status": status, "reason": reason, "split": None if reason else "train"})
    write_folder(store.uri("selection-2"), pa.Table.from_pylist(changed, schema=selection.schema), 2)
    counts = {"rows": {"in": 12, "kept": 7, "dropped": 4, "failed": 1}, "reasons": {}}
    facts = {**old.facts, "digest": "e2" * 32, "selection": store.uri("selection-2")}
    record_snapshot(store, "mine", facts, counts)
    for run_id, digest in (("first", "d1" * 32), ("second", "e2" * 32)):
        record = {"pipeline": "mine", "state": "done", "mlflow_run": "", "config": {}}
        store.write_json(record, "runs", run_id, "run.json")
        store.write_json({"fingerprint": run_id}, "runs", run_id, "curate.json")
        store.write_json({"uri": "", "digest": digest}, "stages", "curate", f"{run_id}.json")
    event = {"stage": "decoder", "state": "done", "at": 1.0, "trains": True}
    store.write_json(event, "runs", "first", "decoder.json")
    store.write_json({"uri": old.facts["selection"], "digest": "d1" * 32}, "stages", "curate", "first.json")
    store.write_json({"uri": facts["selection"], "digest": "e2" * 32}, "stages", "curate", "second.json")
    return store


@pytest.mark.parametrize(
    ("position", "fate", "original"),
    [
        (7, "kept (train) in dataset version 2", None),
        (1, "failed: http_404 in dataset version 2: the server answered with status 404", None),
        (2, "dropped: too_small in dataset version 2: the shorter side has fewer pixels than min_side", None),
        (4, "dropped: duplicate_image in dataset version 2: the same bytes as a kept image", (3, "same bytes")),
        (5, "dropped: near_duplicate in dataset version 2: looks like a kept image", (3, "1 of 64 bits differ")),
        (6, "dropped: semantic_duplicate in dataset version 2: the CLIP embedding is close", (None, "cosine 1.000")),
    ],
)
def test_show_reports_origin_fate_and_runs_of_a_row(
    fates: Store, position: int, fate: str, original: tuple[int | None, str] | None
) -> None:
    facts = show(fates, key_at(fates, position))
    assert facts["fate"].startswith(fate) and facts["url"] == f"https://a{position % 3}.example.org/{position}.jpg"
    assert facts["dataset versions"]["2 e2e2e2e2"].startswith(fate.partition(" in ")[0])
    before = facts["dataset versions"]["1 d1d1d1d1"].partition(",")[
        0
    ]  # in version 1 the last key was too small, the others were kept
    runs = facts.get("runs that had it", {})
    assert ("first" in runs) == (before == "kept (train)") and ("second" in runs) == (position == 7)
    if "first" in runs:
        assert runs["first"] == "mine, done, version 1 (train), models decoder"
    if original is None:
        assert "same picture as" not in facts
    else:
        [(winner, note)] = facts["same picture as"].items()
        assert note == original[1] and (original[0] is None or winner == key_at(fates, original[0]))


def test_show_reads_only_the_files_that_hold_the_row(fates: Store) -> None:
    key = key_at(fates, 7)
    expected = show(fates, key)
    kept = {ranges.range_uri("", ranges.KeyRange(int(ranges.of_keys(pa.array([key]), n)[0]), n)) for n in (2, 4)}
    paths = [path for path in Path(fates.root).rglob("*-of-*.parquet") if "index" not in path.parts]
    damaged = [path for path in paths if f"/{path.name}" not in kept]
    damaged += [Path(fates.uri("images", "recipe", "0.parquet")), Path(fates.uri("embeddings", "clip", "x.parquet"))]
    assert len(damaged) == 3 * 3 + 1 + 2
    for path in damaged:
        path.write_bytes(b"damaged")
    assert show(fates, key) == expected


def test_differences_are_the_same_whatever_the_number_of_ranges(fates: Store) -> None:
    old, new = versions(fates)
    found = difference(old, new, with_keys=True)
    selection = ranges.read_all(new.facts["selection"])
    whole = write_folder(fates.uri("whole"), selection)
    one_file = fates.uri("selection.parquet")  # as earlier releases wrote it
    tables.write_file(one_file, selection)
    before, after = (ranges.read_all(version.facts["selection"]).to_pylist() for version in (old, new))
    changed = [
        (one["key"], (one["reason"] or "kept", other["reason"] or "kept"))
        for one, other in zip(before, after, strict=True)
        if one["reason"] != other["reason"]
    ]
    assert changed and {(key, fates) for fates, keys in found.keys.items() for key in keys.to_pylist()} == set(changed)
    assert found.changes == collections.Counter(fates for _, fates in changed)
    for uri in (whole, one_file):
        other = difference(old, dataclasses.replace(new, facts={**new.facts, "selection": uri}), with_keys=True)
        assert other.changes == found.changes
        assert all(other.keys[fates].to_pylist() == keys.to_pylist() for fates, keys in found.keys.items())


def test_show_reports_the_takedown_of_a_row_and_its_runs(fates: Store) -> None:
    key = key_at(fates, 7)
    take_down(fates, [parse("domain", "a1.example.org")], None, [])
    facts = show(fates, key)
    assert facts["fate"].startswith("taken down because of domain a1.example.org; before: kept (train)")
    assert "url" not in facts and "caption" not in facts and "images" not in facts
    assert facts["lists"] == {"f row 7": "taken_down"} and "second" in facts["runs that had it"]
    assert show(fates, key_at(fates, 5))["same picture as"]  # even after other rows were taken down


def test_show_without_a_dataset_version_and_with_only_a_tombstone(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(InputError, match="has no rows"):
        show(store, "0" * 32)
    pairs = pairs_of([("ftp://a.example/x.jpg", "no scheme that counts"), LISTED[0]])
    write_folder(store.uri("artifacts", "ingest", "f", "pairs"), pairs, NUM_RANGES)
    bad, good = sorted(pairs.to_pylist(), key=lambda row: row["status"] == "kept")
    assert show(store, bad["key"])["fate"].startswith("in no dataset version: bad_url, not a valid URL")
    assert show(store, good["key"])["fate"] == "in no dataset version yet"
    take_down(store, [Tombstone("key", "ab" * 16)], None, [])
    assert show(store, "abab" * 2)["fate"].startswith("taken down because of key abab")


def test_an_unknown_short_or_ambiguous_key_names_the_nearest(store: Store) -> None:
    key = key_at(store, 7)
    assert show(store, f" {key[:6].upper()}")["key"] == key
    wrong = key[:7] + ("0" if key[7] != "0" else "1")
    result = call("data", "show", wrong, "--storage", store.root)
    assert result.returncode == 2 and f"Did you mean {key}?" in result.stderr
    with pytest.raises(InputError, match=r"none of the 12 rows in .* `unclip data diff --keys`"):
        show(store, "not a key")
    with pytest.raises(InputError, match="got 5 digits of a key, expected at least 6"):
        show(store, key[:5])
    take_down(store, [Tombstone("key", key[:-1] + ("0" if key[-1] != "0" else "1"))], None, [])
    with pytest.raises(InputError, match=rf"2 rows have a key with this prefix: {key[:-1]}.*Give more digits"):
        show(store, key[:8])
    result = call("data", "show", key, "--storage", store.root)
    assert result.returncode == 0 and f"url                  https://a{7 % 3}.example.org/7.jpg" in result.stdout


def test_versions_rows_differences_and_takedowns_as_json(fates: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = ("--storage", fates.root)
    kept, duplicate = key_at(fates, 7), key_at(fates, 4)
    found = call_json("data", "list", *storage)["versions"]
    assert [(version["number"], version["digest"]) for version in found] == [(1, "d1" * 32), (2, "e2" * 32)]
    assert found[1]["counts"] == {"in": 12, "kept": 7, "dropped": 4, "failed": 1}
    changes = call_json("data", "diff", "1", *storage)["changes"]
    assert {"before": "kept", "after": "http_404", "rows": 1, "keys": None} in changes
    changes = call_json("data", "diff", "1", "2", "--keys", *storage)["changes"]
    assert {"before": "kept", "after": "duplicate_image", "rows": 1, "keys": [duplicate]} in changes
    row = call_json("data", "show", kept, *storage)
    assert (row["key"], row["url"]) == (kept, "https://a1.example.org/7.jpg")
    assert row["lists"] == [{"ingest": "f", "position": 7, "status": "kept", "reason": None}]
    assert row["images"][0]["sha256"] == f"{7:064x}" and row["images"][0]["width"] is None
    last = row["dataset_versions"][-1]
    assert (last["number"], last["split"], last["scores"]) == (2, "train", {"clip_score": 0.5})
    assert row["runs"][-1]["dataset_version"] == 2 and row["runs"][-1]["models"] == []
    [original] = call_json("data", "show", duplicate, *storage)["same_picture_as"]
    assert original == {"key": key_at(fates, 3), "note": "same bytes"}

    [request] = call_json("takedown", "--key", kept, "--dry-run", *storage)["requests"]
    assert request == {"kind": "key", "value": kept, "rows": 1}
    taken = call_json("takedown", "--key", kept, *storage)
    assert taken["keys"] == [kept] and taken["deleted"] == {"images/recipe": 1, "embeddings/clip": 1}
    assert Path(taken["ledger"]).is_file() and "e2" * 32 in taken["datasets"]
    gone = call_json("data", "show", kept, *storage)
    assert gone["fate"].startswith(f"taken down because of key {kept}") and gone["url"] is gone["caption"] is None


def test_versions_rows_and_differences(store: Store) -> None:
    key = key_at(store, 7)
    facts = show(store, key[:10])
    assert facts["url"] == "https://a1.example.org/7.jpg" and facts["lists"] == {"f row 7": "kept"}
    assert f"sha256 {7:064x}" in facts["images"]["recipe"] and "jpg" not in facts["images"]["recipe"]
    assert list(facts["dataset versions"].values()) == ["kept (train), clip_score 0.500"]
    selection = ranges.read_all(store.uri("artifacts", "curate", "f", "selection"))
    rows = selection.to_pylist()
    rows[0] |= {"status": "dropped", "reason": "taken_down", "split": None}
    write_folder(store.uri("selection-2"), pa.Table.from_pylist(rows[:-1], schema=selection.schema))
    [old] = versions(store)
    counts = {"rows": {"in": 11, "kept": 10, "dropped": 1, "failed": 0}, "reasons": {"taken_down": 1}}
    record_snapshot(
        store,
        "mine",
        {**old.facts, "digest": "e2" * 32, "selection": store.uri("selection-2"), "committed": 0},
        counts,
    )
    found = difference(find_version(store, "1"), find_version(store, "latest"))
    assert found.changes == {("kept", "taken_down"): 1, ("too_small", "absent"): 1} and not found.keys
    found = difference(find_version(store, "1"), find_version(store, "latest"), with_keys=True)
    assert {fates: keys.to_pylist() for fates, keys in found.keys.items()} == {
        ("kept", "taken_down"): [rows[0]["key"]],
        ("too_small", "absent"): [rows[-1]["key"]],
    }
    assert find_version(store, "e2e2").number == 2
    for name in ("7", "ffff", "e"):
        with pytest.raises(InputError, match=r"0 dataset versions have this name.*2 \(e2e2e2e2\)"):
            find_version(store, name)
    with pytest.raises(InputError, match="has no dataset version"):
        find_version(Store(f"{store.root}/elsewhere"), "1")


@pytest.mark.parametrize("path", ["download/f/plan", "filter/f/intermediate/boilerplate", "curate/f/intermediate/x"])
def test_what_killed_stages_left_behind_is_deleted(store: Store, path: str) -> None:
    left = store.uri("artifacts", *path.split("/"), "00000.parquet")
    tables.write_file(left, pairs_of(LISTED).select(["key", "url", "caption"]))
    take_down(store, [parse("url", "https://a1.example.org/7.jpg")], None, [])
    assert not files.exists(left)


@pytest.mark.parametrize("letters", [" ", "#", "%", "?", "é", "e\u0301 中", "[x]*{y}", "&+;:=$", "'\""])
def test_f68_a_storage_may_have_any_letter_in_its_path(tmp_path: Path, letters: str) -> None:
    folder = tmp_path / "folder"
    store = make_store(folder / f"a{letters}b")
    assert store.list() == ["artifacts", "embeddings", "images", "index", "snapshots", "stages"]
    key, jpg = key_at(store, 7), stored_image(7)["jpg"]
    [version] = call_json("data", "list", "--storage", store.root)["versions"]
    assert version["counts"]["kept"] == 11
    row = call_json("data", "show", key, "--storage", store.root)
    assert row["url"] == LISTED[7][0] and len(row["dataset_versions"]) == 1
    ledger = call_json("takedown", "--key", key, "--storage", files.to_uri(store.root))
    assert ledger["deleted"] == {"images/recipe": 1, "embeddings/clip": 1} and ledger["storage"] == store.root
    assert not holders(jpg, store.root)
    assert [path.name for path in folder.iterdir()] == [f"a{letters}b"], "nothing is written beside it"


def test_nothing_is_taken_down_behind_a_link(tmp_path: Path) -> None:
    store = make_store(tmp_path / "storage")
    outside = tmp_path / "outside" / "previews"
    outside.mkdir(parents=True)
    link = Path(store.uri("artifacts", "prior", "f", "previews"))
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(DamagedError, match=re.escape(str(link))):
        take_down(store, [parse("url", LISTED[0][0])], None, [])
    assert not store.exists("tombstones.parquet")
    link.unlink()
    assert take_down(store, [parse("url", LISTED[0][0])], None, []).deleted and outside.exists()


def test_an_mlflow_that_only_the_storage_names_gets_no_request_until_the_operator_names_it(
    store: Store, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "c4n4ry")
    other = Mlflow.new(empty_database, tmp_path / "other", str(tmp_path / "other" / "artifacts"))
    own = Mlflow.new(empty_database, Path(store.root), store.uri("mlflow-artifacts"))
    for mlflow in (own, other):
        mlflow.run("seen", "d1" * 32).bytes(b"text", "notes.txt")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        stranger = f"http://127.0.0.1:{server.getsockname()[1]}"
        for number, uri in enumerate((None, other.uri, stranger)):
            record = {"pipeline": "mine", "state": "done", "mlflow_run": "r", "tracking_uri": uri, "config": {}}
            store.write_json(record, "runs", f"{number}", "run.json")
        takedown = ("takedown", "--key", key_at(store, 7), "--storage", store.root)
        found = call_json(*takedown, code=1)
        assert [run["tracking_uri"] for run in found["runs"]] == [own.uri]
        assert found["unanswered"] == dict.fromkeys((other.uri, stranger), traces.UNNAMED)
        printed = call(*takedown, "--tracking-uri", other.uri)
        assert printed.returncode == 1 and printed.stderr.count("could not be searched") == 1
        assert f"Run the command again with --tracking-uri {stranger}, if it is yours." in printed.stderr
        with pytest.raises(BlockingIOError):
            server.accept()
    Path(store.uri("runs", "2", "run.json")).unlink()
    found = call_json(*takedown, "--tracking-uri", other.uri)
    assert [run["tracking_uri"] for run in found["runs"]] == [other.uri, own.uri] and not found["unanswered"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other.uri)
    assert not call_json(*takedown)["unanswered"]


@pytest.mark.parametrize("form", ["folder", "link", "server"])
def test_artifacts_outside_of_a_storage_that_its_own_database_names_are_left_alone(
    store: Store, empty_database: Path, tmp_path: Path, form: str
) -> None:
    outside, key = tmp_path / "outside", key_at(store, 7)
    place = "http://127.0.0.1:9/artifacts" if form == "server" else store.uri("mlflow-artifacts")
    own = Mlflow.new(empty_database, Path(store.root), str(outside) if form == "folder" else place)
    run = own.run("report", stage="report")
    page = f'<figure data-key="{key}">an image</figure>'
    theirs = outside / ("report.html" if form == "link" else f"{run.run_id}/artifacts/report.html")
    files.write(str(theirs), page.encode())
    if form == "link":
        report = Path(store.uri("mlflow-artifacts", run.run_id, "artifacts", "report.html"))
        report.parent.mkdir(parents=True)
        report.symlink_to(theirs)
    found = take_down(store, [Tombstone("key", key)], None, [own.uri]).traces
    assert list(found.remaining) == [run.run_id] and theirs.read_text() == page
    reason = "is a link" if form == "link" else "outside of the storage"
    assert reason in found.remaining[run.run_id] and not found.unanswered
