"""Deterministic reader of training rows in Parquet files.

The order of rows is a pure function of (seed, samples seen): the stream is one shuffled epoch after another, and batch n
always has the same rows, regardless of interruptions and of the number of ranks. Rows are shuffled within a window of row
groups, so that reads stay sequential enough for disks and object stores. The rows of a batch are divided among ranks in
storage order, so that each rank reads few of the window's row groups.

Which rows there are, and where, stands in `Places`: memory-mapped arrays that the processes of a machine share. A process
keeps a few bytes for each row group, and none for a row.

Letters: N rows.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unclip import files, seals
from unclip.background import compute_alone
from unclip.downscaling import shrink_square
from unclip.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    import pyarrow.fs as pafs

ROW_GROUP_ROWS = 1000
"""Rows in a row group of the tables; the unit that is read, and shuffled together with others."""
_BATCHES_AHEAD = 2
_READING_THREADS = 4
_FILES_REMEMBERED = 1024
_CHECKED_SECONDS = 600.0
"""Time for which the check of a file of places counts for all processes of the machine."""
_ROWS_COMPARED = 1000
"""Rows whose keys tell if two places are those of the same rows."""
_KEPT_SECONDS = 24 * 3600.0
"""Time after which a copy of a file of places is deleted if no process has opened it again."""

T = TypeVar("T")
Batch = dict[str, list[Any]]
"""Column name -> one value per row; images are encoded."""
_Group = concurrent.futures.Future[dict[str, list[Any]]]
_Found = dict[str, np.ndarray]
"""Number, key and places of some rows."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Parquet files of one table, with some of its columns."""

    uris: tuple[str, ...]
    columns: tuple[str, ...]
    table: str = "images"
    """Table whose places tell the file, as an index into `uris`, and the row in it."""


