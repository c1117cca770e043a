"""Digests that files carry, so that a flipped bit is found wherever it is.

    Parquet, Arrow      a seal between the data and the footer: the sha256 of what precedes it and of what follows it; readers
                        of these formats go by the footer and never see it
    JSON objects        the key `checksum`; see `unclip.files.write_json`
    other files         a `manifest.json` in their folder with the sha256 of each; see also `unclip.training.checkpoints`

A seal moves with its file, needs no second file, and is checked in two parts: readers check the footer, and pyarrow the
checksums of the pages that it reads; `check` reads the whole file.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal

from unclip import files
from unclip.errors import DamagedError

State = Literal["sound", "damaged", "not covered"]

MANIFEST = "manifest.json"
SEALED = (".parquet", ".arrow")
"""Endings of the names of sealed files."""

_MARK = bytes.fromhex("b8f1a3d0756e636c6970007365616c01")
_SEAL_BYTES = len(_MARK) + 2 * 32
_ENDINGS = {b"PAR1": 4, b"ARROW1": 4}  # magic -> bytes before it that hold the length of the footer
_TAIL_BYTES = 1 << 16
_PIECE_BYTES = 1 << 20


def seal(data: bytes | memoryview) -> bytes:
    """Return a Parquet or Arrow file with a seal."""
    return seal_and_digest(data)[0]


def seal_and_digest(data: bytes | memoryview) -> tuple[bytes, str]:
    """Return a Parquet or Arrow file with a seal, and the sha256 of the result in hex, from one pass over the data."""
    start = _footer_start(data, len(data))
    assert start is not None, "got neither Parquet nor Arrow"
    head, tail = memoryview(data)[:start], memoryview(data)[start:]
    digest = hashlib.sha256(head)
    end = b"".join([_MARK, digest.digest(), _sha256(tail), tail])
    digest.update(end)
    return b"".join([head, end]), digest.hexdigest()


def check(file: Any) -> State:
    """Check all bytes of a Parquet or Arrow file, which is read in pieces.

    Args:
        file: an open `pyarrow.NativeFile`.
    """
    size = file.size()
    start = _footer_start(_read_end(file, size, min(size, 16)), size)
    if start is None:
        return "damaged"
    if start >= _SEAL_BYTES:
        found = file.read_at(_SEAL_BYTES, start - _SEAL_BYTES)
        expected = _MARK + _digest_of(file, 0, start - _SEAL_BYTES) + _digest_of(file, start, size)
        if found == expected:
            return "sound"
        # A file of an earlier version has no part of a seal.
        parts = [slice(0, 16), slice(16, 48), slice(48, 80)]
        if any(found[part] == expected[part] for part in parts):
            return "damaged"
    # With a damaged length of its footer, a sealed file has its seal elsewhere.
    return "damaged" if _has_mark(file, size) else "not covered"


def require_sound(file: Any, uri: str) -> None:
    """Check all bytes of a file that may have a seal.

    Raises:
        DamagedError: it does not match its seal.
    """
    if check(file) == "damaged":
        raise damaged(uri, "it does not match its seal")


def read_footer(file: Any, uri: str) -> bytes:
    """Read and check the footer of a Parquet file, with what follows it: a Parquet file without rows.

    Args:
        file: an open `pyarrow.NativeFile`.

    Raises:
        DamagedError: it does not match its seal, or there is no footer.
    """
    size = file.size()
    tail = _read_end(file, size, min(size, _TAIL_BYTES))
    start = _footer_start(tail, size)
    if start is None:
        raise damaged(uri, "its footer is missing")
    if size - start + _SEAL_BYTES > len(tail):
        tail = _read_end(file, size, min(size, size - start + _SEAL_BYTES))
    footer = tail[len(tail) - (size - start) :]
    found = tail[: len(tail) - len(footer)][-_SEAL_BYTES:]
    is_sealed = found.startswith(_MARK)
    if (is_sealed and found[-32:] != _sha256(footer)) or (not is_sealed and _MARK in tail):
        raise damaged(uri, "its footer does not match its seal")
    return footer


def damaged(uri: str, reason: str) -> DamagedError:
    return DamagedError(f"{uri}: {reason}. The file is damaged; `unclip verify` says what it is and what to run again.")


def cover(folder: str) -> None:
    """Write the manifest of a folder: `sha256` of each file that has no digest elsewhere, and the names of the `others`.

    The others are sealed, have a checksum, or are under the manifest of an inner folder.
    """
    names = [entry.name for entry in files.walk(folder) if entry.name != MANIFEST]
    inner = {name.rpartition("/")[0] for name in names if name.endswith(f"/{MANIFEST}")}
    others = [
        name
        for name in names
        if name.endswith(SEALED) or not inner.isdisjoint(_folders_of(name)) or _has_checksum(f"{folder}/{name}")
    ]
    if names:
        hashes = {name: files.digest(f"{folder}/{name}") for name in names if name not in set(others)}
        files.write_json(f"{folder}/{MANIFEST}", {"sha256": hashes, "others": others})


def read_manifest(folder: str) -> tuple[dict[str, str], list[str]]:
    """Contents of the manifest of a folder, as `cover` writes it: sha256 by name, and the names of the others.

    A `manifest.json` of another program, such as in a pretrained model, has none of them.

    Raises:
        DamagedError: the manifest is damaged, or has a name that is not below the folder.
    """
    document = files.read_json(f"{folder}/{MANIFEST}")
    hashes = document.get("sha256") if isinstance(document, dict) else None
    if not isinstance(hashes, dict):
        return {}, []
    others = document.get("others", [])
    if not isinstance(others, list):
        raise damaged(f"{folder}/{MANIFEST}", f"got {others!r} as others, expected a list of names")
    for name in [*hashes, *others]:
        files.below(folder, name)
    return hashes, others


@contextlib.contextmanager
def changing(folder: str, prefix: str) -> Iterator[None]:
    """Change or delete files whose names begin with `prefix`, in a folder that may have a manifest.

    After a kill the manifest does not have these files, so that they are not covered rather than wrong.
    """
    manifest = f"{folder}/{MANIFEST}"
    if not files.exists(manifest):
        yield
        return
    hashes_before, others_before = read_manifest(folder)
    hashes = {name: digest for name, digest in hashes_before.items() if not name.startswith(prefix)}
    others = [name for name in others_before if not name.startswith(prefix)]
    files.write_json(manifest, {"sha256": hashes, "others": others})
    yield
    left = [entry.name for entry in files.walk(folder) if entry.name.startswith(prefix)]
    hashes |= {name: files.digest(f"{folder}/{name}") for name in left if name in hashes_before}
    others = sorted([*others, *(name for name in left if name in others_before)])
    files.write_json(manifest, {"sha256": hashes, "others": others})


def _has_checksum(uri: str) -> bool:
    if not uri.endswith(".json"):
        return False
    value = json.loads(files.read(uri))
    return isinstance(value, dict) and files.CHECKSUM in value


def _folders_of(name: str) -> Iterator[str]:
    """Yield all folders above a relative path."""
    while name := name.rpartition("/")[0]:
        yield name


def _footer_start(end: Any, size: int) -> int | None:
    """Position of the footer in a file of `size` bytes that ends with `end`; None if the file has no valid ending."""
    for magic, width in _ENDINGS.items():
        if bytes(end[-len(magic) :]) == magic:
            length = int.from_bytes(bytes(end[-len(magic) - width : -len(magic)]), "little")
            start = size - len(magic) - width - length
            return start if start >= len(magic) else None
    return None


def _read_end(file: Any, size: int, count: int) -> bytes:
    return bytes(file.read_at(count, size - count))


def _digest_of(file: Any, start: int, stop: int) -> bytes:
    digest = hashlib.sha256()
    for position in range(start, stop, _PIECE_BYTES):
        digest.update(file.read_at(min(_PIECE_BYTES, stop - position), position))
    return digest.digest()


def _has_mark(file: Any, size: int) -> bool:
    return any(
        _MARK in bytes(file.read_at(min(_PIECE_BYTES + len(_MARK), size - position), position))
        for position in range(0, size, _PIECE_BYTES)
    )


def _sha256(data: Any) -> bytes:
    return hashlib.sha256(data).digest()
