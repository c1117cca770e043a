"""Duplicates among the images of a whole dataset, found by exchanging rows between tasks; no process holds all rows.

The rows meet three times: by the sha256 of their bytes, by their perceptual hash, and, if hashes may differ, by bands of
bits of the hash. What is found goes back to the key range of each row. The result is that of comparing all rows with all,
whatever the number of key ranges and partitions.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import dataflow, ranges
from tasks.keys import KEY_DIGITS, hex_numbers, key_texts, pair_octets
from tasks.lookups import write_lookup
from tasks.near_duplicates import (
    colour_cells,
    find_looks,
    near_duplicate_looks,
    near_duplicates,
    partitions_of,
)
from tasks.ranges import KeyRange
from unclip import files

ResultT = TypeVar("ResultT")

KeepCaptions = Literal["one", "url", "image"]
"""Rows that are kept of equal bytes: the first; those with the URL of the first, which are its other captions; all."""

REASONS = ("duplicate_image", "near_duplicate", None, None)
"""Reasons to drop a row; of captions of a kept image, and of first rows that are kept, there is none."""
BYTES, LOOK, CAPTION, FIRST = range(len(REASONS))
_ROW = ["high", "low", "first_high", "first_low", "hash", "cell", "digest", "digest_low"]


def find_duplicates(
    read: Callable[[KeyRange], pa.Table],
    num_ranges: int,
    distance: int,
    scratch: str,
    use: Callable[[KeyRange, pa.Table], ResultT],
    num_partitions: int | None = None,
    captions: KeepCaptions = "one",
    lookups: str | None = None,
    **options: Any,
) -> list[ResultT]:
    """Find the rows with the same bytes as an earlier row, and those that look like an earlier row, in the order of keys.

    Of equal bytes, the row with the smallest key is the first, and only that row is compared by look: see
    `tasks.near_duplicates` for when two rows look alike. Its other captions are kept or dropped with it. A row without a
    perceptual hash is compared by bytes alone.

    Args:
        read: key range -> key (32 hex digits), sha256, phash, colour of the rows to compare, and url if `captions` is "url";
            keys are unique.
        num_ranges: number of key ranges.
        distance: largest number of differing bits of perceptual hashes; -1 compares only bytes.
        scratch: URI of a folder for intermediate files, which is deleted at the end; every node must see it.
        use: called in a task for each key range with the rows to drop, and other captions of rows that are kept: key, reason
            (null for a caption), first (the key of the first row with these bytes), sorted by key. Like `read`, a module-level
            function or a `functools.partial` of one.
        num_partitions: number of tasks among which rows are exchanged; by default the number of key ranges.
        captions: rows that are kept of equal bytes.
        lookups: folder for look-ups of the rows, for `tasks.new_duplicates`.
        options: options of the Ray tasks.

    Returns:
        Results of `use`, in the order of key ranges.
    """
    count = num_partitions or num_ranges
    files.delete(scratch)

    def exchange(split: Any, items: Any, num_outputs: int, merge: Any) -> list[Any]:
        return dataflow.exchange(split, items, num_outputs, merge, **options)

    step = exchange(
        functools.partial(_split_by_bytes, read, count, captions),
        ranges.ranges(num_ranges),
        count,
        functools.partial(_keep_first, f"{scratch}/bytes", captions, lookups, count),
    )
    found = [[losers for _, losers in step]]
    if distance >= 0:
        step = exchange(
            functools.partial(_split_by_hash, count),
            [rows for rows, _ in step],
            count,
            functools.partial(_compare_equal_hashes, f"{scratch}/hashes", lookups, count),
        )
        found.append([losers for _, losers in step])
    if distance > 0:
        step = exchange(
            functools.partial(_split_by_band, distance, count),
            [looks for looks, _ in step],
            count,
            functools.partial(_compare_near_hashes, f"{scratch}/bands", distance, count),
        )
        found.append(step)
    results: list[ResultT] = exchange(
        functools.partial(split_by_range, num_ranges),
        list(zip(*found, strict=True)),
        num_ranges,
        functools.partial(_use_found, use, num_ranges),
    )
    files.delete(scratch)
    return results


def _split_by_bytes(
    read: Callable[[KeyRange], pa.Table], count: int, captions: KeepCaptions, key_range: KeyRange
) -> list[pa.Table]:
    table = compared(read(key_range), captions)
    return ranges.split(table, partition(table["digest"].to_numpy(), count), count)


def compared(table: pa.Table, captions: KeepCaptions) -> pa.Table:
    """Make the columns by which rows are compared: high, low, digest, digest_low, hash, has_hash, cell, and url."""
    # 128 of the 256 bits tell different bytes apart.
    digests = hex_numbers(table["sha256"], 64)[:, :2]
    rows = {
        **key_columns(hex_numbers(table["key"], KEY_DIGITS)),
        "digest": digests[:, 0],
        "digest_low": digests[:, 1],
        "hash": hex_numbers(table["phash"], 16)[:, 0],
        "has_hash": table["phash"].is_valid().to_numpy(),
        "cell": colour_cells(table["colour"]),
    }
    if captions == "url":
        rows["url"] = _url_numbers(table["url"])
    return pa.table(rows)


def bytes_uri(folder: str, index: int, count: int) -> str:
    """Look-up of all rows of one partition by `digest`."""
    return f"{folder}/bytes/{index:05d}-of-{count:05d}.arrow"


def looks_uri(folder: str, index: int, count: int) -> str:
    """Look-up of the first row of each look of one partition by `hash`."""
    return f"{folder}/looks/{index:05d}-of-{count:05d}.arrow"


def _url_numbers(urls: pa.ChunkedArray) -> np.ndarray:
    """Checksums of URLs, [N] uint64; they tell the few URLs of equal bytes apart."""
    texts = urls.cast(pa.binary()).to_pylist()
    checksums = (np.fromiter(map(function, texts), np.uint64, len(texts)) for function in (zlib.crc32, zlib.adler32))
    high, low = checksums
    numbers: np.ndarray = high << np.uint64(32) | low
    return numbers


def _keep_first(
    folder: str, captions: KeepCaptions, lookups: str | None, count: int, index: int, pieces: list[pa.Table]
) -> tuple[str, str]:
    """Find the first row of equal bytes and its captions; write those that are comparable, and the keys of all but the first."""
    table = pa.concat_tables(pieces)
    if lookups is not None:
        write_lookup(bytes_uri(lookups, index, count), table, "digest")
    table = with_firsts(table, captions)
    is_kept, is_first = (table[name].to_numpy() for name in ("is_kept", "is_first"))
    table = table.drop_columns(["hash", "has_hash", "cell"])  # captions stay with their first row
    table = table.rename_columns({f"first_{name}": name for name in ("hash", "has_hash", "cell")})
    kept = table.filter(pa.array(is_kept & table["has_hash"].to_numpy())).select(_ROW)
    reasons = np.where(is_kept, CAPTION, BYTES)
    losers = _losers(table, ~is_first, reasons)
    return write_rows(f"{folder}/{index:05d}.rows", kept), write_rows(f"{folder}/{index:05d}.found", losers)


def with_firsts(table: pa.Table, captions: KeepCaptions) -> pa.Table:
    """Rows sorted by their bytes, with the first row of each group.

    Args:
        table: columns of `compared`.

    Returns:
        The same columns; is_first; is_kept (true for first rows and their captions); and of the first row of each row's group
        first_high, first_low, first_hash, first_has_hash and first_cell.
    """
    order = np.lexsort([table[name].to_numpy() for name in ("low", "high", "digest_low", "digest")])
    table = table.take(pa.array(order)).combine_chunks()
    is_first = np.ones(table.num_rows, bool)
    digests = [np.diff(table[name].to_numpy()) != 0 for name in ("digest", "digest_low")]
    is_first[1:] = digests[0] | digests[1]
    first = np.maximum.accumulate(np.where(is_first, np.arange(table.num_rows), 0))
    is_kept = np.full(table.num_rows, captions == "image") | is_first
    if captions == "url":
        urls = table["url"].to_numpy()
        is_kept |= urls == urls[first]
    taken = {f"first_{name}": table[name].take(pa.array(first)) for name in ("high", "low", "hash", "has_hash", "cell")}
    columns = {name: table[name] for name in table.column_names}
    return pa.table({**columns, "is_first": is_first, "is_kept": is_kept, **taken})


def _firsts(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Divide rows into the first ones and the other captions of these."""
    is_first = (table["high"].to_numpy() == table["first_high"].to_numpy()) & (
        table["low"].to_numpy() == table["first_low"].to_numpy()
    )
    return table.filter(pa.array(is_first)), table.filter(pa.array(~is_first))


