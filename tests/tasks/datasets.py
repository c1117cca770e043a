"""Small datasets for tests, written as the stages write them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks import ranges, tables
from tasks.index import update_index
from tasks.places import KeptRows, write_places
from tasks.ranges import KeyRange
from tasks.stages.download import IMAGES


def key(number: int) -> str:
    """Key whose order is that of its number, below 4,096; such keys lie in different ranges."""
    return f"{number << 116:032x}"


def holders(content: bytes, *folders: str | Path) -> list[Path]:
    """Return the files below some folders that hold these bytes, such as those of an image."""
    paths = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return [path for path in paths if content in path.read_bytes()]


def write_folder(folder: str, table: pa.Table, count: int = 1) -> str:
    """Write a table, sorted by key, as range files; returns the folder."""
    for key_range, part in zip(ranges.ranges(count), ranges.split_by_key(table.sort_by("key"), count), strict=True):
        ranges.write_range(folder, key_range, part)
    return folder


def write_images(root: str, *files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write an images table, with a file for each list of rows, and its index; returns the facts that name them."""
    images = f"{root}/images/recipe"
    parts = [
        tables.write_part(images, f"part{number}", pa.Table.from_pylist(list(rows), schema=IMAGES))
        for number, rows in enumerate(files)
    ]
    version = tables.append_files(images, parts, IMAGES)
    return {"images": images, "images_version": version, "index_version": update_index(images, version)}


def kept_selection(splits: Mapping[str, str]) -> pa.Table:
    """Selection of kept rows, from the split of each key."""
    keys = sorted(splits)
    columns = {"position": range(len(keys)), "status": ["kept"] * len(keys), "reason": pa.nulls(len(keys), pa.string())}
    return pa.table({"key": keys, **columns, "split": [splits[each] for each in keys]})


def write_kept_places(root: str, selection: str, images: Mapping[str, Any]) -> str:
    """Write the places of the kept rows of a selection, as dedup does; returns the folder."""
    kept = KeptRows(selection, images["images"], images["images_version"], images["index_version"])
    write_places(f"{root}/places", [KeyRange(0, 1)], kept.read, kept.num_files(), 1)
    return f"{root}/places"
