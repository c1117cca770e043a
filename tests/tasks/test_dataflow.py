"""Dataflow over parts: results in order, regrouped rows, errors of tasks, and small data in the calling process."""

import contextlib
import functools
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray

from tasks import ranges, tables
from tasks.dataflow import exchange, produce, run_all, run_in_actors, share, value
from tests.pipelines.command_line import ROOT
from unclip.errors import InputError

pytestmark = pytest.mark.usefixtures("cluster")


def numbers(start: int) -> pa.Table:
    keys = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(start, start + 100)]
    return pa.table({"key": keys, "number": range(start, start + 100)})


def split_numbers(count: int, start: int) -> list[pa.Table]:
    return ranges.split_by_key(numbers(start), count)


def merge_numbers(folder: str, count: int, output: int, pieces: list[pa.Table]) -> int:
    table = pa.concat_tables(pieces).sort_by("key")
    ranges.write_range(folder, ranges.KeyRange(output, count), table)
    return tables.rows_digest(table)


@pytest.mark.parametrize("num_items", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_rows_are_regrouped_by_key_whatever_the_number_of_items(tmp_path: Path, num_items: int, count: int) -> None:
    starts = list(range(0, 100 * num_items, 100))
    folder = str(tmp_path)
    split, merge = functools.partial(split_numbers, count), functools.partial(merge_numbers, folder, count)
    digests = exchange(split, starts, count, merge)
    expected = pa.concat_tables(map(numbers, starts)).sort_by("key")
    assert ranges.read_all(folder).equals(expected)
    assert tables.hex_digest(*digests) == tables.hex_digest(tables.rows_digest(expected))


def without_keys(known: Any, count: int, start: int) -> list[pa.Table]:
    table = numbers(start)
    return ranges.split_by_key(table.filter(pc.invert(pc.is_in(table["key"], value_set=value(known)))), count)


def num_rows(_: int, pieces: list[pa.Table]) -> int:
    return sum(piece.num_rows for piece in pieces)


def test_tasks_read_a_value_that_they_share() -> None:
    known = numbers(50)["key"].combine_chunks()  # of which the first item has half, and the second the other half
    shared = share(known)
    assert isinstance(shared, ray.ObjectRef) and value(shared).equals(known)
    assert sum(exchange(functools.partial(without_keys, shared, 2), [0, 100], 2, num_rows)) == 100


WITHOUT_RAY = """
import sys
from tests.tasks.test_dataflow import *
sys.modules.pop("ray", None)
folder, starts = sys.argv[1], [0, 100, 200]
split, merge = functools.partial(split_numbers, 4), functools.partial(merge_numbers, folder, 4)
exchange(split, starts, 4, merge)
assert ranges.read_all(folder).equals(pa.concat_tables(map(numbers, starts)).sort_by("key"))
assert run_all(process_id, starts) == [os.getpid()] * 3 and "ray" not in sys.modules
"""


def test_a_process_without_ray_does_the_same_by_itself(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def process_id(_: int) -> int:
    return os.getpid()


def test_results_keep_the_order_of_their_items_and_a_single_item_starts_no_task() -> None:
    done: list[int] = []
    assert run_all(abs, [-3, -1, -2], on_done=lambda item, _: done.append(item)) == [3, 1, 2]
    assert sorted(done) == [-3, -2, -1]
    assert os.getpid() not in run_all(process_id, [0, 1])
    assert run_all(process_id, [0]) == [os.getpid()]
    assert run_all(process_id, []) == []


def produce_numbers(fail: int, start: int) -> Iterator[pa.Table]:
    for size in range(start):
        if size == fail:
            raise InputError(f"part {size} is damaged")
        yield numbers(start).slice(0, size)


def test_tables_that_tasks_yield_are_left_in_the_object_store_and_can_be_exchanged(tmp_path: Path) -> None:
    produced = produce(functools.partial(produce_numbers, -1), [3, 0, 101])
    assert [[num_rows for num_rows, _ in parts] for parts in produced] == [[0, 1, 2], [], [*range(101)]]
    parts = [part for parts in produced for _, part in parts]
    tables_of_parts = ray.get(parts)
    assert [table.num_rows for table in tables_of_parts] == [0, 1, 2, *range(101)]
    expected = tables.rows_digest(pa.concat_tables(tables_of_parts))
    for count, items in ((1, parts), (4, parts), (1, parts[-1:])):
        split = functools.partial(ranges.split_by_key, count=count)
        digests = exchange(
            split, items, count, functools.partial(merge_numbers, str(tmp_path / str(len(items))), count)
        )
        assert tables.hex_digest(*digests) == tables.hex_digest(
            expected if len(items) > 1 else tables.rows_digest(tables_of_parts[-1])
        )


def test_the_error_of_a_producing_task_reaches_the_caller_as_itself() -> None:
    with pytest.raises(InputError, match="part 2 is damaged"):
        produce(functools.partial(produce_numbers, 2), [1, 9])


def fail_at_two(item: int) -> int:
    if item == 2:
        raise InputError("item 2 is damaged")
    return item


def test_the_error_of_a_task_reaches_the_caller_as_itself() -> None:
    with pytest.raises(InputError, match="item 2 is damaged"):
        run_all(fail_at_two, [0, 1, 2, 3])


def die_once(marker: str, item: int) -> int:
    path = Path(marker)
    if item == 1 and not path.exists():
        path.touch()
        os._exit(9)
    return item


def test_a_task_whose_process_dies_is_repeated(tmp_path: Path) -> None:
    assert run_all(functools.partial(die_once, str(tmp_path / "died")), [0, 1, 2]) == [0, 1, 2]
    assert (tmp_path / "died").exists()


@ray.remote(num_cpus=1)
class Echo:
    """Actor that returns names, and dies of some."""

    def __init__(self, marker: str, is_broken: bool = False) -> None:
        if is_broken:
            raise ValueError("no such model")
        self.marker = Path(marker)

    def echo(self, name: str) -> str:
        if name == "dies once" and not self.marker.exists():
            self.marker.touch()
            os._exit(9)
        if name == "dies":
            os._exit(9)
        if name == "slow":
            time.sleep(2)
            self.marker.touch()
        return name


def names_from_actors(names: list[str], num_actors: int, *arguments: object) -> list[str]:
    start = functools.partial(Echo.remote, *arguments)  # type: ignore[attr-defined]
    return sorted(
        name for _, name in run_in_actors(start, num_actors, lambda actor, name: actor.echo.remote(name), names)
    )


def test_f48_the_item_of_a_dead_actor_goes_to_another_and_an_actor_without_room_delays_none(tmp_path: Path) -> None:
    uris = ["1", "2", "3", "4", "5", "dies once"]
    assert names_from_actors(uris, 3, str(tmp_path / "marker")) == uris  # the cluster has two CPUs
    assert (tmp_path / "marker").exists()


def test_an_item_under_way_has_ended_before_the_caller_goes_on(tmp_path: Path) -> None:
    start = functools.partial(Echo.remote, str(tmp_path / "marker"))  # type: ignore[attr-defined]
    results = run_in_actors(start, 2, lambda actor, name: actor.echo.remote(name), ["slow", *"abcdef"])
    with contextlib.suppress(ValueError), contextlib.closing(results) as done:
        next(done)
        raise ValueError("a takedown was recorded meanwhile")
    assert (tmp_path / "marker").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("uri", "is_broken"), [("1", True), ("dies", False)])
def test_actors_that_cannot_work_fail_the_stage(tmp_path: Path, uri: str, is_broken: bool) -> None:
    with pytest.raises(ray.exceptions.RayActorError):
        names_from_actors([uri], 1, str(tmp_path / "marker"), is_broken)
