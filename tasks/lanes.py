"""Lanes: shards of pairs that must run one after another, so that no two tasks send requests to the same site at once."""

import dataclasses
import hashlib
import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from tasks import rows
from tasks.untrusted import domains, fetch
from unclip.errors import StageError

Pair = Mapping[str, Any]
"""`key`, `url`, `caption`, and optionally `expected_sha256` (from the list) and `seen_sha256` (from an earlier fetch)."""
Shard = Sequence[Pair]

ATTEMPTS = 3
"""Attempts at a shard whose task hangs. If a task raises or its process dies, Ray itself retries it twice."""
_MAX_CHECK_SECONDS = 30.0  # between two checks of the heartbeats


def plan_lanes(pairs: Sequence[Pair], num_lanes: int) -> list[list[Pair]]:
    """Assign pairs to lanes by the hash of their site; each lane is in the order of the list.

    A site is the registrable domain, according to the public suffix list bundled with tldextract. For an IP address or a
    name without dots it is the host. All invalid URLs form one site.
    """
    lanes: list[list[Pair]] = [[] for _ in range(num_lanes)]
    for pair in pairs:
        lanes[int(hashlib.sha256(_site(pair["url"]).encode()).hexdigest(), 16) % num_lanes].append(pair)
    return lanes


def _site(url: str) -> str:
    try:
        host = fetch.host_of(url)
    except rows.RowFault:
        return ""
    return domains.registrable_domain(host)


@dataclasses.dataclass
class _Attempt:
    """A running task."""

    order: tuple[int, int, int]
    """Negative number of rows left in its lane; number of the lane; position in it."""
    number: int
    heartbeat: Any = None
    changed_at: float = math.inf
    """Monotonic time of the last change of the heartbeat; infinite before the first."""
    is_cancelled: bool = False
    """True once it was cancelled."""


def run_in_lanes(
    lanes: Sequence[Sequence[Shard]],
    limit: int,
    start: Callable[[Shard], ray.ObjectRef[Any]],
    on_done: Callable[[Shard], None] = lambda _: None,
    heartbeat: Callable[[Shard], Any] = lambda _: None,
    stall_seconds: float = math.inf,
) -> list[Any]:
    """Run a task for each shard, at most `limit` at once and one per lane, and return their results.

    The lane with the most rows left goes first, since it takes longest. A task whose process or node hangs is killed and its
    shard started again; if the task continues nevertheless, its result is discarded.

    Args:
        heartbeat: returns a shard's heartbeat, a value that changes while its task makes progress; None before it starts.
        stall_seconds: a task whose heartbeat does not change for longer is considered hung.

    Raises:
        StageError: a task failed, or hung `ATTEMPTS` times. No further tasks start then, but running tasks finish and
            their results are kept.
    """
    waiting = [((-sum(map(len, lane)), number, 0), 1) for number, lane in enumerate(lanes) if lane]
    heapq.heapify(waiting)
    running: dict[ray.ObjectRef[Any], _Attempt] = {}
    results: list[Any] = []
    failure: Exception | None = None
    next_check = time.monotonic()
    while True:
        while failure is None and len(running) < limit and waiting:
            order, attempt_number = heapq.heappop(waiting)
            running[start(lanes[order[1]][order[2]])] = _Attempt(order, attempt_number)
        if not running:
            break
        done, others = ray.wait(list(running), timeout=max(0.0, next_check - time.monotonic()))
        hung: list[ray.ObjectRef[Any]] = []
        if time.monotonic() >= next_check:
            hung = [task for task in others if _hangs(running[task], lanes, heartbeat, stall_seconds)]
            next_check = time.monotonic() + min(stall_seconds / 4, _MAX_CHECK_SECONDS)
        for task in hung:
            if not running[task].is_cancelled:
                running[task].is_cancelled = True
                ray.cancel(task, force=True)
        for task in [
            *done,
            *(task for task in hung if time.monotonic() - running[task].changed_at > 2 * stall_seconds),
        ]:
            attempt = running.pop(task)
            rows_left, number, position = attempt.order
            shard = lanes[number][position]
            try:
                results.append(ray.get(task, timeout=0))
            except (ray.exceptions.RayError, TimeoutError) as error:
                if not attempt.is_cancelled:
                    failure = error
                elif attempt.number == ATTEMPTS:
                    failure = StageError(f"no row was completed for {stall_seconds:g} s, {ATTEMPTS} times")
                else:
                    heapq.heappush(waiting, (attempt.order, attempt.number + 1))
                continue
            on_done(shard)
            if position + 1 < len(lanes[number]):
                heapq.heappush(waiting, ((rows_left + len(shard), number, position + 1), 1))
    if failure is not None:
        cause = str(getattr(failure, "cause", failure)).strip().splitlines()[-1]
        raise StageError(
            f"download: a shard failed after its retries: {cause}. "
            f"{len(results)} finished shards are kept; run the same command again."
        ) from None
    return results


def _hangs(
    attempt: _Attempt, lanes: Sequence[Sequence[Shard]], heartbeat: Callable[[Shard], Any], stall_seconds: float
) -> bool:
    """Read a task's heartbeat; return True if it has not changed for `stall_seconds`."""
    now, before = time.monotonic(), attempt.heartbeat
    if not attempt.is_cancelled:
        attempt.heartbeat = heartbeat(lanes[attempt.order[1]][attempt.order[2]])
    if attempt.heartbeat != before:
        attempt.changed_at = now
    return attempt.heartbeat is not None and now - attempt.changed_at > stall_seconds
