"""Faults during training: it resumes from the last checkpoint and ends with the same model (F41 to F47)."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import lock as locks
from tasks import tables
from tests.pipelines.command_line import call_apart, call_json, read_record
from tests.tasks.datasets import holders
from tests.unclip.training import trained_on_workers
from tests.unclip.training.trained_on_workers import attempt, losses
from unclip import files
from unclip.training.checkpoints import MANIFEST

ROOT = Path(__file__).resolve().parents[2]
BATCH, CHECKPOINT, LENGTH = 32, 320, 3200
LAST = LENGTH - CHECKPOINT
"""Samples seen at the second-to-last checkpoint."""
SETTINGS = {"num_samples": LENGTH, "checkpoint_samples": CHECKPOINT, "log_samples": BATCH, "keep_checkpoints": 20}
SCENES = "--set=scenes.port=8775"

pytestmark = pytest.mark.timeout(900)


# ---- in a storage with a dataset ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with everything needed to train the prior of the tiny pipeline."""
    storage = tmp_path_factory.mktemp("dataset") / "storage"
    command = [sys.executable, "-m", "pipelines", "run", "tiny", "--until", "curate", SCENES, "--storage", storage]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return storage


def start(storage: Path, *options: str, log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start training the prior by command, in its own process group, with its output in `log`."""
    changes = [SCENES, *(f"--set=prior.trainer.{name}={value}" for name, value in SETTINGS.items())]
    command = [sys.executable, "-m", "pipelines", "train", "prior", "tiny", *changes, *options, "--storage", storage]
    with log.open("w") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )


def train(storage: Path, *options: str, log: Path, environment: dict[str, str] | None = None) -> str:
    """Train the prior to the end; return the digest of the model."""
    with ended(start(storage, *options, log=log, environment=environment)) as process:
        assert process.wait() == 0, log.read_text()
    [record] = storage.glob("stages/prior/*.json")
    return str(json.loads(record.read_text())["digest"])


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Kill the process group at the end of the block."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def undisturbed(storage: Path, *options: str, log: Path) -> str:
    """Train without faults; return the digest of the model and delete it."""
    digest = train(storage, *options, log=log)
    forget(storage)
    return digest


def forget(storage: Path) -> None:
    for folder in ("stages", "artifacts"):
        shutil.rmtree(storage / folder / "prior", ignore_errors=True)


def committed(storage: Path) -> list[int]:
    """Return the samples seen of every committed checkpoint."""
    return sorted(int(path.parent.name) for path in storage.glob(f"artifacts/prior/*/checkpoints/*/{MANIFEST}"))


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], log: Path) -> None:
    while not condition():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)


def points(tracking_uri: str, name: str = "loss") -> list[tuple[int, float]]:
    """Return the points (samples seen, value) of the newest training in MLflow, in logged order."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    [run, *_] = client.search_runs(
        [experiment.experiment_id], "tags.mlflow.runName = 'prior'", order_by=["start_time DESC"]
    )
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_f41_when_ray_workers_are_killed_the_run_resumes_by_itself(
    dataset: Path, tmp_path: Path, parallel: str
) -> None:
    """Kills rank 0 right after a commit, and rank 1 while it writes its part of a later checkpoint."""
    forget(dataset)
    options = ("--on-ray", "--set=resources.num_workers=2", f"--set=prior.trainer.parallel={parallel}")
    expected = undisturbed(dataset, *options, log=tmp_path / "log")
    values = dict(points(f"sqlite:///{dataset}/mlflow.db"))
    armed = tmp_path / "armed"
    armed.mkdir()
    (armed / "first").write_text(rf"^after .*/prior/.*/{CHECKPOINT:012d}/{MANIFEST}")
    (armed / "other").write_text(rf"^within .*/prior/.*/{LAST:012d}/rank-00001[.]")
    digest = train(dataset, *options, log=tmp_path / "log", environment={"UNCLIP_FAILPOINTS": str(armed)})
    assert not list(armed.iterdir()), "no worker was killed"
    assert digest == expected
    logged = points(f"sqlite:///{dataset}/mlflow.db")
    assert all(values[step] == value for step, value in logged), "a loss differs"
    steps = [step for step, _ in logged]  # a killed process may not have sent its last points
    assert steps[-2 * (CHECKPOINT // BATCH) :] == list(range(LAST - CHECKPOINT + BATCH, LENGTH + 1, BATCH))
    assert all(steps.count(step) <= 1 for step in range(CHECKPOINT + 1)), "committed steps were trained again"


@pytest.mark.slow
def test_f41_when_the_only_worker_is_killed_the_run_resumes_by_itself(dataset: Path, tmp_path: Path) -> None:
    """On one machine, it is a task of Ray."""
    forget(dataset)
    log, armed = tmp_path / "log", tmp_path / "armed"
    expected = undisturbed(dataset, "--on-ray", log=log)
    armed.mkdir()
    (armed / "1").write_text(rf"^after .*/prior/.*/{CHECKPOINT:012d}/{MANIFEST}")
    assert train(dataset, "--on-ray", log=log, environment={"UNCLIP_FAILPOINTS": str(armed)}) == expected
    assert not list(armed.iterdir()), "no worker was killed"
    steps = [step for step, _ in points(f"sqlite:///{dataset}/mlflow.db")]
    assert steps[-1] == LENGTH and all(steps.count(step) <= 1 for step in range(CHECKPOINT + 1))


@pytest.mark.slow
def test_f41_when_the_driver_is_killed_the_same_command_resumes(dataset: Path, tmp_path: Path) -> None:
    forget(dataset)
    options = ("--on-ray", "--set=resources.num_workers=2")
    expected = undisturbed(dataset, *options, log=tmp_path / "log")
    with ended(start(dataset, *options, log=tmp_path / "log")) as process:
        wait_for(lambda: len(committed(dataset)) >= 2, process, tmp_path / "log")
        process.kill()
    before = committed(dataset)
    assert LENGTH not in before, "the training ended before it could be killed"
    assert train(dataset, *options, log=tmp_path / "log") == expected
    steps = [step for step, _ in points(f"sqlite:///{dataset}/mlflow.db")]
    assert steps == list(range(steps[0], LENGTH + 1, BATCH))
    assert steps[0] > before[-1] and steps[0] % CHECKPOINT == BATCH, "did not resume from the last commit"


@pytest.mark.slow
def test_f46_on_ray_a_hung_worker_is_named_and_replaced(dataset: Path, tmp_path: Path) -> None:
    forget(dataset)
    options = ("--on-ray", "--set=resources.num_workers=2", "--set=prior.trainer.hang_seconds=20")
    expected = undisturbed(dataset, *options, log=tmp_path / "log")
    with ended(start(dataset, *options, log=tmp_path / "log")) as process:
        wait_for(lambda: committed(dataset), process, tmp_path / "log")
        [mark] = dataset.glob("artifacts/prior/*/workers/rank-00001.json")
        stopped = json.loads(mark.read_text())["pid"]
        os.kill(stopped, signal.SIGSTOP)
        assert LENGTH not in committed(dataset), "the training ended before it could be stopped"
        assert process.wait() == 0, (tmp_path / "log").read_text()
    [record] = dataset.glob("stages/prior/*.json")
    assert json.loads(record.read_text())["digest"] == expected
    [hung] = dataset.glob("artifacts/prior/*/hung.json")
    message = json.loads(hung.read_text())["message"]
    assert f"worker 1 (process {stopped} on " in message and "does not respond" in message


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Replace a folder by a small file system with the same content."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        shutil.copytree(copy, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(copy)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--on-ray",)], ids=["here", "on Ray"])
def test_f30_when_the_disk_is_full_a_training_says_so_and_resumes_later(
    dataset: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """The whole storage is on this disk, so the MLflow database, progress and records cannot be written either."""
    forget(dataset)
    log = tmp_path / "log"
    with small_disk(dataset, "1g"):
        expected = undisturbed(dataset, *options, log=log)
        with ended(start(dataset, *options, log=log)) as process:
            wait_for(lambda: committed(dataset), process, log)
            fill(dataset / "ballast")
            assert process.wait() != 0
        before, printed = committed(dataset), log.read_text()
        assert before and LENGTH not in before
        said = [line for line in printed.splitlines() if "checkpoints/" in line and "No space left on device" in line]
        assert said and "Free space or fix the folder, and run the same command again." in said[-1], printed
        assert "sqlalche.me" not in printed, "MLflow's tracebacks bury it"
        (dataset / "ballast").unlink()
        assert train(dataset, *options, log=log) == expected
        # a copy: MLflow may still have the original file open from before the mount
        database = shutil.copy(dataset / "mlflow.db", tmp_path)
        steps = [step for step, _ in points(f"sqlite:///{database}")]
        assert steps == list(range(before[-1] + BATCH, LENGTH + 1, BATCH)), log.read_text()


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """Start an MLflow server, wait until it answers and yield its address."""
    address = f"http://127.0.0.1:{port}"
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=log, text=True, start_new_session=True
        )
    with ended(process):
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                break
            time.sleep(0.1)
        yield address


