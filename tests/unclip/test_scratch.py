"""Scratch folders of live and of killed processes."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.pipelines.command_line import ROOT
from unclip.scratch import scratch_folder, sweep_scratch

OWNER = """
import sys, time
from unclip.scratch import scratch_folder
with scratch_folder("shard") as folder:
    (folder / "rows").write_bytes(b"an image")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_f89_the_scratch_of_a_killed_process_is_deleted_and_that_of_a_live_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    others = [
        tmp_path / name for name in ("unclip-places-1", "unclip-notes.txt", "another.scratch", "unclip-shard-abcd_123")
    ]
    for path in others:
        path.write_text("x") if path.suffix == ".txt" else path.mkdir()
    old = tmp_path / "unclip-shard-0123abcd"  # from before folders were locked
    old.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    owners = [subprocess.Popen([sys.executable, "-c", OWNER], **options) for _ in range(2)]  # type: ignore[call-overload]
    try:
        killed, live = (Path(owner.stdout.readline().strip()) for owner in owners)
        owners[0].kill()
        owners[0].wait()
        assert (killed / "rows").exists() and (live / "rows").exists()
        with scratch_folder("list") as own:
            sweep_scratch()
            assert own.is_dir() and live.is_dir() and not killed.exists() and not old.exists()
        assert not own.exists() and all(path.exists() for path in others)
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()
    assert sweep_scratch() == 1 and not live.exists()


def test_f89_the_first_scratch_folder_of_a_process_sweeps_those_that_were_left(tmp_path: Path) -> None:
    left = tmp_path / "unclip-shard-abc.scratch"
    left.mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", OWNER], stdin=subprocess.DEVNULL, env=environment, check=True)
    assert not list(tmp_path.iterdir())


def test_f89_all_temporary_folders_are_scratch_folders() -> None:
    root = Path(__file__).parents[2]
    found = {
        path.relative_to(root).as_posix()
        for package in ("unclip", "tasks", "pipelines")
        for path in (root / package).rglob("*.py")
        if re.search(r"TemporaryDirectory|mkdtemp", path.read_text("utf-8"))
    }
    # An export is written beside the folder that it becomes.
    assert found == {"unclip/scratch.py", "unclip/interop/folders.py"}
