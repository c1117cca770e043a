"""Look-ups: rows sorted by a number, such as a hash, in memory-mapped files in which some of them are found by bisection.

A look-up tells a refresh which earlier rows the new ones meet, without reading the others. Its columns are numbers; a file
holds one part of the rows, such as those of a range of keys.
"""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from unclip import files, seals


def write_lookup(uri: str, table: pa.Table, by: str) -> None:
    """Write rows as one file of a look-up.

    Args:
        table: columns of numbers without nulls.
        by: the column by which rows will be found.
    """
    ordered = table.take(pa.array(np.argsort(table[by].to_numpy(), kind="stable"))).combine_chunks()
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, ordered.schema) as writer:
        writer.write_table(ordered)
    files.write(uri, seals.seal(sink.getvalue()))


def look_up(uris: Sequence[str], by: str, values: np.ndarray) -> pa.Table:
    """Rows of all files whose number is among some values, in the order of the files and of the numbers.

    Args:
        by: the column that `write_lookup` sorted the files by.
        values: [N], of the type of that column.
    """
    wanted = np.unique(values)
    parts = []
    for uri in uris:
        table = pa.ipc.open_file(_opened(uri)).read_all()
        if table.num_rows and len(wanted):
            numbers = table[by].chunk(0).to_numpy()
            begin, end = (np.searchsorted(numbers, wanted, side=side) for side in ("left", "right"))
            parts.append(table.take(pa.array(_places(begin, end - begin))))
        else:
            parts.append(table.slice(0, 0))
    return pa.concat_tables(parts)


def _places(begin: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """All places from each begin on: [sum of counts]."""
    ends = np.cumsum(counts)
    places: np.ndarray = np.arange(ends[-1] if len(ends) else 0) + np.repeat(begin - (ends - counts), counts)
    return places


def _opened(uri: str) -> pa.NativeFile:
    path = files.to_path(uri)
    return pa.BufferReader(files.read(uri)) if path is None else pa.memory_map(str(path))
