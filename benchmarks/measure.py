"""Shared parts of the benchmarks: test images, the memory of a process tree, and medians of interleaved rounds."""

import contextlib
import io
import os
import platform
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from unclip.background import usable_cpus

T = TypeVar("T")

PHOTO_WIDTH, PHOTO_HEIGHT = 640, 480


def photographs(count: int, quality: int = 90, seed: int = 0) -> list[bytes]:
    """Return JPEGs of 640x480 with the spectrum of photographs: noise whose amplitude falls by octave; about 75 KB each."""
    from PIL import Image

    size = (PHOTO_WIDTH, PHOTO_HEIGHT)
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        levels = np.full((PHOTO_HEIGHT, PHOTO_WIDTH, 3), 128.0, np.float32)
        for octave in range(1, 8):
            coarse = rng.integers(0, 256, (3 * 2**octave, 4 * 2**octave, 3), np.uint8)
            smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            levels += (np.asarray(smooth, np.float32) - 128) * 1.2 / 2 ** (octave / 1.5)
        buffer = io.BytesIO()
        Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
        images.append(buffer.getvalue())
    return images


class TreeMemory:
    """A context that samples the memory of a process and all its descendants.

    `rss` is the highest sum of resident set sizes in MB, which counts a shared page once per process; `pss` is the highest
    sum of proportional set sizes, which counts it once.
    """

    rss = 0.0
    pss = 0.0

    def __init__(self, pid: int, interval_seconds: float = 0.5) -> None:
        self._pid, self._interval_seconds = pid, interval_seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._closing.wait(self._interval_seconds):
            sizes = [_memory(pid) for pid in _tree(self._pid)]
            self.rss = max(self.rss, sum(rss for rss, _ in sizes))
            self.pss = max(self.pss, sum(pss for _, pss in sizes))


class LargestProcess(TreeMemory):
    """A context that samples the largest process of a tree: `megabytes` is its peak resident memory without shared memory.

    Shared memory is Ray's object store. Pages of files that are mapped, such as libraries, count in each process.
    """

    megabytes = 0.0

    def _sample(self) -> None:
        while not self._closing.wait(self._interval_seconds):
            self.megabytes = max(self.megabytes, *map(_own_memory, _tree(self._pid)))


def peak_rss(pid: int) -> float:
    """Return the peak resident memory of a process in MB."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


def interleave(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Run all contenders once per round and collect their results; within a round, other load affects all alike.

    Every other round runs in reverse order, so that no contender always follows the same one.
    """
    figures: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            figures[name].append(contenders[name]())
    return figures


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median over rounds of ours / theirs, so that load on a whole round cancels out."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def describe(figures: Sequence[float]) -> str:
    """Format as `median (lowest-highest)`."""
    return f"{statistics.median(figures):8.1f} ({min(figures):.1f}-{max(figures):.1f})"


def machine(*packages: str) -> str:
    """Describe the machine and the versions of packages in one line, for comparing results."""
    try:
        model = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        model = platform.processor()
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    return f"{usable_cpus()} CPUs ({model}), Python {platform.python_version()}, {versions}"


def tree_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and all its descendants so far, including those that ended and were waited for."""
    ticks = 0
    for member in _tree(pid):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _tree(pid: int) -> list[int]:
    """Return the process and all its live descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # the process has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def _own_memory(pid: int) -> float:
    """Return the resident memory without shared memory in MB; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile") if name in fields) / 1024


def _memory(pid: int) -> tuple[float, float]:
    """Return RSS and PSS in MB; zeros for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    sizes = {name: int(value.split()[0]) / 1024 for name, _, value in (line.partition(":") for line in lines[1:])}
    return sizes.get("Rss", 0.0), sizes.get("Pss", 0.0)
