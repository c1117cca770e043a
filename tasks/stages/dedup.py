"""Stage `dedup`: of identical or nearly identical images, keep the one with the smallest key; then split the kept rows.

The kept image depends on keys alone, not on the order of the list or of the downloads.
"""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import rows, tables
from tasks.near_duplicates import MAX_DISTANCE, colour_cells, hex_numbers, near_duplicates
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


@stage("dedup", version=1)
def dedup(context: StageContext, config: DedupConfig, filter: Artifact) -> Output:
    """Drop images with the same bytes as another and images that look the same; hold out some of the others."""
    selection = tables.read_file(filter.uri)
    facts = filter.facts
    images = tables.read(facts["images"], facts["images_version"], ["key", "sha256", "phash", "colour"])
    deduplicated = drop_duplicates(selection, images, config.phash_distance)
    deduplicated = deduplicated.append_column("split", splits(deduplicated, config.holdout))
    counts = rows.count(deduplicated)
    uri = f"{context.folder}/selection.parquet"
    tables.write_file(uri, deduplicated)
    context.tracker.metrics(counts["rows"])
    digest = fingerprint(tables.content_digest(deduplicated.drop_columns("position")), facts["images_digest"])
    return Output(uri, digest, {**facts, **counts})


def drop_duplicates(selection: pa.Table, images: pa.Table, phash_distance: int) -> pa.Table:
    """Drop the duplicates among the kept rows of a selection.

    Args:
        selection: key, position, status, reason; a key is kept at most once.
        images: key, sha256, phash, colour of at least the kept rows.
        phash_distance: see `DedupConfig`.
    """
    kept = selection.filter(pc.equal(selection.column("status"), rows.KEPT)).select(["key"])
    kept = kept.join(images, "key", join_type="left outer").sort_by("key")
    keys = kept.column("key").to_pylist()
    reasons: dict[str, str] = {}
    _, first = np.unique(kept.column("sha256").to_numpy().astype(str), return_index=True)
    for index in sorted(set(range(len(keys))) - set(first.tolist())):
        reasons[keys[index]] = "duplicate_image"
    if phash_distance >= 0:
        comparable = np.sort(first)
        comparable = comparable[kept.column("phash").is_valid().to_numpy()[comparable]]
        looks = kept.take(comparable)
        hashes = hex_numbers(looks.column("phash"), 16)[:, 0]
        found = near_duplicates(hashes, phash_distance, colour_cells(looks.column("colour")))
        for index in comparable[found].tolist():
            reasons[keys[index]] = "near_duplicate"

    return rows.drop(selection, reasons)


def splits(selection: pa.Table, holdout: float) -> pa.Array:
    """Split of each row: train or holdout if it is kept, else null. It depends on the key alone, so no row changes its split."""
    kept = pc.equal(selection.column("status"), rows.KEPT).to_pylist()
    keys = selection.column("key").to_pylist()
    # Keys are hashes, so their first digits are uniformly distributed.
    assigned = ["holdout" if int(key[:8], 16) < holdout * 2**32 else "train" for key in keys]
    return pa.array([split if is_kept else None for split, is_kept in zip(assigned, kept, strict=True)], pa.string())
