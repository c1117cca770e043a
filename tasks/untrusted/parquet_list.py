"""Read an untrusted Parquet list in a child process with bounded memory and time.

The child first reports what the footer claims, then sends the rows as Arrow record batches of a few megabytes that contain
only plain text. The child imports this module, so it imports little.
"""

import contextlib
import dataclasses
import io
import json
import queue
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.untrusted.sandbox import Limits, Sandbox, SandboxFault

MAX_COLUMNS = 10_000
MAX_TEXT_BYTES = 1 << 16
"""Longest value; the rest is cut off."""
LIMITS = Limits(wall_seconds=60.0, memory_bytes=1 << 30, reply_bytes=1 << 26, open_files=4)
"""Limits for opening a list, and for each batch of its rows."""

_ROWS_AT_ONCE = 1 << 16
_BATCH_BYTES = 1 << 28  # worst case for one batch of values
_REPLY_BYTES = 1 << 24  # text in one reply, excluding its last row
_TEXTS = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
_HEADER, _ROWS, _END, _FAULT = b"H", b"R", b"E", b"F"  # first byte of a reply
_NEXT, _CLOSE = b"next", b"close"


class ListFault(Exception):
    """A list that cannot be read; the message says why."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One column as the footer describes it."""

    name: str
    kind: str
    """Name of its Arrow type."""
    is_text: bool
    is_number: bool
    """True if its values are read as their text; a column of nulls has neither texts nor numbers."""
    is_null: bool
    has_extension: bool
    """True if it, or a column nested in it, has an extension type."""


@dataclasses.dataclass(frozen=True)
class Claims:
    """Unverified claims of a footer about its file."""

    num_columns: int
    columns: tuple[Column, ...]
    """Empty if there are more than `MAX_COLUMNS`."""
    num_rows: int
    num_group_rows: int
    """Sum over the row groups."""
    num_bytes: int
    """Uncompressed size."""


