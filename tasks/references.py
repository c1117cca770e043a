"""References between the records of a storage: the stage folders and table versions that a JSON value names."""

import collections
import concurrent.futures
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tasks import tables
from tasks.run_records import is_alive, is_running, stage_events
from tasks.store import Store
from unclip import files
from unclip.errors import DamagedError

# Wherever the storage was when the record was written.
_FOLDER = re.compile(r"(?:^|[/:])artifacts/([^/]+)/([0-9a-f]{64})(?:/(.*))?$")
_TABLES = {"images": "images", "embeddings": "embeddings", "derived": "derived", "index": "images"}
"""Kind of a table -> fact that names it; the index of an images table has its name."""
_READS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, order=True)
class Folder:
    """Folder of a stage's files, and the name of its commit record."""

    stage: str
    fingerprint: str

    @property
    def path(self) -> tuple[str, str, str]:
        return "artifacts", self.stage, self.fingerprint

    @property
    def record(self) -> tuple[str, str, str]:
        return "stages", self.stage, f"{self.fingerprint}.json"


@dataclasses.dataclass(frozen=True, order=True)
class Version:
    """Version of a Delta table of the storage."""

    kind: str
    """images, embeddings, derived or index."""
    name: str
    number: int

    @property
    def table(self) -> tuple[str, str]:
        return self.kind, self.name


def folders_in(value: Any) -> Iterator[tuple[Folder, str]]:
    """Yield each stage folder that a JSON value names, with the path below it; "" is the folder itself."""
    for text in _texts(value):
        if match := _FOLDER.search(text):
            yield Folder(match[1], match[2]), match[3] or ""


def versions_in(value: Any) -> Iterator[Version]:
    """Yield the table versions that a JSON value names."""
    if isinstance(value, Mapping):
        for kind, fact in _TABLES.items():
            uri, number = value.get(fact), value.get(f"{kind}_version")
            if isinstance(uri, str) and isinstance(number, int):
                yield Version(kind, uri.rstrip("/").rpartition("/")[2], number)
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from versions_in(inner)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def closure(folders: Iterable[Folder], record_of: Callable[[Folder], Any]) -> set[Folder]:
    """Folders with all that their records refer to, directly or through others.

    Args:
        record_of: record of a folder; None if it has none.
    """
    found = set(folders)
    waiting = list(found)
    while waiting:
        new = {folder for folder, _ in folders_in(record_of(waiting.pop()))} - found
        found |= new
        waiting += new
    return found


def files_of(table: str, number: int) -> set[str]:
    """Names of the files of a version of a table; none if its log does not reach back to it, so that nothing can read it.

    Raises:
        Exception: whatever reading the newest version raises; then it is the table that cannot be read.
    """
    try:
        uris = tables.files(table, number)
    except Exception:  # of many types, by what is left of the log
        tables.files(table)
        return set()
    return {uri.rpartition("/")[2] for uri in uris}


def committed(store: Store) -> Iterator[tuple[Folder, Any]]:
    """Yield the commit record of each stage; None if it cannot be read."""
    paths = [
        ("stages", *entry.name.split("/")) for entry in files.walk(store.uri("stages")) if entry.name.count("/") == 1
    ]
    for (_, stage, name), record in _read_all(store, paths, (DamagedError, OSError)):
        yield Folder(stage, name.removesuffix(".json")), record


def dataset_versions(store: Store) -> list[dict[str, Any]]:
    """Rows of the `snapshots` table."""
    table = store.uri("snapshots")
    return [] if tables.version(table) is None else list(tables.read_with_commit_times(table).to_pylist())


def last_reached(store: Store) -> Iterator[tuple[str, Folder]]:
    """Yield for each pipeline, and each stage that a run of it reached, the folder of the last run.

    Raises:
        DamagedError: a record of a run cannot be read.
    """
    found: dict[tuple[str, str], Folder] = {}
    for pipeline, event in _events(store):
        if event.get("fingerprint"):
            found[pipeline, event["stage"]] = Folder(event["stage"], event["fingerprint"])
    for (pipeline, _), folder in found.items():
        yield pipeline, folder


def in_use(store: Store, ended: set[str] | None = None) -> set[Folder]:
    """Folders of all stages that runs which are still running have reached.

    Args:
        ended: runs that are known to have ended, and need not be asked again; those that have are added.
    """
    ended = set() if ended is None else ended
    paths = [("runs", run_id, "run.json") for run_id in store.list("runs") if run_id not in ended]
    found = set()
    for (_, run_id, _), record in _read_all(store, paths, (FileNotFoundError,)):
        if record is not None and is_alive(store, run_id, record):
            events = stage_events(store, run_id).values()
            found |= {Folder(event["stage"], event["fingerprint"]) for event in events if event.get("fingerprint")}
        elif record is not None and not is_running(record):  # a driver of another machine may only have been silent
            ended.add(run_id)
    return found


def pipelines(store: Store) -> dict[Folder, str]:
    """Stage folder -> pipeline of the last run that made or used it."""
    return {
        Folder(event["stage"], event["fingerprint"]): pipeline
        for pipeline, event in _events(store, (DamagedError, OSError))
        if event.get("fingerprint")
    }


def _events(store: Store, skipped: tuple[type[Exception], ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the pipeline and the last event of each stage of each run, oldest run first.

    Args:
        skipped: errors of records that are left out.
    """
    runs: dict[str, list[str]] = collections.defaultdict(list)
    for entry in files.walk(store.uri("runs")):  # one request, however many runs there are
        run_id, _, name = entry.name.partition("/")
        if name.endswith(".json") and "/" not in name:
            runs[run_id].append(name)
    # Names are sorted, and "run.json" says which pipeline the others belong to.
    paths = [
        ("runs", run_id, name)
        for run_id, names in sorted(runs.items())
        if "run.json" in names
        for name in ("run.json", *(name for name in names if name != "run.json"))
    ]
    pipeline: str | None = None
    for (_, _, name), record in _read_all(store, paths, skipped):
        if name == "run.json":
            pipeline = None if record is None else record["pipeline"]
        elif pipeline is not None and record is not None and "stage" in record:
            yield pipeline, record


def _read_all(
    store: Store, paths: Sequence[tuple[str, ...]], skipped: tuple[type[Exception], ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the paths of JSON files with their content, in order; None if reading one raises an error that is skipped."""

    def read(path: tuple[str, ...]) -> Any:
        try:
            return store.read_json(*path)
        except skipped:
            return None

    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as pool:  # object stores answer slowly
        yield from zip(paths, pool.map(read, paths), strict=True)
