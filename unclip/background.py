"""Usable CPUs, periodic work in the background, threads beside one that computes, rate-limited checks, time limits of calls."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

ResultT = TypeVar("ResultT")


@contextlib.contextmanager
def run_periodically(seconds: float, action: Callable[[], object], name: str) -> Iterator[None]:
    """Call `action` every `seconds` from a thread called `name`, until the block ends; the first call comes after `seconds`."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def usable_cpus(control_groups: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: those it is bound to, and not more than its container's quota, rounded up.

    Args:
        control_groups: folder in which Linux shows a container its quota, in either of two versions.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or no quota
            quota, period = map(int, " ".join((control_groups / name).read_text() for name in names).split())
            if quota > 0 and period > 0:
                count = min(count, math.ceil(quota / period))
    return count


def compute_alone() -> None:
    """Let torch compute in this thread by itself, without a team of OpenMP's threads; for threads beside one that has a team.

    If the teams of a process together have more threads than there are CPUs, libgomp lets all of them sleep between two loops
    instead of spin, as long as their threads live. A training on two threads then becomes slower than on one.
    """
    import threadpoolctl
    import torch

    torch.get_num_threads()  # at its first use in a thread, torch sets the number of threads; not again after this
    threadpoolctl.threadpool_limits(1, "openmp")  # of teams of this thread


def rate_limited(seconds: float, ask: Callable[[], bool]) -> Callable[[], bool]:
    """Limit `ask` to one call every `seconds` and repeat its last answer in between; after True it is not called again."""
    answer, asked_at = False, -seconds

    def recent() -> bool:
        nonlocal answer, asked_at
        if not answer and time.monotonic() - asked_at >= seconds:
            answer, asked_at = ask(), time.monotonic()
        return answer

    return recent


def within(seconds: float, call: Callable[[], ResultT]) -> ResultT:
    """Return the result of a call that has limits of its own, some of minutes, such as a DNS lookup; raise its error.

    Raises:
        TimeoutError: it takes longer than `seconds`; it then goes on in a daemon thread.
    """
    results: list[ResultT] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            results.append(call())
        except BaseException as error:  # also SystemExit: a thread ends with any of them
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]
