"""Locks of a storage: one owner at a time for its tables, and one for each result that is made from a snapshot.

In a local folder a lock is a file lock, which the operating system frees when its process ends. In an object store it is a
lease. Its register is the log of an empty Delta table: each commit is a conditional put, so one of several processes gets
the lease, however slow their writes are. Its owner writes a heartbeat beside the register, under a name of its own.

Every owner has a token, a number that only grows. Commits of tables carry it (`tables.owned_by`). After an owner that did not
give its lock back, the next one marks all tables with its own token first, so a late commit of the other fails.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.run_records import driver, is_running
from tasks.store import TABLE_FOLDERS, Store
from unclip import files
from unclip.background import run_periodically
from unclip.errors import AlreadyRunningError, StorageError

if TYPE_CHECKING:
    from deltalake import DeltaTable

TABLES = "tables"
"""Lock of all who change tables: the stages up to the dataset, and takedowns."""
HEARTBEAT_SECONDS = 15.0
EXPIRY_SECONDS = 90.0
DYING_SECONDS = 60.0
"""Time that the tasks of a run get to end after its driver was killed."""
_POLL_SECONDS = 0.1
_RECORD_BYTES = 512
_LEASE = "unclip.lease"
_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Owner:
    """Process that holds a lock, or on whose behalf another holds it."""

    host: str
    pid: int
    machine: str | None
    process: str | None
    since: str

    @classmethod
    def of(cls, record: Mapping[str, Any] | None = None) -> "Owner":
        """Owner for the driver of a run, given its `run.json` or the record of a lock; None is this process."""
        given = record or driver()
        names = given["host"], given["pid"], given.get("machine"), given.get("process")
        return cls(*names, given.get("since", f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"))

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"

    def has_ended(self) -> bool:
        """Return True if it was a process of this machine, and is none any more."""
        return not is_running({"state": "running", **dataclasses.asdict(self)})


@dataclasses.dataclass(frozen=True)
class Held:
    """A lock that this process holds."""

    token: int
    was_given_back: bool
    """The owner before, if there was one, gave the lock back."""
    lost: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set once another owner has taken over a lease that was not renewed in time."""
    is_ready: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set once its user may work. A lock is given back only then, so that the next owner does what this one could not."""

    def check(self) -> None:
        """Check that no other owner has taken over.

        Raises:
            AlreadyRunningError: one has.
        """
        if self.lost.is_set():
            raise AlreadyRunningError("Another run has taken over this storage. Run the same command again later.")


@contextlib.contextmanager
def lock(store: Store, name: str = TABLES, wait: float = 0.0, owner: Owner | None = None) -> Iterator[Held]:
    """Hold a lock of a storage for the duration of a `with` block.

    Args:
        name: `TABLES`, or a name from `result_lock`.
        wait: seconds to wait for another owner to give it back. The tasks of a killed run are waited for in any case.
        owner: process to name to others; None is this one.

    Raises:
        AlreadyRunningError: another process holds the lock.
        StorageError: the lock cannot be written, or links lead out of a storage whose tables are to be changed.
    """
    take = _local_lock if store.is_local else _lease
    with take(store.root, name, wait, owner or Owner.of()) as held:
        if name != TABLES:
            held.is_ready.set()
            yield held
            return
        from tasks import tables

        store.check_links()
        found = _tables(store)
        # A token may be larger than the lock's, such as in tables that were copied from another storage.
        token = max([held.token, *(tables.token_of(table) + (not held.was_given_back) for table in found.values())])
        with tables.owned_by(token):
            if not held.was_given_back:
                for uri in found:
                    tables.fence(uri)
                for folder in (*TABLE_FOLDERS, "attempts") if store.is_local else ():
                    files.sweep(store.uri(folder))
            held.is_ready.set()
            yield dataclasses.replace(held, token=token)


def result_lock(stage: str, fingerprint: str) -> str:
    """Name of the lock of one result: a second run that makes it is excluded, and nothing else."""
    return f"{stage}-{fingerprint[:16]}"


def _tables(store: Store) -> "dict[str, DeltaTable]":
    from tasks import tables

    *kinds, snapshots = TABLE_FOLDERS
    uris = [store.uri(kind, name) for kind in kinds for name in store.list(kind)] + [store.uri(snapshots)]
    opened = {uri: tables.open_table(uri) for uri in uris}
    return {uri: table for uri, table in opened.items() if table is not None}


@contextlib.contextmanager
def _local_lock(root: str, name: str, wait: float, owner: Owner) -> Iterator[Held]:
    path = Path(root, "locks", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be opened: {error}. Fix the folder, and run the same command again."
        ) from None
    try:
        _wait_for_file(file, root, name, wait)
        last = _read_record(file)
        token = last.get("token", 0) + 1
        was_given_back = last.get("given_back", not os.fstat(file).st_size)
        record = {"token": token, **dataclasses.asdict(owner)}
        _write_record(file, path, record)
        held = Held(token, was_given_back)
        try:
            yield held
        finally:
            with contextlib.suppress(StorageError):  # then the next owner takes this one for killed
                if held.is_ready.is_set():
                    _write_record(file, path, {**record, "given_back": True})
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # also if a forked child has the file
        os.close(file)


def _wait_for_file(file: int, root: str, name: str, wait: float) -> None:
    started, is_told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        record, waited = _read_record(file), time.monotonic() - started
        owner = Owner.of(record) if record else None
        patience = max(wait, DYING_SECONDS) if owner is not None and owner.has_ended() else wait
        if waited >= patience:
            raise _in_use(root, name, str(owner or "its first moments"))
        if not is_told:
            print(f"{root}: waiting for {owner}, which uses the {_subject(name)}.", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(_POLL_SECONDS)


def _read_record(file: int) -> dict[str, Any]:
    """Record of the last owner; empty if there was none, or if the machine failed while it was written."""
    with contextlib.suppress(ValueError):
        return dict(json.loads(os.pread(file, _RECORD_BYTES, 0)))
    return {}


def _write_record(file: int, path: Path, record: Mapping[str, Any]) -> None:
    try:
        # One write of always the same length: a process that is killed leaves the old record or the new one.
        os.pwrite(file, json.dumps(record).encode().ljust(_RECORD_BYTES), 0)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}. Free space, and run the same command again.") from None


@contextlib.contextmanager
def _lease(root: str, name: str, wait: float, owner: Owner) -> Iterator[Held]:
    """Hold a lease, which expires 90 s after its last heartbeat.

    Others judge that by watching for 90 s, since the clocks of machines cannot be trusted.
    """
    register, deadline, token = _Register(f"{root}/locks/{name}"), time.monotonic() + wait, None
    while token is None:
        last = _wait_for_lease(register, root, name, deadline - time.monotonic())
        token = register.take(last, owner)
        if token is None and time.monotonic() >= deadline:
            now = register.read()
            raise _in_use(root, name, now.who if now else "unknown")
    held = Held(token, last is None or last.given_back)
    beats = itertools.count(1)

    def renew() -> None:
        with contextlib.suppress(OSError, StorageError):  # a transient storage error does not mean another owner
            now = register.read()
            if now is not None and now.token > token:
                held.lost.set()
            if not held.lost.is_set():
                files.write_json(register.beat_uri(token), next(beats))

    renew()
    try:
        with run_periodically(HEARTBEAT_SECONDS, renew, "lease"):
            yield held
    finally:
        with contextlib.suppress(OSError, StorageError):
            if held.is_ready.is_set():
                register.give_back(token, owner)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Newest entry of a register."""

    token: int
    """Version of the register that entered it."""
    version: int
    """Newest version of the register."""
    who: str
    given_back: bool


