"""MLflow behind a queue: a server that is slow, or away for a while, costs a training no time and no points."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from tasks.tracking import Tracker, client
from unclip import files
from unclip.errors import StorageError

log = logging.getLogger(__name__)

_BATCH_METRICS = 500  # in one request; MLflow takes up to 1,000
_LONGEST_PAUSE_SECONDS = 15.0
_PATIENCE_AFTER_FAILURE_SECONDS = 10.0


class DeferredTracker:
    """Logs to the run of a tracker from a thread, in order, and tries again until MLflow takes it."""

    def __init__(self, tracker: Tracker, unsent_uri: str, patience_seconds: float = 120.0) -> None:
        """Args:
        unsent_uri: JSON file for metrics that MLflow has not taken `patience_seconds` after `close`.
        """
        self.tracker, self.unsent_uri, self.patience_seconds = tracker, unsent_uri, patience_seconds
        self._waiting: deque[Any] = deque()  # metrics, or a function that logs something else
        self._changed = threading.Condition()
        self._closing_at: float | None = None
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        if tracker.run_id:
            self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """As `Tracker.metrics`; returns at once."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._put(*(Metric(name, float(value), now, step) for name, value in values.items()))

    def bytes(self, data: bytes, name: str) -> None:
        """As `Tracker.bytes`, which tries once; returns at once."""
        self._put(lambda: self.tracker.bytes(data, name))

    def tags(self, values: Mapping[str, Any]) -> None:
        """As `Tracker.tags`, which tries once; returns at once."""
        self._put(lambda: self.tracker.tags(values))

    def __enter__(self) -> "DeferredTracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # whoever waits wants to know what failed
            self.patience_seconds = min(self.patience_seconds, _PATIENCE_AFTER_FAILURE_SECONDS)
        self.close()

    def close(self) -> None:
        """Wait until MLflow has it all, but no longer than patience goes; what it has not is written down if it can be."""
        if not self._thread.is_alive():
            return
        with self._changed:
            self._closing_at = time.monotonic()
            self._changed.notify()
        self._thread.join(self.patience_seconds + 1)
        unsent = [one for one in list(self._waiting) if not callable(one)]
        if unsent:
            rows = [
                {"name": one.key, "value": one.value, "timestamp": one.timestamp, "step": one.step} for one in unsent
            ]
            where = f"in {self.unsent_uri}"
            try:
                files.write_json(self.unsent_uri, rows)
            except StorageError as error:
                where = f"lost: {error}"
            uri = self.tracker.tracking_uri
            log.warning("MLflow at %s did not take %d points of the training; they are %s.", uri, len(unsent), where)

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
            except Exception as error:  # whatever the server or its network does
                log.debug("MLflow at %s: %s", self.tracker.tracking_uri, error)
                with self._changed:
                    self._changed.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _next(self) -> tuple[int, Callable[[], Any]]:
        """How many of the first items go together, and what sends them."""
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
