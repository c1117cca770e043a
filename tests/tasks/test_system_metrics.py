"""System metrics of trainings."""

import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from tasks import system_metrics
from tasks.deferred import DeferredTracker
from tasks.tracking import Tracker


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow database, shared because creating one takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    MlflowClient(uri)
    return uri


@pytest.fixture
def tracker(mlflow_uri: str) -> Tracker:
    return Tracker(mlflow_uri, MlflowClient(mlflow_uri).create_run("0").info.run_id)


def test_a_run_has_system_metrics_at_an_interval_and_at_its_end(tracker: Tracker, tmp_path: Path) -> None:
    with DeferredTracker(tracker, f"{tmp_path}/unsent.json") as deferred, system_metrics.logged(deferred, 0.3):
        time.sleep(0.8)
    client = MlflowClient(tracker.tracking_uri)
    names = client.get_run(tracker.run_id).data.metrics
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= names.keys()
    assert all(name.startswith("system/") for name in names)
    history = client.get_metric_history(tracker.run_id, "system/system_memory_usage_megabytes")
    assert len(history) == 3 and all(point.value > 1 for point in history)


def test_no_system_metrics_are_logged_if_they_are_off_or_cannot_be_measured(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no access to /proc")

    with DeferredTracker(tracker, f"{tmp_path}/unsent.json") as deferred:
        with system_metrics.logged(deferred, 0):
            pass
        monkeypatch.setattr("mlflow.system_metrics.system_metrics_monitor.SystemMetricsMonitor", refuse)
        with system_metrics.logged(deferred, 10):
            pass
    assert MlflowClient(tracker.tracking_uri).get_run(tracker.run_id).data.metrics == {}
