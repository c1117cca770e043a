"""Deterministic reader of training rows in Parquet files.

The order of rows is a pure function of (seed, samples seen): the stream is one shuffled epoch after another, and batch n
always has the same rows, regardless of interruptions and of the number of ranks. Rows are shuffled within a window of row
groups, so that reads stay sequential enough for disks and object stores. The rows of a batch are divided among ranks in
storage order, so that each rank reads few of the window's row groups.

Letters: N rows.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import io
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unclip import files
from unclip.errors import InputError

_BATCHES_AHEAD = 2

Batch = dict[str, list[Any]]
"""Column name -> one value per row; images are encoded."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Parquet files with some of the columns; their `key` column identifies a row across all sources."""

    uris: tuple[str, ...]
    columns: tuple[str, ...]


class RowReader:
    """Reader of rows by key, joined over one or more sources."""

    def __init__(self, sources: Sequence[Source], keys: Sequence[str], window: int = 16) -> None:
        """Args:
            sources: files with the columns; shuffling follows the layout of the first source.
            keys: keys of the rows to read.
            window: number of row groups to shuffle together, and to keep in memory for each source.

        Raises:
            InputError: there are no keys, or a source lacks some of them.
        """
        if not keys:
            raise InputError("training: got no rows to train on. Loosen the filters or add to the list of URLs.")
        self.sources = sources
        self.window = window
        self._sorted_keys = np.unique(np.array([key.encode() for key in keys]))  # [N]
        positions = [_locate(source, self._sorted_keys) for source in sources]  # [N, 3] each
        # A row's number is its position in the layout of the first source.
        layout = np.lexsort(positions[0].T[::-1])  # [N]
        self._positions = [per_source[layout] for per_source in positions]
        self._keys = self._sorted_keys[layout]
        self._number_of_sorted = np.argsort(layout)  # [N]
        is_first = np.any(np.diff(self._positions[0][:, :2], axis=0, prepend=-1) != 0, axis=1)
        self._group_starts = np.append(np.flatnonzero(is_first), len(layout))  # row groups + 1
        self._read_group = functools.lru_cache(maxsize=2 * window * len(sources))(self._read_group_uncached)

    def __len__(self) -> int:
        """Number of rows in one epoch."""
        return len(self._keys)

    def keys(self) -> list[str]:
        """All keys, sorted."""
        return [key.decode() for key in self._sorted_keys.tolist()]

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Row numbers [N] of one epoch, in the order to read them; every row once. Numbers follow storage order."""
        rng = np.random.default_rng([seed, epoch])
        groups = rng.permutation(len(self._group_starts) - 1)
        order = []
        for first in range(0, len(groups), self.window):
            window = groups[first : first + self.window]
            rows = np.concatenate(
                [np.arange(self._group_starts[group], self._group_starts[group + 1]) for group in window]
            )
            order.append(rows[rng.permutation(len(rows))])
        return np.concatenate(order)

    def read(self, keys: Sequence[str]) -> Batch:
        """Read the rows with these keys, in this order, with the columns of all sources.

        Raises:
            KeyError: a key is not among the keys of this reader.
        """
        wanted = np.array([key.encode() for key in keys], "S")
        found = np.minimum(np.searchsorted(self._sorted_keys, wanted), len(self) - 1)
        if not np.array_equal(self._sorted_keys[found], wanted):
            raise KeyError(wanted[self._sorted_keys[found] != wanted][0].decode())
        return self._read(self._number_of_sorted[found])

    def _read(self, numbers: np.ndarray) -> Batch:
        batch: Batch = {"key": [key.decode() for key in self._keys[numbers].tolist()]}
        for index, source in enumerate(self.sources):
            positions = self._positions[index][numbers].tolist()
            rows = [self._read_group(index, file, group)[row] for file, group, row in positions]
            batch |= {column: [row[column] for row in rows] for column in source.columns}
        return batch

    def batches(
        self,
        *,
        seed: int,
        samples_seen: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        prepare: Callable[[Batch], Any] = lambda batch: batch,
    ) -> Generator[Any, None, None]:
        """Yield prepared batches without end, starting at `samples_seen`; the next ones are prepared in the background.

        Args:
            batch_size: rows per batch over all ranks; each rank gets an equal share.
            prepare: called with each batch, in order, in one background thread; its results are yielded.
        """
        stream = self._shares(seed, samples_seen, batch_size, rank, world_size)
        with concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            ahead = collections.deque(pool.submit(self._load, next(stream), prepare) for _ in range(_BATCHES_AHEAD))
            try:
                while True:
                    ahead.append(pool.submit(self._load, next(stream), prepare))
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _load(self, numbers: np.ndarray, prepare: Callable[[Batch], Any]) -> Any:
        return prepare(self._read(numbers))

    def _shares(
        self, seed: int, samples_seen: int, batch_size: int, rank: int, world_size: int
    ) -> Iterator[np.ndarray]:
        """Yield the numbers of this rank's rows, batch by batch."""
        share = batch_size // world_size
        epoch, position = divmod(samples_seen, len(self))
        pending = self.epoch(seed, epoch)[position:]
        while True:
            while len(pending) < batch_size:
                epoch += 1
                pending = np.concatenate([pending, self.epoch(seed, epoch)])
            yield np.sort(pending[:batch_size])[rank * share : (rank + 1) * share]
            pending = pending[batch_size:]

    def _read_group_uncached(self, number: int, file: int, group: int) -> list[dict[str, Any]]:
        source = self.sources[number]
        uri, names = source.uris[file], list(source.columns)
        table = files.with_retries(uri, lambda: open_parquet(uri).read_row_group(group, columns=names))
        columns = {name: _values(table.column(name)) for name in source.columns}
        return [{name: values[row] for name, values in columns.items()} for row in range(table.num_rows)]