def _with_first(captions: pa.Table, firsts: pa.Table) -> pa.Table:
    """Captions of some first rows."""
    if not captions.num_rows:
        return captions
    wanted = pair_octets(firsts["high"], firsts["low"])
    return captions.filter(pc.is_in(pair_octets(captions["first_high"], captions["first_low"]), value_set=wanted))


def _split_by_hash(count: int, uri: str) -> list[pa.Table]:
    table = read_rows(uri)
    return ranges.split(table, partition(table["hash"].to_numpy(), count), count)


def _compare_equal_hashes(
    folder: str, lookups: str | None, count: int, index: int, pieces: list[pa.Table]
) -> tuple[str, str]:
    """Find near duplicates with an equal hash; write the looks with their captions, and the keys of the near duplicates."""
    table, captions = _firsts(in_order_of_keys(pieces))
    hashes, cells = table["hash"].to_numpy(), table["cell"].to_numpy()
    found = near_duplicates(hashes, 0, cells)
    looks, _ = find_looks(hashes, cells)
    distinct = table.take(looks).append_column("found", pa.array(found[looks]))
    if lookups is not None:
        named = ["hash", "cell", "high", "low", "digest", "digest_low"]
        write_lookup(looks_uri(lookups, index, count), distinct.select(named), "hash")
    others = _with_first(captions, distinct.filter(pc.invert(distinct["found"])))
    distinct = pa.concat_tables([distinct, others.append_column("found", pa.array(np.zeros(others.num_rows, bool)))])
    losers = _losers_by_look(table.filter(pa.array(found)), captions)
    return write_rows(f"{folder}/{index:05d}.looks", distinct), write_rows(f"{folder}/{index:05d}.found", losers)


