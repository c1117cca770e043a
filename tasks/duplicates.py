"""Clusters of duplicates: kept rows, each with the rows that were dropped as copies of it.

The kept rows are searched range by range, and the embeddings file by file, so no process holds all of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import ranges, rows, tables
from tasks.dataflow import exchange, run_all
from tasks.index import find_newest, read_index
from tasks.keys import hex_numbers, key_texts
from tasks.near_duplicates import COLOUR_CELL
from tasks.new_duplicates import Lookups
from tasks.ranges import KeyRange
from unclip.data import vectors

AnnotatedKeys = list[tuple[str, str]]
"""Pairs of a key and a note on it."""

_COLUMNS = ["key", "sha256", "phash", "colour"]
_FILES_AT_ONCE = 64
_MAX_LOOKED_UP = 10_000

_SAME_COLOUR = 2 * COLOUR_CELL - 1  # levels of 255 by which mean colours of near duplicates may differ at most

Winner = tuple[bool, float, str]
"""True if the colours differ, the distance from the duplicate, and the key of the kept row; the smallest wins."""


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Winners that an earlier refresh found, and what has changed since."""

    winners: Mapping[str, Winner | None]
    """Winners of duplicates that have not changed, nor have the winners; None for those that had none."""
    selection: Sequence[str]
    """Later layers of the selection; they have all rows that have changed."""
    index: Sequence[str]
    """New files of the index."""
    lookups: Lookups | None
    """Look-ups of all rows that were compared, if there are any."""


def duplicate_clusters(
    duplicates: Mapping[str, str], selection: str, index_files: Sequence[str], embeddings_files: Sequence[str]
) -> list[AnnotatedKeys]:
    """Clusters of a kept row and the duplicates that were dropped in its favour; see `find_winners`."""
    return clusters_of(duplicates, find_winners(duplicates, selection, index_files, embeddings_files))


def clusters_of(duplicates: Mapping[str, str], winners: Mapping[str, Winner]) -> list[AnnotatedKeys]:
    """Clusters of a kept row and its duplicates, in the order of the duplicates' reasons.

    Args:
        duplicates: see `find_winners`; those without a winner are omitted.
    """
    notes: Mapping[str, Callable[[float], str]] = {
        "duplicate_image": lambda _: "same bytes",
        "near_duplicate": lambda distance: f"{distance:g} of 64 bits differ",
        "semantic_duplicate": lambda distance: f"cosine {-distance:.3f}",
    }
    clusters: dict[str, AnnotatedKeys] = {}
    for reason, note in notes.items():
        for key in [key for key in duplicates if duplicates[key] == reason and key in winners]:
            _, distance, winner = winners[key]
            clusters.setdefault(winner, [(winner, "kept")]).append((key, note(distance)))
    return list(clusters.values())


def find_winners(
    duplicates: Mapping[str, str],
    selection: str,
    index_files: Sequence[str],
    embeddings_files: Sequence[str],
    earlier: Earlier | None = None,
) -> dict[str, Winner]:
    """Find the kept row in whose favour each duplicate was dropped.

    Args:
        duplicates: key -> reason; a few rows. Those without a row in the index are omitted.
        selection: folder of range files: key, status, reason.
        index_files: see `tasks.index.index_files`.
        embeddings_files: files of the embeddings table.
        earlier: then all rows are searched only for what neither earlier winners nor look-ups tell.
    """
    if not (duplicates and index_files):
        return {}
    facts = ranges.find_rows(index_files, list(duplicates), _COLUMNS)
    found = {row["key"]: row for row in facts.to_pylist()}
    compared_by = {"duplicate_image": "sha256", "near_duplicate": "phash", "semantic_duplicate": "key"}
    by_reason = {
        name: [key for key in duplicates if duplicates[key] == name and found.get(key, {}).get(column)]
        for name, column in compared_by.items()  # null if the image has changed since
    }
    same = {key: found[key]["sha256"] for key in by_reason["duplicate_image"]}
    looks = {key: (found[key]["phash"], found[key]["colour"]) for key in by_reason["near_duplicate"]}
    queries = _Queries(same, looks)
    all_ranges = ranges.ranges(ranges.range_count(selection))
    winners: dict[str, Winner] = {}
    if earlier is not None:
        known = {key: winner for key, winner in earlier.winners.items() if key in duplicates}
        read = functools.partial(_read_changed, earlier.selection, index_files, earlier.index)
        winners = _search_all(queries.of(known), read, all_ranges)
        _keep_nearest(winners, {key: winner for key, winner in known.items() if winner is not None})
        queries = queries.without(known)
        if earlier.lookups is not None:
            decided = _look_up(queries, earlier.lookups, selection, index_files)
            winners |= {key: winner for key, winner in decided.items() if winner is not None}
            queries = queries.without(decided)
    winners |= _search_all(queries, functools.partial(_read_kept, selection, index_files), all_ranges)
    return winners | _nearest_embeddings(by_reason["semantic_duplicate"], selection, embeddings_files)


