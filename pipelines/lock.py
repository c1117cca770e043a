"""One run at a time in a storage: a file lock in a local folder, a lease with a heartbeat in an object store."""

import contextlib
import datetime
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.store import Store
from unclip import files
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
    """An object that is renewed while its owner lives, and counts for nothing when it has not been for 90 s."""
    identity = uuid.uuid4().hex
    _refuse_if_held(uri, identity)
    renew = _renewer(uri, identity)
    renew()
    time.sleep(SETTLE_SECONDS)
    _refuse_if_held(uri, identity)  # of two that wrote at the same time, the last has it
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError, StorageError):  # a store that fails now and then is not another owner
                renew()

    thread = threading.Thread(target=beat, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError, StorageError):
            files.delete(uri)


def _renewer(uri: str, identity: str) -> Any:
    return lambda: files.write_json(uri, {"identity": identity, "at": time.time(), "who": _whoami()})


def _refuse_if_held(uri: str, identity: str) -> None:
    if not files.exists(uri):
        return
    lease = files.read_json(uri)
    if lease["identity"] != identity and time.time() - lease["at"] < EXPIRY_SECONDS:
        raise _held(
            uri.rpartition("/")[0], f"{lease['who']}; a run that was killed is forgotten after {EXPIRY_SECONDS:.0f} s"
        )


def _held(root: object, who: str) -> AlreadyRunningError:
    return AlreadyRunningError(
        f"{root}: another run is at work here ({who}). Wait for it, or choose another --storage."
    )


def _whoami() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
