"""Stage `dedup`: of identical or nearly identical images, keep the one with the smallest key; then split the kept rows.

The kept image depends on keys alone, not on the order of the list or of the downloads.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import ranges, rows, tables
from tasks.dataflow import run_all
from tasks.index import index_files, read_index
from tasks.places import KeptRows, write_places
from tasks.ranges import KeyRange
from tasks.stage import Artifact, Output, StageContext, stage
from unclip import files
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


@stage("dedup", version=2)
def dedup(context: StageContext, config: DedupConfig, filter: Artifact) -> Output:
    """Drop images with the same bytes as another and images that look the same; hold out some of the others."""
    facts, key_ranges = filter.facts, ranges.ranges(ranges.range_count(filter.uri))
    index = index_files(facts["images"], facts["index_version"])
    duplicates, folder = f"{context.folder}/duplicates", f"{context.folder}/selection"
    find_duplicates(key_ranges, functools.partial(_hashes, filter.uri, index), config.phash_distance, duplicates)
    found = run_all(functools.partial(_select_range, filter.uri, duplicates, folder, config.holdout), key_ranges)
    files.delete(duplicates)
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
    selection: str, duplicates: str, folder: str, holdout: float, key_range: KeyRange
) -> tuple[dict[str, Any], int]:
    """Write the selection of one range without the duplicates; returns its counts and digest."""
    table = rows.drop(ranges.read_range(selection, key_range), ranges.read_range(duplicates, key_range))
    table = table.append_column("split", splits(table, holdout))
    ranges.write_range(folder, key_range, table)
    return rows.count(table), tables.rows_digest(table.drop_columns("position"))


def find_duplicates(
    key_ranges: Sequence[KeyRange], read: Callable[[KeyRange], pa.Table], distance: int, folder: str
) -> None:
    kept = pa.concat_tables(map(read, key_ranges))
    keys, hashes = kept.column("key").to_pylist(), kept.column("phash").to_pylist()
    reasons: dict[str, str] = {}
    _, first = np.unique(kept.column("sha256").to_numpy().astype(str), return_index=True)
    for index in sorted(set(range(len(keys))) - set(first.tolist())):
        reasons[keys[index]] = "duplicate_image"
    if distance >= 0:
        comparable = [index for index in first.tolist() if hashes[index] is not None]
        comparable.sort()
        for index in near_duplicates([int(hashes[index], 16) for index in comparable], distance):
            reasons[keys[comparable[index]]] = "near_duplicate"
    table = pa.table({"key": pa.array(reasons, pa.string()), "reason": pa.array(reasons.values(), pa.string())})
    for key_range, part in zip(key_ranges, ranges.split_by_key(table, len(key_ranges)), strict=True):
        ranges.write_range(folder, key_range, part)


def splits(selection: pa.Table, holdout: float) -> pa.Array:
    """Split of each row: train or holdout if it is kept, else null. It depends on the key alone, so no row changes its split."""
    is_kept = pc.equal(selection.column("status"), rows.KEPT)
    is_held_out = pa.array(ranges.fractions(selection.column("key")) < holdout)
    return pc.if_else(is_kept, pc.if_else(is_held_out, "holdout", "train"), pa.scalar(None, pa.string()))


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