def _split_by_band(distance: int, count: int, uri: str) -> list[pa.Table]:
    table = read_rows(uri)
    sent = np.zeros((table.num_rows, count), bool)
    np.put_along_axis(sent, partitions_of(table["hash"].to_numpy(), distance, count).astype(np.int64), True, axis=1)
    return [table.filter(pa.array(sent[:, partition])) for partition in range(count)]


def _compare_near_hashes(folder: str, distance: int, count: int, index: int, pieces: list[pa.Table]) -> str:
    table, captions = _firsts(in_order_of_keys(pieces))
    known = table["found"].to_numpy()
    hashes, cells = table["hash"].to_numpy(), table["cell"].to_numpy()
    found = near_duplicate_looks(hashes, cells, distance, known, index, count)
    losers = _losers_by_look(table.filter(pa.array(found & ~known)), captions)
    return write_rows(f"{folder}/{index:05d}.found", losers)


def split_by_range(count: int, uris: Sequence[str]) -> list[pa.Table]:
    """Divide the rows of intermediate files among key ranges."""
    return split_rows(pa.concat_tables(map(read_rows, uris)), count)


def split_rows(table: pa.Table, count: int) -> list[pa.Table]:
    """Divide rows among key ranges by `high`, the first half of their keys."""
    return ranges.split(table, (table["high"].to_numpy() >> 32).astype(np.int64) * count >> 32, count)


def _use_found(use: Callable[[KeyRange, pa.Table], ResultT], count: int, index: int, pieces: list[pa.Table]) -> ResultT:
    table = pa.concat_tables(pieces).sort_by("reason")  # the captions, some of which are near duplicates, come last
    numbers = np.stack([table["high"].to_numpy(), table["low"].to_numpy()], axis=1)
    numbers, first = np.unique(numbers, axis=0, return_index=True)  # several bands may find a row
    table = table.take(first)
    firsts = np.stack([table["first_high"].to_numpy(), table["first_low"].to_numpy()], axis=1)
    reasons = pa.array(REASONS).take(table["reason"].combine_chunks())
    return use(
        KeyRange(index, count), pa.table({"key": key_texts(numbers), "reason": reasons, "first": key_texts(firsts)})
    )


def key_columns(numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Columns `high` and `low` of keys as numbers."""
    return {"high": numbers[:, 0], "low": numbers[:, 1]}


def partition(numbers: np.ndarray, count: int) -> np.ndarray:
    """Partition of each row, by a hash of it: [N] int64."""
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15)  # hashes of images are less even than digests
    return ((mixed >> np.uint64(32)) % np.uint64(count)).astype(np.int64)


def in_order_of_keys(pieces: list[pa.Table]) -> pa.Table:
    """Rows of all tables, sorted by `high` and `low`."""
    table = pa.concat_tables(pieces)
    return table.take(np.lexsort([table["low"].to_numpy(), table["high"].to_numpy()])).combine_chunks()


def _losers_by_look(found: pa.Table, captions: pa.Table) -> pa.Table:
    """Near duplicates and their captions."""
    losers = pa.concat_tables([table.select(_ROW) for table in (found, _with_first(captions, found))])
    return _losers(losers, np.ones(losers.num_rows, bool), np.full(losers.num_rows, LOOK))


def _losers(table: pa.Table, found: np.ndarray, reasons: np.ndarray) -> pa.Table:
    """Keys and reasons of the rows that are found."""
    losers = table.select(["high", "low", "first_high", "first_low"]).append_column(
        "reason", pa.array(reasons, pa.int8())
    )
    return losers.filter(pa.array(found))


def write_rows(uri: str, table: pa.Table) -> str:
    """Write an intermediate file; returns its URI."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    files.write(uri, sink.getvalue().to_pybytes())
    return uri


def read_rows(uri: str) -> pa.Table:
    """Read a file of `write_rows`."""
    return pa.ipc.open_file(pa.py_buffer(files.read(uri))).read_all()
