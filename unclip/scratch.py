"""Folders for temporary files of this machine that do not outlive a killed process for long.

The owner of a folder locks it, and the operating system frees the lock when the process ends in any way. So a folder without
an owner is left over, and every process deletes such folders when it makes its first one.
"""

import contextlib
import fcntl
import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".scratch"
_UNLOCKED = re.compile(r"unclip-(shard|list)-[a-z0-9_]{8}")  # written by versions that locked nothing
_UNLOCKED_SECONDS = 3600.0
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Provide an empty folder for the duration of a `with` block; `name` tells people what it is for."""
    _sweep_once(tempfile.gettempdir())
    folder, descriptor = _make(name)
    while descriptor is None:  # another process swept it before it was locked
        folder, descriptor = _make(name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def sweep_scratch() -> int:
    """Delete the folders whose owners have ended; returns their number."""
    count = 0
    for path in Path(tempfile.gettempdir()).glob("unclip-*"):
        with contextlib.suppress(OSError):  # of another user, just deleted, or on a file system without locks
            count += _delete_if_left(path)
    return count


def _make(name: str) -> tuple[Path, int | None]:
    folder = Path(tempfile.mkdtemp(prefix=f"unclip-{name}-", suffix=_SUFFIX))
    try:
        descriptor = os.open(folder, _FLAGS)
    except FileNotFoundError:
        return folder, None
    with contextlib.suppress(OSError):  # without locks nobody sweeps it
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if folder.exists():
        return folder, descriptor
    os.close(descriptor)
    return folder, None


def _delete_if_left(path: Path) -> bool:
    if path.name.endswith(_SUFFIX):
        descriptor = os.open(path, _FLAGS)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
    elif _UNLOCKED.fullmatch(path.name) and time.time() - path.stat().st_mtime > _UNLOCKED_SECONDS:
        shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


@functools.cache
def _sweep_once(_folder: str) -> None:
    sweep_scratch()
