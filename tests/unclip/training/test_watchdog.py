"""The watchdog names the worker that keeps the others waiting."""

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
    position = {"host": "node", "pid": 7, "samples_seen": samples_seen, "activity": activity}
    return {**position, "num_moves": 3, "num_beats": num_beats}


def test_the_message_names_the_cause() -> None:
    step, again = mark(), mark(num_beats=3)
    reads, earlier = mark("reading rows", num_beats=3), mark("taking a step", 48, num_beats=3)

    def culprits(before: dict[int, Any], now: dict[int, Any], world_size: int = 2) -> str:
        return explain(before, now, world_size, 9).removeprefix("no progress for 9 s: ").removesuffix(".")

    worker = "worker 1 (process 7 on node)"
    assert (
        culprits({0: step, 1: step}, {0: again, 1: step})
        == f"{worker} does not respond; its last sign of life was while taking a step after 64 samples"
    )
    assert (
        culprits({0: step, 1: step}, {0: again, 1: reads})
        == f"{worker} kept the others waiting while reading rows after 64 samples"
    )
    assert (
        culprits({0: step, 1: step}, {0: again, 1: earlier})
        == f"{worker} kept the others waiting while taking a step after 48 samples"
    )
    assert culprits({0: step}, {0: again}) == "worker 1 never started"
    assert culprits({0: step, 1: step}, {0: again, 1: again}).endswith("so check the network between them")
    assert culprits({0: step}, {0: reads}, 1) == "it is reading rows after 64 samples"


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., tuple[Watchdog, Watchdog, list[str], threading.Event]]]:
    """Function that starts the watchdogs of two workers and returns them with their messages and an event."""
    stack = contextlib.ExitStack()

    def start(seconds: float) -> tuple[Watchdog, Watchdog, list[str], threading.Event]:
        messages, has_message = list[str](), threading.Event()

        def on_hang(message: str) -> None:
            messages.append(message)
            has_message.set()

        first, second = (Watchdog(str(tmp_path), Workers(rank, 2), seconds, on_hang) for rank in range(2))
        for watchdog in (first, second):
            stack.enter_context(watchdog.running())
        return first, second, messages, has_message

    with stack:
        yield start


def test_a_worker_that_waits_for_rows_is_named(watch: Callable[..., Any]) -> None:
    first, second, messages, has_message = watch(3.0)
    first.reached("taking a step", 16)
    second.reached("reading rows", 16)
    assert has_message.wait(60)
    assert "worker 1 (" in messages[0] and "kept the others waiting while reading rows after 16 samples" in messages[0]


def test_no_worker_is_named_while_one_makes_progress(tmp_path: Path) -> None:
    messages: list[str] = []
    first, second = (Watchdog(str(tmp_path), Workers(rank, 2), 10, messages.append) for rank in range(2))
    first.reached("taking a step", 16)
    for now in range(0, 100, 5):  # the other one validates
        second.reached("validating", 16)
        for watchdog in (first, second):
            watchdog.beat()
        first.look(now)
    assert not messages
    for now in range(100, 106, 5):
        first.beat()
        first.look(now)
    [message] = messages
    assert "worker 1 (" in message and "its last sign of life was while validating after 16 samples" in message


def test_nothing_is_watched_without_a_limit(tmp_path: Path) -> None:
    with Watchdog(str(tmp_path), Workers(), 0, pytest.fail).running():
        assert not files.names(str(tmp_path))


def test_the_watch_survives_a_temporarily_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_failed, has_message = threading.Event(), threading.Event()
    write_json = files.write_json

    def fail(uri: str, value: Any) -> None:
        has_failed.set()
        raise StorageError("the disk is full")

    monkeypatch.setattr(files, "write_json", fail)
    with Watchdog(str(tmp_path), Workers(), 0.5, lambda message: has_message.set()).running():
        assert has_failed.wait(60) and not has_message.is_set()
        monkeypatch.setattr(files, "write_json", write_json)
        assert has_message.wait(60)


def test_activities_are_listed_in_their_order_in_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[tuple[int, str]] = []
    monkeypatch.setattr(Watchdog, "reached", lambda _, activity, samples_seen: reached.append((samples_seen, activity)))
    trained_on_workers.run(tmp_path, "run")
    assert {activity for _, activity in reached} == set(ORDER) - {"starting"}
    positions = [(samples_seen, ORDER.index(activity)) for samples_seen, activity in reached]
    assert positions == sorted(positions)
