"""Which of several workers keeps the others waiting?

Workers take every step together, so one that hangs stops them all, in a collective that at best says that it waited too
long. Each worker therefore keeps a small file that says how far it is; one that finds that nobody moves reads them all.
"""

import contextlib
import os
import socket
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from unclip import files
from unclip.background import repeatedly
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
"""What workers do at the same number of samples seen, in this order; who is at an earlier one is behind."""

Marks = Mapping[int, Mapping[str, Any]]
"""What each worker wrote about itself, by rank; a worker that wrote nothing is not there."""


class Watchdog:
    """Watches the workers from one of them, and names those that hang."""

    def __init__(self, folder: str, workers: Workers, seconds: float, hung: Callable[[str], object]) -> None:
        """Args:
        folder: URI of a folder for the workers' files, that all of them see.
        seconds: without any move of any worker, after which `hung` is called with a sentence for people, and again when
            as much time has passed again; 0 for never.
        """
        self.folder, self.workers, self.seconds, self.hung = folder, workers, seconds, hung
        self.mark = {"host": socket.gethostname(), "pid": os.getpid(), "samples_seen": 0, "activity": ORDER[0]}
        self._num_moves = self._num_beats = 0
        self._moved_at = time.monotonic()
        self._still: Marks = {}  # marks of which none has moved
        self._still_since = 0.0

    def reached(self, activity: Activity, samples_seen: int) -> None:
        """This worker moves. Costs nothing: `watch` writes it down."""
        self.mark |= {"activity": activity, "samples_seen": samples_seen}
        self._num_moves += 1
        self._moved_at = time.monotonic()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Watch from a thread while the block runs, ten times in `seconds`."""
        if not self.seconds:
            yield
            return
        self.watch()  # what an earlier attempt left is not there for the others to see
        with repeatedly(self.seconds / 10, self.watch, "watchdog"):
            yield

    def watch(self) -> None:
        """Say where this worker is; and look at the others when it has not moved for a while."""
        now = time.monotonic()
        # A folder that cannot be written or read for a while is no reason to end: the training does not need it now.
        with contextlib.suppress(StorageError):
            self.beat()
        if now - self._moved_at < self.seconds / 2:
            self._still = {}
            return
        with contextlib.suppress(OSError):
            self.look(now)

    def beat(self) -> None:
        """Say where this worker is, and that it lives."""
        self._num_beats += 1
        mark = {**self.mark, "num_moves": self._num_moves, "num_beats": self._num_beats}
        files.write_json(f"{self.folder}/rank-{self.workers.rank:05d}.json", mark)

    def look(self, now: float) -> None:
        """See whether any worker moved since the first look that found them as they are; `now` in seconds of any clock."""
        marks = self._read()
        if not self._still or any(_moves(self._still, rank) != _moves(marks, rank) for rank in marks):
            self._still, self._still_since = marks, now
        elif now - self._still_since >= self.seconds:
            before, self._still = self._still, {}
            self.hung(explain(before, marks, self.workers.world_size, self.seconds))

    def _read(self) -> Marks:
        marks = {}
        for rank in range(self.workers.world_size):
            with contextlib.suppress(FileNotFoundError):
                marks[rank] = files.read_json(f"{self.folder}/rank-{rank:05d}.json")
        return marks


def explain(before: Marks, now: Marks, world_size: int, seconds: float) -> str:
    """Who hangs, in words, given marks of workers that do not move, with time for each to write in between."""
    missing = [rank for rank in range(world_size) if rank not in now]
    silent = [rank for rank in now if rank in before and now[rank]["num_beats"] == before[rank]["num_beats"]]
    behind = _furthest_behind(now)
    if missing:
        culprits = f"worker {', '.join(map(str, missing))} never started"
    elif silent:
        culprits = f"{_name(silent, now)} does not answer; it was last heard of {_doing(now[silent[0]])}"
    elif len(behind) < world_size:
        culprits = f"{_name(behind, now)} kept the others waiting while {_doing(now[behind[0]])}"
    elif world_size == 1:
        culprits = f"it is {_doing(now[0])}"
    else:
        culprits = f"all were {_doing(now[0])}, so look at the network between them"
    return f"nothing moved for {seconds:g} s: {culprits}."


def _moves(marks: Marks, rank: int) -> int | None:
    return marks[rank]["num_moves"] if rank in marks else None


def _furthest_behind(marks: Marks) -> list[int]:
    places = {rank: (mark["samples_seen"], ORDER.index(mark["activity"])) for rank, mark in marks.items()}
    return [rank for rank, place in places.items() if place == min(places.values())]


def _name(ranks: list[int], marks: Marks) -> str:
    return ", ".join(f"worker {rank} (process {marks[rank]['pid']} on {marks[rank]['host']})" for rank in ranks)


def _doing(mark: Mapping[str, Any]) -> str:
    return f"{mark['activity']} after {mark['samples_seen']:,} samples"
