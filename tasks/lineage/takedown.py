"""Takedown: delete rows everywhere and keep them from coming back.

Requests become tombstones, which ingest and download respect from then on. Then the rows and their bytes are deleted from
all tables, and blanked in lists and reports. Rows are found range by range in the index of the images, and only files that hold
them are written again; parts that were not committed are searched and deleted. The ledger names the dataset versions that
contained the rows, the checkpoints of the storage that were trained on those versions and, through MLflow, the runs and
registered models that read them.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import DeltaError

from tasks import index, ranges, rows, tables
from tasks.lineage import evaluations
from tasks.lineage.provenance import checkpoints_of, pairs_folders
from tasks.lineage.traces import Traces, redact, remove
from tasks.near_duplicates import near_to
from tasks.store import INTERMEDIATE, Store
from tasks.tombstones import (
    Entry,
    Request,
    Tombstone,
    Tombstones,
    canonical_url,
    canonical_urls,
    entries,
    forget,
    gather,
    hosts_of,
    load_tombstones,
    look_value,
    looks_of,
    parse_look,
    record_found,
    refuse,
    write_entries,
)
from tasks.tracking import PREVIEW_KEYS, PREVIEWS
from tasks.untrusted import local_files
from tasks.untrusted.domains import canonical_host
from tasks.untrusted.normalise import normalise_url
from unclip import files, seals
from unclip.errors import InputError, StorageError
from unclip.scratch import sweep_scratch


def parse(kind: str, value: str) -> Tombstone:
    """Check a request and return its tombstone.

    Raises:
        InputError: the value does not fit its kind.
    """
    value = value.strip()
    is_local = kind == "url" and value.startswith(("/", "file:"))
    url = normalise_url(value) if kind == "url" else None
    cleaned = {"url": canonical_url(url or ""), "domain": canonical_host(value)}.get(kind, value.lower())
    cleaned = local_files.to_url(value) or "" if is_local else cleaned
    patterns = {
        "key": r"[0-9a-f]{32}",
        "sha256": r"[0-9a-f]{64}",
        "domain": r"(?!-)[^\s/:@*]+|[0-9a-f:]+",
        "url": r".+",
    }
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
    checkpoints: tuple[Mapping[str, str | None], ...]
    """Checkpoints that the storage's runs trained on those versions, tracked by MLflow or not; see `checkpoints_of`."""
    traces: Traces
    """Runs and registered models that read those versions, and previews that showed the rows."""


@dataclasses.dataclass
class Found:
    """Rows that a request covers, and what keeps them and their images away."""

    keys: set[str] = dataclasses.field(default_factory=set)
    urls: set[str] = dataclasses.field(default_factory=set)
    """Addresses of the rows that were requested by their keys: another caption must not bring them back."""
    sha256s: set[str] = dataclasses.field(default_factory=set)
    looks: set[tuple[str, str | None]] = dataclasses.field(default_factory=set)
    """Perceptual hashes and colours of the images, if copies that look alike were requested as well."""

    def entries(self, request: str, near: int | None) -> set[Entry]:
        looks = {look_value(phash, colour, near) for phash, colour in self.looks} if near is not None else set()
        values = {"key": self.keys, "url": self.urls, "sha256": self.sha256s, "look": looks}
        return {Entry(kind, value, request) for kind, found in values.items() for value in found}


def find_keys(store: Store, requested: Sequence[Tombstone], near: int | None = None) -> dict[Tombstone, set[str]]:
    """Return the keys of `find_rows`."""
    return {tombstone: found.keys for tombstone, found in find_rows(store, requested, near).items()}