def _locate(source: Source, sorted_keys: np.ndarray) -> np.ndarray:
    """Find the file, row group and row of each key: [N, 3] int32.

    Raises:
        InputError: the source lacks some of the keys.
    """
    positions = np.full((len(sorted_keys), 3), -1, np.int32)
    for file, uri in enumerate(source.uris):
        keys, sizes = files.with_retries(uri, lambda uri=uri: _keys_of_groups(uri))  # type: ignore[misc]
        found = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
        wanted = np.flatnonzero(sorted_keys[found] == keys)
        group = np.repeat(np.arange(len(sizes)), sizes)[wanted]
        row = wanted - (np.cumsum(sizes) - sizes)[group]
        positions[found[wanted]] = np.stack([np.full_like(row, file), group, row], axis=1)
    missing = sorted_keys[positions[:, 0] < 0]
    if len(missing):
        raise InputError(
            f"{source.uris[0] if source.uris else 'a source'} ...: lacks {len(missing)} of {len(sorted_keys)} keys, "
            f"such as {missing[0].decode()}. Run the pipeline again so that the tables agree."
        )
    return positions


def _keys_of_groups(uri: str) -> tuple[np.ndarray, list[int]]:
    """Read all keys of a file and the sizes of its row groups."""
    parquet = open_parquet(uri)
    keys = parquet.read(columns=["key"]).column("key").cast(pa.binary()).to_pylist()
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return np.array(keys, "S"), sizes


def open_parquet(uri: str) -> pq.ParquetFile:
    filesystem, path = files.locate(uri)
    return pq.ParquetFile(filesystem.open_input_file(path))


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Convert a column to Python values, or to numpy rows if it holds vectors."""
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type) or pa.types.is_large_list(column.type):
        return list(vectors(column))
    return list(column.to_pylist())


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    """Convert a column of float lists of equal length to an array [N, E] float32.

    Raises:
        InputError: there are nulls, or lists of different lengths.
    """
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    flat = array.flatten()
    if array.null_count or flat.null_count or (len(array) and len(flat) % len(array)):
        raise InputError(
            "embeddings: got nulls or vectors of different lengths. The table is damaged; delete it and run again."
        )
    return np.asarray(flat.to_numpy(zero_copy_only=False), np.float32).reshape(len(array), -1)


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode a stored JPEG, crop its central square and resize it: uint8 [size, size, 3]."""
    from PIL import Image

    image = Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB")
    if image.size == (size, size):
        return np.asarray(image)
    width, height = image.size
    crop = min(width, height)
    left, top = (width - crop) // 2, (height - crop) // 2
    box = (left, top, left + crop, top + crop)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
