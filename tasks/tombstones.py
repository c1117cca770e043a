"""Tombstones of everything that was taken down, and requests that are recorded but not carried out yet.

A request is recorded in a file of its own, `takedowns/recorded/<id>.json`. So it needs no lock and is accepted while a run goes
on, and its tombstones count at once. Whoever holds the lock of the tables carries it out, writes its tombstones into
`tombstones.parquet` and deletes the file. Stages commit no list and no selection while a request waits.

Ingest drops keys, URLs and domains. Download withholds these as well, since a part may be older than a request, and images by
their bytes, their look and the URL that redirects led to.
"""

import contextlib
import dataclasses
import datetime
import functools
import io
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks import rows, tables
from tasks.keys import hex_numbers
from tasks.near_duplicates import agree_in_a_band, colour_cells, near_to
from tasks.store import TOMBSTONES, Store
from tasks.untrusted.domains import CANONICAL_HOST, canonical_host
from tasks.untrusted.normalise import map_texts
from unclip import files
from unclip.errors import StageError

Kind = Literal["key", "url", "domain", "sha256", "look"]
SCHEMA = pa.schema({"kind": pa.string(), "value": pa.string(), "request": pa.string()})
"""One row per tombstone; `request` is the requested tombstone that led to this one."""
COVERED = ("key", "url", "final_url", "redirect_hosts", "sha256", "phash", "colour")
"""Columns of an images table that `Tombstones.cover` looks at."""

RECORDED = ("takedowns", "recorded")
"""Folder of the recorded requests."""
_CANONICAL_URL = rf"\Ahttps?://{CANONICAL_HOST}(?::[1-9][0-9]*)?/[^#]*\z"
_DEFAULT_PORT = r"\A(?:http://[^/]*:80|https://[^/]*:443)/"
_PORTS = {"http": 80, "https": 443}


@dataclasses.dataclass(frozen=True, order=True)
class Tombstone:
    kind: Kind
    value: str

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"


class Entry(NamedTuple):
    """A row of `SCHEMA`."""

    kind: str
    value: str
    request: str


@dataclasses.dataclass(frozen=True)
class Tombstones:
    """Sets of tombstones, for fast lookups."""

    keys: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    """See `canonical_url`."""
    domains: frozenset[str] = frozenset()
    """See `canonical_host`."""
    sha256s: frozenset[str] = frozenset()
    looks: frozenset[str] = frozenset()
    """See `look_value`."""

    def cover(self, table: pa.Table) -> pa.Array:
        """Return a mask of the rows that were taken down, by what they are or by a redirect.

        Args:
            table: any of the columns `COVERED`.
        """
        hit = pa.chunked_array([pa.repeat(False, table.num_rows)])
        for name, values in (("key", self._keys), ("sha256", self._sha256s)):
            if len(values) and name in table.column_names:
                hit = pc.or_(hit, pc.is_in(table[name], value_set=values))
        for name in ("url", "final_url"):
            if self.urls and name in table.column_names:
                hit = pc.or_(hit, pc.is_in(canonical_urls(table[name]), value_set=self._urls))
            if self.domains and name in table.column_names:
                hosts = hosts_of(table[name])
                covered = [host for host in pc.unique(hosts).to_pylist() if host and self.domains_of(host)]
                hit = pc.or_(hit, pc.is_in(hosts, value_set=_strings(covered)))
        if self.domains and "redirect_hosts" in table.column_names:
            redirects = pc.unique(table["redirect_hosts"].drop_null()).to_pylist()
            covered = [each for each in redirects if any(map(self.domains_of, each.split()))]
            hit = pc.or_(hit, pc.is_in(table["redirect_hosts"], value_set=_strings(covered)))
        if self.looks and "phash" in table.column_names:
            hit = pc.or_(hit, pa.array(self._look_alike(table)))
        return hit

    def domains_of(self, host: str) -> list[str]:
        """Domains that were taken down and contain this host, in any spelling."""
        labels = canonical_host(host).split(".")
        names = (".".join(labels[start:]) for start in range(len(labels)))
        return [name for name in names if name in self.domains]

    @functools.cached_property
    def _keys(self) -> pa.Array:
        return _strings(self.keys)

    @functools.cached_property
    def _sha256s(self) -> pa.Array:
        return _strings(self.sha256s)

    @functools.cached_property
    def _urls(self) -> pa.Array:
        return _strings(self.urls)

    def _look_alike(self, table: pa.Table) -> np.ndarray:
        hashes, cells, is_known = looks_of(table)
        looks = [parse_look(value) for value in sorted(self.looks)]
        # Few rows agree with any of the looks in a band of bits, so all looks are compared with these alone.
        candidates = np.flatnonzero(agree_in_a_band(hashes, looks) & is_known)
        found = np.zeros(table.num_rows, bool)
        for look, distance in looks if len(candidates) else ():
            found[candidates] |= near_to(hashes[candidates], cells[candidates], look, distance)
        return found


