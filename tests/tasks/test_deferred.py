"""MLflow outages: no metric is lost or duplicated, and the training does not wait (F44)."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from tasks import deferred
from tasks.deferred import DeferredTracker
from tasks.progress import Progress
from tasks.tracking import Tracker


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("test", artifact_location=f"{tmp_path}/artifacts")
    return Tracker(uri, client.create_run(experiment).info.run_id)


def simulate_outage(monkeypatch: pytest.MonkeyPatch, num_calls: float, seconds: float = 0.0) -> list[float]:
    """Make MLflow fail the first `num_calls` calls, each after `seconds`; returns the times of all calls."""
    real, call_times = deferred.client, list[float]()

    def client(uri: str) -> Any:
        call_times.append(time.monotonic())
        if len(call_times) <= num_calls:
            time.sleep(seconds)
            raise ConnectionError("not now")
        return real(uri)

    monkeypatch.setattr(deferred, "client", client)
    return call_times


def history(tracker: Tracker) -> list[tuple[int, float]]:
    found = MlflowClient(tracker.tracking_uri).get_metric_history(tracker.run_id, "loss")
    return [(metric.step, metric.value) for metric in found]


def test_f44_metrics_of_an_outage_arrive_once_and_in_order(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_times = simulate_outage(monkeypatch, num_calls=3, seconds=0.2)
    logged = DeferredTracker(tracker, f"{tmp_path}/unlogged.json")
    started = time.monotonic()
    for step in range(1200):
        logged.metrics({"loss": step / 2}, step)
    assert time.monotonic() - started < 0.5, "the training waited"
    logged.bytes(b"image", "previews/1.png")
    logged.metrics({"loss": -1.0}, 1200)
    logged.close()
    assert len(call_times) >= 4
    assert history(tracker) == [*((step, step / 2) for step in range(1200)), (1200, -1.0)]
    [image] = MlflowClient(tracker.tracking_uri).list_artifacts(tracker.run_id, "previews")
    assert image.path == "previews/1.png"
    assert not (tmp_path / "unlogged.json").exists()


def test_f44_metrics_that_mlflow_never_accepts_are_written_to_a_file(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulate_outage(monkeypatch, num_calls=float("inf"))
    logged = DeferredTracker(tracker, f"{tmp_path}/unlogged.json", patience_seconds=0.5)
    logged.metrics({"loss": 1.0, "gradient_norm": 2.0}, 16)
    logged.close()
    rows = json.loads((tmp_path / "unlogged.json").read_text())
    assert [(row["name"], row["value"], row["step"]) for row in rows] == [("loss", 1.0, 16), ("gradient_norm", 2.0, 16)]
    assert "did not accept 2 metric values" in caplog.text


def test_f44_a_failure_is_reported_soon_and_not_hidden_by_mlflow_or_a_full_disk(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulate_outage(monkeypatch, num_calls=float("inf"))
    monkeypatch.setattr(deferred, "_PATIENCE_AFTER_FAILURE_SECONDS", 0.5)
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(RuntimeError, match="the failure"),
        DeferredTracker(tracker, f"{tmp_path}/file/unlogged.json", patience_seconds=3600) as logged,
    ):
        logged.metrics({"loss": 1.0}, 16)
        raise RuntimeError("the failure")
    assert "did not accept 1 metric values; they are lost: " in caplog.text


def test_f30_unwritable_progress_does_not_stop_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    progress = Progress(f"{tmp_path}/file/progress.json", total=2, unit="rows").start()
    progress.update(2)
    assert progress.done == 2


def test_without_a_server_nothing_is_written(tmp_path: Path) -> None:
    logged = DeferredTracker(Tracker("", ""), f"{tmp_path}/unlogged.json")
    logged.metrics({"loss": 1.0}, 1)
    logged.close()
    assert not list(tmp_path.iterdir())