class Places:
    """Places of N rows in the files of one or more tables, in the order of the first table.

    A table `t` has the columns `t_file` and `t_row`, both int32; `key` has the rows' keys, as text or as their 16 bytes.
    """

    def __init__(self, parts: Sequence[pa.Table]) -> None:
        """Args:
        parts: tables with these columns; only the pages that are used are read if they are memory-mapped.
        """
        self._parts = [part.combine_chunks() for part in parts if part.num_rows]
        self._starts = np.cumsum([0, *(part.num_rows for part in self._parts)])
        # Views of the columns, since finding a column of a table takes longer than reading a few of its values.
        self._arrays = [{name: _array(part[name].chunk(0)) for name in part.column_names} for part in self._parts]

    @classmethod
    def open(cls, uris: Sequence[str]) -> "Places":
        """Memory-map Arrow files; files in an object store are copied to this machine first.

        The processes of a machine copy and check a file once for all that open it within minutes, such as the ranks of a
        training.

        Raises:
            DamagedError: a file does not match its seal.
        """
        folder = Path(tempfile.gettempdir()) / f"unclip-places-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        paths = [_checked(uri, folder) for uri in uris]
        tables = [pa.ipc.open_file(pa.memory_map(path)).read_all() for path in paths]
        _sweep(folder)
        return cls(tables)

    @classmethod
    def find(cls, sources: Sequence[Source], keys: Sequence[str]) -> "Places":
        """Find rows by their keys in the `key` columns of the files, for tables without stored places; holds all keys.

        Raises:
            InputError: a source lacks some of the keys.
        """
        wanted = np.unique(np.array([key.encode() for key in keys], "S"))
        found = [_locate(source, wanted) for source in sources]  # [N, 2] each
        order = np.lexsort(found[0].T[::-1]) if found else np.arange(0)
        columns: dict[str, Any] = {"key": [key.decode() for key in wanted[order].tolist()]}
        for source, positions in zip(sources, found, strict=True):
            columns[f"{source.table}_file"] = pa.array(positions[order, 0], pa.int32())
            columns[f"{source.table}_row"] = pa.array(positions[order, 1], pa.int32())
        return cls([pa.table(columns)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, numbers: np.ndarray, *names: str) -> list[np.ndarray]:
        """Read columns of some rows: each [numbers]; keys are 16 bytes or text."""
        by_part = list(self._by_part(numbers))
        columns = []
        for name in names:
            values = np.empty(len(numbers), object if name == "key" else np.int32)
            for part, inside, rows in by_part:
                values[inside] = self._arrays[part][name][rows]
            columns.append(values)
        return columns

    def column(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Values of a numeric column for some rows: [numbers] int32."""
        return self.read(numbers, name)[0]

    def keys(self, numbers: np.ndarray) -> list[str]:
        """Keys of some rows."""
        return _texts(self.read(numbers, "key")[0])

    def spread(self, count: int) -> np.ndarray:
        """Numbers of at most `count` rows, evenly spaced in storage order: always the same sample of the rows."""
        return np.unique(np.linspace(0, max(0, len(self) - 1), min(count, len(self))).astype(np.int64))

    def take(self, numbers: np.ndarray) -> "Places":
        """Places of some rows, in memory.

        Args:
            numbers: ascending.
        """
        return Places([self._parts[part].take(pa.array(rows)) for part, _, rows in self._by_part(numbers)])

    def find_rows(self, table: str, file: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Numbers of rows by their places in the table in whose order the places are: [N] int64.

        Raises:
            InputError: a row is not here.
        """
        numbers = np.full(len(file), -1, np.int64)
        for arrays, offset in zip(self._arrays, self._starts, strict=False):
            files_of_part, rows_of_part = arrays[f"{table}_file"], arrays[f"{table}_row"]
            for index in range(len(file)):
                first, last = (np.searchsorted(files_of_part, file[index], side) for side in ("left", "right"))
                position = first + np.searchsorted(rows_of_part[first:last], row[index])
                if position < last and rows_of_part[position] == row[index]:
                    numbers[index] = offset + position
        if (numbers < 0).any():
            missing = int(np.flatnonzero(numbers < 0)[0])
            raise InputError(
                f"places: row {row[missing]} of file {file[missing]} of {table} is not among {len(self)} rows."
            )
        return numbers

    def beside(self, others: Sequence["Places"]) -> "Places":
        """The same rows with their places in further tables, which list the rows in the same order and in equal parts.

        Raises:
            InputError: others are the places of other rows.
        """
        parts = list(self._parts)
        for other in others:
            sizes = [[part.num_rows for part in places._parts] for places in (self, other)]
            some = self.spread(_ROWS_COMPARED)
            if sizes[0] != sizes[1] or self.keys(some) != other.keys(some):
                raise InputError(
                    f"places: got those of {len(other)} other rows beside those of {len(self)} rows, expected the same rows. "
                    f"Run the pipeline again so that the tables agree."
                )
            for number, extra in enumerate(other._parts):
                for name in extra.column_names:
                    if name not in parts[number].column_names:
                        parts[number] = parts[number].append_column(name, extra[name])
        return Places(parts)

    def group_starts(self, table: str, group_rows: int) -> np.ndarray:
        """Numbers of the first row of each group of `group_rows` rows of a table's files, and N: [groups + 1]."""
        starts = [np.empty(0, np.int64)]
        last = None
        for part, offset in zip(self._parts, self._starts, strict=False):
            file = part[f"{table}_file"].chunk(0).to_numpy()
            group = part[f"{table}_row"].chunk(0).to_numpy() // group_rows
            changes = np.flatnonzero((np.diff(file) != 0) | (np.diff(group) != 0)) + 1
            if last != (file[0], group[0]):
                changes = np.insert(changes, 0, 0)
            last = file[-1], group[-1]
            starts.append(offset + changes)
        return np.append(np.concatenate(starts), len(self))

    def _by_part(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield each part that holds some of the rows, the indices of these rows, and their positions in the part."""
        parts = np.searchsorted(self._starts, numbers, side="right") - 1
        for part in np.unique(parts).tolist():
            inside = np.flatnonzero(parts == part)
            yield part, inside, numbers[inside] - self._starts[part]


class RowReader:
    """Reader of rows by place, joined over one or more sources."""

    def __init__(
        self, sources: Sequence[Source], places: Places, window: int = 16, group_rows: int = ROW_GROUP_ROWS
    ) -> None:
        """Args:
            sources: files with the columns.
            places: rows to read; shuffling follows their order.
            window: number of row groups to shuffle together, and to keep in memory for each source.
            group_rows: rows in a row group of the files; others are read as well, but less efficiently.

        Raises:
            InputError: there are no rows.
        """
        if not len(places):
            raise InputError("training: got no rows to train on. Loosen the filters or add to the list of URLs.")
        self.sources, self.places, self.window, self.group_rows = sources, places, window, group_rows
        # Tables lie in step, so the groups of the first source are about those of the others.
        self._group_starts = places.group_starts(sources[0].table, group_rows)
        self._groups: dict[tuple[int, int, int], _Group] = {}  # the ones used last, in order of their use
        self._checked: dict[
            tuple[int, int], int
        ] = {}  # source and file -> a bit for each group whose pages were checked
        self._lock = threading.Lock()

    @classmethod
    def of_keys(cls, sources: Sequence[Source], keys: Sequence[str], **options: int) -> "RowReader":
        """Reader of the rows with these keys, for tables without stored places; see `Places.find`."""
        return cls(sources, Places.find(sources, keys), **options)

    def __len__(self) -> int:
        """Number of rows in one epoch."""
        return len(self.places)

    def windows(self, seed: int, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the row numbers of one epoch from position `start` on, window by window; every row of the epoch once."""
        groups = np.random.default_rng([seed, epoch]).permutation(len(self._group_starts) - 1)
        sizes = np.diff(self._group_starts)[groups]
        done = 0
        for number, first in enumerate(range(0, len(groups), self.window)):
            size = int(sizes[first : first + self.window].sum())
            done += size
            if done <= start:
                continue
            window = groups[first : first + self.window]
            rows = np.concatenate(
                [np.arange(self._group_starts[group], self._group_starts[group + 1]) for group in window]
            )
            order = rows[np.random.default_rng([seed, epoch, number]).permutation(size)]
            yield order[max(0, start - (done - size)) :]

    def read(self, numbers: np.ndarray) -> Batch:
        """Read the rows with these numbers, in this order, with the columns of all sources."""
        return self._read(self._find(numbers))

    def _find(self, numbers: np.ndarray) -> _Found:
        names = ["key", *(f"{source.table}_{name}" for source in self.sources for name in ("file", "row"))]
        return {"number": numbers, **dict(zip(names, self.places.read(numbers, *names), strict=True))}

    def _read(self, found: _Found) -> Batch:
        batch: Batch = {"key": _texts(found["key"])}
        reads = [self._start_reading(index, found) for index in range(len(self.sources))]  # of all sources side by side
        for source, (futures, group, row_in_group) in zip(self.sources, reads, strict=True):
            groups = [future.result() for future in futures]
            for name in source.columns:
                columns = [values[name] for values in groups]
                batch[name] = [columns[index][row] for index, row in zip(group, row_in_group, strict=True)]
        return batch

    def _start_reading(self, source: int, found: _Found) -> tuple[list[_Group], list[int], list[int]]:
        """Start to read the groups of a source that hold some rows; also returns each row's group and place in the group."""
        file, row = (found[f"{self.sources[source].table}_{name}"] for name in ("file", "row"))
        codes, index = np.unique(file.astype(np.int64) << 32 | row // self.group_rows, return_inverse=True)
        groups = [self._group(source, code >> 32, code & 0xFFFFFFFF) for code in codes.tolist()]
        return groups, index.tolist(), (row % self.group_rows).tolist()

    def _group(self, number: int, file: int, group_number: int) -> _Group:
        """A group of a source from memory, or one that is being read."""
        place = (number, file, group_number)
        with self._lock:
            group = self._groups.pop(place, None)
            if group is None or (group.done() and group.exception()):
                group = _reading_threads().submit(self._read_group, *place)
            self._groups[place] = group
            while len(self._groups) > 2 * self.window * len(self.sources):
                del self._groups[next(iter(self._groups))]
        return group

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
        with concurrent.futures.ThreadPoolExecutor(1, "batches", compute_alone) as pool:
            ahead = collections.deque(pool.submit(self._load, next(stream), prepare) for _ in range(_BATCHES_AHEAD))
            try:
                while True:
                    ahead.append(pool.submit(self._load, next(stream), prepare))
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _load(self, found: _Found, prepare: Callable[[Batch], Any]) -> Any:
        return prepare(self._read(found))

    def _shares(self, seed: int, samples_seen: int, batch_size: int, rank: int, world_size: int) -> Iterator[_Found]:
        """Yield this rank's rows, batch by batch."""
        share = batch_size // world_size
        stream = self._stream(seed, samples_seen)
        pending = next(stream)
        while True:
            while len(pending["number"]) < batch_size:
                more = next(stream)
                pending = {name: np.concatenate([values, more[name]]) for name, values in pending.items()}
            mine = np.argsort(pending["number"][:batch_size])[rank * share : (rank + 1) * share]
            yield {name: values[mine] for name, values in pending.items()}
            pending = {name: values[batch_size:] for name, values in pending.items()}

    def _stream(self, seed: int, samples_seen: int) -> Iterator[_Found]:
        """Yield shuffled rows without end. Places are found for a whole window, which costs less a row than for a batch."""
        epoch, position = divmod(samples_seen, len(self))
        while True:
            yield from map(self._find, self.windows(seed, epoch, position))
            epoch, position = epoch + 1, 0

    def _read_group(self, number: int, file: int, group: int) -> dict[str, list[Any]]:
        """Values of each column of a source in one group of rows of a file."""
        source = self.sources[number]
        uri, names = source.uris[file], list(source.columns)

        def read(parquet: pq.ParquetFile) -> pa.Table:
            first, last, offset = _groups_with(parquet.metadata, group * self.group_rows, self.group_rows)
            # Groups are read in threads already.
            table = parquet.read_row_groups(list(range(first, last)), columns=names, use_threads=False)
            return table.slice(offset, self.group_rows)

        # Checking takes longer than reading, so each process checks what it reads once.
        is_checked = self._checked.get((number, file), 0) >> group & 1
        table = read_parquet(uri, read, metadata=_metadata(uri), checks_pages=not is_checked)
        with self._lock:
            self._checked[number, file] = self._checked.get((number, file), 0) | 1 << group
        return {name: _values(table.column(name)) for name in source.columns}


@functools.cache
def _reading_threads() -> concurrent.futures.ThreadPoolExecutor:
    """Threads that read row groups side by side, since object stores answer late."""
    return concurrent.futures.ThreadPoolExecutor(max_workers=_READING_THREADS, thread_name_prefix="read")


@functools.lru_cache(maxsize=_FILES_REMEMBERED)
def _metadata(uri: str) -> pq.FileMetaData:
    """Footer of a file; files of tables are never written in place."""
    metadata: pq.FileMetaData = read_parquet(uri, lambda parquet: parquet.metadata)
    return metadata


def _groups_with(metadata: pq.FileMetaData, start: int, count: int) -> tuple[int, int, int]:
    """First and last row group, exclusive, with `count` rows from `start` on, and the offset of `start` in the first."""
    ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, start + count, side="left")) + 1
    return first, min(last, len(ends)), start - (int(ends[first - 1]) if first else 0)


def _checked(uri: str, folder: Path) -> str:
    """Path of a file whose bytes match its seal; that of a copy for a file in an object store.

    Copies, notes of checks and locks are named after the URI, size and time of writing of the file.

    Raises:
        DamagedError: the file does not match its seal.
    """
    name = hashlib.sha256(f"{uri} {files.stamp(uri)}".encode()).hexdigest()
    with _locked(folder / f"{name}.lock") as lock:
        lock.touch()
        if "://" in uri:
            return _checked_copy(uri, folder / name)
        note = folder / f"{name}.checked"
        if not _is_recent(note):
            with pa.OSFile(uri) as file:  # pages of a memory map would count as this process's memory
                seals.require_sound(file, uri)
            note.touch()
    return uri


def _checked_copy(uri: str, copy: Path) -> str:
    """Path of a copy, whose time of writing is that of its last check."""
    if copy.exists() and not _is_recent(copy):
        with pa.OSFile(str(copy)) as file:
            if seals.check(file) == "damaged":  # the disk of this machine; the original may be sound
                copy.unlink(missing_ok=True)
            else:
                copy.touch()
    if not copy.exists():
        data = files.read(uri)
        seals.require_sound(pa.BufferReader(data), uri)
        files.write(str(copy), data)
    return str(copy)


def _sweep(folder: Path) -> None:
    """Delete copies, notes and locks of files that no process has opened for long; what maps a copy keeps it."""
    for old in folder.iterdir():
        if not _is_recent(old, _KEPT_SECONDS):
            with _locked(folder / f"{old.name.partition('.')[0]}.lock"):
                if not _is_recent(old, _KEPT_SECONDS):
                    old.unlink(missing_ok=True)


def _is_recent(path: Path, seconds: float = _CHECKED_SECONDS) -> bool:
    """Return True if a file was written, or touched, in the last seconds."""
    try:
        return abs(time.time() - path.stat().st_mtime) < seconds
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[Path]:
    """Let one process of this machine after the other into a `with` block; each file has a lock of its own."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: each process then does all
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(descriptor)


def _locate(source: Source, sorted_keys: np.ndarray) -> np.ndarray:
    """Find the file and row of each key: [N, 2] int32.

    Raises:
        InputError: the source lacks some of the keys.
    """
    positions = np.full((len(sorted_keys), 2), -1, np.int32)
    for file, uri in enumerate(source.uris) if len(sorted_keys) else ():
        keys = read_parquet(uri, _keys_of)
        found = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
        wanted = np.flatnonzero(sorted_keys[found] == keys)
        positions[found[wanted]] = np.stack([np.full_like(wanted, file), wanted], axis=1)
    missing = sorted_keys[positions[:, 0] < 0]
    if len(missing):
        raise InputError(
            f"{source.uris[0] if source.uris else 'a source'} ...: lacks {len(missing)} of {len(sorted_keys)} keys, "
            f"such as {missing[0].decode()}. Run the pipeline again so that the tables agree."
        )
    return positions


def _keys_of(parquet: pq.ParquetFile) -> np.ndarray:
    return np.array(parquet.read(columns=["key"]).column("key").cast(pa.binary()).to_pylist(), "S")


def read_parquet(
    uri: str,
    read: Callable[[pq.ParquetFile], T],
    metadata: pq.FileMetaData | None = None,
    checks_pages: bool = True,
) -> T:
    """Read something from a Parquet file of a storage; checks its footer, and the pages that `read` reads.

    Args:
        read: may be called again if an object store fails.
        metadata: footer of the file, if it has been read and checked before.

    Raises:
        DamagedError: the footer or a page is not what was written.
        OSError: the file cannot be opened or read.
    """
    filesystem, path = files.locate(uri)

    is_open = False

    def action() -> T:
        nonlocal is_open
        is_open = False
        with filesystem.open_input_file(path) as file:
            is_open = True
            footer = metadata or pq.read_metadata(pa.BufferReader(seals.read_footer(file, uri)))
            return read(pq.ParquetFile(file, metadata=footer, page_checksum_verification=checks_pages))

    try:
        return files.with_retries(uri, action)
    except (OSError, pa.ArrowInvalid) as error:
        # Decoding and object stores raise the same types of errors; only a file system numbers them.
        if getattr(error, "errno", None) is not None or not is_open or not _is_damaged(filesystem, path):
            raise
        raise seals.damaged(uri, f"cannot be read: {str(error).splitlines()[0]}") from error


def _is_damaged(filesystem: "pafs.FileSystem", path: str) -> bool:
    """Check all bytes of a file that could not be decoded; one that cannot be read is not damaged, nor one that its seal fits."""
    try:
        with filesystem.open_input_file(path) as file:
            return seals.check(file) != "sound"
    except OSError:
        return False


def _array(column: pa.Array) -> np.ndarray:
    """View a column without nulls as an array; text becomes an array of objects."""
    if pa.types.is_fixed_size_binary(column.type):
        values = np.frombuffer(column.buffers()[1], f"V{column.type.byte_width}")
        return values[column.offset : column.offset + len(column)]
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _texts(keys: np.ndarray) -> list[str]:
    return [key if isinstance(key, str) else bytes(key).hex() for key in keys]


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


def half_bytes(values: np.ndarray) -> bytes:
    """Store numbers of any shape in half precision, little-endian, in C order; `training.batches.stack_halves` reads them.

    Tables cannot hold half precision as numbers.

    Raises:
        NonFiniteError: a number is not finite, or too large for half precision.
    """
    with np.errstate(over="ignore"):
        halves = np.ascontiguousarray(values, np.float32).astype("<f2")
    if not np.isfinite(halves).all():
        largest = float(np.abs(values[np.isfinite(values)]).max(initial=0))
        raise NonFiniteError(
            f"half precision: got numbers that are not finite or up to {largest:g}, expected at most 65,504. Train the model "
            "that made them again with a lower learning rate."
        )
    return halves.tobytes()


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode a stored JPEG, crop its central square and resize it (`unclip.downscaling`): uint8 [size, size, 3]."""
    from PIL import Image

    image = Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB")
    return np.asarray(image if image.size == (size, size) else shrink_square(image, size))
