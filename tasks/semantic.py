"""Semantic duplicates (SemDeDup, Abbas et al. 2023): images with nearly the same CLIP embedding, of which the first is kept.

A row is a duplicate if an earlier row that is kept is closer than a distance; rows are compared in clusters, so that the work
grows with the number of rows. Groups of neighbouring clusters are spread over tasks. K-means is trained on a bounded sample
from which near duplicates are removed: many copies of one image then cost one centre, not most of them, and lie in few
clusters.

A duplicate in another cluster lies beyond the plane halfway between the two centres. So a row is also compared with the
members of the clusters whose plane is within the distance, the nearest ones if there are many. That makes the kept row depend
on the order of keys and not on clusters.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import dataflow
from tasks.find_duplicates import in_order_of_keys, key_columns, read_rows, split_by_range, write_rows
from tasks.keys import KEY_DIGITS, hex_numbers, key_texts, pair_octets
from tasks.ranges import KeyRange
from unclip import files

PartT = TypeVar("PartT")
ResultT = TypeVar("ResultT")

NUM_SEARCHED_CLUSTERS = 16
"""Clusters in which a row's duplicates are searched: its own and the nearest ones."""
MAX_CLUSTERS = 8192
"""Clusters of a whole dataset; in a larger one, clusters are larger than asked for, and a row's comparisons more."""
MAX_ROUNDS = 20
"""Rounds in which groups tell each other of rows at their borders; afterwards, each group decides alone."""

_GROUP_ROWS = 1 << 14
_SAMPLE_ROWS = 1 << 12
_MAX_SAMPLE_ROWS = 1 << 15
_BLOCK_ROWS = 2048
_CANDIDATES_AT_ONCE = 4096
_MAX_PARTITIONS = 1024

_SAME = 1e-6  # distance at which centres count as one

# Verdict on a row: no earlier kept row is near it; not yet known; one is near. The worst verdict of its groups decides.
_CLEAR, _UNKNOWN, _NEAR = 0, 1, 2


def semantic_duplicates(
    read: Callable[[PartT], tuple[pa.ChunkedArray, np.ndarray]],
    parts: Sequence[PartT],
    num_rows: int,
    distance: float,
    cluster_size: int,
    scratch: str,
    num_ranges: int,
    use: Callable[[KeyRange, pa.Table], ResultT],
    num_partitions: int | None = None,
    searched_clusters: int = NUM_SEARCHED_CLUSTERS,
    **options: Any,
) -> list[ResultT]:
    """Find the rows whose embedding is close to that of an earlier row, in the order of keys, that is kept.

    No process holds more than the rows of a part, or of some groups. The result depends neither on the division into parts
    nor on `num_partitions`.

    Args:
        read: part -> keys (32 hex digits) and embeddings ([N, E] float32, unit norm). Called twice for each part, in tasks.
        num_rows: number of rows of all parts.
        distance: 1 - cosine of duplicates is less than this.
        cluster_size: mean number of rows of a cluster.
        scratch: URI of a folder for intermediate files, which is deleted at the end; every node must see it.
        num_ranges: number of key ranges of the result.
        use: called in a task for each key range with the rows to drop: key, reason, sorted by key. Like `read`, a
            module-level function or a `functools.partial` of one.
        num_partitions: number of tasks among which groups are divided.
        searched_clusters: clusters in which a row's duplicates are searched; it is sent to their groups.
        options: options of the Ray tasks.

    Returns:
        Results of `use`, in the order of key ranges.
    """
    files.delete(scratch)
    centres, group_of = _train_clusters(read, parts, num_rows, distance, cluster_size, options)
    num_groups = int(group_of.max()) + 1
    count = min(num_groups, num_partitions or _MAX_PARTITIONS)

    def exchange(split: Any, items: Any, num_outputs: int, merge: Any) -> list[Any]:
        return dataflow.exchange(split, items, num_outputs, merge, **options)

    split = functools.partial(_split_by_group, read, centres, group_of, distance, searched_clusters, count)
    decide = functools.partial(_decide_groups, f"{scratch}/00", distance)
    undecided = exchange(split, parts, count, decide)
    folders = [f"{scratch}/00"]
    while sum(undecided):
        folder = f"{scratch}/{len(folders):02d}"
        alone = len(folders) >= MAX_ROUNDS
        split = functools.partial(_split_by_home, folders[-1], count, num_groups)
        decide = functools.partial(_decide_again, folder, folders[-1], distance, alone)
        undecided = exchange(split, range(count), count, decide)
        folders.append(folder)
    found = [[f"{folder}/{index:05d}.found" for folder in folders] for index in range(count)]
    results: list[ResultT] = exchange(
        functools.partial(split_by_range, num_ranges), found, num_ranges, functools.partial(_use_found, use, num_ranges)
    )
    files.delete(scratch)
    return results