@dataclasses.dataclass(frozen=True)
class _Queries:
    """Images of duplicates."""

    same: Mapping[str, str]
    """Key -> sha256 of the bytes."""
    looks: Mapping[str, tuple[str, str | None]]
    """Key -> perceptual hash, and mean colour if it is known."""

    def of(self, keys: Collection[str]) -> "_Queries":
        parts = ({key: value for key, value in each.items() if key in keys} for each in (self.same, self.looks))
        return _Queries(*parts)  # type: ignore[arg-type]

    def without(self, keys: Collection[str]) -> "_Queries":
        return self.of({*self.same, *self.looks}.difference(keys))


def _search_all(
    queries: _Queries, read: Callable[[KeyRange], pa.Table], key_ranges: Sequence[KeyRange]
) -> dict[str, Winner]:
    """Winners among some kept rows of all ranges; `read` reads their rows of the index."""
    winners: dict[str, Winner] = {}
    if queries.same or queries.looks:
        for here in run_all(functools.partial(_search_range, read, queries), key_ranges):
            _keep_nearest(winners, here)
    return winners


def _look_up(
    queries: _Queries, lookups: Lookups, selection: str, index_files: Sequence[str]
) -> dict[str, Winner | None]:
    """Winner of each duplicate for which the look-ups tell it; None if it has none."""
    looks = queries.looks if lookups.has_looks else {}
    hashes = hex_numbers(pa.array([phash for phash, _ in looks.values()], pa.string()), 16)[:, 0]
    # Of the rows with a hash, only the first of each colour, and others with the same bytes, can be kept.
    firsts = lookups.of_looks(hashes)["digest"].to_numpy() if len(hashes) else np.zeros(0, np.uint64)
    digests = hex_numbers(pa.array(list(queries.same.values()), pa.string()), 64)[:, 0]
    digests = np.concatenate([digests, firsts])
    found = lookups.of_bytes(digests) if len(digests) else None
    if found is None or found.num_rows > _MAX_LOOKED_UP:
        return {}
    keys = key_texts(np.stack([found["high"].to_numpy(), found["low"].to_numpy()], axis=1))
    selected = ranges.find_rows(selection, keys.to_pylist(), ["key", "status"])
    kept = selected.filter(pc.equal(selected["status"], rows.KEPT))["key"].to_pylist()
    images = ranges.find_rows(index_files, kept, _COLUMNS)
    winners = _search(images, _Queries(queries.same, looks))
    decided: dict[str, Winner | None] = {key: winners.get(key) for key in queries.same}
    # Rows with other hashes are not found, so only a winner that nothing can beat is one.
    return decided | {key: winners[key] for key in looks if key in winners and winners[key][:2] == (False, 0.0)}


def _keep_nearest(winners: dict[str, Winner], others: Mapping[str, Winner]) -> None:
    for key, winner in others.items():
        winners[key] = min(winner, winners.get(key, winner))


