"""References between the records of a storage: the stage folders and table versions that a JSON value names."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tasks import tables
from tasks.run_records import is_alive, stage_events
from tasks.store import Store
from unclip.errors import DamagedError

# Wherever the storage was when the record was written.
_FOLDER = re.compile(r"(?:^|[/:])artifacts/([^/]+)/([0-9a-f]{64})(?:/(.*))?$")
_TABLES = {"images": "images", "embeddings": "embeddings", "index": "images"}
"""Kind of a table -> fact that names it; the index of an images table has its name."""


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
    """images, embeddings or index."""
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


def committed(store: Store) -> Iterator[tuple[Folder, Any]]:
    """Yield the commit record of each stage; None if it is damaged."""
    for stage in store.list("stages"):
        for name in store.list("stages", stage):
            try:
                record = store.read_json("stages", stage, name)
            except DamagedError:
                record = None
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


def in_use(store: Store) -> set[Folder]:
    """Folders of all stages that runs which are still running have reached."""
    found = set()
    for run_id in store.list("runs"):
        path = ("runs", run_id, "run.json")
        if store.exists(*path) and is_alive(store, run_id, store.read_json(*path)):
            events = stage_events(store, run_id).values()
            found |= {Folder(event["stage"], event["fingerprint"]) for event in events if event.get("fingerprint")}
    return found


def pipelines(store: Store) -> dict[Folder, str]:
    """Stage folder -> pipeline of the last run that made or used it."""
    return {
        Folder(event["stage"], event["fingerprint"]): pipeline
        for pipeline, event in _events(store, skips_damaged=True)
        if event.get("fingerprint")
    }


def _events(store: Store, skips_damaged: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the pipeline and the last event of each stage of each run, oldest run first."""
    suppressed = contextlib.suppress(DamagedError) if skips_damaged else contextlib.nullcontext()
    for run_id in store.list("runs"):
        names = store.list("runs", run_id)
        with suppressed:
            if "run.json" not in names:
                continue
            pipeline = store.read_json("runs", run_id, "run.json")["pipeline"]
            for name in names:
                if name.endswith(".json") and name != "run.json":
                    event = store.read_json("runs", run_id, name)
                    if "stage" in event:
                        yield pipeline, event
