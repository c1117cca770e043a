"""Stage `dedup`: of identical or nearly identical images, keep the one with the smallest key; then split the kept rows.

The kept image depends on keys alone, not on the order of the list or of the downloads. A row is an image with a caption: all
captions of a kept image's URL are kept with it, and are on the same side of the split.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc

from tasks import ranges, rows, tables
from tasks.find_duplicates import KeepCaptions, find_duplicates
from tasks.index import index_files, read_index
from tasks.near_duplicates import MAX_DISTANCE
from tasks.places import KeptRows, write_places
from tasks.ranges import KeyRange
from tasks.stage import Artifact, Output, StageContext, stage
from unclip.config import fingerprint, require


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
    """Drop images with the same bytes as another and images that look the same; hold out some of the others."""
    facts, key_ranges = filter.facts, ranges.ranges(ranges.range_count(filter.uri))
    index = index_files(facts["images"], facts["index_version"])
    folder = f"{context.folder}/selection"
    found = find_duplicates(
        functools.partial(_hashes, filter.uri, index),
        len(key_ranges),
        config.phash_distance,
        f"{context.intermediate}/duplicates",
        functools.partial(_select_range, filter.uri, folder, config.holdout),
        captions=config.keep_captions,
    )
    counts = rows.add_counts(counts for counts, *_ in found)
    other_captions = sum(number for *_, number in found)
    context.tracker.metrics(counts["rows"])

    kept = KeptRows(folder, facts["images"], facts["images_version"], facts["index_version"])
    places = f"{context.folder}/places"
    write_places(places, key_ranges, kept.read, kept.num_files(), counts["rows"][rows.KEPT])
    digest = fingerprint(tables.hex_digest(*(digest for _, digest, _ in found)), facts["images_digest"])
    return Output(folder, digest, {**facts, **counts, "places": places, "other_captions": other_captions})


def _hashes(selection: str, index: Sequence[str], key_range: KeyRange) -> pa.Table:
    """Key, URL, sha256, phash and colour of the kept rows of one range, sorted by key."""
    table = ranges.read_range(selection, key_range, ["key", "status"])
    kept = table.filter(pc.equal(table["status"], rows.KEPT)).select(["key"])
    return kept.join(read_index(index, key_range, ["key", "url", "sha256", "phash", "colour"]), "key").sort_by("key")


def _select_range(
    selection: str, folder: str, holdout: float, key_range: KeyRange, duplicates: pa.Table
) -> tuple[dict[str, Any], int, int]:
    """Write the selection of one range without the duplicates; returns its counts, digest and kept captions but the first."""
    dropped, captions = (duplicates.filter(mask(duplicates["reason"])) for mask in (pc.is_valid, pc.is_null))
    table = rows.drop(ranges.read_range(selection, key_range), dropped)
    table = table.append_column("split", splits(table, holdout, captions))
    ranges.write_range(folder, key_range, table)
    return rows.count(table), tables.rows_digest(table.drop_columns("position")), captions.num_rows


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
