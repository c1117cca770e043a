"""Stage `ingest`: convert a list of (URL, caption) in any usual format to one clean, keyed, sorted table.

The list is untrusted. It is read in chunks with a limit on its decompressed size, and Parquet is read in a child process. A
damaged file raises an `InputError` that names it; a damaged row fails alone. The lines of text files are accounted for: each is
a row, continues one, is blank or the header.
"""

import codecs
import collections
import contextlib
import csv
import dataclasses
import fnmatch
import functools
import gzip
import hashlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from tasks import dataflow, generations, image_folders, ranges, rows
from tasks.generations import Generation, Sums
from tasks.stage import Output, Pinning, StageContext, stage
from tasks.store import Store
from tasks.tombstones import Tombstones, load_tombstones, refuse, tombstones_digest
from tasks.untrusted import local_files, parquet_list, separated
from tasks.untrusted.normalise import (
    first_line,
    map_texts,
    normalise_caption,
    normalise_captions,
    normalise_sha256s,
    normalise_urls,
)
from tasks.untrusted.parquet_list import MAX_COLUMNS, Claims, ListFault
from unclip import files
from unclip.config import added, fingerprint, nearest, require, to_dict
from unclip.errors import InputError
from unclip.scratch import scratch_folder

TEXT_FORMATS = (".csv", ".tsv", ".jsonl", ".txt")
FORMATS = (".parquet", *TEXT_FORMATS)
"""File formats by extension; the text formats may be gzipped (`.csv.gz`)."""
_SPELLINGS = {
    **{suffix: suffix for suffix in FORMATS}, ".pq": ".parquet", ".parq": ".parquet", ".tab": ".tsv", ".ndjson": ".jsonl",
    ".jsonlines": ".jsonl", ".json": ".jsonl", ".text": ".txt",
}  # fmt: skip
_GZIP = (".gz", ".gzip")
_CODECS = (
    *_GZIP,
    ".snappy",
    ".zstd",
    ".zst",
    ".brotli",
    ".lz4",
    ".none",
)  # in names of Parquet files, which compress their pages

MAX_LINE_CHARACTERS = 4 << 20
"""Longest line of a text file; the rest of a longer line is not read."""
MAX_EXPANSION = 100
"""Limit on the decompressed size, as a multiple of the file size. gzip or zstd shrink URL lists 10-fold, bombs 1000-fold."""
MIN_ALLOWANCE = 64 << 20
"""Decompressed bytes that any file may have, however small it is."""
MIN_ROWS = 1_000_000
"""Rows that any file may have, however small it is."""

PAIRS = pa.schema(
    {
        "position": pa.int64(),  # row number in the list, with files in order of their names
        "key": pa.string(),  # 32 hex digits of sha256(url, caption): the row's identity in all tables
        "url": pa.string(),
        "caption": pa.string(),
        "status": pa.string(),  # kept, dropped, failed
        "reason": pa.string(),  # see tasks.rows; null when kept
        "expected_sha256": pa.string(),  # sha256 of the image's bytes according to the list, 64 lower-case hex digits, or null
    }
)

LISTED = pa.schema({"url": pa.string(), "caption": pa.string(), "sha256": pa.string(), "reason": pa.string()})
"""Rows of the list as they are read; missing values are empty strings. The reason is null unless the row cannot be parsed."""

SMALL_BYTES = 4 << 20
"""Bytes of a list that the stage itself reads, and at least of each task: starting tasks would take longer than reading them."""

_CHUNK_ROWS = 1 << 16  # rows that are cleaned at once
_TASK_ROWS = 1 << 18  # rows that a task cleans
_TASK_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 19  # text that is read at once
_JSON_LINES_FOR_NAMES = 100  # a line may omit columns without a value
_JSON_CHARACTERS_FOR_NAMES = 16 << 20  # of the lines that are held until all columns have appeared

log = logging.getLogger(__name__)

_IMAGES_PER_TASK = 2048  # local images, which are hashed
_MAX_SPLITS = 1024  # tasks that divide the rows among ranges, of which there are no more
_WEB_URL = r"^\s*(?i:https?)://"

T = TypeVar("T")
LineCounts = collections.Counter[str]
"""Lines of text files: all (`in`), and those that are not the first or only line of a row: `header`, `blank`, `continued`."""


class MissingColumn(InputError):
    """A file has no column of some name."""

    setting = ""
    """Setting of the column."""
    hint = ""
    """Columns that the file has."""


@dataclasses.dataclass(frozen=True)
class ListLayout:
    """Column names of a published dataset."""

    url_column: str
    caption_column: str
    sha256_column: str | None = None
    header: tuple[str, ...] | None = None
    """Columns of a TSV file without a header, in order; quotes have no meaning there. None: files have a header."""


LAYOUTS: Mapping[str, ListLayout] = {
    "plain": ListLayout("url", "caption"),
    "laion": ListLayout("URL", "TEXT"),
    "coyo": ListLayout("url", "text"),
    "cc3m": ListLayout("url", "caption", header=("caption", "url")),
    "cc12m": ListLayout("url", "caption", header=("url", "caption")),
    "datacomp": ListLayout("url", "text", "sha256"),
}


@dataclasses.dataclass(frozen=True)
class IngestConfig:
    urls: str
    """The list: a .parquet, .csv, .tsv, .jsonl or .txt file (text also .gz), a folder of those, or a pattern such as
    "/data/part-*.parquet"; a path or URI. In .txt every line is a URL, or a URL, a tab and a caption; .txt files beside files of
    other formats are ignored. Or a folder of images with captions (`tasks.image_folders`)."""
    layout: Literal["plain", "laion", "coyo", "cc3m", "cc12m", "datacomp"] = "plain"
    """Column names of a published dataset; cc3m and cc12m are TSV without a header."""
    url_column: str | None = None
    """Column with the image URL; None is the layout's."""
    caption_column: str | None = None
    """Column with the caption; None is the layout's."""
    sha256_column: str | None = None
    """Column with the expected sha256 of the image's bytes, in hex; None is the layout's, if it has one."""
    local_root: str | None = None
    """Folder of images of your own: the list may name files below it, as paths, relative to it if they are not absolute, or as
    `file://` URLs. Nothing outside it is read. None refuses paths; a folder of images is its own root."""
    digest: str | None = None
    """sha256 of the list, filled in by the pipeline so that a changed list causes a new run; None skips the check."""
    local_digest: str | None = added(None)
    """Digest of the sizes and times of the local files in a list, filled in by the pipeline like `digest`."""
    tombstones: str | None = None
    """Digest of the tombstones, filled in by the pipeline so that a takedown causes a new dataset."""

    def __post_init__(self) -> None:
        require(bool(self.urls), "urls", self.urls, "a file, folder or pattern with the list of URLs")
        require(self.local_root != "", "local_root", "", "a folder, or none")
        require(self.layout in LAYOUTS, "layout", self.layout, f"one of {', '.join(LAYOUTS)}")
        used: set[str] = set()
        for setting, name in self.columns.items():
            require(name != "" and name not in used, setting, name, "a column that no other setting uses")
            used.add(name)

    @property
    def columns(self) -> dict[str, str]:
        """Setting -> column name to read, in the order URL, caption, sha256; sha256 is optional."""
        layout = LAYOUTS[self.layout]
        wanted = {
            name: getattr(layout, name) if getattr(self, name) is None else getattr(self, name)
            for name in ("url_column", "caption_column", "sha256_column")
        }
        return {setting: name for setting, name in wanted.items() if name is not None}


