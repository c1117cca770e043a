"""Places: the kept rows of a dataset in the order of the images table, in memory-mappable files (`unclip.data.Places`).

A folder of places has, for each split, Arrow files that each cover a range of the images table's files. Trainings read rows
by place; embedding and scoring go through the images table file by file.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import ranges
from tasks.dataflow import exchange
from tasks.ranges import KeyRange
from unclip import files
from unclip.data import Places

SPLITS = ("train", "holdout")


@dataclasses.dataclass(frozen=True)
class Block:
    """Range `index` of `count` ranges of the files of an images table."""

    index: int
    count: int

    def uri(self, folder: str, split: str) -> str:
        return f"{folder}/{split}-{self.index:05d}-of-{self.count:05d}.arrow"


def write_places(
    folder: str,
    key_ranges: Sequence[KeyRange],
    read_rows: Callable[[KeyRange], pa.Table],
    num_files: int,
    num_rows: int,
) -> list[Block]:
    """Write the places of all rows; returns the blocks of the folder.

    Args:
        read_rows: rows of a key range: key (32 hex digits), split, and for each table `t` the columns `t_file` and `t_row`;
            places are in the order of images_file and images_row.
        num_files: number of files of the images table.
        num_rows: number of rows, or an estimate.
    """
    count = min(ranges.num_ranges(num_rows), max(1, num_files))
    blocks = [Block(index, count) for index in range(count)]
    split = functools.partial(_split, read_rows, num_files, count)
    exchange(split, key_ranges, count, functools.partial(_merge, folder, count))
    return blocks


def _split(
    read_rows: Callable[[KeyRange], pa.Table], num_files: int, count: int, key_range: KeyRange
) -> list[pa.Table]:
    rows = read_rows(key_range)
    return ranges.split(rows, rows["images_file"].to_numpy().astype(np.int64) * count // max(1, num_files), count)


def _merge(folder: str, count: int, output: int, pieces: list[pa.Table]) -> int:
    rows = pa.concat_tables(pieces).sort_by([("images_file", "ascending"), ("images_row", "ascending")])
    keys = pa.array([bytes.fromhex(key) for key in rows["key"].to_pylist()], pa.binary(16))
    columns = [name for name in rows.column_names if name.endswith(("_file", "_row"))]
    table = pa.table({"key": keys, **{name: rows[name].cast(pa.int32()) for name in columns}})
    for split in SPLITS:
        part = table.filter(pc.equal(rows["split"], split)).combine_chunks()
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, part.schema) as writer:
            writer.write_table(part)
        files.write(Block(output, count).uri(folder, split), sink.getvalue())
    return rows.num_rows


def open_places(folder: str, *splits: str) -> Places:
    """Memory-map the places of one split, or of several, one after the other."""
    names = files.names(folder)
    found = [f"{folder}/{name}" for split in splits for name in names if name.startswith(f"{split}-")]
    return Places.open(found)


def open_block(folder: str, block: Block) -> pa.Table:
    """Places of both splits in one block: key as 16 bytes, and files and rows, in the order of the images table."""
    parts = [pa.ipc.open_file(pa.BufferReader(files.read(block.uri(folder, split)))).read_all() for split in SPLITS]
    return pa.concat_tables(parts).sort_by([("images_file", "ascending"), ("images_row", "ascending")])
