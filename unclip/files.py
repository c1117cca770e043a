"""Files by URI: local paths and all that pyarrow supports (`s3://`, `gs://`), with atomic writes.

A file appears complete or not at all: locally through a temporary file, fsync and rename; object stores do so themselves.
Its folder is synced too, so that a file that was written is still there after a crash of the machine.
A link in the place of a file or folder is read like what it leads to; `write` and `copy` replace the link, `delete` deletes it.
Local paths do without pyarrow, whose import would dominate the run time of commands that read a few small files.
"""

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
import urllib.parse
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unclip.errors import DamagedError, StorageError
from unclip.messages import reason_of, without_credentials

if TYPE_CHECKING:
    import pyarrow.fs as pafs

T = TypeVar("T")
CHECKSUM = "checksum"
"""Key of the checksum in JSON objects."""
_TEMPORARY = ".tmp"
_BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_GCS_RETRY_SECONDS = 60  # of the client of gs://, whose default is 15 minutes for each operation
_FILE_URI = re.compile(r"file:(?://(?:localhost)?)?(/.*)", re.DOTALL | re.IGNORECASE)
_URI = re.compile(r"[A-Za-z][\w+.-]*:/")


def to_path(uri: str) -> Path | None:
    """Absolute path of a plain path or of a `file:` URI, which is percent-decoded; None for other URIs. Links are followed."""
    path = _as_given(uri)
    return None if path is None else Path(os.path.realpath(path))


def _entry(uri: str) -> Path | None:
    """Path like that of `to_path`, except that the last name is not followed if it is a link."""
    path = _as_given(uri)
    if path is None or path.name in ("", ".."):
        return to_path(uri)
    return Path(os.path.realpath(path.parent), path.name)


def _as_given(uri: str) -> Path | None:
    if found := _FILE_URI.fullmatch(uri):
        return Path(os.fsdecode(urllib.parse.unquote_to_bytes(found[1])))
    return None if _URI.match(uri) else Path(uri).expanduser()


def is_below(name: Any) -> bool:
    """Return True if a name is the relative path of a file below a folder, links aside."""
    return isinstance(name, str) and "\0" not in name and {"", ".", ".."}.isdisjoint(name.split("/"))


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Return True if a local path is a folder or below it once all links are followed. A loop of links leads nowhere."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def below(folder: str, name: str) -> str:
    """Full path of a file below a folder, by a relative name that came with the folder, such as one in its manifest.

    The folder may be a link, and so may the file itself, since `write` and `delete` do not follow that.

    Raises:
        DamagedError: the name leads out of the folder, by itself or through a link.
    """
    if not is_below(name):
        raise DamagedError(
            f"{folder}: got {repr(name)[:200]} as the name of a file in it, expected one that does not lead out of it. The file "
            "that names it is damaged, or was made to reach other files; `unclip verify` says which, and what to run again."
        )
    local = to_path(folder)
    if local is not None:
        parent = (local / name).parent
        if not is_inside(parent, local):
            raise DamagedError(
                f"{folder}/{name}: leads to {os.path.realpath(parent)} through a link, expected a place in {folder}. A copy may "
                "have been made to reach other files: remove the link, or put what it leads to in its place."
            )
    return f"{folder}/{name}"


def link(uri: str) -> "Entry | None":
    """A link by itself, without what it leads to; None if there is no link."""
    path = _entry(uri)
    if path is None or not path.is_symlink():
        return None
    status = path.lstat()
    return Entry("", status.st_size, status.st_mtime)


def to_uri(uri: str) -> str:
    """`file:` URI of a plain path, percent-encoded, for libraries that parse what they get; other URIs stay as they are."""
    path = to_path(uri)
    return uri if path is None else f"file://{urllib.parse.quote(os.fsencode(path))}"


def locate(uri: str) -> "tuple[pafs.FileSystem, str]":
    """Resolve a URI to its file system and the path in it.

    Raises:
        StorageError: the URI contains credentials, or pyarrow does not support it.
    """
    import pyarrow.fs as pafs

    if local := to_path(uri):
        return pafs.LocalFileSystem(), str(local)
    if (shown := without_credentials(uri)) != uri:  # records, tables and MLflow hold URIs
        raise StorageError(
            f"{shown}: given with credentials, which would be stored with it. Leave them out, and set "
            f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or GOOGLE_APPLICATION_CREDENTIALS."
        )
    try:
        return pafs.FileSystem.from_uri(with_retry_limit(uri))  # type: ignore[no-any-return]
    except (ValueError, OSError) as error:
        raise StorageError(f"{uri}: {reason_of(error)}. Give a folder or an s3:// or gs:// URI.") from None


def with_retry_limit(uri: str) -> str:
    """URI that limits the time for which the client of Google's storage tries again; other URIs stay as they are."""
    if not _is_gcs(uri) or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={_GCS_RETRY_SECONDS}"


def _is_gcs(uri: str) -> bool:
    return uri.startswith(("gs://", "gcs://"))