def _pin(config: IngestConfig, pinning: Pinning) -> IngestConfig:
    folder = image_folder(config.urls)
    config = dataclasses.replace(config, local_root=_absolute_root(config) or folder)
    config = dataclasses.replace(config, tombstones=tombstones_digest(pinning.store))
    digest, local_digest = _pin_list(config, pinning.store) if folder is None else (_pin_images(config, folder), None)
    return dataclasses.replace(config, digest=digest, local_digest=local_digest)


def _pin_list(config: IngestConfig, store: Store) -> tuple[str, str | None]:
    """Check the list; returns digests of it and of the local files that it names."""
    if names := left_out(config.urls):
        log.warning("ingest.urls: %s: left out %s. Convert them to %s.", config.urls, names, ", ".join(FORMATS))
    digests = _digests(_sources(config.urls))
    earlier = _find_earlier(store, config, digests)
    _check_rows(config, earlier.read["files"] if earlier else 0)
    return digests[-1], None if config.local_root is None else _states_digest(config, config.local_root)


def _pin_images(config: IngestConfig, folder: str) -> str:
    """Check that the images of a folder have a caption; returns a digest of the names, sizes and times of its files."""
    has_caption = False
    found = image_folders.survey(folder)
    for path in found.metadata:
        with contextlib.closing(_metadata_rows(config, folder, path)) as parts:  # checks the columns of every file
            for part in parts:
                sound = part.filter(pc.is_null(part["reason"]))
                is_caption = pc.not_equal(pc.utf8_trim_whitespace(sound["caption"]), "")
                if has_caption := has_caption or bool(pc.any(is_caption).as_py()):
                    break
    images = image_folders.list_images(folder, np.zeros(0, np.uint64), _IMAGES_PER_TASK)
    read = functools.partial(
        image_folders.read_captions, config.local_root or folder, caption_name=config.caption_column
    )
    if not has_caption and not any(caption.strip() for some in images for _, caption, _ in read(some)):
        raise InputError(
            f"ingest.urls: {config.urls} has images without captions. Put the caption of a.jpg into a.txt beside it, or add "
            "metadata.csv with the columns file_name and text."
        )
    if found.num_left_out:
        names = _listing([normalise_caption(name)[:100] for name in found.left_out], found.num_left_out)
        formats = ", ".join(image_folders.IMAGE_SUFFIXES)
        log.warning(
            "ingest.urls: %s: left out %s, which are no captions of images. Convert images to one of %s.",
            config.urls, names, formats,
        )  # fmt: skip
    return found.digest


def _absolute_root(config: IngestConfig) -> str | None:
    """Absolute path of `local_root`; raises InputError if it is no folder."""
    if config.local_root is None:
        return None
    path = files.to_path(config.local_root)
    if path is None or not path.is_dir():
        raise InputError(
            f"ingest.local_root: {config.local_root} is not a folder on this machine. Name the folder of the images."
        )
    return str(path)


@stage("ingest", version=4, pin=_pin)
def ingest(context: StageContext, config: IngestConfig) -> Output:
    """Read the list of URLs and captions, clean it and give every row its key.

    If the list is an earlier one with more files after its own, only these are read.
    """
    images = image_folder(config.urls)
    digests = _digests(_sources(config.urls)) if images is None else [config.digest]  # of images, the bytes count
    if config.digest is None:
        check_source(config)
    elif digests[-1] != config.digest:
        raise InputError(
            f"ingest.urls: {config.urls} has changed since this run was planned. Run the same command again."
        )
    earlier = None if images else _find_earlier(context.store, config, digests)
    num_known = earlier.read["files"] if earlier else 0
    chunks, offsets, num_rows, lines = (
        _read_list(config, _sources(config.urls)[num_known:]) if images is None else _read_images(config, images)
    )
    if earlier and earlier.begins_anew(num_rows):
        earlier = None
        chunks, offsets, num_rows, lines = _read_list(config, _sources(config.urls))
    if earlier:
        folder, count = f"{context.folder}/pairs-since-{earlier.name}", ranges.range_count(earlier.table)
        first_row = earlier.sums.counts["rows"]["in"]
        offsets, lines = [first_row + offset for offset in offsets], lines + LineCounts(earlier.others["lines"])
    else:
        folder, count = f"{context.folder}/pairs", ranges.num_ranges(num_rows)
    split = functools.partial(_clean_and_split, offsets, count, config.local_root or images)
    tombstones = load_tombstones(context.store)
    below = ranges.layers(earlier.table) if earlier else []
    written = dataflow.exchange(
        split, _grouped(chunks), count, functools.partial(_write_range, folder, count, tombstones, below)
    )
    sums = Sums.total(sums for sums, _ in written)
    changed = 0
    if earlier:
        replaced = Sums.total(sums for _, sums in written)
        changed = earlier.changed + sums.counts["rows"]["in"]
        sums = Sums.total([earlier.sums.minus(replaced), sums])
        ranges.write_earlier(folder, below)
    facts = {**sums.counts, "layers": below}
    facts |= {"lines": {name: lines[name] for name in ("in", "header", "blank", "continued")}} if lines else {}
    if not facts["rows"][rows.KEPT]:
        raise InputError(
            f"ingest.urls: none of the {num_rows:,} rows of {config.urls} can be used ({rows.top_reasons(facts)}). "
            f"If they name files, give --set ingest.local_root. Check --set ingest.layout, ingest.url_column and "
            "ingest.caption_column."
        )
    if images is None:
        read = {"digest": digests[-1], "files": len(digests)}
        generation = Generation(context.folder, _settings(config), folder, read, sums, changed, {"lines": dict(lines)})
        generations.save(context, generation)
    return Output(folder, sums.hex_digest, facts)


def _settings(config: IngestConfig) -> str:
    """Fingerprint of all settings but the list."""
    return fingerprint(ingest.version, to_dict(dataclasses.replace(config, urls="list", digest=None)))


