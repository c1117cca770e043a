"""The index of an images table: the small columns of its rows by key range, with the place of each row.

Images lie in the order of their download, by site. The index joins them with the list range by range, finds a row by its
key, and tells a takedown which files hold a row. It is a Delta table `index/<recipe>` of range files (`tasks.ranges`), brought
up to date after each commit of the images table; what a killed process left out is added at the next update.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import ranges, tables
from tasks.dataflow import exchange, run_all
from tasks.ranges import KeyRange
from tasks.tables import Part

INDEX = pa.schema(
    {
        "key": pa.string(),
        "url": pa.string(),
        "status": pa.string(),
        "reason": pa.string(),
        "original_width": pa.int32(),
        "original_height": pa.int32(),
        "sha256": pa.string(),
        "phash": pa.string(),
        "colour": pa.string(),
        "jpg_sha256": pa.string(),
        "final_url": pa.string(),
        "redirect_hosts": pa.string(),
        "part": pa.string(),  # file of the images table
        "row": pa.int32(),  # row in that file
    }
)
_COPIED = [name for name in INDEX.names if name not in ("part", "row")]
_PARTS_AT_ONCE = 128
_MAX_FILES_PER_RANGE = 16
_VERSION_NOTE = "unclip.images_version"


def index_uri(images: str) -> str:
    """URI of the index of an images table."""
    root, _, recipe = images.rpartition("/images/")
    return f"{root}/index/{recipe}"


def index_identity(images: str) -> str | None:
    """Identity of the index of an images table; a table that is made anew gets another index. See `tables.identity`."""
    return tables.identity(index_uri(images))


def index_files(images: str, version: int | None = None) -> list[str]:
    """Files of the index that describes a version of the images table (None: the newest), for `ranges.read_range`.

    Args:
        version: version of the index, which `update_index` returned.
    """
    return tables.files(index_uri(images), version)


def update_index(images: str, version: int) -> int:
    """Bring the index up to date with a version of the images table; returns the version of the index."""
    index = index_uri(images)
    listed = set(map(_name, tables.files(images, version)))
    described = _described_parts(images, index)
    new, removed = sorted(listed - described), described - listed
    before = [] if tables.version(index) is None else tables.files(index)
    parts, replaced = _index_parts(images, index, new), []
    if removed:
        for uri, part in zip(before, run_all(functools.partial(_without_parts, index, removed), before), strict=True):
            if part is not None:
                replaced.append(_name(uri))
                parts += [part] if part.rows else []
    kept = [uri for uri in before if _name(uri) not in replaced]
    uris = [*kept, *(f"{index}/{part.name}" for part in parts)]
    if _most_overlapping(uris) > _MAX_FILES_PER_RANGE:
        count = ranges.num_ranges(sum(run_all(tables.num_rows, uris)))
        parts = run_all(functools.partial(_compact, index, uris), ranges.ranges(count))
        replaced = list(map(_name, before))
    note = {_VERSION_NOTE: str(version)}
    if not (parts or replaced) and before:
        return tables.version(index) or 0
    return tables.append_files(index, [part for part in parts if part.rows], INDEX, note, removed=replaced)


def read_index(files: Sequence[str], key_range: KeyRange, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of the index in one key range, sorted by key; without files, none.

    Args:
        files: see `index_files`.
    """
    if not any(ranges.range_of_file(uri).overlaps(key_range) for uri in files):
        return INDEX.empty_table().select(list(columns or INDEX.names))
    return ranges.read_range(files, key_range, columns)


def find_newest(
    files: Sequence[str], new: Sequence[str], key_range: KeyRange, keys: pa.Array, columns: Sequence[str]
) -> pa.Table:
    """Rows of the index with some keys of one range, sorted by key; reads little if most are in new files.

    Args:
        files: all files of the index.
        new: those that are new since an earlier version.
        columns: columns of `INDEX`, including `key`.
    """
    table = read_index(new, key_range, columns)
    found = [table.filter(pc.is_in(table["key"], value_set=keys))]
    rest = keys.filter(pc.invert(pc.is_in(keys, value_set=found[0]["key"].combine_chunks())))
    found += [ranges.find_rows(files, rest.to_pylist(), columns)] if len(rest) else []
    return pa.concat_tables(found).sort_by("key")


