"""Verification of a storage: every file that records refer to is there and holds the bytes that were written.

`survey` lists these files and finds those that are missing; `state_of` checks one file. Digests are where `unclip.seals`
describes. Files without one, which earlier versions wrote, count as not covered.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import re
import shlex
import sqlite3
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from tasks import index, references, tables
from tasks.lock import Held
from tasks.references import Folder, Version
from tasks.store import DEFAULT_ROOT, TOMBSTONES, Store
from tasks.tombstones import RECORDED
from unclip import files, seals
from unclip.errors import DamagedError, StorageError
from unclip.messages import reason_of
from unclip.seals import MANIFEST

State = Literal["sound", "damaged", "not covered", "missing", "unreadable"]

_RANGE = re.compile(r"^(.*/)?([^/]*?)(\d{5})-of-(\d{5})(\.\w+)$")
_TABLES = ("images", "index", "embeddings", "derived")


@dataclasses.dataclass(frozen=True)
class Item:
    """A file that a record refers to."""

    uri: str
    size: int
    """Bytes; 0 if it is missing."""
    what: str
    """Content, for people."""
    remedy: str
    """Commands that make it again, for people."""
    sha256: str | None = None
    """Digest in a manifest; None if the file carries its own."""
    committed: str | None = None
    """Digest in the commit of a table, for a file that carries none."""
    folder: Folder | None = None
    """Folder of the stage that wrote it."""
    part: tuple[str, str] | None = None
    """Kind and name of the Delta table that it is a part of."""
    is_disposable: bool = False
    """The next run writes it anew if it is missing."""
    is_foreign: bool = False
    """A library wrote it, so it carries no digest."""
    is_folder: bool = False
    """A folder whose files could not be listed."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A file that is not as it was written."""

    item: Item
    state: Literal["damaged", "missing", "unreadable"]
    """Unreadable: the disk, the store or the permissions refuse it, so its content is not known."""


def state_of(item: Item) -> State:
    """Check all bytes of a file."""
    try:
        if item.is_folder:  # none of its files was checked, even if it can be listed by now
            return "unreadable"
        if not files.exists(item.uri):
            return "missing"
        if item.sha256 is not None:
            return "sound" if files.digest(item.uri) == item.sha256 else "damaged"
        if item.uri.endswith("/mlflow.db") and not _is_sound_database(item.uri):
            return "damaged"
        if item.is_foreign:
            return "not covered"
        if item.uri.endswith(seals.SEALED):
            state = _state_of_sealed(item.uri)
        elif item.uri.endswith(".json"):
            state = "damaged" if _leads_out(item) else state_of_json(files.read(item.uri))
        else:
            state = "not covered"
        if state == "not covered" and item.committed is not None:
            return "sound" if files.digest(item.uri) == item.committed else "damaged"
        return state
    except FileNotFoundError:  # deleted meanwhile
        return "missing"
    except OSError:
        return "unreadable"


def _leads_out(item: Item) -> bool:
    """Return True if a manifest or commit record is damaged or names a file outside of the folder that it is about."""
    folder, _, name = item.uri.rpartition("/")
    try:
        if name == MANIFEST:
            seals.read_manifest(folder)
        elif item.folder is not None and item.uri.endswith("/".join(item.folder.record)):
            named = references.folders_in(files.read_json(item.uri))
            return not all(files.is_below(path) for _, path in named if path)
    except DamagedError:
        return True
    return False


def _state_of_sealed(uri: str) -> State:
    filesystem, path = files.locate(uri)

    def action() -> State:
        with filesystem.open_input_file(path) as file:
            return seals.check(file)

    return files.with_retries(uri, action)


def state_of_json(data: bytes) -> State:
    """Check all bytes of a JSON file that `files.write_json` wrote."""
    try:
        value = json.loads(data)
    except ValueError:
        return "damaged"
    if not isinstance(value, dict):
        return "not covered"
    if files.CHECKSUM in value:
        # The same content in other bytes, such as upper-case digits, is damage too.
        return "sound" if files.encode_json(without(value, files.CHECKSUM)) == data else "damaged"
    has_checksum = any(
        json.loads(files.encode_json(without(value, name)))[files.CHECKSUM] == value[name]
        for name in value
        if isinstance(value[name], str) and len(value[name]) == 64
    )
    return "damaged" if has_checksum else "not covered"  # damaged in the name of its key


def without(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if key != name}


def check_all(items: Sequence[Item], jobs: int, on_done: Callable[[Item], None] = lambda _: None) -> list[State]:
    """Check files in `jobs` threads; returns their states in order."""
    with concurrent.futures.ThreadPoolExecutor(jobs, thread_name_prefix="verify") as pool:
        states = []
        for item, state in zip(items, pool.map(state_of, items), strict=True):
            states.append(state)
            on_done(item)
        return states


