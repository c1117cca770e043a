"""Clusters of duplicates: kept rows, each with the rows that were dropped as copies of it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from tasks import tables
from tasks.rows import DUPLICATES
from tasks.snapshots import Snapshot
from unclip.data import vectors

AnnotatedKeys = list[tuple[str, str]]
"""Pairs of a key and a note on it."""


def duplicate_clusters(
    fates: Mapping[str, str], kept: Sequence[str], images: pa.Table, snapshot: Snapshot, count: int
) -> list[AnnotatedKeys]:
    """Clusters of a kept row and the duplicates that were dropped in its favour.

    Args:
        fates: key -> "kept", or the reason why it was not kept.
        kept: kept keys; some may have been taken down since.
        images: key, sha256, phash.
        snapshot: the dataset version whose embeddings are read.
        count: maximum number of duplicates per reason.
    """
    facts = {row["key"]: row for row in images.to_pylist()}
    by_reason: dict[str, list[str]] = defaultdict(list)
    for key, fate in fates.items():
        if fate in DUPLICATES and key in facts:
            by_reason[fate].append(key)
    clusters: dict[str, AnnotatedKeys] = {}

    def add(winner: str, key: str, note: str) -> None:
        clusters.setdefault(winner, [(winner, "kept")]).append((key, note))

    by_hash = {facts[key]["sha256"]: key for key in reversed(kept) if key in facts}
    for key in by_reason["duplicate_image"][:count]:
        if facts[key]["sha256"] in by_hash:
            add(by_hash[facts[key]["sha256"]], key, "same bytes")
    hashed = [key for key in kept if key in facts and facts[key]["phash"]]
    hashes = np.array([int(facts[key]["phash"], 16) for key in hashed], np.uint64)
    for key in by_reason["near_duplicate"][:count]:
        distances = np.bitwise_count(hashes ^ np.uint64(int(facts[key]["phash"], 16)))
        if len(distances):
            nearest = int(distances.argmin())
            add(hashed[nearest], key, f"{distances[nearest]} of 64 bits differ")
    semantic = by_reason["semantic_duplicate"][:count]
    if semantic:
        embedded = tables.read(snapshot.embeddings, snapshot.embeddings_version, ["key", "image_embedding"])
        place = {key: index for index, key in enumerate(embedded["key"].to_pylist())}
        embeddings = vectors(embedded["image_embedding"])
        candidates = [key for key in kept if key in place]
        candidate_embeddings = embeddings[[place[key] for key in candidates]]
        for key in semantic if candidates else ():
            cosines = candidate_embeddings @ embeddings[place[key]]
            nearest = int(cosines.argmax())
            add(candidates[nearest], key, f"cosine {cosines[nearest]:.3f}")
    return list(clusters.values())