def looks_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Perceptual hash, colour cell and mask of the rows that have a hash: [N] uint64, int32, bool."""
    phash = table["phash"].cast(pa.string())
    unknown = pa.nulls(table.num_rows, pa.string())
    colour = table["colour"].cast(pa.string()) if "colour" in table.column_names else unknown
    is_known = np.asarray(phash.is_valid().to_numpy(), bool)
    return hex_numbers(phash, 16)[:, 0], colour_cells(colour), is_known


def look_value(phash: str, colour: str | None, distance: int) -> str:
    """Value of a tombstone of images that look like one: at most `distance` bits of the hash differ, and the colours agree."""
    return f"{phash}-{distance}-{colour or ''}"


@functools.lru_cache(maxsize=100_000)
def parse_look(value: str) -> tuple[tuple[int, int], int]:
    """Return the look (hash and colour cell) and the distance of a `look_value`."""
    phash, distance, colour = value.split("-")
    [cell] = colour_cells(pa.array([colour or None], pa.string()))
    return (int(phash, 16), int(cell)), int(distance)


def canonical_url(url: str) -> str:
    """Return the URL with the canonical spelling of its host and without a default port; other texts as they are."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        return url
    if not parts.hostname or "@" in parts.netloc:
        return url
    host = canonical_host(parts.hostname)
    host = f"[{host}]" if ":" in host else host
    netloc = host if port in (None, _PORTS.get(parts.scheme)) else f"{host}:{port}"
    return urllib.parse.urlunsplit((parts.scheme, netloc, parts.path or "/", parts.query, ""))