def survey(store: Store) -> list[Item]:
    """All files that records refer to, with those that are missing.

    Raises:
        StorageError: the folders of the records cannot be listed.
    """
    try:
        return [*_Survey(store).items()]
    except OSError as error:
        where, reason = error.filename or store.root, reason_of(error)
        raise StorageError(
            f"{where}: cannot be read: {reason}. Mend the disk or the permissions, and try again."
        ) from error


class _Survey:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.pipelines = references.pipelines(store)
        self.records = dict(references.committed(store))
        try:
            self.versions = references.dataset_versions(store)
        except Exception:  # the items of the table say what is wrong
            self.versions = []

    def items(self) -> Iterator[Item]:
        yield from self._records()
        yield from self._tables()
        yield from self._folders()
        yield from self._stacks()
        yield from self._mlflow()

    def _records(self) -> Iterator[Item]:
        sizes = self._sizes("stages")
        for folder in self.records:
            uri, what = self.store.uri(*folder.record), f"commit record of the stage {folder.stage}"
            yield Item(uri, sizes.get(folder.record, 0), what, self._rerun(folder), folder=folder)
        history = "restore it from a copy, or remove it: it is history, from which nothing is made"
        for path, size in self._sizes("runs").items():
            if path[-1].endswith(".json") and len(path) == 3:
                yield Item(self.store.uri(*path), size, "record of a run", history)
        for path, size in self._sizes("takedowns").items():
            if path[-1].endswith(".json") and len(path) == 2:
                yield Item(self.store.uri(*path), size, "ledger of a takedown", "restore it from a copy")
        for path, size in self._sizes(*RECORDED).items():
            what, remedy = "recorded takedown", "repeat the takedown, and remove the file"
            yield Item(self.store.uri(*path), size, what, remedy)
        for kind, what in (
            ("attempts", "number of a download attempt"),
            ("scenes", "list of procedural images"),
            ("scores", "scores of a published stack"),
        ):
            for path, size in self._sizes(kind).items():
                remedy = self._dropped(self._run())
                yield Item(self.store.uri(*path), size, what, remedy, is_disposable=True)
        if self.store.exists(TOMBSTONES):
            remedy = "restore it from a copy, or repeat the takedowns that the files in takedowns/ list, before any run"
            yield self._file(TOMBSTONES, what="everything that was taken down", remedy=remedy)
        for name in self.store.list("results"):
            remedy = f"`{self._made_results(name)}`"
            yield from self._folder(("results", name), f"results of {name}", remedy)

    def _tables(self) -> Iterator[Item]:
        needed: dict[tuple[str, ...], set[int]] = collections.defaultdict(set)
        runs: dict[tuple[str, ...], str] = {}
        for version in references.versions_in(self.versions):
            needed[version.table].add(version.number)
        for folder, record in self.records.items():
            for version in references.versions_in(record):
                needed[version.table].add(version.number)
                runs[version.table] = self._run(self.pipelines.get(folder))
        paths: list[tuple[str, ...]] = [(kind, name) for kind in _TABLES for name in self.store.list(kind)]
        for path in [*paths, ("snapshots",)]:
            if self.store.exists(*path):
                yield from self._table(path, needed[path], runs.get(path, self._run()))

    def _table(self, path: tuple[str, ...], needed: Collection[int], run: str) -> Iterator[Item]:
        """Log of a table, and the parts of its newest version and of those that records refer to."""
        table, name = self.store.uri(*path), "/".join(path)
        remedy = f"restore it from a copy; or remove the folder {table} and `{run}`, which makes all of the table again"
        entries = _listed(table)
        if entries is None:
            yield Item(table, 0, f"table {name}", remedy, is_folder=True)
            return
        expected, _ = _expected(table, [MANIFEST] if MANIFEST in entries else [])
        logs = [entry for entry in entries if entry.startswith("_delta_log/")]
        for each in sorted({*logs, *expected}):
            size = entries[each].size if each in entries else 0
            what = f"log of the table {name}"
            yield Item(f"{table}/{each}", size, what, remedy, expected.get(each), is_foreign=True)
        if MANIFEST in entries:
            yield Item(f"{table}/{MANIFEST}", entries[MANIFEST].size, f"digests of the log of {name}", remedy)
        try:
            newest = set(map(_name, tables.files(table)))
            committed = tables.recorded_hashes(table)
        except Exception:  # whatever a damaged log makes of Delta's reader
            yield Item(f"{table}/_delta_log/missing", 0, f"log of the table {name}: it cannot be read", remedy)
            return
        older = set[str]().union(*(references.files_of(table, number) for number in needed))
        part = (path[0], path[-1])
        remedy = self._dropped(run)
        for each in sorted(newest | (older & entries.keys())):  # a takedown deletes files of older versions
            size = entries[each].size if each in entries else 0
            what = f"part of the table {name}"
            yield Item(f"{table}/{each}", size, what, remedy, committed=committed.get(each), part=part)

    def _folders(self) -> Iterator[Item]:
        """Files of all stages that are done, and whatever records refer to in them."""
        values = {folder: record for folder, record in self.records.items() if record is not None}
        named: dict[Folder, set[str]] = collections.defaultdict(set)
        for record in [*values.values(), *self.versions, *self._published()]:
            for folder, path in references.folders_in(record):
                if files.is_below(path):
                    named[folder].add(path)
        for folder in sorted(self.records):
            what = f"file of the stage {folder.stage}"
            yield from self._folder(folder.path, what, self._rerun(folder), folder, named[folder])

    def _folder(
        self,
        path: Sequence[str],
        what: str,
        remedy: str,
        folder: Folder | None = None,
        named: Collection[str] = (),
    ) -> Iterator[Item]:
        """Files of a folder and those that its manifests, its ranges or records expect in it."""
        root = self.store.uri(*path)
        entries = _listed(root)
        if entries is None:
            yield Item(root, 0, what, remedy, folder=folder, is_folder=True)
            return
        expected, others = _expected(root, [name for name in entries if _name(name) == MANIFEST])
        for name, entry in entries.items():
            yield Item(f"{root}/{name}", entry.size, what, remedy, expected.get(name), folder=folder)
        missing = {*expected, *others, *_missing_ranges(entries)} - entries.keys()
        missing |= {name for name in named if not any(_is_in(entry, name) for entry in entries)}
        for name in sorted(missing):
            yield Item(f"{root}/{name}", 0, what, remedy, folder=folder)

    def _stacks(self) -> Iterator[Item]:
        for name in self.store.list("published"):
            folder = self._publisher(name.removesuffix(".json"))
            remedy = "`unclip import` it again under another name" if folder is None else self._rerun(folder)
            yield self._file("published", name, what="record of a published stack", remedy=remedy, folder=folder)
        for name in self.store.list("imported"):
            remedy = f"remove the folder and `unclip import` again with --name {name}"
            yield from self._folder(("imported", name), "imported stack", remedy)

    def _published(self) -> Iterator[Any]:
        for name in self.store.list("published"):
            with contextlib.suppress(DamagedError, OSError):
                yield self.store.read_json("published", name)

    def _publisher(self, name: str) -> Folder | None:
        """Stage that published a stack last."""
        stages = [
            folder
            for folder in self.pipelines
            if folder.stage == "publish" and (record := self.records.get(folder)) is not None
            if record.get("facts", {}).get("name") == name
        ]
        return stages[-1] if stages else None

    def _mlflow(self) -> Iterator[Item]:
        remedy = "restore mlflow.db and mlflow-artifacts from a copy"
        if not self.store.is_local:
            return
        yield from self._folder(("mlflow-artifacts",), "artifact of MLflow", remedy)
        if self.store.exists("mlflow.db"):
            yield self._file("mlflow.db", what="database of MLflow", remedy=remedy, is_foreign=True)

    def _sizes(self, *path: str) -> dict[tuple[str, ...], int]:
        """Path -> bytes of all files below a folder, in one request."""
        return {(*path, *entry.name.split("/")): entry.size for entry in files.walk(self.store.uri(*path))}

    def _file(self, *path: str, what: str, remedy: str, **facts: Any) -> Item:
        uri = self.store.uri(*path)
        return Item(uri, files.size_of(uri), what, remedy, **facts)

    def _rerun(self, folder: Folder) -> str:
        return self._dropped(self._run(self.pipelines.get(folder)))

    def _made_results(self, name: str) -> str:
        """Command that made a folder of results, if its summary can be read and says so."""
        with contextlib.suppress(OSError, DamagedError, AttributeError):  # or not the summary that is expected there
            if command := self.store.read_json("results", name, "summary.json").get("command"):
                return self._command(*command)
        return self._run(name)

    def _run(self, pipeline: str | None = None) -> str:
        """Command that runs a pipeline; None stands for the only one of the storage."""
        known = set(self.pipelines.values())
        return self._command("unclip run", pipeline or (known.pop() if len(known) == 1 else "PIPELINE"))

    def _dropped(self, command: str) -> str:
        return f"`{self._command('unclip verify --drop')}`, then `{command}`"

    def _command(self, program: str, *words: str) -> str:
        option = [] if self.store.root == Store(DEFAULT_ROOT).root else ["--storage", self.store.root]
        return shlex.join([*program.split(), *words, *option])


