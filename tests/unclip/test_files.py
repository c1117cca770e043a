import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unclip import files
from unclip.errors import DamagedError, StorageError


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Limit the size of files, as on a nearly full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_f30_without_space_the_old_file_stays_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "data"
    files.write(str(path), b"old")
    with (
        file_size_limit(10_000),
        pytest.raises(
            StorageError, match=r"folder/data: cannot write 1,000,000 bytes: .*too large.*same command again"
        ),
    ):
        files.write(str(path), bytes(1_000_000))
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    files.write(str(path), bytes(1_000_000))
    assert len(path.read_bytes()) == 1_000_000


def test_f31_errors_name_an_impossible_path(tmp_path: Path) -> None:
    """Cover ENOTDIR and ENAMETOOLONG."""
    (tmp_path / "file").write_bytes(b"")
    for path, reason in (
        (tmp_path / "file" / "below", "Not a directory|File exists"),
        (tmp_path / ("n" * 300), "too long"),
    ):
        with pytest.raises(StorageError, match=rf"cannot write 1 bytes: .*({reason})"):
            files.write(str(path), b"x")


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """Mount a temporary file system; only root can."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("size=64k", "No space left on device"),
        ("nr_inodes=3", "No space left on device"),
        ("ro", "Read-only file system"),
    ],
)
def test_f30_f31_errors_name_a_full_or_read_only_file_system(tmp_path: Path, options: str, reason: str) -> None:
    folder = tmp_path / "small"
    with mounted(folder, options):
        if options != "ro":
            files.write(f"{folder}/old", b"old")
        expected = rf"{folder}/new: cannot write 100,000 bytes: .*{reason}.*run the same command again"
        if options == "nr_inodes=3":  # the root, the old file and one more
            files.write(f"{folder}/last", bytes(100_000))
        with pytest.raises(StorageError, match=expected):
            files.write(f"{folder}/new", bytes(100_000))
        left = sorted(path.name for path in folder.iterdir())
        assert left == {"size=64k": ["old"], "nr_inodes=3": ["last", "old"], "ro": []}[options]


def test_f31_a_folder_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"old")
    tmp_path.chmod(0o500)
    user = os.geteuid()
    if user == 0:  # root ignores permissions
        os.seteuid(65534)
    try:
        with pytest.raises(StorageError, match=r"data: cannot write 1 bytes: .*Permission denied"):
            files.write(str(tmp_path / "data"), b"x")
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
    assert (tmp_path / "data").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_f31_no_file_descriptor_is_left(tmp_path: Path) -> None:
    path = tmp_path / "data"
    files.write(str(path), b"old")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    opened: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.dup(0))
        with pytest.raises(StorageError, match=r"data: cannot write 1 bytes: .*Too many open files"):
            files.write(str(path), b"x")
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    files.write(str(path), b"new")
    assert path.read_bytes() == b"new"


def test_bytes_do_not_depend_on_the_file_name(tmp_path: Path) -> None:
    files.write(str(tmp_path / "a.gz"), b"no gzip")
    assert (tmp_path / "a.gz").read_bytes() == b"no gzip" == files.read(str(tmp_path / "a.gz"))


def test_operations_are_retried_on_object_stores_only() -> None:
    calls: list[str] = []

    def fail_twice(uri: str) -> str:
        calls.append(uri)
        if calls.count(uri) < 3:
            raise OSError("again")
        return "done"

    assert files.with_retries("s3://bucket/key", lambda: fail_twice("s3")) == "done" and calls.count("s3") == 3
    with pytest.raises(OSError, match="again"):
        files.with_retries("/a/file", lambda: fail_twice("disk"))
    with pytest.raises(FileNotFoundError):
        files.with_retries("s3://bucket/none", lambda: open("/nowhere/at/all").close())


def test_temporary_files_of_killed_writers_are_hidden_and_swept(tmp_path: Path) -> None:
    temporary = tmp_path / "folder" / f"data.json.{'0a' * 16}.tmp"
    files.write(str(tmp_path / "folder" / "data.json"), b"{}")
    temporary.write_bytes(b"half")
    (tmp_path / "folder" / "mine.tmp").write_bytes(b"not ours")
    assert files.names(str(tmp_path / "folder")) == ["data.json"]
    files.sweep(str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["data.json", "mine.tmp"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_local_path_and_its_uri_behave_alike(tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain paths have their own code, without pyarrow."""
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)  # URIs are retried
    root = f"{scheme}{tmp_path}"
    file, missing, below_a_file = f"{root}/folder/b", f"{root}/missing", f"{root}/folder/b/c"
    files.write(file, b"whole")
    files.write(f"{root}/folder/a", b"")
    assert not files.write(file, b"later", replace=False) and files.read(file) == b"whole"
    Path(tmp_path, "folder", "c.tmp").touch()
    assert files.names(f"{root}/folder") == ["a", "b"]
    assert files.names(missing) == files.names(below_a_file) == []
    assert [files.exists(uri) for uri in (file, f"{root}/folder", missing, below_a_file)] == [True, True, False, False]
    for uri, error in ((missing, FileNotFoundError), (below_a_file, OSError), (f"{root}/folder", OSError)):
        with pytest.raises(error):
            files.read(uri)
    with pytest.raises(NotADirectoryError):
        files.names(file)
    for uri in (missing, below_a_file, file):
        files.delete(uri)
    assert files.names(f"{root}/folder") == ["a"]
    files.delete(f"{root}/folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_size_of_a_folder_is_that_of_all_files_below_it(tmp_path: Path, scheme: str) -> None:
    uri = f"{scheme}{tmp_path}/folder"
    assert files.size(uri) == 0
    files.write(f"{uri}/a", bytes(10))
    files.write(f"{uri}/inner/b", bytes(5))
    assert files.size(uri) == 15


def test_f94_a_file_and_its_new_folders_are_synced_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, list[str]]] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        names = sorted(each.name for each in path.iterdir()) if path.is_dir() else []
        synced.append((str(path.relative_to(tmp_path)), names))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    files.write(f"{tmp_path}/a/b/file", b"x")
    assert synced[:2] == [("a", ["b"]), (".", ["a"])]
    assert synced[2][0].startswith("a/b/file.") and synced[2][0].endswith(".tmp")
    assert synced[3:] == [("a/b", ["file"])]
    synced.clear()
    assert not files.write(f"{tmp_path}/a/b/file", b"y", replace=False) and files.write(f"{tmp_path}/a/b/file", b"z")
    assert [folder for folder, _ in synced if not folder.endswith(".tmp")] == ["a/b", "a/b"]


