"""Progress that waits for workers, of which several may begin."""

import time
from pathlib import Path

import pytest

from tasks.progress import Progress, bar, times
from unclip import files


def test_the_first_worker_ends_the_waiting_and_others_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    uri = str(tmp_path / "embed.json")
    counting, first, second = (Progress(uri, 100, "pairs") for _ in range(3))
    counting.wait("for 2 x 1 CPU")
    assert bar("embed", files.read_json(uri)).endswith("0/100 pairs  waiting for 2 x 1 CPU")
    assert times(uri).began is None
    clock[0] = 1030.0
    first.begin()
    assert bar("embed", files.read_json(uri)).endswith("0/100 pairs  starting")
    clock[0] = 1040.0
    counting.update(100)
    second.begin()
    assert "100/100 pairs  10/s  0:00 left" in bar("embed", files.read_json(uri)), "counted from where work began"
    assert (times(uri).waited, times(uri).began) == (30.0, 1030.0)
    again = Progress(uri, 10, "images")
    again.wait("for 1 CPU")
    clock[0] = 1045.0
    again.begin()
    assert times(uri).waited == 35.0, "a stage may wait twice"


def test_a_resumed_training_has_its_own_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    uri = str(tmp_path / "prior.json")
    Progress(uri, 100, "samples").wait("for 1 CPU")
    for began, done in ((1010.0, 0), (1100.0, 40)):  # a worker that dies, and the next
        clock[0] = began
        worker = Progress(uri, 100, "samples")
        worker.begin()
        worker.start(done)
    clock[0] = 1106.0
    worker.update(60)
    assert "100/100 samples  10/s" in bar("prior", files.read_json(uri)) and times(uri).waited == 10.0
