"""Tables that are split by key range: a folder of Parquet files, one for each range.

Keys are hashes, so ranges of equal width hold about equally many rows. Two tables are joined range by range, without a
shuffle, and a row is found by its key in one file. Files are named after their range; a file is sorted by key.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import tables
from tasks.keys import hex_numbers
from unclip import files

ROWS_PER_RANGE = 1 << 17
MAX_RANGES = 1024
_DIGITS = 8  # hex digits of a key that decide its range
_NAME = re.compile(r"(\d{5})-of-(\d{5})")


@dataclasses.dataclass(frozen=True, order=True)
class KeyRange:
    """Range `index` of `count` ranges of equal width; `count` is a power of two."""

    index: int
    count: int

    @property
    def start(self) -> str:
        """First key, cut to its first digits; inclusive."""
        return f"{(self.index << 4 * _DIGITS) // self.count:0{_DIGITS}x}"

    @property
    def stop(self) -> str | None:
        """End of the range, exclusive; None for the last range."""
        return KeyRange(self.index + 1, self.count).start if self.index + 1 < self.count else None

    def overlaps(self, other: "KeyRange") -> bool:
        return self.index * other.count < (other.index + 1) * self.count and other.index * self.count < (
            (self.index + 1) * other.count
        )

    def __str__(self) -> str:
        return f"{self.index:05d}-of-{self.count:05d}"


def of_prefix(prefix: str) -> KeyRange:
    """Range of the keys that begin with these hex digits, at most 8."""
    return KeyRange(int(prefix, 16), 16 ** len(prefix))


def num_ranges(rows: int) -> int:
    """Number of ranges for a table: a power of two, with about `ROWS_PER_RANGE` rows in each range, or more in huge tables."""
    return min(MAX_RANGES, 1 << max(0, -(-rows // ROWS_PER_RANGE) - 1).bit_length())


def ranges(count: int) -> list[KeyRange]:
    """All ranges, in order of their keys."""
    return [KeyRange(index, count) for index in range(count)]


def range_uri(folder: str, key_range: KeyRange) -> str:
    return f"{folder}/{key_range}.parquet"


def range_of_file(uri: str) -> KeyRange:
    """Range that a file's name begins with; other files, of earlier releases, hold all keys."""
    match = _NAME.match(uri.rpartition("/")[2])
    return KeyRange(int(match[1]), int(match[2])) if match else KeyRange(0, 1)


def range_files(folder: str) -> list[str]:
    """URIs of the files of a folder, in order of their ranges; a single Parquet file of an earlier release is one range."""
    if folder.endswith(".parquet"):
        return [folder]
    return [f"{folder}/{name}" for name in sorted(files.names(folder)) if _NAME.match(name)]


def range_count(folder: str) -> int:
    """Number of ranges of a folder."""
    return range_of_file(range_files(folder)[0]).count


def of_keys(keys: pa.Array | pa.ChunkedArray, count: int) -> np.ndarray:
    """Index of the range of each key: [N] int64."""
    return np.zeros(len(keys), np.int64) if count == 1 else (fractions(keys) * count).astype(np.int64)


def fractions(keys: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Position of each key among all possible keys, from its first digits: [N] float64 in [0, 1), uniformly distributed."""
    if not len(keys):  # of any type
        return np.zeros(0)
    values = hex_numbers(pc.utf8_slice_codeunits(keys, 0, _DIGITS), _DIGITS)[:, 0]
    found: np.ndarray = values.astype(np.float64) / 16**_DIGITS  # exact: 32 bits
    return found


def split(table: pa.Table, destinations: np.ndarray, count: int) -> list[pa.Table]:
    """Divide the rows among `count` tables, in their order.

    Args:
        destinations: index of each row's table: [N] integers.
    """
    if count == 1:
        return [table]
    order = np.argsort(destinations, kind="stable")
    ends = np.cumsum(np.bincount(destinations, minlength=count))
    moved = table.take(order)
    return [moved.slice(end - size, size) for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)]


def split_by_key(table: pa.Table, count: int) -> list[pa.Table]:
    """Divide the rows of a table with a column `key` among `count` ranges."""
    return split(table, of_keys(table["key"], count), count)


def read_range(
    source: str | Sequence[str], key_range: KeyRange = KeyRange(0, 1), columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows of one key range, sorted by key and, if there are several files, in order of their names.

    Args:
        source: a folder, or URIs of files that are named after ranges, possibly of several counts.
        key_range: any range; the whole table by default.
        columns: columns to read, including `key`; None reads all.
    """
    uris = range_files(source) if isinstance(source, str) else source
    parts = [_part(uri, key_range, columns) for uri in uris if range_of_file(uri).overlaps(key_range)]
    table = pa.concat_tables(parts, promote_options="default")
    return table.sort_by("key") if len(parts) > 1 and not isinstance(source, str) else table


def read_all(source: str | Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """All rows, sorted by key; only for tables that are known to be small."""
    return read_range(source, columns=columns)


def _part(uri: str, key_range: KeyRange, columns: Sequence[str] | None) -> pa.Table:
    if range_of_file(uri).count >= key_range.count:  # the file lies within the range
        return tables.read_file(uri, columns)
    table = tables.read_between(uri, key_range.start, key_range.stop, columns)
    inside = pc.greater_equal(table["key"], key_range.start)
    if key_range.stop is not None:
        inside = pc.and_(inside, pc.less(table["key"], key_range.stop))
    return table.filter(inside)


def find_rows(source: str | Sequence[str], keys: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Rows with these keys, sorted by key; opens only the files that may hold them.

    Args:
        source, columns: see `read_range`.
    """
    uris = range_files(source) if isinstance(source, str) else source
    wanted = pa.array(sorted(set(keys)), pa.string())
    found = []
    for uri in uris:
        file_range = range_of_file(uri)
        inside = wanted.filter(pa.array(of_keys(wanted, file_range.count) == file_range.index))
        if len(inside):
            table = tables.read_file(uri, columns)
            found.append(table.filter(pc.is_in(table["key"], value_set=inside)))
    if not found:
        return tables.read_file(uris[0], columns).slice(0, 0)
    return pa.concat_tables(found, promote_options="default").sort_by("key")


def write_range(folder: str, key_range: KeyRange, table: pa.Table) -> str:
    """Write the file of one range atomically; returns its URI."""
    uri = range_uri(folder, key_range)
    tables.write_file(uri, table)
    return uri
