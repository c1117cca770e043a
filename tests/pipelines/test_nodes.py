"""The data stages on three nodes: tasks run on all of them, and nodes that are lost change no table."""

import contextlib
import dataclasses
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.cluster_utils import Cluster

from pipelines.scene_server import ScenesConfig, serve, write_url_list
from tasks import ranges, tables
from tasks.stage import Artifact, Call, Run, execute
from tasks.stages.ingest import IngestConfig, ingest
from tasks.tracking import Tracker
from tests.pipelines.command_line import ROOT
from tests.pipelines.data_stages import NUM_NODES, OPEN, ROWS_PER_RANGE, STAGES, Job
from unclip import files
from unclip.models import clip

pytestmark = pytest.mark.timeout(1800)

LOST_DURING = (
    "ingest/_read_group", "ingest/_clean_and_split", "ingest/_write_range", "download/_find_missing",
    "download/_write_shards", "download/_download_shard", "download/_merge", "filter/_write_frequent",
    "filter/_filter_range", "dedup/_compare_equal_hashes", "dedup/_use_found", "embed/embed", "curate/_write_scores",
    "curate/_decide_groups", "curate/_captions_trained_on", "report/summarise_range",
)  # fmt: skip
"""Steps that lose a node; where they merge pieces, the node also held some of these."""

SCENES = ScenesConfig(num_images=150, broken=0.1, side=64)
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


@contextlib.contextmanager
def head_without_cpus(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Cluster]:
    """Cluster of this block, which has a head only; apart from other clusters of this machine."""
    folder = tempfile.mkdtemp(prefix="unclip-", dir="/tmp")  # a short path, for sockets
    monkeypatch.setenv("RAY_TMPDIR", folder)
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False, **options}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    with head_without_cpus(monkeypatch) as cluster:
        nodes = Nodes(cluster, {})
        for _ in range(NUM_NODES):
            nodes.add()
        yield nodes


