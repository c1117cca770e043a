"""Preemption of a node, such as a spot machine: the training writes a checkpoint first and resumes on another node."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unclip import files

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = 10**9

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


ADDRESS = "127.0.0.1:6397"
WORKING_NODES = """
import ray
ray.init(address="auto", logging_level="ERROR")
print(*(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")))
"""


class Cluster:
    """Ray nodes on this machine, started by `ray start`."""

    def __init__(self, folder: Path) -> None:
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ADDRESS": ADDRESS}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **access, "PATH": path, "RAY_TMPDIR": f"/tmp/unclip-{os.getpid()}"}
        self.log = folder / "nodes.log"
        self.nodes: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str) -> None:
        with self.log.open("ab") as log:
            command = ["ray", "start", "--block", "--node-ip-address=127.0.0.1", *options]
            node = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.nodes.append(node)

    def working_nodes(self) -> list[str]:
        command = [sys.executable, "-c", WORKING_NODES]
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return result.stdout.split() if result.returncode == 0 else []

    def stop(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(self.environment["RAY_TMPDIR"], ignore_errors=True)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes; the first runs no tasks."""
    cluster = Cluster(tmp_path)
    try:
        cluster.start("--head", f"--port={ADDRESS.split(':')[1]}", "--num-cpus=0", "--include-dashboard=false")
        cluster.start(f"--address={ADDRESS}", "--num-cpus=2")
        while not cluster.working_nodes():
            assert cluster.nodes[0].poll() is None, cluster.log.read_text()
        yield cluster
    finally:
        cluster.stop()


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)


def test_a_training_on_a_preempted_node_resumes_on_another(cluster: Cluster, tmp_path: Path) -> None:
    unclip = [sys.executable, "-m", "pipelines"]
    common = ["tiny", "--storage", str(tmp_path), "--set", "scenes.port=8790"]
    subprocess.run([*unclip, "run", *common, "--until", "curate"], cwd=ROOT, check=True)
    settings = {"num_samples": 400_000, "checkpoint_samples": ENDLESS, "validation_rows": 0}
    changes = [word for name, value in settings.items() for word in ("--set", f"prior.trainer.{name}={value}")]
    command = [*unclip, "train", "prior", *common, *changes, "--on-ray"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=cluster.environment, stdout=pipe, stderr=pipe, text=True)

    def samples_seen() -> int:
        counts = [files.read_json(str(path))["done"] for path in tmp_path.glob("runs/*/progress/prior.json")]
        return max(counts, default=0)

    def checkpoints() -> list[int]:
        return sorted(int(path.parent.name) for path in tmp_path.glob("artifacts/prior/*/checkpoints/*/manifest.json"))

    try:
        until(lambda: samples_seen() > 0, process)
        assert not checkpoints()
        [node] = cluster.working_nodes()
        drain = ["ray", "drain-node", "--address", ADDRESS, "--node-id", node, "--reason-message", "spot"]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "30"]
        subprocess.run(drain, env=cluster.environment, check=True)
        until(lambda: len(checkpoints()) == 1, process)
        [saved] = checkpoints()
        cluster.start(f"--address={ADDRESS}", "--num-cpus=2")
        until(lambda: node not in cluster.working_nodes(), process)
        until(lambda: samples_seen() > saved, process)
        before = samples_seen()
        until(lambda: samples_seen() != before, process)
    finally:
        process.terminate()
        printed = process.communicate()[1]
    assert process.returncode == 75, printed
    assert saved < checkpoints()[-1]
