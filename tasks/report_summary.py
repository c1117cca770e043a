"""Rows that the stage `report` reads and counts, one range of keys at a time: all of them, or those that have changed."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import host_counts, ranges, rows
from tasks.captions import count_words
from tasks.find_duplicates import write_rows
from tasks.index import INDEX, index_files, read_index
from tasks.ranges import KeyRange
from tasks.snapshots import Snapshot
from tasks.summaries import CutCaptions, Examples, Histogram, SortedList, Summary, Totals

_SELECTION = ["key", "status", "reason"]
_PAIRS = ["key", "url", "caption", "status"]
_IMAGES = ["key", "original_width", "original_height"]


@dataclasses.dataclass(frozen=True)
class Tables:
    """Tables of a dataset version that the page is made of."""

    selection: str
    """Folder of range files, like `pairs` and `scores`."""
    pairs: str
    scores: str
    images: str
    images_version: int
    index_version: int
    embeddings: str
    embeddings_version: int

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Tables":
        """Tables of the facts of `curate`."""
        snapshot = Snapshot.of(facts)
        names = [field.name for field in dataclasses.fields(cls) if field.name != "pairs"]
        return cls(pairs=facts["pairs"], **{name: getattr(snapshot, name) for name in names})

    def described(self) -> list[str]:
        """Files of the index of the images."""
        return index_files(self.images, self.index_version)

    def key_ranges(self) -> list[KeyRange]:
        return ranges.ranges(ranges.range_count(self.selection))


@dataclasses.dataclass(frozen=True)
class Changes:
    """Layers and files that the tables have since an earlier page."""

    before: Tables
    now: Tables
    selection: Sequence[str]
    """They have all rows that have changed in any table."""
    pairs: Sequence[str]
    scores: Sequence[str]
    described: Sequence[str]
    """All files of the index."""
    new: Sequence[str]
    """New ones."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of some keys in all tables, each sorted by key."""

    selection: pa.Table
    pairs: pa.Table
    images: pa.Table
    """Rows of the index of those that are usable."""
    scores: pa.Table

    @functools.cached_property
    def fates(self) -> pa.Table:
        """See `rows.fates`."""
        return rows.fates(self.selection)

    @functools.cached_property
    def measured(self) -> Mapping[str, tuple[pa.ChunkedArray, np.ndarray]]:
        """Name of a measure -> ascending keys of the rows that have a value, and the values: [N] float64; in the order of the
        page."""
        sizes = self.images.filter(pc.is_valid(self.images["original_width"]))
        width, height = (sizes[name].to_numpy().astype(float) for name in ("original_width", "original_height"))
        shorter, longer = np.minimum(width, height), np.maximum(width, height)
        captioned = _last_of_each_key(self.pairs)
        captioned = captioned.filter(pc.greater(pc.utf8_length(captioned["caption"]), 0))
        keys, captions = captioned["key"], captioned["caption"]
        values = {
            "shorter_side": (sizes["key"], shorter),
            "aspect_ratio": (sizes["key"], longer / shorter),
            "caption_words": (keys, np.asarray(count_words(captions), float)),
            "caption_characters": (keys, np.asarray(pc.utf8_length(captions), float)),
        }
        for field in self.scores.schema:
            if pa.types.is_floating(field.type):  # the others are places of embeddings
                values[field.name] = (self.scores["key"], np.asarray(self.scores[field.name], float))
        return values


def hosts_uri(scratch: str, key_range: KeyRange) -> str:
    """File of the counts of the hosts of one range of keys, in the scratch folder."""
    return f"{scratch}/hosts/{key_range}.rows"


def summarise_range(
    read: Tables, described: Sequence[str], lists: Mapping[str, SortedList], scratch: str, key_range: KeyRange
) -> Summary:
    """Summarise the rows of one range of keys, and write the counts of their hosts to `hosts_uri`.

    Args:
        described: files of the index of the images.
    """
    selection = ranges.read_range(read.selection, key_range, _SELECTION)
    pairs = ranges.read_range(read.pairs, key_range, _PAIRS)
    images = read_index(described, key_range, _IMAGES)
    images = images.filter(pc.is_in(images["key"], value_set=_usable(pairs)))
    found = Rows(selection, pairs, images, ranges.read_range(read.scores, key_range))
    write_rows(hosts_uri(scratch, key_range), host_counts.count_hosts(pairs, found.fates))
    return _summary_of(found, lists)


@dataclasses.dataclass(frozen=True)
class Changed:
    """Effects of the changed rows of one range."""

    before: Totals
    """Totals of their earlier values."""
    now: Summary
    watched: frozenset[str]
    """Changed keys among those that the earlier page depends on."""


def summarise_changes(
    changes: Changes, lists: Mapping[str, SortedList], scratch: str, watched: pa.Array, key_range: KeyRange
) -> Changed:
    """Summarise the changed rows of one range of keys, and write how they change the counts of hosts to `hosts_uri`.

    Args:
        watched: keys that the earlier page depends on.
    """
    selection = ranges.read_layers(changes.selection, key_range, _SELECTION)
    keys = pc.unique(selection["key"].combine_chunks())
    known = ranges.known_keys(ranges.layers(changes.before.pairs), key_range, selection["key"])
    before = _find(changes.before, known)
    now = Rows(
        selection,
        pairs := _newer(before.pairs, changes.pairs, key_range, _PAIRS),
        _newer_images(before.images, changes, key_range, _usable(pairs)),
        _newer(before.scores, changes.scores, key_range),
    )
    counts = [host_counts.count_hosts(pairs, now.fates), host_counts.count_hosts(before.pairs, before.fates, -1)]
    write_rows(hosts_uri(scratch, key_range), host_counts.add_up(pa.concat_tables(counts)))
    own = watched.filter(pc.is_in(watched, value_set=keys)).to_pylist()
    return Changed(_totals_of(before), _summary_of(now, lists), frozenset(own))


