"""What the comparisons share: pictures to work on, the memory of a process tree, and medians of interleaved rounds."""

import io
import os
import platform
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

T = TypeVar("T")

PICTURE_WIDTH, PICTURE_HEIGHT = 640, 480


def photographs(count: int, quality: int = 90, seed: int = 0) -> list[bytes]:
    """JPEGs of 640x480 with the spectrum of photographs: noise whose amplitude halves with each octave, about 75 KB each."""
    from PIL import Image

    size = (PICTURE_WIDTH, PICTURE_HEIGHT)
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        levels = np.full((PICTURE_HEIGHT, PICTURE_WIDTH, 3), 128.0, np.float32)
        for octave in range(1, 8):
            coarse = rng.integers(0, 256, (3 * 2**octave, 4 * 2**octave, 3), np.uint8)
            smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            levels += (np.asarray(smooth, np.float32) - 128) * 1.2 / 2 ** (octave / 1.5)
        buffer = io.BytesIO()
        Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
        pictures.append(buffer.getvalue())
    return pictures


class TreeMemory:
    """Samples the memory of a process and all below it while the context is open.

    `rss` is the highest sum of resident sets in MB, which counts a page once for every process that shares it; `pss` is
    the highest sum of proportional sets, which counts it once.
    """

    rss = 0.0
    pss = 0.0

    def __init__(self, pid: int, interval_seconds: float = 0.5) -> None:
        self._pid, self._interval_seconds = pid, interval_seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "TreeMemory":
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


def peak_rss(pid: int) -> float:
    """Highest resident set in MB that one process has had."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


def interleave(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each side returns, round by round: all sides of a round run close together, so other load hits them alike.

    Every other round goes backwards, so that none always follows the same one.
    """
    figures: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            figures[name].append(sides[name]())
    return figures


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of ours / theirs, each round's own: what slows one whole round cancels."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def describe(figures: Sequence[float]) -> str:
    """`median (lowest-highest)`."""
    return f"{statistics.median(figures):8.1f} ({min(figures):.1f}-{max(figures):.1f})"


def machine(*packages: str) -> str:
    """The machine and the versions of packages, one line, for people who compare results."""
    try:
        model = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        model = platform.processor()
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    return f"{os.cpu_count()} CPUs ({model}), Python {platform.python_version()}, {versions}"


def _tree(pid: int) -> list[int]:
    """The process and all its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def _memory(pid: int) -> tuple[float, float]:
    """RSS and PSS in MB; nothing for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    sizes = {name: int(value.split()[0]) / 1024 for name, _, value in (line.partition(":") for line in lines[1:])}
    return sizes.get("Rss", 0.0), sizes.get("Pss", 0.0)
