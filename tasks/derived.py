"""Tables derived from the images table: one row for each kept row, such as its embeddings or its latents.

A file of such a table has rows of one file of the images table, in its order; so every image file is read once, and both are
later read side by side. Rows that a table has already are not made again, and parts are committed as they are done.

Embeddings belong to the dataset, and its snapshot names them. Other tables, `derived/<stage>-<digest>`, are made from a
snapshot and a trained model by a stage of their own. Its artifact names the table and holds the places of its rows, so that a
training that reads the table finds them; see `tasks.stages.train`. Takedowns, `unclip verify`, `unclip gc` and
`unclip data show` know all tables in the folder `derived`.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from tasks import ranges, rows, tables
from tasks.dataflow import exchange, run_all, run_in_actors
from tasks.places import KeptRows, blocks, open_block, open_places, write_places
from tasks.progress import Progress
from tasks.ranges import KeyRange
from tasks.snapshots import Snapshot, Split
from tasks.stage import Artifact, StageContext
from tasks.tombstones import refuse_if_recorded
from unclip.config import fingerprint
from unclip.data import Places, Source
from unclip.errors import StageError

FILES_AT_ONCE = 64
"""Files whose keys one task reads."""
COMMIT_SECONDS = 30.0
"""Parts are committed about this often, so that a killed run loses little."""
DERIVED = "derived"
"""Folder of the tables in a storage."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Rows of one file of the images table."""

    uri: str
    rows: np.ndarray
    """[N] int32, ascending row numbers in the file."""


def read_shard(shard: Shard, columns: Sequence[str], stage: str) -> pa.Table:
    """Read the key and some columns of the images table for the rows of a shard.

    Raises:
        StageError: a row has no value, such as no image.
    """
    table = tables.read_rows(shard.uri, shard.rows.tolist(), ["key", *columns])
    for column in columns:
        if table[column].null_count:
            missing = table["key"].filter(pc.is_null(table[column]))
            what = "image" if column == "jpg" else column
            raise StageError(f"{stage}: {len(missing)} rows of {shard.uri} have no {what}, such as {missing[0]}.")
    return table


def part_name(shard: Shard, keys: Sequence[str], *settings: Any) -> str:
    """Name of the part with these rows: it begins like the image file's, so that both tables list files in the same order."""
    return f"{shard.uri.rpartition('/')[2].removesuffix('.parquet')}-{fingerprint(keys, *settings)[:16]}"


def shards(images: str, images_version: int, places: str) -> Iterator[Shard]:
    """Yield the rows of a folder of places, file by file of the images table."""
    uris = tables.files(images, images_version)
    for block in blocks(places):
        listed = open_block(places, block)
        file, row = (listed[name].to_numpy() for name in ("images_file", "images_row"))
        for rows_of_file in np.split(np.arange(len(file)), np.flatnonzero(np.diff(file)) + 1):
            if len(rows_of_file):
                yield Shard(uris[file[rows_of_file[0]]], row[rows_of_file])


def write_missing(
    context: StageContext, kept: KeptRows, num_kept: int, table: str, schema: pa.Schema
) -> tuple[str, int]:
    """Write the places of the kept rows that a table lacks; returns the folder and their number.

    Rows that overlapping commits have left twice are removed from the table.
    """
    known = tables.files(table)
    key_ranges = ranges.ranges(ranges.range_count(kept.selection))
    groups = [known[start : start + FILES_AT_ONCE] for start in range(0, len(known), FILES_AT_ONCE)]
    keys, folder = f"{context.intermediate}/known", f"{context.intermediate}/missing"
    count = len(key_ranges)
    found = exchange(functools.partial(split_keys, count), groups, count, functools.partial(_write_keys, keys, count))
    repeated = pa.concat_tables(found)["key"].combine_chunks()
    if len(repeated):
        places = pa.concat_tables(run_all(functools.partial(_places_of, repeated), groups))
        refuse_if_recorded(context.store, context.stage)
        tables.remove_repeats(table, places, schema)
    missing = functools.partial(_missing_rows, kept, keys)
    return folder, write_places(folder, key_ranges, missing, kept.num_files(), num_kept)


def split_keys(count: int, uris: Sequence[str]) -> list[pa.Table]:
    """Divide the keys of files among key ranges."""
    return ranges.split_by_key(pa.concat_tables(tables.read_file(uri, ["key"]) for uri in uris), count)


def _write_keys(folder: str, count: int, output: int, pieces: list[pa.Table]) -> pa.Table:
    """Write the keys of one range; returns those that several rows have, with repetitions."""
    none = pa.table({"key": pa.array([], pa.string())})  # a takedown may have emptied the table
    keys = pa.concat_tables([none, *pieces]).sort_by("key")
    ranges.write_range(folder, KeyRange(output, count), keys)
    return tables.repeats(keys)


