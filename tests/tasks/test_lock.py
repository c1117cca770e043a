import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pytest
from deltalake import Schema

from tasks import lock as locks
from tasks import tables
from tasks.lock import TABLES, Held, Owner, lock, result_lock
from tasks.store import Store
from unclip import files
from unclip.errors import AlreadyRunningError, DamagedError, StorageError

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = pa.schema({"key": pa.string()})
ME = Owner.of()
T = TypeVar("T")


def test_f32_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    held = pytest.raises(AlreadyRunningError, match=r"another run is using this storage \(pid \d+ on .*Wait for it")
    with lock(Store(str(tmp_path))), held, lock(Store(str(tmp_path))):
        pass
    with lock(Store(str(tmp_path))):
        pass


def test_f72_all_ways_to_write_a_place_give_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a storage"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(tmp_path)
    ways = [f"{place}/", f"file://{place}", f"file://{str(place).replace(' ', '%20')}/", f"FILE://localhost{place}"]
    ways += [str(tmp_path / "link"), f"file://{tmp_path}/link/", f"{place}/../a storage", f"file://{tmp_path}//link/."]
    ways += ["a storage", "./link"]
    with lock(Store(str(place))):
        for way in ways:
            assert Store(way).root == str(place)
            with pytest.raises(AlreadyRunningError), lock(Store(way)):
                pass


def test_f72_uris_of_one_place_in_an_object_store_are_the_same() -> None:
    for way in ("gs://bucket/a/b/", "GS://bucket/a//b", "gs://bucket/a/./c/../b", "gs://bucket//a/b"):
        assert Store(way).root == "gs://bucket/a/b"
    assert Store("gs://bucket/").root == "gs://bucket"