class _Register:
    """Log of the owners of a lease: an empty Delta table, whose versions are the tokens.

    A version without an entry only creates the table. Of several processes that create it, each may leave one, also late; see
    `tables.create`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def beat_uri(self, token: int) -> str:
        return f"{self.uri}/beat-{token}.json"

    def read(self) -> _Entry | None:
        table = self._open()
        if table is None:
            return None
        for token in range(table.version(), -1, -1):
            if note := self._note(token):
                return _Entry(token, table.version(), note["who"], note["given_back"])
        return _Entry(0, table.version(), "nobody", given_back=True)

    def beat(self, token: int) -> Any:
        try:
            return files.read_json(self.beat_uri(token))
        except FileNotFoundError:
            return None

    def take(self, last: _Entry | None, owner: Owner) -> int | None:
        """Enter a new owner after the entry `last`; returns its token, or None if another one was entered meanwhile."""
        if last is None:
            last = self._create()
            if last is None or not last.given_back:
                return None
        for _ in range(_ATTEMPTS):
            token = self._enter(last, owner, given_back=False)
            if token is not None:
                files.delete(self.beat_uri(last.token))  # of an owner that ended without doing so
                return token
            now = self.read()
            if now is None or now.token != last.token:
                return None
            last = now  # only a creation came between
        return None

    def give_back(self, token: int, owner: Owner) -> None:
        """Enter the end of an owner, unless another one took over; its own heartbeat is removed."""
        for _ in range(_ATTEMPTS):
            now = self.read()
            if now is None or now.token != token or self._enter(now, owner, given_back=True) is not None:
                break
        files.delete(self.beat_uri(token))

    def _create(self) -> _Entry | None:
        """Create the register; returns its state, or None if it is there already."""
        import pyarrow as pa
        from deltalake import Schema

        from tasks import tables

        if self._open() is not None:
            return None
        tables.create(self.uri, Schema.from_arrow(pa.schema({"key": pa.string()})))
        return self.read()

    def _enter(self, last: _Entry, owner: Owner, given_back: bool) -> int | None:
        from deltalake import CommitProperties, Transaction
        from deltalake.exceptions import DeltaError

        from tasks import tables

        table, identity = self._open(), os.urandom(8).hex()
        if table is None or table.version() != last.version:
            return None
        token = last.version + 1
        note = json.dumps({"who": str(owner), "given_back": given_back, "identity": identity})
        # Two commits of one application are a conflict, so no entry is made between `last` and this one.
        properties = CommitProperties({_LEASE: note}, app_transactions=[Transaction(_LEASE, token)])
        with contextlib.suppress(DeltaError, OSError):  # the answer to a request may be lost after it was carried out
            tables.commit_note(table, properties)
        return token if self._note(token).get("identity") == identity else None

    def _open(self) -> "DeltaTable | None":
        from tasks import tables

        return tables.open_table(self.uri)

    def _note(self, version: int) -> dict[str, Any]:
        """Entry of one version; empty if it has none."""
        from tasks import tables

        return dict(json.loads(tables.note_of(self.uri, version).get(_LEASE, "{}")))


def _wait_for_lease(register: _Register, root: str, name: str, wait: float) -> _Entry | None:
    """Wait until the lease is given back or expires; returns the last entry of its register.

    Raises:
        AlreadyRunningError: it was renewed, and the wait is over.
    """
    started = watched_since = time.monotonic()
    watched: Any = ()
    while True:
        last = register.read()
        if last is None or last.given_back:
            return last
        state = last.token, register.beat(last.token)
        now = time.monotonic()
        if not watched:
            owner = f"{last.who}; the lease of a killed run expires after {EXPIRY_SECONDS:.0f} s"
            print(
                f"{root}: another run may be using this storage ({owner}). Waiting to find out.",
                file=sys.stderr,
                flush=True,
            )
            watched = state
        elif state != watched:
            again = register.read()  # it may have been given back between the two reads
            if again is None or again.given_back:
                return again
            if now - started >= wait:
                raise _in_use(root, name, last.who)
            watched, watched_since = state, now
        elif now - watched_since >= EXPIRY_SECONDS:
            return last
        time.sleep(HEARTBEAT_SECONDS / 3)


def _subject(name: str) -> str:
    return "tables of this storage" if name == TABLES else f"lock of the stage {name.rpartition('-')[0]}"


def _in_use(root: str, name: str, who: str) -> AlreadyRunningError:
    if name == TABLES:
        return AlreadyRunningError(
            f"{root}: another run is using this storage ({who}). Wait for it to end, or choose another --storage."
        )
    stage = name.rpartition("-")[0]
    return AlreadyRunningError(f"{root}: another run is making the same result of {stage} ({who}). Wait for it to end.")
