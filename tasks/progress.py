"""Progress of long work, passed from the worker process to the console of the run."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from unclip import files
from unclip.errors import StorageError

WRITE_SECONDS = 1.0


@dataclasses.dataclass
class Progress:
    """Counts work in a small file that the run's driver reads. One process counts, after `start` or `wait`."""

    uri: str
    """File that holds the count."""
    total: int
    """Total amount of work."""
    unit: str
    """Unit of the count, plural."""
    done: int = 0
    """Amount done so far."""

    def __post_init__(self) -> None:
        self._first, self._written = self.done, 0.0
        self._times = Times()

    def wait(self, reason: str) -> None:
        """Show that work waits for CPUs or GPUs, and why, until a worker calls `begin`."""
        self._times = Times(asked=time.time(), waited=times(self.uri).waited)
        self._write(reason, 0.0)

    def begin(self) -> None:
        """End the waiting, if no other worker has; for workers that do not count as well."""
        found = times(self.uri)
        if found.asked is not None:
            self._times = found.begun()
            self._write("", 0.0)

    def start(self, done: int = 0) -> "Progress":
        """Start the clock, with `done` done by an earlier attempt."""
        self.done = self._first = done
        self._times = dataclasses.replace(times(self.uri).begun(), began=time.time())
        self._write("", 0.0)
        return self

    def update(self, amount: int, note: str = "") -> None:
        """Add `amount` to the count; `note` is shown at the end of the line."""
        if self._times.began is None:
            self._times = times(self.uri).begun()  # as the workers say
        self.done += amount
        if time.monotonic() - self._written >= WRITE_SECONDS or self.done >= self.total:
            seconds = time.time() - (self._times.began or 0.0)
            self._write(note, (self.done - self._first) / max(seconds, 1e-9))

    def _write(self, note: str, speed: float) -> None:
        self._written = time.monotonic()
        counts = {"done": self.done, "total": self.total, "unit": self.unit, "speed": speed, "note": note}
        with contextlib.suppress(StorageError):  # a full disk is reported by writes that matter
            files.write_json(self.uri, {**counts, "times": dataclasses.asdict(self._times)})


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of a stage's work, in seconds since 1970."""

    asked: float | None = None
    """Time at which workers were asked for, until the first of them has CPUs or GPUs."""
    began: float | None = None
    """Time at which work began; None while it waits."""
    waited: float = 0.0
    """Seconds that work has waited for CPUs or GPUs."""

    def begun(self) -> "Times":
        """The same once the work has begun."""
        now = time.time()
        waited = 0.0 if self.asked is None else max(0.0, now - self.asked)
        return Times(None, self.began or now, self.waited + waited)


def times(uri: str) -> Times:
    """Times in a progress file; those of no work if there is none, or if it cannot be read."""
    with contextlib.suppress(OSError, StorageError):
        if files.exists(uri):
            return Times(**files.read_json(uri)["times"])
    return Times()


def bar(label: str, state: Mapping[str, Any]) -> str:
    """One line: a bar, counts, speed and the remaining time."""
    done, total, speed = state["done"], state["total"], state["speed"]
    share = min(1.0, done / total) if total else 1.0
    blocks = ("█" * round(share * 20)).ljust(20, "░")
    seconds_left = round((total - done) / speed) if speed > 0 else 0
    speed_text = f"{speed:,.0f}/s  {seconds_left // 60}:{seconds_left % 60:02d} left" if speed > 0 else "starting"
    pace = "waiting " if state["times"]["asked"] else f"{speed_text}  "
    details = f"{done:,}/{total:,} {state['unit']}  {pace}{state['note']}"
    return f"  {label} {blocks} {share:4.0%}  {details}".rstrip()
