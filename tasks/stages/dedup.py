"""Stage `dedup`: of identical or nearly identical images, keep the one with the smallest key; then split the kept rows.

The kept image depends on keys alone, not on the order of the list or of the downloads. A row is an image with a caption: all
captions of a kept image's URL are kept with it, and are on the same side of the split.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import generations, ranges, rows, tables
from tasks.dataflow import run_all
from tasks.find_duplicates import (
    CAPTION,
    REASONS,
    KeepCaptions,
    compared,
    find_duplicates,
    read_rows,
    split_rows,
    write_rows,
)
from tasks.generations import MAX_NEW_ROWS, Generation, Layer, Sums
from tasks.index import find_newest, index_files, index_identity, read_index
from tasks.keys import key_texts
from tasks.near_duplicates import MAX_DISTANCE
from tasks.new_duplicates import Lookups, find_changes, write_lookups
from tasks.places import PLACED, EarlierPlaces, KeptRows, file_names, write_changed, write_places
from tasks.ranges import KeyRange
from tasks.stage import Artifact, Output, StageContext, stage
from unclip.config import fingerprint, require, to_dict


@dataclasses.dataclass(frozen=True)
class DedupConfig:
    phash_distance: int = 0
    """Largest number of differing bits (of 64) between the perceptual hashes of duplicates, whose mean colours must agree as
    well; -1 compares only exact bytes."""
    keep_captions: KeepCaptions = "url"
    """Captions that an image keeps: "url", all of the first URL with its bytes; "image", all of every URL with its bytes;
    "one", only the first."""
    holdout: float = 0.02
    """Share of the kept images that is held out from training, with all their captions, for evaluation."""

    def __post_init__(self) -> None:
        require(
            -1 <= self.phash_distance <= MAX_DISTANCE, "phash_distance", self.phash_distance, f"-1 to {MAX_DISTANCE}"
        )
        known = get_args(KeepCaptions)
        require(self.keep_captions in known, "keep_captions", self.keep_captions, f"one of {', '.join(known)}")
        require(0 <= self.holdout <= 0.5, "holdout", self.holdout, "a share of at most 0.5")


@stage("dedup", version=3)
def dedup(context: StageContext, config: DedupConfig, filter: Artifact) -> Output:
    """Drop images with the same bytes as another and images that look the same; hold out some of the others.

    Rows that an earlier refresh has compared are compared with new ones only, unless hashes may differ.
    """
    facts = filter.facts
    changes = _find_changes(context, config, filter)
    found = None if changes is None else _continue(context, config, facts, changes)
    if found is None:
        found = _select_all(context, config, filter)
    counts = found.sums.counts
    context.tracker.metrics(counts["rows"])

    kept = KeptRows(found.folder, facts["images"], facts["images_version"], facts["index_version"])
    places, key_ranges = f"{context.folder}/places", ranges.ranges(ranges.range_count(found.folder))
    if found.places is None:
        write_places(places, key_ranges, kept.read, kept.num_files(), counts["rows"][rows.KEPT])
    else:
        found.places.write(places, counts["rows"][rows.KEPT])
    read = {name: facts[name] for name in ("pairs", "images", "images_version", "index_version")}
    read |= {"selection": filter.uri, "places": places}
    others = {"lookups": found.lookups, "other_captions": found.other_captions}
    settings, identities = _settings(config), [index_identity(facts["images"])]
    generation = Generation(context.folder, settings, found.folder, read, found.sums, found.changed, others, identities)
    generations.save(context, generation)
    digest = fingerprint(found.sums.hex_digest, facts["images_digest"])
    facts = {**facts, **counts, "places": places, "other_captions": found.other_captions}
    return Output(found.folder, digest, {**facts, "layers": ranges.layers(found.folder)[:-1]})


@dataclasses.dataclass(frozen=True)
class _Selected:
    """Selection that the stage wrote."""

    folder: str
    sums: Sums
    changed: int
    """Rows in all layers but the first."""
    other_captions: int
    """Kept rows with the bytes of an earlier kept row."""
    lookups: list[str]
    """Folders of the look-ups of all layers; none if hashes may differ."""
    places: EarlierPlaces | None = None
    """Places to continue, if there are any."""


def _settings(config: DedupConfig) -> str:
    return fingerprint(dedup.version, to_dict(config))


def _select_all(context: StageContext, config: DedupConfig, filter: Artifact) -> _Selected:
    facts, key_ranges = filter.facts, ranges.ranges(ranges.range_count(filter.uri))
    index = index_files(facts["images"], facts["index_version"])
    folder = f"{context.folder}/selection"
    lookups = f"{context.folder}/lookups" if config.phash_distance <= 0 else None
    found = find_duplicates(
        functools.partial(_hashes, filter.uri, index),
        len(key_ranges),
        config.phash_distance,
        f"{context.intermediate}/duplicates",
        functools.partial(_select_range, filter.uri, folder, config.holdout),
        captions=config.keep_captions,
        lookups=lookups,
    )
    sums, other_captions = Sums.total(sums for sums, _ in found), sum(number for _, number in found)
    return _Selected(folder, sums, 0, other_captions, [] if lookups is None else [lookups])


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Layers of the filter's selection, and files of the index, since an earlier generation."""

    layer: Layer
    selection: Sequence[str]
    all_index: Sequence[str]
    index: Sequence[str]


