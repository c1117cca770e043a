"""System metrics of a training in MLflow: CPU, memory, disk and network of the machine, and its GPUs where NVML is installed.

MLflow's own monitors measure; their names begin with `system/`, so MLflow shows them on a page of their own.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray  # noqa: F401  brings psutil, which MLflow's monitors need, in a folder of its own

from tasks.deferred import DeferredTracker
from unclip.background import run_periodically
from unclip.messages import reason_of

log = logging.getLogger(__name__)


@contextlib.contextmanager
def logged(tracker: DeferredTracker, seconds: float) -> Iterator[None]:
    """Log the load of this machine every `seconds`, and once at the end; 0 logs nothing. The work never fails because of it.

    The step of a point is the number of seconds since the start.
    """
    monitor = _monitor(tracker) if seconds and tracker.tracker.run_id else None
    if monitor is None:
        yield
        return
    started = time.monotonic()
    _measure(monitor)  # from here: the first reading covers no time

    def log_point() -> None:
        values = {f"system/{name}": value for name, value in _measure(monitor).items()}
        tracker.metrics(values, round(time.monotonic() - started))

    try:
        with run_periodically(seconds, log_point, "system metrics"):
            yield
    finally:
        log_point()


def _monitor(tracker: DeferredTracker) -> Any:
    """MLflow's monitor of this machine, which is not started; None if the machine does not allow it."""
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        return SystemMetricsMonitor(tracker.tracker.run_id, tracking_uri=tracker.tracker.tracking_uri)  # type: ignore[no-untyped-call]
    except Exception as error:  # psutil is missing, or cannot read this system
        log.warning("no system metrics are logged: %s", reason_of(error))
        return None


def _measure(monitor: Any) -> dict[str, float]:
    """One reading of all monitors."""
    try:
        monitor.collect_metrics()
        values: dict[str, float] = monitor.aggregate_metrics()
        for each in monitor.monitors:
            each.clear_metrics()
        return values
    except Exception as error:  # of the system or the driver of a GPU
        log.warning("no system metrics: %s", reason_of(error))
        return {}
