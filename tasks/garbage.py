"""Garbage of a storage: files that nothing needs any more, and their deletion.

Needed are, with all that they refer to:

- every dataset version, the summaries in `results/`, the registered versions, and of the published models the champion, the
  challenger and the champions before, which a rollback returns to;
- of each pipeline, the last result of each stage, finished or not, and all results of running runs;
- selections of rows that models may have been trained on, since takedowns look for rows in them. An old selection costs its
  verdicts, places and scores, some 130 bytes a row, the list that it was made from, some 100 bytes a row that selections from the
  same list share, and the parts that newer versions of its tables have replaced.

Files that changed lately are kept in any case. A stage's folder is deleted after its commit record, and in it the files that mark
something as complete first, so that after a kill nothing looks finished that is not. A record that stays keeps all it refers to,
since the next run with the same settings takes its result as done.

A link is deleted, and nothing behind it. Folders of the root that are links are followed only if the operator says so: that of a
storage that was copied may lead to the storage that it was copied from, or to any other.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from tasks import published, references, tables
from tasks.lock import Held, lock, result_lock
from tasks.references import Folder
from tasks.store import INTERMEDIATE, Store
from tasks.tracking import checked_client, pages
from unclip import files, seals
from unclip.errors import AlreadyRunningError, DamagedError, StorageError
from unclip.messages import reason_of, without_credentials

CHECKPOINTS = ("checkpoints", "workers")
"""Folders of a training that only an unfinished one needs."""
SELECTING = ("dedup", "curate")
"""Stages whose selections takedowns search; see `tasks.lineage.takedown`."""
_TABLES = ("images", "index", "embeddings", "derived", "snapshots")
_DELETIONS_AT_ONCE = 16
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Garbage:
    """Files that can be deleted together."""

    path: str
    """Folder or file, relative to the root of the storage."""
    what: str
    """Content, for people."""
    num_files: int
    size: int
    """Bytes that become free; a file with another name that stays frees none."""
    record: tuple[str, ...] | None = None
    """Commit record, which is deleted first."""


def find(store: Store, tracking_uris: Sequence[str], days: float, follow_links: bool = False) -> list[Garbage]:
    """Find what nothing needs.

    Args:
        tracking_uris: every MLflow that may have registered versions of stacks in the storage.
        days: files that changed less than this many days ago are kept.
        follow_links: find files behind folders of the root that are links, too; behind other links there is no garbage.

    Raises:
        StorageError: an MLflow does not answer, so its registered versions are not known.
        DamagedError: a record cannot be read, so what it needs is not known.
    """
    search = _Search(store, time.time() - days * 24 * 3600, tracking_uris)
    place = _places(store, follow_links)
    return sorted((each for each in search.garbage() if _is_in(place, each)), key=lambda garbage: -garbage.size)


def _places(store: Store, follow_links: bool) -> Callable[[str], str]:
    """Function from a path relative to the root to the full path; see `Store.inside`."""
    return store.inside if follow_links else functools.partial(files.below, store.root)


def _is_in(place: Callable[[str], str], garbage: Garbage) -> bool:
    try:
        place(garbage.path)
        return garbage.record is None or bool(place("/".join(garbage.record)))
    except DamagedError:
        return False


def delete(
    store: Store, garbage: Iterable[Garbage], held: Held | None = None, follow_links: bool = False
) -> list[Garbage]:
    """Delete garbage; to resume after an interruption, find and delete again.

    Stages that read a snapshot work meanwhile. So folders are deleted under the locks of their results, and all that a run has
    come to need since the garbage was found stays.

    Args:
        held: lock of the storage, which the caller holds.
        follow_links: as for `find`.

    Returns:
        Garbage that was deleted.

    Raises:
        AlreadyRunningError: another process has taken over the lock.
        DamagedError: a path leads out of the storage.
    """
    place = _places(store, follow_links)
    runs, deleted, parts = _Runs(store), list[Garbage](), list[Garbage]()
    for each in garbage:
        if not each.path.startswith("artifacts/"):
            parts.append(each)
            continue
        _, stage, name, *inner = each.path.split("/")
        folder = Folder(stage, name)
        if held is not None:
            held.check()
        try:
            with lock(store, result_lock(stage, name)):
                is_as_found = bool(inner) or store.exists(*folder.record) == (each.record is not None)
                if is_as_found and (inner or folder not in runs.needed()):
                    _delete_folder(place, each, is_inner=bool(inner))
                    deleted.append(each)
        except AlreadyRunningError:  # a run makes it again
            continue

    kept = runs.parts()

    def delete_part(each: Garbage) -> None:
        if held is not None:
            held.check()
        files.delete(place(each.path))

    with concurrent.futures.ThreadPoolExecutor(_DELETIONS_AT_ONCE) as pool:  # object stores answer slowly
        parts = [each for each in parts if each.path not in kept]
        for _ in pool.map(delete_part, parts):
            pass
    return deleted + parts


def _delete_folder(place: Callable[[str], str], garbage: Garbage, is_inner: bool) -> None:
    root = place(garbage.path)
    if garbage.record is not None:
        files.delete(place("/".join(garbage.record)))
    folder, _, name = root.rpartition("/")
    with seals.changing(folder, f"{name}/") if is_inner else contextlib.nullcontext():
        for entry in _files_of(root):
            if entry.name.endswith(".json"):  # manifests and plans
                files.delete(f"{root}/{entry.name}")
        files.failpoint("within", root)
        files.delete(root)


def _files_of(folder: str) -> list[files.Entry]:
    """All files of a folder, or the link in its place."""
    link = files.link(folder)
    return files.walk(folder) if link is None else [link]


class _Runs:
    """Needs of the runs that are running now."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._ended: set[str] = set()
        self._records: dict[Folder, Any] = {}

    def needed(self) -> set[Folder]:
        """Folders of all stages that they have reached, with all that these refer to."""
        return references.closure(references.in_use(self.store, self._ended), self._record)

    def parts(self) -> set[str]:
        """Paths of the parts of all table versions that these stages refer to."""
        versions = references.versions_in([self._record(folder) for folder in self.needed()])
        return {
            "/".join((*version.table, name))
            for version in set(versions)
            for name in references.files_of(self.store.uri(*version.table), version.number)
        }

    def _record(self, folder: Folder) -> Any:
        if self._records.get(folder) is None:
            is_done = self.store.exists(*folder.record)
            self._records[folder] = self.store.read_json(*folder.record) if is_done else None
        return self._records[folder]


