"""Clusters of duplicates: kept rows, each with the rows that were dropped as copies of it.

The kept rows are searched range by range, and the embeddings file by file, so no process holds all of them.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import ranges, rows, tables
from tasks.dataflow import exchange, run_all
from tasks.index import read_index
from tasks.keys import hex_numbers
from tasks.near_duplicates import COLOUR_CELL
from tasks.ranges import KeyRange
from unclip.data import vectors

AnnotatedKeys = list[tuple[str, str]]
"""Pairs of a key and a note on it."""

_COLUMNS = ["key", "sha256", "phash", "colour"]
_FILES_AT_ONCE = 64

_SAME_COLOUR = 2 * COLOUR_CELL - 1  # levels of 255 by which mean colours of near duplicates may differ at most

_Winner = tuple[bool, float, str]
"""True if the colours differ, the distance from the duplicate, and the key of the kept row; the smallest wins."""


def duplicate_clusters(
    duplicates: Mapping[str, str], selection: str, index_files: Sequence[str], embeddings_files: Sequence[str]
) -> list[AnnotatedKeys]:
    """Clusters of a kept row and the duplicates that were dropped in its favour.

    Args:
        duplicates: key -> reason; a few rows. Those without a row in the index are omitted.
        selection: folder of range files: key, status, reason.
        index_files: see `tasks.index.index_files`.
        embeddings_files: files of the embeddings table.
    """
    if not (duplicates and index_files):
        return []
    facts = ranges.find_rows(index_files, list(duplicates), _COLUMNS)
    found = {row["key"]: row for row in facts.to_pylist()}
    compared_by = {"duplicate_image": "sha256", "near_duplicate": "phash", "semantic_duplicate": "key"}
    by_reason = {
        name: [key for key in duplicates if duplicates[key] == name and found.get(key, {}).get(column)]
        for name, column in compared_by.items()  # null if the image has changed since
    }
    digests = {found[key]["sha256"] for key in by_reason["duplicate_image"]}
    looks = {key: (found[key]["phash"], found[key]["colour"]) for key in by_reason["near_duplicate"]}
    all_ranges = ranges.ranges(ranges.range_count(selection))
    same: dict[str, str] = {}
    near: dict[str, _Winner] = {}
    if digests or looks:
        search = functools.partial(_search_range, selection, index_files, digests, looks)
        for same_here, near_here in run_all(search, all_ranges):
            same = same_here | same  # the first range has the smallest keys
            _keep_nearest(near, near_here)
    semantic = _nearest_embeddings(by_reason["semantic_duplicate"], selection, embeddings_files)

    clusters: dict[str, AnnotatedKeys] = {}

    def add(winner: str, key: str, note: str) -> None:
        clusters.setdefault(winner, [(winner, "kept")]).append((key, note))

    for key in by_reason["duplicate_image"]:
        if found[key]["sha256"] in same:
            add(same[found[key]["sha256"]], key, "same bytes")
    for key in by_reason["near_duplicate"]:
        if key in near:
            add(near[key][-1], key, f"{near[key][1]:g} of 64 bits differ")
    for key in by_reason["semantic_duplicate"]:
        if key in semantic:
            add(semantic[key][-1], key, f"cosine {-semantic[key][1]:.3f}")
    return list(clusters.values())


def _keep_nearest(winners: dict[str, _Winner], others: Mapping[str, _Winner]) -> None:
    for key, winner in others.items():
        winners[key] = min(winner, winners.get(key, winner))


def _kept_keys(selection: str, key_range: KeyRange) -> pa.Array:
    table = ranges.read_range(selection, key_range, ["key", "status"])
    return pc.unique(table.filter(pc.equal(table["status"], rows.KEPT))["key"])


def _search_range(
    selection: str,
    index_files: Sequence[str],
    digests: set[str],
    looks: Mapping[str, tuple[str, str | None]],
    key_range: KeyRange,
) -> tuple[dict[str, str], dict[str, _Winner]]:
    """Smallest kept key of each digest, and the kept row that looks most like each duplicate, in one range.

    Args:
        looks: key -> perceptual hash, and mean colour if it is known.
    """
    images = read_index(index_files, key_range, _COLUMNS)
    images = images.filter(pc.is_in(images["key"], value_set=_kept_keys(selection, key_range)))
    wanted = images.filter(pc.is_in(images["sha256"], value_set=pa.array(sorted(digests), pa.string())))
    same: dict[str, str] = {}
    for key, digest in zip(wanted["key"].to_pylist(), wanted["sha256"].to_pylist(), strict=True):
        same.setdefault(digest, key)
    near: dict[str, _Winner] = {}
    hashed = images.filter(pc.is_valid(images["phash"])) if looks else images.slice(0, 0)
    hashes = hex_numbers(hashed["phash"], 16)[:, 0]
    colours = _levels(hashed["colour"])
    for key, (phash, colour) in looks.items() if len(hashes) else ():
        distances = np.bitwise_count(hashes ^ np.uint64(int(phash, 16)))
        # an unknown colour is NaN and differs from none
        differ = (np.abs(colours - _levels(pa.chunked_array([[colour]], pa.string()))) > _SAME_COLOUR).any(axis=1)
        nearest = int(np.lexsort((distances, differ))[0])
        near[key] = (bool(differ[nearest]), float(distances[nearest]), hashed["key"][nearest].as_py())
    return same, near


def _levels(colours: pa.ChunkedArray) -> np.ndarray:
    """Levels of colours, which are 6 hex digits: [N, 3] float; NaN for an unknown colour."""
    values = hex_numbers(colours, 6)[:, 0]
    levels = np.stack([values >> np.uint64(shift) & np.uint64(255) for shift in (16, 8, 0)], axis=1).astype(float)
    levels[colours.is_null().to_numpy()] = np.nan
    return levels


def _nearest_embeddings(keys: Sequence[str], selection: str, embeddings_files: Sequence[str]) -> dict[str, _Winner]:
    """Kept row with the largest cosine to each of some rows; its distance is minus the cosine."""
    groups = [
        embeddings_files[start : start + _FILES_AT_ONCE] for start in range(0, len(embeddings_files), _FILES_AT_ONCE)
    ]
    if not (keys and groups):
        return {}
    queries: dict[str, np.ndarray] = {}
    for own in run_all(functools.partial(_embeddings_of, list(keys)), groups):
        queries |= own
    count = ranges.range_count(selection)
    split = functools.partial(_cosines, queries, count)
    winners: dict[str, _Winner] = {}
    for nearest in exchange(split, groups, count, functools.partial(_nearest_kept, list(queries), selection, count)):
        _keep_nearest(winners, nearest)
    return winners


def _embeddings_of(keys: Sequence[str], uris: Sequence[str]) -> dict[str, np.ndarray]:
    wanted = pa.array(sorted(keys), pa.string())
    found: dict[str, np.ndarray] = {}
    for uri in uris:
        if tables.has_keys(uri, wanted):
            table = tables.read_file(uri, ["key", "image_embedding"])
            table = table.filter(pc.is_in(table["key"], value_set=wanted))
            found.update(zip(table["key"].to_pylist(), vectors(table["image_embedding"]), strict=True))
    return found


def _cosines(queries: Mapping[str, np.ndarray], count: int, uris: Sequence[str]) -> list[pa.Table]:
    """Cosine of every embedding of some files with each query, by range of the keys."""
    parts = []
    for uri in uris:
        table = tables.read_file(uri, ["key", "image_embedding"])
        embeddings = vectors(table["image_embedding"])
        columns = {str(number): embeddings @ query for number, query in enumerate(queries.values())}
        parts.append(pa.table({"key": table["key"], **columns}))
    return ranges.split_by_key(pa.concat_tables(parts), count)


def _nearest_kept(
    queries: Sequence[str], selection: str, count: int, output: int, pieces: list[pa.Table]
) -> dict[str, _Winner]:
    table = pa.concat_tables(pieces)
    table = table.filter(pc.is_in(table["key"], value_set=_kept_keys(selection, KeyRange(output, count)))).sort_by(
        "key"
    )
    winners: dict[str, _Winner] = {}
    for number, query in enumerate(queries if table.num_rows else ()):
        cosines = table[str(number)].to_numpy()
        nearest = int(cosines.argmax())
        winners[query] = (False, -float(cosines[nearest]), table["key"][nearest].as_py())
    return winners
