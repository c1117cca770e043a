"""Stage `dedup`: of identical or nearly identical images, keep the one with the smallest key; then split the kept rows.

The kept image depends on keys alone, not on the order of the list or of the downloads.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks import ranges, rows, tables
from tasks.find_duplicates import find_duplicates
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
    holdout: float = 0.02
    """Share of the kept pairs that is held out from training, for evaluation."""

    def __post_init__(self) -> None:
        require(
            -1 <= self.phash_distance <= MAX_DISTANCE, "phash_distance", self.phash_distance, f"-1 to {MAX_DISTANCE}"
        )
        require(0 <= self.holdout <= 0.5, "holdout", self.holdout, "a share of at most 0.5")


@stage("dedup", version=2, lists_rows=True)
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
    )
    counts = rows.add_counts(counts for counts, _ in found)
    context.tracker.metrics(counts["rows"])

    kept = KeptRows(folder, facts["images"], facts["images_version"], facts["index_version"])
    places = f"{context.folder}/places"
    write_places(places, key_ranges, kept.read, kept.num_files(), counts["rows"][rows.KEPT])
    digest = fingerprint(tables.hex_digest(*(digest for _, digest in found)), facts["images_digest"])
    return Output(folder, digest, {**facts, **counts, "places": places})


def _hashes(selection: str, index: Sequence[str], key_range: KeyRange) -> pa.Table:
    """Key, sha256, phash and colour of the kept rows of one range, sorted by key."""
    table = ranges.read_range(selection, key_range, ["key", "status"])
    kept = table.filter(pc.equal(table["status"], rows.KEPT)).select(["key"])
    return kept.join(read_index(index, key_range, ["key", "sha256", "phash", "colour"]), "key").sort_by("key")


def _select_range(
    selection: str, folder: str, holdout: float, key_range: KeyRange, duplicates: pa.Table
) -> tuple[dict[str, Any], int]:
    """Write the selection of one range without the duplicates; returns its counts and digest."""
    table = rows.drop(ranges.read_range(selection, key_range), duplicates)
    table = table.append_column("split", splits(table, holdout))
    ranges.write_range(folder, key_range, table)
    return rows.count(table), tables.rows_digest(table.drop_columns("position"))


def splits(selection: pa.Table, holdout: float) -> pa.Array:
    """Split of each row: train or holdout if it is kept, else null. It depends on the key alone, so no row changes its split."""
    is_kept = pc.equal(selection.column("status"), rows.KEPT)
    is_held_out = pa.array(ranges.fractions(selection.column("key")) < holdout)
    return pc.if_else(is_kept, pc.if_else(is_held_out, "holdout", "train"), pa.scalar(None, pa.string()))