def duplicates_in_memory(values: np.ndarray, distance: float, cluster_size: int) -> np.ndarray:
    """Mask of the rows that are closer than `distance` to an earlier row that is kept: [N] bool.

    Up to NUM_SEARCHED_CLUSTERS * cluster_size rows are compared all with all.

    Args:
        values: [N, E] float32, unit norm.
    """
    group = _Group.cut(values, distance, cluster_size)
    is_duplicate: np.ndarray = group.decide(distance, np.zeros(len(values), np.int8)) == _NEAR
    return is_duplicate


class _Group:
    """Rows that are compared in one process, in the order of keys: members, and visitors from other groups.

    Both are compared with earlier members only. `verdicts` [N] int8 say what that gave.
    """

    def __init__(
        self, values: np.ndarray, is_member: np.ndarray, homes: np.ndarray, visits: np.ndarray, verdicts: np.ndarray
    ) -> None:
        """Use clusters that are given.

        Args:
            values: [N, E]
            is_member: [N] bool.
            homes: [N] cluster of each row.
            visits: [N, V] clusters to search, -1 for none.
            verdicts: [N] int8; only rows of an unknown verdict are compared again.
        """
        self.values, self.is_member, self.homes, self.visits, self.verdicts = values, is_member, homes, visits, verdicts

    @classmethod
    def cut(cls, values: np.ndarray, distance: float, cluster_size: int) -> "_Group":
        """Cut a whole set of rows into clusters of about `cluster_size`."""
        num_clusters = round(len(values) / cluster_size)
        homes, visits = np.zeros(len(values), np.int32), np.zeros((len(values), 1), np.int32)
        if num_clusters > NUM_SEARCHED_CLUSTERS:
            num_sampled = min(len(values), max(_SAMPLE_ROWS, 32 * num_clusters))
            sample = values[np.linspace(0, len(values) - 1, num_sampled).astype(np.int64)]
            homes, visits = _assign(values, _train(sample, num_clusters, distance), distance, NUM_SEARCHED_CLUSTERS)
        return cls(values, np.ones(len(values), bool), homes, visits, np.full(len(values), _UNKNOWN, np.int8))

    @classmethod
    def of(cls, rows: pa.Table, number: int, verdicts: np.ndarray) -> "_Group":
        """Group of this number, from rows of `_split_by_group` that are sorted by key."""
        is_member = rows["home"].to_numpy() == number
        return cls(
            _vectors(rows["embedding"]), is_member, rows["cluster"].to_numpy(), _vectors(rows["visits"]), verdicts
        )

    def decide(self, distance: float, elsewhere: np.ndarray) -> np.ndarray:
        """Compare rows block by block in the order of keys; returns the verdicts on members of all their groups together.

        Near copies cost little: a row is compared with the kept and the undecided members, not with those that are dropped.

        Args:
            elsewhere: [N] int8, worst verdict of the other groups on each member; 0 for visitors.
        """
        threshold = np.float32(1 - distance)
        fates: np.ndarray = np.maximum(self.verdicts, elsewhere)
        members: tuple[dict[int, np.ndarray], dict[int, np.ndarray]] = ({}, {})  # by cluster: kept; undecided
        for start in range(0, len(self.values), _BLOCK_ROWS):
            block = slice(start, min(start + _BLOCK_ROWS, len(self.values)))
            is_open = (self.verdicts[block] == _UNKNOWN) & (elsewhere[block] != _NEAR)
            queries = start + np.flatnonzero(is_open)
            self.verdicts[queries] = _CLEAR
            for verdict, candidates in ((_NEAR, members[0]), (_UNKNOWN, members[1])):
                self._compare(queries, candidates, threshold, verdict)
            fates[block] = np.maximum(self.verdicts[block], elsewhere[block])
            self._compare_within(block, queries, threshold, fates, elsewhere)
            for fate, by_cluster in ((_CLEAR, members[0]), (_UNKNOWN, members[1])):
                rows = start + np.flatnonzero(self.is_member[block] & (fates[block] == fate))
                rows = rows[np.argsort(self.homes[rows], kind="stable")]
                clusters, first = np.unique(self.homes[rows], return_index=True)
                for cluster, new in zip(clusters.tolist(), np.split(rows, first[1:]), strict=False):
                    by_cluster[cluster] = np.concatenate([by_cluster.get(cluster, new[:0]), new])
        return fates

    def _compare(
        self, queries: np.ndarray, candidates: dict[int, np.ndarray], threshold: np.float32, verdict: int
    ) -> None:
        """Give this verdict to queries near one of the candidates of a cluster that they visit, unless theirs is worse."""
        visits = self.visits[queries]
        place, column = np.nonzero(np.isin(visits, list(candidates)))
        clusters = visits[place, column]
        order = np.argsort(clusters, kind="stable")
        visitors = queries[place[order]]
        numbers, first, sizes = np.unique(clusters[order], return_index=True, return_counts=True)
        for cluster, begin, end in zip(numbers.tolist(), first, first + sizes, strict=True):
            places, others = visitors[begin:end], candidates[cluster]
            start, size = 0, 256  # mostly the first candidates decide on copies
            while start < len(others):
                places = places[self.verdicts[places] < verdict]
                if not len(places):
                    break
                near = self.values[places] @ self.values[others[start : start + size]].T > threshold  # [Q, C]
                self.verdicts[places[near.any(axis=1)]] = verdict
                start, size = start + size, _CANDIDATES_AT_ONCE

    def _compare_within(
        self, block: slice, queries: np.ndarray, threshold: np.float32, fates: np.ndarray, elsewhere: np.ndarray
    ) -> None:
        """Compare the rows of a block with each other, one after another."""
        queries = queries[self.verdicts[queries] != _NEAR]
        others = block.start + np.flatnonzero(self.is_member[block] & (fates[block] != _NEAR))
        near = self.values[queries] @ self.values[others].T > threshold  # [Q, C]
        query, other = np.nonzero(near & (others < queries[:, None]))
        query, other = queries[query], others[other]
        visited = (self.visits[query] == self.homes[other][:, None]).any(axis=1)
        query, other = query[visited], other[visited]
        rows, first = np.unique(query, return_index=True)
        for row, earlier in zip(rows.tolist(), np.split(other, first[1:]), strict=False):
            best = fates[earlier].min()
            if best != _NEAR:
                self.verdicts[row] = _NEAR if best == _CLEAR else max(self.verdicts[row], _UNKNOWN)
                fates[row] = max(self.verdicts[row], elsewhere[row])