def _kept_keys(selection: str, key_range: KeyRange) -> pa.Array:
    table = ranges.read_range(selection, key_range, ["key", "status"])
    return pc.unique(table.filter(pc.equal(table["status"], rows.KEPT))["key"])


def _read_kept(selection: str, index_files: Sequence[str], key_range: KeyRange) -> pa.Table:
    """Rows of the index of the kept rows in one range."""
    images = read_index(index_files, key_range, _COLUMNS)
    return images.filter(pc.is_in(images["key"], value_set=_kept_keys(selection, key_range)))


def _read_changed(
    layers: Sequence[str], index_files: Sequence[str], new: Sequence[str], key_range: KeyRange
) -> pa.Table:
    """Rows of the index of the kept rows in one range of some layers."""
    table = ranges.read_layers(layers, key_range, ["key", "status"])
    kept = pc.unique(table.filter(pc.equal(table["status"], rows.KEPT))["key"].combine_chunks())
    return find_newest(index_files, new, key_range, kept, _COLUMNS)


def _search_range(read: Callable[[KeyRange], pa.Table], queries: _Queries, key_range: KeyRange) -> dict[str, Winner]:
    return _search(read(key_range), queries)


def _search(images: pa.Table, queries: _Queries) -> dict[str, Winner]:
    """Search some kept rows for the first with the bytes of each duplicate, and for the first that looks most like it.

    Args:
        images: their rows of the index, sorted by key.
    """
    digests = pa.array(sorted(set(queries.same.values())), pa.string())
    wanted = images.filter(pc.is_in(images["sha256"], value_set=digests))
    firsts: dict[str, str] = {}
    for key, digest in zip(wanted["key"].to_pylist(), wanted["sha256"].to_pylist(), strict=True):
        firsts.setdefault(digest, key)
    winners: dict[str, Winner] = {
        key: (False, 0.0, firsts[digest]) for key, digest in queries.same.items() if digest in firsts
    }
    hashed = images.filter(pc.is_valid(images["phash"])) if queries.looks else images.slice(0, 0)
    hashes = hex_numbers(hashed["phash"], 16)[:, 0]
    colours = _levels(hashed["colour"])
    for key, (phash, colour) in queries.looks.items() if len(hashes) else ():
        distances = np.bitwise_count(hashes ^ np.uint64(int(phash, 16)))
        # an unknown colour is NaN and differs from none
        differ = (np.abs(colours - _levels(pa.chunked_array([[colour]], pa.string()))) > _SAME_COLOUR).any(axis=1)
        nearest = int(np.lexsort((distances, differ))[0])
        winners[key] = (bool(differ[nearest]), float(distances[nearest]), hashed["key"][nearest].as_py())
    return winners


def _levels(colours: pa.ChunkedArray) -> np.ndarray:
    """Levels of colours, which are 6 hex digits: [N, 3] float; NaN for an unknown colour."""
    values = hex_numbers(colours, 6)[:, 0]
    levels = np.stack([values >> np.uint64(shift) & np.uint64(255) for shift in (16, 8, 0)], axis=1).astype(float)
    levels[colours.is_null().to_numpy()] = np.nan
    return levels


def _nearest_embeddings(keys: Sequence[str], selection: str, embeddings_files: Sequence[str]) -> dict[str, Winner]:
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
    winners: dict[str, Winner] = {}
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
) -> dict[str, Winner]:
    table = pa.concat_tables(pieces)
    table = table.filter(pc.is_in(table["key"], value_set=_kept_keys(selection, KeyRange(output, count)))).sort_by(
        "key"
    )
    winners: dict[str, Winner] = {}
    for number, query in enumerate(queries if table.num_rows else ()):
        cosines = table[str(number)].to_numpy()
        nearest = int(cosines.argmax())
        winners[query] = (False, -float(cosines[nearest]), table["key"][nearest].as_py())
    return winners