@dataclasses.dataclass(frozen=True)
class Given:
    """A list, its server and a CLIP."""

    urls: str
    allow_host: str
    clip: str


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A list of several files; nothing is served."""
    folder = tmp_path_factory.mktemp("listed")
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        scenes = dataclasses.replace(SCENES, port=probe.getsockname()[1])
    write_url_list(scenes, str(folder / "all.parquet"))
    rows = tables.read_file(str(folder / "all.parquet"))
    for number in range(NUM_FILES):
        part = rows.take(pa.array(range(number, rows.num_rows, NUM_FILES)))
        tables.write_file(str(folder / "list" / f"{number}.parquet"), part)
    return Given(str(folder / "list"), scenes.address, "")


@pytest.fixture(scope="module")
def given(listed: Given, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    import torch

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    clip.save(clip.create("unclip-demo", None), "unclip-demo", folder)
    with serve(dataclasses.replace(SCENES, port=int(listed.allow_host.rpartition(":")[2]))):
        yield dataclasses.replace(listed, clip=str(folder))


def command(job: Job) -> list[str]:
    return [sys.executable, "-m", "tests.pipelines.data_stages", *dataclasses.astuple(job)]


class Stages:
    """The process that runs the data stages on nodes."""

    def __init__(self, nodes: Nodes, given: Given, folder: Path, until: str = STAGES[-1]) -> None:
        self.storage, self.started, self.log = folder / "storage", folder / "started", folder / "log"
        job = Job(nodes.cluster.address, str(self.storage), str(self.started), *dataclasses.astuple(given), until)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command(job), cwd=ROOT, stdout=log, stderr=log)

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


def nodes_of(folder: Path, pattern: str = "*.json") -> list[str]:
    """Node of each task that has started, in this order."""
    started = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    return [files.read_json(str(path)) for path in started]


def lose_nodes(stages: Stages, nodes: Nodes, steps: Sequence[str], replaced: bool) -> list[str]:
    """Run the stages to their end, and kill a node that runs a task of each of these steps; returns the steps.

    Args:
        replaced: a new node joins before the step goes on, rather than at the next loss.
    """
    lost: list[str] = []
    opened: set[Path] = set()
    while not stages.ended():
        for step in stages.steps() - opened:
            name = f"{step.parent.name}/{step.name}"
            if name in steps:
                while len(nodes.working) < NUM_NODES:
                    nodes.add()
                nodes.kill(nodes_of(step)[0])
                if replaced:
                    nodes.add()
                lost.append(name)
            (step / OPEN).touch()
            opened.add(step)
        time.sleep(0.02)
    return lost


def content(storage: Path) -> dict[str, Any]:
    """Digests of all tables and stages by their names, which must not depend on the nodes."""
    found: dict[str, Any] = {}
    for path in sorted(storage.glob("artifacts/**/*")):
        if path.suffix == ".parquet":
            found[str(path.relative_to(storage))] = tables.content_digest(tables.read_file(str(path)))
        elif path.name == "generation.json":
            document = files.read_json(str(path))
            del document["identities"]  # of tables; they are random
            found[str(path.relative_to(storage))] = document
        elif path.is_file() and path.suffix != ".tmp" and path.name != "plan.json":  # the plan names a version
            found[str(path.relative_to(storage))] = files.sha256(path.read_bytes())
    for kind in ("images", "index", "embeddings"):
        for table in storage.glob(f"{kind}/*"):
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
    job = Job("local", str(folder / "storage"), str(folder / "started"), *dataclasses.astuple(given))
    result = subprocess.run(command(job), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = content(folder / "storage")
    assert set(STAGES) < set(found)
    return found


def wait_for_all_nodes(stages: Stages, nodes: Nodes, stage: str) -> None:
    """Wait until every node runs a task of a stage; the tasks wait at their gates."""
    folder = stages.started / stage
    while not set(nodes.working) <= set(nodes_of(folder, "*/*.json")):
        assert not stages.ended(), f"{stage}: tasks ran on {nodes_of(folder, '*/*.json')}"
        time.sleep(0.02)


@pytest.mark.slow
def test_f48_ingest_runs_on_all_nodes_and_a_lost_node_changes_no_table(
    nodes: Nodes, listed: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = set(nodes.working)
    with Stages(nodes, listed, tmp_path, until="ingest") as stages:
        wait_for_all_nodes(stages, nodes, "ingest")
        assert lose_nodes(stages, nodes, ["ingest/_write_range"], replaced=False) == ["ingest/_write_range"]
    assert set(nodes_of(stages.started, "*/*/*.json")) == working, "the head runs no tasks"
    monkeypatch.setattr(ranges, "ROWS_PER_RANGE", ROWS_PER_RANGE)
    run = Run("r1", "test", str(tmp_path / "alone"), Tracker("", ""), "0")
    alone = execute(Call(ingest, IngestConfig(listed.urls)), run, [])  # a small list is read in this process
    assert isinstance(alone, Artifact) and ranges.range_count(alone.uri) > NUM_NODES
    found = content(stages.storage)
    assert found == content(tmp_path / "alone") and "ingest" in found


@pytest.mark.slow
def test_tasks_of_every_data_stage_run_on_all_nodes_but_the_head(
    nodes: Nodes, given: Given, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with Stages(nodes, given, tmp_path) as stages:
        for stage in STAGES:
            wait_for_all_nodes(stages, nodes, stage)
            (stages.started / stage / OPEN).touch()
        while not stages.ended():
            time.sleep(0.02)
    assert set(nodes_of(stages.started, "*/*/*.json")) == set(nodes.working), "the head runs no tasks"
    assert content(stages.storage) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [True, False])
def test_f48_nodes_that_are_lost_in_every_data_stage_change_no_table(
    nodes: Nodes, given: Given, undisturbed: dict[str, Any], tmp_path: Path, replaced: bool
) -> None:
    with Stages(nodes, given, tmp_path) as stages:
        assert sorted(lose_nodes(stages, nodes, LOST_DURING, replaced)) == sorted(LOST_DURING)
    assert content(stages.storage) == undisturbed