def with_retries(uri: str, action: Callable[[], T]) -> T:
    """Run a file operation; object stores fail transiently, so there it is tried up to six times.

    The client of gs:// tries again by itself, for `_GCS_RETRY_SECONDS`.
    """
    for attempt in range(5 if "://" in uri and not _is_gcs(uri) else 0):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(0.2 * 2**attempt * random.uniform(0.5, 1.5))
    return action()


def exists(uri: str) -> bool:
    if local := to_path(uri):
        return local.exists()
    filesystem, path = locate(uri)
    return bool(with_retries(uri, lambda: filesystem.get_file_info(path)).type.name != "NotFound")


def read(uri: str) -> bytes:
    if local := to_path(uri):
        return local.read_bytes()
    filesystem, path = locate(uri)

    def action() -> bytes:
        with filesystem.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    return with_retries(uri, action)


def write(uri: str, data: bytes, replace: bool = True) -> bool:
    """Write bytes atomically: readers see all of them or none. Missing folders are created.

    Args:
        replace: if False, an existing local file stays as it is, even if another process is writing it at the same time.

    Returns:
        True if the file was written.

    Raises:
        StorageError: the disk is full, the folder is not writable or the store does not answer.
    """
    failpoint("before", uri)

    def action() -> bool:
        if local:
            return _write_local(local, data, _replace if replace else _link)
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(data)
        return True

    local = _entry(uri)
    if local is None:
        filesystem, path = locate(uri)
    try:
        written = with_retries(uri, action)
    except OSError as error:
        reason = reason_of(error)
        raise StorageError(
            f"{uri}: cannot write {len(data):,} bytes: {reason}. Free space or fix the folder, and run the same command again."
        ) from error
    failpoint("after", uri)
    return written


def _write_local(path: Path, data: bytes, place: Callable[[str, Path], bool]) -> bool:
    _make_folder(path.parent)
    temporary = f"{path}.{uuid.uuid4().hex}{_TEMPORARY}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        failpoint("within", str(path))
        is_placed = place(temporary, path)
        sync_folder(path.parent)
        return is_placed
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _make_folder(folder: Path) -> None:
    """Create a folder and those above it, so that they survive a crash of the machine."""
    if not folder.is_dir():
        new = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for each in new:
            sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a local folder survive a crash of the machine, where the file system can."""
    with contextlib.suppress(PermissionError):  # a folder that may be written and not read
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as network file systems answer
                raise
        finally:
            os.close(descriptor)


def _replace(temporary: str, path: Path) -> bool:
    os.replace(temporary, path)
    return True


def _link(temporary: str, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        os.replace(temporary, path)
    return True


def read_json(uri: str) -> Any:
    """Read a JSON file; the checksum of an object that `write_json` wrote is checked and taken out.

    Raises:
        DamagedError: the content is not what was written.
    """
    try:
        value = json.loads(read(uri))
    except ValueError as error:
        raise _damaged(uri, f"is no JSON: {error}") from error
    checksum = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
    if checksum is not None and checksum != _checksum(value):
        raise _damaged(uri, f"does not match its {CHECKSUM}")
    return value


def write_json(uri: str, value: Any) -> None:
    """Write JSON; an object gets the key `checksum`, the sha256 of the others."""
    write(uri, encode_json(value))


def encode_json(value: Any) -> bytes:
    """JSON as `write_json` writes it; the same value gives the same bytes."""
    if isinstance(value, dict):
        value = json.loads(json.dumps(value))  # keys become strings, which may change their order
        value[CHECKSUM] = _checksum(value)
    return json.dumps(value, indent=2, sort_keys=True).encode()


def _checksum(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode())


def _damaged(uri: str, reason: str) -> DamagedError:
    return DamagedError(
        f"{uri}: {reason}. The file is damaged, or was changed by hand: restore it, or take out its {CHECKSUM}. "
        "`unclip verify` says what it is and what to run again."
    )


def names(uri: str) -> list[str]:
    """Names in a folder, sorted; empty if it does not exist."""
    return sorted(name for name in _names(uri) if not name.endswith(_TEMPORARY))


def _names(uri: str) -> list[str]:
    if local := to_path(uri):
        try:
            return os.listdir(local)
        except (FileNotFoundError, NotADirectoryError):
            if local.exists():
                raise
            return []
    import pyarrow.fs as pafs

    filesystem, path = locate(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    return [info.base_name for info in with_retries(uri, lambda: filesystem.get_file_info(selector))]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file below a folder."""

    name: str
    """Path relative to the folder."""
    size: int
    """Bytes."""
    modified: float
    """Time of the last change, seconds since 1970."""
    inode: tuple[int, int] | None = None
    """Identity of a local file, which all its names have in common."""
    num_links: int = 1
    """Number of its names."""