def find_rows(store: Store, requested: Sequence[Tombstone], near: int | None = None) -> dict[Tombstone, Found]:
    """Find the rows that each tombstone covers, in all tables and in parts that were not committed, with their duplicates.

    Duplicates are rows with the same image.

    Args:
        near: bits in which the perceptual hash of a duplicate may differ, whose colour must agree (`tasks.near_duplicates`);
            None matches identical bytes only.
    """
    images = [store.uri("images", name) for name in store.list("images")]
    found = {stone: Found(keys={stone.value} if stone.kind == "key" else set()) for stone in requested}
    names: dict[Tombstone, set[Tombstone]] = {stone: {stone} for stone in requested}
    for key, url in _urls_of(store, images, [stone.value for stone in requested if stone.kind == "key"]):
        found[Tombstone("key", key)].urls.add(url)
        names.setdefault(Tombstone("url", url), set()).add(Tombstone("key", key))
    by_digest: dict[str, set[Tombstone]] = {}
    by_look: dict[tuple[str, str | None], set[Tombstone]] = {}

    def add(stone: Tombstone, row: Mapping[str, Any], has_look: bool) -> None:
        found[stone].keys.add(row["key"])
        if row["sha256"]:
            found[stone].sha256s.add(row["sha256"])
        if row["phash"] and has_look and near is not None:
            found[stone].looks.add((row["phash"], row["colour"]))
            by_look.setdefault((row["phash"], row["colour"]), set()).add(stone)

    for stone, key in _listed(store, names):
        found[stone].keys.add(key)
    for stone, row in _named(images, names):
        add(stone, row, has_look=True)
        if row["sha256"]:
            by_digest.setdefault(row["sha256"], set()).add(stone)
    digests = pa.array(sorted(by_digest), pa.string())
    for table in _each_table(images, _FACTS) if by_digest else ():
        for row in table.filter(pc.is_in(table["sha256"], value_set=digests)).to_pylist():
            for stone in by_digest[row["sha256"]]:
                add(stone, row, has_look=True)
    for table in _each_table(images, _FACTS) if by_look else ():
        hashes, cells, is_known = looks_of(table)
        for phash, colour in list(by_look):
            look, distance = parse_look(look_value(phash, colour, near or 0))
            alike = np.flatnonzero(near_to(hashes, cells, look, distance) & is_known)
            for row in table.take(pa.array(alike)).to_pylist():
                for stone in by_look[phash, colour]:
                    add(stone, row, has_look=False)
    return found


_FACTS = ["key", "sha256", "phash", "colour"]
_ADDRESSES = ["url", "final_url", "redirect_hosts"]