def _find_earlier(store: Store, config: IngestConfig, digests: Sequence[str | None]) -> Generation | None:
    """Find the result on the longest list that this list begins with.

    Args:
        digests: see `_digests`.
    """
    if config.local_root is not None:  # files that the list names may have changed
        return None

    def num_files(earlier: Generation) -> int | None:
        number: int = earlier.read["files"]
        return number if number < len(digests) and digests[number - 1] == earlier.read["digest"] else None

    return generations.find(store, "ingest", _settings(config), num_files)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Consecutive rows of the files that one task reads."""

    task: int
    """Number of the task, in order of its files."""
    first_row: int
    """Number of the first row among those of the task."""
    listed: pa.Table
    """Rows of the schema `LISTED`."""
    lines: LineCounts
    """Lines of its rows, and others since the chunk before."""

    @property
    def num_rows(self) -> int:
        return int(self.listed.num_rows)


Chunks = tuple[list[Any], list[int], int, LineCounts]
"""Chunks or references of chunks; number of rows before those of each task; number of all rows; all lines."""


def _read_list(config: IngestConfig, sources: "Sequence[_Source]") -> Chunks:
    """Read some files of the list, small ones in this process, large ones in tasks."""
    groups: list[list[_Source]] = []
    is_small = sum(source.size for source in sources) <= SMALL_BYTES
    for source in sources:
        if not groups or (not is_small and sum(other.size for other in groups[-1]) >= SMALL_BYTES):
            groups.append([])
        groups[-1].append(source)
    return _numbered(_produce(functools.partial(_read_group, config), list(enumerate(groups)), _size_of, is_small))


def _produce(
    read: Callable[[Any], Iterator[Any]], items: Sequence[Any], describe: Callable[[Any], Any], is_small: bool
) -> list[list[tuple[Any, Any]]]:
    """Call `dataflow.produce`, or do the same in this process."""
    if is_small:
        return [[(describe(chunk), chunk) for chunk in read(item)] for item in items]
    return dataflow.produce(read, items, describe)


def _size_of(chunk: "_Chunk") -> tuple[int, LineCounts]:
    return chunk.num_rows, chunk.lines


def _numbered(produced: Sequence[Sequence[tuple[tuple[int, LineCounts], Any]]]) -> Chunks:
    ends = np.cumsum([0, *(sum(num_rows for (num_rows, _), _ in chunks) for chunks in produced)]).tolist()
    lines = sum((lines for chunks in produced for (_, lines), _ in chunks), LineCounts())
    return [chunk for chunks in produced for _, chunk in chunks], ends[:-1], ends[-1], lines


def _read_group(config: IngestConfig, numbered: "tuple[int, list[_Source]]") -> Iterator[_Chunk]:
    """Read some files of the list in large chunks; those with local files are small, since a task reads these to hash them."""
    task, sources = numbered
    first_row, num_rows, num_bytes, num_files = 0, 0, 0, 0
    parts, lines = [LISTED.empty_table()], LineCounts()
    for part, part_files in _cut(_read_sources(sources, config, lines), config.local_root is not None):
        parts.append(part)
        num_rows, num_bytes, num_files = num_rows + part.num_rows, num_bytes + part.nbytes, num_files + part_files
        if num_rows >= _TASK_ROWS or num_bytes >= _TASK_BYTES or num_files >= _IMAGES_PER_TASK:
            yield _Chunk(task, first_row, pa.concat_tables(parts), LineCounts(lines))
            first_row, num_rows, num_bytes, num_files = first_row + num_rows, 0, 0, 0
            parts = [LISTED.empty_table()]
            lines.clear()
    if num_rows or lines:
        yield _Chunk(task, first_row, pa.concat_tables(parts), lines)


def _cut(tables_of_rows: Iterable[pa.Table], has_files: bool) -> Iterator[tuple[pa.Table, int]]:
    """Yield rows of the list and the number of local files among them, at most `_IMAGES_PER_TASK`."""
    for table in tables_of_rows:
        if not has_files:
            yield table, 0
            continue
        counts = np.cumsum(~_are_web_urls(table["url"]).to_numpy())
        ends = np.flatnonzero(np.diff(np.maximum(counts - 1, 0) // _IMAGES_PER_TASK)) + 1
        start, before = 0, 0
        for end in [*ends.tolist(), table.num_rows]:
            if end > start:
                yield table.slice(start, end - start), int(counts[end - 1]) - before
                start, before = end, int(counts[end - 1])


def _are_web_urls(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Tell the texts that can only be URLs from those that may be paths."""
    return pc.match_substring_regex(texts, _WEB_URL)


def image_folder(urls: str) -> str | None:
    """Path of a local folder of images that holds no list; None for others.

    Metadata files are part of the images, and so are the tables that img2dataset writes beside its folders of images.
    """
    path = files.to_path(urls)
    if path is None or not path.is_dir():
        return None
    root = str(path)
    top = next(image_folders.walk(root, on_error=lambda _: None), None)
    names = [name for name in top.names if not top.is_shard_table(name)] if top else []
    listed = [_Source(pafs.LocalFileSystem(), name, name, 0) for name in set(names) - set(top.metadata if top else ())]
    if any(source.format and not source.is_secondary and not source.path.startswith("_") for source in listed):
        return None
    return root if image_folders.has_images(root) else None


def _read_images(config: IngestConfig, folder: str) -> Chunks:
    """Read the metadata files and captions of a folder of images, few in this process, many in tasks."""
    metadata = image_folders.metadata_files(folder)
    is_small = sum(map(_file_size, metadata)) <= SMALL_BYTES
    read_metadata = functools.partial(_read_metadata, config, folder)
    described = _produce(read_metadata, list(enumerate(metadata)), _size_and_hashes, is_small)
    found = [hashes for chunks in described for (_, hashes), _ in chunks]
    images = image_folders.list_images(
        folder, np.unique(np.concatenate([np.zeros(0, np.uint64), *found])), _IMAGES_PER_TASK
    )
    numbered = list(enumerate(images, start=len(metadata)))
    read_captions = functools.partial(_read_captions, config, folder)
    rest = _produce(read_captions, numbered, _size_of, is_small=len(numbered) <= 1)
    return _numbered([[(size, chunk) for (size, _), chunk in chunks] for chunks in described] + rest)


def _size_and_hashes(chunk: _Chunk) -> tuple[tuple[int, LineCounts], np.ndarray]:
    return _size_of(chunk), image_folders.hashes(chunk.listed["url"].to_pylist())


def _read_metadata(config: IngestConfig, folder: str, numbered: tuple[int, str]) -> Iterator[_Chunk]:
    task, path = numbered
    first_row = 0
    for part, _ in _cut(_metadata_rows(config, folder, path), has_files=True):
        yield _Chunk(task, first_row, part, LineCounts())
        first_row += part.num_rows