def test_f75_locks_of_other_names_are_free(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first, second = result_lock("prior", "f" * 64), result_lock("prior", "0" * 64)
    held = pytest.raises(AlreadyRunningError, match=r"making the same result of prior \(pid")
    with lock(store), lock(store, first), lock(store, second), held, lock(store, first):
        pass


def test_f75_a_lock_is_waited_for(tmp_path: Path) -> None:
    store, order = Store(str(tmp_path)), []

    def hold() -> None:
        with lock(store):
            order.append("first")
            time.sleep(0.5)
            order.append("first ends")

    thread = threading.Thread(target=hold)
    thread.start()
    while not order:
        time.sleep(0.01)
    with lock(store, wait=30):
        order.append("second")
    thread.join()
    assert order == ["first", "first ends", "second"]


def test_f73_tokens_grow_and_an_owner_that_was_killed_is_known(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with lock(store) as first:
        pass
    with lock(store) as second:
        pass
    assert (first.token, second.token) == (1, 2) and first.was_given_back and second.was_given_back
    source = "from tasks.lock import lock; from tasks.store import Store; "
    source += f"held = lock(Store({str(tmp_path)!r})); held.__enter__(); "
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", source + "import os; os.kill(os.getpid(), 9)"], env=environment)
    with lock(store) as third:
        assert (third.token, third.was_given_back) == (4, False)


def test_f32_the_tasks_of_a_killed_run_are_waited_for(tmp_path: Path) -> None:
    """They hold the lock of a driver that has ended, until they notice."""
    driver = subprocess.Popen(["true"])
    driver.wait()
    store, held = Store(str(tmp_path)), threading.Event()

    def hold() -> None:
        with lock(store, owner=Owner(ME.host, driver.pid, None, None, "then")):
            held.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    with lock(store) as own:  # no wait is asked for
        assert own.token == 2
    thread.join()


def commit(table: str, *keys: str) -> None:
    part = tables.write_part(table, keys[0], pa.table({"key": list(keys)}, SCHEMA))
    tables.append_files(table, [part], SCHEMA, {"unclip.plan": keys[0]})


def token_of(table: str) -> int:
    opened = tables.open_table(table)
    assert opened is not None
    return tables.token_of(opened)


@pytest.fixture
def lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[Held]]:
    """Take the lease of the tables; its intervals are shortened."""
    for name, seconds in (("HEARTBEAT_SECONDS", 0.1), ("EXPIRY_SECONDS", 0.8)):
        monkeypatch.setattr(locks, name, seconds)
    monkeypatch.setattr(Store, "is_local", property(lambda self: False))
    return lambda: lock(Store(str(tmp_path)))


def test_a_lease_is_renewed_and_given_back(lease: Callable[[], contextlib.AbstractContextManager[Held]]) -> None:
    with lease() as first:
        time.sleep(1.2)  # longer than it lasts without renewal
        with pytest.raises(AlreadyRunningError, match=r"another run is using this storage \(pid \d+ on "), lease():
            pass
    started = time.monotonic()
    with lease() as second:
        assert second.was_given_back and second.token > first.token
    assert time.monotonic() - started < locks.EXPIRY_SECONDS


def abandon(root: Path) -> tuple[locks._Register, int]:
    """Enter an owner that never renews its lease."""
    register = locks._Register(f"{root}/locks/{TABLES}")
    token = register.take(register.read(), ME)
    assert token is not None
    files.write_json(register.beat_uri(token), 7)
    return register, token


def test_the_lease_of_a_run_that_was_killed_expires(
    tmp_path: Path, lease: Callable[[], contextlib.AbstractContextManager[Held]]
) -> None:
    _, token = abandon(tmp_path)
    started = time.monotonic()
    with lease() as held:
        assert held.token > token and not held.was_given_back
    assert time.monotonic() - started >= locks.EXPIRY_SECONDS
    assert not list(tmp_path.glob("locks/tables/beat-*"))


def test_f35_a_lease_does_not_depend_on_the_wall_clock(
    lease: Callable[[], contextlib.AbstractContextManager[Held]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock of the other process is a day ahead, a day behind, or jumps between calls."""
    with lease():
        for shift in (86_400.0, -86_400.0, itertools.cycle((86_400.0, -86_400.0))):
            shifts = itertools.repeat(shift) if isinstance(shift, float) else shift
            with monkeypatch.context() as clock:
                clock.setattr(time, "time", lambda now=time.time, shifts=shifts: now() + next(shifts))
                with pytest.raises(AlreadyRunningError, match="another run is using"), lease():
                    pass
    with lease():
        pass


def test_f32_a_lease_that_is_given_back_meanwhile_is_taken(
    tmp_path: Path, lease: Callable[[], contextlib.AbstractContextManager[Held]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "EXPIRY_SECONDS", 60.0)
    register, token = abandon(tmp_path)
    threading.Timer(0.3, lambda: register.give_back(token, ME)).start()
    with lease() as held:
        assert held.was_given_back


@pytest.mark.parametrize("is_local", [True, False])
def test_f73_an_owner_that_could_not_mark_the_tables_leaves_that_to_the_next(
    tmp_path: Path,
    lease: Callable[[], contextlib.AbstractContextManager[Held]],
    monkeypatch: pytest.MonkeyPatch,
    is_local: bool,
) -> None:
    monkeypatch.setattr(Store, "is_local", property(lambda self: is_local))
    images = f"{tmp_path}/images/recipe"
    tables.create(images, Schema.from_arrow(SCHEMA))
    source = f"from tasks.lock import lock; from tasks.store import Store; import os; held = lock(Store({str(tmp_path)!r})); "
    if is_local:
        script = source + "held.__enter__(); os._exit(0)"
        subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    else:
        abandon(tmp_path)
    with monkeypatch.context() as failing:
        failing.setattr(tables, "fence", fail_to_mark)
        with pytest.raises(StorageError, match="no answer"), lease():
            pass
    before = tables.version(images)
    with lease() as held:
        assert not held.was_given_back and tables.version(images) == (before or 0) + 1
    with lease() as held:
        assert held.was_given_back


def fail_to_mark(_: str) -> None:
    raise StorageError("no answer")


def test_f73_runs_that_wait_for_a_lease_take_it_one_after_the_other(
    tmp_path: Path, lease: Callable[[], contextlib.AbstractContextManager[Held]]
) -> None:
    store, taken = Store(str(tmp_path)), []

    def work() -> None:
        with lock(store, wait=60) as held:
            taken.append(held.token)

    at_once(work, 4)
    assert len(set(taken)) == 4


def at_once(call: Callable[[], T], count: int = 6) -> list[T]:
    """Results of a call in several threads that start together."""
    barrier = threading.Barrier(count)

    def work(_: int) -> T:
        barrier.wait()
        return call()

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def test_f73_only_one_of_many_simultaneous_runs_gets_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have seen the same end of the owner before, and their writes come late and in any order."""
    register, token = abandon(tmp_path)
    commit_note, rng = tables.commit_note, random.Random(0)

    def commit_late(*arguments: Any) -> Any:
        time.sleep(rng.uniform(0, 0.05))
        return commit_note(*arguments)

    monkeypatch.setattr(tables, "commit_note", commit_late)
    for _ in range(2):
        taken = at_once(functools.partial(register.take, register.read(), ME))
        token += 1
        assert len(taken) == 6 and taken.count(None) == 5 and token in taken
    for number in range(5):
        fresh = locks._Register(f"{tmp_path}/locks/{number}")
        taken = at_once(functools.partial(fresh.take, None, ME))
        assert len(taken) == 6 and taken.count(None) == 5
        [token] = filter(None, taken)
        now = fresh.read()
        assert now is not None and (now.token, now.given_back) == (token, False)
    first = locks._Register(f"{tmp_path}/locks/other")
    assert (first.take(None, ME), first.take(None, ME)) == (1, None)


def test_f73_an_owner_paused_beyond_its_lease_neither_writes_on_nor_ends_the_next(
    tmp_path: Path, lease: Callable[[], contextlib.AbstractContextManager[Held]]
) -> None:
    images = f"{tmp_path}/images/recipe"
    register, token = abandon(tmp_path)
    with tables.owned_by(token):
        commit(images, "a")
    with lease() as held:  # the other has not noticed
        assert tables.last_note(images)["unclip.plan"] == "a"
        with (
            tables.owned_by(token),
            pytest.raises(AlreadyRunningError, match="another run has taken over this storage"),
        ):
            commit(images, "late")
        register.give_back(token, ME)
        now = register.read()
        assert now is not None and (now.token, now.given_back) == (held.token, False)
        commit(images, "b")
    assert tables.read(images)["key"].to_pylist() == ["a", "b"]


def test_f73_an_owner_that_has_lost_its_lease_is_told(
    tmp_path: Path, lease: Callable[[], contextlib.AbstractContextManager[Held]]
) -> None:
    with lease() as held:
        register = locks._Register(f"{tmp_path}/locks/{TABLES}")
        assert not held.lost.is_set()
        assert register.take(register.read(), ME) is not None  # as after a pause
        assert held.lost.wait(10)
    now = register.read()
    assert now is not None and not now.given_back


def test_f73_a_commit_that_was_on_its_way_while_another_took_over_fails(tmp_path: Path) -> None:
    """The old owner has loaded the table, and is paused just before the conditional put."""
    table = f"{tmp_path}/images/recipe"
    with tables.owned_by(1):
        commit(table, "a")
        paused = tables.open_table(table)
        assert paused is not None
        with tables.owned_by(2):
            tables.fence(table)
        with pytest.raises(Exception, match="Concurrent transaction"):
            tables.commit_note(paused, tables._properties(paused, {}))
        with pytest.raises(AlreadyRunningError):
            commit(table, "b")
    with tables.owned_by(2):
        commit(table, "c")
    assert tables.read(table)["key"].to_pylist() == ["a", "c"]


@pytest.fixture
def paused(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of the tables and was stopped by a signal."""
    source = "import sys, time; from tasks.lock import lock; from tasks.store import Store\n"
    source += "with lock(Store(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", source, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGSTOP)
        yield process
        process.kill()


def test_f73_in_a_folder_a_paused_owner_keeps_its_lock_until_it_ends(
    tmp_path: Path, paused: subprocess.Popen[str]
) -> None:
    commit(f"{tmp_path}/images/recipe", "a")
    with pytest.raises(AlreadyRunningError, match=f"pid {paused.pid} on"), lock(Store(str(tmp_path))):
        pass
    paused.kill()
    paused.wait()
    with lock(Store(str(tmp_path))) as held:
        assert token_of(f"{tmp_path}/images/recipe") == held.token


def test_a_record_that_was_cut_off_is_an_owner_that_did_not_give_back(tmp_path: Path) -> None:
    images = f"{tmp_path}/images/recipe"
    with tables.owned_by(8):
        commit(images, "a")
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / TABLES).write_text(json.dumps({"token": 8})[:5])
    with lock(Store(str(tmp_path))) as held:
        assert (held.token, token_of(images)) == (9, 9)
    with lock(Store(str(tmp_path))) as held:
        commit(images, "b")
        assert (held.token, token_of(images)) == (9, 9)


@pytest.mark.parametrize("name", [TABLES, "prior-0"])
def test_a_lock_that_is_a_link_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "storage" / "locks").mkdir(parents=True)
    (tmp_path / "storage" / "locks" / name).symlink_to(tmp_path / "theirs")
    with (
        pytest.raises(StorageError, match=f"locks/{name}: cannot be opened"),
        lock(Store(str(tmp_path / "storage")), name),
    ):
        pass
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


def test_tables_behind_a_link_are_not_changed(tmp_path: Path) -> None:
    (tmp_path / "storage" / "images").mkdir(parents=True)
    (tmp_path / "storage" / "images" / "recipe").symlink_to(tmp_path)
    with pytest.raises(DamagedError, match="images/recipe"), lock(Store(str(tmp_path / "storage"))):
        pass
