"""Places: the kept rows of a dataset in the order of the images table, in memory-mappable files (`unclip.data.Places`).

A folder of places has, for each split, Arrow files that each cover a range of the images table's files. Trainings read rows
by place; embedding and scoring go through the images table file by file.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import ranges, rows, tables
from tasks.dataflow import exchange, share, value
from tasks.find_duplicates import read_rows, write_rows
from tasks.index import index_files, read_index
from tasks.keys import key_octets
from tasks.ranges import KeyRange
from unclip import files, seals
from unclip.data import Places, vectors
from unclip.errors import StageError

SPLITS = ("train", "holdout")
PLACED = "placed"
"""Folder in a layer of a selection with the places of its rows; see `write_changed`."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Range `index` of `count` ranges of the files of an images table."""

    index: int
    count: int

    def uri(self, folder: str, split: str) -> str:
        return f"{folder}/{split}-{self.index:05d}-of-{self.count:05d}.arrow"


@dataclasses.dataclass(frozen=True)
class KeptRows:
    """Kept rows of a selection with their places in the images table."""

    selection: str
    """Folder of range files: key, status, split."""
    images: str
    images_version: int
    index_version: int

    def read(self, key_range: KeyRange) -> pa.Table:
        """Rows of one key range, sorted by key: key, split, images_file, images_row.

        Raises:
            StageError: the images table lacks some of them.
        """
        selection = ranges.read_range(self.selection, key_range, ["key", "status", "split"])
        kept = selection.filter(pc.equal(selection["status"], rows.KEPT)).select(["key", "split"])
        index = read_index(index_files(self.images, self.index_version), key_range, ["key", "part", "row"])
        return self.place(kept, index)

    def place(self, kept: pa.Table, index: pa.Table) -> pa.Table:
        """Rows with their places, sorted by key: see `read`.

        Args:
            kept: key, split.
            index: key, part, row, of these and maybe other rows.
        """
        found = kept.join(index, "key").sort_by("key")
        names = pa.array(
            [uri.rpartition("/")[2] for uri in tables.files(self.images, self.images_version)], pa.string()
        )
        file = pc.index_in(found["part"], value_set=names)
        if file.null_count:
            missing = found["key"].filter(pc.is_null(file))
            raise StageError(
                f"{self.images} lacks {len(missing)} of {kept.num_rows} kept rows, such as {missing[0]}. "
                f"Remove the table and run again."
            )
        return pa.table({"key": found["key"], "split": found["split"], "images_file": file, "images_row": found["row"]})

    def num_files(self) -> int:
        """Number of files of the images table."""
        return len(tables.files(self.images, self.images_version))


def file_names(table: str, version: int) -> list[str]:
    """Names of the files of a table, in the order of their numbers in places."""
    return [uri.rpartition("/")[2] for uri in tables.files(table, version)]


def write_places(
    folder: str,
    key_ranges: Sequence[KeyRange],
    read_rows: Callable[[KeyRange], pa.Table],
    num_files: int,
    num_rows: int,
) -> int:
    """Write the places of all rows; returns their number.

    Args:
        read_rows: rows of a key range: key (32 hex digits), split, and for each table `t` the columns `t_file` and `t_row`;
            places are in the order of images_file and images_row.
        num_files: number of files of the images table.
        num_rows: number of rows, or an estimate.
    """
    count = min(ranges.num_ranges(num_rows), max(1, num_files))
    split = functools.partial(_split, read_rows, num_files, count)
    return sum(exchange(split, key_ranges, count, functools.partial(_merge, folder, count)))


@dataclasses.dataclass(frozen=True)
class EarlierPlaces:
    """Places of an earlier refresh, most of which still hold."""

    folder: str
    names: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    """Table -> names of its files in the order of their numbers, then and now."""
    changed: str
    """Folder with a file of `write_changed` for each key range."""
    key_ranges: Sequence[KeyRange]

    def write(self, folder: str, num_rows: int) -> int:
        """Write the places of all rows; returns their number.

        Rows are moved as they are: their places are not looked up again, and nothing of them is decoded.

        Args:
            num_rows: number of rows, or an estimate.
        """
        num_files = len(self.names["images"][1])
        count = min(ranges.num_ranges(num_rows), max(1, num_files))
        numbers = {table: _new_numbers(*names) for table, names in self.names.items()}
        gone = share(pa.concat_arrays([read_changed(self.changed, key_range)[1] for key_range in self.key_ranges]))
        move = functools.partial(_move, self, numbers, gone, num_files, count)
        items: list[Block | KeyRange] = [*blocks(self.folder), *self.key_ranges]
        return sum(exchange(move, items, count, functools.partial(_merge_moved, folder, count)))


def write_changed(folder: str, key_range: KeyRange, placed: pa.Table, keys: pa.Array | pa.ChunkedArray) -> None:
    """Write the places of the rows of one range that have changed.

    Args:
        placed: rows that are kept now: key (32 hex digits), split, and for each table `t` the columns `t_file` and `t_row`.
        keys: keys of all rows that have changed, of which the earlier places do not count.
    """
    write_rows(f"{folder}/{key_range}.placed", placed)
    write_rows(f"{folder}/{key_range}.keys", pa.table({"key": key_octets(keys)}))


def read_changed(folder: str, key_range: KeyRange) -> tuple[pa.Table, pa.Array]:
    """Places of the rows that `write_changed` wrote, and the keys of all rows that have changed, as 16 bytes."""
    placed, keys = (read_rows(f"{folder}/{key_range}.{name}") for name in ("placed", "keys"))
    return placed, keys["key"].combine_chunks()


