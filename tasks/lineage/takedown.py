"""Takedown: delete rows everywhere and keep them from coming back.

Requests become tombstones, which ingest and download respect from then on. Then the rows and their bytes are deleted from
all tables, and blanked in lists and reports. The ledger names the dataset versions that contained them and, through MLflow,
the runs and registered models that read those versions.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import rows, tables
from tasks.lineage.traces import Traces, redact, remove
from tasks.store import Store
from tasks.tombstones import SCHEMA, Tombstone, Tombstones, gather, load_tombstones, refuse
from tasks.tracking import PREVIEW_KEYS, PREVIEWS
from tasks.untrusted.normalise import normalise_url
from unclip import files
from unclip.errors import InputError


def parse(kind: str, value: str) -> Tombstone:
    """Check a request and return its tombstone.

    Raises:
        InputError: the value does not fit its kind.
    """
    value = value.strip()
    url = normalise_url(value) if kind == "url" else None
    cleaned = {"url": url or "", "domain": value.lower().strip(".")}.get(kind, value.lower())
    patterns = {"key": r"[0-9a-f]{32}", "sha256": r"[0-9a-f]{64}", "domain": r"(?!-)[^\s/:@*]+", "url": r".+"}
    if not re.fullmatch(patterns[kind], cleaned):
        expected = {
            "key": "32 hex digits, as `unclip data show` prints",
            "sha256": "64 hex digits, the hash of the image file as downloaded",
            "domain": "a host without scheme and port, such as example.com",
            "url": "an http or https URL",
        }
        raise InputError(f"takedown: got {kind} {value!r}, expected {expected[kind]}.")
    return Tombstone(kind, cleaned)  # type: ignore[arg-type]


def parse_file(path: str) -> list[Tombstone]:
    """Read tombstones from a list with a key, URL, domain or sha256 on each line; skip empty lines and lines that begin with #.

    Raises:
        InputError: the file cannot be read, or a line is none of these; names the line.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"takedown: {path} cannot be read: {error}. Name a text file.") from None
    found = []
    for number, line in enumerate(lines, start=1):
        value = line.strip()
        if not value or value.startswith("#"):
            continue
        lengths = {32: "key", 64: "sha256"}
        is_hash = bool(re.fullmatch(r"[0-9a-fA-F]+", value))
        kind = "url" if "://" in value else lengths.get(len(value), "domain") if is_hash else "domain"
        try:
            found.append(parse(kind, value))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return found


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Result of a takedown."""

    requests: tuple[str, ...]
    keys: tuple[str, ...]
    """Keys of all requested rows, and of the rows with the same image."""
    deleted: Mapping[str, int]
    """Table -> number of deleted rows."""
    datasets: tuple[str, ...]
    """Digests of the dataset versions that kept such a row, so that models may have trained on it."""
    traces: Traces
    """Runs and registered models that read those versions, and previews that showed the rows."""


def find_keys(store: Store, requested: Sequence[Tombstone], near: int | None = None) -> dict[Tombstone, set[str]]:
    """Find the keys of the rows that each tombstone covers, in all tables, with their duplicates: rows with the same image.

    Args:
        near: bits in which the perceptual hash of a duplicate may differ; None matches identical bytes only.
    """
    found: dict[Tombstone, set[str]] = {
        tombstone: {tombstone.value} if tombstone.kind == "key" else set() for tombstone in requested
    }
    for uri in image_tables(store):
        images = tables.read(uri, columns=["key", "url", "sha256", "phash"])
        listed = [images[name].to_pylist() for name in ("key", "url", "sha256", "phash")]
        for tombstone, keys in found.items():
            one = gather([tombstone])
            hit = {
                index
                for index, (key, url, digest, _) in enumerate(zip(*listed, strict=True))
                if one.has_pair(key, url) or digest in one.sha256s
            }
            digests = {listed[2][index] for index in hit} - {None}
            hit |= {index for index, digest in enumerate(listed[2]) if digest in digests}
            if near is not None:
                hit |= _near([value and int(value, 16) for value in listed[3]], hit, near)
            keys |= {listed[0][index] for index in hit}
    return found


def take_down(store: Store, requested: Sequence[Tombstone], near: int | None, tracking_uris: Sequence[str]) -> Ledger:
    """Carry out a takedown; repeat it to finish one that was interrupted or that could not reach an MLflow server.

    The caller holds the storage's lock, so that no run reads rows while they are deleted.
    """
    found = find_keys(store, requested, near)
    by_request = _remember(store, requested, found)
    keys = sorted(set().union(*by_request.values()))
    deleted = {}
    tombstones = load_tombstones(store)
    all_keys = pa.array(sorted(tombstones.keys), pa.string())
    for uri in (*image_tables(store), *_tables(store, "embeddings")):
        deleted[uri.removeprefix(f"{store.root}/")] = tables.delete_rows(uri, all_keys)
    _blank_lists(store, tombstones)
    files.delete(
        store.uri("artifacts", "download")
    )  # plans of killed runs, with URLs and captions; the next run plans anew
    _redact_reports(store, tombstones.keys)
    _delete_previews(store, tombstones.keys)
    datasets = _datasets_with(store, set(keys))
    traces = remove(store, tracking_uris, tombstones.keys, datasets)
    requests = tuple(str(tombstone) for tombstone in requested)
    return Ledger(requests, tuple(keys), deleted, tuple(datasets), traces)


def image_tables(store: Store) -> list[str]:
    """Return the URIs of the image tables, one per recipe."""
    return _tables(store, "images")


def _remember(
    store: Store, requested: Iterable[Tombstone], found: Mapping[Tombstone, set[str]]
) -> dict[Tombstone, set[str]]:
    """Write the tombstones; return the keys that each request matched, now or in an earlier attempt."""
    uri = store.uri("tombstones.parquet")
    known = tables.read_file(uri).to_pylist() if files.exists(uri) else []
    entries = {(row["kind"], row["value"], row["request"]) for row in known}
    for tombstone in requested:
        entries.add((tombstone.kind, tombstone.value, str(tombstone)))
        entries |= {("key", key, str(tombstone)) for key in found[tombstone]}
        entries |= {("sha256", digest, str(tombstone)) for digest in _digests_of(store, found[tombstone])}
    names = SCHEMA.names
    ordered = [dict(zip(names, entry, strict=True)) for entry in sorted(entries)]
    tables.write_file(uri, pa.Table.from_pylist(ordered, schema=SCHEMA))
    return {
        tombstone: {value for kind, value, request in entries if kind == "key" and request == str(tombstone)}
        for tombstone in requested
    }


def _digests_of(store: Store, keys: set[str]) -> set[str]:
    wanted = pa.array(sorted(keys), pa.string())
    digests: set[str] = set()
    for uri in image_tables(store):
        images = tables.read(uri, columns=["key", "sha256"])
        digests |= set(images.filter(pc.is_in(images["key"], value_set=wanted))["sha256"].to_pylist())
    return digests - {None}


def _tables(store: Store, kind: str) -> list[str]:
    uris = [store.uri(kind, name) for name in store.list(kind)]
    return [uri for uri in uris if tables.version(uri) is not None]


def _near(hashes: Sequence[int | None], hit: set[int], distance: int) -> set[int]:
    known = np.array([value is not None for value in hashes])
    values = np.array([value or 0 for value in hashes], np.uint64)
    found: set[int] = set()
    for index in hit:
        if known[index]:
            found |= set(np.flatnonzero(known & (np.bitwise_count(values ^ values[index]) <= distance)).tolist())
    return found


def _blank_lists(store: Store, tombstones: Tombstones) -> None:
    """Blank the rows in the lists that ingest wrote; the rows remain, so that positions and counts stay valid."""
    for name in store.list("artifacts", "ingest"):
        uri = store.uri("artifacts", "ingest", name, "pairs.parquet")
        if files.exists(uri):
            pairs = tables.read_file(uri)
            blanked = refuse(pairs, tombstones)
            if not blanked.equals(pairs):
                tables.write_file(uri, blanked)


def _redact_reports(store: Store, keys: frozenset[str]) -> None:
    """Remove images and captions of the rows from the report pages in the storage; `traces.remove` handles MLflow's copies."""
    folders: list[tuple[str, ...]] = [("artifacts", "report", name) for name in store.list("artifacts", "report")]
    folders += [("results", name) for name in store.list("results")]
    for folder in folders:
        if store.exists(*folder, "report.html"):
            page = files.read(store.uri(*folder, "report.html")).decode()
            if redact(page, keys) != page:
                files.write(store.uri(*folder, "report.html"), redact(page, keys).encode())


def _delete_previews(store: Store, keys: frozenset[str]) -> None:
    """Delete training previews that show one of the rows, and those whose rows are not recorded."""
    for stage in store.list("artifacts"):
        for name in store.list("artifacts", stage):
            folder = store.uri("artifacts", stage, name)
            if files.exists(f"{folder}/{PREVIEWS}"):
                is_recorded = files.exists(f"{folder}/{PREVIEW_KEYS}")
                if not is_recorded or not keys.isdisjoint(files.read_json(f"{folder}/{PREVIEW_KEYS}")):
                    files.delete(f"{folder}/{PREVIEWS}")


def _datasets_with(store: Store, keys: set[str]) -> list[str]:
    """Return the digests of the training selections, of CLIP and of snapshots, that kept one of the keys."""
    wanted, digests = pa.array(sorted(keys), pa.string()), []
    for stage in ("dedup", "curate"):
        for name in store.list("stages", stage):
            record = store.read_json("stages", stage, name)
            selection = tables.read_file(record["uri"], ["key", "status"])
            kept = selection.filter(pc.equal(selection["status"], rows.KEPT))
            if pc.any(pc.is_in(kept["key"], value_set=wanted)).as_py():
                digests.append(record["digest"])
    return sorted(set(digests))
