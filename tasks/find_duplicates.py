"""Duplicates among the images of a whole dataset, found by exchanging rows between tasks; no process holds all rows.

The rows meet three times: by the sha256 of their bytes, by their perceptual hash, and, if hashes may differ, by bands of
bits of the hash. What is found goes back to the key range of each row. The result is that of comparing all rows with all,
whatever the number of key ranges and partitions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from tasks import dataflow, ranges
from tasks.keys import KEY_DIGITS, hex_numbers, key_texts
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

_REASONS = ("duplicate_image", "near_duplicate")


def find_duplicates(
    read: Callable[[KeyRange], pa.Table],
    num_ranges: int,
    distance: int,
    scratch: str,
    use: Callable[[KeyRange, pa.Table], ResultT],
    num_partitions: int | None = None,
    **options: Any,
) -> list[ResultT]:
    """Find the rows with the same bytes as an earlier row, and those that look like an earlier row, in the order of keys.

    Of equal bytes, the smallest key is kept, and only that row is compared by look: see `tasks.near_duplicates` for when
    two rows look alike. A row without a perceptual hash is compared by bytes alone.

    Args:
        read: key range -> key (32 hex digits), sha256, phash, colour of the rows to compare; keys are unique.
        num_ranges: number of key ranges.
        distance: largest number of differing bits of perceptual hashes; -1 compares only bytes.
        scratch: URI of a folder for intermediate files, which is deleted at the end; every node must see it.
        use: called in a task for each key range with the rows to drop: key, reason, sorted by key. Like `read`, a
            module-level function or a `functools.partial` of one.
        num_partitions: number of tasks among which rows are exchanged; by default the number of key ranges.
        options: options of the Ray tasks.

    Returns:
        Results of `use`, in the order of key ranges.
    """
    count = num_partitions or num_ranges
    files.delete(scratch)

    def exchange(split: Any, items: Any, num_outputs: int, merge: Any) -> list[Any]:
        return dataflow.exchange(split, items, num_outputs, merge, **options)

    step = exchange(
        functools.partial(_split_by_bytes, read, count),
        ranges.ranges(num_ranges),
        count,
        functools.partial(_keep_first, f"{scratch}/bytes"),
    )
    found = [[losers for _, losers in step]]
    if distance >= 0:
        step = exchange(
            functools.partial(_split_by_hash, count),
            [rows for rows, _ in step],
            count,
            functools.partial(_compare_equal_hashes, f"{scratch}/hashes"),
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


def _split_by_bytes(read: Callable[[KeyRange], pa.Table], count: int, key_range: KeyRange) -> list[pa.Table]:
    table = read(key_range)
    # 128 of the 256 bits tell different bytes apart.
    digests = hex_numbers(table["sha256"], 64)[:, :2]
    rows = {
        **key_columns(hex_numbers(table["key"], KEY_DIGITS)),
        "digest": digests[:, 0],
        "digest_low": digests[:, 1],
        "hash": hex_numbers(table["phash"], 16)[:, 0],
        "has_hash": table["phash"].is_valid(),
        "cell": colour_cells(table["colour"]),
    }
    return ranges.split(pa.table(rows), _partition(digests[:, 0], count), count)


def _keep_first(folder: str, index: int, pieces: list[pa.Table]) -> tuple[str, str]:
    """Keep the first row of equal bytes; write the comparable kept rows and the keys of the others."""
    table = pa.concat_tables(pieces)
    table = table.take(np.lexsort([table[name].to_numpy() for name in ("low", "high", "digest_low", "digest")]))
    is_first = np.ones(table.num_rows, bool)
    digests = [np.diff(table[name].to_numpy()) != 0 for name in ("digest", "digest_low")]
    is_first[1:] = digests[0] | digests[1]
    kept = table.filter(pa.array(is_first)).select(["high", "low", "hash", "has_hash", "cell"])
    kept = kept.filter(kept["has_hash"]).drop_columns("has_hash")
    losers = _losers(table, ~is_first, 0)
    return write_rows(f"{folder}/{index:05d}.rows", kept), write_rows(f"{folder}/{index:05d}.found", losers)


def _split_by_hash(count: int, uri: str) -> list[pa.Table]:
    table = read_rows(uri)
    return ranges.split(table, _partition(table["hash"].to_numpy(), count), count)


def _compare_equal_hashes(folder: str, index: int, pieces: list[pa.Table]) -> tuple[str, str]:
    """Find near duplicates with an equal hash; write the looks and the keys of the near duplicates."""
    table = in_order_of_keys(pieces)
    hashes, cells = table["hash"].to_numpy(), table["cell"].to_numpy()
    found = near_duplicates(hashes, 0, cells)
    looks, _ = find_looks(hashes, cells)
    distinct = table.take(looks).append_column("found", pa.array(found[looks]))
    losers = _losers(table, found, 1)
    return write_rows(f"{folder}/{index:05d}.looks", distinct), write_rows(f"{folder}/{index:05d}.found", losers)


def _split_by_band(distance: int, count: int, uri: str) -> list[pa.Table]:
    table = read_rows(uri)
    sent = np.zeros((table.num_rows, count), bool)
    np.put_along_axis(sent, partitions_of(table["hash"].to_numpy(), distance, count).astype(np.int64), True, axis=1)
    return [table.filter(pa.array(sent[:, partition])) for partition in range(count)]


def _compare_near_hashes(folder: str, distance: int, count: int, index: int, pieces: list[pa.Table]) -> str:
    table = in_order_of_keys(pieces)
    known = table["found"].to_numpy()
    hashes, cells = table["hash"].to_numpy(), table["cell"].to_numpy()
    found = near_duplicate_looks(hashes, cells, distance, known, index, count)
    return write_rows(f"{folder}/{index:05d}.found", _losers(table, found & ~known, 1))


def split_by_range(count: int, uris: Sequence[str]) -> list[pa.Table]:
    """Divide the rows of intermediate files among key ranges."""
    table = pa.concat_tables(map(read_rows, uris))
    return ranges.split(table, (table["high"].to_numpy() >> 32).astype(np.int64) * count >> 32, count)


def _use_found(use: Callable[[KeyRange, pa.Table], ResultT], count: int, index: int, pieces: list[pa.Table]) -> ResultT:
    table = pa.concat_tables(pieces)
    numbers = np.stack([table["high"].to_numpy(), table["low"].to_numpy()], axis=1)
    numbers, first = np.unique(numbers, axis=0, return_index=True)  # several bands may find a row
    reasons = pa.array(_REASONS).take(table["reason"].take(first).combine_chunks())
    return use(KeyRange(index, count), pa.table({"key": key_texts(numbers), "reason": reasons}))


def key_columns(numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Columns `high` and `low` of keys as numbers."""
    return {"high": numbers[:, 0], "low": numbers[:, 1]}


def _partition(numbers: np.ndarray, count: int) -> np.ndarray:
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15)  # hashes of images are less even than digests
    return ((mixed >> np.uint64(32)) % np.uint64(count)).astype(np.int64)


def in_order_of_keys(pieces: list[pa.Table]) -> pa.Table:
    """Rows of all tables, sorted by `high` and `low`."""
    table = pa.concat_tables(pieces)
    return table.take(np.lexsort([table["low"].to_numpy(), table["high"].to_numpy()])).combine_chunks()


def _losers(table: pa.Table, found: np.ndarray, reason: int) -> pa.Table:
    losers = table.select(["high", "low"]).filter(pa.array(found))
    return losers.append_column("reason", pa.array(np.full(losers.num_rows, reason, np.int8)))


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
