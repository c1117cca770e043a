"""Progress of long work, from whichever process does it to the console of whoever waits for it."""

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
    """Counts work in a small file that the run's driver reads. Give it to one worker only; start it where the work starts."""

    uri: str
    """Where the count is kept."""
    total: int
    """How much there is."""
    unit: str
    """What is counted, plural."""
    done: int = 0
    """How much of it is done."""

    def start(self, done: int = 0) -> "Progress":
        """Start the clock, with `done` done by an earlier attempt."""
        self.done = self._first = done
        self._started, self._written = time.monotonic(), 0.0
        self._write("")
        return self

    def update(self, amount: int, note: str = "") -> None:
        """`amount` more is done; `note` ends the line."""
        self.done += amount
        if time.monotonic() - self._written >= WRITE_SECONDS or self.done >= self.total:
            self._write(note)

    def _write(self, note: str) -> None:
        self._written = time.monotonic()
        speed = (self.done - self._first) / max(self._written - self._started, 1e-9)
        state = {"done": self.done, "total": self.total, "unit": self.unit, "speed": speed, "note": note}
        with contextlib.suppress(StorageError):  # a full disk is for what is worth keeping to tell
            files.write_json(self.uri, state)


def bar(label: str, state: Mapping[str, Any]) -> str:
    """One line: a bar, counts, speed and the time left."""
    done, total, speed = state["done"], state["total"], state["speed"]
    share = min(1.0, done / total) if total else 1.0
    drawn = ("█" * round(share * 20)).ljust(20, "░")
    left = round((total - done) / speed) if speed > 0 else 0
    pace = f"{speed:,.0f}/s  {left // 60}:{left % 60:02d} left" if speed > 0 else "starting"
    numbers = f"{done:,}/{total:,} {state['unit']}  {pace}  {state['note']}"
    return f"  {label} {drawn} {share:4.0%}  {numbers}".rstrip()