def _read_captions(
    config: IngestConfig, folder: str, numbered: tuple[int, Sequence[image_folders.Images]]
) -> Iterator[_Chunk]:
    task, images = numbered
    found = list(image_folders.read_captions(config.local_root or folder, images, config.caption_column))
    urls, captions, reasons = zip(*found, strict=True) if found else ((), (), ())
    yield _Chunk(task, 0, _listed([urls, captions], pa.array(reasons, pa.string())), LineCounts())


def _metadata_rows(config: IngestConfig, folder: str, path: str) -> Generator[pa.Table, None, None]:
    """Rows of a metadata file, with the URLs of the files that they name."""
    root = config.local_root or folder
    source = _Source(pafs.LocalFileSystem(), path, path, _file_size(path), root, has_lists=True)
    names = image_folders.CAPTION_NAMES if config.caption_column is None else (config.caption_column,)
    for name in names:
        columns = IngestConfig(config.urls, url_column="file_name", caption_column=name)
        try:
            for part in _read_source(source, columns, LineCounts()):
                urls = [local_files.to_url(text, os.path.dirname(path)) or text for text in part["url"].to_pylist()]
                yield part.set_column(0, LISTED.field("url"), pa.array(urls, pa.string()))
            return
        except MissingColumn as error:
            if error.setting == "url_column":
                raise InputError(
                    f"ingest.urls: {path} has no column 'file_name' with the images below its folder. {error.hint}"
                ) from None
            if name == names[-1]:
                tried = " or ".join(map(repr, names))
                raise InputError(
                    f"ingest.urls: {path} has no column {tried} with the captions. {error.hint} "
                    "Or name another with --set ingest.caption_column."
                ) from None


