"""Lanes: shards of rows that must run one after another, so that no two tasks send requests to the same site at once.

A plan is a folder of files, one for each shard. Tasks write it, range by range of the list and then lane by lane, so that no
process holds the list. The driver knows the shards' names and sizes only.
"""

import collections
import dataclasses
import functools
import hashlib
import heapq
import itertools
import math
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from tasks import ranges, rows, tables
from tasks.dataflow import exchange
from tasks.untrusted import domains, fetch, local_files
from unclip.config import fingerprint
from unclip.errors import StageError
from unclip.messages import reason_of

WAITING_PER_TASK = 3
"""Tasks that only wait for servers, for each one that works: a site that does not answer must not hold a CPU."""
ATTEMPTS = 3
"""Attempts at a shard whose task hangs. If a task raises or its process dies, Ray itself retries it twice."""
_MAX_CHECK_SECONDS = 30.0  # between two checks of the heartbeats
_LONG_WAIT_SECONDS = 2.0
_LEAST_COUNTED = 4  # rows of a site in a range, so that the counts of a long list remain few
_MOST_ROWS_OF_URL = 1000  # in one shard, even if shards are smaller
_ORIGIN = r"^(?P<origin>https?://[^/?#\\\s]+)(?:[/?#]|$)"
_OWN = 0  # lane of rows that need no politeness


@dataclasses.dataclass(frozen=True)
class Shard:
    """Rows that one task fetches."""

    name: str
    """Name of its file in the plan, and of the part with its results: a fingerprint of its keys and the attempt."""
    rows: int


Lanes = Sequence[Sequence[Shard]]


@dataclasses.dataclass(frozen=True)
class Listed:
    """A file of rows that need lanes, with counts of its rows."""

    uri: str
    own_rows: int
    """Rows of hosts that need no politeness."""
    rows: int
    """Other rows."""
    large_sites: Mapping[str, int]
    """Rows of each site that may be too large to share a lane."""


def sites(urls: pa.ChunkedArray, allow_hosts: Sequence[str] = ()) -> pa.Array:
    """Site of each URL; null for hosts in `allow_hosts` and for local files.

    A site is the registrable domain, according to the public suffix list bundled with tldextract. For an IP address or a
    name without dots it is the host. All invalid URLs form one site.
    """
    origins = pc.struct_field(pc.extract_regex(urls, _ORIGIN), 0)
    origins = pc.if_else(pc.starts_with(urls, local_files.SCHEME), local_files.SCHEME, pc.coalesce(origins, urls))
    encoded = _combined(origins).dictionary_encode()

    def site(url: str) -> str | None:
        is_own = url == local_files.SCHEME or fetch.is_allowed_host(url, allow_hosts)
        return None if is_own else _site(url)

    found = list(map(site, encoded.dictionary.to_pylist()))
    return pa.array(found, pa.string()).take(encoded.indices)


def _site(url: str) -> str:
    try:
        host = fetch.host_of(url)
    except rows.RowFault:
        return ""
    return domains.registrable_domain(host)


def hashed_lane(site: str, num_lanes: int) -> int:
    """Lane of a site that shares its lane; the same in every process."""
    return int(hashlib.sha256(site.encode()).hexdigest(), 16) % num_lanes


def list_rows(uri: str, table: pa.Table, num_lanes: int, allow_hosts: Sequence[str] = ()) -> Listed:
    """Write rows that need lanes to a file, with their sites.

    Args:
        table: `key`, `url` and other columns, which the shards have as well.
        num_lanes: largest number of lanes that sites share.
    """
    found = sites(table["url"], allow_hosts)
    tables.write_file(uri, table.append_column("site", found))
    counts = found.drop_null().value_counts()
    num_rows = len(found) - found.null_count
    # Keys are hashes, so the rows of a range are a sample: half of a fair share finds almost all large sites.
    is_large = pc.greater_equal(counts.field("counts"), max(_LEAST_COUNTED, num_rows / (2 * num_lanes)))
    large = {item["values"]: item["counts"] for item in counts.filter(is_large).to_pylist()}
    return Listed(uri, found.null_count, num_rows, large)


