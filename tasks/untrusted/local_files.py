"""Images of the operator's own below a root folder: nothing outside it is read, whatever a list names or a link points to.

Links within the root are followed; a file is then opened folder by folder without following any, so a link that is put there
in the meantime is refused as well. Devices and pipes are no files.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import os
import stat
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tasks.rows import RowFault

SCHEME = "file://"
MAX_PATH_BYTES = 4096
"""Longest path that Linux opens; its URL is longer, as a byte beyond ASCII takes three characters."""
_PIECE_BYTES = 1 << 20
_STATES_AT_ONCE = 2048
_MAX_THREADS = 32
_SECONDS_PER_THREAD = 50e-6  # of waiting for each file
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """A file of a list."""

    url: str
    """Its path as a `file://` URL."""
    reason: str | None = None
    """Reason why it cannot be used."""
    sha256: str | None = None


def to_url(text: str, root: str | None = None) -> str | None:
    """Return the `file://` URL of an absolute path, of a `file:` URL, or of a path below a root; None for other texts."""
    path = spelled_path(text, root)
    if path is None:
        return None
    folder, name = os.path.split(path)
    path = os.path.join(os.path.realpath(folder), name)  # one spelling, whatever links lead there
    return url_of(path) if len(os.fsencode(path)) <= MAX_PATH_BYTES else None


def spelled_path(text: str, root: str | None = None) -> str | None:
    """Absolute path that a text of `to_url` spells, before links are followed; None for other texts."""
    path = text.strip()
    try:
        if path[:5].lower() == "file:":
            parts = urllib.parse.urlsplit(path)
            if parts.netloc not in ("", "localhost"):
                return None
            path = urllib.parse.unquote(parts.path, errors="surrogateescape")
        is_relative = not path.startswith("/")
        if not path or "\0" in path or (is_relative and (root is None or "://" in path)):
            return None
        if len(os.fsencode(path)) > MAX_PATH_BYTES:
            return None
    except ValueError:  # brackets or special characters in the host, or characters that no file name has
        return None
    path = os.path.normpath(f"{root}/{path}" if is_relative else path)
    return "/" + path.lstrip("/")


def url_of(path: str) -> str:
    """URL of a path, as it is."""
    return SCHEME + urllib.parse.quote(os.fsencode(path), safe="/!$&'()*+,;=:@~-._")


def to_path(url: str) -> str:
    """Path of a URL of `to_url`."""
    return os.fsdecode(urllib.parse.unquote_to_bytes(url.removeprefix(SCHEME)))


@contextlib.contextmanager
def opened(root: str, path: str) -> Iterator[BinaryIO]:
    """Open a file below a root.

    Raises:
        RowFault: blocked_path, if it or what it links to lies elsewhere; no_file, if it is no file that can be read.
    """
    try:
        real_root, real = os.path.realpath(root), os.path.realpath(path)
        if os.path.commonpath([real_root, real]) != real_root:
            raise RowFault("blocked_path")
        *folders, name = Path(real).relative_to(real_root).parts or (".",)
        folder = os.open(real_root, _FOLDER & ~os.O_NOFOLLOW)
        try:
            for part in folders:
                inner = os.open(part, _FOLDER, dir_fd=folder)
                os.close(folder)
                folder = inner
            descriptor = os.open(name, _FILE, dir_fd=folder)
        finally:
            os.close(folder)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RowFault("no_file")
            yield file
    except (OSError, ValueError):
        raise RowFault("no_file") from None


def read(root: str, path: str, max_bytes: int) -> bytes:
    """Read a file below a root; raises RowFault like `opened`, too_large or empty_body."""
    with opened(root, path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise RowFault("too_large")
    if not data:
        raise RowFault("empty_body")
    return data


def describe(text: str, root: str) -> LocalFile | None:
    """Describe the file that a list names, with the sha256 of its bytes; None if the text is no path."""
    url = to_url(text, root)
    if url is None:
        return None
    digest = hashlib.sha256()
    try:
        with opened(root, to_path(url)) as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    except RowFault as fault:
        return LocalFile(url, fault.reason)
    return LocalFile(url, None, digest.hexdigest())


def states(paths: Iterable[str | None]) -> Iterator[str]:
    """Yield the size and time of the last change of each file, for a digest; empty if there is none.

    File systems of a network answer slowly, so as many threads ask as the first answers are worth. Some paths are taken ahead.
    """
    remaining = iter(paths)
    first = list(itertools.islice(remaining, _STATES_AT_ONCE))
    started = time.monotonic()
    found = _states(first)
    waited = (time.monotonic() - started) / max(1, len(first))  # threads that do not wait would only impede each other
    yield from found
    num_threads = min(_MAX_THREADS, 1 + int(waited / _SECONDS_PER_THREAD))
    waiting: collections.deque[concurrent.futures.Future[list[str]]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="states") as pool:
        while some := list(itertools.islice(remaining, _STATES_AT_ONCE)):
            waiting.append(pool.submit(_states, some))
            if len(waiting) > 2 * num_threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _states(paths: Sequence[str | None]) -> list[str]:
    return [_state(path) if path else "" for path in paths]


def _state(path: str) -> str:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"