def _new_numbers(before: Sequence[str], now: Sequence[str]) -> np.ndarray:
    """Number of each file now, by its number before: [N] int32; -1 if it is not there any more."""
    number = {name: index for index, name in enumerate(now)}
    return np.array([number.get(name, -1) for name in before], np.int32)


def _move(
    earlier: EarlierPlaces,
    numbers: Mapping[str, np.ndarray],
    gone: Any,
    num_files: int,
    count: int,
    item: Block | KeyRange,
) -> list[pa.Table]:
    """Divide the rows of an earlier block that have not changed, or those of a key range that have, among the new blocks.

    Args:
        numbers: table -> see `_new_numbers`.
        gone: keys of all rows that have changed; see `dataflow.share`.
    """
    if isinstance(item, KeyRange):
        placed, _ = read_changed(earlier.changed, item)
        table = placed.set_column(placed.column_names.index("key"), "key", key_octets(placed["key"]))
    else:
        parts = []
        for split in SPLITS:
            part = open_block(earlier.folder, item, split)
            part = part.filter(pc.invert(pc.is_in(part["key"], value_set=value(gone))))
            parts.append(part.append_column("split", pa.repeat(split, part.num_rows)))
        table = pa.concat_tables(parts)
        for name, new in numbers.items():
            moved = new[table[f"{name}_file"].to_numpy()]
            assert not (moved < 0).any(), f"{earlier.folder} has rows in files of {name} that are gone"
            table = table.set_column(table.column_names.index(f"{name}_file"), f"{name}_file", pa.array(moved))
    names = ["key", "split", *(f"{name}_{kind}" for name in numbers for kind in ("file", "row"))]
    table = table.select(names).cast(pa.schema([_FIELDS.get(name) or pa.field(name, pa.int32()) for name in names]))
    return ranges.split(table, table["images_file"].to_numpy().astype(np.int64) * count // max(1, num_files), count)


_FIELDS = {"key": pa.field("key", pa.binary(16)), "split": pa.field("split", pa.string())}


def _merge_moved(folder: str, count: int, output: int, pieces: list[pa.Table]) -> int:
    listed = pa.concat_tables(pieces).combine_chunks()
    order = np.lexsort([listed["images_row"].to_numpy(), listed["images_file"].to_numpy()])
    return _write_block(folder, Block(output, count), listed.take(pa.array(order)))


def blocks(folder: str) -> list[Block]:
    """Blocks of a folder of places, in the order of the images table."""
    names = [name for name in files.names(folder) if name.startswith(f"{SPLITS[0]}-")]
    return [Block(index, len(names)) for index in range(len(names))]


def _split(
    read_rows: Callable[[KeyRange], pa.Table], num_files: int, count: int, key_range: KeyRange
) -> list[pa.Table]:
    table = read_rows(key_range)
    return ranges.split(table, table["images_file"].to_numpy().astype(np.int64) * count // max(1, num_files), count)


def _merge(folder: str, count: int, output: int, pieces: list[pa.Table]) -> int:
    listed = pa.concat_tables(pieces).sort_by([("images_file", "ascending"), ("images_row", "ascending")])
    columns = [name for name in listed.column_names if name.endswith(("_file", "_row"))]
    table = pa.table({"key": key_octets(listed["key"]), **{name: listed[name].cast(pa.int32()) for name in columns}})
    return _write_block(folder, Block(output, count), table.append_column("split", listed["split"]))


def _write_block(folder: str, block: Block, listed: pa.Table) -> int:
    """Write the files of one block; returns the number of its rows."""
    table = listed.drop_columns("split")
    for split in SPLITS:
        part = table.filter(pc.equal(listed["split"], split)).combine_chunks()
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, part.schema) as writer:
            writer.write_table(part)
        files.write(block.uri(folder, split), seals.seal(sink.getvalue()))
    return int(table.num_rows)


def open_places(folder: str, *splits: str) -> Places:
    """Memory-map the places of one split, or of several, one after the other."""
    names = files.names(folder)
    found = [f"{folder}/{name}" for split in splits for name in names if name.startswith(f"{split}-")]
    return Places.open(found)


def open_block(folder: str, block: Block, *splits: str) -> pa.Table:
    """Places of some splits (both by default) in one block, in the order of the images table; keys as 16 bytes."""
    parts = []
    for split in splits or SPLITS:
        uri = block.uri(folder, split)
        file = pa.BufferReader(files.read(uri))
        seals.require_sound(file, uri)
        parts.append(pa.ipc.open_file(file).read_all())
    return pa.concat_tables(parts).sort_by([("images_file", "ascending"), ("images_row", "ascending")])


def read_vectors(places: pa.Table, uris: Sequence[str], column: str) -> np.ndarray:
    """Values of a vector column of the embeddings table at some places: [N, E] float32.

    Args:
        places: embeddings_file, embeddings_row.
        uris: files of the embeddings table.
    """
    file, row = (places[name].to_numpy() for name in ("embeddings_file", "embeddings_row"))
    found: np.ndarray | None = None
    for number in np.unique(file).tolist():
        wanted = np.flatnonzero(file == number)
        values = vectors(tables.read_file(uris[number], [column])[column])[row[wanted]]
        found = np.empty((len(file), values.shape[1]), np.float32) if found is None else found
        found[wanted] = values
    return np.empty((0, 0), np.float32) if found is None else found
