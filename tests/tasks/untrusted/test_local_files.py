"""Local images: read below their root alone."""

import os
from pathlib import Path

import pytest

from tasks.rows import RowFault
from tasks.untrusted import local_files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "in").mkdir(parents=True)
    (tmp_path / "root" / "in" / "a b%20.jpg").write_bytes(b"image")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    return tmp_path / "root"


def outcome(root: Path, path: object, max_bytes: int = 100) -> bytes | str:
    try:
        return local_files.read(str(root), str(path), max_bytes)
    except RowFault as fault:
        return fault.reason


def test_f104_nothing_outside_the_root_is_read(root: Path) -> None:
    outside = root.parent / "secret.jpg"
    (root / "link.jpg").symlink_to(outside)
    (root / "folder").symlink_to(root.parent)
    (root / "loop").symlink_to("loop")
    (root / "inner.jpg").symlink_to("in/a b%20.jpg")
    (root / "empty.jpg").touch()
    os.mkfifo(root / "pipe.jpg")
    blocked = [
        outside,
        root / "../secret.jpg",
        root / "link.jpg",
        root / "folder" / "secret.jpg",
        f"{root}2/a.jpg",
        "/etc/hosts",
    ]
    assert {str(path): outcome(root, path) for path in blocked} == dict.fromkeys(map(str, blocked), "blocked_path")
    absent = [
        root / "none.jpg",
        root,
        root / "in",
        root / "pipe.jpg",
        root / "loop",
        f"{root}/a\0b",
        root / "in/a b%20.jpg/x",
    ]
    assert {outcome(root, path) for path in absent} == {"no_file"}
    assert outcome(root, root / "in/a b%20.jpg") == outcome(root, root / "inner.jpg") == b"image"
    assert outcome(Path("/dev"), "/dev/null") == outcome(Path("/dev"), "/dev/zero") == "no_file"
    assert outcome(root, root / "in/a b%20.jpg", 4) == "too_large" and outcome(root, root / "empty.jpg") == "empty_body"


def test_f104_a_link_that_replaces_a_folder_while_it_is_read_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is replaced between the check of the path and the opening of the file."""
    real_open = os.open

    def replace_first(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        if dir_fd is None:
            (root / "in").rename(root / "away")
            (root / "in").symlink_to(root.parent)
        return real_open(path, flags, dir_fd=dir_fd)

    (root / "in" / "secret.jpg").write_bytes(b"own")
    monkeypatch.setattr(os, "open", replace_first)
    assert outcome(root, root / "in" / "secret.jpg") == "no_file"


def test_f104_a_link_that_replaces_the_file_while_it_is_read_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last part of the path is replaced just before it is opened."""
    real_open, own = os.open, root / "in" / "own.jpg"

    def replace_first(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        if path == own.name:
            own.unlink()
            own.symlink_to(root.parent / "secret.jpg")
        return real_open(path, flags, dir_fd=dir_fd)

    own.write_bytes(b"own")
    monkeypatch.setattr(os, "open", replace_first)
    assert outcome(root, own) == "no_file"
    assert own.is_symlink(), "it was replaced"


def test_f103_paths_have_one_spelling(root: Path) -> None:
    expected = f"file://{root}/in/a%20b%2520.jpg"
    others = [expected.replace("file://", prefix) for prefix in ("FILE://localhost", "file:", "file://")]
    for text in (f"{root}/in/a b%20.jpg", f" {root}//in/./../in/a b%20.jpg", "in/a b%20.jpg", *others):
        assert local_files.to_url(text, str(root)) == expected, text
    assert local_files.to_path(expected) == f"{root}/in/a b%20.jpg"
    for text in ("", "file://other.example/a.jpg", "a\0b", "s3://bucket/a.jpg", "/" + "a" * 5000, "\ud800"):
        assert local_files.to_url(text, str(root)) is None, text
    assert local_files.to_url("in/a.jpg") is None
    (root / "other").symlink_to("in")
    assert local_files.to_url(f"{root}/other/a b%20.jpg") == expected
    raw = os.fsdecode(b"/tmp/\xff\xe4.jpg")
    assert local_files.to_url(raw) == "file:///tmp/%FF%E4.jpg" and local_files.to_path("file:///tmp/%FF%E4.jpg") == raw


def test_f103_texts_that_no_url_parser_reads_are_no_files(root: Path) -> None:
    for text in ("file://[x/a.jpg", "file://\u2100/x", "FILE://a]b/x", "file://[::1/x.jpg"):
        assert local_files.to_url(text, str(root)) is None, text
        assert local_files.describe(text, str(root)) is None, text


def test_f103_a_path_is_measured_in_bytes_as_the_system_does(root: Path) -> None:
    """Quoted, each of these letters takes nine characters."""
    path = root / ("\u732b" * 80) / ("\u72ac" * 80) / ("\u9ce5" * 80) / "\u9b5a.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"image")
    found = local_files.describe(str(path), str(root))
    assert found is not None and found.reason is None and len(found.url) > 2048
    assert local_files.to_path(found.url) == str(path)
    assert local_files.to_url("a/" * 2049, str(root)) is None