class ParquetList:
    """A Parquet file that a child has opened; created by `opened`."""

    def __init__(self, child: Sandbox, path: str, columns: Sequence[str]) -> None:
        self._child, self._path, self._columns = child, path, list(columns)
        header = json.loads(self._open())
        self.claims = Claims(**header | {"columns": tuple(Column(**column) for column in header["columns"])})

    def _open(self) -> bytes:
        kind, body = self._ask(json.dumps({"path": self._path, "columns": self._columns}).encode())
        if kind != _HEADER:
            raise ListFault("its footer cannot be read")
        return body

    def select(self, columns: Sequence[str]) -> None:
        """Read other columns than those of the constructor."""
        if self._columns != list(columns):
            self._columns = list(columns)
            self._open()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield batches of rows with a column of texts (large_string) per name; null is the empty text.

        Raises:
            ListFault: pages are damaged, or reading exceeds `LIMITS`.
        """
        schema = pa.schema([(str(number), pa.large_string()) for number in range(len(self._columns))])
        while True:
            kind, body = self._ask(_NEXT)
            if kind == _END:
                return
            if kind != _ROWS:
                raise ListFault("the process that reads it sent an invalid reply")
            batch = pa.ipc.read_record_batch(pa.py_buffer(body), schema)
            batch.validate(full=True)
            yield batch

    def _ask(self, request: bytes) -> tuple[bytes, bytes]:
        try:
            reply = self._child.call(request)
        except SandboxFault as fault:
            messages = {
                "crash": "the process that read it crashed",
                "timeout": f"reading it takes more than {LIMITS.wall_seconds:.0f} s at a time",
                "memory": f"reading it takes more than {LIMITS.memory_bytes:,} bytes of memory",
            }
            raise ListFault(messages[fault.kind]) from None
        if reply[:1] == _FAULT:
            raise ListFault(reply[1:].decode("utf-8", "replace"))
        return reply[:1], reply[1:]


_idle: "queue.SimpleQueue[Sandbox]" = queue.SimpleQueue()  # starting a child takes longer than reading most lists


@contextlib.contextmanager
def opened(path: str, columns: Sequence[str]) -> Iterator[ParquetList]:
    """Open a list on the local disk for the duration of a `with` block.

    Args:
        columns: names of the text columns to read; the caller checks in `claims` that the file has them.

    Raises:
        ListFault: the file is not Parquet, or its footer is damaged.
        StageError: the child does not start.
    """
    try:
        child = _idle.get_nowait()
    except queue.Empty:
        child = Sandbox(answer, limits=LIMITS)
    try:
        yield ParquetList(child, path, columns)
    finally:
        with contextlib.suppress(SandboxFault):
            child.call(_CLOSE)
        _idle.put(child)


_rows: Iterator[bytes] = iter(())


def answer(request: bytes) -> bytes:
    """Handle one request in the child: open a file, read on, or close it."""
    global _rows
    try:
        if request == _NEXT:
            return next(_rows, _END)
        _rows = iter(())
        if request == _CLOSE:
            return _END
        job = json.loads(request)
        _rows = _replies(job["path"], job["columns"])
        return next(_rows)
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, LookupError) as error:
        _rows = iter(())
        return _FAULT + (str(error).strip()[:2000] or type(error).__name__).encode("utf-8", "replace")


def warm_up() -> None:
    """Import and build everything that the first list needs."""
    pa.set_memory_pool(pa.system_memory_pool())  # other pools reserve address space, which is limited here
    buffer = io.BytesIO()
    pq.write_table(pa.table({"url": ["a"]}), buffer)
    parquet = pq.ParquetFile(pa.BufferReader(buffer.getvalue()))
    for batch in _batches(pa.BufferReader(buffer.getvalue()), parquet.metadata, ["url"]):
        list(_pieces(batch, ["url"]))


def _replies(path: str, names: Sequence[str]) -> Iterator[bytes]:
    """Yield the header, then the rows; a caller that rejects the header requests no rows."""
    with pa.OSFile(path) as file:
        parquet = pq.ParquetFile(file)
        schema, metadata = parquet.schema_arrow, parquet.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        # Column chunks are not read: pyarrow 25 aborts the process on damaged chunk statistics.
        claims = Claims(
            len(schema),
            tuple(map(_column, schema)) if len(schema) <= MAX_COLUMNS else (),
            metadata.num_rows,
            sum(group.num_rows for group in groups),
            sum(max(0, group.total_byte_size) for group in groups),
        )
        yield _HEADER + json.dumps(dataclasses.asdict(claims)).encode()
        for batch in _batches(file, metadata, names):
            for piece in _pieces(batch, names):
                yield _ROWS + piece.serialize().to_pybytes()


def _column(field: pa.Field) -> Column:
    kind = field.type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    inner, has_extension = [field], False
    while inner:
        one = inner.pop()
        has_extension |= isinstance(one.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (one.metadata or {})
        inner += [one.type.field(index) for index in range(one.type.num_fields)]
    return Column(
        field.name, str(kind)[:1000], value in _TEXTS, _is_number(value), pa.types.is_null(value), has_extension
    )


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _batches(file: pa.NativeFile, metadata: pq.FileMetaData, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield small batches of rows, as dictionaries if the encoding allows it, so that a repeated long value is held once."""
    schema = pq.ParquetFile(file, metadata=metadata).schema_arrow
    texts = [name for name in names if _column(schema.field(name)).is_text]
    shared, plain = (
        pq.ParquetFile(
            file,
            metadata=metadata,
            read_dictionary=dictionaries,
            pre_buffer=False,  # pre-buffering would hold all row groups
            buffer_size=1 << 20,
            page_checksum_verification=True,
        )
        for dictionaries in (texts, None)
    )
    for group in range(metadata.num_row_groups):
        part: dict[str, Any] = {"row_groups": [group], "columns": names, "use_threads": False}
        done = 0
        try:
            for batch in shared.iter_batches(_ROWS_AT_ONCE, **part):
                yield batch
                done += batch.num_rows
        except (OSError, pa.ArrowNotImplementedError) as error:
            if "DictAccumulator" not in str(error):  # Arrow's error if an encoding cannot be read as a dictionary
                raise
            # Few enough rows to fit in memory even if each were as large as the whole group.
            most = max(1, min(_ROWS_AT_ONCE, _BATCH_BYTES // max(1, metadata.row_group(group).total_byte_size)))
            for batch in plain.iter_batches(most, **part):
                yield batch.slice(min(done, batch.num_rows))
                done -= min(done, batch.num_rows)


def _pieces(batch: pa.RecordBatch, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Split a batch into pieces of `_REPLY_BYTES` of text, with values cut and in UTF-8."""
    columns = [_cut(_as_texts(batch.column(name))) for name in names]
    lengths = sum(
        (
            pc.fill_null(pc.binary_length(values).take(indices), 0).to_numpy(False).astype(np.int64)
            for values, indices in columns
        ),
        np.zeros(batch.num_rows, np.int64),
    )
    ends = np.flatnonzero(np.diff(np.cumsum(lengths) // _REPLY_BYTES)) + 1
    start = 0
    for end in [*ends.tolist(), batch.num_rows]:
        texts = [_decode(values.take(indices.slice(start, end - start))) for values, indices in columns]
        if end > start:
            yield pa.RecordBatch.from_arrays(texts, [str(number) for number in range(len(texts))])
        start = end


def _as_texts(column: pa.Array) -> pa.Array:
    """Numbers as their texts, with NaN as null; texts as they are."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_null(kind) or _is_number(kind)):
        return column
    values = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if pa.types.is_floating(kind):
        values = values.cast(pa.float32()) if pa.types.is_float16(kind) else values
        values = pc.if_else(pc.is_finite(values), values, pa.scalar(None, values.type))
    return values.cast(pa.large_string())


def _cut(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return the values of a column, cut to length, and the index of each row's value."""
    if pa.types.is_dictionary(column.type):
        distinct = column.indices.unique()  # the dictionary may belong to a whole row group
        values, indices = column.dictionary.take(distinct), pc.index_in(column.indices, distinct)
    else:
        values, indices = column, pa.array(np.arange(len(column)))
    values = values.cast(pa.large_binary())
    if (pc.max(pc.binary_length(values)).as_py() or 0) > MAX_TEXT_BYTES:
        values = pc.binary_slice(values, 0, MAX_TEXT_BYTES)
    return values, indices


def _decode(values: pa.Array) -> pa.Array:
    values = pc.fill_null(values, b"")
    try:
        return values.cast(pa.large_string())
    except pa.ArrowInvalid:  # invalid UTF-8 becomes U+FFFD
        return pa.array([value.decode("utf-8", "replace") for value in values.to_pylist()], pa.large_string())
