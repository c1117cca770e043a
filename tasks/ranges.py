"""Tables that are split by key range: a folder of Parquet files, one for each range.

Keys are hashes, so ranges of equal width hold about equally many rows. Two tables are joined range by range, without a
shuffle, and a row is found by its key in one file. Files are named after their range; a file is sorted by key.

A refresh changes few rows of a large table. Its folder may then hold only these, and name the earlier folders that hold the
others: its layers. The rows of a key are those of the newest layer that has the key, or none if that layer says so.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import tables
from tasks.keys import KEY_DIGITS, hex_numbers, key_texts
from tasks.lookups import look_up, write_lookup
from unclip import files
from unclip.data import ROW_GROUP_ROWS

EARLIER = "_earlier.json"
"""File in the folder of a layer that names the earlier ones. Readers of a folder of Parquet files pass over names with `_`."""

ROWS_PER_RANGE = 1 << 17
MAX_RANGES = 1024
_REMOVED = "_removed"
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
    return min(MAX_RANGES, _num_parts(rows, ROWS_PER_RANGE))


def _num_parts(rows: int, rows_per_part: int) -> int:
    """Smallest power of two of parts that have at most `rows_per_part` rows on average."""
    return 1 << max(0, -(-rows // rows_per_part) - 1).bit_length()


def ranges(count: int) -> list[KeyRange]:
    """All ranges, in order of their keys."""
    return [KeyRange(index, count) for index in range(count)]


def range_uri(folder: str, key_range: KeyRange) -> str:
    return f"{folder}/{key_range}.parquet"


def range_of_file(uri: str) -> KeyRange:
    """Range that a file's name begins with; other files, of earlier releases, hold all keys."""
    match = _NAME.match(uri.rpartition("/")[2])
    return KeyRange(int(match[1]), int(match[2])) if match else KeyRange(0, 1)


def layers(folder: str) -> list[str]:
    """Folders that together hold a table, the oldest first; the last is the given one."""
    if folder.endswith(".parquet") or EARLIER not in files.names(folder):
        return [folder]
    root = _root(folder)
    return [*(files.below(root, name) for name in files.read_json(f"{folder}/{EARLIER}")["folders"]), folder]


def write_earlier(folder: str, earlier: Sequence[str]) -> None:
    """Make a folder a layer on top of earlier ones, which are results of the same stage; to be called before it is read.

    The names are relative, so that a storage can be moved.
    """
    root = _root(folder)
    assert all(_root(other) == root for other in earlier), f"{folder} and {earlier} are not of one stage"
    files.write_json(f"{folder}/{EARLIER}", {"folders": [other.removeprefix(f"{root}/") for other in earlier]})


def _root(folder: str) -> str:
    """Folder of all results of the stage that wrote a folder."""
    return folder.rsplit("/", 2)[0]


def range_files(folder: str) -> list[str]:
    """URIs of the files of a folder, without earlier layers, in order of their ranges.

    A single Parquet file of an earlier release is one range.
    """
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
        source: a folder, with its earlier layers, or URIs of files that are named after ranges, possibly of several counts.
        key_range: any range; the whole table by default.
        columns: columns to read, including `key`; None reads all.
    """
    if isinstance(source, str):
        return read_layers(layers(source), key_range, columns)
    table = _read_files(source, key_range, columns)
    return table.sort_by("key") if sum(range_of_file(uri).overlaps(key_range) for uri in source) > 1 else table


def read_layers(
    folders: Sequence[str], key_range: KeyRange = KeyRange(0, 1), columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows of one key range of some layers, such as those that were added since an earlier refresh, sorted by key."""
    parts = [_read_files(range_files(folder), key_range, columns) for folder in folders]
    return _newest(parts, [read_removed(folder, key_range) for folder in folders])


def write_removed(folder: str, key_range: KeyRange, keys: pa.ChunkedArray) -> None:
    """Write the keys of one range that the earlier layers have and the table has not."""
    tables.write_file(f"{folder}/{_REMOVED}/{key_range}.parquet", pa.table({"key": keys}))


def read_removed(folder: str, key_range: KeyRange) -> pa.Array:
    """Keys that a layer takes away from earlier ones."""
    if folder.endswith(".parquet") or _REMOVED not in files.names(folder):
        return pa.array([], pa.string())
    return _read_files(range_files(f"{folder}/{_REMOVED}"), key_range, ["key"])["key"].combine_chunks()


def _find_removed(folder: str, wanted: pa.Array) -> pa.Array:
    """Keys, among some that are sorted, that a layer takes away from earlier ones."""
    if folder.endswith(".parquet") or _REMOVED not in files.names(folder):
        return wanted.slice(0, 0)
    return _find_in_files(range_files(f"{folder}/{_REMOVED}"), wanted, ["key"])["key"].combine_chunks()


