"""Delta Lake tables made of Parquet parts: many writers, one committer, reads without Delta's own reader.

A part is written into the table's folder under a name that its writer derives from the work. It stays invisible until a
commit names it. So a restarted job finds its finished parts, and committing many parts is one atomic step.
"""

import bisect
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from unclip import files as storage
from unclip import seals
from unclip.data import ROW_GROUP_ROWS, read_parquet
from unclip.errors import AlreadyRunningError

ADDED_COLUMNS = {
    "colour": pa.string(), "final_url": pa.string(), "redirect_hosts": pa.string(), "tokens_lost": pa.int32(),
}  # fmt: skip
"""Columns that tables have gained: files from before are read as if these columns held nulls."""
_READS_AT_ONCE = 16
_MAX_CONFLICTS = 10
_OWNER = "unclip.owner"
_PARTS = "unclip.parts"
_KEEP_LOGS = PostCommitHookProperties(cleanup_expired_logs=False)  # by default Delta deletes those of 30 days ago
T = TypeVar("T")
_token: contextvars.ContextVar[int | None] = contextvars.ContextVar("token", default=None)


@dataclasses.dataclass(frozen=True)
class Part:
    """A Parquet file in a table's folder, committed or not."""

    name: str
    """File name, with its extension."""
    rows: int
    size_bytes: int
    sha256: str


def version(table_uri: str) -> int | None:
    """Newest version; None if there is no table yet."""
    return _table(table_uri).version() if _exists(table_uri) else None


def identity(table_uri: str) -> str | None:
    """Name of a table that it keeps wherever it is moved; one made anew in its place has another. None if there is no table."""
    return str(_table(table_uri).metadata().id) if _exists(table_uri) else None


def files(table_uri: str, version: int | None = None) -> list[str]:
    """Parquet files of one version (None: the newest), sorted."""
    # The URIs are percent-encoded, and those of a `file:` table are no paths; names of parts are plain.
    return sorted(f"{table_uri}/{uri.rpartition('/')[2]}" for uri in _table(table_uri, version).file_uris())


def columns(table_uri: str) -> list[str]:
    """Column names of the newest version."""
    return [field.name for field in _table(table_uri).schema().fields]


def extent(table_uri: str, version: int | None = None) -> tuple[int, int]:
    """Rows and bytes of one version (None: the newest), from the log alone; zeros if there is no table."""
    if not _exists(table_uri):
        return 0, 0
    added = pa.table(_table(table_uri, version).get_add_actions(flatten=True))
    return int(pc.sum(added["num_records"]).as_py() or 0), int(pc.sum(added["size_bytes"]).as_py() or 0)


