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

    def start(self, done: int = 0) -> "Progress":
        """Start the clock, with `done` done by an earlier attempt."""
        self.done = self._first = done
        self._started, self._written = time.monotonic(), 0.0
        self._write("")
        return self

    def update(self, amount: int, note: str = "") -> None:
        """Add `amount` to the count; `note` is shown at the end of the line."""
        self.done += amount
        if time.monotonic() - self._written >= WRITE_SECONDS or self.done >= self.total:
            self._write(note)

    def _write(self, note: str) -> None:
        self._written = time.monotonic()
        speed = (self.done - self._first) / max(self._written - self._started, 1e-9)
        state = {"done": self.done, "total": self.total, "unit": self.unit, "speed": speed, "note": note}
        with contextlib.suppress(StorageError):  # a full disk is reported by writes that matter
            files.write_json(self.uri, state)


def bar(label: str, state: Mapping[str, Any]) -> str:
    """One line: a bar, counts, speed and the remaining time."""
    done, total, speed = state["done"], state["total"], state["speed"]
    share = min(1.0, done / total) if total else 1.0
    blocks = ("█" * round(share * 20)).ljust(20, "░")
    seconds_left = round((total - done) / speed) if speed > 0 else 0
    speed_text = f"{speed:,.0f}/s  {seconds_left // 60}:{seconds_left % 60:02d} left" if speed > 0 else "starting"
    details = f"{done:,}/{total:,} {state['unit']}  {speed_text}  {state['note']}"
    return f"  {label} {blocks} {share:4.0%}  {details}".rstrip()
