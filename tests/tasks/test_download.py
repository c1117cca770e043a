"""The whole path from a list of URLs to deduplicated pictures, against a server with planned faults."""

import collections
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines import scene_server
from pipelines.scene_server import ScenesConfig
from tasks import tables
from tasks.dedup import DedupConfig, dedup
from tasks.download import DownloadConfig, download
from tasks.filter import FilterConfig, filter
from tasks.ingest import IngestConfig, ingest
from tasks.stage import Artifact, Call, Failure, Run, execute
from tasks.tracking import Tracker
from unclip import files

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


def run_ingest(storage: Path, scenes: ScenesConfig) -> Artifact:
    path = str(storage / f"list-{scenes.num_images}.parquet")
    scene_server.write_url_list(scenes, path)
    return done(execute(Call(ingest, IngestConfig(path)), run(storage), []))


def done(result: Artifact | Failure) -> Artifact:
    assert isinstance(result, Artifact), result
    rows = result.facts["rows"]
    assert rows["in"] == rows["kept"] + rows["dropped"] + rows["failed"]
    return result


def reasons_by_kind(pairs: Artifact, selection: Artifact) -> dict[str, set[str | None]]:
    urls = dict(
        zip(*(tables.read_file(pairs.uri).column(name).to_pylist() for name in ("position", "url")), strict=True)
    )
    found = collections.defaultdict(set)
    for row in tables.read_file(selection.uri).to_pylist():
        kind = "file" if urls[row["position"]].startswith("file:") else urls[row["position"]].split("/")[-2]
        found[kind].add(row["reason"])
    return dict(found)


def content(table_uri: str) -> pa.Table:
    return tables.read(table_uri)


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

    assert selection.facts["rows"] == {"in": 60, "kept": 40, "dropped": 6, "failed": 14}
    found = reasons_by_kind(pairs, selection)
    winners = found.pop("duplicate") | found.pop("picture")  # the smaller key wins, be it the copy or the picture
    assert winners == {None, "duplicate_image"}
    assert found == {kind: {reason} for kind, reason in EXPECTED.items() if kind != "duplicate"}
    for stage in (images, filtered):
        assert stage.facts["images"] == selection.facts["images"]

    table = content(images.facts["images"])
    assert table.schema.names == tables.read(images.uri).schema.names
    ok = table.filter(pc.equal(table["status"], "ok"))
    row = ok.filter(pc.equal(ok["width"], 64)).slice(0, 1).to_pylist()[0]
    assert row["height"] == row["original_width"] == row["original_height"] == 64
    assert files.sha256(row["jpg"]) == row["jpg_sha256"] != row["sha256"]
    assert len(row["phash"]) == 16 and row["reason"] is None
    failed = table.filter(pc.equal(table["status"], "failed"))
    assert failed["jpg"].null_count == failed.num_rows == 12


def test_a_longer_list_fetches_only_what_is_new(cluster: None, tmp_path: Path) -> None:
    scenes = ScenesConfig(num_images=20, side=16, broken=0, port=free_port())
    longer = dataclasses.replace(scenes, num_images=26)
    with scene_server.serve(longer) as server:
        config = download_config(scenes)
        first = done(execute(Call(download, config), run(tmp_path), [run_ingest(tmp_path, scenes)]))
        assert (first.facts["fetched_now"], first.facts["images_version"]) == (20, 0)
        server.requests.clear()
        second = done(execute(Call(download, config), run(tmp_path), [run_ingest(tmp_path, longer)]))
        assert (second.facts["fetched_now"], second.facts["images_version"]) == (6, 1)
        assert sum(server.requests.values()) == 6 == len(server.requests)
        server.requests.clear()
        # Another setting that changes no picture: nothing is fetched and no version is made, and the content is the same.
        again = done(
            execute(
                Call(download, dataclasses.replace(config, retries=0)), run(tmp_path), [run_ingest(tmp_path, longer)]
            )
        )
        assert (again.facts["fetched_now"], again.facts["images_version"], again.digest) == (0, 1, second.digest)
        assert not server.requests
    assert second.digest != first.digest
    assert tables.read(first.uri, 0).num_rows == 20 and tables.read(first.uri).num_rows == 26


KILLED = """
import sys, ray
sys.path[:0] = [{tests!r}]
from test_download import *
ray.init(address={address!r}, log_to_driver=False)
scenes = ScenesConfig(**{scenes!r})
config = download_config(scenes, tasks_in_flight=1)
execute(Call(download, config), run(Path({storage!r})), [run_ingest(Path({storage!r}), scenes)])
"""


def test_a_killed_download_goes_on_where_it_was(cluster: None, tmp_path: Path) -> None:
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
    )
    with scene_server.serve(scenes) as server:
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        try:
            deadline = time.monotonic() + 60
            while len(list(Path(table_uri).glob("*.parquet"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(1)  # Ray ends the tasks of a driver that is gone
        finished = set(Path(table_uri).glob("*.parquet"))
        assert 2 <= len(finished) < 21, "killed too late or too early"
        assert tables.version(table_uri) is None, "parts are invisible until they are committed"
        stored = pa.concat_tables(map(tables.read_file, map(str, finished)))
        server.requests.clear()

        resumed = done(execute(Call(download, config), run(killed), [run_ingest(killed, scenes)]))
        fetched_again = {f"http://{scenes.address}{path}" for path in server.requests}
        assert not fetched_again & set(stored["url"].to_pylist())
        reference = done(execute(Call(download, config), run(undisturbed), [run_ingest(undisturbed, scenes)]))
    assert resumed.digest == reference.digest
    assert content(resumed.uri).equals(content(reference.uri))
    assert [Path(uri).name for uri in tables.files(resumed.uri)] == [
        Path(uri).name for uri in tables.files(reference.uri)
    ]


def test_a_shard_that_fails_ends_the_stage_and_keeps_the_others(cluster: None, tmp_path: Path) -> None:
    scenes = ScenesConfig(num_images=30, side=16, broken=0, port=free_port())
    with scene_server.serve(scenes) as server:
        pairs = run_ingest(tmp_path, scenes)
        config = download_config(scenes, shard_size=15, tasks_in_flight=1)
        rows = tables.read_file(pairs.uri).select(["key"]).to_pydict()["key"]
        from unclip.config import fingerprint

        blocked = Path(tmp_path, "images", config.recipe, f"{fingerprint(rows[15:])[:32]}.parquet")
        blocked.mkdir(parents=True)  # this part can be neither read nor written
        failure = execute(Call(download, config), run(tmp_path), [pairs])
        assert isinstance(failure, Failure)
        assert "1 finished shards are kept; run the same command again" in failure.message
        blocked.rmdir()
        server.requests.clear()
        assert done(execute(Call(download, config), run(tmp_path), [pairs])).facts["rows"]["kept"] == 30
        assert sum(server.requests.values()) == 15