def plan_shards(
    listed: Sequence[Listed], folder: str, *, shard_size: int, num_lanes: int, attempt: int = 0
) -> list[list[Shard]]:
    """Write a file for each shard and return the lanes; the shards of a lane must run one after another.

    Small sites share lanes by their hashes; a site with more rows than a lane's fair share has a lane of its own, so that no
    other site waits for it. Rows of own hosts need no politeness: each of their shards is a lane. A lane is in order of keys,
    but the rows of a URL lie together, in one shard unless there are thousands. Equal arguments give equal shards.

    Args:
        listed: results of `list_rows`, in order of their keys.
        folder: folder for the files, named after the shards.
        num_lanes: largest number of lanes that sites share; fewer if a lane would have fewer rows than a shard.
    """
    listed = [part for part in listed if part.own_rows or part.rows]
    if not listed:
        return []
    assignment = _assign(listed, shard_size, num_lanes)
    written = exchange(
        functools.partial(_split_lanes, assignment),
        [part.uri for part in listed],
        assignment.num_outputs,
        functools.partial(_write_shards, folder, shard_size, attempt),
    )
    lanes: dict[int, list[Shard]] = collections.defaultdict(list)
    for lane, shard in (item for output in written for item in output):
        lanes[lane].append(shard)
    return [[shard] for shard in lanes.pop(_OWN, [])] + [lanes[lane] for lane in sorted(lanes)]


@dataclasses.dataclass(frozen=True)
class _Assignment:
    """Lane of each site, and outputs of the exchange for each lane.

    Lane `_OWN` is followed by one for each large site, then by those that sites share. Small lanes share an output; a large
    lane has several, for ranges of the hashes of its URLs.
    """

    large: Mapping[str, int]
    """Lane of each large site."""
    num_shared: int
    """Lanes that sites share."""
    first_output: np.ndarray
    """First output of each lane: [L] int64."""
    outputs: np.ndarray
    """Number of outputs of each lane: [L] int64."""
    num_outputs: int

    def lanes_of(self, site: pa.Array) -> np.ndarray:
        """Lane of each row: [N] int64."""
        encoded = site.dictionary_encode()
        lanes = [self._lane(name) for name in encoded.dictionary.to_pylist()]
        indices = pc.fill_null(encoded.indices, len(lanes)).to_numpy()
        of_row: np.ndarray = np.array([*lanes, _OWN], np.int64)[indices]
        return of_row

    def _lane(self, site: str) -> int:
        return self.large.get(site, 1 + len(self.large) + hashed_lane(site, self.num_shared))