def walk(uri: str) -> list[Entry]:
    """All files in a folder and below it but temporary ones, sorted by name; none if it does not exist.

    Raises:
        OSError: a folder cannot be read, so that files would be left out.
    """
    if local := to_path(uri):
        found = []
        for folder, _, base_names in os.walk(local, onerror=_raise_unless_gone):
            for base in (name for name in base_names if not name.endswith(_TEMPORARY)):
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    status = os.stat(os.path.join(folder, base))
                    name = os.path.relpath(os.path.join(folder, base), local)
                    inode = (status.st_dev, status.st_ino)
                    found.append(Entry(name, status.st_size, status.st_mtime, inode, status.st_nlink))
        return sorted(found, key=lambda entry: entry.name)
    import pyarrow.fs as pafs

    filesystem, path = locate(uri)
    selector = pafs.FileSelector(path, allow_not_found=True, recursive=True)
    infos = with_retries(uri, lambda: filesystem.get_file_info(selector))
    listed = [info for info in infos if info.type == pafs.FileType.File]
    start = len(path.rstrip("/")) + 1
    entries = [Entry(info.path[start:], info.size or 0, (info.mtime_ns or 0) / 1e9) for info in listed]
    return sorted(entries, key=lambda entry: entry.name)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def size(uri: str) -> int:
    """Bytes of all files in a folder and below it; 0 if it does not exist."""
    return sum(entry.size for entry in walk(uri))


def size_of(uri: str) -> int:
    """Bytes of a file; 0 if it does not exist."""
    filesystem, path = locate(uri)
    return int(with_retries(uri, lambda: filesystem.get_file_info(path)).size or 0)


def digest(uri: str) -> str:
    """sha256 of a file, which is read in pieces."""
    filesystem, path = locate(uri)

    def action() -> str:
        with filesystem.open_input_stream(path, compression=None, buffer_size=0) as stream:
            found = hashlib.sha256()
            while piece := stream.read(1 << 20):
                found.update(piece)
            return found.hexdigest()

    return with_retries(uri, action)


def copy(source: str, destination: str) -> None:
    """Copy a file atomically. In a local file system both names are links to the same bytes if it can: files never change."""
    local, target = to_path(source), _entry(destination)
    if local and target:
        _make_folder(target.parent)
        temporary = f"{target}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            os.link(local, temporary)
            os.replace(temporary, target)  # does nothing if both are the same file already
            sync_folder(target.parent)
            return
        except OSError:  # another file system, or one without links
            pass
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    write(destination, read(source))


def sweep(folder: str, prefix: str = "", min_age_seconds: float = 0.0) -> None:
    """Delete temporary files of killed writers below a local folder; no writer of files with this prefix may be active.

    Args:
        min_age_seconds: age at which no writer can be writing a file any more.
    """
    for path in Path(folder).rglob(f"{glob.escape(prefix)}*{_TEMPORARY}"):
        if re.search(rf"[.][0-9a-f]{{32}}{re.escape(_TEMPORARY)}$", path.name):
            with contextlib.suppress(FileNotFoundError):
                if not min_age_seconds or time.time() - path.stat().st_mtime >= min_age_seconds:
                    path.unlink()


def stamp(uri: str) -> str | None:
    """Size and time of writing of a file, which change when it is written again; None if there is none."""
    if local := to_path(uri):
        with contextlib.suppress(FileNotFoundError):
            status = local.stat()
            return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
        return None
    filesystem, path = locate(uri)
    info = with_retries(uri, lambda: filesystem.get_file_info(path))
    return None if info.type.name == "NotFound" else f"{info.size} {info.mtime_ns}"


def delete(uri: str) -> None:
    """Delete a file, or a folder with its contents, if it exists; of a link, the link alone."""
    if local := _entry(uri):
        if local.is_dir() and not local.is_symlink():
            shutil.rmtree(local)
        elif os.path.lexists(local):
            local.unlink(missing_ok=True)
        return
    filesystem, path = locate(uri)
    kind = with_retries(uri, lambda: filesystem.get_file_info(path)).type.name
    if kind == "Directory":
        with_retries(uri, lambda: filesystem.delete_dir(path))
    elif kind == "File":
        with_retries(uri, lambda: filesystem.delete_file(path))


def failpoint(moment: str, uri: str) -> None:
    """Kill this process, as `kill -9` would, if a file in the folder UNCLIP_FAILPOINTS asks for it; tests of restarts use it.

    Each of those files holds a regular expression for "<moment> <uri>"; a matching file is deleted, so it matches once.
    """
    folder = os.environ.get("UNCLIP_FAILPOINTS")
    for armed in sorted(Path(folder).iterdir()) if folder else ():
        with contextlib.suppress(FileNotFoundError):  # another process reached it first
            if re.search(armed.read_text("utf-8"), f"{moment} {uri}"):
                armed.unlink()
                os.kill(os.getpid(), signal.SIGKILL)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def text_encoding(data: bytes) -> str:
    """Encoding of a text file that people write, from its first bytes: UTF-8, unless it is UTF-16 or UTF-32."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return encoding
    if len(data) > 1 and 0 in data[:2] and data[:2] != b"\0\0":  # ASCII in UTF-16 without a byte order mark
        return "utf-16-be" if data[0] == 0 else "utf-16-le"
    return "utf-8-sig"


def decode_text(data: bytes) -> str:
    """Text of a file that people write, without byte order marks.

    Raises:
        UnicodeDecodeError: it is not text.
    """
    return data.decode(text_encoding(data)).lstrip("\ufeff")
