"""A folder of images as a list: captions lie beside the images, or in metadata files as in datasets' `imagefolder`.

`a.jpg` has its caption in `a.txt`, `a.caption` or `a.json`; `metadata.csv`, `metadata.jsonl` and `metadata.parquet` have a column
`file_name` with paths below their folder. An image without a caption is a row without one.

Names are listed in one process, as texts that are joined; files are read in the tasks that get some of the names.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

import numpy as np

from tasks.rows import RowFault
from tasks.untrusted import local_files
from unclip import files
from unclip.errors import InputError
from unclip.messages import reason_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".avif")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_NAMES = ("caption", "text")
"""Columns and keys with the caption, if no setting names another."""
NUM_LEFT_OUT = 5
"""Files that are named of those left out."""
_SIDECAR_SUFFIXES = (".txt", ".caption", ".json")
_MAX_SIDECAR_BYTES = 1 << 20
_OF_THE_SYSTEM = ("lost+found", "System Volume Information", "$RECYCLE.BIN")

Row = tuple[str, str, str | None]
"""URL, caption, and the reason why the row cannot be used."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """One folder, without those in it."""

    path: str
    images: Sequence[str]
    """Names of the images, sorted."""
    metadata: Sequence[str]
    names: frozenset[str]
    """Names of all files."""
    folders: Sequence[str]
    """Names of the folders in it."""

    def sidecars(self, image: str) -> list[str]:
        """Names of the files beside an image that may hold its caption, the preferred one first."""
        stem = os.path.splitext(image)[0]
        return [
            name
            for suffix in _SIDECAR_SUFFIXES
            for name in (stem + suffix, stem + suffix.upper(), image + suffix)
            if name in self.names
        ]

    def is_shard_table(self, name: str) -> bool:
        """Return True for a table that img2dataset writes beside the folder with the images of its shard."""
        stem, suffix = os.path.splitext(name)
        stem = stem.removesuffix("_stats") if suffix == ".json" else stem
        return suffix in (".parquet", ".json") and stem.isdecimal() and stem in self.folders


@dataclasses.dataclass(frozen=True)
class Images:
    """Some images of one folder."""

    path: str
    """The folder."""
    joined: str
    """Each image and the files that may hold its caption, joined by "/", and these joined by a null character: a list of texts
    would take far more memory."""
    are_described: bool
    """True if metadata files describe them, so that they need no further caption."""


@dataclasses.dataclass(frozen=True)
class Survey:
    """Contents of a folder of images."""

    digest: str
    """Changes with the names, sizes and times of the files that are read."""
    metadata: Sequence[str]
    """Paths of the metadata files."""
    left_out: Sequence[str]
    """Some of the files that are neither images nor captions, relative to the folder."""
    num_left_out: int


def _refuse(error: OSError) -> NoReturn:
    raise InputError(
        f"ingest.urls: {error.filename} cannot be listed: {reason_of(error)}. Make it readable, or move it elsewhere."
    )


def walk(root: str, on_error: Callable[[OSError], object] = _refuse) -> Iterator[Folder]:
    """Yield the folders at and below a root, sorted, without hidden ones and without following links to folders.

    Raises:
        InputError: a folder cannot be listed; names it. Otherwise its rows would vanish.
    """
    for path, folders, names in os.walk(root, onerror=on_error):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")) and name not in _OF_THE_SYSTEM)
        shown = sorted(name for name in names if not name.startswith("."))
        images = [name for name in shown if name.lower().endswith(IMAGE_SUFFIXES)]
        metadata = [name for name in shown if name.lower() in METADATA]
        yield Folder(path, images, metadata, frozenset(shown), tuple(folders))


def has_images(root: str) -> bool:
    """Return True if there are images at or below a folder."""
    return any(folder.images for folder in walk(root, on_error=lambda _: None))


def survey(root: str) -> Survey:
    """Digest the files that are read, by size and time, and find others."""
    digest, metadata, left_out, num_left_out = hashlib.sha256(), list[str](), list[str](), 0

    def read_files() -> Iterator[tuple[str, str]]:
        """Place below the root and path of each file that is read."""
        nonlocal num_left_out
        for folder in walk(root):
            metadata.extend(f"{folder.path}/{name}" for name in folder.metadata)
            read = {*folder.images, *folder.metadata}
            read.update(name for image in folder.images for name in folder.sidecars(image))
            place = os.path.relpath(folder.path, root)
            yield from ((f"{place}/{name}", f"{folder.path}/{name}") for name in sorted(read))
            others = sorted(name for name in folder.names - read if not folder.is_shard_table(name))
            left_out.extend(os.path.normpath(f"{place}/{name}") for name in others[: NUM_LEFT_OUT - len(left_out)])
            num_left_out += len(others)

    found, asked = itertools.tee(read_files())
    for (place, _), state in zip(found, local_files.states(path for _, path in asked), strict=True):
        digest.update(f"{place}\0{state}\0".encode("utf-8", "surrogateescape"))
    return Survey(digest.hexdigest(), metadata, left_out, num_left_out)


def metadata_files(root: str) -> list[str]:
    """Paths of the metadata files."""
    return [f"{folder.path}/{name}" for folder in walk(root) for name in folder.metadata]


def hashes(urls: Iterable[str]) -> np.ndarray:
    """Hash of each URL, the same in every process: [N] uint64."""
    return np.frombuffer(b"".join(hashlib.blake2b(url.encode(), digest_size=8).digest() for url in urls), np.uint64)


def list_images(root: str, described: np.ndarray, num_at_once: int) -> Iterator[list[Images]]:
    """Yield all images, about `num_at_once` at a time, without those that have a caption from metadata files alone.

    Args:
        described: hashes of the URLs in metadata files, sorted.
    """
    chunk: list[Images] = []
    num_images = 0
    for folder in walk(root):
        for start in range(0, len(folder.images), num_at_once):
            names = folder.images[start : start + num_at_once]
            found = hashes(_url(folder.path, name) for name in names) if len(described) else np.zeros(0, np.uint64)
            is_described = np.isin(found, described).tolist() or [False] * len(names)
            for are_described in (False, True):
                beside = [
                    [name, *folder.sidecars(name)]
                    for name, flag in zip(names, is_described, strict=True)
                    if flag == are_described
                ]
                entries = ["/".join(entry) for entry in beside if len(entry) > 1 or not are_described]
                if entries:
                    chunk.append(Images(folder.path, "\0".join(entries), are_described))
                    num_images += len(entries)
            if num_images >= num_at_once:
                yield chunk
                chunk, num_images = [], 0
    if chunk:
        yield chunk


def read_captions(root: str, images: Sequence[Images], caption_name: str | None) -> Iterator[Row]:
    """Yield a row for each caption beside the images, or one without a caption.

    Args:
        root: folder outside which nothing is read.
        caption_name: key with the caption in JSON files; None is one of `CAPTION_NAMES`.
    """
    for some in images:
        for entry in some.joined.split("\0"):
            image, *sidecars = entry.split("/")
            captions, reason = _captions_beside(root, some.path, sidecars, caption_name)
            if not captions and (reason or not some.are_described):
                captions = [""]
            url = _url(some.path, image)
            for caption in captions:
                yield url, caption, reason


def _url(folder: str, name: str) -> str:
    """URL of a file of a folder below a root without links."""
    return local_files.url_of(f"{folder}/{name}")


def _captions_beside(
    root: str, folder: str, sidecars: Sequence[str], caption_name: str | None
) -> tuple[list[str], str | None]:
    """Captions in the first of the files that has some; or the reason why it cannot be read."""
    for name in sidecars:
        try:
            data = local_files.read(root, f"{folder}/{name}", _MAX_SIDECAR_BYTES)
        except RowFault as fault:
            if fault.reason == "empty_body":
                continue
            return [], fault.reason
        text = data.decode(files.text_encoding(data), "replace").strip("\ufeff \t\r\n")
        captions = _captions_in(text, caption_name) if name.lower().endswith(".json") else [text]
        if captions := [caption for caption in captions if caption.strip()]:
            return captions, None
    return [], None


def _captions_in(text: str, caption_name: str | None) -> list[str]:
    """Captions of a JSON object: a text or a list of texts."""
    try:
        content = json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return []
    names = CAPTION_NAMES if caption_name is None else (caption_name,)
    for found in [content.get(name) for name in names] if isinstance(content, dict) else [content]:
        texts = [
            text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str) and text.strip()
        ]
        if texts:
            return [text.encode("utf-8", "replace").decode() for text in texts]
    return []
