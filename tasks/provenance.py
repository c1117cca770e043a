"""Where a row came from and what became of it, and how two dataset versions differ."""

import collections
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks import rows, tables
from tasks.store import Store
from unclip import files
from unclip.config import nearest
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
    """Key -> kept, or the reason; of rows with the same key the one that is kept counts."""
    selection = tables.read_file(version.facts["selection"], ["key", "status", "reason"])
    fates: dict[str, str] = {}
    for key, status, reason in zip(*(selection[name].to_pylist() for name in selection.column_names), strict=True):
        if status == rows.KEPT:
            fates[key] = rows.KEPT
        else:
            fates.setdefault(key, reason)
    return fates


def show(store: Store, key: str) -> dict[str, Any]:
    """All that is known of a row.

    Args:
        key: or its beginning, at least 6 digits.

    Raises:
        InputError: no row, or several, have this key.
    """
    lists = [store.uri("artifacts", "ingest", name, "pairs.parquet") for name in store.list("artifacts", "ingest")]
    listed = {uri: _rows_of(uri, key) for uri in lists if files.exists(uri)}
    images = {
        uri: _rows_of_table(uri, key)
        for uri in (store.uri("images", name) for name in store.list("images"))
        if tables.version(uri) is not None
    }
    keys = {row["key"] for found in (*listed.values(), *images.values()) for row in found}
    if len(keys) != 1 or len(key) < 6:
        close = nearest(key, keys) if len(keys) > 1 else "Take a key from a table, or of `unclip data diff --keys`."
        raise InputError(f"{key}: {len(keys)} rows have a key that begins like this. {close}")
    [key] = keys
    facts: dict[str, Any] = {"key": key}
    for uri, found in listed.items():
        for row in found:
            if row["url"]:
                facts |= {"url": row["url"], "caption": row["caption"]}
            place = f"list {uri.split('/')[-2][:8]} row {row['position']}"
            facts[place] = row["reason"] or row["status"]
    for uri, found in images.items():
        for row in found:
            facts[f"images {uri.rpartition('/')[2]}"] = {
                name: value
                for name, value in row.items()
                if name not in ("key", "url", "caption") and value is not None
            }
    facts["datasets"] = {}
    for version in versions(store):
        fates = {
            row["reason"] or f"{row['status']} ({row['split']})" for row in _rows_of(version.facts["selection"], key)
        }
        scores = _rows_of(version.facts["scores"], key) if fates else []
        facts["datasets"][f"{version.number} {version.digest[:8]}"] = ", ".join(
            [*sorted(fates), *(f"{name} {value:.3f}" for row in scores for name, value in row.items() if name != "key")]
        )
    if store.exists("tombstones.parquet"):
        stones = tables.read_file(store.uri("tombstones.parquet")).to_pylist()
        facts["taken down because of"] = sorted({stone["request"] for stone in stones if stone["value"] == key})
    return {name: value for name, value in facts.items() if value not in ({}, [])}


def _rows_of(uri: str, key: str) -> list[dict[str, Any]]:
    table = tables.read_file(uri)
    found: list[dict[str, Any]] = table.filter(pc.starts_with(table["key"], key)).to_pylist()
    return found


def _rows_of_table(uri: str, key: str) -> list[dict[str, Any]]:
    columns = [name for name in tables.columns(uri) if name != "jpg"]
    table: pa.Table = tables.read(uri, columns=columns)
    found: list[dict[str, Any]] = table.filter(pc.starts_with(table["key"], key)).to_pylist()
    return found