def _file_size(path: str) -> int:
    """Size of a file; 0 if it has none that can be read."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _grouped(chunks: Sequence[T]) -> list[Sequence[T]]:
    """Divide chunks among at most `_MAX_SPLITS` tasks: each task makes a piece for every range, so that the number of pieces
    would grow with the square of the number of rows."""
    step = max(1, -(-len(chunks) // _MAX_SPLITS))
    return [chunks[start : start + step] for start in range(0, len(chunks), step)]


def _clean_and_split(
    offsets: Sequence[int], count: int, local_root: str | None, chunks: Sequence[Any]
) -> list[pa.Table]:
    """Clean the rows of chunks and divide them among the ranges of keys.

    Args:
        offsets: number of rows of the list before those of each task.
        chunks: chunks, or references of chunks.
    """
    cleaned = [
        clean(chunk.listed, offsets[chunk.task] + chunk.first_row, local_root) for chunk in map(dataflow.value, chunks)
    ]
    return ranges.split_by_key(pa.concat_tables(cleaned), count)


def _write_range(
    folder: str, count: int, tombstones: Tombstones, below: Sequence[str], index: int, pieces: Sequence[pa.Table]
) -> tuple[Sums, Sums]:
    """Write the pairs of one range of keys, and a look-up of their keys; returns the sums of these rows and of those replaced.

    Args:
        below: earlier layers, whose rows with one of the new keys are written again.
    """
    key_range = ranges.KeyRange(index, count)
    pairs = pa.concat_tables([PAIRS.empty_table(), *pieces])
    known = ranges.known_keys(below, key_range, pairs["key"])
    before = ranges.find_rows(below[-1], known.to_pylist()).cast(PAIRS) if len(known) else PAIRS.empty_table()
    again = rows.undrop(before, ["duplicate_row"])
    pairs = refuse(drop_duplicates(pa.concat_tables([pairs, again])), tombstones)
    ranges.write_range(folder, key_range, pairs)
    ranges.write_keys(folder, key_range, pairs["key"])
    return Sums.of(pairs), Sums.of(before)


def check_source(config: IngestConfig) -> str:
    """Check that the list exists, is readable, has the columns and at least one row, without parsing all of it.

    Returns:
        sha256 of the names and bytes of its files.

    Raises:
        InputError: the list is not usable; names the file and the problem.
    """
    _check_rows(config)
    return _digests(_sources(config.urls))[-1]


def _check_rows(config: IngestConfig, num_checked: int = 0) -> None:
    """Check the columns and the first rows of each file.

    Args:
        num_checked: number of first files that were checked with the same settings before.
    """
    unreadable, kinds = LISTED.empty_table(), Kinds()
    has_rows = has_sound_rows = num_checked > 0
    for source in _sources(config.urls)[num_checked:]:
        for first in itertools.islice(_read_source(source, config, LineCounts(), kinds), 1):
            bad = first.filter(pc.equal(first["reason"], "bad_row"))
            has_rows, has_sound_rows = True, has_sound_rows or bad.num_rows < first.num_rows
            unreadable = unreadable if unreadable.num_rows else bad
    if num_checked and kinds.numbers:  # the other files may have texts in these columns
        return _check_rows(config)
    if not has_rows:
        raise InputError(f"ingest.urls: {config.urls} has no rows. Give a list with at least one URL and caption.")
    if not has_sound_rows:
        text = normalise_caption(unreadable["caption"][0].as_py())[:100]
        raise InputError(
            f"ingest.urls: {config.urls} has no row that can be read ({rows.REASONS['bad_row']}), such as {text!r}. "
            "Write an object on each line of .jsonl; in .csv and .tsv, quote fields that hold the separator or a quote."
        )
    kinds.check()
    return None


def _digests(sources: "Sequence[_Source]") -> list[str]:
    """sha256 of the names and bytes of the first file, of the first two, and so on."""
    digest, found = hashlib.sha256(), []
    for source in sources:
        digest.update(source.path.rpartition("/")[2].encode() + b"\0")
        with _readable(source), source.open_stream() as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        found.append(digest.copy().hexdigest())
    return found


def _states_digest(config: IngestConfig, root: str) -> str:
    """Digest of the sizes and times of the local files that a list names."""
    digest = hashlib.sha256()
    paths = (local_files.spelled_path(text, root) for texts in _file_names(config) for text in texts.to_pylist())
    for state in local_files.states(paths):
        digest.update(f"{state}\0".encode())
    return digest.hexdigest()


def _file_names(config: IngestConfig) -> Iterator[pa.Array]:
    """Texts of a list that may be paths, some at a time; rows beside each other often name the same file."""
    for part in read(config):
        yield pc.unique(part["url"].filter(pc.invert(_are_web_urls(part["url"]))))


def read(config: IngestConfig) -> Iterator[pa.Table]:
    """Read the rows of the list in chunks of the schema `LISTED`, files in order of their names.

    Raises:
        InputError: a file is damaged; names the file, the line if possible, and the problem. A fault of a row is its reason.
    """
    yield from _read_sources(_sources(config.urls), config, LineCounts())


def _read_sources(sources: Iterable["_Source"], config: IngestConfig, lines: LineCounts) -> Iterator[pa.Table]:
    return itertools.chain.from_iterable(_read_source(source, config, lines) for source in sources)


def clean(listed: pa.Table, position: int = 0, local_root: str | None = None) -> pa.Table:
    """Normalise rows of the list to `PAIRS`, in their order.

    Args:
        listed: rows of the schema `LISTED`.
        position: row number of the first row in the list.
        local_root: folder below which the rows may name files.
    """
    chunks = []
    for batch in listed.to_batches(_CHUNK_ROWS):
        chunks.append(_clean_batch(batch, position, local_root))
        position += batch.num_rows
    return pa.concat_tables(chunks or [PAIRS.empty_table()])


def _clean_batch(listed: pa.RecordBatch, position: int, local_root: str | None) -> pa.Table:
    urls, captions = normalise_urls(listed["url"]), normalise_captions(listed["caption"])
    urls, local = _with_local(urls, listed["url"], local_root)
    is_bad = urls.is_null()
    refused = normalise_captions(listed["url"].filter(is_bad))
    refused = pc.replace_substring_regex(refused, r"//[^/?#@\s]*@", "//")  # a password; such URLs are refused
    shown = pc.replace_with_mask(urls, is_bad, refused)
    sha256s = normalise_sha256s(listed["sha256"])
    has_hash = pc.not_equal(
        map_texts(str.strip, listed["sha256"], pc.or_(sha256s.is_valid(), pc.equal(listed["sha256"], ""))), ""
    )
    texts = pc.binary_join_element_wise(shown, captions, "\n")
    if local_root is not None:  # a file that changes is another image, so its row has another key
        texts = pc.coalesce(pc.binary_join_element_wise(texts, local["sha256"], "\n"), texts)
    keys = [hashlib.sha256(text).hexdigest()[:32] for text in texts.cast(pa.binary()).to_pylist()]
    reasons: dict[str, pa.BooleanArray] = {
        "no_url": pc.equal(shown, ""),
        "bad_url": is_bad,
        **{name: pc.equal(local["reason"], name).fill_null(False) for name in ("no_file", "blocked_path")},
        "hash_mismatch": pc.not_equal(local["sha256"], sha256s).fill_null(False),
        "bad_hash": pc.and_(sha256s.is_null(), has_hash),
        "no_caption": pc.equal(captions, ""),
    }  # the first that applies
    reason = pc.coalesce(listed["reason"], pc.case_when(pc.make_struct(*reasons.values()), *reasons))
    is_dropped = pc.equal(reason, "no_caption")
    status = pc.if_else(reason.is_null(), rows.KEPT, pc.if_else(is_dropped, rows.DROPPED, rows.FAILED))
    positions = np.arange(position, position + listed.num_rows)
    return pa.table([positions, keys, shown, captions, status, reason, pc.coalesce(sha256s, local["sha256"])], PAIRS)


_LOCAL = pa.schema({"sha256": pa.string(), "reason": pa.string()})


def _with_local(urls: pa.Array, texts: pa.Array, root: str | None) -> tuple[pa.Array, pa.RecordBatch]:
    """Replace the URLs that are null by those of files below a root; returns them and a row of `_LOCAL` for each."""
    found: dict[int, local_files.LocalFile] = {}
    if root is not None:
        wanted = np.flatnonzero(urls.is_null().to_numpy(zero_copy_only=False))
        known: dict[str, local_files.LocalFile | None] = {}  # a file may have several captions
        for row, text in zip(wanted.tolist(), texts.take(pa.array(wanted)).to_pylist(), strict=True):
            if text not in known:
                known[text] = local_files.describe(text, root) if text.strip() else None
            if file := known[text]:
                found[row] = file
    if not found:
        return urls, pa.record_batch([pa.nulls(len(urls), pa.string())] * 2, _LOCAL)
    columns = {name: np.full(len(urls), None, object) for name in ("url", *_LOCAL.names)}
    for name, column in columns.items():
        column[list(found)] = [getattr(file, name) for file in found.values()]
    local = pa.record_batch([pa.array(columns[name], pa.string()) for name in _LOCAL.names], _LOCAL)
    return pc.coalesce(urls, pa.array(columns["url"], pa.string())), local


def drop_duplicates(pairs: pa.Table) -> pa.Table:
    """Sort pairs by key and drop all but one of the usable rows of each key.

    The one with the smallest expected hash is kept, so that the order of the list does not matter. Rows without a hash come
    last; of equal rows, the first in the list is kept. The kept row precedes its duplicates.
    """
    # "kept" sorts last among the statuses, so in descending order kept rows come first within a key.
    order = [
        ("key", "ascending"),
        ("status", "descending"),
        ("expected_sha256", "ascending"),
        ("position", "ascending"),
    ]
    table = pairs.sort_by(order)
    if table.num_rows < 2:
        return table
    key = table.column("key")
    repeated = pc.equal(key.slice(1), key.slice(0, table.num_rows - 1))
    repeated = pa.chunked_array([pa.array([False]), *repeated.chunks])
    duplicate = pc.and_(repeated, pc.equal(table.column("status"), rows.KEPT))
    for name, value in (("status", rows.DROPPED), ("reason", "duplicate_row")):
        index = table.schema.get_field_index(name)
        table = table.set_column(index, PAIRS.field(name), pc.if_else(duplicate, value, table.column(name)))
    return table


@dataclasses.dataclass(frozen=True)
class _Source:
    """One file of the list."""

    filesystem: pafs.FileSystem
    path: str
    uri: str
    """URI for messages."""
    size: int
    """File size in bytes."""
    root: str | None = None
    """Folder that the file must be in, whatever links lead there; None for a file anywhere."""
    has_lists: bool = False
    """True if a row may list several captions in JSON lines, as a file beside an image may."""

    @property
    def suffixes(self) -> list[str]:
        """Extensions in lower case, with dots."""
        return [f".{part.strip()}" for part in self.path.rpartition("/")[2].lower().split(".")[1:]]

    @property
    def is_gzip(self) -> bool:
        return self.suffixes[-1:] != [] and self.suffixes[-1] in _GZIP

    @property
    def format(self) -> str:
        """One of `FORMATS`, or "" if the format is unsupported."""
        suffixes = self.suffixes
        if not suffixes:
            return ""
        if suffixes[-1] in _CODECS and len(suffixes) > 1 and _SPELLINGS.get(suffixes[-2]) == ".parquet":
            return ".parquet"  # as pandas names it
        if self.is_gzip:
            suffixes = suffixes[:-1]
        found = _SPELLINGS.get(suffixes[-1], "") if suffixes else ""
        if found == ".txt" and len(suffixes) > 1:  # list.csv.txt, where a desktop hides extensions
            return _SPELLINGS.get(suffixes[-2], found)
        return "" if self.is_gzip and found not in TEXT_FORMATS else found

    @property
    def is_secondary(self) -> bool:
        """True for a file that is part of a list only in a folder without files of other formats."""
        suffixes = self.suffixes[:-1] if self.is_gzip else self.suffixes
        return self.format == ".txt" or suffixes[-1:] == [".json"]

    @property
    def allowance(self) -> int:
        """Limit on the bytes or characters read from the file."""
        return max(MIN_ALLOWANCE, MAX_EXPANSION * self.size)

    def open_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Open the raw bytes: by default pyarrow would decompress .gz files."""
        if self.root is not None:
            return local_files.opened(self.root, self.path)
        return contextlib.closing(self.filesystem.open_input_stream(self.path, compression=None, buffer_size=1 << 20))