class _Search:
    def __init__(self, store: Store, latest: float, tracking_uris: Sequence[str]) -> None:
        self.store, self.latest = store, latest
        self.committed = {entry.name: entry.modified for entry in files.walk(store.uri("stages"))}
        self.records: dict[Folder, Any] = dict(references.committed(store))
        for folder, record in self.records.items():
            if record is None:
                uri = store.uri(*folder.record)
                raise DamagedError(
                    f"{uri}: the record cannot be read, so what it needs is not known. Run `unclip verify` first."
                )
        self.versions = references.dataset_versions(store)
        self.published = published.read_all(store)
        self.needed = self._needed(tracking_uris)
        self._links: collections.Counter[tuple[int, int]] = collections.Counter()

    def garbage(self) -> Iterator[Garbage]:
        for stage in sorted({*self.store.list("artifacts"), *self.store.list("stages")}):
            names = {*self.store.list("artifacts", stage)}
            names |= {name.removesuffix(".json") for name in self.store.list("stages", stage)}
            for name in sorted(filter(_FINGERPRINT.fullmatch, names)):
                yield from self._folder(Folder(stage, name))
        for kind in _TABLES:
            for path in [(kind,)] if kind == "snapshots" else [(kind, name) for name in self.store.list(kind)]:
                yield from self._parts(path)
        yield from self._scores()

    def _needed(self, tracking_uris: Sequence[str]) -> set[Folder]:
        """All stage folders that are needed, by themselves or by a needed record."""
        roots: list[Any] = [*self.versions]
        roots += [dataclasses.asdict(entry) for record in self.published for entry in record.needed()]
        roots += [source for uri in tracking_uris for source in _registered(uri)]
        needed = {folder for folder, _ in references.folders_in(roots)}
        needed |= {folder for _, folder in references.last_reached(self.store)}
        needed |= references.in_use(self.store)
        for pipeline in self.store.list("results"):
            path = ("results", pipeline, "summary.json")
            summary = self.store.read_json(*path) if self.store.exists(*path) else {}
            for stage, found in summary.get("artifacts", {}).items():
                needed |= {Folder(stage, name) for name in ([found] if isinstance(found, str) else found)}
        needed |= {folder for folder in self.records if folder.stage in SELECTING}
        return references.closure(needed, self.records.get)

    def _folder(self, folder: Folder) -> Iterator[Garbage]:
        is_done, path = folder in self.records, "/".join(folder.path)
        entries = _files_of(self.store.uri(path))
        if folder not in self.needed:
            what = f"result of the stage {folder.stage}" if is_done else f"unfinished stage {folder.stage}"
            yield from self._below(path, entries, what, folder.record if is_done else None)
        elif is_done:
            parts = dict.fromkeys(CHECKPOINTS, "checkpoints of a finished training")
            parts |= {INTERMEDIATE: "intermediate files of a killed run"}
            if folder.stage == "download":
                parts |= {"plan": "plan of a finished download"}
            for name, what in parts.items():
                inner = [entry for entry in entries if entry.name.startswith(f"{name}/")]
                yield from self._below(f"{path}/{name}", inner, what)
        else:
            inner = [entry for entry in entries if entry.name.startswith(f"{INTERMEDIATE}/")]
            yield from self._below(f"{path}/{INTERMEDIATE}", inner, "intermediate files of a killed run")

    def _below(
        self, path: str, entries: Sequence[files.Entry], what: str, record: tuple[str, ...] | None = None
    ) -> Iterator[Garbage]:
        """Yield the files as garbage, unless one of them has changed lately."""
        times = [entry.modified for entry in entries]
        times += [] if record is None else [self.committed["/".join(record[1:])]]
        if times and max(times) <= self.latest:
            yield Garbage(path, what, len(entries), self._freed(entries), record)

    def _parts(self, path: tuple[str, ...]) -> Iterator[Garbage]:
        """Yield the Parquet files of a table that no needed version has."""
        table = self.store.uri(*path)
        if tables.version(table) is None:
            return
        needed = [*self.versions, *(self.records.get(folder) for folder in self.needed)]
        numbers = {version.number for version in references.versions_in(needed) if version.table == path}
        kept = {uri.rpartition("/")[2] for uri in tables.files(table)}
        kept = kept.union(*(references.files_of(table, number) for number in sorted(numbers)))
        for entry in files.walk(table):
            is_part = entry.name.endswith(".parquet") and "/" not in entry.name
            if is_part and entry.name not in kept and entry.modified <= self.latest:
                yield Garbage("/".join((*path, entry.name)), "part that no version needs", 1, self._freed([entry]))

    def _scores(self) -> Iterator[Garbage]:
        """Yield the scores of stacks that no promotion will be compared with."""
        needed = {entry.scores for record in self.published for entry in record.needed()}
        for entry in files.walk(self.store.uri(published.SCORES)):
            if entry.name.partition("-")[0] not in needed and entry.modified <= self.latest:
                what = "scores of a stack that is neither champion nor challenger"
                yield Garbage(f"{published.SCORES}/{entry.name}", what, 1, self._freed([entry]))

    def _freed(self, entries: Collection[files.Entry]) -> int:
        """Bytes that deleting files frees, after those that were asked for before."""
        size = 0
        for entry in entries:
            if entry.inode is None or entry.num_links == 1:
                size += entry.size
                continue
            self._links[entry.inode] += 1
            size += entry.size * (self._links[entry.inode] == entry.num_links)
        return size


def _registered(tracking_uri: str) -> Iterator[str]:
    """Yield the sources of all registered versions.

    Raises:
        StorageError: the MLflow does not tell them.
    """
    try:
        yield from (version.source for version in pages(checked_client(tracking_uri).search_model_versions))
    except (
        Exception
    ) as error:  # of the server, its database or the network: an answer that is not known keeps everything
        shown = without_credentials(tracking_uri)
        raise StorageError(
            f"MLflow at {shown} does not tell its registered versions: {reason_of(error)}. Nothing was deleted. "
            f"Try again when it answers, or give --without-mlflow {shown} if it is gone for good."
        ) from error