def _usable(pairs: pa.Table) -> pa.Array:
    """Keys of the usable rows of a list; the index may have rows of other lists."""
    return pc.unique(pairs.filter(pc.equal(pairs["status"], rows.KEPT))["key"].combine_chunks())


def _without(table: pa.Table, keys: pa.Array | pa.ChunkedArray) -> pa.Table:
    keys = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    return table.filter(pc.invert(pc.is_in(table["key"], value_set=keys)))


def _find(read: Tables, keys: pa.Array) -> Rows:
    """Rows with some keys."""
    wanted, described = keys.to_pylist(), read.described()
    pairs = ranges.find_rows(read.pairs, wanted, _PAIRS)
    images = INDEX.empty_table().select(_IMAGES)
    if described:
        images = ranges.find_rows(described, _usable(pairs).to_pylist(), _IMAGES)
    selection = ranges.find_rows(read.selection, wanted, _SELECTION)
    return Rows(selection, pairs, images, ranges.find_rows(read.scores, wanted))


def _newer(
    before: pa.Table, layers: Sequence[str], key_range: KeyRange, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows as later layers of their table have them.

    Args:
        before: rows of all earlier keys that the layers have or remove.
    """
    if not layers:
        return before
    later = ranges.read_layers(layers, key_range, columns)
    removed = [ranges.read_removed(folder, key_range) for folder in layers]
    left = _without(_without(before, later["key"]), pa.concat_arrays(removed))
    return pa.concat_tables([left, later], promote_options="default").sort_by("key")


def _newer_images(before: pa.Table, changes: Changes, key_range: KeyRange, usable: pa.Array) -> pa.Table:
    """Rows of the index as its new files have them.

    Args:
        before: rows of earlier keys.
    """
    new = read_index(changes.new, key_range, _IMAGES)
    parts = [new, _without(before, new["key"])]
    parts = [part.filter(pc.is_in(part["key"], value_set=usable)) for part in parts]
    others = usable
    for part in parts:
        others = others.filter(pc.invert(pc.is_in(others, value_set=part["key"].combine_chunks())))
    if len(others) and changes.described:  # fetched for another list, or not fetched
        parts.append(ranges.find_rows(changes.described, others.to_pylist(), _IMAGES))
    return pa.concat_tables(parts).sort_by("key")


def _summary_of(found: Rows, lists: Mapping[str, SortedList]) -> Summary:
    fates = found.fates
    stored = fates.filter(pc.is_in(fates["key"], value_set=found.images["key"].combine_chunks()))

    @functools.cache
    def measured(name: str) -> tuple[pa.ChunkedArray, np.ndarray, pa.ChunkedArray]:
        keys, values = found.measured.get(name, (fates["key"].slice(0, 0), np.zeros(0)))
        return keys, values, fates["fate"].take(pc.index_in(keys, value_set=fates["key"].combine_chunks()))

    examples = {}
    for name, each in lists.items():
        if each.measure is None:
            listed = fates if each.fate == rows.KEPT else stored
            keys, values, fate = listed["key"], np.zeros(len(listed)), listed["fate"]
        else:
            keys, values, fate = measured(each.measure)
        candidates = np.flatnonzero(pc.fill_null(pc.equal(fate, each.fate), False).to_numpy() & ~np.isnan(values))
        ranks = each.sign * values[candidates]
        order = np.argsort(ranks, kind="stable")[: each.capacity]  # keys ascend
        first = zip(ranks[order].tolist(), keys.take(candidates[order]).to_pylist(), strict=True)
        examples[name] = Examples(list(first), len(candidates) > each.capacity)
    return Summary(_totals_of(found), examples)


def _totals_of(found: Rows) -> Totals:
    explained = found.selection.filter(pc.is_valid(found.selection["reason"]))
    counted = explained.group_by(["reason", "status"]).aggregate([([], "count_all")]).to_pylist()
    return Totals(
        {(row["reason"], row["status"]): row["count_all"] for row in counted},
        _cut_captions(found),
        {name: Histogram.of(values) for name, (_, values) in found.measured.items()},
    )


def _cut_captions(found: Rows) -> CutCaptions:
    if "tokens_lost" not in found.scores.column_names:  # of an earlier release
        return CutCaptions(0, 0, 0)
    kept = found.fates.filter(pc.equal(found.fates["fate"], rows.KEPT))["key"].combine_chunks()
    lost = found.scores.filter(pc.is_in(found.scores["key"], value_set=kept))["tokens_lost"].drop_null()
    return CutCaptions(len(lost), pc.sum(pc.greater(lost, 0)).as_py() or 0, pc.sum(lost).as_py() or 0)


def _last_of_each_key(pairs: pa.Table) -> pa.Table:
    """The last row of each key, of a table that is sorted by key."""
    keys = pairs["key"].combine_chunks()
    return pairs.filter(
        pa.array(np.append(pc.not_equal(keys.slice(1), keys.slice(0, max(0, len(keys) - 1))), [True])[: len(keys)])
    )
