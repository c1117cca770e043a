"""Stage `dedup`: of identical or nearly identical images, keep the one with the smallest key; then split the kept rows.

The kept image depends on keys alone, not on the order of the list or of the downloads.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import rows, tables
from tasks.stage import Artifact, Output, StageContext, stage
from unclip.config import fingerprint, require

MAX_DISTANCE = 7


@dataclasses.dataclass(frozen=True)
class DedupConfig:
    phash_distance: int = 0
    """Largest number of differing bits (of 64) between the perceptual hashes of duplicates; -1 compares only exact bytes."""
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
    images = tables.read(facts["images"], facts["images_version"], ["key", "sha256", "phash"])
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
        images: key, sha256, phash of at least the kept rows.
        phash_distance: see `DedupConfig`.
    """
    kept = selection.filter(pc.equal(selection.column("status"), rows.KEPT)).select(["key"])
    kept = kept.join(images, "key", join_type="left outer").sort_by("key")
    keys, hashes = kept.column("key").to_pylist(), kept.column("phash").to_pylist()
    reasons: dict[str, str] = {}
    _, first = np.unique(kept.column("sha256").to_numpy().astype(str), return_index=True)
    for index in sorted(set(range(len(keys))) - set(first.tolist())):
        reasons[keys[index]] = "duplicate_image"
    if phash_distance >= 0:
        comparable = [index for index in first.tolist() if hashes[index] is not None]
        comparable.sort()
        for index in near_duplicates([int(hashes[index], 16) for index in comparable], phash_distance):
            reasons[keys[comparable[index]]] = "near_duplicate"

    return rows.drop(selection, reasons)


def splits(selection: pa.Table, holdout: float) -> pa.Array:
    """Split of each row: train or holdout if it is kept, else null. It depends on the key alone, so no row changes its split."""
    kept = pc.equal(selection.column("status"), rows.KEPT).to_pylist()
    keys = selection.column("key").to_pylist()
    # Keys are hashes, so their first digits are uniformly distributed.
    assigned = ["holdout" if int(key[:8], 16) < holdout * 2**32 else "train" for key in keys]
    return pa.array([split if is_kept else None for split, is_kept in zip(assigned, kept, strict=True)], pa.string())


def near_duplicates(hashes: Sequence[int], distance: int) -> set[int]:
    """Indices of 64-bit hashes within `distance` bits of an earlier hash.

    Hashes that differ in at most `distance` bits agree in one of `distance + 1` bands of bits; only such pairs are compared.
    """
    values = np.array(hashes, dtype=np.uint64)
    found: set[int] = set()
    edges = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        bands = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(bands, kind="stable")
        starts = np.flatnonzero(np.diff(bands[order], prepend=bands[order[:1]] + np.uint64(1)))
        for group in np.split(order, starts[1:]):
            for place in range(1, len(group)):
                differing = np.bitwise_count(values[group[:place]] ^ values[group[place]])
                if (differing <= distance).any():
                    found.add(int(group[place]))
    return found
