"""Dataflow over the rows of a dataset as plain Ray tasks, in bounded memory on every node.

A task reads one part of a table and writes one file or returns a small result, so no process holds more than a part. Since
tables are split by ranges of keys that are hashes, joins need no shuffle. For the few steps that regroup rows there is
`exchange`; its pieces travel through Ray's object store, which spills to disk and remakes pieces that a lost node held.

Ray Data can do the same, but its partitions by hash would have to be sorted and sized again for every table, and starting its
executor costs each small run seconds.

Commands that start no Ray use the same functions: in a process without Ray, items are worked through one after another, and
pieces go to a temporary folder. Ray is imported only where it runs.
"""

import functools
import operator
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.feather

from unclip.scratch import scratch_folder

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_RETRIES = 3
_DEATHS_PER_ACTOR = 3  # without any result in between
_OPTIONS: dict[str, Any] = {"num_cpus": 1, "max_retries": _RETRIES, "scheduling_strategy": "SPREAD"}


def run_all(
    function: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    on_done: Callable[[ItemT, ResultT], None] = lambda *_: None,
    **options: Any,
) -> list[ResultT]:
    """Call the function for every item, each in a Ray task, and return the results in order.

    As many tasks run at once as the cluster has CPUs. A task whose process or node dies is repeated. A single item runs in
    the calling process, so that small data starts no processes; so do all items if the process has no Ray.

    Args:
        function: module-level function or `functools.partial` of one; must give the same result when it is repeated.
        on_done: called in the calling process after each item.
        options: options of the Ray tasks, such as `num_cpus`.
    """
    results: list[Any] = [None] * len(items)
    if len(items) == 1 or not _has_ray():
        for index, item in enumerate(items):
            results[index] = function(item)
            on_done(item, results[index])
        return results
    import ray

    call = _remote(_call).options(**_OPTIONS | options)
    for index, reference in _in_flight(lambda index: call.remote(function, items[index]), len(items)):
        results[index] = ray.get(reference)
        on_done(items[index], results[index])
    return results


