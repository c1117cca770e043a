"""Deterministic reading of training rows from Parquet files.

The order of rows is a pure function of (seed, samples seen): the stream is one shuffled epoch after another, and batch
number n is always the same rows, whatever was interrupted in between and however many ranks share it. Rows of one file are
shuffled within a window of row groups, so that reading stays sequential enough for disks and object stores.
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
        wanted = set(keys)
        self._places: list[dict[str, tuple[int, int, int]]] = []  # per source: key -> (file, row group, row)
        for source in sources:
            places = {key: place for key, place in _locate_rows(source) if key in wanted}
            missing = wanted - places.keys()
            if missing:
                raise InputError(
                    f"{source.uris[0] if source.uris else 'a source'} ...: lacks {len(missing)} of {len(wanted)} keys, "
                    f"such as {min(missing)}. Run the pipeline again so that the tables agree."
                )
            self._places.append(places)
        self._groups: dict[tuple[int, int], list[str]] = {}
        for key, (file, group, _) in sorted(self._places[0].items(), key=lambda item: item[1]):
            self._groups.setdefault((file, group), []).append(key)
        self._read_group = functools.lru_cache(maxsize=2 * window * len(sources))(self._read_group_uncached)

    def __len__(self) -> int:
        """Rows in one epoch."""
        return len(self._places[0])

    def keys(self) -> list[str]:
        """Of all rows, sorted."""
        return sorted(self._places[0])

    def epoch(self, seed: int, epoch: int) -> list[str]:
        """Keys of one epoch in order; every key once."""
        rng = np.random.default_rng([seed, epoch])
        groups = [list(self._groups)[index] for index in rng.permutation(len(self._groups))]
        order: list[str] = []
        for start in range(0, len(groups), self.window):
            keys = [key for group in groups[start : start + self.window] for key in self._groups[group]]
            order += [keys[index] for index in rng.permutation(len(keys))]
        return order

    def read(self, keys: Sequence[str]) -> Batch:
        """The rows with these keys, in this order, with the columns of all sources."""
        batch: Batch = {"key": list(keys)}
        for number, source in enumerate(self.sources):
            rows = [self._read_row(number, key) for key in keys]
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

    def _make(self, keys: list[str], prepare: Callable[[Batch], Any]) -> Any:
        return prepare(self.read(keys))

    def _shares(self, seed: int, samples_seen: int, batch_size: int, rank: int, world_size: int) -> Iterator[list[str]]:
        share = batch_size // world_size
        epoch, position = divmod(samples_seen, len(self))
        pending = self.epoch(seed, epoch)[position:]
        while True:
            while len(pending) < batch_size:
                epoch += 1
                pending += self.epoch(seed, epoch)
            yield pending[rank * share : (rank + 1) * share]
            pending = pending[batch_size:]

    def _read_row(self, number: int, key: str) -> dict[str, Any]:
        file, group, row = self._places[number][key]
        return self._read_group(number, file, group)[row]

    def _read_group_uncached(self, number: int, file: int, group: int) -> list[dict[str, Any]]:
        source = self.sources[number]
        uri, names = source.uris[file], list(source.columns)
        table = files.patiently(uri, lambda: open_parquet(uri).read_row_group(group, columns=names))
        columns = {name: _values(table.column(name)) for name in source.columns}
        return [{name: values[row] for name, values in columns.items()} for row in range(table.num_rows)]


def _locate_rows(source: Source) -> Iterator[tuple[str, tuple[int, int, int]]]:
    for file, uri in enumerate(source.uris):
        for group, keys in enumerate(files.patiently(uri, lambda uri=uri: _keys_of_groups(uri))):  # type: ignore[misc]
            for row, key in enumerate(keys):
                yield key, (file, group, row)


def _keys_of_groups(uri: str) -> list[list[str]]:
    parquet = open_parquet(uri)
    groups = (parquet.read_row_group(group, columns=["key"]) for group in range(parquet.num_row_groups))
    return [group.column("key").to_pylist() for group in groups]


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