_DUPLICATE = [reason for reason in REASONS if reason]
_COMPARED = ["key", "url", "sha256", "phash", "colour"]
_PLACE = ["key", "part", "row"]


def _find_changes(context: StageContext, config: DedupConfig, filter: Artifact) -> _Changes | None:
    """Find an earlier selection to continue, and what has changed since; None if there is none, or if much has."""
    if config.phash_distance > 0:  # the rows near a new one are not found without the others
        return None
    facts, found = filter.facts, ranges.layers(filter.uri)
    images = facts["images"]

    def layers_known(earlier: Generation) -> int | None:
        selection = earlier.read["selection"]
        is_earlier = selection in found and earlier.read["images"] == images
        count, has_looks = ranges.range_count(earlier.table), config.phash_distance == 0
        is_whole = is_earlier and Lookups(earlier.others["lookups"], count, has_looks).is_whole()
        return found.index(selection) if is_whole else None

    earlier = generations.find(context.store, "dedup", _settings(config), layers_known, [index_identity(images)])
    if earlier is None:
        return None
    selection = found[found.index(earlier.read["selection"]) + 1 :]
    changed = sum(tables.num_rows(uri) for folder in selection for uri in ranges.range_files(folder))
    if changed > MAX_NEW_ROWS or earlier.begins_anew(changed):
        return None
    all_index = index_files(images, facts["index_version"])
    known = set(index_files(images, earlier.read["index_version"]))
    layer = Layer.on(earlier, context, "selection", earlier.read["pairs"])
    return _Changes(layer, selection, all_index, [uri for uri in all_index if uri not in known])