@pytest.mark.slow
def test_f44_a_training_does_not_wait_for_mlflow_which_gets_all_points_once(dataset: Path, tmp_path: Path) -> None:
    """The server stops after the first checkpoint and returns when the model is finished."""
    forget(dataset)
    log, port = tmp_path / "log", 8773
    with contextlib.ExitStack() as stack:
        with mlflow_server(tmp_path, port) as address:
            environment = {"MLFLOW_TRACKING_URI": address}
            process = stack.enter_context(ended(start(dataset, log=log, environment=environment)))
            wait_for(lambda: committed(dataset), process, log)
        assert LENGTH not in committed(dataset), "the training ended before the server stopped"
        wait_for(lambda: list(dataset.glob(f"artifacts/prior/*/model/{MANIFEST}")), process, log)
        stack.enter_context(mlflow_server(tmp_path, port))
        assert process.wait() == 0, log.read_text()
        logged = points(address)
    assert [step for step, _ in logged] == list(range(BATCH, LENGTH + 1, BATCH))
    assert not list(dataset.glob("artifacts/prior/*/unlogged.json"))


@pytest.mark.slow
def test_f90_a_password_of_mlflow_reaches_neither_its_records_nor_the_storage_nor_logs(
    dataset: Path, tmp_path: Path
) -> None:
    """The server accepts any password. Ray Train records what its workers get, so it trains."""
    forget(dataset)
    canary, log, port = "c4n4ry", tmp_path / "log", 8774
    scratch = Path(f"/tmp/unclip-{os.getpid()}-ray")  # socket paths must be short
    with mlflow_server(tmp_path, port) as address:
        uri = address.replace("//", f"//me:{canary}@")
        try:
            options = ("--on-ray", "--set=resources.num_workers=2", f"--set=tracking_uri={uri}")
            train(dataset, *options, log=log, environment={"RAY_TMPDIR": str(scratch)})
            assert list(scratch.rglob("worker-*")), "Ray's logs are elsewhere"
            assert not holders(canary.encode(), scratch, dataset, tmp_path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        assert len(points(address)) == LENGTH // BATCH


@pytest.mark.slow
def test_f75_f77_a_training_a_refresh_and_a_takedown_work_side_by_side(dataset: Path, tmp_path: Path) -> None:
    """The last test with this storage, since it takes rows down."""
    forget(dataset)
    log, endless = tmp_path / "log", "--set=prior.trainer.num_samples=100000000"
    [path] = dataset.glob("stages/curate/*.json")
    record = read_record(dataset, "stages", "curate", path.name)
    images = record["facts"]["images"]
    read = {uri: files.read(uri) for uri in tables.files(images, record["facts"]["images_version"])}
    kept = record["facts"]["snapshot"]["heldout"]
    [own, *_] = tables.read_file(kept)["key"].to_pylist()
    arguments = ("tiny", SCENES, "--storage", dataset)
    with ended(start(dataset, endless, log=log)) as training:
        wait_for(lambda: committed(dataset), training, log)
        again = call_apart("train", "prior", *arguments, *training.args[7:-2])
        assert again.returncode == 75 and f"making the same result of prior (pid {training.pid}" in again.stderr

        refreshed = call_apart("refresh", *arguments, "--set=scenes.num_images=130")
        assert refreshed.returncode == 0, refreshed.stderr
        before = {row["key"] for uri in read for row in tables.read_file(uri, ["key"]).to_pylist()}
        [new, *_] = sorted(set(tables.read(images, columns=["key"])["key"].to_pylist()) - before)

        assert call_json("takedown", "--key", new, "--storage", dataset)["deleted"][f"images/{Path(images).name}"] == 1
        assert {uri: files.read(uri) for uri in read} == read
        last = committed(dataset)[-1]  # older ones are deleted
        wait_for(lambda: committed(dataset)[-1] > last, training, log)

        assert call_json("takedown", "--key", own, "--storage", dataset)["deleted"][f"images/{Path(images).name}"] == 1
        assert own not in tables.read(images, columns=["key"])["key"].to_pylist()
        assert not all(Path(uri).exists() for uri in read)
        assert training.wait(60) == 75, log.read_text()
    message = (
        "1 rows of its dataset were taken down, so the training stopped. Run the pipeline again: it makes a dataset "
    )
    assert f"{message}version without them and trains on that." in log.read_text()


# ---- in an object store ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [(1, {}), pytest.param(2, {"parallel": "fsdp"}, marks=pytest.mark.slow)],
    ids=["alone", "fsdp"],
)
def test_f45_a_training_in_an_unreliable_object_store_resumes_after_a_kill(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, changes: dict[str, Any]
) -> None:
    """The unfinished checkpoint is ignored; every byte equals that of training in a local folder."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    trained_on_workers.reader(tmp_path)
    assert attempt(tmp_path, world_size, ("here", None, changes)) == 0
    changes = {**changes, "root": "s3://bucket/some/prefix"}
    (tmp_path / "armed").mkdir()
    (tmp_path / "armed" / "before").write_text(rf"^before s3://bucket/.*/checkpoints/{96:012d}/{MANIFEST}")
    assert attempt(tmp_path, world_size, ("there", None, changes), tmp_path / "armed") == signal.SIGKILL
    folder = "s3://bucket/some/prefix/there"
    assert files.exists(f"{folder}/checkpoints/{48:012d}/{MANIFEST}")
    assert "facts.json" in files.names(f"{folder}/checkpoints/{96:012d}")
    assert not files.exists(f"{folder}/model/{MANIFEST}")
    before = len(losses(tmp_path, "there"))
    assert attempt(tmp_path, world_size, ("there", None, changes)) == 0
    assert [samples_seen for samples_seen, _ in losses(tmp_path, "there")[before:]] == list(range(64, 129, 16))
    assert dict(losses(tmp_path, "there")) == dict(losses(tmp_path, "here"))
    shares = [f"checkpoints/{128:012d}/rank-{rank:05d}.safetensors" for rank in range(world_size)]
    for name in (*shares, f"model/{MANIFEST}"):
        assert files.read(f"{folder}/{name}") == files.read(f"{tmp_path}/here/{name}")


def test_f73_in_an_unreliable_object_store_one_of_many_gets_the_lease(
    s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    register = locks._Register("s3://bucket/locks/tables")
    tokens = [-1]
    for _ in range(3):
        last, taken = register.read(), list[int | None]()
        take = functools.partial(lambda last, taken: taken.append(register.take(last, locks.Owner.of())), last, taken)
        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [token] = [token for token in taken if token is not None]
        tokens.append(token)
    now = register.read()
    assert now is not None and now.token == tokens[-1] and tokens == sorted(set(tokens))