def _newest(parts: Sequence[pa.Table], removed: Sequence[pa.Array]) -> pa.Table:
    """Rows of all layers, sorted by key: of each key, those of the last layer that has it or has removed it."""
    found = [(part, gone) for part, gone in zip(parts[:-1], removed[:-1], strict=True) if part.num_rows or len(gone)]
    if not found:
        return parts[-1]
    kept, known = [parts[-1]], [parts[-1]["key"].combine_chunks(), removed[-1]]
    for part, gone in reversed(found):
        kept.append(part.filter(pc.invert(pc.is_in(part["key"], value_set=pa.concat_arrays(known)))))
        known += [part["key"].combine_chunks(), gone]
    rows = [part for part in reversed(kept) if part.num_rows]
    return pa.concat_tables(rows or kept, promote_options="default").sort_by("key") if len(rows) != 1 else rows[0]


def _read_files(uris: Sequence[str], key_range: KeyRange, columns: Sequence[str] | None) -> pa.Table:
    parts = [_part(uri, key_range, columns) for uri in uris if range_of_file(uri).overlaps(key_range)]
    if not parts:  # of a folder that a killed process began
        return tables.read_keys(uris[0], pa.array([], pa.string()), columns)
    return pa.concat_tables(parts, promote_options="default")


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
    """Rows with these keys, sorted by key; reads only the row groups that may hold them.

    Args:
        source, columns: see `read_range`.
    """
    wanted = pa.array(sorted(set(keys)), pa.string())
    if isinstance(source, str):
        folders = layers(source)
        parts = [_find_in_files(range_files(folder), wanted, columns) for folder in folders]
        return _newest(parts, [_find_removed(folder, wanted) for folder in folders])
    return _find_in_files(source, wanted, columns).sort_by("key")


def _find_in_files(uris: Sequence[str], wanted: pa.Array, columns: Sequence[str] | None) -> pa.Table:
    """Rows with some keys, which are sorted, in the order of the files."""
    found = []
    indices: dict[int, np.ndarray] = {}
    """Number of ranges -> index of the range of each key, in ascending order like the keys."""
    for uri in uris:
        file_range = range_of_file(uri)
        if file_range.count not in indices:
            indices[file_range.count] = of_keys(wanted, file_range.count)
        begin, end = np.searchsorted(indices[file_range.count], [file_range.index, file_range.index + 1]).tolist()
        if begin < end:
            found.append(tables.read_keys(uri, wanted.slice(begin, end - begin), columns))
    return pa.concat_tables(
        found or [tables.read_keys(uris[0], wanted.slice(0, 0), columns)], promote_options="default"
    )


def write_range(folder: str, key_range: KeyRange, table: pa.Table) -> str:
    """Write the file of one range atomically; returns its URI."""
    uri = range_uri(folder, key_range)
    tables.write_file(uri, table, group_starts(table, key_range))
    return uri


def group_starts(table: pa.Table, key_range: KeyRange) -> list[int]:
    """First rows of the row groups of a range's file, which is sorted by key: those of equal parts of the range.

    So a task that reads a part of the range, as it is divided in a larger table, reads no rows of the parts beside it. Groups
    have at most about `ROW_GROUP_ROWS` rows. A table without keys has groups of that size.
    """
    if "key" not in table.column_names:
        return []
    part_of_row = of_keys(table["key"], key_range.count * _num_parts(table.num_rows, ROW_GROUP_ROWS))
    starts: list[int] = np.flatnonzero(np.diff(part_of_row, prepend=-1)).tolist()
    return starts


def write_keys(folder: str, key_range: KeyRange, keys: pa.ChunkedArray) -> None:
    """Write a look-up of the keys of one range beside its file."""
    numbers = np.unique(hex_numbers(keys, KEY_DIGITS), axis=0)
    write_lookup(_keys_uri(folder, key_range), pa.table({"high": numbers[:, 0], "low": numbers[:, 1]}), "high")


def known_keys(folders: Sequence[str], key_range: KeyRange, keys: pa.ChunkedArray) -> pa.Array:
    """Keys, among some of one range, that layers have.

    Args:
        folders: layers that are divided into these ranges. Those without look-ups by `write_keys`, of earlier releases, are read.
    """
    if not (folders and len(keys)):
        return pa.array([], pa.string())
    uris = {folder: _keys_uri(folder, key_range) for folder in folders}
    with_look_ups = [uri for uri in uris.values() if files.exists(uri)]
    listed = [read_range(folder, key_range, ["key"])["key"] for folder, uri in uris.items() if uri not in with_look_ups]
    parts = [column.combine_chunks() for column in listed]
    if with_look_ups:
        found = look_up(with_look_ups, "high", hex_numbers(keys, KEY_DIGITS)[:, 0])
        parts.append(key_texts(np.stack([found["high"].to_numpy(), found["low"].to_numpy()], axis=1)))
    known = pa.concat_arrays(parts)
    return known.filter(pc.is_in(known, value_set=keys.combine_chunks())).unique()


def _keys_uri(folder: str, key_range: KeyRange) -> str:
    return f"{folder}/_keys/{key_range}.arrow"
