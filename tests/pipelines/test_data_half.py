"""The dataset stages end to end: refreshed, with rows taken down, in an object store, and killed at commit points."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines.scene_server import ScenesConfig, SceneServer, serve, write_url_list
from tasks import ranges, tables
from tasks.places import open_places
from tasks.store import Store
from tasks.tombstones import Tombstone, record, recorded
from tests.pipelines.command_line import STORAGE_NAME, call, call_apart, read_record
from tests.tasks.datasets import holders
from unclip import files
from unclip.models import clip

ROOT = Path(__file__).resolve().parents[2]
SCENES = ScenesConfig(num_images=300, broken=1 / 30, side=64, port=8769)

Arguments = tuple[object, ...]
"""Arguments of a command, without its storage."""

pytestmark = pytest.mark.timeout(900)

# Writes that commit the work before them; runs are killed before, within and after each.
COMMITS = [
    "artifacts/ingest/.*/pairs", "artifacts/download/.*/plan", "images/.*[.]parquet", "images/.*/_delta_log",
    "index/.*[.]parquet", "index/.*/_delta_log", "artifacts/filter/", "artifacts/dedup/.*/selection",
    "artifacts/dedup/.*/places", "embeddings/.*[.]parquet", "embeddings/.*/_delta_log", "artifacts/curate/.*/scores",
    "artifacts/curate/.*/selection", "artifacts/curate/.*/places", "artifacts/curate/.*/heldout",
    "artifacts/curate/.*/statistics/pca", "artifacts/curate/.*/statistics/manifest", "snapshots/.*[.]parquet",
    "snapshots/_delta_log", "artifacts/report/",
    *(f"stages/{name}/" for name in ("ingest", "download", "filter", "dedup", "clip", "embed", "curate", "report")),
]  # fmt: skip
FEW = [
    "within .*images/.*[.]parquet",
    "after .*images/.*/_delta_log",
    "after .*embeddings/.*[.]parquet",
    "before .*snapshots/_delta_log",
]
ALL = [
    f"^{moment} .*{path}"
    for path in COMMITS
    for moment in ("before", "within", "after")
    if moment != "within" or "_log" not in path
]


LOST = [
    ("CoreWorkerService", "PushTask"),
    ("NodeManagerService", "RequestWorkerLease"),
    ("NodeManagerService", "ReturnWorkerLease"),
]
"""Ray messages that are dropped at random."""


def refresh(storage: object, arguments: Arguments, *options: object, **environment: str) -> str:
    result = call_apart(*arguments, "--storage", storage, *options, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[SceneServer]:
    """Server of the images for all runs of this module; counts requests."""
    with serve(SCENES) as server:
        yield server


@pytest.fixture(scope="module")
def arguments(server: SceneServer, tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    """Arguments of a refresh of 300 images and 10 failing rows, with a tiny untrained CLIP."""
    import torch

    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    clip.save(clip.create("unclip-demo", None), "unclip-demo", folder / "clip")
    write_url_list(SCENES, str(folder / "pairs.parquet"))
    settings = {"clip.model": f"local-dir:{folder}/clip", "ingest.urls": folder / "pairs.parquet", "scenes": "none"}
    settings |= {"download.allow_hosts": f'["{SCENES.address}"]', "download.shard_size": 120}
    settings |= {"cluster.num_cpus": 2}  # Ray starts a process per CPU in advance
    assignments = (("--set", f"{name}={value}") for name, value in settings.items())
    return ("refresh", "tiny", *(argument for assignment in assignments for argument in assignment))


@pytest.fixture(scope="module")
def grown(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    """The same arguments with three more images on the list: less than 1% of the rows are new."""
    path = tmp_path_factory.mktemp("grown") / "pairs.parquet"
    write_url_list(dataclasses.replace(SCENES, num_images=303), str(path))
    return (*arguments, "--set", f"ingest.urls={path}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, arguments: Arguments) -> Path:
    storage = tmp_path_factory.mktemp("undisturbed") / STORAGE_NAME
    refresh(storage, arguments)
    return storage


def content(storage: object) -> dict[str, Any]:
    """Return the digests of all tables and stages, which must not depend on interruptions."""
    found: dict[str, Any] = {}
    for kind in ("images", "embeddings"):
        for name in files.names(f"{storage}/{kind}"):
            table = tables.read(f"{storage}/{kind}/{name}")
            keys = table.column("key").to_pylist()
            assert len(set(keys)) == len(keys), f"{kind}: duplicate rows"
            found[kind] = (name, len(keys), tables.content_digest(table))
    snapshots = tables.read_with_commit_times(f"{storage}/snapshots").to_pylist()
    for number, snapshot in enumerate(map(Store(str(storage)).resolve, snapshots)):
        for name in ("selection", "scores"):
            table = ranges.read_all(snapshot[name])
            names = [column for column in table.column_names if not column.startswith("embeddings_")]  # not places
            found[f"{name} {number}"] = tables.content_digest(table.select(names))
        places = open_places(snapshot["places"], "train", "holdout")
        found[f"places {number}"] = sorted(places.keys(np.arange(len(places))))
        counts = json.loads(snapshot["rows"])
        assert counts["in"] == counts["kept"] + counts["dropped"] + counts["failed"]
        found[f"counts {number}"] = (counts, json.loads(snapshot["reasons"]))
    for stage in files.names(f"{storage}/stages"):
        records = [
            files.read_json(f"{storage}/stages/{stage}/{name}") for name in files.names(f"{storage}/stages/{stage}")
        ]
        found[stage] = sorted(record["digest"] for record in records)
    return found


def kill_at(points: list[str], storage: Path, arguments: Arguments, armed: Path) -> None:
    """Repeat the refresh, which is killed at some of the points each time, until no point is left."""
    armed.mkdir()
    for number, point in enumerate(points):
        (armed / f"{number:03d}").write_text(point)
    for _ in range(len(points) + 1):
        before = set(armed.iterdir())
        result = call_apart(*arguments, "--storage", storage, UNCLIP_FAILPOINTS=str(armed))
        if result.returncode == 0:
            break
        assert set(armed.iterdir()) < before, result.stdout + result.stderr
        assert "run the same command again" in result.stderr, result.stderr
    assert result.returncode == 0 and not list(armed.iterdir()), [path.read_text() for path in armed.iterdir()]
    assert not list(storage.rglob("*.tmp")), "the next owner of a lock removes temporary files"


def facts_of(storage: object, stage: str) -> dict[str, Any]:
    """Return the facts of the newest artifact of a stage."""
    newest = max(Path(str(storage), "stages", stage).iterdir(), key=lambda path: path.stat().st_mtime)
    facts: dict[str, Any] = read_record(Path(str(storage)), "stages", stage, newest.name)["facts"]
    return facts


@pytest.mark.slow
def test_f45_in_an_unreliable_object_store_the_tables_are_the_same(
    undisturbed: Path, arguments: Arguments, tmp_path: Path, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = "s3://bucket/some préfix"
    refresh(storage, arguments, "--set", f"tracking_uri=sqlite:///{tmp_path}/mlflow.db", **s3)
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    root = Store(storage).root
    assert content(root) == content(undisturbed)
    assert "_delta_log" in files.names(f"{root}/locks/tables"), "leases are taken by commits"
    assert not [name for name in files.names(f"{root}/locks/tables") if name.startswith("beat-")]


def test_f29_killed_at_a_few_commit_points_the_tables_are_the_same(
    undisturbed: Path, arguments: Arguments, tmp_path: Path
) -> None:
    kill_at(FEW, tmp_path / "storage", arguments, tmp_path / "armed")
    assert content(tmp_path / "storage") == content(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_f29_killed_at_every_commit_point_the_tables_are_the_same(
    undisturbed: Path, arguments: Arguments, tmp_path: Path
) -> None:
    kill_at(ALL, tmp_path / "storage", arguments, tmp_path / "armed")
    assert content(tmp_path / "storage") == content(undisturbed)


@pytest.mark.slow
def test_f83_f84_f89_images_taken_down_after_a_kill_and_during_a_run_are_nowhere(
    arguments: Arguments, tmp_path: Path
) -> None:
    """The first is in a part that a killed download left; the second is taken down while the run that resumes it downloads."""
    storage, armed = tmp_path / "storage", tmp_path / "armed"
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir="/tmp"))  # TMPDIR of all processes; Ray needs a short path
    environment = {"TMPDIR": str(scratch), "RAY_TMPDIR": "/tmp"}
    armed.mkdir()
    for number in range(3):  # Ray restarts the stage twice
        (armed / str(number)).write_text("before .*images/.*/_delta_log")
    killed = call_apart(*arguments, "--storage", storage, UNCLIP_FAILPOINTS=str(armed), **environment)
    assert killed.returncode == 1 and "run the same command again" in killed.stderr, killed.stderr
    [folder] = (storage / "images").iterdir()
    assert tables.version(str(folder)) is None and list(scratch.glob("unclip-download-*")), "killed before a commit"
    parts = pa.concat_tables(map(tables.read_file, map(str, folder.glob("*.parquet"))))
    counts = parts.group_by("sha256").aggregate([("key", "count")])
    alone = counts.filter(pc.equal(counts["key_count"], 1))["sha256"]  # others are copies, which a takedown covers
    first, second, third = parts.filter(pc.is_in(parts["sha256"], value_set=alone)).to_pylist()[:3]
    assert holders(first["jpg"], storage)
    taken = call_apart("takedown", "--sha256", first["sha256"], "--storage", storage, **environment)
    assert taken.returncode == 0 and "1 rows taken down" in taken.stdout, taken.stderr
    assert not holders(first["jpg"], storage, scratch) and not list(scratch.glob("unclip-*"))

    command = [sys.executable, "-m", "pipelines", *map(str, arguments), "--storage", str(storage)]
    command += ["--set", "download.shard_size=15", "--set", "download.tasks_in_flight=1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **environment})
        while not list(folder.glob("*.parquet")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        during = call("takedown", "--url", second["url"], "--key", third["key"], "--wait", 0, "--storage", storage)
        assert during.returncode == 0 and during.stdout.startswith("recorded: "), during.stdout + during.stderr
        assert process.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    printed = (tmp_path / "log").read_text()
    assert f"takedown carried out (url {second['url']}, key {third['key']})" in printed and "starts again" in printed
    assert "310 in = 297 kept" in printed and not files.names(f"{storage}/takedowns/recorded")
    for row in (first, second, third):
        assert not holders(row["jpg"], storage, scratch)
        fate = call("data", "show", row["key"], "--storage", storage).stdout
        assert row["url"] not in fate.replace(f"url {row['url']}", "") and "taken down because of" in fate, fate
    assert not list(scratch.glob("unclip-*"))
    shutil.rmtree(scratch)

    selection = ranges.read_all(facts_of(storage, "curate")["snapshot"]["selection"])
    kept = set(selection.filter(pc.equal(selection["status"], "kept"))["key"].to_pylist())
    fetched = set(parts.filter(pc.equal(parts["status"], "ok"))["key"].to_pylist())
    assert len(kept) == 297 and kept <= fetched - {row["key"] for row in (first, second, third)}


def descendants(pid: int) -> dict[int, str]:
    """Return the descendants of a process and their command lines."""
    parents, found = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return {each: found[each] for each in below - {pid} if each in found}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["raylet/raylet", "gcs/gcs_server"])
def test_f37_when_ray_itself_dies_the_run_ends_and_the_next_one_resumes(
    arguments: Arguments, tmp_path: Path, part: str
) -> None:
    """Without the GCS, tasks run on for a minute; then Ray ends the run."""
    storage = tmp_path / "storage"
    arguments = (*arguments, "--set", "download.shard_size=15", "--set", "download.tasks_in_flight=1")
    command = [*map(str, arguments), "--storage", str(storage)]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", *command],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while not list(storage.glob("images/*/*.parquet")):
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        [victim] = [pid for pid, line in descendants(process.pid).items() if line.partition(" ")[0].endswith(part)]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(timeout=300) not in (0, None), log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "killed" in call("status", "--storage", storage).stdout or "run the same command again" in log.read_text()
    refresh(storage, arguments)
    refresh(tmp_path / "undisturbed", arguments)  # with the same shards, as images are embedded in batches of a shard
    assert content(storage) == content(tmp_path / "undisturbed")


@pytest.mark.slow
def test_f39_when_tasks_run_out_of_memory_the_run_ends_and_the_next_one_resumes(
    undisturbed: Path, arguments: Arguments, tmp_path: Path
) -> None:
    """Ray's memory monitor kills every task, since its threshold is next to zero."""
    storage = tmp_path / "storage"
    nothing = {
        "RAY_memory_usage_threshold": "0.001",
        "RAY_memory_monitor_refresh_ms": "100",
        "RAY_task_oom_retries": "1",
    }
    result = call_apart(*arguments, "--storage", storage, **nothing)
    assert result.returncode == 1 and "run the same command again" in result.stderr, result.stdout + result.stderr
    refresh(storage, arguments)
    assert content(storage) == content(undisturbed)


