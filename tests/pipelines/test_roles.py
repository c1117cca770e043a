"""The roles of the shipped Kubernetes files, simulated by nodes with their labels: tasks run where their needs are met."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ray.cluster_utils import Cluster

from pipelines.scene_server import ScenesConfig, serve, write_url_list
from tests.pipelines.command_line import ROOT
from tests.pipelines.data_stages import OPEN, STAGES, Job
from tests.pipelines.test_nodes import STORE_BYTES, command, head_without_cpus, nodes_of
from unclip.models import clip

pytestmark = pytest.mark.timeout(600)

MANIFEST = yaml.safe_load((ROOT / "infra" / "kubernetes" / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
GROUPS = {group["groupName"]: group for group in MANIFEST["workerGroupSpecs"]}


@dataclasses.dataclass
class Roles:
    """A head, and nodes for the pods of the shipped groups, with two CPUs each."""

    cluster: Cluster
    ids: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, role: str, share: float = 0.7, name: str | None = None) -> None:
        """Add a node for a pod of a group, with the share of the pod's memory that Ray gives to tasks."""
        [container] = GROUPS[role]["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        memory = int(share * int(limits["memory"].removesuffix("Gi")) * (1 << 30))
        offered: dict[str, Any] = {"labels": GROUPS[role]["labels"], "num_gpus": int(limits.get("nvidia.com/gpu", 0))}
        node = self.cluster.add_node(num_cpus=2, memory=memory, object_store_memory=STORE_BYTES, **offered)
        self.ids[name or role] = node.node_id


@pytest.fixture
def roles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Roles]:
    with head_without_cpus(monkeypatch, labels=MANIFEST["headGroupSpec"]["labels"]) as cluster:
        roles = Roles(cluster)
        roles.add("data")
        yield roles


@pytest.mark.slow
def test_f114_tasks_run_on_the_pods_that_offer_what_they_need(roles: Roles, tmp_path: Path) -> None:
    scenes = ScenesConfig(num_images=120, broken=0.0, side=64, port=8772)
    write_url_list(scenes, str(tmp_path / "list.parquet"))
    torch.manual_seed(0)
    clip.save(clip.create("unclip-demo", None), "unclip-demo", tmp_path / "clip")
    started = tmp_path / "started"
    for stage in STAGES:
        (started / stage).mkdir(parents=True)
        (started / stage / OPEN).touch()
    roles.add("gpu", share=0.1, name="small")  # it has a GPU, and less memory than a worker needs
    roles.add("gpu")
    given = (str(tmp_path / "list.parquet"), scenes.address, str(tmp_path / "clip"))
    job = Job(roles.cluster.address, str(tmp_path / "storage"), str(started), *given, until="embed", gpus="1", gib="32")
    with serve(scenes):
        result = subprocess.run(command(job), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    downloads = nodes_of(started / "download" / "_download_shard")
    assert len(downloads) >= 4 and set(downloads) == {roles.ids["data"]}, "only these pods reach the internet"
    embeddings = nodes_of(started / "embed" / "embed")
    assert embeddings and set(embeddings) == {roles.ids["gpu"]}
    others = set(nodes_of(started, "*/*/*.json"))
    assert others <= set(roles.ids.values()), "the head runs no tasks"


@pytest.mark.slow
def test_f115_a_run_waits_for_a_gpu_node_that_autoscaling_starts(roles: Roles, pairs: Path, tmp_path: Path) -> None:
    settings = [f"ingest.urls={pairs}", "resources.gpus_per_worker=1", "resources.gib_per_worker=32"]
    environment = {**os.environ, "RAY_ADDRESS": roles.cluster.address, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"

    def start(wait_seconds: int) -> subprocess.Popen[str]:
        sets = [word for each in (*settings, f"cluster.wait_seconds={wait_seconds}") for word in ("--set", each)]
        arguments = ["run", "text_to_image", *sets, "--storage", str(tmp_path / "storage")]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", *arguments],
            cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True,
        )  # fmt: skip

    process = start(2)
    printed, error = process.communicate()
    assert process.returncode == 2, error
    waiting = re.search(
        r"waiting up to 2 s \(cluster.wait_seconds\) for nodes to join: (.*), and \d others lack", printed
    )
    assert waiting and re.fullmatch(r"one worker of \S+ needs 1 GPU, but the cluster has 0 in total", waiting[1]), (
        printed
    )
    [line] = error.strip().splitlines()
    assert line.startswith(f"error: resources: {waiting[1]}, after 2 s. ") and "raise cluster.wait_seconds" in line

    process = start(300)
    assert process.stdout is not None
    while "waiting up to 300 s" not in (text := process.stdout.readline()):
        assert text, process.communicate()[1]
    roles.add("gpu")
    _, error = process.communicate(timeout=200)
    expected = "error: filter failed: filter: none of 1 rows is kept (blocked_address 1). "  # it went on as far as that
    assert [line for line in error.splitlines() if line.startswith(expected)], error
    assert process.returncode == 1
