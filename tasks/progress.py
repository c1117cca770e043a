"""Progress of long work, from any process of a run, on the console of whoever started it."""

import sys
import time
from typing import Any


class Progress:
    """One line every few seconds: a bar, counts, speed and the time left. Use as a context manager.

    Lines rather than a redrawn bar: they survive Ray's log streaming, job logs and several stages at once.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, every_seconds: float = 5.0) -> None:
        """Args:
        label: what is being done, one word.
        total: how much there is.
        unit: what is counted, plural.
        done: how much was done before.
        """
        self.label, self.total, self.unit, self.every_seconds = label, total, unit, every_seconds
        self.done = self._first = done
        self._started = self._printed = time.monotonic()

    def update(self, amount: int, note: str = "") -> None:
        """`amount` more is done; `note` ends the line."""
        self.done += amount
        now = time.monotonic()
        if now - self._printed >= self.every_seconds or (self.done >= self.total > 0):
            self._printed = now
            self._print(now, note)

    def close(self) -> None:
        sys.stdout.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _print(self, now: float, note: str) -> None:
        share = min(1.0, self.done / self.total) if self.total else 1.0
        speed = (self.done - self._first) / max(now - self._started, 1e-9)
        left = (self.total - self.done) / speed if speed > 0 else 0.0
        bar = ("█" * round(share * 20)).ljust(20, "░")
        line = (
            f"{self.label:<10} {bar} {share:4.0%}  {self.done:,}/{self.total:,} {self.unit}"
            f"  {speed:,.0f}/s  {int(left // 60)}:{int(left % 60):02d} left  {note}"
        )
        print(line.rstrip(), flush=True)