def produce(
    read: Callable[[ItemT], Iterator[Any]],
    items: Sequence[ItemT],
    describe: Callable[[Any], Any] = operator.attrgetter("num_rows"),
    **options: Any,
) -> list[list[Any]]:
    """Call a generator function for every item, each in a Ray task, and leave the parts that it yields in the object store.

    Args:
        read: item -> parts, such as tables; must yield the same parts when it is repeated.
        describe: part -> small description, by default its number of rows.
        options: options of the Ray tasks.

    Returns:
        For every item, (description, reference) of each part; the references can be items of `exchange`.
    """
    import ray

    producing = _remote(_produce).options(**_OPTIONS | options, num_returns="streaming")
    generators: dict[int, Any] = {}

    def start(index: int) -> Any:
        generators[index] = producing.remote(read, items[index], describe)
        return generators[index].completed()

    results: list[Any] = [None] * len(items)
    for index, _ in _in_flight(start, len(items)):
        references = list(generators.pop(index))
        described = ray.get(references[::2])  # an error takes the place of a description
        results[index] = list(zip(described, references[1::2], strict=True))
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
        items: values, or references of values in the object store. An item may also be a list of references, whose values
            `split` asks for with `value`.
        merge: (number of the output, its tables in the order of items) -> small result, usually of a file that it wrote.
        options: options of the Ray tasks.

    Returns:
        Results of `merge`, in order.
    """
    if len(items) <= 1 and num_outputs == 1:
        return [merge(0, [split(value(item))[0] for item in items])]
    if not _has_ray():
        return _exchange_on_disk(split, items, num_outputs, merge)
    import ray

    pieces: list[list[Any]] = [[] for _ in items]
    splitting = _remote(_split).options(**_OPTIONS | options, num_returns=num_outputs)

    def start_split(index: int) -> Any:
        returned: Any = splitting.remote(split, items[index], num_outputs)
        pieces[index] = returned if num_outputs > 1 else [returned]
        return pieces[index][0]

    for _, reference in _in_flight(start_split, len(items)):
        ray.get(reference)  # raises the task's error

    def start_merge(output: int) -> Any:
        own = [piece[output] for piece in pieces]
        return _remote(_merge).options(**_OPTIONS | options).remote(merge, output, *own)

    results: list[Any] = [None] * num_outputs
    for output, reference in _in_flight(start_merge, num_outputs):
        results[output] = ray.get(reference)
        for piece in pieces:  # frees the memory
            piece[output] = None
    return results


def run_in_actors(
    start: Callable[[], Any], num_actors: int, call: Callable[[Any, ItemT], Any], items: Iterable[ItemT]
) -> Generator[tuple[ItemT, Any], None, None]:
    """Work through items in actors, one at a time in each; yield items and results in the order in which they are done.

    Ray's own pool and restarts would leave an item with an actor that no node has room for, such as one of a lost node. Here
    an actor gets items only once it runs, and the item of an actor that died goes to the next one that is free. Items under way
    are waited for, also if the caller closes the iterator, so that no actor writes files once the caller goes on.

    Args:
        start: starts one actor.
        call: (actor, item) -> reference of the result.

    Raises:
        RayActorError: an actor could not be created, or actors keep dying.
    """
    import ray

    remaining = iter(items)
    starting: dict[Any, Any] = {}
    running: dict[Any, tuple[Any, ItemT]] = {}
    idle: list[Any] = []
    again: list[ItemT] = []
    num_deaths = 0
    for _ in range(num_actors):
        actor = start()
        starting[actor.__ray_ready__.remote()] = actor
    try:
        while True:
            while idle and (item := again.pop() if again else next(remaining, None)) is not None:
                actor = idle.pop()
                running[call(actor, item)] = actor, item
            if idle and not running:
                return
            [done], _ = ray.wait([*starting, *running], num_returns=1)
            actor, *given = running.pop(done) if done in running else (starting.pop(done),)
            try:
                result = ray.get(done)
            except ray.exceptions.RayActorError as error:
                num_deaths += 1
                if error.actor_init_failed or num_deaths > _DEATHS_PER_ACTOR * num_actors:
                    raise
                again += given
                actor = start()
                starting[actor.__ray_ready__.remote()] = actor
                continue
            idle.append(actor)
            if given:
                num_deaths = 0
                yield given[0], result
    finally:
        if running:
            ray.wait(list(running), num_returns=len(running), fetch_local=False)


def _exchange_on_disk(
    split: Callable[[ItemT], Sequence[pa.Table]],
    items: Sequence[ItemT],
    num_outputs: int,
    merge: Callable[[int, list[pa.Table]], ResultT],
) -> list[ResultT]:
    with scratch_folder("exchange") as folder:
        for number, item in enumerate(items):
            for output, piece in enumerate(_checked(split(item), num_outputs)):
                pyarrow.feather.write_feather(piece, str(Path(folder, f"{output}-{number}")), compression="lz4")
        return [
            merge(
                output,
                [pyarrow.feather.read_table(Path(folder, f"{output}-{number}")) for number in range(len(items))],
            )
            for output in range(num_outputs)
        ]


def share(item: Any) -> Any:
    """Reference of a large value that many tasks read with `value`: each node gets it once."""
    if not _has_ray():
        return item
    import ray

    return ray.put(item)


def value(item: Any) -> Any:
    """Value of an item that may be a reference; Ray itself replaces only items, not what they hold."""
    if not _has_ray():
        return item
    import ray

    return ray.get(item) if isinstance(item, ray.ObjectRef) else item


def _has_ray() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _in_flight(start: Callable[[int], Any], count: int) -> Iterator[tuple[int, Any]]:
    """Start `count` tasks, a bounded number at once; yield the index and reference of each when it is done.

    Raises the first error only after running tasks have ended, so that no task writes files once the caller goes on.
    """
    import ray

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


@functools.cache
def _remote(function: Callable[..., Any]) -> Any:
    import ray

    return ray.remote(function)


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def _produce(read: Callable[[Any], Iterator[Any]], item: Any, describe: Callable[[Any], Any]) -> Iterator[Any]:
    for part in read(item):
        yield describe(part)
        yield part


def _split(split: Callable[[Any], Sequence[pa.Table]], item: Any, num_outputs: int) -> Any:
    parts = tuple(_checked(split(item), num_outputs))
    return parts if num_outputs > 1 else parts[0]


def _checked(parts: Sequence[pa.Table], num_outputs: int) -> Sequence[pa.Table]:
    assert len(parts) == num_outputs, f"got {len(parts)} tables, expected {num_outputs}"
    return parts


def _merge(merge: Callable[[int, list[pa.Table]], Any], output: int, *tables: pa.Table) -> Any:
    return merge(output, list(tables))