def _continue(
    context: StageContext, config: DedupConfig, facts: Mapping[str, Any], changes: _Changes
) -> _Selected | None:
    """Write a layer with the rows that are new, and those whose fate they change; None if their effects are not limited."""
    layer, earlier = changes.layer, changes.layer.earlier
    key_ranges = layer.key_ranges()
    found = run_all(
        functools.partial(_find_added, changes, config.keep_captions, f"{context.intermediate}/added"), key_ranges
    )
    if any(uris is None for uris in found):
        return None
    added, still = (pa.concat_tables(read_rows(uris[number]) for uris in found if uris) for number in (0, 1))
    folders, has_looks = earlier.others["lookups"], config.phash_distance == 0
    lookups = Lookups(folders, len(key_ranges), has_looks)
    known = lookups.of_bytes(still["digest"].to_numpy()).select(still.column_names)
    if not set(map(tuple, _values(still))) <= set(map(tuple, _values(known))):  # an image has changed
        return None
    effects = find_changes(added.combine_chunks(), lookups, config.keep_captions)
    if effects is None:
        return None
    own = f"{context.folder}/lookups-since-{earlier.name}"
    write_lookups(own, added.combine_chunks(), effects.looks if has_looks else None, len(key_ranges))
    scratch = f"{context.intermediate}/fates"
    for key_range, part in zip(key_ranges, split_rows(effects.fates, len(key_ranges)), strict=True):
        write_rows(f"{scratch}/{key_range}.rows", part)
    kept = KeptRows(layer.folder, *(facts[name] for name in ("images", "images_version", "index_version")))
    write = functools.partial(_write_changes, changes, kept, f"{context.intermediate}/added", scratch, config.holdout)
    sums, changed = layer.finish(run_all(write, key_ranges))
    reasons, before = (effects.fates[name].to_numpy() for name in ("reason", "reason_before"))
    captions = int((reasons == CAPTION).sum()) - int((before == CAPTION).sum())
    other_captions = earlier.others["other_captions"] + captions
    names = file_names(kept.images, earlier.read["images_version"]), file_names(kept.images, kept.images_version)
    places = EarlierPlaces(earlier.read["places"], {"images": names}, f"{layer.folder}/{PLACED}", key_ranges)
    return _Selected(layer.folder, sums, changed, other_captions, [*folders, own], places)


def _values(table: pa.Table) -> list[list[Any]]:
    return [list(row.values()) for row in table.to_pylist()]


def _find_added(changes: _Changes, captions: KeepCaptions, folder: str, key_range: KeyRange) -> tuple[str, str] | None:
    """Write what is compared of the rows of one range that were not compared before, and of those that are in a layer again.

    Returns:
        URIs of both; None if a row that was compared is not any more.
    """
    changed = ranges.read_layers(changes.selection, key_range)
    kept = pc.unique(changed.filter(pc.equal(changed["status"], rows.KEPT))["key"].combine_chunks())
    former = _compared_before(changes.layer, key_range, changed["key"])
    if not pc.all(pc.is_in(former["key"], value_set=kept), min_count=0).as_py():
        return None
    table = find_newest(changes.all_index, changes.index, key_range, kept, [*_COMPARED, *_PLACE[1:]])
    write_rows(f"{folder}/{key_range}.index", table.select(_PLACE))
    was_compared = pc.is_in(table["key"], value_set=former["key"].combine_chunks())
    uris = []
    for name, part in (("added", table.filter(pc.invert(was_compared))), ("still", table.filter(was_compared))):
        uris.append(write_rows(f"{folder}/{key_range}.{name}", compared(part, captions)))
    return uris[0], uris[1]


def _compared_before(layer: Layer, key_range: KeyRange, keys: pa.ChunkedArray) -> pa.Table:
    """Rows of the earlier selection with some keys that were compared, so that they are kept or dropped as duplicates."""
    known = layer.known(key_range, keys)
    before = ranges.find_rows(layer.earlier.table, known.to_pylist())
    is_duplicate = pc.is_in(before["reason"], value_set=pa.array(_DUPLICATE))
    return before.filter(pc.or_(is_duplicate, pc.equal(before["status"], rows.KEPT)))


