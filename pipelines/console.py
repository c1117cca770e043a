"""Console output of a run: stage states and progress."""

import codecs
import io
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from tasks.progress import bar
from tasks.run_records import stage_events
from tasks.store import Store

PLAIN = {"▶": ">", "✓": "+", "✗": "x", "█": "#", "░": "."}
"""Stand-ins for marks that a terminal cannot show."""


def tolerate_encodings() -> None:
    """Let standard output and errors replace what their encoding lacks, as in a terminal that is not set to UTF-8."""
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(mark, "?") for mark in error.object[error.start : error.end]), error.end


class Console:
    """Prints a line when a stage changes state, and the progress of running stages.

    On a terminal, progress is redrawn in place; in a log file, it is a line every 15 seconds.
    """

    LOG_SECONDS = 15.0

    def __init__(self, store: Store, run_id: str, stages: list[str]) -> None:
        self.store, self.run_id, self.stages = store, run_id, stages
        self.width = max(map(len, stages))
        self.printed: dict[str, str] = {}
        self.logged: dict[str, float] = {}
        self.is_terminal = sys.stdout.isatty()
        self.num_progress_lines = 0

    def refresh(self) -> None:
        events = stage_events(self.store, self.run_id)
        self._erase()
        for name in self.stages:
            event = events.get(name)
            if event and self.printed.get(name) != event["state"]:
                self.printed[name] = event["state"]
                self._print_state(name, event)
        for name, state in self.printed.items():
            if state == "running":
                self._print_progress(name)
        sys.stdout.flush()

    def _print_state(self, name: str, event: Mapping[str, Any]) -> None:
        seconds = f"{event['seconds']:.0f} s" if event.get("seconds") is not None else ""
        marks = {"running": "▶", "done": "✓", "cached": "=", "failed": "✗", "skipped": "-"}
        print(
            f"{marks[event['state']]} {name:<{self.width}} {event['state']:<8} {event.get('message', seconds)}".rstrip()
        )
        self.logged[name] = time.monotonic()

    def _print_progress(self, name: str) -> None:
        path = ("runs", self.run_id, "progress", f"{name}.json")
        due = self.is_terminal or time.monotonic() - self.logged[name] >= self.LOG_SECONDS
        if due and self.store.exists(*path):
            self.logged[name] = time.monotonic()
            self.num_progress_lines += 1
            line = bar(name.ljust(self.width), self.store.read_json(*path))
            # A wrapped line could not be erased.
            print(line[: shutil.get_terminal_size().columns - 1] if self.is_terminal else line)

    def _erase(self) -> None:
        if self.is_terminal and self.num_progress_lines:
            print(f"\x1b[{self.num_progress_lines}F\x1b[J", end="")
        self.num_progress_lines = 0