def _sources(urls: str) -> list[_Source]:
    """Files of the list, sorted by name."""
    return _find_sources(urls)[0]


def left_out(urls: str) -> str:
    """Names of some files of a folder or pattern that are no part of the list; empty if there are none."""
    return _some_names(_find_sources(urls)[1])


def _find_sources(urls: str) -> tuple[list[_Source], list[_Source]]:
    """Files of the list, and other files of its folder, sorted by name."""
    is_uri = "://" in urls
    place, mark, query = urls.partition("?") if is_uri else (urls, "", "")  # s3://bucket/folder?region=...
    magic = re.search(r"[*?\[]", place)
    with _readable_list(urls):
        if magic and (is_uri or not files.exists(place)):
            folder = re.sub("[^/]*$", "", place[: magic.start()])
            filesystem, path = files.locate((folder or ".") + mark + query)
            found = _matching(filesystem, path, place[len(folder) :])
        else:
            filesystem, path = files.locate(urls)
            info = filesystem.get_file_info(path)
            is_folder = info.type == pafs.FileType.Directory
            found = _matching(filesystem, path, "[!._]*") if is_folder else [info]
    scheme = place.partition("://")[0] + "://" if is_uri else ""
    if [info.type for info in found] == [pafs.FileType.NotFound]:
        raise InputError(f"ingest.urls: {urls} does not exist. Give a {', '.join(FORMATS)} file or a folder of those.")
    sources = [_Source(filesystem, info.path, scheme + info.path, info.size) for info in found]
    known = [source for source in sources if source.format]
    if not known:
        kind = "matches no file of the formats" if magic else "is not a file, or a folder with files, of the formats"
        others = f" It has {_some_names(sources)}." if sources else ""
        raise InputError(f"ingest.urls: {urls} {kind} {', '.join(FORMATS)}.{others} Convert the list.")
    primary = _primary(known)
    read_paths = {source.path for source in primary}
    return primary, [source for source in sources if source.path not in read_paths]


def _primary(sources: Sequence[_Source]) -> list[_Source]:
    """Files that are read: those of formats for tables, else text files, else .json files."""
    found = [source for source in sources if not source.is_secondary]
    return found or [source for source in sources if source.format == ".txt"] or list(sources)


def _some_names(sources: Sequence[_Source], limit: int = 5) -> str:
    """Names of some files, for a message."""
    names = [normalise_caption(source.path.rpartition("/")[2])[:100] for source in sources[:limit]]
    return _listing(names, len(sources))


def _listing(names: Sequence[str], count: int) -> str:
    """Text of the first of `count` names."""
    return ", ".join(names) + (f" and {count - len(names):,} more" if count > len(names) else "")


def _matching(filesystem: pafs.FileSystem, folder: str, pattern: str) -> list[pafs.FileInfo]:
    """Files below a folder whose paths match the pattern part by part, sorted; hidden files never match.

    Raises:
        InputError: one is a link out of the folder.
    """
    selector = pafs.FileSelector(folder, recursive="/" in pattern, allow_not_found=True)
    found = []
    for info in filesystem.get_file_info(selector):
        parts, patterns = info.path.removeprefix(folder).strip("/").split("/"), pattern.split("/")
        matches = len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))
        if matches and info.type == pafs.FileType.File and not any(part.startswith(".") for part in parts):
            found.append((parts, info))
    if isinstance(filesystem, pafs.LocalFileSystem):
        for _, info in found:
            if not files.is_inside(info.path, folder):
                raise InputError(
                    f"ingest.urls: {info.path} is a link to {os.path.realpath(info.path)}, outside of {folder}. Copy that file "
                    "into the folder."
                )
    return [info for _, info in sorted(found, key=lambda item: item[0])]


@dataclasses.dataclass
class Kinds:
    """Settings whose columns hold texts in some file, and those whose columns hold numbers: probably the wrong column."""

    texts: set[str] = dataclasses.field(default_factory=set)
    numbers: dict[str, str] = dataclasses.field(default_factory=dict)
    """Setting -> message."""

    def check(self) -> None:
        """Raise `InputError` if a column holds numbers in all files that have values."""
        for setting, message in self.numbers.items():
            if setting not in self.texts:
                raise InputError(message)


def _read_source(
    source: _Source, config: IngestConfig, lines: LineCounts, kinds: Kinds | None = None
) -> Iterator[pa.Table]:
    """Read the rows of one file and add its lines to `lines` and its columns to `kinds`; check its columns first."""
    header = LAYOUTS[config.layout].header
    if header and source.format not in (".tsv", ".txt"):
        raise InputError(
            f"ingest.layout: {config.layout} is TSV without a header, got {source.uri}. "
            f"Use --set ingest.layout=plain for a file that names its columns."
        )
    with _readable(source):
        if source.format == ".parquet":
            yield from _parquet_chunks(source, config, kinds or Kinds())
            return
        if kinds is not None:
            kinds.texts.update(config.columns)
        if source.format == ".jsonl":
            yield from _in_chunks(_json_rows, source, config, lines)
        elif source.format == ".txt":
            yield from _in_chunks(_txt_rows, source, config, lines)
        else:
            yield from _csv_chunks(source, config, lines)


class _Lines:
    """Lines of a text file, read in blocks, so that the rows of a block can be processed together."""

    def __init__(self, source: _Source, lines: LineCounts) -> None:
        self.num_blocks = 0
        """Number of blocks that have been read."""
        self.num_more = 0
        """Number of rows beyond one for each line."""
        self._lines = lines
        self._blocks = _within_allowance(source, _blocks(source), lambda lines: sum(map(len, lines)))

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.blocks())

    def blocks(self) -> Iterator[list[str]]:
        for lines in self._blocks:
            self.num_blocks += 1
            self._lines["in"] += len(lines)
            yield lines


