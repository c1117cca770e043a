"""Watchdog that names the worker that keeps the others waiting.

Workers take every step together, so one that hangs stops them all, in a collective that at best reports a timeout. So each
worker writes its progress to a small file; a worker that makes no progress reads the files of all workers.
"""

import contextlib
import os
import socket
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from unclip import files
from unclip.background import run_periodically
from unclip.errors import StorageError
from unclip.training.parallel import Workers

Activity = Literal[
    "starting",
    "validating",
    "writing a checkpoint",
    "drawing a preview",
    "measuring the model",
    "reading rows",
    "taking a step",
]
ORDER: tuple[Activity, ...] = typing.get_args(Activity)
"""Activities at the same number of samples seen, in order; a worker at an earlier one is behind."""

Marks = Mapping[int, Mapping[str, Any]]
"""Progress that each worker wrote, by rank; workers that wrote nothing are missing."""


class Watchdog:
    """Watches all workers from within one of them, and names those that hang."""

    def __init__(self, folder: str, workers: Workers, seconds: float, on_hang: Callable[[str], object]) -> None:
        """Args:
        folder: URI of a folder for the workers' files, shared by all of them.
        seconds: time without progress on any worker until `on_hang` is called, and between further calls; 0 for never.
        on_hang: called with a message for users.
        """
        self.folder, self.workers, self.seconds, self.on_hang = folder, workers, seconds, on_hang
        self.mark = {"host": socket.gethostname(), "pid": os.getpid(), "samples_seen": 0, "activity": ORDER[0]}
        self._num_moves = self._num_beats = 0
        self._moved_at = time.monotonic()
        self._stalled: Marks = {}  # marks of the first look without progress since
        self._stalled_since = 0.0

    def reached(self, activity: Activity, samples_seen: int) -> None:
        """Record progress of this worker, in memory only: `watch` writes it to the file."""
        self.mark |= {"activity": activity, "samples_seen": samples_seen}
        self._num_moves += 1
        self._moved_at = time.monotonic()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watch from a thread while the block runs, ten times per `seconds`."""
        if not self.seconds:
            yield
            return
        self.watch()  # replaces the file of an earlier attempt
        with run_periodically(self.seconds / 10, self.watch, "watchdog"):
            yield

    def watch(self) -> None:
        """Write the progress of this worker; check the others if it has made none for a while."""
        now = time.monotonic()
        # A folder that is unavailable for a while must not end the training, which does not need it now.
        with contextlib.suppress(StorageError):
            self.beat()
        if now - self._moved_at < self.seconds / 2:
            self._stalled = {}
            return
        with contextlib.suppress(OSError):
            self.look(now)

    def beat(self) -> None:
        """Write the progress of this worker and a sign of life."""
        self._num_beats += 1
        mark = {**self.mark, "num_moves": self._num_moves, "num_beats": self._num_beats}
        files.write_json(f"{self.folder}/rank-{self.workers.rank:05d}.json", mark)

    def look(self, now: float) -> None:
        """Compare the progress of all workers with the first look at the same progress; `now` is in seconds of any clock."""
        marks = self._read()
        if not self._stalled or any(_moves(self._stalled, rank) != _moves(marks, rank) for rank in marks):
            self._stalled, self._stalled_since = marks, now
        elif now - self._stalled_since >= self.seconds:
            before, self._stalled = self._stalled, {}
            self.on_hang(explain(before, marks, self.workers.world_size, self.seconds))

    def _read(self) -> Marks:
        marks = {}
        for rank in range(self.workers.world_size):
            with contextlib.suppress(FileNotFoundError):
                marks[rank] = files.read_json(f"{self.folder}/rank-{rank:05d}.json")
        return marks


def explain(before: Marks, now: Marks, world_size: int, seconds: float) -> str:
    """Name the workers that hang, from two sets of marks without progress, between which each had time to write."""
    missing = [rank for rank in range(world_size) if rank not in now]
    silent = [rank for rank in now if rank in before and now[rank]["num_beats"] == before[rank]["num_beats"]]
    behind = _furthest_behind(now)
    if missing:
        culprits = f"worker {', '.join(map(str, missing))} never started"
    elif silent:
        culprits = f"{_name(silent, now)} does not respond; its last sign of life was while {_doing(now[silent[0]])}"
    elif len(behind) < world_size:
        culprits = f"{_name(behind, now)} kept the others waiting while {_doing(now[behind[0]])}"
    elif world_size == 1:
        culprits = f"it is {_doing(now[0])}"
    else:
        culprits = f"all were {_doing(now[0])}, so check the network between them"
    return f"no progress for {seconds:g} s: {culprits}."


def _moves(marks: Marks, rank: int) -> int | None:
    return marks[rank]["num_moves"] if rank in marks else None


def _furthest_behind(marks: Marks) -> list[int]:
    positions = {rank: (mark["samples_seen"], ORDER.index(mark["activity"])) for rank, mark in marks.items()}
    return [rank for rank, position in positions.items() if position == min(positions.values())]


def _name(ranks: list[int], marks: Marks) -> str:
    return ", ".join(f"worker {rank} (process {marks[rank]['pid']} on {marks[rank]['host']})" for rank in ranks)


def _doing(mark: Mapping[str, Any]) -> str:
    return f"{mark['activity']} after {mark['samples_seen']:,} samples"