def read(table_uri: str, version: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of one version (None: the newest), sorted by `key`.

    Args:
        columns: columns to read, including `key`; None is all. Omit `jpg` unless it is needed.
    """
    # DeltaTable.to_pyarrow_* can abort the interpreter at exit (deltalake 1.6.6); plain Parquet does not.
    parts = [read_file(uri, columns) for uri in files(table_uri, version)]
    return pa.concat_tables(parts or [_empty(table_uri, columns)], promote_options="default").sort_by("key")


def find_part(table_uri: str, name: str) -> Part | None:
    """Part of this name from an earlier attempt, committed or not; None if there is none, or a damaged one, which is deleted."""
    file = f"{name}.parquet"
    uri = f"{table_uri}/{file}"
    if not storage.exists(uri):
        return None
    data = storage.read(uri)
    if seals.check(pa.BufferReader(data)) == "damaged":
        storage.delete(uri)
        return None
    return _describe(file, data)


def write_part(table_uri: str, name: str, table: pa.Table, group_starts: Sequence[int] = ()) -> Part:
    """Write rows as the Parquet file `name` (no extension) into the table's folder, or return the existing part.

    Args:
        group_starts: see `parquet_bytes`.
    """
    part = find_part(table_uri, name)
    if part is None:
        data, digest = _sealed_parquet(table, group_starts)
        if storage.write(f"{table_uri}/{name}.parquet", data, replace=False):
            return Part(f"{name}.parquet", table.num_rows, len(data), digest)
        part = find_part(table_uri, name)  # an abandoned attempt finished after all
        assert part is not None, f"{table_uri}/{name}.parquet appeared and disappeared"
    return part


def append_files(
    table_uri: str,
    parts: Sequence[Part],
    schema: pa.Schema,
    note: Mapping[str, str] | None = None,
    removed: Sequence[str] = (),
) -> int:
    """Commit parts in the table's folder atomically; create the table if there is none, or add columns that it lacks.

    Args:
        parts: parts to commit; those already committed are skipped, so committing again changes nothing.
        note: metadata of the commit, to trace where rows came from.
        removed: names of files that are removed in the same commit, unless they are among the parts; older versions keep them.

    Returns:
        Version of the table that has all the parts.
    """
    return _commit(lambda: _append(table_uri, parts, schema, note or {}, removed))


def _append(
    table_uri: str, parts: Sequence[Part], schema: pa.Schema, note: Mapping[str, str], removed: Sequence[str]
) -> int:
    delta_schema = Schema.from_arrow(schema)
    storage.failpoint("before", f"{table_uri}/_delta_log")
    if not _exists(table_uri):
        create(table_uri, delta_schema)
        storage.failpoint("within", f"{table_uri}/_delta_log")
    table = _table(table_uri)
    known = {uri.rpartition("/")[2] for uri in table.file_uris()}
    new = [part for part in parts if part.name not in known]
    now = int(time.time() * 1000)
    adds = [_add(part, now) for part in new]
    changes: list[AddAction | RemoveAction] = [*adds]
    gone = known.intersection(removed) - {part.name for part in parts}  # a part may equal a file that is there
    changes += [RemoveAction(name, True, now) for name in sorted(gone)]
    hashes = {part.name: part.sha256 for part in new}
    properties = _properties(table, {**note, _PARTS: json.dumps(hashes)})
    if changes or (table.version() == 0 and not known):  # the note of a new table counts even if it has no rows
        known_fields = {field.name for field in table.schema().fields}
        if added := [field for field in delta_schema.fields if field.name not in known_fields]:
            # A commit of its own: one that appends does not change the schema.
            table.alter.add_columns(
                added, commit_properties=_properties(table, note), post_commithook_properties=_KEEP_LOGS
            )
            table = _table(table_uri)
        _write(table, changes, properties, delta_schema)
    storage.failpoint("after", f"{table_uri}/_delta_log")
    cover_log(table_uri)
    return _table(table_uri).version()


@contextlib.contextmanager
def owned_by(token: int) -> Iterator[None]:
    """Let the commits of a `with` block carry the token of their owner, see `tasks.lock`; without one, nothing is checked."""
    before = _token.set(token)
    try:
        yield
    finally:
        _token.reset(before)


def token_of(table: DeltaTable) -> int:
    """Token of the last owner of a table; 0 if it never had one."""
    return table.transaction_version(_OWNER) or 0


def fence(table_uri: str) -> None:
    """Mark a table as owned, by a commit that changes no row: from now on commits of earlier owners fail."""

    def commit() -> None:
        table = _table(table_uri)
        last = note_of(table_uri, table.version())
        note = {name: text for name, text in last.items() if name.startswith("unclip.") and name != _PARTS}
        _write(table, [], _properties(table, note))

    _commit(commit)
    cover_log(table_uri)


def open_table(table_uri: str) -> DeltaTable | None:
    """Newest version of a table; None if there is none."""
    try:
        return _table(table_uri)
    except TableNotFoundError:
        return None


def create(table_uri: str, schema: Schema) -> None:
    """Create an empty table unless there is one.

    Delta does not refuse the creation of a table that another process has just created: it becomes a later version. So a
    creation holds nothing, and no token: what counts is committed to a table that is there.
    """
    try:
        create_table_with_add_actions(storage.to_uri(table_uri), schema, [], storage_options=_options(table_uri))
    except (DeltaError, OSError):  # another process was first, or a store's answer was lost
        if not _exists(table_uri):
            raise


def commit_note(table: DeltaTable, properties: CommitProperties) -> None:
    """Commit properties alone to a table whose old versions nobody reads: Delta deletes their logs after 30 days."""
    table.create_write_transaction(
        [], mode="append", schema=table.schema(), commit_properties=properties, post_commithook_properties=None
    )


def _write(
    table: DeltaTable,
    actions: list[AddAction | RemoveAction],
    properties: CommitProperties,
    schema: Schema | None = None,
) -> None:
    table.create_write_transaction(
        actions,
        mode="append",
        schema=schema or table.schema(),
        commit_properties=properties,
        post_commithook_properties=_KEEP_LOGS,
    )


def _commit(action: Callable[[], T]) -> T:
    """Run an action that loads a table and commits to it; again if another commit came between, which is then seen."""
    for _ in range(_MAX_CONFLICTS):
        try:
            return action()
        except CommitFailedError:
            if _token.get() is None:
                raise
    return action()


def _properties(table: DeltaTable, metadata: Mapping[str, str]) -> CommitProperties:
    """Properties of a commit to a table, with the token of its owner.

    Delta refuses two commits of one application that do not know each other. So an owner that has not seen a commit of the
    next one fails, and an owner that has seen it is refused here.

    Raises:
        AlreadyRunningError: a later owner has committed to the table.
    """
    token = _token.get()
    if token is None:
        return CommitProperties(custom_metadata=dict(metadata))
    last = token_of(table)
    if last > token:
        raise AlreadyRunningError(
            f"{table.table_uri}: another run has taken over this storage (its token is {last}, that of this process {token}). "
            f"Nothing was committed. Run the same command again when the other run has ended."
        )
    return CommitProperties(custom_metadata=dict(metadata), app_transactions=[Transaction(_OWNER, token)])


def delete_rows(table_uri: str, keys: pa.Array, names: Sequence[str] | None = None) -> int:
    """Remove rows permanently: rewrite their files without them and delete the old files.

    Older versions that held such rows can no longer be read. Uncommitted parts are deleted as well. To resume after an
    interruption, call it again.

    Args:
        names: file names of the table that may hold such rows; None looks into all files.

    Returns:
        Number of removed rows.
    """

    def commit() -> int:
        table = _table(table_uri)
        actions, parts = _without(table_uri, keys, int(time.time() * 1000), names)
        properties = _properties(table, {_PARTS: json.dumps({part.name: part.sha256 for part in parts})})
        if actions:
            storage.failpoint("before", f"{table_uri}/_delta_log")
            _write(table, actions, properties)
            storage.failpoint("after", f"{table_uri}/_delta_log")
            cover_log(table_uri)
        return table.count() - _table(table_uri).count()

    deleted = _commit(commit)
    purge(table_uri, keys)
    return deleted


def remove_files(table_uri: str, names: Sequence[str]) -> int:
    """Remove files with all their rows from the newest version; the files themselves stay. Returns the version."""

    def commit() -> int:
        table, now = _table(table_uri), int(time.time() * 1000)
        gone: list[AddAction | RemoveAction] = [RemoveAction(name, True, now) for name in sorted(names)]
        properties = _properties(table, {})
        _write(table, gone, properties)
        return _table(table_uri).version()

    version = _commit(commit)
    cover_log(table_uri)
    return version


def cover_log(table_uri: str) -> None:
    """Record the sha256 of the files of the table's log in the table's manifest; to be called after each commit."""
    manifest, log = f"{table_uri}/{seals.MANIFEST}", "_delta_log"
    known = storage.read_json(manifest)["sha256"] if storage.exists(manifest) else {}
    rewritten = {f"{log}/_last_checkpoint"}
    names = [f"{log}/{name}" for name in storage.names(f"{table_uri}/{log}")]
    hashes = {
        name: known[name] if name in known.keys() - rewritten else storage.digest(f"{table_uri}/{name}")
        for name in names
    }
    if hashes != known:
        storage.write_json(manifest, {"sha256": hashes})


def recorded_hashes(table_uri: str) -> dict[str, str]:
    """File name -> sha256, as the commits of `append_files` recorded it; those of old commits may be gone from the log."""
    return {name: digest for _, hashes in _recorded(table_uri) for name, digest in hashes.items()}


def _recorded(table_uri: str) -> list[tuple[int, dict[str, str]]]:
    """Version and file name -> sha256 of each commit that the log still knows, newest first."""
    versions = range(_table(table_uri).version(), -1, -1)
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as pool:  # object stores answer slowly
        notes = pool.map(lambda version: note_of(table_uri, version), versions)
        return [(version, json.loads(note.get(_PARTS, "{}"))) for version, note in zip(versions, notes, strict=True)]


def purge(table_uri: str, keys: pa.Array | None = None) -> None:
    """Delete the Parquet files of the table's folder that the newest version does not have.

    Args:
        keys: keep files of older versions that have no row of these keys, since trainings may read them; None deletes them.
    """
    # Delta's own vacuum goes by timestamps, and would keep files that a clock running ahead marked as removed.
    # A table without a version has no other files than parts that were not committed.
    older = commit_order(table_uri) if keys is not None and _exists(table_uri) else {}
    wanted = None if keys is None else keys.take(pc.sort_indices(keys))
    for uri in other_files(table_uri):
        if wanted is None or uri.rpartition("/")[2] not in older or has_keys(uri, wanted):
            storage.delete(uri)


def other_files(table_uri: str) -> list[str]:
    """Parquet files in the table's folder that the newest version does not have, such as parts that were not committed."""
    current = {uri.rpartition("/")[2] for uri in files(table_uri)} if _exists(table_uri) else set()
    names = [name for name in storage.names(table_uri) if name.endswith(".parquet")]
    return [f"{table_uri}/{name}" for name in names if name not in current]


def commit_order(table_uri: str) -> dict[str, int]:
    """Version that added each file, or the file it was rewritten from, for all commits that the log still knows."""
    added = {name: version for version, hashes in _recorded(table_uri) for name in hashes}
    return {name: min(version, added.get(f"{origin(name)}.parquet", version)) for name, version in added.items()}


def repeats(places: pa.Table) -> pa.Table:
    """Rows (key, part) of the keys that have several."""
    counted = places.group_by("key").aggregate([([], "count_all")])
    several = counted.filter(pc.greater(counted["count_all"], 1))["key"]
    return places.filter(pc.is_in(places["key"], value_set=several))


def in_commit_order(
    rows: pa.Table, file_column: str, committed: pa.Array | pa.ChunkedArray
) -> tuple[pa.Table, pa.BooleanArray]:
    """Sort rows by key, and rows of one key by the commit of their file; returns them, and True for the first of each key.

    Args:
        file_column: name of the column with the file, which decides between files of one commit.
        committed: version that added the file of each row.
    """
    order = [("key", "ascending"), ("committed", "ascending"), (file_column, "ascending")]
    ordered = rows.append_column("committed", committed).sort_by(order).drop_columns("committed")
    keys = ordered["key"].to_numpy()
    return ordered, pa.array(np.append(np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]))


