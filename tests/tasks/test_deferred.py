"""MLflow may be away: no point is lost or doubled, and nobody waits for it (F44)."""

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


def away(monkeypatch: pytest.MonkeyPatch, num_calls: float, seconds: float = 0.0) -> list[float]:
    """MLflow refuses so many calls, each after a while; returns when it was called."""
    real, called = deferred.client, list[float]()

    def client(uri: str) -> Any:
        called.append(time.monotonic())
        if len(called) <= num_calls:
            time.sleep(seconds)
            raise ConnectionError("not now")
        return real(uri)

    monkeypatch.setattr(deferred, "client", client)
    return called


def history(tracker: Tracker) -> list[tuple[int, float]]:
    found = MlflowClient(tracker.tracking_uri).get_metric_history(tracker.run_id, "loss")
    return [(metric.step, metric.value) for metric in found]


def test_f44_points_of_an_outage_arrive_once_and_in_order(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = away(monkeypatch, num_calls=3, seconds=0.2)
    logged = DeferredTracker(tracker, f"{tmp_path}/unlogged.json")
    started = time.monotonic()
    for step in range(1200):
        logged.metrics({"loss": step / 2}, step)
    assert time.monotonic() - started < 0.5, "the training waited"
    logged.bytes(b"picture", "previews/1.png")
    logged.metrics({"loss": -1.0}, 1200)
    logged.close()
    assert len(called) >= 4
    assert history(tracker) == [*((step, step / 2) for step in range(1200)), (1200, -1.0)]
    [picture] = MlflowClient(tracker.tracking_uri).list_artifacts(tracker.run_id, "previews")
    assert picture.path == "previews/1.png"
    assert not (tmp_path / "unlogged.json").exists()


def test_f44_what_mlflow_never_takes_is_written_down(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away(monkeypatch, num_calls=float("inf"))
    logged = DeferredTracker(tracker, f"{tmp_path}/unlogged.json", patience_seconds=0.5)
    logged.metrics({"loss": 1.0, "gradient_norm": 2.0}, 16)
    logged.close()
    rows = json.loads((tmp_path / "unlogged.json").read_text())
    assert [(row["name"], row["value"], row["step"]) for row in rows] == [("loss", 1.0, 16), ("gradient_norm", 2.0, 16)]
    assert "did not accept 2 metric values" in caplog.text


def test_f44_a_failure_is_told_soon_and_not_hidden_by_mlflow_or_a_full_disk(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away(monkeypatch, num_calls=float("inf"))
    monkeypatch.setattr(deferred, "_PATIENCE_AFTER_FAILURE_SECONDS", 0.5)
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(RuntimeError, match="the failure"),
        DeferredTracker(tracker, f"{tmp_path}/file/unlogged.json", patience_seconds=3600) as logged,
    ):
        logged.metrics({"loss": 1.0}, 16)
        raise RuntimeError("the failure")
    assert "did not accept 1 metric values; they are lost: " in caplog.text


def test_f30_progress_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    progress = Progress(f"{tmp_path}/file/progress.json", total=2, unit="rows").start()
    progress.update(2)
    assert progress.done == 2


def test_without_a_server_nothing_is_kept(tmp_path: Path) -> None:
    logged = DeferredTracker(Tracker("", ""), f"{tmp_path}/unlogged.json")
    logged.metrics({"loss": 1.0}, 1)
    logged.close()
    assert not list(tmp_path.iterdir())