def test_f94_a_link_and_its_new_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, list[str]]] = []

    def record(folder: Path) -> None:
        synced.append((str(folder.relative_to(tmp_path)), sorted(each.name for each in folder.iterdir())))

    monkeypatch.setattr(files, "sync_folder", record)
    (tmp_path / "file").write_bytes(b"x")
    files.copy(f"{tmp_path}/file", f"{tmp_path}/a/b/copy")
    assert synced == [("a", ["b"]), (".", ["a", "file"]), ("a/b", ["copy"])]
    assert (tmp_path / "a" / "b" / "copy").samefile(tmp_path / "file")


@pytest.mark.parametrize("text", ["a = 1\n", "b \u00e4 \u4e2d\n", "\u4e2d\n", "", "\n", "a"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_f101_text_is_read_with_any_byte_order_mark(encoding: str, text: str) -> None:
    assert files.decode_text(f"\ufeff{text}".encode(encoding)) == text


@pytest.mark.parametrize("text", ["a = 1\n", "b \u00e4 \u4e2d\n", "", "\n", "a"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_f101_utf_16_needs_no_byte_order_mark_where_a_text_begins_in_ascii(encoding: str, text: str) -> None:
    assert files.decode_text(text.encode(encoding)) == text


def test_f101_repeated_byte_order_marks_are_skipped_and_other_bytes_are_no_text() -> None:
    assert files.decode_text(b"\xef\xbb\xbf" * 2 + b"a") == "a"
    with pytest.raises(UnicodeDecodeError):
        files.decode_text(b"a\xff")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("gs://bucket/folder", "gs://bucket/folder?retry_limit_seconds=60"),
        ("gcs://bucket/folder?scheme=http", "gcs://bucket/folder?scheme=http&retry_limit_seconds=60"),
        ("gs://bucket/folder?retry_limit_seconds=5", "gs://bucket/folder?retry_limit_seconds=5"),
        ("s3://bucket/folder?region=eu-west-1", "s3://bucket/folder?region=eu-west-1"),
    ],
)
def test_the_client_of_google_storage_tries_for_a_minute(given: str, expected: str) -> None:
    assert files.with_retry_limit(given) == expected


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_link_is_read_and_neither_written_nor_deleted_through(tmp_path: Path, scheme: str) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    files.write(f"{outside}/folder/a", b"theirs")
    root.mkdir()
    for action in (
        lambda uri: files.write(uri, b"ours"),
        lambda uri: files.copy(f"{scheme}{root}/source", uri),
        files.delete,
    ):
        (root / "source").write_bytes(b"ours")
        (root / "link").unlink(missing_ok=True)
        (root / "link").symlink_to(outside / "folder" / "a")
        assert files.read(f"{scheme}{root}/link") == b"theirs" and files.link(f"{scheme}{root}/link")
        action(f"{scheme}{root}/link")
        assert not (root / "link").is_symlink() and (outside / "folder" / "a").read_bytes() == b"theirs"
    for target in (outside / "folder", outside / "none", root / "link"):
        (root / "link").symlink_to(target)
        files.delete(f"{scheme}{root}/link")
        assert not (root / "link").is_symlink() and (outside / "folder" / "a").exists()
    (tmp_path / "name").symlink_to(root)  # the folder itself may have any name
    files.write(f"{scheme}{tmp_path}/name/b", b"b")
    files.delete(f"{scheme}{tmp_path}/name/source")
    assert [path.name for path in root.iterdir()] == ["b"] and files.link(f"{scheme}{root}/b") is None


@pytest.mark.parametrize(
    "name", ["../a", "a/../../b", "/etc/hosts", "", ".", "a//b", "a/", "a\0", None, 3, "out/a", "out/b/c"]
)
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: Any) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "out").symlink_to(tmp_path)
    with pytest.raises(DamagedError, match=r"folder.*expected .*(unclip verify|remove the link)"):
        files.below(str(tmp_path / "folder"), name)


def test_names_below_a_folder_may_have_dots_and_links_that_stay_in_it(tmp_path: Path) -> None:
    root = tmp_path / "folder"
    (root / "inner").mkdir(parents=True)
    (root / "other").symlink_to("inner")
    (root / "file").symlink_to("/etc/hosts")  # its own name is not followed
    (tmp_path / "link").symlink_to(root)
    for folder in (str(root), str(tmp_path / "link"), f"file://{root}", "s3://bucket/prefix"):
        for name in ("a", "..a", "a..b/.c", "other/a", "file", "none/a"):
            assert files.below(folder, name) == f"{folder}/{name}"