def remove_repeats(table_uri: str, repeated: pa.Table, schema: pa.Schema, note: Mapping[str, str] | None = None) -> int:
    """Keep one row of each key that several files hold, as overlapping commits leave them: the one that was committed first.

    The other files are written again without it, and older versions keep them.

    Args:
        repeated: key and part (file name) of all rows of such keys; see `repeats`.

    Returns:
        Version of the table without the repeats.
    """
    order, names = commit_order(table_uri), pc.unique(repeated["part"].combine_chunks())
    committed = pa.array([order.get(name, -1) for name in names.to_pylist()], pa.int64())
    places = repeated.group_by(["key", "part"]).aggregate([])
    committed = committed.take(pc.index_in(places["part"], value_set=names))
    places, is_first = in_commit_order(places, "part", committed)
    later = places.filter(pc.invert(is_first))
    parts, removed = [], pc.unique(later["part"]).to_pylist()
    for name in removed:
        unwanted = later.filter(pc.equal(later["part"], name))["key"].combine_chunks()
        parts += rewrite_without(f"{table_uri}/{name}", unwanted) or []
    return append_files(table_uri, parts, schema, note, removed=removed)


def _without(
    table_uri: str, keys: pa.Array, now: int, names: Sequence[str] | None = None
) -> tuple[list[AddAction | RemoveAction], list[Part]]:
    """Rewrite the files that hold rows of these keys without them; returns the actions to commit, and the new files."""
    actions: list[AddAction | RemoveAction] = []
    parts: list[Part] = []
    keys = keys.take(pc.sort_indices(keys))
    uris = [uri for uri in files(table_uri) if names is None or uri.rpartition("/")[2] in names]
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as pool:  # object stores answer slowly
        are_held = list(pool.map(lambda uri: has_keys(uri, keys), uris))
    for uri in itertools.compress(uris, are_held):
        actions.append(RemoveAction(uri.rpartition("/")[2], True, now))
        parts += rewrite_without(uri, keys) or []
    return [*actions, *(_add(part, now) for part in parts)], parts