def _train(sample: np.ndarray, num_clusters: int, distance: float) -> np.ndarray:
    """Centres [K, E] of clusters; trained on a sample without its near duplicates."""
    from sklearn.cluster import MiniBatchKMeans

    distinct = sample[~duplicates_in_memory(sample, distance, len(sample))]
    number = max(1, min(num_clusters, len(distinct) // 4))
    kmeans = MiniBatchKMeans(number, random_state=0, n_init=1, batch_size=4096)
    centres: np.ndarray = kmeans.fit(distinct).cluster_centers_
    return centres


def _assign(values: np.ndarray, centres: np.ndarray, distance: float, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest cluster of each row [N], and up to `limit` clusters that may hold its duplicates [N, limit], -1 for none."""
    reach = (2 * distance) ** 0.5  # Euclidean distance of unit vectors with that cosine
    # Double precision: the rounding of a product depends on how many rows are multiplied at once.
    centres = centres.astype(np.float64)
    squares = (centres**2).sum(axis=1)
    spans = np.sqrt((squares[:, None] + squares - 2 * centres @ centres.T).clip(min=1e-12))  # [K, K]
    homes = np.empty(len(values), np.int32)
    visits = np.full((len(values), limit), -1, np.int32)
    searched = min(limit, len(centres))
    for start in range(0, len(values), _CANDIDATES_AT_ONCE):
        rows = values[start : start + _CANDIDATES_AT_ONCE].astype(np.float64)
        squared = squares - 2 * rows @ centres.T  # [R, K], minus the row's squared norm
        home = squared.argmin(axis=1)
        own = (np.arange(len(home)), home)
        to_plane = (squared - squared[own][:, None]) / (2 * spans[home])
        to_plane[own] = -1
        nearest = np.argpartition(to_plane, searched - 1, axis=1)[:, :searched]
        within = np.take_along_axis(to_plane, nearest, axis=1) <= reach
        homes[start : start + len(rows)] = home
        visits[start : start + len(rows), :searched] = np.where(within, nearest, -1)
    return homes, visits


def _train_clusters(
    read: Callable[[PartT], tuple[pa.ChunkedArray, np.ndarray]],
    parts: Sequence[PartT],
    num_rows: int,
    distance: float,
    cluster_size: int,
    options: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the clusters [K, E], and the group of each cluster [K]: neighbours are mostly in one group."""
    num_groups = round(num_rows / _GROUP_ROWS)
    num_clusters = min(round(num_rows / cluster_size), MAX_CLUSTERS)
    if min(num_groups, num_clusters) < 2:
        return np.zeros((1, 1), np.float32), np.zeros(1, np.int32)
    share = min(1.0, min(max(_SAMPLE_ROWS, 32 * num_clusters), max(_MAX_SAMPLE_ROWS, 8 * num_clusters)) / num_rows)
    sampled = dataflow.run_all(functools.partial(_sample, read, share), parts, **options)
    centres = _train(_vectors(in_order_of_keys(sampled)["embedding"]), num_clusters, distance)
    groups = _train(centres, min(num_groups, len(centres)), _SAME)
    group_of = _assign(centres, groups, distance, 1)[0]
    return centres, np.unique(group_of, return_inverse=True)[1].astype(np.int32)


def _sample(read: Callable[[PartT], tuple[pa.ChunkedArray, np.ndarray]], share: float, part: PartT) -> pa.Table:
    """Rows that are chosen by the last digits of their keys, so by chance but in every division into parts alike."""
    keys, embeddings = read(part)
    numbers = hex_numbers(keys, KEY_DIGITS)
    chosen = numbers[:, 1] < np.uint64(min(share * 2.0**64, 2.0**64 - 2**12))
    return pa.table({**key_columns(numbers[chosen]), "embedding": _column(embeddings[chosen])})


def _split_by_group(
    read: Callable[[PartT], tuple[pa.ChunkedArray, np.ndarray]],
    centres: np.ndarray,
    group_of: np.ndarray,
    distance: float,
    searched_clusters: int,
    count: int,
    part: PartT,
) -> list[pa.Table]:
    """Send each row to its group and to those that may hold its duplicates."""
    keys, embeddings = read(part)
    if len(centres) == 1:
        clusters, visits = np.zeros(len(embeddings), np.int32), np.zeros((len(embeddings), 1), np.int32)
    else:
        clusters, visits = _assign(embeddings, centres, distance, min(searched_clusters, len(centres)))
    num_groups = int(group_of.max()) + 1
    is_sent = np.zeros((len(embeddings), num_groups), bool)
    row, column = np.nonzero(visits >= 0)
    is_sent[row, group_of[visits[row, column]]] = True
    row, groups = np.nonzero(is_sent)
    numbers = hex_numbers(keys, KEY_DIGITS)
    is_shared = is_sent.sum(axis=1) > 1
    tables = []
    for partition in range(count):
        here = groups * count // num_groups == partition
        rows = row[here]
        columns = {
            "group": groups[here].astype(np.int32),
            "home": group_of[clusters[rows]],
            "shared": is_shared[rows],
            "cluster": clusters[rows],
            "visits": _column(visits[rows]),
            "embedding": _column(embeddings[rows]),
        }
        tables.append(pa.table({**key_columns(numbers[rows]), **columns}))
    return tables


def _decide_groups(folder: str, distance: float, index: int, pieces: list[pa.Table]) -> int:
    """First round: decide on the rows of a partition that no other group shares."""
    table = pa.concat_tables(pieces)
    pieces.clear()
    done = []
    for number in _groups(table):
        rows = in_order_of_keys([table.filter(pa.array(table["group"].to_numpy() == number))])
        group = _Group.of(rows, number, np.full(rows.num_rows, _UNKNOWN, np.int8))
        elsewhere = np.where(group.is_member & rows["shared"].to_numpy(), _UNKNOWN, _CLEAR).astype(np.int8)
        done.append((rows, group, group.decide(distance, elsewhere)))
    return _write_round(folder, index, done)


def _decide_again(folder: str, before: str, distance: float, alone: bool, index: int, pieces: list[pa.Table]) -> int:
    """A later round: take the other groups' verdicts into account, and decide on rows that depend on them.

    Args:
        alone: count unknown verdicts of other groups as clear, so that nothing remains undecided.
    """
    reported = pa.concat_tables(pieces)
    table = read_rows(f"{before}/{index:05d}.undecided")
    done = []
    for number in _groups(table):
        rows = in_order_of_keys([table.filter(pa.array(table["group"].to_numpy() == number))])
        group = _Group.of(rows, number, rows["verdict"].to_numpy().copy())
        elsewhere = _worst(rows, reported) * group.is_member
        if alone:
            elsewhere[elsewhere == _UNKNOWN] = _CLEAR
        done.append((rows, group, group.decide(distance, elsewhere)))
    return _write_round(folder, index, done)


def _worst(rows: pa.Table, reported: pa.Table) -> np.ndarray:
    """Worst reported verdict on each row: [N] int8."""
    wanted = pair_octets(rows["high"], rows["low"])
    places = pc.index_in(pair_octets(reported["high"], reported["low"]), value_set=wanted)
    known = places.is_valid().to_numpy(zero_copy_only=False)
    worst = np.zeros(rows.num_rows, np.int8)
    np.maximum.at(worst, places.drop_null().to_numpy(), reported["verdict"].to_numpy()[known])
    return worst


def _write_round(folder: str, index: int, done: list[tuple[pa.Table, _Group, np.ndarray]]) -> int:
    """Write the duplicates, the verdicts on visitors, and the rows that are needed again; returns the number of the last."""
    found, reports, undecided = [], [], []
    for rows, group, fates in done:
        keys = rows.select(["high", "low", "home"])
        found.append(keys.filter(pa.array(group.is_member & (fates == _NEAR))))
        reports.append(
            keys.append_column("verdict", pa.array(group.verdicts)).filter(
                pa.array(~group.is_member & (group.verdicts != _CLEAR))
            )
        )
        again = pa.array(np.where(group.is_member, fates, group.verdicts) == _UNKNOWN)
        kept = rows.select(["high", "low", "group", "home", "cluster", "visits", "embedding"])
        kept = kept.append_column("verdict", pa.array(group.verdicts))
        undecided.append(kept.filter(again))
    for name, tables in (("found", found), ("verdicts", reports), ("undecided", undecided)):
        write_rows(f"{folder}/{index:05d}.{name}", pa.concat_tables(tables))
    return sum(table.num_rows for table in undecided)


def _split_by_home(folder: str, count: int, num_groups: int, index: int) -> list[pa.Table]:
    table = read_rows(f"{folder}/{index:05d}.verdicts")
    homes = table["home"].to_numpy() * count // num_groups
    return [table.filter(pa.array(homes == partition)) for partition in range(count)]


def _use_found(use: Callable[[KeyRange, pa.Table], ResultT], count: int, index: int, pieces: list[pa.Table]) -> ResultT:
    table = in_order_of_keys(pieces)
    numbers = np.stack([table["high"].to_numpy(), table["low"].to_numpy()], axis=1)
    reasons = pa.array(["semantic_duplicate"] * len(numbers), pa.string())
    return use(KeyRange(index, count), pa.table({"key": key_texts(numbers), "reason": reasons}))


def _groups(table: pa.Table) -> list[int]:
    return np.unique(table["group"].to_numpy()).tolist() or [-1]  # an empty group writes empty files


def _vectors(column: pa.ChunkedArray) -> np.ndarray:
    """Vectors [N, E] of a column of `_column`, also if there are none."""
    flat = column.combine_chunks().flatten()
    values: np.ndarray = (pa.concat_arrays(flat.chunks) if isinstance(flat, pa.ChunkedArray) else flat).to_numpy()
    vectors: np.ndarray = values.reshape(len(column), column.type.list_size)
    return vectors


def _column(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])
