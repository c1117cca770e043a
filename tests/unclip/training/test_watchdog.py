"""Who keeps the others waiting is named."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unclip.training import trained_on_workers
from unclip import files
from unclip.errors import StorageError
from unclip.training.parallel import Workers
from unclip.training.watchdog import ORDER, Watchdog, explain


def mark(activity: str = "taking a step", samples_seen: int = 64, num_beats: int = 1) -> dict[str, Any]:
    place = {"host": "node", "pid": 7, "samples_seen": samples_seen, "activity": activity}
    return {**place, "num_moves": 3, "num_beats": num_beats}


def test_the_cause_is_named() -> None:
    step, again = mark(), mark(num_beats=3)
    reads, earlier = mark("reading rows", num_beats=3), mark("taking a step", 48, num_beats=3)

    def said(before: dict[int, Any], now: dict[int, Any], world_size: int = 2) -> str:
        return explain(before, now, world_size, 9).removeprefix("nothing moved for 9 s: ").removesuffix(".")

    worker = "worker 1 (process 7 on node)"
    assert (
        said({0: step, 1: step}, {0: again, 1: step})
        == f"{worker} does not answer; it was last heard of taking a step after 64 samples"
    )
    assert (
        said({0: step, 1: step}, {0: again, 1: reads})
        == f"{worker} kept the others waiting while reading rows after 64 samples"
    )
    assert (
        said({0: step, 1: step}, {0: again, 1: earlier})
        == f"{worker} kept the others waiting while taking a step after 48 samples"
    )
    assert said({0: step}, {0: again}) == "worker 1 never started"
    assert said({0: step, 1: step}, {0: again, 1: again}).endswith("so look at the network between them")
    assert said({0: step}, {0: reads}, 1) == "it is reading rows after 64 samples"


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., tuple[Watchdog, Watchdog, list[str], threading.Event]]]:
    """Makes two watchdogs of a training of two workers; and what they say, and when."""
    awake = contextlib.ExitStack()

    def start(seconds: float) -> tuple[Watchdog, Watchdog, list[str], threading.Event]:
        said, has_spoken = list[str](), threading.Event()

        def hung(message: str) -> None:
            said.append(message)
            has_spoken.set()

        first, second = (Watchdog(str(tmp_path), Workers(rank, 2), seconds, hung) for rank in range(2))
        for watchdog in (first, second):
            awake.enter_context(watchdog.awake())
        return first, second, said, has_spoken

    with awake:
        yield start


def test_one_that_waits_for_its_rows_is_named(watch: Callable[..., Any]) -> None:
    first, second, said, has_spoken = watch(3.0)
    first.reached("taking a step", 16)
    second.reached("reading rows", 16)
    assert has_spoken.wait(60)
    assert "worker 1 (" in said[0] and "kept the others waiting while reading rows after 16 samples" in said[0]


def test_nobody_is_named_while_one_of_them_moves(tmp_path: Path) -> None:
    said: list[str] = []
    first, second = (Watchdog(str(tmp_path), Workers(rank, 2), 10, said.append) for rank in range(2))
    first.reached("taking a step", 16)
    for now in range(0, 100, 5):  # the other one validates
        second.reached("validating", 16)
        for watchdog in (first, second):
            watchdog.beat()
        first.look(now)
    assert not said
    for now in range(100, 106, 5):
        first.beat()
        first.look(now)
    assert len(said) == 1 and "worker 1 (" in said[0] and "it was last heard of validating after 16 samples" in said[0]


def test_without_a_limit_nothing_is_watched(tmp_path: Path) -> None:
    with Watchdog(str(tmp_path), Workers(), 0, pytest.fail).awake():
        assert not files.names(str(tmp_path))


def test_a_folder_that_cannot_be_written_for_a_while_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, said = threading.Event(), threading.Event()
    write_json = files.write_json

    def fail(uri: str, value: Any) -> None:
        failed.set()
        raise StorageError("the disk is full")

    monkeypatch.setattr(files, "write_json", fail)
    with Watchdog(str(tmp_path), Workers(), 0.5, lambda message: said.set()).awake():
        assert failed.wait(60) and not said.is_set()
        monkeypatch.setattr(files, "write_json", write_json)
        assert said.wait(60)


def test_activities_come_in_the_order_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[tuple[int, str]] = []
    monkeypatch.setattr(Watchdog, "reached", lambda _, activity, samples_seen: reached.append((samples_seen, activity)))
    trained_on_workers.run(tmp_path, "run")
    assert {activity for _, activity in reached} == set(ORDER) - {"starting"}
    places = [(samples_seen, ORDER.index(activity)) for samples_seen, activity in reached]
    assert places == sorted(places)