def _assign(listed: Sequence[Listed], shard_size: int, num_lanes: int) -> _Assignment:
    counts: collections.Counter[str] = collections.Counter()
    for part in listed:
        counts.update(part.large_sites)
    own, others = sum(part.own_rows for part in listed), sum(part.rows for part in listed)

    def shared_lanes(num_rows: int) -> int:  # short lists in many lanes would be tiny files
        return min(num_lanes, max(1, num_rows // shard_size))

    large = sorted(site for site, num_rows in counts.items() if num_rows * shared_lanes(others) > others)
    rest = others - sum(counts[site] for site in large)
    num_shared = shared_lanes(rest)
    lane_rows = [own, *(counts[site] for site in large), *[rest / num_shared] * num_shared]

    most = max(ranges.ROWS_PER_RANGE, (own + others) / ranges.MAX_RANGES)  # rows of one output
    first, outputs, total, filled = [], [], 0, math.inf
    for num_rows in lane_rows:
        outputs.append(max(1, math.ceil(num_rows / most)))
        if filled + num_rows <= most:
            first.append(total - 1)
            filled += num_rows
        else:
            first.append(total)
            total += outputs[-1]
            filled = num_rows
    lanes = {site: 1 + number for number, site in enumerate(large)}
    return _Assignment(lanes, num_shared, np.array(first), np.array(outputs), total)


def _split_lanes(assignment: _Assignment, uri: str) -> list[pa.Table]:
    table = tables.read_file(uri)
    lane = assignment.lanes_of(_combined(table["site"]))
    piece = np.zeros(len(lane), np.int64)
    if (assignment.outputs[lane] > 1).any():
        texts = table["url"].cast(pa.binary()).to_pylist()
        piece = np.fromiter(map(zlib.crc32, texts), np.int64, len(texts)) * assignment.outputs[lane] >> 32
    table = table.drop_columns("site").append_column("lane", pa.array(lane))
    return ranges.split(table, assignment.first_output[lane] + piece, assignment.num_outputs)


def _write_shards(
    folder: str, shard_size: int, attempt: int, _output: int, pieces: list[pa.Table]
) -> list[tuple[int, Shard]]:
    """Cut the lanes of one output into shards and write them; returns the lane of each."""
    table = pa.concat_tables(pieces)
    first_keys = table.group_by("url").aggregate([("key", "min")])
    place = first_keys["key_min"].take(pc.index_in(table["url"], value_set=first_keys["url"]))
    table = table.append_column("place", place).sort_by([(name, "ascending") for name in ("lane", "place", "key")])
    lanes, starts = np.unique(table["lane"].to_numpy(), return_index=True)
    table, shards = table.drop_columns(["lane", "place"]), []
    url = _combined(table["url"])
    new_urls = np.flatnonzero(pc.not_equal(url.slice(1), url.slice(0, max(0, len(url) - 1))).to_numpy(False)) + 1
    bounds = itertools.pairwise([*starts.tolist(), table.num_rows])
    for lane, (start, stop) in zip(lanes.tolist(), bounds, strict=True):
        for first, last in _cuts(new_urls, start, stop, shard_size):
            cut = table.slice(first, last - first)
            shard = Shard(fingerprint(cut["key"].to_pylist(), attempt)[:32], cut.num_rows)
            tables.write_file(shard_uri(folder, shard), cut)
            shards.append((lane, shard))
    return shards


def _cuts(new_urls: np.ndarray, start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Bounds of shards of at most `size` rows, each cut before the first row of a URL; one with more rows has its own shard.

    Args:
        new_urls: sorted numbers of the rows with another URL than the row before.
    """
    while stop - start > size:
        following = int(np.searchsorted(new_urls, start + size, side="right"))
        last = int(new_urls[following - 1]) if following else start
        if last <= start:
            last = min(stop, int(new_urls[following]) if following < len(new_urls) else stop)
            last = min(last, start + max(size, _MOST_ROWS_OF_URL))
        yield start, last
        start = last
    if start < stop:
        yield start, stop


def shard_uri(folder: str, shard: Shard) -> str:
    """File of a shard's rows, in the order in which they are fetched."""
    return f"{folder}/{shard.name}.parquet"


def _combined(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


@dataclasses.dataclass
class _Attempt:
    """A running task."""

    order: tuple[bool, int, int, int]
    """False if the shard before it waited for long; negative number of rows left in its lane; number of the lane; position
    in it."""
    number: int
    generator: ray.ObjectRefGenerator | None
    """The task, if it is a generator; else None."""
    heartbeat: Any = None
    changed_at: float = math.inf
    """Monotonic time of the last change of the heartbeat; infinite before the first."""
    is_cancelled: bool = False
    """True once it was cancelled."""
    waits_since: float = math.inf
    """Monotonic time at which it said that it only waits; infinite before."""


def run_in_lanes(
    lanes: Lanes,
    limit: int,
    start: Callable[[Shard], ray.ObjectRef[Any] | ray.ObjectRefGenerator],
    on_done: Callable[[Shard, Any], None],
    heartbeat: Callable[[Shard], Any] = lambda _: None,
    stall_seconds: float = math.inf,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Run a task for each shard, one per lane, and at most `limit` that work, besides `WAITING_PER_TASK` * `limit` that wait.

    The lane with the most rows left goes first, since it takes longest; before it, lanes whose last shard waited for long, as
    they take longer than their rows say and cost little meanwhile. A task whose process or node hangs is killed and its shard
    started again, as is one whose result was lost; if the task continues nevertheless, its result is discarded.

    Args:
        start: returns the reference of a task's result, or a generator of it, perhaps after None: from then on, it only waits.
        on_done: called with each shard and the result of its task, in the order of the shards of a lane.
        heartbeat: returns a shard's heartbeat, a value that changes while its task makes progress; None before it starts.
        stall_seconds: a task whose heartbeat does not change for longer is considered hung.
        is_over: no further task starts once it returns True.

    Raises:
        StageError: a task or `on_done` failed, or a task hung `ATTEMPTS` times. No further tasks start then, but running
            tasks finish and `on_done` is called for them.
    """
    waiting = [((True, -sum(shard.rows for shard in lane), number, 0), 1) for number, lane in enumerate(lanes) if lane]
    heapq.heapify(waiting)
    running: dict[Any, _Attempt] = {}
    num_done = 0
    failure: Exception | None = None
    next_check = time.monotonic()
    while True:
        while failure is None and _has_slot(running.values(), limit) and waiting and not is_over():
            order, attempt_number = heapq.heappop(waiting)
            *_, number, position = order
            task = start(lanes[number][position])
            generator = task if isinstance(task, ray.ObjectRefGenerator) else None
            running[task] = _Attempt(order, attempt_number, generator)
        if not running:
            break
        done, others = ray.wait(list(running), timeout=max(0.0, next_check - time.monotonic()))
        hung: list[Any] = []
        if time.monotonic() >= next_check:
            hung = [task for task in others if _hangs(running[task], lanes, heartbeat, stall_seconds)]
            next_check = time.monotonic() + min(stall_seconds / 4, _MAX_CHECK_SECONDS)
        for task in hung:
            if not running[task].is_cancelled:
                running[task].is_cancelled = True
                ray.cancel(running[task].generator or task, force=True)
        for task in [
            *done,
            *(task for task in hung if time.monotonic() - running[task].changed_at > 2 * stall_seconds),
        ]:
            attempt = running.pop(task)
            _, rows_left, number, position = attempt.order
            shard = lanes[number][position]
            try:
                if task is attempt.generator:
                    if task not in done:
                        raise TimeoutError
                    running[next(task)] = attempt  # it may have to be fetched from another node
                    continue
                result = ray.get(task, timeout=0)
                if result is None and attempt.generator is not None:
                    attempt.waits_since = time.monotonic()
                    running[attempt.generator] = attempt
                    continue
            except (ray.exceptions.RayError, TimeoutError, StopIteration) as error:
                # Ray runs a task again whose process died. If that had said that it waits, and the second does not have to, the
                # second's result comes in the place of that word, which nobody reads again.
                is_lost = isinstance(error, StopIteration)
                if not (attempt.is_cancelled or is_lost):
                    failure = error
                elif attempt.number == ATTEMPTS:
                    problem = "its process died" if is_lost else f"no row was completed for {stall_seconds:g} s"
                    failure = StageError(f"{problem}, {ATTEMPTS} times")
                else:
                    heapq.heappush(waiting, (attempt.order, attempt.number + 1))
                continue
            num_done += 1
            try:
                on_done(shard, result)
            except Exception as error:  # running tasks end before the stage does
                failure = failure or StageError(f"its result cannot be committed: {error}")
            if position + 1 < len(lanes[number]):
                was_quick = time.monotonic() - attempt.waits_since < _LONG_WAIT_SECONDS
                heapq.heappush(waiting, ((was_quick, rows_left + shard.rows, number, position + 1), 1))
    if failure is not None:
        cause = reason_of(getattr(failure, "cause", failure), -1)
        raise StageError(
            f"download: a shard failed after its retries: {cause}. "
            f"{num_done} finished shards are kept; run the same command again."
        ) from None


def _has_slot(running: Collection[_Attempt], limit: int) -> bool:
    num_working = sum(attempt.waits_since == math.inf for attempt in running)
    return num_working < limit and len(running) < (1 + WAITING_PER_TASK) * limit


def _hangs(attempt: _Attempt, lanes: Lanes, heartbeat: Callable[[Shard], Any], stall_seconds: float) -> bool:
    """Read a task's heartbeat; return True if it has not changed for `stall_seconds`."""
    now, before = time.monotonic(), attempt.heartbeat
    if not attempt.is_cancelled:
        *_, number, position = attempt.order
        attempt.heartbeat = heartbeat(lanes[number][position])
    if attempt.heartbeat != before:
        attempt.changed_at = now
    return attempt.heartbeat is not None and now - attempt.changed_at > stall_seconds
