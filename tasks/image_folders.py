"""A folder of images as a list: captions lie beside the images, or in metadata files as in datasets' `imagefolder`.

`a.jpg` has its caption in `a.txt`, `a.caption` or `a.json`; `metadata.csv`, `metadata.jsonl` and `metadata.parquet` have a column
`file_name` with paths below their folder. An image without a caption is a row without one.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence

from tasks.rows import RowFault
from tasks.untrusted import local_files
from unclip import files

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".avif")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_NAMES = ("caption", "text")
"""Columns and keys with the caption, if no setting names another."""
_TEXT_SUFFIXES = (".txt", ".caption")
_MAX_SIDECAR_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Folder:
    """One folder, without those in it."""

    path: str
    images: Sequence[str]
    """Names of the images, sorted."""
    metadata: Sequence[str]
    names: frozenset[str]
    """Names of all files."""


def walk(root: str) -> Iterator[Folder]:
    """Yield the folders at and below a root, sorted, without hidden ones and without following links to folders."""
    for path, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        shown = sorted(name for name in names if not name.startswith("."))
        images = [name for name in shown if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        yield Folder(path, images, [name for name in shown if name.lower() in METADATA], frozenset(shown))


def has_images(root: str) -> bool:
    """Return True if there are images at or below a folder."""
    return any(folder.images for folder in walk(root))


def digest_of(root: str) -> Iterator[str]:
    """Texts that change with the files that matter: names, sizes and times."""
    for folder in walk(root):
        suffixes, read = (*_TEXT_SUFFIXES, ".json"), {*folder.images, *folder.metadata}
        beside = {os.path.splitext(name)[0] for name in folder.images}
        for name in sorted(folder.names):
            stem, suffix = os.path.splitext(name)
            if name in read or (stem in beside and suffix.lower() in suffixes):
                path = f"{folder.path}/{name}"
                yield f"{os.path.relpath(path, root)}\0{local_files.state(path)}\0"


def pairs(
    root: str, read_metadata: Callable[[str], Iterator[tuple[str, str]]], caption_name: str | None
) -> Iterator[tuple[str, str]]:
    """Yield the URL and caption of every image, and of every row of the metadata files.

    Args:
        read_metadata: path of a metadata file -> name and caption of its rows.
        caption_name: key with the caption in JSON files beside the images; None is one of `CAPTION_NAMES`.
    """
    described: set[str] = set()
    for folder in walk(root):
        for name in folder.metadata:
            for file_name, caption in read_metadata(f"{folder.path}/{name}"):
                url = local_files.to_url(file_name, folder.path) or file_name
                described.add(url)
                yield url, caption
        for name in folder.images:
            url = local_files.to_url(name, folder.path) or f"{folder.path}/{name}"
            captions = _captions_beside(root, folder, name, caption_name)
            for caption in captions or ([] if url in described else [""]):
                yield url, caption


def _captions_beside(root: str, folder: Folder, image: str, caption_name: str | None) -> list[str]:
    stem = os.path.splitext(image)[0]
    for suffix in (*_TEXT_SUFFIXES, ".json"):
        for name in (stem + suffix, stem + suffix.upper(), image + suffix):
            if name in folder.names:
                try:
                    data = local_files.read(root, f"{folder.path}/{name}", _MAX_SIDECAR_BYTES)
                except RowFault:
                    continue
                text = data.decode(files.text_encoding(data), "replace").strip("\ufeff \t\r\n")
                return [text] if suffix != ".json" else _captions_in(text, caption_name)
    return []


def _captions_in(text: str, caption_name: str | None) -> list[str]:
    """Captions of a JSON object: a text or a list of texts."""
    try:
        content = json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return []
    names = CAPTION_NAMES if caption_name is None else (caption_name,)
    found = next((content[name] for name in names if content.get(name)), "") if isinstance(content, dict) else content
    texts = found if isinstance(found, list) else [found]
    return [text.encode("utf-8", "replace").decode() for text in texts if isinstance(text, str) and text]
