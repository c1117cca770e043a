"""Lineage of published models: from a version to its dataset version, its refreshes and source lists, and the stage runs."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tasks.lineage.provenance import snapshot_of, versions
from tasks.published import Entry
from tasks.references import Folder
from tasks.run_records import stage_events
from tasks.store import Store


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Origins of one version, as far as the storage has records of them."""

    snapshot: str | None
    """Digest of the dataset version that its parts were trained on."""
    dataset_versions: tuple[Mapping[str, Any], ...]
    """That version and the refreshes before it, oldest first: number, digest, pipeline, committed (ISO 8601), counts, and the
    runs that made it with their lists."""
    stages: tuple[Mapping[str, Any], ...]
    """Stages that it was made of, oldest first: stage, fingerprint, run, pipeline, state, ended (seconds since 1970), seconds,
    mlflow_run. The run is the one that did the work, None if there is no record of it."""
    takedowns: tuple[str, ...]
    """Requests for takedowns of rows that its dataset version had."""


def trace(store: Store, entry: Entry) -> Lineage:
    """Collect the lineage of a version from the records of a storage."""
    runs = {
        run_id: _Run.read(store, run_id) for run_id in store.list("runs") if store.exists("runs", run_id, "run.json")
    }
    snapshot = snapshot_of(store, entry)
    return Lineage(
        snapshot,
        tuple(_dataset_versions(store, snapshot, runs)),
        tuple(_stages(entry, runs)),
        _takedowns(store, snapshot),
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    record: Mapping[str, Any]
    events: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, store: Store, run_id: str) -> "_Run":
        return cls(store.read_json("runs", run_id, "run.json"), stage_events(store, run_id))

    def reached(self, folder: Folder) -> str | None:
        """State of the stage in this run; None if it did not reach it."""
        event = self.events.get(folder.stage, {})
        return str(event["state"]) if event.get("fingerprint") == folder.fingerprint else None


def _stages(entry: Entry, runs: Mapping[str, _Run]) -> Iterator[dict[str, Any]]:
    """Yield the stages of the run that published an entry, each with the run that did the work."""
    folders = {stage: Folder(stage, fingerprint) for stage, fingerprint in entry.stages.items()}
    publisher = entry.publisher
    publishing = [run for run in runs.values() if publisher is not None and run.reached(publisher) is not None]
    for run in publishing[:1]:  # the data stages, which the entry does not name
        for stage, event in run.events.items():
            if event.get("fingerprint"):
                folders.setdefault(stage, Folder(stage, event["fingerprint"]))
    found = []
    for folder in folders.values():
        workers = [run_id for run_id, run in runs.items() if run.reached(folder) == "done"]
        facts: dict[str, Any] = {"stage": folder.stage, "fingerprint": folder.fingerprint}
        if not workers:
            found.append({**facts, **dict.fromkeys(("run", "pipeline", "state", "ended", "seconds", "mlflow_run"))})
            continue
        run = runs[workers[-1]]
        event = run.events[folder.stage]
        facts |= {"run": workers[-1], "pipeline": run.record["pipeline"], "state": event["state"], "ended": event["at"]}
        found.append({**facts, "seconds": event.get("seconds"), "mlflow_run": run.record.get("mlflow_run") or None})
    yield from sorted(found, key=lambda facts: facts["ended"] or 0.0)


def _dataset_versions(store: Store, snapshot: str | None, runs: Mapping[str, _Run]) -> Iterator[dict[str, Any]]:
    """Yield the dataset version with this digest, after those of the same pipeline before it."""
    known = versions(store)
    last = next((version for version in known if version.digest == snapshot), None)
    if last is None:
        return
    made: dict[str, list[Folder]] = collections.defaultdict(list)
    """Digest of a dataset version -> stages that made it."""
    for folder, digest in _curated(store):
        made[digest].append(folder)
    for version in known[: known.index(last) + 1]:
        if version.facts["pipeline"] != last.facts["pipeline"]:
            continue
        makers = {
            run_id: run
            for run_id, run in runs.items()
            if any(run.reached(folder) == "done" for folder in made[version.digest])
        }
        lists = {_list_of(run.record) for run in makers.values()}
        yield {
            "number": version.number,
            "digest": version.digest,
            "pipeline": version.facts["pipeline"],
            "committed": version.facts["committed"].isoformat(),
            "counts": version.counts,
            "runs": list(makers),
            "lists": sorted(filter(None, lists)),
        }


def _curated(store: Store) -> Iterator[tuple[Folder, str]]:
    """Yield the stages that made dataset versions, with the digests of these."""
    for name in store.list("stages", "curate"):
        yield Folder("curate", name.removesuffix(".json")), store.read_json("stages", "curate", name)["digest"]


def _list_of(record: Mapping[str, Any]) -> str | None:
    """List of URLs that a run was given."""
    urls = record.get("config", {}).get("ingest", {}).get("urls")
    return None if urls is None else str(urls)


def _takedowns(store: Store, snapshot: str | None) -> tuple[str, ...]:
    found: set[str] = set()
    for name in store.list("takedowns") if snapshot is not None else ():
        if name.endswith(".json"):
            ledger = store.read_json("takedowns", name)
            if snapshot in ledger.get("datasets", ()):
                found |= set(ledger.get("requests", ()))
    return tuple(sorted(found))
