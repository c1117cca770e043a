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
    """Counts work in a small file that the run's driver reads. Give it to one worker only; call `start` in that worker."""

    uri: str
    """File that holds the count."""
    total: int
    """Total amount of work."""
    unit: str
    """Unit of the count, plural."""
    done: int = 0
    """Amount done so far."""
    began: float | None = None
    """Time at which the work began, in seconds since 1970."""

    def wait(self, reason: str) -> None:
        """Show that the work has not begun, and why."""
        self._write(reason, 0.0)

    def start(self, done: int = 0) -> "Progress":
        """Start the clock, with `done` done by an earlier attempt."""
        self.began = began(self.uri) or time.time()  # of the first worker, if it died
        self.done = self._first = done
        self._started = time.monotonic()
        self._write("", 0.0)
        return self

    def update(self, amount: int, note: str = "") -> None:
        """Add `amount` to the count; `note` is shown at the end of the line."""
        self.done += amount
        now = time.monotonic()
        if now - self._written >= WRITE_SECONDS or self.done >= self.total:
            self._write(note, (self.done - self._first) / max(now - self._started, 1e-9))

    def _write(self, note: str, speed: float) -> None:
        self._written = time.monotonic()
        counts = {"done": self.done, "total": self.total, "unit": self.unit}
        with contextlib.suppress(StorageError):  # a full disk is reported by writes that matter
            files.write_json(self.uri, {**counts, "speed": speed, "note": note, "began": self.began})


def began(uri: str) -> float | None:
    """Time at which the work of a progress file began, in seconds since 1970; None while it waits, or if that is unknown."""
    with contextlib.suppress(OSError, StorageError):
        return files.read_json(uri).get("began") if files.exists(uri) else None
    return None


def bar(label: str, state: Mapping[str, Any]) -> str:
    """One line: a bar, counts, speed and the remaining time."""
    done, total, speed = state["done"], state["total"], state["speed"]
    share = min(1.0, done / total) if total else 1.0
    blocks = ("█" * round(share * 20)).ljust(20, "░")
    seconds_left = round((total - done) / speed) if speed > 0 else 0
    speed_text = f"{speed:,.0f}/s  {seconds_left // 60}:{seconds_left % 60:02d} left" if speed > 0 else "starting"
    pace = f"{speed_text}  " if state.get("began") else "waiting "
    details = f"{done:,}/{total:,} {state['unit']}  {pace}{state['note']}"
    return f"  {label} {blocks} {share:4.0%}  {details}".rstrip()