def _blocks(source: _Source) -> Iterator[list[str]]:
    """Read a text file in blocks of lines with their line endings; invalid UTF-8 becomes U+FFFD."""
    with source.open_stream() as stream:
        binary = gzip.GzipFile(fileobj=stream) if source.is_gzip else stream
        data = binary.read(_BLOCK_BYTES)
        text = codecs.getincrementaldecoder(files.text_encoding(data))(errors="replace")
        is_first, rest, is_end = True, "", False
        while not is_end:
            is_end = not data
            block = text.decode(data, is_end)
            if is_first and block:
                block, is_first = block.lstrip("\ufeff"), False  # some files have two byte order marks
            lines = list(io.StringIO(rest + block, newline=""))
            # A block may end within a line, or within its ending "\\r\\n".
            rest = lines.pop() if lines and not is_end and not lines[-1].endswith("\n") else ""
            if lines:  # only the first line can have begun in an earlier block
                lines[0] = _shortened(lines[0])
            rest = _shortened(rest)
            yield lines
            data = b"" if is_end else binary.read(_BLOCK_BYTES)


def _shortened(line: str) -> str:
    """Line of at most `MAX_LINE_CHARACTERS`, with its ending."""
    if len(line) <= MAX_LINE_CHARACTERS:
        return line
    return line[:MAX_LINE_CHARACTERS] + line[len(line.rstrip("\r\n")) :]


def _in_chunks(
    read_rows: Callable[[_Source, _Lines, IngestConfig], Iterator[Sequence[str | None]]],
    source: _Source,
    config: IngestConfig,
    counted: LineCounts,
) -> Iterator[pa.Table]:
    """Yield the rows of a text file whose rows lie within lines, those of each block together; a row ends with its reason."""
    found, num_rows = LineCounts(), 0
    lines, num_blocks, num_columns = _Lines(source, found), 1, len(config.columns) + 1
    texts: list[str | None] = []  # of all rows in one list: lists of rows would occupy the garbage collector
    for row in read_rows(source, lines, config):
        texts += row
        if lines.num_blocks != num_blocks:
            num_rows += len(texts) // num_columns
            yield _listed_rows(texts, num_columns)
            texts, num_blocks = [], lines.num_blocks
    num_rows += len(texts) // num_columns
    if texts:
        yield _listed_rows(texts, num_columns)
    counted.update(found, blank=found["in"] - (num_rows - lines.num_more))


def _listed_rows(texts: Sequence[str | None], num_columns: int) -> pa.Table:
    *columns, reasons = (texts[index::num_columns] for index in range(num_columns))
    return _listed(columns, pa.array(reasons, pa.string()))


def _listed(columns: Iterable[Sequence[str | None] | pa.Array], reasons: pa.Array | None = None) -> pa.Table:
    """Convert columns, of which the hashes may be missing, to `LISTED`."""
    arrays = [pa.array(column, pa.string()) for column in columns]
    num_rows = len(arrays[0])
    missing = [pa.repeat("", num_rows)] if len(arrays) < len(LISTED) - 1 else []
    return pa.table([*arrays, *missing, pa.nulls(num_rows, pa.string()) if reasons is None else reasons], LISTED)


def _csv_chunks(source: _Source, config: IngestConfig, counted: LineCounts) -> Iterator[pa.Table]:
    """Yield the rows of a CSV or TSV file, those of each block together (`tasks.untrusted.separated`)."""
    found = LineCounts()
    blocks = _Lines(source, found).blocks()
    header = LAYOUTS[config.layout].header
    delimiter = "," if source.format == ".csv" else "\t"
    names: Sequence[str] = header or ()
    lines: list[str] = []
    while not names:
        while not lines:  # a block may end within the first line
            block = next(blocks, None)
            if block is None:
                raise _unreadable(source, "it is empty, expected a header line with column names")
            lines = block
        try:
            names = next(csv.reader([lines[0]], delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise _unreadable(source, f"line {found['in'] - len(lines) + 1}: {error}") from None
        found["header" if names else "blank"] += 1
        del lines[0]
    wanted = _column_indices(source, names, config)
    unbroken = [wanted[0], *wanted[2:]]  # all but the caption
    skips_spaces = header is None and any(name.startswith(" ") for name in names[1:])
    parser = separated.Parser(delimiter, len(names), wanted, unbroken, header is None, skips_spaces)
    num_rows = 0
    for block, is_last in _with_last(itertools.chain([lines], blocks)):
        parsed = parser.parse(block, is_last)
        found.update(blank=parsed.num_blank, continued=parsed.num_continued)
        num_rows += parsed.num_rows
        if parsed.num_rows:
            reasons = np.full(parsed.num_rows, None, object)
            reasons[list(parsed.stray)] = "bad_quotes"
            reasons[list(parsed.ragged)] = "bad_row"
            columns = (parsed.texts[index :: len(wanted)] for index in range(len(wanted)))
            has_faults = parsed.stray or parsed.ragged
            yield _listed(columns, pa.array(reasons, pa.string()) if has_faults else None)
    balance = num_rows + found["header"] + found["blank"] + found["continued"]
    assert balance == found["in"], f"{source.uri}: {found['in']:,} lines, of which {balance:,} are accounted for"
    counted.update(found)


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item, and True with the last."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True


def _txt_rows(source: _Source, lines: _Lines, config: IngestConfig) -> Iterator[Sequence[str | None]]:
    columns = config.columns
    _column_indices(source, [columns["url_column"], columns["caption_column"]], config)  # there is no sha256
    for line in lines:
        if line.strip():
            url, _, caption = line.rstrip("\r\n").partition("\t")
            yield url, caption, None


def _json_rows(source: _Source, lines: _Lines, config: IngestConfig) -> Iterator[Sequence[str | None]]:
    """Values and reason of each row; NaN is null, and a number is its text."""
    records = _json_records(lines)
    first: list[tuple[str, dict[str, Any] | None]] = []
    num_characters = 0
    names: dict[str, None] = {}
    wanted = [_plain_name(name) for name in config.columns.values()]
    for line, record in records:
        first.append((line, record))
        num_characters += len(line)
        names |= dict.fromkeys(record or ())
        has_names = set(wanted) <= set(map(_plain_name, names)) if len(first) == _JSON_LINES_FOR_NAMES else False
        is_enough = len(first) >= 100 * _JSON_LINES_FOR_NAMES or num_characters >= _JSON_CHARACTERS_FOR_NAMES
        if has_names or is_enough:
            break
    listed = list(names)
    columns = [listed[index] for index in _column_indices(source, listed, config)] if listed else wanted
    for line, record in itertools.chain(first, records):
        values = [] if record is None else [record.get(name) for name in columns]
        several = [values]
        if source.has_lists and values and isinstance(values[1], list):  # without any, the row has no caption
            several = [[values[0], caption, *values[2:]] for caption in values[1] or [None]]
            lines.num_more += len(several) - 1
        for found in several:
            if record is None or not all(value is None or isinstance(value, str) for value in found):
                url = found[0] if found and isinstance(found[0], str) else ""
                yield _valid(url), _valid(line.strip()), *[""] * (len(columns) - 2), "bad_row"
            else:
                yield *(_valid(value or "") for value in found), None


def _valid(text: str) -> str:
    """Text without lone surrogates, which JSON can escape."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _json_records(lines: _Lines) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Lines, each with its object, or None if it is no object."""
    decode = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=lambda _: None).decode
    for line in lines:
        if not line.strip():
            continue
        try:
            record = decode(line)
        except (ValueError, RecursionError):
            record = None
        yield line, record if isinstance(record, dict) else None


def _parquet_chunks(source: _Source, config: IngestConfig, kinds: Kinds) -> Iterator[pa.Table]:
    """Read a Parquet file in a child process (`tasks.untrusted.parquet_list`), since a damaged file may crash its reader."""
    with _on_disk(source) as path, parquet_list.opened(path, list(config.columns.values())) as opened:
        opened.select(_check_columns(source, opened.claims, config, kinds))
        _check_claims(source, opened.claims)
        num_rows = 0
        for batch in _within_allowance(source, opened.batches(), _num_characters):
            num_rows += batch.num_rows
            yield _listed(column.cast(pa.string()) for column in batch.columns)
    if num_rows != opened.claims.num_rows:
        raise _unreadable(source, f"got {num_rows:,} rows, its footer claims {opened.claims.num_rows:,}")


def _num_characters(batch: pa.RecordBatch) -> int:
    """Number of characters of the texts, and one per row."""
    return sum((pc.sum(pc.utf8_length(column)).as_py() or 0 for column in batch.columns), int(batch.num_rows))


@contextlib.contextmanager
def _on_disk(source: _Source) -> Iterator[str]:
    """Provide a local copy of the file for a process without network access and credentials."""
    if isinstance(source.filesystem, pafs.LocalFileSystem) and source.root is None:
        yield source.path
        return
    with scratch_folder("list") as folder:
        with source.open_stream() as stream, open(folder / "list", "wb") as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)
        yield str(folder / "list")


