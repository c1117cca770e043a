"""CPUs of a container, and calls with a time limit."""

import os
import sys
import threading
from pathlib import Path

import pytest

from unclip.background import usable_cpus, within


def test_the_result_or_the_error_of_a_call_with_a_limit_is_its_own() -> None:
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)
    with pytest.raises(SystemExit, match="7"):  # not "no answer within 5 s"
        within(5.0, lambda: sys.exit(7))
    ended = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        within(0.01, lambda: ended.wait(60))
    ended.set()


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_a_container_on_a_large_machine_uses_its_quota_of_cpus(
    contents: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "cpu").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_text(f"{content}\n")
    assert usable_cpus(tmp_path) == expected