def rewrite_without(uri: str, keys: pa.Array) -> list[Part] | None:
    """Write a file of a table again without the rows of some keys.

    Returns:
        The new part, of the same `origin`; no part if no row is left; None if the file has no such rows.
    """
    if not has_keys(uri, keys.take(pc.sort_indices(keys))):
        return None
    rows = read_file(uri)
    kept = rows.filter(pc.invert(pc.is_in(rows.column("key"), value_set=keys)))
    table_uri, _, name = uri.rpartition("/")
    return [write_part(table_uri, f"{origin(name)}-{content_digest(kept)[:16]}", kept)] if kept.num_rows else []


def origin(name: str) -> str:
    """Name, without extension, of the first file whose rows a file holds, however often it was rewritten."""
    return _REWRITTEN.sub("", name.removesuffix(".parquet"))


_REWRITTEN = re.compile(r"-[0-9a-f]{16}$")


def has_keys(uri: str, keys: pa.Array) -> bool:
    """Return True if a Parquet file has a row with one of the keys; reads the key column where statistics do not exclude it.

    Args:
        keys: sorted.
    """

    def search(file: pq.ParquetFile) -> bool:
        for group in range(file.metadata.num_row_groups):
            if _may_hold(file.metadata.row_group(group), keys):
                column = file.read_row_group(group, columns=["key"])["key"]
                if pc.any(pc.is_in(column, value_set=keys)).as_py():
                    return True
        return False

    return read_parquet(uri, search)