def _places_of(keys: pa.Array, uris: Sequence[str]) -> pa.Table:
    """Key and file of the rows of some keys."""
    found = []
    for uri in uris:
        rows_of_file = tables.read_file(uri, ["key"])
        rows_of_file = rows_of_file.filter(pc.is_in(rows_of_file["key"], value_set=keys))
        part = pa.repeat(pa.scalar(uri.rpartition("/")[2]), rows_of_file.num_rows)
        found.append(rows_of_file.append_column("part", part))
    return pa.concat_tables(found)


def _missing_rows(kept: KeptRows, keys: str, key_range: KeyRange) -> pa.Table:
    found = kept.read(key_range)
    known = ranges.read_range(keys, key_range)["key"].combine_chunks()
    return found.filter(pc.invert(pc.is_in(found["key"], value_set=known)))


def append_in_actors(
    context: StageContext,
    start: Callable[[Progress], Any],
    write: Callable[[Any, Shard], Any],
    images: tuple[str, int],
    places: str,
    num_rows: int,
    table: str,
    schema: pa.Schema,
    unit: str = "rows",
) -> None:
    """Make the rows of a table in actors, shard by shard, and commit parts as they are done.

    Finished parts of an earlier attempt are used again.

    Args:
        start: starts one actor, which gets the progress of this stage to call its `begin`.
        write: (actor, shard) -> reference of the part that the actor has written.
        images: URI and version of the images table.
        places: folder with the places of the rows to make; see `write_missing`.
    """
    num_actors = max(1, min(context.resources.num_workers, len(tables.files(*images))))
    progress = context.progress(num_rows, unit)
    progress.wait(f"for {context.resources}")
    parts: list[tables.Part] = []
    committed_at = time.monotonic()
    with contextlib.closing(run_in_actors(lambda: start(progress), num_actors, write, shards(*images, places))) as done:
        for _, part in done:
            parts.append(part)
            progress.update(part.rows)
            if time.monotonic() - committed_at > COMMIT_SECONDS:
                refuse_if_recorded(context.store, context.stage)
                tables.append_files(table, parts, schema)
                parts, committed_at = [], time.monotonic()
    refuse_if_recorded(context.store, context.stage)
    tables.append_files(table, parts, schema)


