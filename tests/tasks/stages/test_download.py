"""The stages from a list of URLs to deduplicated images, against a server with planned faults."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines import scene_server
from pipelines.scene_server import ScenesConfig
from tasks import ranges, tables
from tasks.index import index_files
from tasks.lanes import WAITING_PER_TASK
from tasks.lineage.takedown import carry_out
from tasks.stage import Artifact, Call, Failure, Run, execute
from tasks.stages import download as download_module
from tasks.stages.dedup import DedupConfig, dedup
from tasks.stages.download import (
    TRANSIENT,
    UNREACHED,
    DownloadConfig,
    download,
    pin_attempt,
)
from tasks.stages.filter import FilterConfig, filter
from tasks.stages.ingest import IngestConfig, ingest
from tasks.store import Store
from tasks.tombstones import Entry, Tombstone, Tombstones, forget, load_tombstones, record, withhold, write_entries
from tasks.tracking import Tracker
from tasks.untrusted import fetch
from tests.tasks.datasets import holders
from unclip import files
from unclip.errors import ConfigError, StageError

pytestmark = pytest.mark.timeout(120)

EXPECTED = {
    "missing": "http_404",
    "truncated": "decode_error",
    "short": "short_body",
    "html": "not_an_image",
    "stalled": "timeout",
    "redirect": "blocked_address",
    "duplicate": "duplicate_image",
    "small": "too_small",
    "no_caption": "no_caption",
    "file": "bad_url",
}


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(storage: Path) -> Run:
    return Run("r1", "test", str(storage), Tracker("", ""), "0")


def download_config(scenes: ScenesConfig, **settings: object) -> DownloadConfig:
    settings = {"shard_size": 20, "timeout_seconds": 1.5, "allow_hosts": (scenes.address,), **settings}
    return DownloadConfig(**settings)  # type: ignore[arg-type]


def run_ingest(storage: Path, scenes: ScenesConfig, count: int = 1) -> Artifact:
    path = str(storage / f"list-{scenes.num_images}.parquet")
    scene_server.write_url_list(scenes, path)
    return in_ranges(storage, done(execute(Call(ingest, IngestConfig(path)), run(storage), [])), count)


def in_ranges(storage: Path, pairs: Artifact, count: int = 1) -> Artifact:
    """The same list in a number of key ranges."""
    folder = str(storage / f"{pairs.digest[:16]}-{count}")
    for key_range, table in zip(ranges.ranges(count), ranges.split_by_key(read_list(pairs), count), strict=True):
        ranges.write_range(folder, key_range, table)
    return dataclasses.replace(pairs, uri=folder)


def read_list(artifact: Artifact) -> pa.Table:
    uri = artifact.uri
    return tables.read_file(uri) if uri.endswith(".parquet") else ranges.read_all(uri)


def done(result: Artifact | Failure) -> Artifact:
    assert isinstance(result, Artifact), result
    rows = result.facts["rows"]
    assert rows["in"] == rows["kept"] + rows["dropped"] + rows["failed"]
    return result


def reasons_by_kind(pairs: Artifact, selection: Artifact) -> dict[str, set[str | None]]:
    urls = dict(zip(*(read_list(pairs).column(name).to_pylist() for name in ("position", "url")), strict=True))
    found = collections.defaultdict(set)
    for row in read_list(selection).to_pylist():
        kind = "file" if urls[row["position"]].startswith("file:") else urls[row["position"]].split("/")[-2]
        found[kind].add(row["reason"])
    return dict(found)


def content(table_uri: str) -> pa.Table:
    return tables.read(table_uri)


def seccomp_of_children() -> set[str]:
    """Seccomp mode of the processes of this checkout that decode images: 2 is a filter."""
    root, modes = str(Path(__file__).resolve().parents[3]), set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            command = (folder / "cmdline").read_text()
            if "sandbox.serve" in command and f'"{root}"' in command and "untrusted.decode" in command:
                modes.update(re.findall(r"^Seccomp:\t(\d)", (folder / "status").read_text(), re.MULTILINE))
    return modes


def test_every_fault_has_its_reason_and_no_row_is_lost(cluster: None, tmp_path: Path) -> None:
    scenes = ScenesConfig(num_images=40, side=64, broken=0.5, port=free_port())
    with scene_server.serve(scenes) as server:
        pairs = run_ingest(tmp_path, scenes)
        started = time.monotonic()
        images = done(execute(Call(download, download_config(scenes)), run(tmp_path), [pairs]))
        print(f"download took {time.monotonic() - started:.1f} s")
        filtered = done(execute(Call(filter, FilterConfig()), run(tmp_path), [images]))
        selection = done(execute(Call(dedup, DedupConfig(phash_distance=-1)), run(tmp_path), [filtered]))
        assert server.count("picture") == 40 and server.count("missing") == 2
    assert seccomp_of_children() == {"2"}

    assert selection.facts["rows"] == {"in": 60, "kept": 40, "dropped": 6, "failed": 14}
    found = reasons_by_kind(pairs, selection)
    # The smaller key is kept, whether of the copy or of the original.
    winners = found.pop("duplicate") | found.pop("picture")
    assert winners == {None, "duplicate_image"}
    assert found == {kind: {reason} for kind, reason in EXPECTED.items() if kind != "duplicate"}
    for stage in (images, filtered):
        assert stage.facts["images"] == selection.facts["images"]

    table = content(images.facts["images"])
    assert table.schema.names == tables.read(images.uri).schema.names
    ok = table.filter(pc.equal(table["status"], "ok"))
    row = ok.filter(pc.and_(pc.equal(ok["width"], 64), pc.is_valid(ok["phash"]))).slice(0, 1).to_pylist()[0]
    assert row["height"] == row["original_width"] == row["original_height"] == 64
    assert files.sha256(row["jpg"]) == row["jpg_sha256"] != row["sha256"]
    assert len(row["phash"]) == 16 and row["reason"] is None
    failed = table.filter(pc.equal(table["status"], "failed"))
    assert failed["jpg"].null_count == failed.num_rows == 12


def assert_indexed(images: Artifact) -> None:
    """The index has the rows of the table, and the facts name its version."""
    uri, columns = images.facts["images"], ["key", "status", "reason", "sha256"]
    found = ranges.read_all(index_files(uri, images.facts["index_version"]), columns)
    assert found.equals(tables.read(uri, images.facts["images_version"], columns))


@pytest.mark.parametrize("count", [1, 4])
def test_f34_a_longer_list_fetches_only_what_is_new(cluster: None, tmp_path: Path, count: int) -> None:
    scenes = ScenesConfig(num_images=20, side=16, broken=0, port=free_port())
    longer = dataclasses.replace(scenes, num_images=26)
    with scene_server.serve(longer) as server:
        config = download_config(scenes)
        first = done(execute(Call(download, config), run(tmp_path), [run_ingest(tmp_path, scenes, count)]))
        assert (first.facts["fetched_now"], first.facts["images_version"]) == (20, 1)
        server.requests.clear()
        second = done(execute(Call(download, config), run(tmp_path), [run_ingest(tmp_path, longer, count)]))
        assert (second.facts["fetched_now"], second.facts["images_version"]) == (6, 2)
        assert sum(server.requests.values()) == 6 == len(server.requests)
        server.requests.clear()
        # A setting that does not affect images: nothing is fetched, no version is added, and the content is the same.
        again = done(
            execute(
                Call(download, dataclasses.replace(config, retries=0)),
                run(tmp_path),
                [run_ingest(tmp_path, longer, count)],
            )
        )
        assert (again.facts["fetched_now"], again.facts["images_version"], again.digest) == (0, 2, second.digest)
        assert not server.requests
    assert second.digest != first.digest
    assert_indexed(first)
    assert_indexed(again)
    for stage in (first, second):  # only names and counts remain of the plan
        folder = tmp_path / "artifacts" / "download" / stage.fingerprint
        assert sorted(path.name for path in folder.iterdir()) == ["generation.json", "manifest.json", "plan.json"]
        plan = json.loads((folder / "plan.json").read_text())
        shards = [shard for lane in plan["lanes"] for shard in lane]
        assert all(len(name) == 32 and rows <= 20 for name, rows in shards)
        assert sum(rows for _, rows in shards) == stage.facts["fetched_now"]
    assert tables.read(first.uri, 1).num_rows == 20 and tables.read(first.uri).num_rows == 26


KILLED = """
import sys, ray
sys.path[:0] = [{tests!r}]
from test_download import *
download_module.PARTS_PER_COMMIT = {parts_per_commit}
ray.init(address={address!r}, log_to_driver=False)
scenes = ScenesConfig(**{scenes!r})
config = download_config(scenes, tasks_in_flight=1)
execute(Call(download, config), run(Path({storage!r})), [run_ingest(Path({storage!r}), scenes)])
"""


@pytest.mark.parametrize("parts_per_commit", [pytest.param(1000, marks=pytest.mark.slow), 2])
def test_f36_a_killed_download_resumes(cluster: None, tmp_path: Path, parts_per_commit: int) -> None:
    """After a commit, the table has the rows fetched before; finished parts that are not in a commit are found as well."""
    import ray

    scenes = ScenesConfig(num_images=400, side=16, broken=0.005, port=free_port())
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    config = download_config(scenes, tasks_in_flight=1)
    table_uri = f"{killed}/images/{config.recipe}"
    script = KILLED.format(
        tests=str(Path(__file__).parent),
        address=ray.get_runtime_context().gcs_address,
        scenes=dataclasses.asdict(scenes),
        storage=str(killed),
        parts_per_commit=parts_per_commit,
    )

    def is_under_way() -> bool:
        if parts_per_commit == 2:
            return (tables.version(table_uri) or 0) >= 1  # version 0 is empty
        return len(list(Path(table_uri).glob("*.parquet"))) >= 2

    with scene_server.serve(scenes) as server:
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        try:
            deadline = time.monotonic() + 240
            while not is_under_way() and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(1)  # Ray ends the tasks of a dead driver
        finished = set(Path(table_uri).glob("*.parquet"))
        assert 2 <= len(finished) < 21, "killed too late or too early"
        if parts_per_commit == 2:
            assert tables.read(table_uri).num_rows >= 40, "a killed crawl leaves a table"
        else:
            assert tables.version(table_uri) is None, "parts are invisible until they are committed"
        stored = pa.concat_tables(map(tables.read_file, map(str, finished)))
        server.requests.clear()

        resumed = done(execute(Call(download, config), run(killed), [run_ingest(killed, scenes)]))
        fetched_again = {f"http://{scenes.address}{path}" for path in server.requests}
        assert not fetched_again & set(stored["url"].to_pylist())
        reference = done(execute(Call(download, config), run(undisturbed), [run_ingest(undisturbed, scenes)]))
    assert resumed.digest == reference.digest
    assert resumed.facts["fetched_now"] == reference.facts["fetched_now"]
    assert_indexed(resumed)
    assert content(resumed.uri).equals(content(reference.uri))
    assert [Path(uri).name for uri in tables.files(resumed.uri)] == [
        Path(uri).name for uri in tables.files(reference.uri)
    ]


def test_f83_an_image_that_was_taken_down_after_its_part_was_written_does_not_return(
    cluster: None, tmp_path: Path
) -> None:
    """The part is resumed without the image. One that is taken down while the stage runs stops it, and is not committed."""
    scenes = ScenesConfig(num_images=60, side=16, broken=0, port=free_port())
    config, storage, resumed = download_config(scenes), tmp_path / "first", tmp_path / "resumed"
    with scene_server.serve(scenes):
        first = done(execute(Call(download, config), run(storage), [run_ingest(storage, scenes)]))
        for path in Path(first.uri).glob(
            "*.parquet"
        ):  # as a download that is killed before its first commit leaves them
            target = resumed / path.relative_to(storage)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        image, other = tables.read(first.uri).to_pylist()[:2]
        assert holders(image["jpg"], resumed / "images")
        store, pairs = Store(str(resumed)), run_ingest(resumed, scenes)
        write_entries(store, [Entry("sha256", image["sha256"], "r")])
        recorded = record(store, [Tombstone("url", other["url"])], None)
        result = execute(Call(download, config), run(resumed), [pairs])
        assert isinstance(result, Failure) and "a takedown was recorded meanwhile" in result.message
        assert not [each for each in (image, other) if holders(each["jpg"], resumed)]
        ledger = carry_out(store, recorded, [])
        assert ledger.keys == (other["key"],)
        done(execute(Call(download, config), run(resumed), [pairs]))
    stored = {row["key"]: row for row in tables.read(store.uri("images", config.recipe)).to_pylist()}
    for row in (image, other):
        found = {name: value for name, value in stored[row["key"]].items() if value is not None}
        names = ("url", "caption") if row is image else ()
        kept = {"key": row["key"], "url": "", "caption": ""} | {name: row[name] for name in names}
        assert found == {**kept, "status": "failed", "reason": "taken_down"}
    assert sum(row["status"] == "ok" for row in stored.values()) == 58
    assert not [each for each in (image, other) if holders(each["jpg"], resumed)]


def test_f84_a_commit_reads_the_tombstones_again(tmp_path: Path) -> None:
    row = {"key": "a", "url": "https://a.example/1", "status": "ok", "jpg": b"an image", "sha256": "ab" * 32}
    table_uri, store = f"{tmp_path}/images/recipe", Store(str(tmp_path))
    commits = download_module._Commits(table_uri, {}, run(tmp_path), None, load_tombstones(store))
    part = tables.write_part(table_uri, "shard", pa.Table.from_pylist([row], schema=download_module.IMAGES))
    request = record(store, [Tombstone("sha256", "ab" * 32)], None)
    commits.add(part)
    commits.commit()
    assert tables.read(table_uri)["reason"].to_pylist() == ["taken_down"]
    assert not holders(b"an image", tmp_path)
    commits.committed_at = 0.0
    with pytest.raises(StageError, match="download: a takedown was recorded meanwhile"):
        commits.add(part)
    forget(store, request)
    commits.committed_at = 0.0
    commits.add(part)


def test_a_shard_that_fails_ends_the_stage_and_keeps_the_others(cluster: None, tmp_path: Path) -> None:
    scenes = ScenesConfig(num_images=30, side=16, broken=0, port=free_port())
    with scene_server.serve(scenes) as server:
        pairs = run_ingest(tmp_path, scenes)
        config = download_config(scenes, shard_size=15, tasks_in_flight=1)
        rows = read_list(pairs)["key"].to_pylist()
        from unclip.config import fingerprint

        blocked = Path(tmp_path, "images", config.recipe, f"{fingerprint(rows[15:], 0)[:32]}.parquet")
        blocked.mkdir(parents=True)  # this part can neither be read nor written
        failure = execute(Call(download, config), run(tmp_path), [pairs])
        assert isinstance(failure, Failure)
        assert "1 finished shards are kept; run the same command again" in failure.message
        blocked.rmdir()
        server.requests.clear()
        assert done(execute(Call(download, config), run(tmp_path), [pairs])).facts["rows"]["kept"] == 30
        assert sum(server.requests.values()) == 15


def test_the_table_does_not_depend_on_the_number_of_ranges_and_lanes(cluster: None, tmp_path: Path) -> None:
    """Half of the URLs are on servers that need lanes; they fail at once since their addresses are not public."""
    scenes = ScenesConfig(num_images=40, side=16, broken=0.1, port=free_port())
    found = {}
    with scene_server.serve(scenes):
        pairs = run_ingest(tmp_path, scenes)
        others = [f"http://10.0.0.{number % 30}/{number}.jpg" for number in range(80)]
        table = read_list(pairs)
        extra = pa.table(
            {
                "key": [files.sha256(url.encode())[:32] for url in others],
                "url": others,
                "caption": ["an image"] * len(others),
                "position": range(table.num_rows, table.num_rows + len(others)),
                "status": ["kept"] * len(others),
            }
        )
        table = pa.concat_tables([table, extra], promote_options="default").sort_by("key")
        ranges.write_range(str(tmp_path / "mixed"), ranges.KeyRange(0, 1), table)
        pairs = dataclasses.replace(pairs, uri=str(tmp_path / "mixed"), digest="mixed")
        for count, tasks in ((1, 1), (4, 1), (1, 2), (4, 2)):
            storage = tmp_path / f"{count}-{tasks}"
            config = download_config(scenes, shard_size=8, num_lanes=1, tasks_in_flight=tasks)
            images = done(execute(Call(download, config), run(storage), [in_ranges(storage, pairs, count)]))
            assert_indexed(images)
            facts = {name: images.facts[name] for name in ("rows", "reasons", "images_digest", "fetched_now")}
            found[count, tasks] = (content(images.uri), images.digest, facts)
    table, digest, facts = found[1, 1]
    assert facts["reasons"]["blocked_address"] >= 80 and facts["rows"]["kept"] >= 40
    for other_table, other_digest, other_facts in found.values():
        assert other_table.equals(table) and (other_digest, other_facts) == (digest, facts)


def outcomes(images: Artifact) -> dict[str, str | None]:
    table = tables.read(images.uri, columns=["key", "reason"])
    return dict(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True))


def listed_with_hashes(storage: Path, pairs: Artifact, hashes: dict[str, str]) -> Artifact:
    """The same list, with hashes for some keys added."""
    table = read_list(pairs)
    expected = pa.array([hashes.get(key) for key in table["key"].to_pylist()], pa.string())
    table = table.set_column(table.schema.get_field_index("expected_sha256"), "expected_sha256", expected)
    folder = str(storage / "with-hashes")
    ranges.write_range(folder, ranges.KeyRange(0, 1), table)
    return dataclasses.replace(pairs, uri=folder, digest="with hashes")


def test_t9_images_whose_hash_differs_from_the_list_or_the_first_fetch_are_not_kept(
    cluster: None, tmp_path: Path
) -> None:
    scenes = ScenesConfig(num_images=6, side=16, broken=0, port=free_port())
    with scene_server.serve(scenes):
        pairs = run_ingest(tmp_path, scenes)
        config = download_config(scenes)
        first = done(execute(Call(download, config), run(tmp_path), [pairs]))
        stored = tables.read(first.uri).to_pylist()
        keys = [row["key"] for row in stored]
        digests = {row["key"]: row["sha256"] for row in stored}

        # In another storage the list has the hashes, one of them wrong, and one image was taken down.
        from tasks import tombstones

        other = tmp_path / "other"
        expected = {**digests, keys[0]: "00" * 32}
        stones = [{"kind": "sha256", "value": digests[keys[1]], "request": "r"}]
        tables.write_file(str(other / "tombstones.parquet"), pa.Table.from_pylist(stones, schema=tombstones.SCHEMA))
        checked = done(execute(Call(download, config), run(other), [listed_with_hashes(tmp_path, pairs, expected)]))
        assert outcomes(checked) == dict.fromkeys(keys) | {keys[0]: "hash_mismatch", keys[1]: "taken_down"}
        bad = tables.read(checked.uri).to_pylist()[:2]
        assert all(row["jpg"] is None and row["sha256"] is None for row in bad)

        # One image was different when the table of the other size was made: the first fetch counts.
        before = tables.read(first.uri)
        changed = ["11" * 32 if key == keys[2] else digests[key] for key in keys]
        part = tables.write_part(
            first.uri,
            "changed",
            before.set_column(before.schema.get_field_index("sha256"), "sha256", pa.array(changed)),
        )
        names = [uri.rpartition("/")[2] for uri in tables.files(first.uri)]
        tables.append_files(first.uri, [part], before.schema, removed=names)
        larger = done(execute(Call(download, dataclasses.replace(config, image_size=8)), run(tmp_path), [pairs]))
        assert outcomes(larger) == dict.fromkeys(keys) | {keys[2]: "content_changed"}


def test_transient_failures_are_retried_on_request(cluster: None, tmp_path: Path) -> None:
    scenes = ScenesConfig(num_images=8, side=16, broken=0.5, port=free_port())
    pairs = run_ingest(tmp_path, scenes)
    config = download_config(scenes)
    offline = done(execute(Call(download, config), run(tmp_path), [pairs]))  # the server is not running
    assert set(outcomes(offline).values()) == {"connect_error"}
    store = Store(str(tmp_path))
    assert pin_attempt(store, config, retry_failed=False).attempt == 0
    again = pin_attempt(store, config, retry_failed=True)
    assert again.attempt == 1
    with scene_server.serve(scenes) as server:
        images = done(execute(Call(download, again), run(tmp_path), [pairs]))
        assert images.facts["fetched_now"] == len(outcomes(offline)) and images.facts["rows"]["kept"] >= 8
        server.requests.clear()
        assert pin_attempt(store, config, retry_failed=False).attempt == 1  # runs without a retry keep the number
        third = done(execute(Call(download, pin_attempt(store, config, retry_failed=True)), run(tmp_path), [pairs]))
        assert set(server.requests) and all("picture" not in path for path in server.requests)
    transient = [reason for reason in outcomes(images).values() if reason and TRANSIENT.fullmatch(reason)]
    assert third.facts["fetched_now"] == len(transient) > 0
    assert tables.read(images.uri)["key"].to_pylist() == tables.read(offline.uri, 1)["key"].to_pylist()


def with_list(folder: Path, *lists: Artifact) -> Artifact:
    """The rows of several lists as one."""
    table = pa.concat_tables(map(read_list, lists)).sort_by("key")
    ranges.write_range(str(folder / "both"), ranges.KeyRange(0, 1), table)
    return dataclasses.replace(lists[0], uri=str(folder / "both"), digest="both")


def test_f67_rows_of_a_site_that_stalls_are_skipped_with_a_reason_and_retried_on_request(
    cluster: None, tmp_path: Path
) -> None:
    stalls = ScenesConfig(num_images=48, side=16, broken=0, port=free_port())
    well = ScenesConfig(num_images=40, side=16, broken=0, port=free_port(), seed=1)
    pairs = with_list(tmp_path, run_ingest(tmp_path, stalls), run_ingest(tmp_path, well))
    config = download_config(
        stalls, allow_hosts=(stalls.address, well.address), shard_size=100, timeout_seconds=1.0, site_seconds=3.0
    )
    with scene_server.serve(well), socket.create_server(("127.0.0.1", stalls.port), backlog=64):  # it accepts nothing
        started = time.monotonic()
        images = done(execute(Call(download, config), run(tmp_path), [pairs]))
        assert time.monotonic() - started < 30
    assert images.facts["rows"] == {"in": 88, "kept": 40, "dropped": 0, "failed": 48}
    reasons = images.facts["reasons"]
    assert reasons.keys() == {"timeout", "site_unreachable"} and reasons["site_unreachable"] >= 16
    again = pin_attempt(Store(str(tmp_path)), config, retry_failed=True)
    with scene_server.serve(stalls) as server:
        images = done(execute(Call(download, again), run(tmp_path), [pairs]))
        assert sum(server.requests.values()) == 48
    assert images.facts["rows"] == {"in": 88, "kept": 88, "dropped": 0, "failed": 0}


def test_f65_healthy_rows_are_fetched_while_all_rows_of_a_site_wait_for_its_answers(
    cluster: None, tmp_path: Path
) -> None:
    """One task works at a time, each on one row, and the slow site answers only once all rows of the other are fetched."""
    slow = ScenesConfig(num_images=WAITING_PER_TASK, side=16, broken=0, port=free_port())
    well = ScenesConfig(num_images=6, side=16, broken=0, port=free_port(), seed=1)
    pairs = with_list(tmp_path, run_ingest(tmp_path, slow), run_ingest(tmp_path, well))
    config = download_config(
        slow, allow_hosts=(slow.address, well.address), shard_size=1, tasks_in_flight=1, timeout_seconds=40.0
    )
    with scene_server.serve(slow) as slow_server, scene_server.serve(well) as server:
        answer, fetched_before = slow_server.process_request_thread, list[int]()

        def fetched() -> int:
            return sum(number for path, number in list(server.requests.items()) if path.endswith(".jpg"))

        def answer_last(*request: Any) -> None:
            deadline = time.monotonic() + 35
            while fetched() < well.num_images and time.monotonic() < deadline:
                time.sleep(0.02)
            fetched_before.append(fetched())
            answer(*request)

        slow_server.process_request_thread = answer_last  # type: ignore[method-assign]
        images = done(execute(Call(download, config), run(tmp_path), [pairs]))
    assert set(fetched_before) == {well.num_images}
    assert images.facts["rows"]["kept"] == slow.num_images + well.num_images


@pytest.mark.parametrize("reachable", [0, 60])
def test_f66_a_download_without_a_network_fails_and_marks_nothing_as_tried(
    cluster: None, tmp_path: Path, reachable: int
) -> None:
    """Most of the list is on a port that is closed at first; what arrived stays, and the next run fetches the rest."""
    gone = ScenesConfig(num_images=140, side=16, broken=0, port=free_port())
    there = ScenesConfig(num_images=max(1, reachable), side=16, broken=0, port=free_port(), seed=1)
    pairs = with_list(tmp_path, run_ingest(tmp_path, gone), *([run_ingest(tmp_path, there)] if reachable else []))
    config = download_config(gone, allow_hosts=(gone.address, there.address), retries=0, timeout_seconds=5.0)
    uri = f"{tmp_path}/images/{config.recipe}"
    with scene_server.serve(there) as server:
        failure = execute(Call(download, config), run(tmp_path), [pairs])
        assert isinstance(failure, Failure)
        assert f" of {140 + reachable} rows reached no server (connect_error " in failure.message
        assert "more than max_unreached = 0.5" in failure.message and "run the same command again" in failure.message
        assert set(tables.read(uri)["status"].to_pylist()) <= {"ok"}
        assert tables.read(uri).num_rows == sum(server.requests.values()) <= reachable
        with scene_server.serve(gone) as other:
            images = done(execute(Call(download, config), run(tmp_path), [pairs]))
            assert set(other.requests.values()) == {1} and len(other.requests) == 140
        assert len(server.requests) == reachable and set(server.requests.values()) <= {1}
    assert images.facts["rows"] == {"in": 140 + reachable, "kept": 140 + reachable, "dropped": 0, "failed": 0}
    assert_indexed(images)


def test_f66_the_share_is_a_setting_and_rows_that_failed_before_do_not_count(cluster: None, tmp_path: Path) -> None:
    scenes = ScenesConfig(num_images=120, side=16, broken=0, port=free_port())
    pairs = run_ingest(tmp_path, scenes)  # the server is not running
    config = download_config(scenes, retries=0, max_unreached=1.0, shard_size=100)
    offline = done(execute(Call(download, config), run(tmp_path), [pairs]))
    assert offline.facts["rows"]["failed"] == 120 == sum(offline.facts["reasons"].get(name, 0) for name in UNREACHED)
    again = dataclasses.replace(pin_attempt(Store(str(tmp_path)), config, retry_failed=True), max_unreached=0.5)
    retried = done(execute(Call(download, again), run(tmp_path), [pairs]))
    assert retried.facts["fetched_now"] == 120 == retried.facts["rows"]["failed"]
    with pytest.raises(ConfigError, match=r"max_unreached: got 1\.5, expected 0 to 1"):
        DownloadConfig(max_unreached=1.5)


@pytest.mark.parametrize("count", [1, 4])
def test_an_interrupted_retry_loses_no_row_and_continues(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Each commit replaces the rows that its parts hold; files that keep other rows are written again, repeatedly."""
    scenes = ScenesConfig(num_images=40, side=16, broken=0.3, port=8777)  # keys, and so the order, depend on it
    pairs = run_ingest(tmp_path, scenes)
    table = read_list(pairs)
    short = f"http://{scenes.address}{scenes.prefix}/short/39.jpg"  # fails again, in the first shard
    urls = pa.array([short, *table["url"].to_pylist()[1:]])
    ranges.write_range(str(tmp_path / "list"), ranges.KeyRange(0, 1), table.set_column(2, "url", urls))
    pairs = in_ranges(tmp_path, dataclasses.replace(pairs, uri=str(tmp_path / "list"), digest="short"), count)
    config = download_config(scenes, shard_size=30, retries=0)
    offline = done(execute(Call(download, config), run(tmp_path), [pairs]))
    again = dataclasses.replace(
        pin_attempt(Store(str(tmp_path)), config, retry_failed=True), shard_size=7, tasks_in_flight=1
    )
    keys = tables.read(offline.uri, columns=["key"])["key"].to_pylist()
    from unclip.config import fingerprint

    monkeypatch.setattr(download_module, "PARTS_PER_COMMIT", 1)
    blocked = Path(tmp_path, "images", config.recipe, f"{fingerprint(keys[21:28], 1)[:32]}.parquet")
    blocked.mkdir(parents=True)
    with scene_server.serve(scenes) as server:
        failure = execute(Call(download, again), run(tmp_path), [pairs])
        assert isinstance(failure, Failure) and "3 finished shards are kept" in failure.message, failure
        blocked.rmdir()
        halfway = tables.read(offline.uri)
        assert halfway["key"].to_pylist() == keys, "each row is in the table once"
        assert set(halfway["reason"].to_pylist()[21:]) == {"connect_error"}
        assert "connect_error" not in halfway["reason"].to_pylist()[:21]
        server.requests.clear()
        images = done(execute(Call(download, again), run(tmp_path), [pairs]))
        requested = {f"http://{scenes.address}{path}" for path in server.requests}
    finished = halfway.slice(0, 21)
    assert finished["reason"][0].as_py() == "short_body"
    assert not requested & set(finished["url"].to_pylist()), "a row that failed again is not retried once more"
    table = tables.read(images.uri)
    assert table["key"].to_pylist() == keys and table.slice(0, 21).equals(finished)
    assert "connect_error" not in table["reason"].to_pylist()
    assert images.facts["fetched_now"] == len(keys) and images.facts["rows"]["kept"] >= 39
    assert_indexed(images)