def each_table(images: str, columns: Sequence[str], key_range: KeyRange | None = None) -> Iterator[pa.Table]:
    """Yield all rows of the newest version of an images table, a bounded number at once, even if the index is out of date.

    Args:
        columns: columns of `INDEX`.
        key_range: files of the index that have no rows of this range are omitted; None reads all.
    """
    listed = set(map(_name, tables.files(images)))
    described = _described_parts(images, index_uri(images))
    gone = pa.array(sorted(described - listed), pa.string())
    for uri in index_files(images) if described else ():
        if key_range is None or ranges.range_of_file(uri).overlaps(key_range):
            yield _of_present_parts(tables.read_file(uri, _with_part(columns)), gone).select(columns)
    for name in sorted(listed - described):
        yield describe_part(f"{images}/{name}").select(columns)


def find_rows(images: str, keys: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """Rows of the newest version of an images table with these keys, sorted by key; opens only files that may hold them.

    Args:
        columns: columns of `INDEX`, including `key`.
    """
    listed = set(map(_name, tables.files(images)))
    described = _described_parts(images, index_uri(images))
    gone = pa.array(sorted(described - listed), pa.string())
    files = index_files(images) if described else []
    found = [ranges.find_rows(files, keys, _with_part(columns))] if files else []
    found = [_of_present_parts(table, gone).select(columns) for table in found]
    wanted = pa.array(sorted(set(keys)), pa.string())
    for name in sorted(listed - described):
        table = describe_part(f"{images}/{name}").select(columns)
        found.append(table.filter(pc.is_in(table["key"], value_set=wanted)))
    return pa.concat_tables([INDEX.empty_table().select(columns), *found]).sort_by("key")


def _with_part(columns: Sequence[str]) -> list[str]:
    return [*columns, *({"part"} - set(columns))]


def _of_present_parts(table: pa.Table, gone: pa.Array) -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table["part"], value_set=gone))) if len(gone) else table


def _described_parts(images: str, index: str) -> set[str]:
    """Parts of the images table that the index describes."""
    if tables.version(index) is None:
        return set()
    described = tables.last_note(index).get(_VERSION_NOTE)  # none if a process was killed when it had created the index
    return set() if described is None else set(map(_name, tables.files(images, int(described))))


def _index_parts(images: str, index: str, names: Sequence[str]) -> list[Part]:
    if not names:
        return []
    groups = [names[start : start + _PARTS_AT_ONCE] for start in range(0, len(names), _PARTS_AT_ONCE)]
    uris = [[f"{images}/{name}" for name in group] for group in groups]
    count = ranges.num_ranges(sum(run_all(_count_rows, uris)))
    return exchange(functools.partial(_split, count), uris, count, functools.partial(_merge, index, count))


def _count_rows(uris: Sequence[str]) -> int:
    return sum(map(tables.num_rows, uris))


def _split(count: int, uris: Sequence[str]) -> list[pa.Table]:
    return ranges.split_by_key(pa.concat_tables(map(describe_part, uris)), count)


def describe_part(uri: str) -> pa.Table:
    """Index rows of one file of an images table, in its order; columns that an old file lacks are null."""
    table = tables.read_file(uri, [name for name in tables.file_columns(uri) if name in _COPIED])
    rows = table.num_rows
    columns = [
        table[name] if name in table.column_names else pa.nulls(rows, INDEX.field(name).type) for name in _COPIED
    ]
    place = [pa.repeat(_name(uri), rows), pa.array(range(rows), pa.int32())]
    return pa.table([*columns, *place], schema=INDEX)


def _merge(index: str, count: int, output: int, pieces: list[pa.Table]) -> Part:
    return _write(index, KeyRange(output, count), pa.concat_tables(pieces).sort_by("key"))


def _write(index: str, key_range: KeyRange, table: pa.Table) -> Part:
    name = f"{key_range}-{tables.content_digest(table)[:16]}"
    return tables.write_part(index, name, table, ranges.group_starts(table, key_range))


def _without_parts(index: str, removed: set[str], uri: str) -> Part | None:
    """Write a file of the index again without the rows of removed parts; None if it has no such rows."""
    table = tables.read_file(uri)
    stale = pc.is_in(table["part"], value_set=pa.array(sorted(removed), pa.string()))
    if not pc.any(stale).as_py():
        return None
    return _write(index, ranges.range_of_file(uri), table.filter(pc.invert(stale)))


def _most_overlapping(uris: Sequence[str]) -> int:
    """Largest number of files that must be opened for one key."""
    found = [ranges.range_of_file(uri) for uri in uris]
    finest = max((each.count for each in found), default=1)
    opened = np.zeros(finest, np.int64)
    for each in found:
        width = finest // each.count
        opened[each.index * width : (each.index + 1) * width] += 1
    return int(opened.max())


def _compact(index: str, uris: Sequence[str], key_range: KeyRange) -> Part:
    return _write(index, key_range, read_index(uris, key_range))


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]
