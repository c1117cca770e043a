"""Entry points of other packages are read once, and those of a new folder are found."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from pipelines.comparison import find_entries
from pipelines.preset import SYSTEM_ENTRY_POINTS, system_names
from unclip import entry_points as entry_points_module
from unclip.entry_points import entry_points


def test_planning_a_comparison_reads_each_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], importlib.metadata.entry_points

    def count(**group: Any) -> Any:
        read.append(group["group"])
        return real(**group)

    entry_points_module._read.cache_clear()
    monkeypatch.setattr(importlib.metadata, "entry_points", count)
    assert len(find_entries("tiny", None, [], None)) > 10
    assert SYSTEM_ENTRY_POINTS in read and len(read) == len(set(read))


def test_a_package_in_a_new_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "stranger" not in system_names()
    folder = tmp_path / "stranger-0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 0.1\n")
    (folder / "entry_points.txt").write_text(f"[{SYSTEM_ENTRY_POINTS}]\nstranger = stranger:PIPELINE\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "stranger" in system_names() and entry_points(SYSTEM_ENTRY_POINTS)["stranger"].value == "stranger:PIPELINE"
