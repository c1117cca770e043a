"""A lock that allows one run at a time per storage: a file lock in a local folder, a renewed lease in an object store."""

import contextlib
import datetime
import fcntl
import itertools
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.store import Store
from unclip import files
from unclip.background import run_periodically
from unclip.errors import AlreadyRunningError, StorageError

HEARTBEAT_SECONDS = 15.0
EXPIRY_SECONDS = 90.0
SETTLE_SECONDS = 2.0  # so that two runs that start together see each other's lease


def lock(store: Store) -> contextlib.AbstractContextManager[None]:
    """Lock the storage for the duration of a `with` block.

    Raises:
        AlreadyRunningError: another process holds the lock.
    """
    return _local_lock(Path(store.root, ".lock")) if store.is_local else _lease(store.uri("lease.json"))


@contextlib.contextmanager
def _local_lock(path: Path) -> Iterator[None]:
    """Lock a file; the operating system releases it when the process ends."""
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _held(path.parent, file.read().strip()) from None
        file.truncate(0)
        file.write(_whoami())
        file.flush()
        files.sweep(str(path.parent))
        yield


@contextlib.contextmanager
def _lease(uri: str) -> Iterator[None]:
    """Hold a lease: an object that its owner renews, and that expires after 90 s without renewal.

    Expiry is judged by watching the object for 90 s, since the clocks of other machines cannot be trusted.
    """
    _refuse_if_renewed(uri)
    identity = uuid.uuid4().hex

    def renew(beat: int) -> None:
        files.write_json(uri, {"identity": identity, "beat": beat, "who": _whoami()})

    renew(0)
    time.sleep(SETTLE_SECONDS)
    lease = _read(uri)
    if lease is not None and lease["identity"] != identity:  # if two runs write at the same time, the last one wins
        raise _held(uri.rpartition("/")[0], lease["who"])
    beats = itertools.count(1)

    def renew_again() -> None:
        with contextlib.suppress(OSError, StorageError):  # a transient storage error does not mean another owner
            renew(next(beats))

    try:
        with run_periodically(HEARTBEAT_SECONDS, renew_again, "lease"):
            yield
    finally:
        with contextlib.suppress(OSError, StorageError):
            files.delete(uri)


def _refuse_if_renewed(uri: str) -> None:
    """Wait until an existing lease is released or expires.

    Raises:
        AlreadyRunningError: the lease was renewed meanwhile.
    """
    first, started = _read(uri), time.monotonic()
    if first is None:
        return
    root = uri.rpartition("/")[0]
    owner = f"{first['who']}; the lease of a killed run expires after {EXPIRY_SECONDS:.0f} s"
    print(f"{root}: another run may be using this storage ({owner}). Waiting to find out.", file=sys.stderr, flush=True)
    while time.monotonic() - started < EXPIRY_SECONDS:
        time.sleep(HEARTBEAT_SECONDS / 3)
        lease = _read(uri)
        if lease is None:
            return
        if lease != first:
            raise _held(root, owner)


def _read(uri: str) -> Any:
    try:
        return files.read_json(uri)
    except FileNotFoundError:
        return None


def _held(root: object, who: str) -> AlreadyRunningError:
    return AlreadyRunningError(
        f"{root}: another run is using this storage ({who}). Wait for it to end, or choose another --storage."
    )


def _whoami() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
