"""One run at a time in a storage: a file lock in a local folder, a lease with a heartbeat in an object store."""

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
from unclip.background import repeatedly
from unclip.errors import AlreadyRunningError, StorageError

HEARTBEAT_SECONDS = 15.0
EXPIRY_SECONDS = 90.0
SETTLE_SECONDS = 2.0  # for two that start together to see each other's lease


def lock(store: Store) -> contextlib.AbstractContextManager[None]:
    """Hold the storage for the length of a `with` block.

    Raises:
        AlreadyRunningError: another process holds it.
    """
    return _local_lock(Path(store.root, ".lock")) if store.is_local else _lease(store.uri("lease.json"))


@contextlib.contextmanager
def _local_lock(path: Path) -> Iterator[None]:
    """The lock dies with its process."""
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
    """An object that is renewed while its owner lives, and counts for nothing when it has not been for 90 s.

    Whether it is renewed is seen by looking at it for as long, since another machine's clock may say anything.
    """
    _refuse_if_renewed(uri)
    identity = uuid.uuid4().hex

    def renew(beat: int) -> None:
        files.write_json(uri, {"identity": identity, "beat": beat, "who": _whoami()})

    renew(0)
    time.sleep(SETTLE_SECONDS)
    lease = _read(uri)
    if lease is not None and lease["identity"] != identity:  # of two that wrote at the same time, the last has it
        raise _held(uri.rpartition("/")[0], lease["who"])
    beats = itertools.count(1)

    def keep() -> None:
        with contextlib.suppress(OSError, StorageError):  # a store that fails now and then is not another owner
            renew(next(beats))

    try:
        with repeatedly(HEARTBEAT_SECONDS, keep, "lease"):
            yield
    finally:
        with contextlib.suppress(OSError, StorageError):
            files.delete(uri)


def _refuse_if_renewed(uri: str) -> None:
    """Wait until a lease is given back, or has not been renewed for as long as it lasts."""
    first, started = _read(uri), time.monotonic()
    if first is None:
        return
    root, said = (
        uri.rpartition("/")[0],
        f"{first['who']}; a run that was killed is forgotten after {EXPIRY_SECONDS:.0f} s",
    )
    print(f"{root}: perhaps another run is at work here ({said}). Watching it.", file=sys.stderr, flush=True)
    while time.monotonic() - started < EXPIRY_SECONDS:
        time.sleep(HEARTBEAT_SECONDS / 3)
        lease = _read(uri)
        if lease is None:
            return
        if lease != first:
            raise _held(root, said)


def _read(uri: str) -> Any:
    try:
        return files.read_json(uri)
    except FileNotFoundError:
        return None


def _held(root: object, who: str) -> AlreadyRunningError:
    return AlreadyRunningError(
        f"{root}: another run is at work here ({who}). Wait for it, or choose another --storage."
    )


def _whoami() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
