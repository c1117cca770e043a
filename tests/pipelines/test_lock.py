import json
import threading
import time
from pathlib import Path

import pytest

from pipelines import lock as locks
from tasks.store import Store
from unclip.errors import AlreadyRunningError


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    held = pytest.raises(AlreadyRunningError, match=r"another run is at work here \(pid \d+ on .*Wait for it")
    with locks.lock(Store(str(tmp_path))), held, locks.lock(Store(str(tmp_path))):
        pass
    with locks.lock(Store(str(tmp_path))):
        pass


@pytest.fixture
def lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a lease is kept; the clocks are quick."""
    for name, seconds in (("SETTLE_SECONDS", 0.1), ("HEARTBEAT_SECONDS", 0.1), ("EXPIRY_SECONDS", 0.5)):
        monkeypatch.setattr(locks, name, seconds)
    return str(tmp_path / "lease.json")


def test_a_lease_is_renewed_and_given_back(lease: str) -> None:
    with locks._lease(lease):
        time.sleep(0.8)  # longer than it lasts without renewal
        with pytest.raises(AlreadyRunningError), locks._lease(lease):
            pass
    with locks._lease(lease):
        pass


def test_the_lease_of_a_run_that_was_killed_expires(lease: str) -> None:
    Path(lease).write_text(json.dumps({"identity": "dead", "at": time.time() - 0.3, "who": "pid 1"}))
    with pytest.raises(AlreadyRunningError, match="pid 1; a run that was killed"), locks._lease(lease):
        pass
    time.sleep(0.3)
    with locks._lease(lease):
        assert json.loads(Path(lease).read_text())["identity"] != "dead"


def test_of_many_that_start_together_one_has_the_lease(lease: str) -> None:
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
