"""Console output of runs: stage states and progress."""

import codecs
import io
import shutil
import sys
import threading
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


class _Screen:
    """Standard output, whose last lines on a terminal are the progress of all runs that are side by side."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.consoles: list[Console] = []
        self.num_progress_lines = 0

    def erase(self) -> None:
        """Erase the progress, so that other lines can take its place."""
        if self.num_progress_lines:
            print(f"\x1b[{self.num_progress_lines}F\x1b[J", end="")
        self.num_progress_lines = 0

    def draw(self) -> None:
        """Print the progress that is due, of all runs."""
        for console in self.consoles:
            self.num_progress_lines += console.print_progress() * console.is_terminal
        sys.stdout.flush()


_SCREEN = _Screen()


def say(text: str) -> None:
    """Print text above the progress of runs."""
    with _SCREEN.lock:
        _SCREEN.erase()
        print(text, flush=True)
        _SCREEN.draw()


class Console:
    """Prints a line when a stage changes state, and the progress of running stages, until it is closed.

    On a terminal, progress is redrawn in place; in a log file, it is a line every 15 seconds.
    """

    LOG_SECONDS = 15.0

    def __init__(self, store: Store, run_id: str, stages: list[str], label: str = "") -> None:
        """Args: label: name of the run before those of its stages, for runs side by side."""
        self.store, self.run_id = store, run_id
        self.names = {stage: f"{label}: {stage}" if label else stage for stage in stages}
        self.width = max(map(len, self.names.values()))
        self.printed: dict[str, str] = {}
        self.logged: dict[str, float] = {}
        self.is_terminal = sys.stdout.isatty()
        with _SCREEN.lock:
            _SCREEN.consoles.append(self)

    def close(self) -> None:
        """Show no more progress."""
        with _SCREEN.lock:
            _SCREEN.consoles.remove(self)
            _SCREEN.erase()
            _SCREEN.draw()

    def refresh(self) -> None:
        events = stage_events(self.store, self.run_id)
        with _SCREEN.lock:
            _SCREEN.erase()
            for name in self.names:
                event = events.get(name)
                if event and self.printed.get(name) != event["state"]:
                    self.printed[name] = event["state"]
                    self._print_state(name, event)
            _SCREEN.draw()

    def _print_state(self, name: str, event: Mapping[str, Any]) -> None:
        seconds = f"{event['seconds']:.0f} s" if event.get("seconds") is not None else ""
        marks = {"running": "▶", "done": "✓", "cached": "=", "failed": "✗", "skipped": "-"}
        mark, shown = marks[event["state"]], self.names[name].ljust(self.width)
        print(f"{mark} {shown} {event['state']:<8} {event.get('message', seconds)}".rstrip())
        self.logged[name] = time.monotonic()

    def print_progress(self) -> int:
        """Print the progress of running stages that is due; returns the number of lines."""
        num_lines = 0
        for name in [name for name, state in self.printed.items() if state == "running"]:
            path = ("runs", self.run_id, "progress", f"{name}.json")
            due = self.is_terminal or time.monotonic() - self.logged[name] >= self.LOG_SECONDS
            if due and self.store.exists(*path):
                self.logged[name] = time.monotonic()
                num_lines += 1
                line = bar(self.names[name].ljust(self.width), self.store.read_json(*path))
                # A wrapped line could not be erased.
                print(line[: shutil.get_terminal_size().columns - 1] if self.is_terminal else line)
        return num_lines