def canonical_urls(urls: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return `canonical_url` of every URL."""
    urls = urls.combine_chunks() if isinstance(urls, pa.ChunkedArray) else urls
    is_canonical = pc.and_not(
        pc.match_substring_regex(urls, _CANONICAL_URL), pc.match_substring_regex(urls, _DEFAULT_PORT)
    )
    return map_texts(canonical_url, urls, pc.fill_null(is_canonical, True))


def hosts_of(urls: pa.ChunkedArray) -> pa.Array:
    """Host of each URL, in lower case and without port; null for a text without one."""
    array = urls.combine_chunks() if isinstance(urls, pa.ChunkedArray) else urls
    pieces = pc.split_pattern(pc.binary_join_element_wise(array, "///", ""), "/", max_splits=3)
    scheme, empty, authority = (pc.list_element(pieces, number) for number in range(3))
    has_authority = pc.and_(pc.or_(pc.ends_with(scheme, ":"), pc.equal(scheme, "")), pc.equal(empty, ""))
    # Many URLs share a host, so the slow expression sees each authority once.
    authorities = pc.if_else(has_authority, authority, None).dictionary_encode()
    found = pc.struct_field(pc.extract_regex(authorities.dictionary, _HOST), "host")
    return pc.utf8_trim(pc.utf8_lower(found), "[]").take(authorities.indices)


_HOST = r"^(?:[^?#]*@)?(?P<host>\[[^\]?#]*\]|[^:?#]+)"


def _strings(values: Iterable[str]) -> pa.Array:
    return pa.array(sorted(values), pa.string())


@dataclasses.dataclass(frozen=True)
class Request:
    """A takedown that is recorded and not carried out yet."""

    id: str
    tombstones: tuple[Tombstone, ...]
    near: int | None
    """Bits in which the perceptual hashes of copies may differ; None: only the same bytes are copies."""


def record(store: Store, tombstones: Sequence[Tombstone], near: int | None) -> Request:
    """Record a request; from then on its tombstones count."""
    now = datetime.datetime.now()
    request = Request(f"{now:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}", tuple(tombstones), near)
    document = {"tombstones": [[each.kind, each.value] for each in tombstones], "near": near}
    store.write_json(document, *RECORDED, f"{request.id}.json")
    return request


def record_found(store: Store, request: Request, entries: Iterable[Entry]) -> None:
    """Add tombstones that a search found for a recorded request, unless it was carried out meanwhile."""
    uri = store.uri(*RECORDED, f"{request.id}.parquet")
    tables.write_file(uri, _table_of(entries))
    if not store.exists(*RECORDED, f"{request.id}.json"):
        files.delete(uri)


def recorded(store: Store) -> list[Request]:
    """Return the recorded requests, oldest first."""
    found = []
    for name in store.list(*RECORDED):
        if name.endswith(".json"):
            try:
                document = store.read_json(*RECORDED, name)
            except FileNotFoundError:  # it has just been carried out
                continue
            tombstones = tuple(Tombstone(kind, value) for kind, value in document["tombstones"])
            found.append(Request(name.removesuffix(".json"), tombstones, document["near"]))
    return found


def forget(store: Store, request: Request) -> None:
    """Delete a recorded request that was carried out."""
    files.delete(store.uri(*RECORDED, f"{request.id}.parquet"))
    files.delete(store.uri(*RECORDED, f"{request.id}.json"))


def refuse_if_recorded(store: Store, what: str) -> None:
    """Refuse to commit while a request waits.

    Raises:
        StageError: a request is recorded and not carried out yet.
    """
    if waiting := recorded(store):
        names = ", ".join(str(stone) for stone in waiting[0].tombstones[:3])
        raise StageError(
            f"{what}: a takedown was recorded meanwhile ({names}), so nothing is committed before it is carried out. "
            f"Run the same command again."
        )


def entries(store: Store) -> set[Entry]:
    """Return all tombstones of a storage, those of recorded requests as well."""
    found: set[Entry] = set()
    for request in recorded(store):
        found |= {Entry(stone.kind, stone.value, str(stone)) for stone in request.tombstones}
        with contextlib.suppress(FileNotFoundError):  # no search has found anything, or it has just been carried out
            found |= set(_entries_of(files.read(store.uri(*RECORDED, f"{request.id}.parquet"))))
    # Read last: a request that is carried out meanwhile is in there before its own file is deleted.
    return found | set(_entries_of(_stored(store)))


def write_entries(store: Store, all_entries: Iterable[Entry]) -> None:
    """Replace the tombstones of a storage, unless they are these already; the caller holds the lock of the tables."""
    found = set(all_entries)
    if found != set(_entries_of(_stored(store))):
        tables.write_file(store.uri(TOMBSTONES), _table_of(found))


def load_tombstones(store: Store) -> Tombstones:
    """Load the tombstones of a storage; the same object as long as they have not changed and no request is recorded."""
    if any(name.endswith(".json") for name in store.list(*RECORDED)):
        return gather(Tombstone(kind, value) for kind, value, _ in entries(store))  # type: ignore[arg-type]
    return _tombstones_of(_stored(store))


def tombstones_digest(store: Store) -> str | None:
    """Digest of all tombstones, for the fingerprint of ingest; None if there are none."""
    found = entries(store)
    return tables.content_digest(_table_of(found).select(["kind", "value"])) if found else None


def _stored(store: Store) -> bytes:
    uri = store.uri(TOMBSTONES)
    return files.read(uri) if files.exists(uri) else b""


@functools.lru_cache(maxsize=2)
def _entries_of(data: bytes) -> tuple[Entry, ...]:
    return tuple(Entry(**row) for row in pq.read_table(io.BytesIO(data)).to_pylist()) if data else ()


@functools.lru_cache(maxsize=2)
def _tombstones_of(data: bytes) -> Tombstones:
    return gather(Tombstone(kind, value) for kind, value, _ in _entries_of(data))  # type: ignore[arg-type]


def _table_of(found: Iterable[Entry]) -> pa.Table:
    return pa.Table.from_pylist([entry._asdict() for entry in sorted(set(found))], schema=SCHEMA)


def gather(tombstones: Iterable[Tombstone]) -> Tombstones:
    """Group tombstones by kind, for fast lookups; those of earlier versions get the canonical spelling."""
    spell: Mapping[str, Callable[[str], str]] = {"url": canonical_url, "domain": canonical_host}
    by_kind: dict[str, set[str]] = {f"{kind}s": set() for kind in get_args(Kind)}
    for tombstone in tombstones:
        by_kind[f"{tombstone.kind}s"].add(spell.get(tombstone.kind, str)(tombstone.value))
    return Tombstones(**{name: frozenset(values) for name, values in by_kind.items()})


def refuse(pairs: pa.Table, tombstones: Tombstones) -> pa.Table:
    """Drop the rows of a list of pairs (tasks.stages.ingest.PAIRS) that were taken down and blank their URL and caption."""
    taken_down = tombstones.cover(pairs)
    if not pc.any(taken_down).as_py():
        return pairs
    blank = {"url": "", "caption": "", "status": rows.DROPPED, "reason": "taken_down"}
    columns = [
        pc.if_else(taken_down, blank[name], pairs[name]) if name in blank else pairs[name]
        for name in pairs.column_names
    ]
    return pa.table(columns, schema=pairs.schema)


def withhold(images: pa.Table, tombstones: Tombstones) -> pa.Table:
    """Fail the rows of an images table that were taken down, and remove all that they hold of the image.

    The key remains, so that every row of the list has an outcome. URL and caption remain if the image was taken down under
    another address.
    """
    taken_down = tombstones.cover(images)
    if not pc.any(taken_down).as_py():
        return images
    named = tombstones.cover(images.select([name for name in ("key", "url") if name in images.column_names]))
    columns = []
    for field in images.schema:
        blank = {"status": rows.FAILED, "reason": "taken_down"}.get(field.name)
        if field.name == "key":
            columns.append(images[field.name])
        elif field.name in ("url", "caption"):
            columns.append(pc.if_else(named, "", images[field.name]))
        else:
            columns.append(pc.if_else(taken_down, pa.scalar(blank, field.type), images[field.name]))
    return pa.table(columns, schema=images.schema)


def withhold_part(images: str, tombstones: Tombstones, part: tables.Part) -> tables.Part:
    """Write an uncommitted part of an images table again if it has rows that were taken down since; returns the part."""
    uri = f"{images}/{part.name}"
    if tombstones == Tombstones():
        return part
    columns = [name for name in tables.file_columns(uri) if name in COVERED]
    if not pc.any(tombstones.cover(tables.read_file(uri, columns))).as_py():
        return part
    before = tables.read_file(uri)
    after = withhold(before, tombstones)
    if after.equals(before):
        return part
    tables.write_file(uri, after)
    written = tables.find_part(images, part.name.removesuffix(".parquet"))
    assert written is not None, f"{uri} has disappeared"
    return written
