"""Garbage of a storage: files that nothing needs any more, and their deletion.

Needed are, with all that they refer to:

- every dataset version, the summaries in `results/`, the published stacks and the registered versions;
- of each pipeline, the last result of each stage, finished or not, and all results of running runs;
- selections of rows that models may have been trained on, since takedowns look for rows in them.

Files that changed lately are kept in any case. A stage's folder is deleted after its commit record, and in it the files that mark
something as complete first, so that after a kill nothing looks finished that is not.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from tasks import references, tables
from tasks.references import Folder
from tasks.store import INTERMEDIATE, Store
from tasks.tracking import checked_client
from unclip import files, seals
from unclip.errors import DamagedError

CHECKPOINTS = ("checkpoints", "workers")
"""Folders of a training that only an unfinished one needs."""
SELECTING = ("dedup", "curate")
"""Stages whose selections takedowns search; see `tasks.lineage.takedown`."""
_TABLES = ("images", "index", "embeddings", "snapshots")


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


def find(store: Store, tracking_uris: Sequence[str], days: float) -> list[Garbage]:
    """Find what nothing needs.

    Args:
        tracking_uris: every MLflow that may have registered versions of stacks in the storage.
        days: files that changed less than this many days ago are kept.

    Raises:
        StorageError, MlflowException: an MLflow does not answer, so its registered versions are not known.
        DamagedError: a record cannot be read, so what it needs is not known.
    """
    search = _Search(store, time.time() - days * 24 * 3600, tracking_uris)
    return sorted(search.garbage(), key=lambda garbage: -garbage.size)


def delete(store: Store, garbage: Iterable[Garbage]) -> None:
    """Delete garbage; to resume after an interruption, find and delete again. The caller holds the lock of the storage."""
    for each in garbage:
        if each.record is not None:
            files.delete(store.uri(*each.record))
        root, (folder, _, name) = store.uri(each.path), each.path.rpartition("/")
        is_inner = each.path.startswith("artifacts/") and each.path.count("/") > 2
        with seals.changing(store.uri(folder), f"{name}/") if is_inner else contextlib.nullcontext():
            for entry in files.walk(root):
                if entry.name.endswith(".json"):  # manifests and plans
                    files.delete(f"{root}/{entry.name}")
            files.failpoint("within", root)
            files.delete(root)


class _Search:
    def __init__(self, store: Store, latest: float, tracking_uris: Sequence[str]) -> None:
        self.store, self.latest = store, latest
        self.committed = {entry.name: entry.modified for entry in files.walk(store.uri("stages"))}
        self.records: dict[Folder, Any] = dict(references.committed(store))
        for folder, record in self.records.items():
            if record is None:
                uri = store.uri(*folder.record)
                raise DamagedError(
                    f"{uri}: the record is damaged, so what it needs is not known. Run `unclip verify` first."
                )
        self.versions = references.dataset_versions(store)
        self.needed = self._needed(tracking_uris)
        self._links: collections.Counter[tuple[int, int]] = collections.Counter()

    def garbage(self) -> Iterator[Garbage]:
        for stage in sorted({*self.store.list("artifacts"), *self.store.list("stages")}):
            names = {*self.store.list("artifacts", stage)}
            names |= {name.removesuffix(".json") for name in self.store.list("stages", stage)}
            for name in sorted(names):
                yield from self._folder(Folder(stage, name))
        for kind in _TABLES:
            for path in [(kind,)] if kind == "snapshots" else [(kind, name) for name in self.store.list(kind)]:
                yield from self._parts(path)

    def _needed(self, tracking_uris: Sequence[str]) -> set[Folder]:
        """All stage folders that are needed, by themselves or by a needed record."""
        roots: list[Any] = [*self.versions]
        roots += [self.store.read_json("published", name) for name in self.store.list("published")]
        roots += [source for uri in tracking_uris for source in _registered(uri)]
        needed = {folder for folder, _ in references.folders_in(roots)}
        needed |= {folder for _, folder in references.last_reached(self.store)}
        needed |= references.in_use(self.store)
        for pipeline in self.store.list("results"):
            path = ("results", pipeline, "summary.json")
            summary = self.store.read_json(*path) if self.store.exists(*path) else {}
            needed |= {Folder(*item) for item in summary.get("artifacts", {}).items()}
        waiting = list(needed)
        while waiting:
            found = {folder for folder, _ in references.folders_in(self.records.get(waiting.pop()))} - needed
            needed |= found
            waiting += found
        return needed

    def _folder(self, folder: Folder) -> Iterator[Garbage]:
        is_done, path = folder in self.records, "/".join(folder.path)
        entries = files.walk(self.store.uri(path))
        if folder not in self.needed and not (is_done and folder.stage in SELECTING):
            what = f"result of the stage {folder.stage}" if is_done else f"unfinished stage {folder.stage}"
            yield from self._below(path, entries, what, folder.record if is_done else None)
        elif is_done:
            parts = dict.fromkeys(CHECKPOINTS, "checkpoints of a finished training")
            parts |= {INTERMEDIATE: "intermediate files of a killed run"}
            if folder.stage == "download":
                parts |= {"plan": "plan of a finished download"}
            if folder not in self.needed:
                parts |= {"places": "places that no dataset version reads"}
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
        kept = {uri.rpartition("/")[2] for number in (None, *sorted(numbers)) for uri in tables.files(table, number)}
        for entry in files.walk(table):
            is_part = entry.name.endswith(".parquet") and "/" not in entry.name
            if is_part and entry.name not in kept and entry.modified <= self.latest:
                yield Garbage("/".join((*path, entry.name)), "part that no version needs", 1, self._freed([entry]))

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
    """Yield the sources of all registered versions."""
    token = None
    while True:
        page = checked_client(tracking_uri).search_model_versions(page_token=token)
        yield from (version.source for version in page)
        token = page.token
        if not token:
            return
