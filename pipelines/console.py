"""The console of a run: how its stages fare."""

import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from tasks.progress import bar
from tasks.run_records import stage_events
from tasks.store import Store


class Console:
    """Tells how the stages of a run fare: a line when one changes, and how far the running ones are.

    On a terminal the progress is redrawn in place; in a log it is a line now and then.
    """

    LOG_SECONDS = 15.0

    def __init__(self, store: Store, run_id: str, stages: list[str]) -> None:
        self.store, self.run_id, self.stages = store, run_id, stages
        self.width = max(map(len, stages))
        self.told: dict[str, str] = {}
        self.logged: dict[str, float] = {}
        self.is_terminal = sys.stdout.isatty()
        self.drawn = 0

    def refresh(self) -> None:
        events = stage_events(self.store, self.run_id)
        self._erase()
        for name in self.stages:
            event = events.get(name)
            if event and self.told.get(name) != event["state"]:
                self.told[name] = event["state"]
                self._tell(name, event)
        for name, state in self.told.items():
            if state == "running":
                self._tell_progress(name)
        sys.stdout.flush()

    def _tell(self, name: str, event: Mapping[str, Any]) -> None:
        seconds = f"{event['seconds']:.0f} s" if event.get("seconds") is not None else ""
        marks = {"running": "▶", "done": "✓", "cached": "=", "failed": "✗", "skipped": "-"}
        print(
            f"{marks[event['state']]} {name:<{self.width}} {event['state']:<8} {event.get('message', seconds)}".rstrip()
        )
        self.logged[name] = time.monotonic()

    def _tell_progress(self, name: str) -> None:
        path = ("runs", self.run_id, "progress", f"{name}.json")
        due = self.is_terminal or time.monotonic() - self.logged[name] >= self.LOG_SECONDS
        if due and self.store.exists(*path):
            self.logged[name] = time.monotonic()
            self.drawn += 1
            line = bar(name.ljust(self.width), self.store.read_json(*path))
            # A line that wraps could not be erased.
            print(line[: shutil.get_terminal_size().columns - 1] if self.is_terminal else line)

    def _erase(self) -> None:
        if self.is_terminal and self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="")
        self.drawn = 0
