"""Files by URI: local paths and everything that pyarrow understands (`s3://`, `gs://`), read bounded and written whole.

A written file appears complete or not at all: locally by a temporary file, fsync and rename; object stores do it themselves.
"""

import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from unclip.errors import StorageError


def locate(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI, and the path in it.

    Raises:
        StorageError: pyarrow knows no such file system.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    try:
        return pafs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except (ValueError, OSError) as error:
        raise StorageError(f"{uri}: {error}. Give a folder or an s3:// or gs:// URI.") from None


def exists(uri: str) -> bool:
    filesystem, path = locate(uri)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def read(uri: str) -> bytes:
    filesystem, path = locate(uri)
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def write(uri: str, data: bytes) -> None:
    """Write bytes so that readers see all of them or none; missing folders are made."""
    filesystem, path = locate(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def read_json(uri: str) -> Any:
    return json.loads(read(uri))


def write_json(uri: str, value: Any) -> None:
    write(uri, json.dumps(value, indent=2, sort_keys=True).encode())


def names(uri: str) -> list[str]:
    """Names in a folder, sorted; nothing when it does not exist."""
    filesystem, path = locate(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    return sorted(info.base_name for info in filesystem.get_file_info(selector))


def delete(uri: str) -> None:
    """Delete a file or a folder with all it holds; nothing happens when it does not exist."""
    filesystem, path = locate(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == pafs.FileType.File:
        filesystem.delete_file(path)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
