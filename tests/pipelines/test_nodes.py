"""The data stages on three nodes: tasks run on all of them, and nodes that are lost change no table."""

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from ray.cluster_utils import Cluster

from pipelines.scene_server import ScenesConfig, serve, write_url_list
from tasks import tables
from tests.pipelines.command_line import ROOT
from tests.pipelines.data_stages import NUM_NODES, OPEN, STAGES, Job
from unclip import files
from unclip.models import clip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_FILES = 4
"""Files of the list."""
STORE_BYTES = 80 << 20
SETTINGS = {
    # Even small pieces go to the object store of a node, so that they are lost with it.
    "RAY_max_direct_call_object_size": "0",
    "RAY_health_check_period_ms": "500",
}


@dataclasses.dataclass
class Nodes:
    """Ray nodes on this machine: a head without CPUs, and nodes with one CPU each."""

    cluster: Cluster
    working: dict[str, Any]
    """Nodes with a CPU by their id."""

    def add(self) -> str:
        node = self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        self.working[node.node_id] = node
        return str(node.node_id)

    def kill(self, node_id: str) -> None:
        self.cluster.remove_node(self.working.pop(node_id), allow_graceful=False)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = Nodes(cluster, {})
        for _ in range(NUM_NODES):
            nodes.add()
        yield nodes
    finally:
        cluster.shutdown()


@dataclasses.dataclass(frozen=True)
class Given:
    """A list, its server and a CLIP."""

    urls: str
    allow_host: str
    clip: str


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    folder = tmp_path_factory.mktemp("given")
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        scenes = ScenesConfig(num_images=150, broken=0.1, side=64, port=probe.getsockname()[1])
    write_url_list(scenes, str(folder / "all.parquet"))
    listed = tables.read_file(str(folder / "all.parquet"))
    for number in range(NUM_FILES):
        part = listed.take(pa.array(range(number, listed.num_rows, NUM_FILES)))
        tables.write_file(str(folder / "list" / f"{number}.parquet"), part)
    torch.manual_seed(0)
    clip.save(clip.create("unclip-demo", None), "unclip-demo", folder / "clip")
    with serve(scenes):
        yield Given(str(folder / "list"), scenes.address, str(folder / "clip"))


class Stages:
    """The process that runs the data stages."""

    def __init__(self, nodes: Nodes, given: Given, folder: Path) -> None:
        self.nodes, self.storage, self.started = nodes, folder / "storage", folder / "started"
        job = Job(nodes.cluster.address, str(self.storage), str(self.started), given.urls, given.allow_host, given.clip)
        self.log = folder / "log"
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "tests.pipelines.data_stages", *dataclasses.astuple(job)]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def steps(self) -> set[Path]:
        """Folders of the steps that have a task which has started."""
        return {path.parent for path in self.started.glob("*/*/*.json")}

    def ended(self) -> bool:
        code = self.process.poll()
        assert code in (None, 0), self.log.read_text()
        return code is not None


def nodes_of(step: Path, pattern: str = "*.json") -> list[str]:
    """Nodes that run, or have run, tasks of a step; one entry for each task."""
    return [files.read_json(str(path)) for path in sorted(step.glob(pattern), key=lambda path: path.stat().st_mtime_ns)]


def content(storage: Path) -> dict[str, Any]:
    """Digests of all tables and stages by their names, which must not depend on the nodes."""
    found: dict[str, Any] = {}
    for path in sorted(storage.glob("artifacts/**/*")):
        if path.suffix == ".parquet":
            found[str(path.relative_to(storage))] = tables.content_digest(tables.read_file(str(path)))
        elif path.is_file() and path.suffix != ".tmp" and path.name != "plan.json":  # the plan names a version
            found[str(path.relative_to(storage))] = files.sha256(path.read_bytes())
    for kind in ("images", "index", "embeddings"):
        for table in (storage / kind).iterdir():
            for uri in tables.files(str(table)):
                found[str(Path(uri).relative_to(storage))] = tables.content_digest(tables.read_file(uri))
    for path in storage.glob("stages/*/*.json"):
        artifact = files.read_json(str(path))
        counts = {name: artifact["facts"].get(name) for name in ("rows", "reasons", "fetched_now", "embedded_now")}
        found[artifact["stage"]] = (artifact["digest"], counts)
    return found


@pytest.fixture(scope="module")
def undisturbed(given: Given, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tables that one node makes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for stage in STAGES:
        (folder / "started" / stage).mkdir(parents=True)
        (folder / "started" / stage / OPEN).touch()
    job = Job("local", str(folder / "storage"), str(folder / "started"), given.urls, given.allow_host, given.clip)
    command = [sys.executable, "-m", "tests.pipelines.data_stages", *dataclasses.astuple(job)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = content(folder / "storage")
    assert set(STAGES) < set(found)
    return found


def test_tasks_of_every_data_stage_run_on_all_nodes_but_the_head(
    nodes: Nodes, given: Given, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with Stages(nodes, given, tmp_path) as stages:
        for stage in STAGES:
            folder = stages.started / stage
            while set(nodes_of(folder, "*/*.json")) < set(nodes.working):
                assert not stages.ended(), f"{stage}: tasks ran on {nodes_of(folder, '*/*.json')}"
                time.sleep(0.05)
            (folder / OPEN).touch()
        while not stages.ended():
            time.sleep(0.05)
    for stage in STAGES:
        assert set(nodes_of(stages.started / stage, "*/*.json")) == set(nodes.working), stage
    assert content(stages.storage) == undisturbed