def test_an_interrupted_plan_is_not_continued_after_other_commits(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another list with the same rows is downloaded before the next attempt: no row is fetched or stored twice."""
    scenes = ScenesConfig(num_images=30, side=16, broken=0, port=free_port())
    config = download_config(scenes, shard_size=10, tasks_in_flight=1)
    monkeypatch.setattr(download_module, "SECONDS_PER_COMMIT", 0.0)
    from unclip.config import fingerprint

    with scene_server.serve(scenes) as server:
        pairs = run_ingest(tmp_path, scenes)
        keys = read_list(pairs)["key"].to_pylist()
        blocked = Path(tmp_path, "images", config.recipe, f"{fingerprint(keys[10:20], 0)[:32]}.parquet")
        blocked.mkdir(parents=True)
        assert isinstance(execute(Call(download, config), run(tmp_path), [pairs]), Failure)
        blocked.rmdir()
        half = ranges.read_all(pairs.uri).slice(5, 10)
        ranges.write_range(str(tmp_path / "half"), ranges.KeyRange(0, 1), half)
        other = dataclasses.replace(pairs, uri=str(tmp_path / "half"), digest="half")
        assert done(execute(Call(download, config), run(tmp_path), [other])).facts["fetched_now"] == 5
        images = done(execute(Call(download, config), run(tmp_path), [pairs]))
        assert images.facts["fetched_now"] == 15 and max(server.requests.values()) == 1
    assert tables.read(images.uri)["key"].to_pylist() == keys


class _Redirecting(http.server.BaseHTTPRequestHandler):
    """Sends /moved/<host>/<number> to that host's /<number>, which is an image."""

    requests: ClassVar[collections.Counter[str]] = collections.Counter()

    def do_GET(self) -> None:
        type(self).requests[f"{self.headers['Host'].partition(':')[0]}{self.path}"] += 1
        is_moved, body = self.path.startswith("/moved/"), b""
        if is_moved:
            self.send_response(302)
            _, _, host, number = self.path.split("/")
            self.send_header("Location", f"http://{host}:{self.server.server_address[1]}/{number}")  # type: ignore[index]
        else:
            body = IMAGE if self.path[1:].isdigit() else b""
            self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


IMAGE = scene_server.jpeg(ScenesConfig(num_images=1, side=16), 0)


def test_f58_f61_f97_a_url_is_fetched_once_for_all_its_rows_and_its_redirects_are_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loopback addresses count as public here; one row of the five expects another hash, and a domain was taken down."""
    monkeypatch.setattr(fetch, "is_public", lambda _: True)
    hosts = {name: f"{name}.example" for name in ("start", "cdn", "evil")}

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Redirecting)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        port = server.server_address[1]
        config = DownloadConfig(image_size=8, allow_ports=(port,), num_threads=8, timeout_seconds=20.0)
        real = download_module._fetcher(config)
        monkeypatch.setattr(download_module, "_fetcher", lambda _: dataclasses.replace(real, resolve=resolve))
        start = f"http://{hosts['start']}:{port}"
        urls = [f"{start}/1"] * 5 + [f"{start}/moved/cdn.example/2"] * 3 + [f"{start}/moved/evil.example/3"] * 2
        urls += [f"{start}/moved/start.example/4", *[f"{start}/missing"] * 2]
        pairs = [
            {"key": f"{number:032x}", "url": url, "caption": f"caption {number}", "expected_sha256": None}
            for number, url in enumerate(urls)
        ]
        pairs[4]["expected_sha256"] = "00" * 32
        done_rows: list[int] = []
        tombstones = Tombstones(domains=frozenset(["evil.example"]))
        table = withhold(download_module.fetch_pairs(pairs, config, done_rows.append), tombstones)
    finally:
        server.shutdown()
        server.server_close()
    images = {path: count for path, count in _Redirecting.requests.items() if not path.endswith((".txt", ".json"))}
    assert images == dict.fromkeys(
        ("start.example/1", "start.example/moved/cdn.example/2", "cdn.example/2", "start.example/moved/evil.example/3",
         "evil.example/3", "start.example/moved/start.example/4", "start.example/4", "start.example/missing"), 1,
    )  # fmt: skip
    for columns in ("key", "url", "caption"):
        assert table[columns].to_pylist() == [pair[columns] for pair in pairs]
    reasons = [None] * 4 + ["hash_mismatch"] + [None] * 3 + ["taken_down"] * 2 + [None] + ["http_404"] * 2
    assert table["reason"].to_pylist() == reasons and max(done_rows) == len(pairs)
    assert len(set(table["jpg"].to_pylist()[:4])) == 1 and table["jpg"].null_count == 5
    final = [None] * 5 + [f"http://cdn.example:{port}/2"] * 3 + [None] * 2 + [f"{start}/4"] + [None] * 2
    assert table["final_url"].to_pylist() == final
    assert table["redirect_hosts"].to_pylist() == [None] * 5 + ["cdn.example"] * 3 + [None] * 5


def test_a_task_gives_its_slot_away_only_while_it_waits_for_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the slot while it works on the rows afterwards: a task in its place might have to start a process."""
    scenes = ScenesConfig(num_images=2, side=16, broken=0, port=free_port())
    uri, list_uri, rows_uri = (str(tmp_path / name) for name in ("images", "list.parquet", "rows.parquet"))
    scene_server.write_url_list(scenes, list_uri)
    listed = tables.read_file(list_uri).append_column("key", pa.array(["0", "1"]))
    tables.write_file(rows_uri, listed.append_column("replaces", pa.nulls(2, pa.string())))

    def results(name: str) -> Iterator[Any]:
        config, beat = download_config(scenes, timeout_seconds=60.0), str(tmp_path / "beat.json")
        shard: Any = download_module._download_shard
        found: Iterator[Any] = shard._function(uri, name, rows_uri, config, run(tmp_path), beat, {})
        return found

    monkeypatch.setattr(download_module, "WAITING_SECONDS", 60.0)
    with scene_server.serve(scenes) as server:
        [quick] = results("quick")
        assert quick.part == tables.find_part(uri, "quick") and quick.part.rows == 2
        assert list(results("quick")) == [quick], "a part that is there is found"
        answer, may_answer = server.process_request_thread, threading.Event()

        def answer_late(*request: Any) -> None:
            may_answer.wait(60)
            answer(*request)

        server.process_request_thread = answer_late  # type: ignore[method-assign]
        monkeypatch.setattr(download_module, "WAITING_SECONDS", 0.1)
        slow = results("slow")
        assert next(slow) is None
        may_answer.set()
        assert [fetched.part.rows for fetched in slow] == [2]


def test_a_stopped_run_commits_nothing(tmp_path: Path) -> None:
    """Another run may be writing to the table by then."""
    Store(str(tmp_path)).write_json({"state": "stopped", "host": socket.gethostname()}, "runs", "r1", "run.json")
    uri = str(tmp_path / "images" / "recipe")
    part = tables.write_part(uri, "part", download_module.IMAGES.empty_table())
    commits = download_module._Commits(uri, {}, run(tmp_path), None, Tombstones())
    with pytest.raises(StageError, match="left to the next run"):
        commits.add(part)
        commits.commit()
    assert tables.version(uri) is None


def test_f74_of_rows_that_overlapping_commits_left_twice_the_first_stays(cluster: None, tmp_path: Path) -> None:
    scenes = ScenesConfig(num_images=4, side=16, broken=0, port=free_port())
    pairs = run_ingest(tmp_path, scenes)  # the server is not running
    images = done(execute(Call(download, download_config(scenes)), run(tmp_path), [pairs]))
    before = tables.read(images.uri)
    late = before.slice(1, 2)
    late = late.set_column(late.column_names.index("caption"), "caption", pa.array(["late", "late"]))
    tables.append_files(images.uri, [tables.write_part(images.uri, "0-late", late)], download_module.IMAGES)
    config = download_config(scenes, retries=0)  # another stage with the same table
    repaired = done(execute(Call(download, config), run(tmp_path), [pairs]))
    assert tables.read(images.uri, repaired.facts["images_version"]).equals(before)
    assert repaired.facts["images_digest"] == images.facts["images_digest"]


def pids_of_shards() -> list[int]:
    """Ids of processes that are downloading a shard."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::_download_shard"):
                found.append(int(folder.name))
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found
    return found


def test_f38_a_killed_task_and_a_hung_task_are_restarted(cluster: None, tmp_path: Path) -> None:
    """After SIGKILL in the middle of a shard and then SIGSTOP, every row is stored exactly once."""
    scenes = ScenesConfig(num_images=30, side=16, broken=0.3, port=free_port())  # its stalling URLs keep a shard busy
    config = download_config(scenes, shard_size=100, stall_seconds=6.0, retries=0)
    with scene_server.serve(scenes) as server:
        pairs = run_ingest(tmp_path, scenes)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stage = pool.submit(execute, Call(download, config), run(tmp_path), [pairs])
            wait_for(lambda: server.count("picture") >= 5)
            [first] = wait_for(pids_of_shards)
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: set(pids_of_shards()) - {first})
            num_requests = server.count("picture")
            wait_for(lambda: server.count("picture") >= num_requests + 5)
            [second] = wait_for(lambda: set(pids_of_shards()) - {first})
            os.kill(second, signal.SIGSTOP)
            images = done(stage.result())
        assert server.count("picture") > 30, "nothing was fetched again"
    assert not Path(f"/proc/{second}").exists(), "a hung task is killed before its shard is restarted"
    table = content(images.uri)
    assert len(set(table["key"].to_pylist())) == table.num_rows == images.facts["fetched_now"]
    assert images.facts["rows"]["kept"] == 30 + scenes_of_kind(table, "duplicate", "small")
    assert len(tables.files(images.uri)) == len(list(Path(images.uri).glob("*.parquet"))) == 1
    assert not Path(tmp_path, "runs", "r1", "shards").exists()


def scenes_of_kind(table: pa.Table, *kinds: str) -> int:
    return sum(url.split("/")[-2] in kinds for url in table["url"].to_pylist())


def test_f38_a_late_result_of_an_abandoned_task_is_discarded(tmp_path: Path) -> None:
    table = pa.table({"key": ["a"], "jpg": [b"first"]})
    part = tables.write_part(str(tmp_path), "part", table)
    late = b"written after the part already exists"
    assert not files.write(f"{tmp_path}/part.parquet", late, replace=False)
    assert tables.find_part(str(tmp_path), "part") == part
    assert tables.read_file(f"{tmp_path}/part.parquet").equals(table)
    assert [path.name for path in tmp_path.iterdir()] == ["part.parquet"]


def test_the_fetcher_gets_the_settings_and_is_reused_within_a_process() -> None:
    config = DownloadConfig(requests_per_host=2, respect_robots=False, opt_out_directives=("noindex",), retries=3)
    fetcher = download_module._fetcher(config)
    assert (fetcher.requests_per_host, fetcher.respect_robots, fetcher.retries) == (2, False, 3)
    assert fetcher.opt_out_directives == ("noindex",)
    assert download_module._fetcher(dataclasses.replace(config)) is fetcher
    assert DownloadConfig().respect_robots


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_lanes", 0),
        ("stall_seconds", 12.0),
        ("requests_per_host", 0),
        ("max_crawl_delay_seconds", -1.0),
        ("opt_out_directives", ("No AI",)),
        ("user_agent", "/1.0"),
        ("allow_ports", (0,)),
        ("proxy", "socks5://127.0.0.1:1080"),
        ("proxy", "http://user:secret@proxy:3128"),
        ("proxy", "http://proxy"),
    ],
)
def test_invalid_settings_are_named(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=setting):
        DownloadConfig(**{setting: value})  # type: ignore[arg-type]
