"""MLflow behind a queue, so that a slow or unreachable server neither delays a training nor loses its metrics."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from tasks.tracking import Tracker, client
from unclip import files
from unclip.errors import StorageError
from unclip.messages import reason_of, without_credentials

log = logging.getLogger(__name__)

_BATCH_METRICS = 500  # in one request; MLflow takes up to 1,000
_LONGEST_PAUSE_SECONDS = 15.0
_PATIENCE_AFTER_FAILURE_SECONDS = 10.0


class DeferredTracker:
    """Logs to a tracker's run from a background thread, in order, and retries until MLflow accepts."""

    def __init__(self, tracker: Tracker, unsent_uri: str, patience_seconds: float = 120.0) -> None:
        """Args:
        unsent_uri: JSON file for metrics that MLflow has not accepted within `patience_seconds` of `close`.
        """
        self.tracker, self.unsent_uri, self.patience_seconds = tracker, unsent_uri, patience_seconds
        self._waiting: deque[Any] = deque()  # metrics, or a function that logs something else
        self._changed = threading.Condition()
        self._closing_at: float | None = None
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        if tracker.run_id:
            self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queue metrics for `Tracker.metrics`; returns at once."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._put(*(Metric(name, float(value), now, step) for name, value in values.items()))

    def bytes(self, data: bytes, name: str) -> None:
        """Queue bytes for `Tracker.bytes`, which tries once; returns at once."""
        self._put(lambda: self.tracker.bytes(data, name))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Queue tags for `Tracker.tags`, which tries once; returns at once."""
        self._put(lambda: self.tracker.tags(values))

    def __enter__(self) -> "DeferredTracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # report the failure soon
            self.patience_seconds = min(self.patience_seconds, _PATIENCE_AFTER_FAILURE_SECONDS)
        self.close()

    def close(self) -> None:
        """Wait up to `patience_seconds` for MLflow to accept everything; write the remaining metrics to `unsent_uri`."""
        if not self._thread.is_alive():
            return
        with self._changed:
            self._closing_at = time.monotonic()
            self._changed.notify()
        self._thread.join(self.patience_seconds + 1)
        unsent = [item for item in list(self._waiting) if not callable(item)]
        if unsent:
            rows = [
                {"name": metric.key, "value": metric.value, "timestamp": metric.timestamp, "step": metric.step}
                for metric in unsent
            ]
            location = f"in {self.unsent_uri}"
            try:
                files.write_json(self.unsent_uri, rows)
            except StorageError as error:
                location = f"lost: {error}"
            uri = without_credentials(self.tracker.tracking_uri)
            log.warning("MLflow at %s did not accept %d metric values; they are %s.", uri, len(unsent), location)

    def _put(self, *items: Any) -> None:
        if self.tracker.run_id:
            with self._changed:
                self._waiting.extend(items)
                self._changed.notify()

    def _send_all(self) -> None:
        pause = 0.5
        while True:
            with self._changed:
                while not self._waiting and self._closing_at is None:
                    self._changed.wait()
                if not self._waiting or self._is_out_of_patience():
                    return
                batch, action = self._next()
            try:
                action()
                pause = 0.5
                for _ in range(batch):
                    self._waiting.popleft()
            except Exception as error:  # any failure of the server or the network
                log.debug("MLflow: %s", reason_of(error))
                with self._changed:
                    self._changed.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _next(self) -> tuple[int, Callable[[], Any]]:
        """Size of the next batch, and a function that sends it."""
        if callable(self._waiting[0]):
            return 1, self._waiting[0]
        metrics: list[Any] = []
        for item in self._waiting:
            if callable(item) or len(metrics) == _BATCH_METRICS:
                break
            metrics.append(item)
        return len(metrics), lambda: client(self.tracker.tracking_uri).log_batch(self.tracker.run_id, metrics=metrics)

    def _is_out_of_patience(self) -> bool:
        return self._closing_at is not None and time.monotonic() - self._closing_at > self.patience_seconds
