"""Takedown: delete rows everywhere and keep them from coming back.

Requests become tombstones, which ingest and download respect from then on. Then the rows and their bytes are deleted from
all tables, and blanked in lists and reports. Rows are found range by range in the index of the images, and only files that hold
them are written again. The ledger names the dataset versions that contained them and, through MLflow,
the runs and registered models that read those versions.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import index, ranges, rows, tables
from tasks.keys import hex_numbers
from tasks.lineage.provenance import delta_tables, pairs_folders
from tasks.lineage.traces import Traces, redact, remove
from tasks.store import INTERMEDIATE, Store
from tasks.tombstones import SCHEMA, Tombstone, Tombstones, gather, hosts_of, load_tombstones, refuse
from tasks.tracking import PREVIEW_KEYS, PREVIEWS
from tasks.untrusted import local_files
from tasks.untrusted.normalise import normalise_url
from unclip import files
from unclip.errors import InputError


def parse(kind: str, value: str) -> Tombstone:
    """Check a request and return its tombstone.

    Raises:
        InputError: the value does not fit its kind.
    """
    value = value.strip()
    url = (normalise_url(value) or local_files.to_url(value)) if kind == "url" else None
    cleaned = {"url": url or "", "domain": value.lower().strip(".")}.get(kind, value.lower())
    patterns = {"key": r"[0-9a-f]{32}", "sha256": r"[0-9a-f]{64}", "domain": r"(?!-)[^\s/:@*]+", "url": r".+"}
    if not re.fullmatch(patterns[kind], cleaned):
        expected = {
            "key": "32 hex digits, as `unclip data show` prints",
            "sha256": "64 hex digits, the hash of the image file as downloaded",
            "domain": "a host without scheme and port, such as example.com",
            "url": "an http or https URL, or the path of a local file",
        }
        raise InputError(f"takedown: got {kind} {value!r}, expected {expected[kind]}.")
    return Tombstone(kind, cleaned)  # type: ignore[arg-type]


def parse_file(path: str) -> list[Tombstone]:
    """Read tombstones from a list with a key, URL, domain or sha256 on each line; skip empty lines and lines that begin with #.

    Raises:
        InputError: the file cannot be read, or a line is none of these; names the line.
    """
    try:
        lines = files.decode_text(Path(path).read_bytes()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"takedown: {path} cannot be read: {error}. Name a text file.") from None
    found = []
    for number, line in enumerate(lines, start=1):
        value = line.strip()
        if not value or value.startswith("#"):
            continue
        lengths = {32: "key", 64: "sha256"}
        is_hash = bool(re.fullmatch(r"[0-9a-fA-F]+", value))
        kind = (
            "url"
            if "://" in value or value.startswith("/")
            else lengths.get(len(value), "domain")
            if is_hash
            else "domain"
        )
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
    for images in delta_tables(store, "images"):
        by_digest: dict[str, set[Tombstone]] = {}
        by_hash: dict[str, set[Tombstone]] = {}

        def add(tombstone: Tombstone, row: Mapping[str, str], by_hash: dict[str, set[Tombstone]] = by_hash) -> None:
            found[tombstone].add(row["key"])
            if row["phash"]:
                by_hash.setdefault(row["phash"], set()).add(tombstone)

        for tombstone, row in _named(images, found):
            add(tombstone, row)
            if row["sha256"]:
                by_digest.setdefault(row["sha256"], set()).add(tombstone)
        digests = pa.array(sorted(by_digest), pa.string())
        for table in index.each_table(images, ["key", "sha256", "phash"]) if by_digest else ():
            for row in table.filter(pc.is_in(table["sha256"], value_set=digests)).to_pylist():
                for tombstone in by_digest[row["sha256"]]:
                    add(tombstone, row)
        for table in index.each_table(images, ["key", "phash"]) if near is not None and by_hash else ():
            for phash, keys in _near(table, by_hash, near or 0):
                for tombstone in by_hash[phash]:
                    found[tombstone] |= keys
    return found


def _named(images: str, requested: Collection[Tombstone]) -> Iterator[tuple[Tombstone, Mapping[str, str]]]:
    """Yield the rows of an images table that each request names itself, or that redirects connect with it."""
    all_of = gather(requested)
    columns = ["key", "url", "sha256", "phash", "final_url", "redirect_hosts"]
    scans = all_of.urls or all_of.domains or all_of.sha256s
    for table in (
        index.each_table(images, columns) if scans else [index.find_rows(images, sorted(all_of.keys), columns)]
    ):
        listed = pc.is_in(table["sha256"], value_set=pa.array(sorted(all_of.sha256s), pa.string()))
        named = table.filter(pc.or_(all_of.cover(table), listed))
        for row in named.append_column("host", hosts_of(named["url"])).to_pylist():
            names = [Tombstone("key", row["key"]), Tombstone("url", row["url"]), Tombstone("sha256", row["sha256"])]
            names += [Tombstone("url", row["final_url"])] if row["final_url"] else []
            hosts = [row["host"] or "", *(row["redirect_hosts"] or "").split()]
            names += [Tombstone("domain", domain) for host in hosts for domain in all_of.domains_of(host)]
            yield from ((tombstone, row) for tombstone in names if tombstone in requested)


def _near(table: pa.Table, phashes: Iterable[str], distance: int) -> Iterator[tuple[str, set[str]]]:
    """Yield each perceptual hash with the keys of the rows within `distance` bits of it."""
    hashed = table.filter(pc.is_valid(table["phash"]))
    values = hex_numbers(hashed["phash"], 16)[:, 0]
    for phash in phashes:
        near = np.flatnonzero(np.bitwise_count(values ^ np.uint64(int(phash, 16))) <= distance)
        if len(near):
            yield phash, set(hashed["key"].take(near).to_pylist())


def take_down(store: Store, requested: Sequence[Tombstone], near: int | None, tracking_uris: Sequence[str]) -> Ledger:
    """Carry out a takedown; repeat it to finish one that was interrupted or that could not reach an MLflow server.

    The caller holds the storage's lock, so that no run reads rows while they are deleted.
    """
    found = find_keys(store, requested, near)
    by_request = _remember(store, requested, found)
    keys = sorted(set().union(*by_request.values()))
    deleted = {}
    tombstones = load_tombstones(store)
    for uri in delta_tables(store, "images"):
        deleted[uri.removeprefix(f"{store.root}/")] = _delete_images(uri, sorted(tombstones.keys))
    for uri in delta_tables(store, "embeddings"):
        deleted[uri.removeprefix(f"{store.root}/")] = tables.delete_rows(
            uri, pa.array(sorted(tombstones.keys), pa.string())
        )
    _blank_lists(store, tombstones)
    _delete_intermediate_files(store)
    _delete_held_out(store, tombstones.keys)
    _redact_reports(store, tombstones.keys)
    _delete_previews(store, tombstones.keys)
    datasets = _datasets_with(store, set(keys))
    traces = remove(store, tracking_uris, tombstones.keys, datasets)
    requests = tuple(str(tombstone) for tombstone in requested)
    return Ledger(requests, tuple(keys), deleted, tuple(datasets), traces)


def _delete_images(images: str, keys: Sequence[str]) -> int:
    """Delete rows from an images table and from its index; returns the number of deleted rows."""
    held = index.find_rows(images, keys, ["key", "part"])
    names = pc.unique(held["part"]).to_pylist()
    deleted = tables.delete_rows(images, pa.array(keys, pa.string()), names)
    version = tables.version(images)
    assert version is not None, f"{images} has disappeared"
    index.update_index(images, version)
    tables.purge(index.index_uri(images))
    return deleted


def _remember(
    store: Store, requested: Iterable[Tombstone], found: Mapping[Tombstone, set[str]]
) -> dict[Tombstone, set[str]]:
    """Write the tombstones; return the keys that each request matched, now or in an earlier attempt."""
    uri = store.uri("tombstones.parquet")
    known = tables.read_file(uri).to_pylist() if files.exists(uri) else []
    entries = {(row["kind"], row["value"], row["request"]) for row in known}
    digests = _digests_of(store, set().union(*found.values()))
    for tombstone in requested:
        entries.add((tombstone.kind, tombstone.value, str(tombstone)))
        entries |= {("key", key, str(tombstone)) for key in found[tombstone]}
        entries |= {("sha256", digest, str(tombstone)) for key in found[tombstone] for digest in digests.get(key, ())}
    names = SCHEMA.names
    ordered = [dict(zip(names, entry, strict=True)) for entry in sorted(entries)]
    tables.write_file(uri, pa.Table.from_pylist(ordered, schema=SCHEMA))
    by_request: dict[str, set[str]] = {}
    for kind, value, request in entries:
        if kind == "key":
            by_request.setdefault(request, set()).add(value)
    return {tombstone: by_request.get(str(tombstone), set()) for tombstone in requested}


def _digests_of(store: Store, keys: set[str]) -> dict[str, set[str]]:
    """Return key -> hashes of its image files, of all recipes."""
    digests: dict[str, set[str]] = {}
    for images in delta_tables(store, "images"):
        found = index.find_rows(images, sorted(keys), ["key", "sha256"])
        for row in found.filter(pc.is_valid(found["sha256"])).to_pylist():
            digests.setdefault(row["key"], set()).add(row["sha256"])
    return digests


def _blank_lists(store: Store, tombstones: Tombstones) -> None:
    """Blank the rows in the lists that ingest wrote; the rows remain, so that positions and counts stay valid."""
    keys = pa.array(sorted(tombstones.keys), pa.string())
    for uri in (uri for folder in pairs_folders(store) for uri in ranges.range_files(folder)):
        # Rows with a URL may lie in any range.
        if not (tombstones.urls or tombstones.domains):
            key_range = ranges.range_of_file(uri)
            if not (ranges.of_keys(keys, key_range.count) == key_range.index).any():
                continue
        if pc.any(tombstones.cover(tables.read_file(uri, ["key", "url"]))).as_py():
            pairs = tables.read_file(uri)
            blanked = refuse(pairs, tombstones)
            if not blanked.equals(pairs):
                tables.write_file(uri, blanked)


def _delete_intermediate_files(store: Store) -> None:
    """Delete what killed stages left behind, which may hold URLs, captions and embeddings; the next run makes it anew."""
    files.delete(store.uri("artifacts", "download"))
    for stage in store.list("artifacts"):
        for name in store.list("artifacts", stage):
            files.delete(store.uri("artifacts", stage, name, INTERMEDIATE))


def _delete_held_out(store: Store, keys: frozenset[str]) -> None:
    """Delete the rows from the lists of held-out rows, which have captions."""
    uris = {store.uri("artifacts", "curate", name, "heldout.parquet") for name in store.list("artifacts", "curate")}
    for name in store.list("stages", "curate"):
        facts = store.read_json("stages", "curate", name).get("facts", {})
        uris |= {facts["snapshot"]["heldout"]} if "heldout" in facts.get("snapshot", {}) else set()
    wanted = pa.array(sorted(keys), pa.string())
    for uri in sorted(uris):
        if files.exists(uri) and tables.has_keys(uri, wanted):
            heldout = tables.read_file(uri)
            tables.write_file(uri, heldout.filter(pc.invert(pc.is_in(heldout["key"], value_set=wanted))))


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
    digests = set()
    for stage in ("dedup", "curate"):
        for name in store.list("stages", stage):
            record = store.read_json("stages", stage, name)
            found = ranges.find_rows(record["uri"], sorted(keys), ["key", "status"])
            if pc.any(pc.equal(found["status"], rows.KEPT)).as_py():
                digests.add(record["digest"])
    return sorted(digests)
