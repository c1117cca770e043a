"""Dataflow over the rows of a dataset as plain Ray tasks, in bounded memory on every node.

A task reads one part of a table and writes one file or returns a small result, so no process holds more than a part. Since
tables are split by ranges of keys that are hashes, joins need no shuffle. For the few steps that regroup rows there is
`exchange`; its pieces travel through Ray's object store, which spills to disk and remakes pieces that a lost node held.

Ray Data can do the same, but its partitions by hash would have to be sorted and sized again for every table, and starting its
executor costs each small run seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import ray

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_RETRIES = 3
_OPTIONS: dict[str, Any] = {"num_cpus": 1, "max_retries": _RETRIES, "scheduling_strategy": "SPREAD"}


def run_all(
    function: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    on_done: Callable[[ItemT, ResultT], None] = lambda *_: None,
    **options: Any,
) -> list[ResultT]:
    """Call the function for every item, each in a Ray task, and return the results in order.

    As many tasks run at once as the cluster has CPUs. A task whose process or node dies is repeated. A single item runs in
    the calling process, so that small data starts no processes.

    Args:
        function: module-level function or `functools.partial` of one; must give the same result when it is repeated.
        on_done: called in the calling process after each item.
        options: options of the Ray tasks, such as `num_cpus`.
    """
    if len(items) == 1:
        result = function(items[0])
        on_done(items[0], result)
        return [result]
    results: list[Any] = [None] * len(items)
    for index, reference in _in_flight(
        lambda index: _call.options(**_OPTIONS | options).remote(function, items[index]), len(items)
    ):
        results[index] = ray.get(reference)
        on_done(items[index], results[index])
    return results


def produce(read: Callable[[ItemT], Iterator[Any]], items: Sequence[ItemT], **options: Any) -> list[list[Any]]:
    """Call a generator function for every item, each in a Ray task, and leave the parts that it yields in the object store.

    Args:
        read: item -> parts with a `num_rows`, such as tables; must yield the same parts when it is repeated.
        options: options of the Ray tasks.

    Returns:
        For every item, (number of rows, reference) of each part; the references can be items of `exchange`.
    """
    producing = _produce.options(**_OPTIONS | options, num_returns="streaming")
    generators: dict[int, Any] = {}

    def start(index: int) -> Any:
        generators[index] = producing.remote(read, items[index])
        return generators[index].completed()

    results: list[Any] = [None] * len(items)
    for index, _ in _in_flight(start, len(items)):
        references = list(generators.pop(index))
        counts = ray.get(references[::2])  # an error takes the place of a number
        results[index] = list(zip(counts, references[1::2], strict=True))
    return results


def exchange(
    split: Callable[[ItemT], Sequence[pa.Table]],
    items: Sequence[ItemT],
    num_outputs: int,
    merge: Callable[[int, list[pa.Table]], ResultT],
    **options: Any,
) -> list[ResultT]:
    """Regroup rows: split every item into `num_outputs` tables, and merge the tables with the same number.

    Args:
        split: item -> `num_outputs` tables, some of which may be empty; must give the same tables when it is repeated.
        items: values, or references of values in the object store.
        merge: (number of the output, its tables in the order of items) -> small result, usually of a file that it wrote.
        options: options of the Ray tasks.

    Returns:
        Results of `merge`, in order.
    """
    if len(items) <= 1 and num_outputs == 1:
        values = [ray.get(item) if isinstance(item, ray.ObjectRef) else item for item in items]
        return [merge(0, [split(value)[0] for value in values])]
    pieces: list[list[Any]] = [[] for _ in items]
    splitting = _split.options(**_OPTIONS | options, num_returns=num_outputs)

    def start_split(index: int) -> Any:
        returned: Any = splitting.remote(split, items[index], num_outputs)
        pieces[index] = returned if num_outputs > 1 else [returned]
        return pieces[index][0]

    for _, reference in _in_flight(start_split, len(items)):
        ray.get(reference)  # raises the task's error

    def start_merge(output: int) -> Any:
        own = [piece[output] for piece in pieces]
        return _merge.options(**_OPTIONS | options).remote(merge, output, *own)

    results: list[Any] = [None] * num_outputs
    for output, reference in _in_flight(start_merge, num_outputs):
        results[output] = ray.get(reference)
        for piece in pieces:  # frees the memory
            piece[output] = None
    return results


def _in_flight(start: Callable[[int], Any], count: int) -> Iterator[tuple[int, Any]]:
    """Start `count` tasks, a bounded number at once; yield the index and reference of each when it is done.

    Raises the first error only after running tasks have ended, so that no task writes files once the caller goes on.
    """
    limit = max(2, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
    running: dict[Any, int] = {}
    started = 0
    try:
        while started < count or running:
            while started < count and len(running) < limit:
                running[start(started)] = started
                started += 1
            done, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            for reference in done:
                yield running.pop(reference), reference
    finally:
        if running:
            ray.wait(list(running), num_returns=len(running), fetch_local=False)


@ray.remote
def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


@ray.remote
def _produce(read: Callable[[Any], Iterator[Any]], item: Any) -> Iterator[Any]:
    for part in read(item):
        yield part.num_rows
        yield part


@ray.remote
def _split(split: Callable[[Any], Sequence[pa.Table]], item: Any, num_outputs: int) -> Any:
    parts = tuple(split(item))
    assert len(parts) == num_outputs, f"got {len(parts)} tables, expected {num_outputs}"
    return parts if num_outputs > 1 else parts[0]


@ray.remote
def _merge(merge: Callable[[int, list[pa.Table]], Any], output: int, *tables: pa.Table) -> Any:
    return merge(output, list(tables))
