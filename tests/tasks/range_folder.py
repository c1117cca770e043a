"""Folder of range files, as stages write their tables."""

import pyarrow as pa

from tasks import ranges


def write_folder(folder: str, table: pa.Table, count: int = 1) -> str:
    """Write a table in `count` ranges of keys; returns the folder."""
    parts = ranges.split_by_key(table.sort_by([("key", "ascending")]), count)
    for key_range, part in zip(ranges.ranges(count), parts, strict=True):
        ranges.write_range(folder, key_range, part)
    return folder