def _write_changes(
    changes: _Changes, kept: KeptRows, added: str, scratch: str, holdout: float, key_range: KeyRange
) -> tuple[Sums, Sums]:
    """Write the rows of one range that are new or changed, and their places; see `Layer.write`.

    Args:
        added: folder of `_find_added`.
        scratch: folder with the fates of the range.
    """
    layer, fates = changes.layer, read_rows(f"{scratch}/{key_range}.rows")
    keys, first = (
        key_texts(np.stack([fates[f"{name}high"].to_numpy(), fates[f"{name}low"].to_numpy()], axis=1))
        for name in ("", "first_")
    )
    listed = ranges.read_layers(changes.selection, key_range)
    others = keys.filter(pc.invert(pc.is_in(keys, value_set=listed["key"].combine_chunks())))
    again = ranges.find_rows(layer.earlier.table, others.to_pylist())
    # Rows in a layer again, which keep their fate unless it is changed.
    former = _compared_before(layer, key_range, listed["key"])
    former = former.filter(pc.invert(pc.is_in(former["key"], value_set=keys)))
    again = rows.undrop(again, _DUPLICATE).select(listed.column_names).cast(listed.schema)
    reasons = pa.array(REASONS, pa.string()).take(fates["reason"].combine_chunks())
    dropped = pa.table({"key": keys, "reason": reasons}).filter(reasons.is_valid())
    dropped = pa.concat_tables(
        [dropped, former.filter(former["reason"].is_valid()).select(["key", "reason"]).cast(dropped.schema)]
    )
    table = rows.drop(pa.concat_tables([listed, again]), dropped)
    is_caption = pc.equal(fates["reason"], CAPTION)
    split = splits(table, holdout, pa.table({"key": keys, "first": first}).filter(is_caption))
    before = former["split"].take(pc.index_in(table["key"], value_set=former["key"].combine_chunks()))
    before = pc.if_else(pc.equal(table["status"], rows.KEPT), before, pa.scalar(None, pa.string()))
    table = table.append_column("split", pc.coalesce(before, split))
    is_kept = pc.equal(table["status"], rows.KEPT)
    wanted = table.filter(is_kept).select(["key", "split"])
    index = read_rows(f"{added}/{key_range}.index")
    others = wanted["key"].filter(pc.invert(pc.is_in(wanted["key"], value_set=index["key"].combine_chunks())))
    if len(others):
        index = pa.concat_tables([index, ranges.find_rows(changes.all_index, others.to_pylist(), _PLACE)])
    write_changed(
        f"{layer.folder}/{PLACED}", key_range, kept.place(wanted, index), pc.unique(table["key"].combine_chunks())
    )
    return layer.write(key_range, table)


def _hashes(selection: str, index: Sequence[str], key_range: KeyRange) -> pa.Table:
    """Key, URL, sha256, phash and colour of the kept rows of one range, sorted by key."""
    table = ranges.read_range(selection, key_range, ["key", "status"])
    kept = table.filter(pc.equal(table["status"], rows.KEPT)).select(["key"])
    return kept.join(read_index(index, key_range, ["key", "url", "sha256", "phash", "colour"]), "key").sort_by("key")


def _select_range(
    selection: str, folder: str, holdout: float, key_range: KeyRange, duplicates: pa.Table
) -> tuple[Sums, int]:
    """Write the selection of one range without the duplicates; returns its sums and the number of kept captions but the first."""
    dropped, captions = (duplicates.filter(mask(duplicates["reason"])) for mask in (pc.is_valid, pc.is_null))
    table = rows.drop(ranges.read_range(selection, key_range), dropped)
    table = table.append_column("split", splits(table, holdout, captions))
    ranges.write_range(folder, key_range, table)
    return Sums.of(table), captions.num_rows


def splits(selection: pa.Table, holdout: float, captions: pa.Table | None = None) -> pa.Array:
    """Split of each row: train or holdout if it is kept, else null.

    It depends on the key alone, so no row of an image with one caption changes its split; the other captions of an image have
    the split of its first row.

    Args:
        captions: key, first (key of the first row of the image) of these other captions.
    """
    key = selection["key"]
    if captions is not None and captions.num_rows:
        key = pc.coalesce(captions["first"].take(pc.index_in(key, value_set=captions["key"])), key)
    is_kept = pc.equal(selection.column("status"), rows.KEPT)
    is_held_out = pa.array(ranges.fractions(key) < holdout)
    return pc.if_else(is_kept, pc.if_else(is_held_out, "holdout", "train"), pa.scalar(None, pa.string()))