class Encoder(Protocol):
    """Network that makes the columns of a derived table."""

    def encode(self, rows: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """Compute the columns of some rows.

        Args:
            rows: column of the images table -> values of `Derivation.batch_size` rows.

        Returns:
            Column of the derived table, other than `key` -> one value for each row.
        """


@dataclasses.dataclass(frozen=True)
class Derivation:
    """Description of a derived table."""

    name: str
    """Name of its stage, under which trainings read it."""
    schema: pa.Schema
    """Columns, the first of which is `key`. Half precision is stored as bytes (`unclip.data.half_bytes`)."""
    columns: tuple[str, ...]
    """Columns of the images table that it is made from."""
    load: Callable[[torch.device], Encoder]
    """Loads the encoder on a device, in an actor; a module-level function or a `functools.partial` of one."""
    settings: tuple[Any, ...]
    """All that its rows depend on besides the images: digests and settings, as JSON values."""
    batch_size: int = 64
    """Rows that are encoded together."""

    @property
    def id(self) -> str:
        """Name of its table."""
        return f"{self.name}-{fingerprint(self.name, *self.settings)[:16]}"


@dataclasses.dataclass(frozen=True)
class DerivedTable:
    """A derived table with a row for each kept row of a snapshot; part of the facts of its stage's artifact."""

    derived: str
    """URI of the table."""
    derived_version: int
    places: str
    """Folder with the places of the kept rows in the table, in the blocks and the order of the snapshot's places."""

    @classmethod
    def of(cls, artifact: Artifact) -> "DerivedTable | None":
        """Table of an artifact; None if it has none."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(artifact.facts[name] for name in names)) if DERIVED in artifact.facts else None

    def source(self, name: str, columns: Sequence[str]) -> Source:
        """Files of the table, whose places have the prefix `name`."""
        return Source(tuple(tables.files(self.derived, self.derived_version)), tuple(columns), name)

    def open_places(self, split: Split) -> Places:
        """Memory-map the places of the rows of a split."""
        return open_places(self.places, split)


def derive(context: StageContext, dataset: Artifact, derivation: Derivation) -> tuple[DerivedTable, int]:
    """Make the rows of a derived table that it lacks for a snapshot, and write the places of all.

    Args:
        dataset: artifact of the snapshot.

    Returns:
        The table, and the number of rows that were made.

    Raises:
        StageError: a row has no image, an encoder returned another number of rows, or a takedown was recorded meanwhile.
    """
    snapshot = Snapshot.of(dataset.facts)
    table = context.store.uri(DERIVED, derivation.id)
    kept = KeptRows(snapshot.selection, snapshot.images, snapshot.images_version, snapshot.index_version)
    num_kept = dataset.facts["rows"][rows.KEPT]
    places, num_todo = snapshot.places, num_kept
    if tables.version(table) is not None:
        places, num_todo = write_missing(context, kept, num_kept, table, derivation.schema)
    if num_todo:
        resources = context.resources
        deriver = Deriver.options(**resources.options(), scheduling_strategy="SPREAD")  # type: ignore[attr-defined]
        start = functools.partial(deriver.remote, derivation, table, resources.cpus_per_worker)
        images = (snapshot.images, snapshot.images_version)
        append_in_actors(context, start, _derive_shard, images, places, num_todo, table, derivation.schema)
    version = tables.version(table)
    assert version is not None, f"{table} has no version"
    folder = f"{context.folder}/places"
    _write_all_places(kept, num_kept, table, version, derivation.name, f"{context.intermediate}/keys", folder)
    context.tracker.metrics({"rows": num_kept, "derived_now": num_todo})
    return DerivedTable(table, version, folder), num_todo


def _derive_shard(deriver: Any, shard: Shard) -> Any:
    return deriver.derive.remote(shard)


@ray.remote
class Deriver:
    """Holds one encoder; writes the part of one shard per call."""

    def __init__(self, derivation: Derivation, table: str, num_threads: int, progress: Progress) -> None:
        progress.begin()
        torch.set_num_threads(num_threads)
        self.derivation, self.table = derivation, table
        self.encoder = derivation.load(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def derive(self, shard: Shard) -> Any:
        """Write one part file with a row for each row of the shard, in order; returns its description."""
        derivation = self.derivation
        found = read_shard(shard, derivation.columns, derivation.name)
        keys = found["key"].to_pylist()
        columns: dict[str, list[Any]] = {name: [] for name in derivation.schema.names[1:]}
        for start in range(0, len(keys), derivation.batch_size):
            batch = found.slice(start, derivation.batch_size)
            for name, values in self._encode(batch).items():
                columns[name].extend(values)
        part = pa.table({"key": keys, **columns}, schema=derivation.schema)
        return tables.write_part(self.table, part_name(shard, keys, *derivation.settings), part)

    def _encode(self, batch: pa.Table) -> dict[str, Sequence[Any]]:
        """Encode some rows, padded to a full batch, so that every row is computed in the same way."""
        derivation, count = self.derivation, batch.num_rows
        rows_of_batch = {name: batch[name].to_pylist() for name in derivation.columns}
        padding = derivation.batch_size - count
        encoded = self.encoder.encode({name: each + each[-1:] * padding for name, each in rows_of_batch.items()})
        for name in derivation.schema.names[1:]:
            if len(encoded[name]) != derivation.batch_size:
                raise StageError(
                    f"{derivation.name}: got {len(encoded[name])} values of {name} for {derivation.batch_size} rows; nothing "
                    "was written."
                )
        return {name: encoded[name][:count] for name in derivation.schema.names[1:]}


def _write_all_places(
    kept: KeptRows, num_kept: int, table: str, version: int, name: str, keys: str, folder: str
) -> None:
    """Write the places of the kept rows in both tables, in the blocks of the snapshot's places.

    Args:
        keys: folder for files of a step between.

    Raises:
        StageError: the table lacks kept rows.
    """
    key_ranges = ranges.ranges(ranges.range_count(kept.selection))
    count, uris = len(key_ranges), tables.files(table, version)
    numbered = list(enumerate(uris))
    groups = [numbered[start : start + FILES_AT_ONCE] for start in range(0, len(uris), FILES_AT_ONCE)]
    split, write = functools.partial(_split_places, count), functools.partial(_write_key_places, keys, count)
    exchange(split, groups, count, write)
    read = functools.partial(_read_places, kept, table, keys, name)
    write_places(folder, key_ranges, read, kept.num_files(), num_kept)


_KEY_PLACES = pa.schema([("key", pa.string()), ("file", pa.int32()), ("row", pa.int32())])


def _split_places(count: int, numbered: Sequence[tuple[int, str]]) -> list[pa.Table]:
    parts = []
    for number, uri in numbered:
        keys = tables.read_file(uri, ["key"])["key"]
        file, row = np.full(len(keys), number, np.int32), np.arange(len(keys), dtype=np.int32)
        parts.append(pa.table([keys, file, row], _KEY_PLACES))
    return ranges.split_by_key(pa.concat_tables(parts), count)


def _write_key_places(folder: str, count: int, output: int, pieces: list[pa.Table]) -> None:
    table = pa.concat_tables([_KEY_PLACES.empty_table(), *pieces])
    ranges.write_range(folder, KeyRange(output, count), table.sort_by("key"))


def _read_places(kept: KeptRows, table: str, keys: str, name: str, key_range: KeyRange) -> pa.Table:
    """Kept rows of one key range, with places in both tables."""
    found, known = kept.read(key_range), ranges.read_range(keys, key_range)
    index = pc.index_in(found["key"], value_set=known["key"].combine_chunks())
    if index.null_count:
        missing = found["key"].filter(pc.is_null(index))
        raise StageError(
            f"{table} lacks {len(missing)} of {found.num_rows} kept rows, such as {missing[0]}. Run the same command again."
        )
    places = known.take(index.combine_chunks())
    return found.append_column(f"{name}_file", places["file"]).append_column(f"{name}_row", places["row"])