def read_keys(uri: str, keys: pa.Array, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a Parquet file with some keys, in its order; reads only the row groups that may hold them.

    Args:
        keys: sorted.
        columns: columns to read, including `key`; None reads all.
    """

    def read(file: pq.ParquetFile) -> pa.Table:
        groups = [
            group for group in range(file.metadata.num_row_groups) if _may_hold(file.metadata.row_group(group), keys)
        ]
        table = file.read_row_groups(groups, columns=None if columns is None else list(columns))
        return _with_added(table, columns)

    table = read_parquet(uri, read)
    return table.filter(pc.is_in(table["key"], value_set=keys))


def read_between(uri: str, start: str, stop: str | None, columns: Sequence[str] | None = None) -> pa.Table:
    """Row groups of a Parquet file that may hold keys from `start` on and, unless it is None, before `stop`."""

    def read(file: pq.ParquetFile) -> pa.Table:
        bounds = [_bounds(file.metadata.row_group(group)) for group in range(file.metadata.num_row_groups)]
        groups = [
            group
            for group, found in enumerate(bounds)
            if found is None or (found[1] >= start and (stop is None or found[0] < stop))
        ]
        table = file.read_row_groups(groups, columns=None if columns is None else list(columns))
        return _with_added(table, columns)

    return read_parquet(uri, read)


def _may_hold(group: pq.RowGroupMetaData, keys: pa.Array) -> bool:
    """Return True unless the statistics of a row group exclude all keys, which are sorted."""
    bounds = _bounds(group)
    if bounds is None:
        return True
    first = bisect.bisect_left(range(len(keys)), bounds[0], key=lambda number: keys[number].as_py())
    return bool(first < len(keys) and keys[first].as_py() <= bounds[1])


def _bounds(group: pq.RowGroupMetaData) -> tuple[str, str] | None:
    """Smallest and largest key of a row group; None without statistics."""
    column = next(column for column in map(group.column, range(group.num_columns)) if column.path_in_schema == "key")
    statistics = column.statistics if column.is_stats_set else None
    return (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else None


def read_rows(uri: str, rows: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a Parquet file by their number, in ascending order; reads only the row groups that hold them."""
    wanted = np.unique(np.asarray(rows, np.int64))

    def read(file: pq.ParquetFile) -> pa.Table:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        groups = np.searchsorted(ends, wanted, side="right")
        parts = [
            file.read_row_group(group, columns=columns and list(columns)).take(
                wanted[groups == group] - (ends[group] - sizes[group])
            )
            for group in np.unique(groups).tolist()
        ]
        return pa.concat_tables(parts) if parts else file.schema_arrow.empty_table().select(columns)

    return read_parquet(uri, read)


def read_with_commit_times(table_uri: str) -> pa.Table:
    """Rows of the newest version, with a column `committed`: the commit time of their file."""
    table = _table(table_uri)
    added = pa.table(table.get_add_actions(flatten=True)).select(["path", "modification_time"]).to_pylist()
    parts = []
    for part in added:
        rows = read_file(f"{table_uri}/{part['path']}")
        times = pa.array([part["modification_time"]] * rows.num_rows, pa.timestamp("ms", "UTC"))
        parts.append(rows.append_column("committed", times))
    if not parts:  # created, and nothing was committed yet
        none = pa.array([], pa.timestamp("ms", "UTC"))
        return _empty(table_uri, None).append_column("committed", none)
    return pa.concat_tables(parts, promote_options="default")  # earlier releases had fewer columns


def read_file(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file; `ADDED_COLUMNS` that it lacks are null if `columns` names them."""
    names = None if columns is None else list(columns)
    return read_parquet(uri, lambda file: _with_added(file.read(columns=names), columns))


def num_rows(uri: str) -> int:
    """Number of rows of a Parquet file, from its footer."""
    return read_parquet(uri, lambda file: int(file.metadata.num_rows))


def file_columns(uri: str) -> list[str]:
    """Column names of a Parquet file, from its footer."""
    return read_parquet(uri, lambda file: list(file.schema_arrow.names))


def last_note(table_uri: str) -> dict[str, str]:
    """Metadata of the newest commit that `append_files` made."""
    return note_of(table_uri, _table(table_uri).version())


def note_of(table_uri: str, version: int) -> dict[str, str]:
    """Metadata of one commit; empty if the log no longer has it."""
    # DeltaTable.history finds nothing below a folder with "#" or "?" in its name (deltalake 1.6.6).
    try:
        log = storage.read(f"{table_uri}/_delta_log/{version:020d}.json")
    except FileNotFoundError:
        return {}
    actions = map(json.loads, log.splitlines())
    return {name: str(value) for action in actions for name, value in action.get("commitInfo", {}).items()}


def write_file(uri: str, table: pa.Table, group_starts: Sequence[int] = ()) -> None:
    """Write one Parquet file atomically; see `parquet_bytes`."""
    storage.write(uri, parquet_bytes(table, group_starts))


def parquet_bytes(table: pa.Table, group_starts: Sequence[int] = ()) -> bytes:
    """Serialise rows deterministically: the same rows give the same bytes. Images (`jpg`) are not compressed again.

    Pages have checksums, and the file has a seal.

    Args:
        group_starts: first rows of the row groups, in ascending order; empty for groups of `ROW_GROUP_ROWS`.
    """
    return _sealed_parquet(table, group_starts)[0]


def _sealed_parquet(table: pa.Table, group_starts: Sequence[int]) -> tuple[bytes, str]:
    """Result of `parquet_bytes`, and its sha256."""
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    codec = {name: "none" if name == "jpg" else "zstd" for name in table.column_names}
    stream = pa.BufferOutputStream()
    table = table.combine_chunks()
    with pq.ParquetWriter(
        stream,
        table.schema,
        compression=codec if "jpg" in codec else "zstd",
        use_dictionary=texts,
        write_statistics=[name for name in table.column_names if name != "jpg"],
        write_page_checksum=True,
    ) as writer:
        starts = group_starts or range(0, max(1, table.num_rows), ROW_GROUP_ROWS)
        for start, end in itertools.pairwise([*starts, table.num_rows]):
            writer.write_table(table.slice(start, end - start), max(1, end - start))
    return seals.seal_and_digest(memoryview(stream.getvalue()))


def content_digest(table: pa.Table) -> str:
    """sha256 of column names, types and values in row order; independent of chunks, files and encodings."""
    digest = hashlib.sha256()
    for field, column in zip(table.schema, table.columns, strict=True):
        digest.update(json.dumps([field.name, table.num_rows]).encode())
        _hash_column(digest, column)
    return digest.hexdigest()


def rows_digest(table: pa.Table) -> int:
    """Sum of the sha256 of every row, modulo 2^256; independent of the order of rows.

    So the digests of parts add up to that of the whole, whatever the parts are. Columns are texts, numbers and booleans.
    """
    columns = [pc.cast(column, pa.string()).combine_chunks() for column in table.columns]
    header = json.dumps([[field.name, str(field.type)] for field in table.schema]).encode()
    joined = pc.binary_join_element_wise(*columns, "\x1f", null_handling="replace", null_replacement="\x00")
    start = hashlib.sha256(header).digest()
    hashes = (hashlib.sha256(start + row).digest() for row in joined.cast(pa.binary()).to_pylist())
    return sum(int.from_bytes(digest, "little") for digest in hashes) % _DIGEST_MODULUS


def hex_digest(*row_digests: int) -> str:
    """Digest, as 64 hex digits, of the rows of all parts, from their `rows_digest`."""
    return f"{sum(row_digests) % _DIGEST_MODULUS:064x}"


_DIGEST_MODULUS = 1 << 256


def _hash_column(digest: "hashlib._Hash", column: pa.ChunkedArray) -> None:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _hash_column(digest, column.cast(kind.value_type))
    digest.update(str(kind).removeprefix("large_").encode())
    digest.update(column.is_valid().to_numpy().tobytes())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        digest.update(_numbers(pc.list_value_length(column)))
        _hash_column(digest, pc.list_flatten(column))
    elif kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        digest.update(_numbers(pc.binary_length(column)))
        for chunk in column.chunks:
            for value in chunk.cast(pa.large_binary()):
                if value.is_valid:
                    digest.update(value.as_buffer())
    else:
        digest.update(pc.fill_null(column, False if pa.types.is_boolean(kind) else 0).to_numpy().tobytes())


def _numbers(column: pa.ChunkedArray) -> bytes:
    return pc.fill_null(column, 0).cast(pa.int64()).to_numpy().tobytes()  # type: ignore[no-any-return]


def _describe(name: str, data: bytes) -> Part:
    rows = pq.ParquetFile(io.BytesIO(data)).metadata.num_rows
    return Part(name, rows, len(data), storage.sha256(data))


def _empty(table_uri: str, columns: Sequence[str] | None) -> pa.Table:
    schema = pa.schema(_table(table_uri).schema().to_arrow())
    table = _with_added(schema.empty_table(), columns)
    return table if columns is None else table.select(list(columns))


def _with_added(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    for name in columns or ():
        if name in ADDED_COLUMNS and name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, ADDED_COLUMNS[name]))
    return table


def _add(part: Part, now: int) -> AddAction:
    return AddAction(part.name, part.size_bytes, {}, now, True, json.dumps({"numRecords": part.rows}))


def _table(table_uri: str, version: int | None = None) -> DeltaTable:
    # Given a plain path, deltalake would cut it at "#" and "?".
    return DeltaTable(storage.to_uri(table_uri), version=version, storage_options=_options(table_uri))


def _exists(table_uri: str) -> bool:
    return DeltaTable.is_deltatable(storage.to_uri(table_uri), storage_options=_options(table_uri))


def _options(table_uri: str) -> dict[str, str] | None:
    """Credentials and endpoint of an object store, from the environment."""
    if "://" not in table_uri:
        return None
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "GOOGLE_"))}
