"""Where a row came from and what became of it, and how two dataset versions differ."""

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
from tasks.duplicates import clusters_of
from tasks.rows import DUPLICATES
from tasks.snapshots import Snapshot
from tasks.stage import declared_name
from tasks.store import Store
from unclip import files
from unclip.errors import InputError


@dataclasses.dataclass(frozen=True)
class Version:
    """A dataset version of a storage."""

    number: int
    """1 is the first that was written."""
    digest: str
    facts: Mapping[str, Any]
    """The row of the `snapshots` table."""

    @property
    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = json.loads(self.facts["rows"])
        return counts


def versions(store: Store) -> list[Version]:
    """All dataset versions, the oldest first."""
    if tables.version(store.uri("snapshots")) is None:
        return []
    listed = tables.read_dated(store.uri("snapshots")).sort_by("number").to_pylist()
    return [Version(row["number"], row["digest"], row) for row in listed]


def find_version(store: Store, name: str) -> Version:
    """The dataset version with a number, or a digest or its beginning; `latest` is the last.

    Raises:
        InputError: there is none, or several.
    """
    known = versions(store)
    if not known:
        raise InputError(
            f"{store.root}: no dataset version was made here. Run a pipeline, or name its folder with --storage."
        )
    found = [version for version in known if str(version.number) == name] or [
        version for version in known if version.digest.startswith(name.lower()) and len(name) >= 4
    ]
    found = known[-1:] if name == "latest" else found
    if len(found) != 1:
        short = [f"{version.number} ({version.digest[:8]})" for version in known[-10:]]
        raise InputError(f"{name}: {len(found)} dataset versions have this name. The last are: {', '.join(short)}.")
    return found[0]


@dataclasses.dataclass(frozen=True)
class Difference:
    """What changed from one dataset version to another."""

    counts: tuple[Mapping[str, int], Mapping[str, int]]
    """in, kept, dropped, failed of both."""
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


def show(store: Store, key: str) -> dict[str, Any]:
    """All that is known of a row: its fate in words, where it was listed, its picture, and the versions and runs with it.

    Args:
        key: or its beginning, at least 6 digits.

    Returns:
        Name -> text, or a mapping of details; what is not known is left out.

    Raises:
        InputError: no row, or several, have this key; names the nearest one, or them.
    """
    lists = [store.uri("artifacts", "ingest", name, "pairs.parquet") for name in store.list("artifacts", "ingest")]
    lists = [uri for uri in lists if files.exists(uri)]
    pictures = [store.uri("images", name) for name in store.list("images")]
    pictures = [uri for uri in pictures if tables.version(uri) is not None]
    key = _whole_key(store, key.strip().lower(), lists, pictures)

    listed: dict[str, str] = {}
    known: dict[str, Any] = {}
    for uri in lists:
        for row in _rows_of(tables.read_file(uri), key):
            known |= {name: row[name] for name in ("url", "caption") if row[name]}
            listed[f"{uri.split('/')[-2][:8]} row {row['position']}"] = row["reason"] or row["status"]
    images: dict[str, str] = {}
    outcome = ""
    for uri in pictures:
        columns = [name for name in tables.columns(uri) if name != "jpg"]
        for row in _rows_of(tables.read(uri, columns=columns), key):
            known |= {name: row[name] for name in ("url", "caption") if row[name]}
            facts = {name: value for name, value in row.items() if value not in (None, "")}
            told = (f"{name} {value}" for name, value in facts.items() if name not in ("key", "url", "caption"))
            images[uri.rpartition("/")[2]] = ", ".join(told)
            outcome = row["reason"] or outcome
    datasets, held, fate, twin = {}, {}, "", {}
    for version in versions(store):
        found = _rows_of(tables.read_file(version.facts["selection"]), key)
        if found:
            row = next((row for row in found if row["status"] == rows.KEPT), found[0])
            said = f"kept ({row['split']})" if row["status"] == rows.KEPT else f"{row['status']}: {row['reason']}"
            scores = _rows_of(tables.read_file(version.facts["scores"]), key)
            measured = [f"{name} {value:.3f}" for row in scores for name, value in row.items() if name != "key"]
            datasets[f"{version.number} {version.digest[:8]}"] = ", ".join([said, *measured])
            fate = f"{said} in dataset version {version.number}"
            if row["status"] == rows.KEPT:
                held[version.digest] = (version.number, row["split"])
            else:
                fate += f": {rows.meaning(row['reason'])}"
            twin = _twin(version, key, row["reason"])
    if not fate:
        reason = next((reason for reason in (outcome, *listed.values()) if rows.is_reason(reason or "")), "")
        fate = "in no dataset version" + (f": {reason}, {rows.meaning(reason)}" if reason else " yet")
    requests = sorted({stone["request"] for stone in _tombstones(store) if stone["value"] == key})
    if requests:
        fate = f"taken down because of {', '.join(requests)}; before: {fate}"
    sections = {"lists": listed, "images": images, "same picture as": twin, "dataset versions": datasets}
    sections |= {"runs that had it": _runs_with(store, held)}
    return {"key": key, "fate": fate, **known, **{name: section for name, section in sections.items() if section}}