def _each_table(images: Iterable[str], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of all images tables, and of the parts in their folders that were not committed."""
    for uri in images:
        if tables.version(uri) is not None:
            yield from index.each_table(uri, columns)
        yield from (table.select(columns) for table in _uncommitted(uri))


def _uncommitted(images: str) -> Iterator[pa.Table]:
    for uri in tables.other_files(images):
        with contextlib.suppress(OSError, pa.ArrowInvalid):  # deleted meanwhile, or damaged: then it will be deleted
            yield index.describe_part(uri)


def _urls_of(store: Store, images: Sequence[str], keys: Sequence[str]) -> set[tuple[str, str]]:
    """Return keys and addresses of some rows in the tables, in uncommitted parts and in the lists."""
    if not keys:
        return set()
    columns, wanted = ["key", "url"], pa.array(sorted(set(keys)), pa.string())
    found = [index.find_rows(uri, keys, columns) for uri in images if tables.version(uri) is not None]
    found += [ranges.find_rows(uri, keys, columns) for uri in pairs_folders(store)]
    for table in (table for uri in images for table in _uncommitted(uri)):
        found.append(table.filter(pc.is_in(table["key"], value_set=wanted)).select(columns))
    rows_found = (row for table in found for row in table.to_pylist() if row["url"])
    return {(row["key"], canonical_url(row["url"])) for row in rows_found}


def _named(
    images: Sequence[str], names: Mapping[Tombstone, Collection[Tombstone]]
) -> Iterator[tuple[Tombstone, Mapping[str, Any]]]:
    """Yield each row that a tombstone names itself, with the requests that the tombstone stands for."""
    all_of = gather(names)
    columns = [*_FACTS, *_ADDRESSES]
    scans = all_of.urls or all_of.domains or all_of.sha256s
    uris = [uri for uri in images if tables.version(uri) is not None]
    some = (index.find_rows(uri, sorted(all_of.keys), columns) for uri in uris)
    others = (table.select(columns) for uri in images for table in _uncommitted(uri))
    for table in _each_table(images, columns) if scans else itertools.chain(some, others):
        for row in _with_addresses(table.filter(all_of.cover(table))):
            yield from ((stone, row) for stone in _stones_of(row, all_of, names))


def _listed(store: Store, names: Mapping[Tombstone, Collection[Tombstone]]) -> Iterator[tuple[Tombstone, str]]:
    """Yield the keys of the rows of all lists that requests name by their address: they may not be downloaded yet."""
    addresses = gather(stone for stone in names if stone.kind in ("url", "domain"))
    for uri in (uri for folder in pairs_folders(store) for uri in ranges.range_files(folder)):
        if addresses != Tombstones():
            table = tables.read_file(uri, ["key", "url"])
            for row in _with_addresses(table.filter(addresses.cover(table))):
                yield from ((stone, row["key"]) for stone in _stones_of(row, addresses, names))


def _with_addresses(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield each row with `urls` and `hosts`: canonical URLs, and hosts, of its own and of its redirects."""
    names = [name for name in ("url", "final_url") if name in table.column_names]
    urls = [canonical_urls(table[name]).to_pylist() for name in names]
    hosts = [hosts_of(table[name]).to_pylist() for name in names]
    for number, row in enumerate(table.to_pylist()):
        redirects = (row.get("redirect_hosts") or "").split()
        yield {
            **row,
            "urls": [each[number] for each in urls if each[number]],
            "hosts": [*(each[number] for each in hosts if each[number]), *redirects],
        }


def _stones_of(
    row: Mapping[str, Any], all_of: Tombstones, names: Mapping[Tombstone, Collection[Tombstone]]
) -> list[Tombstone]:
    """Return the requests that a row of `_with_addresses` is named by."""
    reasons = [Tombstone("key", row["key"]), Tombstone("sha256", row.get("sha256") or "")]
    reasons += [Tombstone("url", url) for url in row["urls"]]
    reasons += [Tombstone("domain", domain) for host in row["hosts"] for domain in all_of.domains_of(host)]
    return sorted({stone for reason in reasons if reason in names for stone in names[reason]})


def take_down(
    store: Store,
    requested: Sequence[Tombstone],
    near: int | None,
    tracking_uris: Sequence[str],
    unnamed: Sequence[str] = (),
) -> Ledger:
    """Carry out a takedown; repeat it to finish one that was interrupted or that could not reach an MLflow server.

    The caller holds the lock of the tables, so that no run reads rows while they are deleted.

    Raises:
        DamagedError: a link leads out of the storage; nothing is deleted.
    """
    store.check_links(deep=True)
    by_request = _remember(store, requested, near)
    keys = sorted(set().union(*by_request.values()))
    deleted = {}
    tombstones = load_tombstones(store)
    for name in store.list("images"):
        deleted[f"images/{name}"] = _delete_images(store.uri("images", name), sorted(tombstones.keys))
    wanted = pa.array(sorted(tombstones.keys), pa.string())
    for kind in ("embeddings", "derived"):
        for name in store.list(kind):
            deleted[f"{kind}/{name}"] = _delete_rows(store.uri(kind, name), wanted)
    _blank_lists(store, tombstones)
    _delete_temporary_files(store)
    _delete_held_out(store, tombstones.keys)
    evaluations.remove_rows(store, tombstones.keys)
    _redact_reports(store, tombstones.keys)
    _delete_previews(store, tombstones.keys)
    datasets = _datasets_with(store, set(keys))
    traces = remove(store, tracking_uris, tombstones.keys, datasets, unnamed)
    requests = tuple(str(tombstone) for tombstone in requested)
    return Ledger(requests, tuple(keys), deleted, tuple(datasets), tuple(checkpoints_of(store, datasets)), traces)


def carry_out(store: Store, request: Request, tracking_uris: Sequence[str], unnamed: Sequence[str] = ()) -> Ledger:
    """Carry out a recorded request, and write its ledger. The caller holds the lock of the tables."""
    ledger = take_down(store, request.tombstones, request.near, tracking_uris, unnamed)
    store.write_json(dataclasses.asdict(ledger), "takedowns", f"{request.id}.json")
    forget(store, request)
    return ledger


def read_ledger(store: Store, request: Request) -> Ledger:
    """Read the ledger of a request that was carried out."""
    document = store.read_json("takedowns", f"{request.id}.json")
    traces = Traces(**document.pop("traces"))
    return Ledger(**document, traces=traces)


def expand(store: Store, request: Request) -> set[str]:
    """Search for the rows of a recorded request while a run goes on, so that their copies are kept out at once.

    Returns:
        Keys of the rows. Some may be missing, as the tables may change: `carry_out` searches again.
    """
    try:
        found = find_rows(store, request.tombstones, request.near)
    except (OSError, StorageError, DeltaError, pa.ArrowException):  # another process changes what is searched
        return set()
    record_found(store, request, _entries_of(found, request.near))
    return set().union(*(each.keys for each in found.values()))


def _entries_of(found: Mapping[Tombstone, Found], near: int | None) -> set[Entry]:
    requested = {Entry(stone.kind, stone.value, str(stone)) for stone in found}
    return requested.union(*(rows.entries(str(stone), near) for stone, rows in found.items()))


def _remember(store: Store, requested: Sequence[Tombstone], near: int | None) -> dict[Tombstone, set[str]]:
    """Write the tombstones; return the keys that each request matched, now or in an earlier attempt."""
    known = entries(store) | _entries_of(find_rows(store, requested, near), near)
    write_entries(store, known)
    by_request: dict[str, set[str]] = {}
    for kind, value, request in known:
        if kind == "key":
            by_request.setdefault(request, set()).add(value)
    return {tombstone: by_request.get(str(tombstone), set()) for tombstone in requested}


def _delete_images(images: str, keys: Sequence[str]) -> int:
    """Delete rows from an images table and from its index; returns the number of deleted rows."""
    version = tables.version(images)
    if version is None:
        deleted = _delete_rows(images, pa.array([], pa.string()))
    else:
        held = index.find_rows(images, keys, ["key", "part"])
        names = pc.unique(held["part"]).to_pylist()
        deleted = tables.delete_rows(images, pa.array(keys, pa.string()), names)
        version = tables.version(images)
        assert version is not None, f"{images} has disappeared"
        index.update_index(images, version)
    tables.purge(index.index_uri(images))
    return deleted


def _delete_rows(table_uri: str, keys: pa.Array) -> int:
    """Delete rows, and all parts that are not committed; returns the number of deleted rows of the table."""
    if tables.version(table_uri) is not None:
        return tables.delete_rows(table_uri, keys)
    tables.purge(table_uri)
    return 0


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


def _delete_temporary_files(store: Store) -> None:
    """Delete what killed stages left behind, which may hold images, URLs, captions and embeddings; the next run makes it anew."""
    sweep_scratch()
    for folder in ("images", "embeddings", "derived", "index") if store.is_local else ():
        files.sweep(store.uri(folder))
    files.delete(store.uri("artifacts", "download"))
    # Hashes of images, and hosts; the next refresh reads all rows.
    for stage, start in (("dedup", "lookups"), ("report", "hosts")):
        for folder in (store.uri("artifacts", stage, name) for name in store.list("artifacts", stage)):
            for found in files.names(folder):
                if found.startswith(start):
                    with seals.changing(folder, f"{found}/"):
                        files.delete(f"{folder}/{found}")
    for stage in store.list("artifacts"):
        for name in store.list("artifacts", stage):
            files.delete(store.uri("artifacts", stage, name, INTERMEDIATE))


def _delete_held_out(store: Store, keys: frozenset[str]) -> None:
    """Delete the rows from the lists of held-out rows, which have captions."""
    uris = {store.uri("artifacts", "curate", name, "heldout.parquet") for name in store.list("artifacts", "curate")}
    for name in store.list("stages", "curate"):
        facts = store.read_json("stages", "curate", name).get("facts", {})
        uris |= {facts["snapshot"]["heldout"]} if "heldout" in facts.get("snapshot", {}) else set()
    uris = {uri for uri in uris if files.is_below(uri.removeprefix(f"{store.root}/"))}  # no one else's
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
                with seals.changing(store.uri(*folder), "report.html"):
                    files.write(store.uri(*folder, "report.html"), redact(page, keys).encode())


def _delete_previews(store: Store, keys: frozenset[str]) -> None:
    """Delete previews of trainings, and figures of comparisons, that show one of the rows or do not record which they show."""
    folders = [
        store.uri("artifacts", stage, name)
        for stage in store.list("artifacts")
        for name in store.list("artifacts", stage)
    ]
    for folder in [*folders, *(store.uri("results", name) for name in store.list("results"))]:
        if files.exists(f"{folder}/{PREVIEWS}"):
            is_recorded = files.exists(f"{folder}/{PREVIEW_KEYS}")
            if not is_recorded or not keys.isdisjoint(files.read_json(f"{folder}/{PREVIEW_KEYS}")):
                with seals.changing(folder, f"{PREVIEWS}/"):
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
