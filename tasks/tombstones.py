"""Tombstones of everything that was taken down. Ingest drops keys, URLs and domains; download drops images."""

import dataclasses
import urllib.parse
from collections.abc import Iterable
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from tasks import rows, tables
from tasks.store import Store
from unclip import files

Kind = Literal["key", "url", "domain", "sha256"]
SCHEMA = pa.schema({"kind": pa.string(), "value": pa.string(), "request": pa.string()})
"""One row per tombstone; `request` is the requested tombstone that led to this one."""


@dataclasses.dataclass(frozen=True, order=True)
class Tombstone:
    kind: Kind
    value: str

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"


@dataclasses.dataclass(frozen=True)
class Tombstones:
    """Sets of tombstones, for fast lookups."""

    keys: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()
    sha256s: frozenset[str] = frozenset()

    def has_pair(self, key: str, url: str) -> bool:
        """Return True if a row with this key and normalised URL was taken down."""
        return key in self.keys or url in self.urls or bool(self.domains and self._has_domain(url))

    def have_pairs(self, keys: pa.ChunkedArray, urls: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return `has_pair` of every row; a URL without a valid host is on no domain."""
        found = pc.or_(_is_in(keys, self.keys), _is_in(urls, self.urls))
        if not self.domains:
            return found
        hosts = pc.struct_field(pc.extract_regex(urls, _HOST), 0)
        return pc.or_(found, _is_in(hosts, filter(self._has_host, hosts.unique().drop_null().to_pylist())))

    def _has_host(self, host: str) -> bool:
        try:
            return self._has_domain(f"//{host}")
        except ValueError:
            return False

    def _has_domain(self, url: str) -> bool:
        labels = (urllib.parse.urlsplit(url).hostname or "").split(".")
        return any(".".join(labels[start:]) in self.domains for start in range(len(labels)))


_HOST = r"\A(?:[A-Za-z][A-Za-z0-9+.-]*:)?//(?P<host>[^/?#]*)"  # with user name and port


def _is_in(values: pa.ChunkedArray, wanted: Iterable[str]) -> pa.ChunkedArray:
    return pc.is_in(values, value_set=pa.array(wanted, pa.string()))


def load_tombstones(store: Store) -> Tombstones:
    """Load the tombstones of a storage."""
    if not store.exists("tombstones.parquet"):
        return Tombstones()
    table = tables.read_file(store.uri("tombstones.parquet"))
    pairs = zip(table["kind"].to_pylist(), table["value"].to_pylist(), strict=True)
    return gather(Tombstone(kind, value) for kind, value in pairs)


def tombstones_digest(store: Store) -> str | None:
    """Digest of all tombstones, for the fingerprint of ingest; None if there are none."""
    uri = store.uri("tombstones.parquet")
    return tables.content_digest(tables.read_file(uri, ["kind", "value"])) if files.exists(uri) else None


def gather(tombstones: Iterable[Tombstone]) -> Tombstones:
    """Group tombstones by kind, for fast lookups."""
    by_kind: dict[str, set[str]] = {f"{kind}s": set() for kind in get_args(Kind)}
    for tombstone in tombstones:
        by_kind[f"{tombstone.kind}s"].add(tombstone.value)
    return Tombstones(**{name: frozenset(values) for name, values in by_kind.items()})


def refuse(pairs: pa.Table, tombstones: Tombstones) -> pa.Table:
    """Drop the rows of a list of pairs (tasks.stages.ingest.PAIRS) that were taken down and blank their URL and caption."""
    taken_down = tombstones.have_pairs(pairs["key"], pairs["url"])
    if not pc.any(taken_down).as_py():
        return pairs
    blank = {"url": "", "caption": "", "status": rows.DROPPED, "reason": "taken_down"}
    columns = [
        pc.if_else(taken_down, blank[name], pairs[name]) if name in blank else pairs[name]
        for name in pairs.column_names
    ]
    return pa.table(columns, schema=pairs.schema)
