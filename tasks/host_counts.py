"""Rows by host and fate: files of hosts by their hash, to which the changes of a refresh are added.

Each host is in one file, so its rows are counted, and the hosts with the most rows found, one file at a time. A file has one
row for each host, with lists of its fates and of their rows.
"""

import functools
import zlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import ranges, tables
from tasks.dataflow import exchange
from tasks.find_duplicates import read_rows
from tasks.ranges import KeyRange
from tasks.tombstones import hosts_of

_NO_HOST = "(none)"


def count_hosts(pairs: pa.Table, fates: pa.Table, sign: int = 1) -> pa.Table:
    """Rows by host and fate: host, fate, rows; with the sign -1, negative.

    Args:
        pairs: key, url.
        fates: see `rows.fates`.
    """
    fate = fates["fate"].take(pc.index_in(pairs["key"], value_set=fates["key"].combine_chunks()))
    host = pc.fill_null(hosts_of(pairs["url"]), _NO_HOST)
    return add_up(pa.table({"host": host, "fate": fate, "rows": np.full(pairs.num_rows, sign, np.int64)}))


def add_up(counts: pa.Table) -> pa.Table:
    """Sum of the rows of each host and fate, without those that have none."""
    summed = counts.group_by(["host", "fate"], use_threads=False).aggregate([("rows", "sum")])
    summed = pa.table({"host": summed["host"], "fate": summed["fate"], "rows": summed["rows_sum"]})
    return summed.filter(pc.not_equal(summed["rows"], 0))


def most_rows(counts: pa.Table, limit: int) -> tuple[int, pa.Table]:
    """Number of hosts, and the counts of the `limit` hosts with the most rows, in this order."""
    totals = counts.group_by("host", use_threads=False).aggregate([("rows", "sum")])
    order = totals.sort_by([("rows_sum", "descending"), ("host", "ascending")])["host"].slice(0, limit)
    found = counts.filter(pc.is_in(counts["host"], value_set=order.combine_chunks()))
    found = found.append_column("place", pc.index_in(found["host"], value_set=order.combine_chunks()))
    order_of_fates = [("place", "ascending"), ("rows", "descending"), ("fate", "ascending")]
    return totals.num_rows, found.sort_by(order_of_fates).drop_columns("place")


def write_counts(
    folder: str, uris: Sequence[str], num_files: int, limit: int, earlier: str | None = None
) -> tuple[int, pa.Table]:
    """Add up the counts of some files of `write_rows`, and write them by host; returns `most_rows` of all.

    Args:
        num_files: number of files that are written; a power of two.
        earlier: folder of as many files to which the counts are added, if any.
    """
    merge = functools.partial(_merge, folder, num_files, limit, earlier)
    found = exchange(functools.partial(_split, num_files), list(uris), num_files, merge)
    _, top = most_rows(pa.concat_tables(part for _, part in found), limit)
    return sum(number for number, _ in found), top


def num_files(folder: str) -> int | None:
    """Number of the files of `write_counts`; None if some are missing. Takedowns delete them."""
    uris = ranges.range_files(folder)
    return len(uris) if uris and len(uris) == ranges.range_of_file(uris[0]).count else None


def _split(count: int, uri: str) -> list[pa.Table]:
    counts = read_rows(uri)
    hosts = counts["host"].combine_chunks().dictionary_encode()
    hashes = np.array([zlib.crc32(host.encode()) for host in hosts.dictionary.to_pylist()], np.int64)
    return ranges.split(counts, hashes[hosts.indices.to_numpy()] % count, count)


def _merge(
    folder: str, count: int, limit: int, earlier: str | None, output: int, pieces: list[pa.Table]
) -> tuple[int, pa.Table]:
    part = KeyRange(output, count)
    before = [] if earlier is None else [_flat(tables.read_file(ranges.range_uri(earlier, part)))]
    counts = add_up(pa.concat_tables([*before, *pieces]))
    assert not counts.num_rows or pc.min(counts["rows"]).as_py() > 0, "the subtracted rows are not part of the counts"
    ordered = counts.sort_by([("host", "ascending"), ("fate", "ascending")])
    by_host = ordered.group_by("host", use_threads=False).aggregate([("fate", "list"), ("rows", "list")])
    ranges.write_range(folder, part, by_host.rename_columns(["host", "fate", "rows"]))
    return most_rows(counts, limit)


def _flat(by_host: pa.Table) -> pa.Table:
    """Table of host, fate and rows of a file."""
    hosts = by_host["host"].take(pc.list_parent_indices(by_host["fate"].combine_chunks()))
    return pa.table({"host": hosts, "fate": pc.list_flatten(by_host["fate"]), "rows": pc.list_flatten(by_host["rows"])})