def _whole_key(store: Store, beginning: str, lists: Sequence[str], pictures: Sequence[str]) -> str:
    """The one key that begins like this, of all rows that are listed or stored or were taken down."""
    if len(beginning) < 6:
        raise InputError(f"{beginning}: got {len(beginning)} digits of a key, expected at least 6.")
    known = {stone["value"] for stone in _tombstones(store) if stone["kind"] == "key"}
    for column in (
        *(tables.read_file(uri, ["key"])["key"] for uri in lists),
        *(tables.read(uri, columns=["key"])["key"] for uri in pictures),
    ):
        known |= set(column.to_pylist())
    keys = sorted(known)
    place = bisect.bisect_left(keys, beginning)
    found = list(itertools.takewhile(lambda key: key.startswith(beginning), itertools.islice(keys, place, None)))
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise InputError(f"{beginning}: {len(found)} rows have a key that begins like this: {some}. Give more digits.")
    # Of sorted keys, one of the two neighbours shares the longest beginning.
    shared = {key: _num_shared(key, beginning) for key in keys[max(0, place - 1) : place + 1]}
    nearest = max(shared, key=lambda key: shared[key], default="")
    hint = f"Did you mean {nearest}?" if shared.get(nearest, 0) >= 4 else "`unclip data diff --keys` prints keys."
    where = f"none of the {len(keys):,} rows in {store.root}" if keys else f"{store.root} has no rows, so none"
    raise InputError(f"{beginning}: {where} has a key that begins like this. {hint}")


def _num_shared(key: str, other: str) -> int:
    """How many digits both begin with."""
    pairs = zip(key, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _twin(version: Version, key: str, reason: str | None) -> dict[str, str]:
    """The kept row that a duplicate was dropped for, and how alike they are; nothing for others."""
    if reason not in DUPLICATES:
        return {}
    fates = _fates(version)
    kept = [other for other, fate in fates.items() if fate == rows.KEPT]
    facts = {field.name: version.facts[field.name] for field in dataclasses.fields(Snapshot)}
    newest = Snapshot(**{**facts, "embeddings_version": tables.version(facts["embeddings"])})
    images = tables.read(facts["images"], columns=["key", "sha256", "phash"])
    found = clusters_of({key: reason}, kept, images, newest, 1)
    return {winner: note for (winner, _), (_, note) in found}


def _runs_with(store: Store, held: Mapping[str, tuple[int, str]]) -> dict[str, str]:
    """Runs of the pipeline that read one of these dataset versions, and what they trained.

    Args:
        held: digest -> number of the version and the row's split in it.
    """
    found = {}
    for run_id in store.list("runs"):
        if not store.exists("runs", run_id, "curate.json"):
            continue
        path = ("stages", "curate", f"{store.read_json('runs', run_id, 'curate.json').get('fingerprint')}.json")
        digest = store.read_json(*path)["digest"] if store.exists(*path) else None
        if digest is not None and digest in held:
            record = store.read_json("runs", run_id, "run.json")
            stages = sorted((name.removesuffix(".json") for name in store.list("runs", run_id)), key=len)
            models = [
                stage
                for model in ("prior", "decoder", "upsampler")
                for stage in stages
                if declared_name(stage) == model
            ]
            trained = f"models {', '.join(models)}" if models else "no model"
            number, split = held[digest]
            found[run_id] = f"{record['pipeline']}, {record['state']}, version {number} ({split}), {trained}"
    return found


def _tombstones(store: Store) -> list[dict[str, str]]:
    exists = store.exists("tombstones.parquet")
    return tables.read_file(store.uri("tombstones.parquet")).to_pylist() if exists else []


def _rows_of(table: pa.Table, key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table.filter(pc.equal(table["key"], key)).to_pylist()
    return found