def _check_columns(source: _Source, claims: Claims, config: IngestConfig, kinds: Kinds) -> list[str]:
    """Check the columns and add them to `kinds`; returns their names in the file, in the order of `config.columns`."""
    if claims.num_columns > MAX_COLUMNS:
        raise _unreadable(source, f"it has {claims.num_columns:,} columns, expected at most {MAX_COLUMNS:,}")
    for column in claims.columns:
        if column.has_extension:
            raise InputError(
                f"ingest.urls: column {_shown(column.name)} of {source.uri} has an extension type. Store it as a plain type."
            )
    indices = _column_indices(source, [column.name for column in claims.columns], config)
    for setting, index in zip(config.columns, indices, strict=True):
        column = claims.columns[index]
        got = normalise_caption(column.kind)[:100]
        message = f"ingest.urls: column {_shown(column.name)} of {source.uri}: got {got}, expected text. Set {setting}."
        if column.is_text:
            kinds.texts.add(setting)
        elif column.is_number:  # perhaps of rows whose texts are numbers, or NaN
            kinds.numbers.setdefault(setting, message)
        elif not column.is_null:
            raise InputError(message)
    return [claims.columns[index].name for index in indices]


def _check_claims(source: _Source, claims: Claims) -> None:
    """Check the sizes claimed by the footer before memory is allocated for them."""
    limits = (
        ("rows", claims.num_rows, max(MIN_ROWS, MAX_EXPANSION * source.size)),
        ("bytes", claims.num_bytes, source.allowance),
    )
    for unit, value, limit in limits:
        if not 0 <= value <= limit:
            raise _unreadable(source, f"its footer claims {value:,} {unit}, expected at most {limit:,} in this file")
    if claims.num_group_rows != claims.num_rows:
        raise _unreadable(source, "its footer has contradictory numbers of rows")


def _column_indices(source: _Source, names: Sequence[str], config: IngestConfig) -> list[int]:
    """Index of each of `config.columns`, by its exact name or else by its name without spaces around it."""
    indices = []
    for setting, name in config.columns.items():
        plain_names = names if name in names else [_plain_name(other) for other in names]
        wanted = name if name in names else _plain_name(name)
        if wanted not in plain_names:
            matching_layouts = [
                layout_name
                for layout_name, layout in LAYOUTS.items()
                if not layout.header and {layout.url_column, layout.caption_column} <= set(plain_names)
            ]
            hint = f" Or use --set ingest.layout={matching_layouts[0]}." if matching_layouts else ""
            cleaned = map(normalise_caption, names)
            shown = [other if clean == name else clean for other, clean in zip(names, cleaned, strict=True)]
            nearby = nearest(name, shown)
            error = MissingColumn(
                f"ingest.urls: {source.uri} has no column {_shown(name)} (ingest.{setting}). {nearby}{hint}"
            )
            error.setting, error.hint = setting, nearby
            raise error
        if (number := plain_names.count(wanted)) > 1:
            raise InputError(
                f"ingest.urls: {source.uri} has {number} columns {_shown(name)} (ingest.{setting}), expected one. "
                f"Rename the others."
            )
        indices.append(plain_names.index(wanted))
    return indices


def _plain_name(name: str) -> str:
    """Name of a column without spaces, quotes and a byte order mark around it."""
    return name.strip("\ufeff\u200b\" '\t\r\n\xa0").strip()


def _within_allowance(source: _Source, items: Iterable[T], length: Callable[[T], int]) -> Iterator[T]:
    """Yield the items; raise `InputError` once their total length exceeds the allowance of the file."""
    remaining = source.allowance
    for item in items:
        remaining -= length(item)
        if remaining < 0:
            raise _unreadable(
                source,
                f"its {source.size:,} bytes decompress to more than {source.allowance:,}",
                "If you trust the file, split it or write it without compression.",
            )
        yield item


def _shown(name: str) -> str:
    """Untrusted name, made safe for a message."""
    return repr(normalise_caption(name)[:100])


def _unreadable(
    source: _Source, reason: str, remedy: str = "Write it again, or remove it from the list."
) -> InputError:
    return InputError(f"ingest.urls: {source.uri} cannot be read: {reason}. {remedy}")


@contextlib.contextmanager
def _readable(source: _Source) -> Iterator[None]:
    """Convert the errors of reading a damaged file to `InputError`."""
    try:
        yield
    except InputError:
        raise
    except rows.RowFault as fault:
        raise _unreadable(source, rows.meaning(fault.reason)) from None
    except (ListFault, pa.ArrowException, OSError, EOFError, ValueError, LookupError, MemoryError, zlib.error) as error:
        raise _unreadable(source, first_line(error)) from None


@contextlib.contextmanager
def _readable_list(urls: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"ingest.urls: {urls} cannot be listed: {first_line(error)}. Check that it can be read."
        ) from None
