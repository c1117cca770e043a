"""Files of others are read from their own folder, and only as far as a limit."""

import os
from pathlib import Path

import pytest

from unclip import foreign
from unclip.errors import CheckpointError


def test_a_link_out_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to("../secret.json")
    with pytest.raises(CheckpointError, match=r"config\.json: a link to .*secret\.json, outside"):
        foreign.read_json(folder / "config.json")
    (folder / "own.json").write_text('{"a": 1}')
    (folder / "inner.json").symlink_to("own.json")
    (tmp_path / "given").symlink_to("model")
    assert foreign.read_json(tmp_path / "given" / "inner.json") == {"a": 1}, "the folder itself may be a link"


def test_a_cache_of_the_hub_has_links_to_its_blobs(tmp_path: Path) -> None:
    blobs, revision = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc" / "unet"
    blobs.mkdir(parents=True), revision.mkdir(parents=True)
    (blobs / "1").write_text('{"a": 1}')
    (revision / "config.json").symlink_to("../../../blobs/1")
    assert foreign.read_json(revision / "config.json") == {"a": 1}
    (tmp_path / "secret").write_text("{}")
    (revision / "other.json").symlink_to("../../../blobs/../../secret")
    with pytest.raises(CheckpointError, match="outside"):
        foreign.read_json(revision / "other.json")


def test_a_loop_of_links_and_a_linked_cache_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.json").symlink_to("loop.json")
    with pytest.raises(CheckpointError, match=r"loop\.json: cannot be read"):
        foreign.read_json(tmp_path / "loop.json")
    revision = tmp_path / "hub" / "snapshots" / "abc"
    revision.mkdir(parents=True)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "1").write_text("{}")
    (tmp_path / "hub" / "blobs").symlink_to("../secrets")
    (revision / "config.json").symlink_to("../../blobs/1")
    with pytest.raises(CheckpointError, match="outside"):
        foreign.read_json(revision / "config.json")


def test_only_regular_files_of_some_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError, match=r"not a regular file|cannot be read"):
            foreign.read_text(path)
    monkeypatch.setattr(foreign, "MAX_TEXT_BYTES", 10)
    (tmp_path / "text").write_text("0123456789")
    assert foreign.read_text(tmp_path / "text") == "0123456789"
    (tmp_path / "text").write_text("0123456789a")
    with pytest.raises(CheckpointError, match="more than 10 bytes"):
        foreign.read_text(tmp_path / "text")


def test_long_messages_of_torch_are_shortened() -> None:
    error = RuntimeError("Error(s):\n" + "".join(f"\tsize mismatch for layer {number}\n" for number in range(9)))
    assert foreign.first_lines(error) == (
        "Error(s): size mismatch for layer 0 size mismatch for layer 1 size mismatch for layer 2 And 6 more lines."
    )
    assert foreign.first_lines(ValueError("x" * 1000)) == "x" * 500 + "..."
    assert foreign.first_lines(ValueError("one line")) == "one line"