@pytest.mark.slow
def test_f39_a_small_object_store_is_enough(undisturbed: Path, arguments: Arguments, tmp_path: Path) -> None:
    """Images and embeddings go to the storage, not through Ray."""
    refresh(tmp_path, arguments, RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES=str(80 << 20))
    assert content(tmp_path) == content(undisturbed)


@pytest.mark.slow
def test_f40_when_ray_loses_messages_the_tables_are_the_same(
    undisturbed: Path, arguments: Arguments, tmp_path: Path
) -> None:
    rare = {"num_failures": -1, "req_failure_prob": 10, "resp_failure_prob": 10, "in_flight_failure_prob": 5}
    chaos = {f"{service}.grpc_client.{method}": rare for service, method in LOST}
    refresh(tmp_path, arguments, RAY_testing_rpc_failure=json.dumps(chaos))
    assert content(tmp_path) == content(undisturbed)


def rows_by_file(table_uri: str) -> dict[str, int]:
    return {uri: tables.read_file(uri, ["key"]).num_rows for uri in tables.files(table_uri)}


# The last test, since it changes the storage that the others compare with.
def test_f34_f84_a_refresh_costs_what_changed_and_rows_taken_down_stay_away(
    undisturbed: Path, grown: Arguments, server: SceneServer
) -> None:
    before = facts_of(undisturbed, "curate")["snapshot"]
    files_before = {name: rows_by_file(before[name]) for name in ("images", "embeddings")}
    num_listed, num_embedded = sum(files_before["images"].values()), sum(files_before["embeddings"].values())
    assert num_listed >= 300 and num_embedded == 300

    # Count requests and rows in new files, rather than trust what the run reports.
    server.requests.clear()
    printed = refresh(undisturbed, grown)
    assert "313 in = 303 kept" in printed
    image_paths = [path for path in server.requests.elements() if "robots.txt" not in path]
    new = {
        name: sum(rows for uri, rows in rows_by_file(before[name]).items() if uri not in files_before[name])
        for name in files_before
    }
    assert sorted(path.rpartition("/")[2] for path in image_paths) == ["300.jpg", "301.jpg", "302.jpg"]
    assert new == {"images": 3, "embeddings": 3} and 3 <= 0.03 * 300 and server.requests.total() <= 0.03 * num_listed
    assert facts_of(undisturbed, "download")["fetched_now"] == 3 == facts_of(undisturbed, "embed")["embedded_now"]

    listed = call("data", "list", "--storage", undisturbed).stdout.splitlines()
    assert len(listed) == 2 and "300 kept" in listed[0] and "303 kept" in listed[1]
    changed = call("data", "diff", "1", "--keys", "--storage", undisturbed).stdout
    assert "3  absent -> kept" in changed
    left, key = (line.strip() for line in changed.splitlines()[-2:])
    shown = call("data", "show", key, "--storage", undisturbed).stdout
    assert f"http://{SCENES.address}/" in shown and "clip_score" in shown
    assert "runs that had it" in shown and "version 2" in shown and "no model" in shown

    snapshot = facts_of(undisturbed, "curate")["snapshot"]
    images = tables.read(snapshot["images"])
    jpg = images.filter(pc.equal(images["key"], key))["jpg"].to_pylist()[0]
    taken = call("takedown", "--key", key, "--storage", undisturbed)
    assert taken.returncode == 0 and "1 rows taken down" in taken.stdout and "  tiny  curate" in taken.stdout, (
        taken.stderr
    )
    assert not holders(jpg, undisturbed)
    record(Store(str(undisturbed)), [Tombstone("key", left)], None)  # as for a run that died before it carried it out
    server.requests.clear()
    printed = refresh(undisturbed, grown)
    assert f"takedown carried out (key {left}): 1 rows" in printed
    assert "313 in = 301 kept" in printed and "taken_down" in printed
    assert not recorded(Store(str(undisturbed))) and left not in tables.read(snapshot["images"])["key"].to_pylist()
    assert not server.requests and facts_of(undisturbed, "embed")["embedded_now"] == 0
    again = call(*grown, "--storage", undisturbed)
    assert again.returncode == 0 and "nothing was started" in again.stdout
    assert len(call("data", "list", "--storage", undisturbed).stdout.splitlines()) == 3
    assert key not in (undisturbed / "results" / "tiny" / "report.html").read_text()
