"""Provenance of rows, and differences between dataset versions."""

import bisect
import collections
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks import rows, tables
from tasks.duplicates import duplicate_clusters
from tasks.rows import DUPLICATES
from tasks.snapshots import Snapshot
from tasks.store import Store
from unclip import files
from unclip.errors import InputError


@dataclasses.dataclass(frozen=True)
class Version:
    """A dataset version of a storage."""

    number: int
    """Number of the version; the first is 1."""
    digest: str
    facts: Mapping[str, Any]
    """The row of the `snapshots` table."""

    @property
    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = json.loads(self.facts["rows"])
        return counts


def versions(store: Store) -> list[Version]:
    """Return all dataset versions, oldest first."""
    if tables.version(store.uri("snapshots")) is None:
        return []
    listed = tables.read_with_commit_times(store.uri("snapshots")).sort_by("number").to_pylist()
    return [Version(row["number"], row["digest"], row) for row in listed]


def find_version(store: Store, name: str) -> Version:
    """Return the dataset version with this number or digest prefix; `latest` is the newest.

    Raises:
        InputError: no version matches, or several do.
    """
    known = versions(store)
    if not known:
        raise InputError(f"{store.root}: has no dataset version. Run a pipeline, or name its folder with --storage.")
    found = [version for version in known if str(version.number) == name] or [
        version for version in known if version.digest.startswith(name.lower()) and len(name) >= 4
    ]
    found = known[-1:] if name == "latest" else found
    if len(found) != 1:
        short = [f"{version.number} ({version.digest[:8]})" for version in known[-10:]]
        raise InputError(f"{name}: {len(found)} dataset versions have this name. The latest are: {', '.join(short)}.")
    return found[0]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Differences between two dataset versions."""

    counts: tuple[Mapping[str, int], Mapping[str, int]]
    """Numbers of rows in, kept, dropped and failed, in both versions."""
    changes: Mapping[tuple[str, str], tuple[str, ...]]
    """(fate before, fate after) -> keys. A fate is kept, a reason, or absent."""


def difference(old: Version, new: Version) -> Difference:
    """Compare two versions key by key."""
    before, after = _fates(old), _fates(new)
    changes: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for key in sorted(before.keys() | after.keys()):
        fates = (before.get(key, "absent"), after.get(key, "absent"))
        if fates[0] != fates[1]:
            changes[fates].append(key)
    ordered = sorted(changes.items(), key=lambda item: (-len(item[1]), item[0]))
    return Difference((old.counts, new.counts), {fates: tuple(keys) for fates, keys in ordered})


def _fates(version: Version) -> dict[str, str]:
    return rows.fates(tables.read_file(version.facts["selection"], ["key", "status", "reason"]))


@dataclasses.dataclass(frozen=True)
class RowFacts:
    """All records of one row."""

    key: str
    fate: str
    """One sentence: kept, dropped or failed, in which version and why, and the takedown that removed it, if any."""
    url: str | None
    """None if the row was taken down; likewise the caption."""
    caption: str | None
    lists: tuple[Mapping[str, Any], ...]
    """Lists that contain the row: ingest (fingerprint), position, status, reason."""
    images: tuple[Mapping[str, Any], ...]
    """Downloads of the row: recipe, and the columns of the `images` table except those above and the image."""
    same_picture_as: tuple[Mapping[str, str], ...]
    """The kept row that it duplicates: key, note."""
    dataset_versions: tuple[Mapping[str, Any], ...]
    """Versions that contain the row: number, digest, status, reason, split, scores."""
    runs: tuple[Mapping[str, Any], ...]
    """Runs that read a version in which the row was kept: id, pipeline, state, dataset_version, split, models."""


def show(store: Store, key: str) -> dict[str, Any]:
    """Return `find_row` as text: name -> text, or a mapping of details; unknown entries are omitted."""
    row = find_row(store, key)
    sections = {
        "lists": {
            f"{each['ingest'][:8]} row {each['position']}": each["reason"] or each["status"] for each in row.lists
        },
        "images": {
            each["recipe"]: ", ".join(
                f"{name} {value}" for name, value in each.items() if name != "recipe" and value not in (None, "")
            )
            for each in row.images
        },
        "same picture as": {each["key"]: each["note"] for each in row.same_picture_as},
        "dataset versions": {
            f"{each['number']} {each['digest'][:8]}": ", ".join(
                [_fate(each), *(f"{name} {value:.3f}" for name, value in each["scores"].items())]
            )
            for each in row.dataset_versions
        },
        "runs that had it": {
            each["id"]: f"{each['pipeline']}, {each['state']}, version {each['dataset_version']} ({each['split']}), "
            + (f"models {', '.join(each['models'])}" if each["models"] else "no model")
            for each in row.runs
        },
    }
    known = {"key": row.key, "fate": row.fate, "url": row.url, "caption": row.caption, **sections}
    return {name: value for name, value in known.items() if value}


def _fate(row: Mapping[str, Any]) -> str:
    return f"kept ({row['split']})" if row["status"] == rows.KEPT else f"{row['status']}: {row['reason']}"


def find_row(store: Store, key: str) -> RowFacts:
    """Collect all records of a row: its fate, lists, image, dataset versions and runs.

    Args:
        key: the key, or its first digits, at least 6.

    Raises:
        InputError: no row matches, or several do; names the nearest key, or the matching ones.
    """
    lists = [store.uri("artifacts", "ingest", name, "pairs.parquet") for name in store.list("artifacts", "ingest")]
    lists = [uri for uri in lists if files.exists(uri)]
    image_tables = [store.uri("images", name) for name in store.list("images")]
    image_tables = [uri for uri in image_tables if tables.version(uri) is not None]
    key = _resolve_key(store, key.strip().lower(), lists, image_tables)

    listed: list[dict[str, Any]] = []
    known: dict[str, str] = {}
    for uri in lists:
        for row in _rows_of(tables.read_file(uri), key):
            known |= {name: row[name] for name in ("url", "caption") if row[name]}
            place = {"ingest": uri.split("/")[-2], "position": row["position"]}
            listed.append({**place, "status": row["status"], "reason": row["reason"] or None})
    images: list[dict[str, Any]] = []
    outcome = ""
    for uri in image_tables:
        columns = [name for name in tables.columns(uri) if name != "jpg"]
        for row in _rows_of(tables.read(uri, columns=columns), key):
            known |= {name: row[name] for name in ("url", "caption") if row[name]}
            facts = {name: value for name, value in row.items() if name not in ("key", "url", "caption")}
            images.append({"recipe": uri.rpartition("/")[2], **facts})
            outcome = row["reason"] or outcome
    datasets: list[dict[str, Any]] = []
    held, fate, original = {}, "", {}
    for version in versions(store):
        found = _rows_of(tables.read_file(version.facts["selection"]), key)
        if found:
            row = next((row for row in found if row["status"] == rows.KEPT), found[0])
            scores = _rows_of(tables.read_file(version.facts["scores"]), key)
            measured = {name: value for scored in scores for name, value in scored.items() if name != "key"}
            status = {name: row[name] for name in ("status", "reason", "split")}
            datasets.append({"number": version.number, "digest": version.digest, **status, "scores": measured})
            fate = f"{_fate(row)} in dataset version {version.number}"
            if row["status"] == rows.KEPT:
                held[version.digest] = (version.number, row["split"])
            else:
                fate += f": {rows.meaning(row['reason'])}"
            original = _duplicate_of(version, key, row["reason"])
    if not fate:
        reasons = (outcome, *(each["reason"] for each in listed))
        reason = next((reason for reason in reasons if rows.is_reason(reason or "")), "")
        fate = "in no dataset version" + (f": {reason}, {rows.meaning(reason)}" if reason else " yet")
    requests = sorted({stone["request"] for stone in _tombstones(store) if stone["value"] == key})
    if requests:
        fate = f"taken down because of {', '.join(requests)}; before: {fate}"
    duplicates = tuple({"key": winner, "note": note} for winner, note in original.items())
    return RowFacts(
        key,
        fate,
        known.get("url"),
        known.get("caption"),
        tuple(listed),
        tuple(images),
        duplicates,
        tuple(datasets),
        tuple(_runs_with(store, held)),
    )


def _resolve_key(store: Store, prefix: str, lists: Sequence[str], image_tables: Sequence[str]) -> str:
    """Return the one key with this prefix, among all rows that are listed, stored or taken down."""
    if len(prefix) < 6:
        raise InputError(f"{prefix}: got {len(prefix)} digits of a key, expected at least 6.")
    known = {stone["value"] for stone in _tombstones(store) if stone["kind"] == "key"}
    for column in (
        *(tables.read_file(uri, ["key"])["key"] for uri in lists),
        *(tables.read(uri, columns=["key"])["key"] for uri in image_tables),
    ):
        known |= set(column.to_pylist())
    keys = sorted(known)
    start = bisect.bisect_left(keys, prefix)
    found = list(itertools.takewhile(lambda key: key.startswith(prefix), itertools.islice(keys, start, None)))
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise InputError(f"{prefix}: {len(found)} rows have a key with this prefix: {some}. Give more digits.")
    # Among sorted keys, one of the two neighbours shares the longest prefix.
    prefix_lengths = {key: _common_prefix_length(key, prefix) for key in keys[max(0, start - 1) : start + 1]}
    nearest = max(prefix_lengths, key=lambda key: prefix_lengths[key], default="")
    hint = (
        f"Did you mean {nearest}?" if prefix_lengths.get(nearest, 0) >= 4 else "`unclip data diff --keys` prints keys."
    )
    where = f"none of the {len(keys):,} rows in {store.root}" if keys else f"{store.root} has no rows, so none"
    raise InputError(f"{prefix}: {where} has a key with this prefix. {hint}")


def _common_prefix_length(key: str, other: str) -> int:
    """Return the length of the common prefix."""
    pairs = zip(key, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _duplicate_of(version: Version, key: str, reason: str | None) -> dict[str, str]:
    """Return the kept row that a duplicate was dropped for, with a note on their similarity; empty for other rows."""
    if reason not in DUPLICATES:
        return {}
    fates = _fates(version)
    kept = [other for other, fate in fates.items() if fate == rows.KEPT]
    facts = {field.name: version.facts[field.name] for field in dataclasses.fields(Snapshot)}
    newest = Snapshot(**{**facts, "embeddings_version": tables.version(facts["embeddings"])})
    images = tables.read(facts["images"], columns=["key", "sha256", "phash"])
    found = duplicate_clusters({key: reason}, kept, images, newest, 1)
    return {winner: note for (winner, _), (_, note) in found}


def _runs_with(store: Store, held: Mapping[str, tuple[int, str]]) -> list[dict[str, Any]]:
    """Return the pipeline runs that read one of these dataset versions, with the models they trained.

    Args:
        held: digest -> version number, and the row's split in that version.
    """
    found = []
    for run_id in store.list("runs"):
        if not store.exists("runs", run_id, "curate.json"):
            continue
        path = ("stages", "curate", f"{store.read_json('runs', run_id, 'curate.json').get('fingerprint')}.json")
        digest = store.read_json(*path)["digest"] if store.exists(*path) else None
        if digest is not None and digest in held:
            record = store.read_json("runs", run_id, "run.json")
            models = _training_stages(store, run_id)
            number, split = held[digest]
            facts = {"id": run_id, "pipeline": record["pipeline"], "state": record["state"]}
            found.append({**facts, "dataset_version": number, "split": split, "models": models})
    return found


def _training_stages(store: Store, run_id: str) -> list[str]:
    """Return the stages of a run that trained on its dataset, the shortest names first and members by their number."""
    events = [store.read_json("runs", run_id, name) for name in store.list("runs", run_id) if name.endswith(".json")]
    trained = []
    for event in events:
        if "stage" not in event:
            continue
        artifact = ("stages", event["stage"], f"{event.get('fingerprint')}.json")
        # earlier releases did not record `trains`, but their artifacts have `samples_seen`
        by_facts = "trains" not in event and store.exists(*artifact)
        if event.get("trains") or (by_facts and "samples_seen" in store.read_json(*artifact)["facts"]):
            trained.append(event["stage"])
    return sorted(trained, key=lambda stage: (len(stage), stage))


def _tombstones(store: Store) -> list[dict[str, str]]:
    exists = store.exists("tombstones.parquet")
    return tables.read_file(store.uri("tombstones.parquet")).to_pylist() if exists else []


def _rows_of(table: pa.Table, key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table.filter(pc.equal(table["key"], key)).to_pylist()
    return found
