import itertools
import json
import threading
import time
from pathlib import Path

import pytest

from pipelines import lock as locks
from tasks.store import Store
from unclip.errors import AlreadyRunningError


def test_f32_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    held = pytest.raises(AlreadyRunningError, match=r"another run is using this storage \(pid \d+ on .*Wait for it")
    with locks.lock(Store(str(tmp_path))), held, locks.lock(Store(str(tmp_path))):
        pass
    with locks.lock(Store(str(tmp_path))):
        pass


@pytest.fixture
def lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a lease; its intervals are shortened."""
    for name, seconds in (("SETTLE_SECONDS", 0.1), ("HEARTBEAT_SECONDS", 0.1), ("EXPIRY_SECONDS", 0.5)):
        monkeypatch.setattr(locks, name, seconds)
    return str(tmp_path / "lease.json")


def test_a_lease_is_renewed_and_released(lease: str) -> None:
    with locks._lease(lease):
        time.sleep(0.8)  # longer than it lasts without renewal
        with pytest.raises(AlreadyRunningError), locks._lease(lease):
            pass
    with locks._lease(lease):
        pass


def test_the_lease_of_a_run_that_was_killed_expires(lease: str) -> None:
    Path(lease).write_text(json.dumps({"identity": "dead", "beat": 7, "who": "pid 1"}))
    started = time.monotonic()
    with locks._lease(lease):
        assert json.loads(Path(lease).read_text())["identity"] != "dead"
    assert time.monotonic() - started >= locks.EXPIRY_SECONDS


def test_f35_a_lease_does_not_depend_on_the_wall_clock(lease: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock of the other process is a day ahead, a day behind, or jumps between calls."""
    with locks._lease(lease):
        for shift in (86_400.0, -86_400.0, itertools.cycle((86_400.0, -86_400.0))):
            shifts = itertools.repeat(shift) if isinstance(shift, float) else shift
            with monkeypatch.context() as clock:
                clock.setattr(time, "time", lambda now=time.time, shifts=shifts: now() + next(shifts))
                with pytest.raises(AlreadyRunningError, match="another run is using"), locks._lease(lease):
                    pass
    with locks._lease(lease):
        pass


def test_f32_a_lease_that_is_released_meanwhile_is_taken(lease: str) -> None:
    Path(lease).write_text(json.dumps({"identity": "other", "beat": 1, "who": "pid 1"}))
    threading.Timer(0.2, Path(lease).unlink).start()
    started = time.monotonic()
    with locks._lease(lease):
        assert time.monotonic() - started >= 0.2


def test_f32_only_one_of_many_simultaneous_runs_gets_the_lease(lease: str) -> None:
    held: list[int] = []

    def take(number: int) -> None:
        try:
            with locks._lease(lease):
                held.append(number)
                time.sleep(0.4)
        except AlreadyRunningError:
            pass

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
