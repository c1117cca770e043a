"""Tombstones of everything that was taken down. Ingest drops keys, URLs and domains; download drops images."""

import dataclasses
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

    def cover(self, pairs: pa.Table) -> pa.Array:
        """Return a mask of the rows with a key, URL or domain that was taken down, of their own or of a redirect.

        Args:
            pairs: key, url, and for fetched rows final_url and redirect_hosts.
        """
        hit = pc.is_in(pairs["key"], value_set=_strings(self.keys))
        if self.urls:
            hit = pc.or_(hit, pc.is_in(pairs["url"], value_set=_strings(self.urls)))
        if self.domains:
            hosts = hosts_of(pairs["url"])
            covered = [host for host in pc.unique(hosts).to_pylist() if host and self.domains_of(host)]
            hit = pc.or_(hit, pc.is_in(hosts, value_set=_strings(covered)))
        if "redirect_hosts" in pairs.column_names:
            is_redirect = pc.is_in(pairs["final_url"], value_set=_strings(self.urls))
            redirects = pc.unique(pairs["redirect_hosts"].drop_null()).to_pylist()
            covered = [each for each in redirects if any(map(self.domains_of, each.split()))]
            hit = pc.or_(hit, pc.or_(is_redirect, pc.is_in(pairs["redirect_hosts"], value_set=_strings(covered))))
        return hit

    def domains_of(self, host: str) -> list[str]:
        """Domains that were taken down and contain this host."""
        labels = host.split(".")
        names = (".".join(labels[start:]) for start in range(len(labels)))
        return [name for name in names if name in self.domains]


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
    taken_down = tombstones.cover(pairs)
    if not pc.any(taken_down).as_py():
        return pairs
    blank = {"url": "", "caption": "", "status": rows.DROPPED, "reason": "taken_down"}
    columns = [
        pc.if_else(taken_down, blank[name], pairs[name]) if name in blank else pairs[name]
        for name in pairs.column_names
    ]
    return pa.table(columns, schema=pairs.schema)
