import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from unclip import files
from unclip.errors import StorageError


@contextlib.contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond this, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_f30_without_room_the_old_file_stays_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "data"
    files.write(str(path), b"old")
    with (
        room_for(10_000),
        pytest.raises(
            StorageError, match=r"folder/data: cannot write 1,000,000 bytes: .*too large.*same command again"
        ),
    ):
        files.write(str(path), bytes(1_000_000))
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    files.write(str(path), bytes(1_000_000))
    assert len(path.read_bytes()) == 1_000_000


def test_f31_what_cannot_be_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(StorageError, match="cannot write 1 bytes: "):
            files.write(str(path), b"x")


def test_bytes_are_kept_whatever_the_name(tmp_path: Path) -> None:
    files.write(str(tmp_path / "a.gz"), b"no gzip")
    assert (tmp_path / "a.gz").read_bytes() == b"no gzip" == files.read(str(tmp_path / "a.gz"))


def test_an_object_store_is_asked_again_and_a_disk_is_not() -> None:
    calls: list[str] = []

    def fail_twice(uri: str) -> str:
        calls.append(uri)
        if calls.count(uri) < 3:
            raise OSError("again")
        return "done"

    assert files.patiently("s3://bucket/key", lambda: fail_twice("s3")) == "done" and calls.count("s3") == 3
    with pytest.raises(OSError, match="again"):
        files.patiently("/a/file", lambda: fail_twice("disk"))
    with pytest.raises(FileNotFoundError):
        files.patiently("s3://bucket/none", lambda: open("/nowhere/at/all").close())


def test_what_a_killed_writer_left_is_not_seen_and_swept(tmp_path: Path) -> None:
    left = tmp_path / "folder" / f"data.json.{'0a' * 16}.tmp"
    files.write(str(tmp_path / "folder" / "data.json"), b"{}")
    left.write_bytes(b"half")
    (tmp_path / "folder" / "mine.tmp").write_bytes(b"not ours")
    assert files.names(str(tmp_path / "folder")) == ["data.json"]
    files.sweep(str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["data.json", "mine.tmp"]
