"""Deterministic reading of training rows from Parquet files.

The order of rows is a pure function of (seed, samples seen): the stream is one shuffled epoch after another, and batch
number n is always the same rows, whatever was interrupted in between and however many ranks share it. Rows of one file are
shuffled within a window of row groups, so that reading stays sequential enough for disks and object stores; and those of a
batch are shared in the order in which they are stored, so that a rank reads few of the window's row groups.

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
"""Column name -> one value per row; images are still encoded."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Parquet files that hold some columns of the rows; each has a `key` column that names a row in all sources."""

    uris: tuple[str, ...]
    columns: tuple[str, ...]


class RowReader:
    """Rows by key, joined over one or more sources."""

    def __init__(self, sources: Sequence[Source], keys: Sequence[str], window: int = 16) -> None:
        """Args:
            sources: where the columns are; shuffling follows the layout of the first.
            keys: the rows to read.
            window: row groups that are shuffled together, and kept in memory for each source.

        Raises:
            InputError: no keys, or keys that a source lacks.
        """
        if not keys:
            raise InputError("training: got no rows to train on. Loosen the filters or add to the list of URLs.")
        self.sources = sources
        self.window = window
        self._sorted_keys = np.unique(np.array([key.encode() for key in keys]))  # [N]
        places = [_locate(source, self._sorted_keys) for source in sources]  # [N, 3] each
        # A row's number is its place in the layout of the first source.
        layout = np.lexsort(places[0].T[::-1])  # [N]
        self._places = [of_source[layout] for of_source in places]
        self._keys = self._sorted_keys[layout]
        self._number_of_sorted = np.argsort(layout)  # [N]
        is_first = np.any(np.diff(self._places[0][:, :2], axis=0, prepend=-1) != 0, axis=1)
        self._group_starts = np.append(np.flatnonzero(is_first), len(layout))  # row groups + 1
        self._read_group = functools.lru_cache(maxsize=2 * window * len(sources))(self._read_group_uncached)

    def __len__(self) -> int:
        """Rows in one epoch."""
        return len(self._keys)

    def keys(self) -> list[str]:
        """Of all rows, sorted."""
        return [key.decode() for key in self._sorted_keys.tolist()]

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Numbers [N] of the rows of one epoch in order; every row once. They count the rows as they are stored."""
        rng = np.random.default_rng([seed, epoch])
        groups = rng.permutation(len(self._group_starts) - 1)
        order = []
        for first in range(0, len(groups), self.window):
            window = groups[first : first + self.window]
            rows = np.concatenate([np.arange(self._group_starts[one], self._group_starts[one + 1]) for one in window])
            order.append(rows[rng.permutation(len(rows))])
        return np.concatenate(order)

    def read(self, keys: Sequence[str]) -> Batch:
        """The rows with these keys, in this order, with the columns of all sources.

        Raises:
            KeyError: a key that this reader was not made for.
        """
        wanted = np.array([key.encode() for key in keys], "S")
        found = np.minimum(np.searchsorted(self._sorted_keys, wanted), len(self) - 1)
        if not np.array_equal(self._sorted_keys[found], wanted):
            raise KeyError(wanted[self._sorted_keys[found] != wanted][0].decode())
        return self._read(self._number_of_sorted[found])

    def _read(self, numbers: np.ndarray) -> Batch:
        batch: Batch = {"key": [key.decode() for key in self._keys[numbers].tolist()]}
        for index, source in enumerate(self.sources):
            places = self._places[index][numbers].tolist()
            rows = [self._read_group(index, file, group)[row] for file, group, row in places]
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
        """What `prepare` makes of batches without end, from `samples_seen` on; the next ones are made while the caller works.

        Args:
            batch_size: of all ranks together; each rank gets its equal share.
            prepare: called with each batch, in order, in one other thread.
        """
        stream = self._shares(seed, samples_seen, batch_size, rank, world_size)
        with concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            ahead = collections.deque(pool.submit(self._make, next(stream), prepare) for _ in range(_BATCHES_AHEAD))
            try:
                while True:
                    ahead.append(pool.submit(self._make, next(stream), prepare))
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _make(self, numbers: np.ndarray, prepare: Callable[[Batch], Any]) -> Any:
        return prepare(self._read(numbers))

    def _shares(
        self, seed: int, samples_seen: int, batch_size: int, rank: int, world_size: int
    ) -> Iterator[np.ndarray]:
        """Numbers of a rank's rows of each batch."""
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
        table = files.patiently(uri, lambda: open_parquet(uri).read_row_group(group, columns=names))
        columns = {name: _values(table.column(name)) for name in source.columns}
        return [{name: values[row] for name, values in columns.items()} for row in range(table.num_rows)]


def _locate(source: Source, sorted_keys: np.ndarray) -> np.ndarray:
    """File, row group and row of each key: [N, 3] int32.

    Raises:
        InputError: keys that the source lacks.
    """
    places = np.full((len(sorted_keys), 3), -1, np.int32)
    for file, uri in enumerate(source.uris):
        keys, sizes = files.patiently(uri, lambda uri=uri: _keys_of_groups(uri))  # type: ignore[misc]
        found = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
        wanted = np.flatnonzero(sorted_keys[found] == keys)
        group = np.repeat(np.arange(len(sizes)), sizes)[wanted]
        row = wanted - (np.cumsum(sizes) - sizes)[group]
        places[found[wanted]] = np.stack([np.full_like(row, file), group, row], axis=1)
    missing = sorted_keys[places[:, 0] < 0]
    if len(missing):
        raise InputError(
            f"{source.uris[0] if source.uris else 'a source'} ...: lacks {len(missing)} of {len(sorted_keys)} keys, "
            f"such as {missing[0].decode()}. Run the pipeline again so that the tables agree."
        )
    return places


def _keys_of_groups(uri: str) -> tuple[np.ndarray, list[int]]:
    """All keys of a file, and the sizes of its row groups."""
    parquet = open_parquet(uri)
    keys = parquet.read(columns=["key"]).column("key").cast(pa.binary()).to_pylist()
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return np.array(keys, "S"), sizes


def open_parquet(uri: str) -> pq.ParquetFile:
    filesystem, path = files.locate(uri)
    return pq.ParquetFile(filesystem.open_input_file(path))


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Python values, or one numpy row each where the column holds vectors."""
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type) or pa.types.is_large_list(column.type):
        return list(vectors(column))
    return list(column.to_pylist())


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    """A column of equally long float lists as an array [N, E] float32.

    Raises:
        InputError: a null, or lists of different lengths.
    """
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    flat = array.flatten()
    if array.null_count or flat.null_count or (len(array) and len(flat) % len(array)):
        raise InputError(
            "embeddings: got nulls or vectors of different lengths. The table is damaged; remove it and rerun."
        )
    return np.asarray(flat.to_numpy(zero_copy_only=False), np.float32).reshape(len(array), -1)


def decode_image(data: bytes, side: int) -> np.ndarray:
    """A stored JPEG as its central square, resized: uint8 [side, side, 3]."""
    from PIL import Image

    image = Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB")
    if image.size == (side, side):
        return np.asarray(image)
    width, height = image.size
    crop = min(width, height)
    left, top = (width - crop) // 2, (height - crop) // 2
    box = (left, top, left + crop, top + crop)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