def _listed(root: str) -> dict[str, files.Entry] | None:
    """Name -> file of all files in a folder and below it; None if it cannot be listed."""
    try:
        return {entry.name: entry for entry in files.walk(root)}
    except OSError:
        return None


def _expected(root: str, manifests: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Contents that the readable manifests in a folder and below it name.

    Returns:
        Name below the folder -> sha256; the names of the files that the folder's own manifest expects without a digest, see
        `seals.cover`.
    """
    found, others = dict[str, str](), list[str]()
    for manifest in manifests:
        start = manifest.removesuffix(MANIFEST)
        try:
            hashes, without_digest = seals.read_manifest(f"{root}/{start}".removesuffix("/"))
        except (DamagedError, OSError):  # the manifest itself is an item
            continue
        found |= {f"{start}{name}": digest for name, digest in hashes.items()}
        others += [] if start else without_digest
    return found, others


def _missing_ranges(names: Iterable[str]) -> set[str]:
    """Names of the files that lack among those that are named after ranges, `00003-of-00016`."""
    groups: dict[tuple[str, int, str], set[int]] = collections.defaultdict(set)
    for name in names:
        if match := _RANGE.match(name):
            groups[f"{match[1] or ''}{match[2]}", int(match[4]), match[5]].add(int(match[3]))
    return {
        f"{start}{number:05d}-of-{count:05d}{end}"
        for (start, count, end), found in groups.items()
        for number in set(range(count)) - found
    }


def _is_in(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}/")


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def _is_sound_database(path: str) -> bool:
    try:
        with sqlite3.connect(f"file:{urllib.parse.quote(path)}?mode=ro", uri=True) as connection:
            return bool(connection.execute("PRAGMA integrity_check(1)").fetchone()[0] == "ok")
    except sqlite3.Error:
        return False


def drop(
    store: Store, problems: Sequence[Problem], held: Held | None = None, follow_links: bool = False
) -> list[Problem]:
    """Drop damaged and missing files, with the commit records that refer to them, so that the next run makes them again.

    Rows of a damaged part leave its table, and are fetched or embedded again. To resume after an interruption, call it again.

    Args:
        held: lock of the storage, which the caller holds.
        follow_links: drop files behind folders of the root that are links, too; behind other links none is dropped.

    Returns:
        Problems that remain, since no run makes these files, their content is not known, or they are behind a link.

    Raises:
        AlreadyRunningError: another process has taken over the lock.
    """

    place = store.inside if follow_links else functools.partial(files.below, store.root)

    def delete(uri: str) -> None:
        if held is not None:
            held.check()
        files.delete(place(uri.removeprefix(f"{store.root}/")))

    def is_inside(item: Item) -> bool:
        uris = [item.uri] if item.folder is None else [item.uri, store.uri(*item.folder.record)]
        with contextlib.suppress(DamagedError):
            return all(place(uri.removeprefix(f"{store.root}/")) for uri in uris)
        return False

    parts: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    folders, dropped, remaining = set[Folder](), list[Item](), list[Problem]()
    for problem in problems:
        item = problem.item
        if problem.state == "unreadable" or not is_inside(item):
            remaining.append(problem)
            continue
        if item.part is not None:
            parts[item.part].add(_name(item.uri))
        elif item.folder is not None:
            folders.add(item.folder)
        elif not item.is_disposable:
            remaining.append(problem)
            continue
        dropped.append(item)

    records = dict(references.committed(store))
    lost = _versions_with(store, parts, set(references.versions_in(list(records.values()))))
    for folder, record in records.items():
        named = {each for each, _ in references.folders_in(record)}
        is_unlisted = folder.stage == "curate" and ("snapshots", "snapshots") in parts  # it lists its version again
        if folder in folders or named & folders or is_unlisted or lost.intersection(references.versions_in(record)):
            delete(store.uri(*folder.record))
    for (kind, name), names in parts.items():
        if kind == "index":
            delete(store.uri("index", name))  # the next run makes it again
            continue
        table = store.uri(kind) if kind == "snapshots" else store.uri(kind, name)
        current = names.intersection(map(_name, tables.files(table)))
        version = tables.remove_files(table, sorted(current)) if current else tables.version(table)
        if kind == "images" and version is not None and store.exists("index", name):
            index.update_index(table, version)
    for item in dropped:
        if item.folder is not None:
            root, manifest = store.uri(*item.folder.path), item.uri
            while (manifest := manifest.rpartition("/")[0]).startswith(root):  # a manifest marks a folder as complete
                delete(f"{manifest}/{MANIFEST}")
        delete(item.uri)
    return remaining


def _versions_with(
    store: Store, parts: Mapping[tuple[str, str], Collection[str]], versions: Iterable[Version]
) -> set[Version]:
    """Versions that have one of the parts; any version of an index, which is made again as a whole."""
    found = set()
    for version in versions:
        names = parts.get(version.table, ())
        if names and (
            version.kind == "index"
            or not references.files_of(store.uri(*version.table), version.number).isdisjoint(names)
        ):
            found.add(version)
    return found
