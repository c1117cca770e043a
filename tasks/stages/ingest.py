"""Ingest: a list of (URL, caption) in any of the usual formats becomes one clean, keyed, ordered table.

The list is foreign data. It is read piece by piece, bounded in what it may unpack to, Parquet in a child process, and
whatever is wrong with a file is an `InputError` that names it. What is wrong with a row costs that row.
"""

import contextlib
import csv
import dataclasses
import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from tasks import rows, tables
from tasks.stage import Output, Pinning, StageContext, stage
from tasks.tombstones import load_tombstones, refuse, tombstones_digest
from tasks.untrusted import parquet_list
from tasks.untrusted.normalise import REPLACEMENT, first_line, normalise_caption, normalise_sha256, normalise_url
from tasks.untrusted.parquet_list import MAX_COLUMNS, Claims, ListFault
from unclip import files
from unclip.config import nearest, require
from unclip.errors import InputError

TEXT_FORMATS = (".csv", ".tsv", ".jsonl", ".txt")
FORMATS = (".parquet", *TEXT_FORMATS)
"""By name; the text formats may be gzipped (`.csv.gz`)."""

MAX_LINE_CHARACTERS = 4 << 20
"""Of a text file; a longer line is no row of a list."""
MAX_EXPANSION = 100
"""What a file may unpack to, as a multiple of its size. URL lists shrink to a tenth with gzip or zstd, bombs to a thousandth."""
MIN_ALLOWANCE = 64 << 20
"""Bytes that any file may unpack to, however small it is."""
MIN_ROWS = 1_000_000
"""Rows that any file may have, however small it is."""

PAIRS = pa.schema(
    {
        "position": pa.int64(),  # row number in the list, files in order of their names
        "key": pa.string(),  # 32 hex digits of sha256(url, caption): the row's identity in all tables
        "url": pa.string(),
        "caption": pa.string(),
        "status": pa.string(),  # kept, dropped, failed
        "reason": pa.string(),  # see tasks.rows; null when kept
        "expected_sha256": pa.string(),  # 64 lower-case hex digits that the list gives for the picture's bytes, or null
    }
)


_CHUNK_ROWS = 1 << 16
_JSON_LINES_FOR_NAMES = 100  # a line may leave out what it has no value for

T = TypeVar("T")


class Listed(NamedTuple):
    """One row as it stands in the list; an empty text where it has none."""

    url: str
    caption: str
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class ListLayout:
    """Where a published dataset keeps what is wanted."""

    url_column: str
    caption_column: str
    sha256_column: str | None = None
    header: tuple[str, ...] | None = None
    """Columns of a TSV file without a header, in order; quotes mean nothing in such a file. None: files name their columns."""


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
    "/data/part-*.parquet"; a path or URI. In .txt every line is a URL, or a URL, a tab and a caption; beside other formats
    .txt files are taken for notes and left out."""
    layout: Literal["plain", "laion", "coyo", "cc3m", "cc12m", "datacomp"] = "plain"
    """Names of the columns as in that published dataset; cc3m and cc12m are TSV without a header."""
    url_column: str | None = None
    """Column with the picture's address; None is the layout's."""
    caption_column: str | None = None
    """Column with the text; None is the layout's."""
    sha256_column: str | None = None
    """Column with the sha256 that the picture's bytes should have, in hex; None is the layout's, which may be none."""
    digest: str | None = None
    """sha256 of the list's bytes, filled in by the pipeline so that a changed list is a new run; None is unchecked."""
    tombstones: str | None = None
    """Digest of what was taken down, filled in by the pipeline so that a takedown makes a new dataset."""

    def __post_init__(self) -> None:
        require(bool(self.urls), "urls", self.urls, "a file, folder or pattern with the list of URLs")
        require(self.layout in LAYOUTS, "layout", self.layout, f"one of {', '.join(LAYOUTS)}")
        taken: set[str] = set()
        for setting, name in self.columns.items():
            require(name != "" and name not in taken, setting, name, "another column than for the rest")
            taken.add(name)

    @property
    def columns(self) -> dict[str, str]:
        """Column names to read by their settings: URL, caption and, if there is to be one, sha256; in this order."""
        layout = LAYOUTS[self.layout]
        wanted = {
            name: getattr(layout, name) if getattr(self, name) is None else getattr(self, name)
            for name in ("url_column", "caption_column", "sha256_column")
        }
        return {setting: name for setting, name in wanted.items() if name is not None}


def _pin(config: IngestConfig, pinning: Pinning) -> IngestConfig:
    return dataclasses.replace(config, digest=check_source(config), tombstones=tombstones_digest(pinning.store))


@stage("ingest", version=2, pin=_pin)
def ingest(context: StageContext, config: IngestConfig) -> Output:
    """Read the list of URLs and captions, clean it and give every row its key."""
    if config.digest and check_source(config) != config.digest:
        raise InputError(f"ingest.urls: {config.urls} changed since this run was planned. Run the same command again.")
    pairs = refuse(clean(read(config)), load_tombstones(context.store))
    facts = rows.count(pairs)
    if not facts["rows"][rows.KEPT]:
        raise InputError(
            f"ingest.urls: none of the {pairs.num_rows:,} rows of {config.urls} can be used ({rows.top_reasons(facts)}). "
            f"Check --set ingest.layout, ingest.url_column and ingest.caption_column."
        )
    uri = f"{context.folder}/pairs.parquet"
    tables.write_file(uri, pairs)
    return Output(uri, tables.content_digest(pairs.drop_columns("position")), facts)


def check_source(config: IngestConfig) -> str:
    """Check that the list is there, can be read, has the columns and at least one row; without parsing it all.

    Returns:
        sha256 over names and bytes of its files.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    digest, has_rows = hashlib.sha256(), False
    for source in _sources(config.urls):
        has_rows |= next(_read_source(source, config), None) is not None
        digest.update(source.path.rpartition("/")[2].encode() + b"\0")
        with _readable(source), source.open_stream() as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    if not has_rows:
        raise InputError(f"ingest.urls: {config.urls} has no rows. Give a list with at least one URL and caption.")
    return digest.hexdigest()


def read(config: IngestConfig) -> Iterator[Listed]:
    """Every row of the list, files in order of their names.

    Raises:
        InputError: names the file, the line where there is one, and what is wrong with it. A line of a CSV or TSV file with
            another number of fields than its header is such an error and no failed row: its quotes or separators are not
            what they seem, so the rows around it cannot be trusted either.
    """
    for source in _sources(config.urls):
        yield from _read_source(source, config)


def clean(listed: Iterable[Listed]) -> pa.Table:
    """One row of `PAIRS` for every listed row, sorted by key.

    Of rows with the same key one is kept: the one with the smallest expected hash, so that the order of the list does not
    matter; those without a hash come last, and among equals the first on the list counts. It precedes its duplicates.
    """
    numbered = enumerate(listed)
    chunks = [PAIRS.empty_table()]
    while chunk := [_clean_row(position, row) for position, row in itertools.islice(numbered, _CHUNK_ROWS)]:
        columns = zip(zip(*chunk, strict=True), PAIRS, strict=True)
        chunks.append(pa.table([pa.array(values, field.type) for values, field in columns], PAIRS))
    # Of the statuses "kept" is the last in the alphabet, so a kept row precedes what else has its key.
    order = [
        ("key", "ascending"),
        ("status", "descending"),
        ("expected_sha256", "ascending"),
        ("position", "ascending"),
    ]
    return _drop_duplicates(pa.concat_tables(chunks).sort_by(order))


def _clean_row(position: int, row: Listed) -> tuple[Any, ...]:
    url, caption, sha256 = normalise_url(row.url), normalise_caption(row.caption), normalise_sha256(row.sha256)
    shown = url or normalise_caption(row.url)
    key = hashlib.sha256(f"{shown}\n{caption}".encode()).hexdigest()[:32]
    outcome: tuple[str, str | None] = (rows.KEPT, None)
    if not shown:
        outcome = (rows.FAILED, "no_url")
    elif url is None:
        outcome = (rows.FAILED, "bad_url")
    elif sha256 is None and row.sha256.strip():
        outcome = (rows.FAILED, "bad_hash")
    elif not caption:
        outcome = (rows.DROPPED, "no_caption")
    return position, key, shown, caption, *outcome, sha256


def _drop_duplicates(table: pa.Table) -> pa.Table:
    """Keep the first of the kept rows of each key; the table is sorted by key, kept rows first."""
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
    """As messages show it."""
    size: int
    """Bytes."""

    @property
    def is_gzip(self) -> bool:
        return self.path.endswith(".gz")

    @property
    def format(self) -> str:
        """With its dot, or anything else when the file is none of `FORMATS`."""
        name = self.path.rpartition("/")[2]
        suffix = "." + name.removesuffix(".gz").rpartition(".")[2]
        return "" if self.is_gzip and suffix not in TEXT_FORMATS else suffix

    @property
    def allowance(self) -> int:
        """Bytes or characters that may come out of the file."""
        return max(MIN_ALLOWANCE, MAX_EXPANSION * self.size)

    def open_stream(self) -> pa.NativeFile:
        """The bytes as they are: pyarrow would otherwise unpack what is called .gz."""
        return self.filesystem.open_input_stream(self.path, compression=None, buffer_size=1 << 20)


def _sources(urls: str) -> list[_Source]:
    """The files of the list, sorted by name."""
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
    sources = [source for source in sources if source.format in FORMATS]
    tables_of_columns = [source for source in sources if source.format != ".txt"]
    if not sources:
        kind = "matches no file of the formats" if magic else "is no file, nor a folder with any, of the formats"
        raise InputError(f"ingest.urls: {urls} {kind} {', '.join(FORMATS)}. Convert the list.")
    return tables_of_columns or sources


def _matching(filesystem: pafs.FileSystem, folder: str, pattern: str) -> list[pafs.FileInfo]:
    """The files below a folder whose path matches part by part, sorted; hidden ones never do."""
    selector = pafs.FileSelector(folder, recursive="/" in pattern, allow_not_found=True)
    found = []
    for info in filesystem.get_file_info(selector):
        parts, patterns = info.path.removeprefix(folder).strip("/").split("/"), pattern.split("/")
        matches = len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))
        if matches and info.type == pafs.FileType.File and not any(part.startswith(".") for part in parts):
            found.append((parts, info))
    return [info for _, info in sorted(found, key=lambda item: item[0])]


def _read_source(source: _Source, config: IngestConfig) -> Iterator[Listed]:
    """The rows of one file; its columns are checked before the first."""
    header = LAYOUTS[config.layout].header
    if header and source.format not in (".tsv", ".txt"):
        raise InputError(
            f"ingest.layout: {config.layout} is TSV without a header, got {source.uri}. "
            f"Use --set ingest.layout=plain for a file that names its columns."
        )
    with _readable(source):
        if source.format == ".parquet":
            yield from _parquet_rows(source, config)
        elif source.format == ".jsonl":
            yield from _json_rows(source, config)
        elif source.format == ".txt":
            yield from _txt_rows(source, config)
        else:
            yield from _csv_rows(source, config, header)


def _csv_rows(source: _Source, config: IngestConfig, header: Sequence[str] | None) -> Iterator[Listed]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_CHARACTERS))  # the process has only this one
    delimiter = "," if source.format == ".csv" else "\t"
    reader = csv.reader(_lines(source), delimiter=delimiter, quoting=csv.QUOTE_NONE if header else csv.QUOTE_MINIMAL)
    records = filter(None, reader)  # blank lines
    try:
        names = header or next(records, None)
        if names is None:
            raise _unreadable(source, "it is empty, expected a line with the names of its columns")
        indices = _column_indices(source, names, config)
        for fields in records:
            if len(fields) != len(names):
                raise _unreadable(
                    source,
                    f"line {reader.line_num}: got {len(fields)} fields, expected {len(names)}",
                    "Quote fields that hold the separator or a quote, or write the list as .jsonl or .parquet.",
                )
            yield Listed(*(fields[index] for index in indices))
    except csv.Error as error:
        raise _unreadable(source, f"line {reader.line_num}: {error}") from None


def _txt_rows(source: _Source, config: IngestConfig) -> Iterator[Listed]:
    columns = config.columns
    _column_indices(source, [columns["url_column"], columns["caption_column"]], config)  # it has no sha256
    for line in _lines(source):
        if line.strip():
            url, _, caption = line.rstrip("\r\n").partition("\t")
            yield Listed(url, caption)


def _json_rows(source: _Source, config: IngestConfig) -> Iterator[Listed]:
    records = _json_records(source)
    first = list(itertools.islice(records, _JSON_LINES_FOR_NAMES))
    names = list(dict.fromkeys(name for _, record in first for name in record))
    if first:
        _column_indices(source, names, config)
    for number, record in itertools.chain(first, records):
        values = []
        for name in config.columns.values():
            value = record.get(name)
            if not (value is None or isinstance(value, str)):
                got = type(value).__name__
                raise _unreadable(source, f"line {number}: {_shown(name)}: got {got}, expected a string or null")
            # JSON can escape halves of surrogate pairs, which are no text.
            values.append((value or "").encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
        yield Listed(*values)


def _json_records(source: _Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects."""
    for number, line in enumerate(_lines(source), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _unreadable(source, f"line {number}: {error}") from None
        if not isinstance(record, dict):
            raise _unreadable(source, f"line {number}: got {type(record).__name__}, expected an object")
        yield number, record


def _lines(source: _Source) -> Iterator[str]:
    """Lines with their ends. What is not UTF-8 becomes U+FFFD, row by row."""

    def read_lines() -> Iterator[str]:
        with source.open_stream() as stream:
            binary = gzip.GzipFile(fileobj=stream) if source.is_gzip else stream
            text = io.TextIOWrapper(binary, "utf-8-sig", errors="replace", newline="")
            for number in itertools.count(1):
                line = text.readline(MAX_LINE_CHARACTERS + 1)
                if len(line) > MAX_LINE_CHARACTERS:
                    raise _unreadable(source, f"line {number} has more than {MAX_LINE_CHARACTERS:,} characters")
                if number == 1 and line.startswith(REPLACEMENT * 2) and "\0" in line:
                    raise _unreadable(source, "got UTF-16, expected UTF-8")
                if not line:
                    return
                yield line

    return _within_allowance(source, read_lines(), len)


def _parquet_rows(source: _Source, config: IngestConfig) -> Iterator[Listed]:
    """What the file does to its reader it does to a child process (`tasks.untrusted.parquet_list`)."""
    with _on_disk(source) as path, parquet_list.opened(path, list(config.columns.values())) as opened:
        _check_columns(source, opened.claims, config)
        _check_claims(source, opened.claims)
        listed = (row for batch in opened.batches() for row in map(Listed, *batch))
        num_rows = 0
        for row in _within_allowance(source, listed, lambda row: 1 + sum(map(len, row))):
            num_rows += 1
            yield row
    if num_rows != opened.claims.num_rows:
        raise _unreadable(source, f"it has {num_rows:,} rows, its footer says {opened.claims.num_rows:,}")


@contextlib.contextmanager
def _on_disk(source: _Source) -> Iterator[str]:
    """A local path to the file, for a process that has neither network nor credentials."""
    if isinstance(source.filesystem, pafs.LocalFileSystem):
        yield source.path
        return
    with tempfile.NamedTemporaryFile(prefix="unclip-list-") as copy:
        with source.open_stream() as stream:
            shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
        yield copy.name


def _check_columns(source: _Source, claims: Claims, config: IngestConfig) -> None:
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
        if not column.is_text:
            got = normalise_caption(column.kind)[:100]
            raise InputError(
                f"ingest.urls: column {_shown(column.name)} of {source.uri}: got {got}, expected text. Set {setting}."
            )


def _check_claims(source: _Source, claims: Claims) -> None:
    """Look at what the footer claims before anything is allocated for it."""
    limits = (
        ("rows", claims.num_rows, max(MIN_ROWS, MAX_EXPANSION * source.size)),
        ("bytes", claims.num_bytes, source.allowance),
    )
    for what, claimed, most in limits:
        if not 0 <= claimed <= most:
            raise _unreadable(source, f"its footer claims {claimed:,} {what}, expected at most {most:,} in this file")
    if claims.num_group_rows != claims.num_rows:
        raise _unreadable(source, "its footer contradicts itself on the number of rows")


def _column_indices(source: _Source, names: Sequence[str], config: IngestConfig) -> list[int]:
    """Where each of `config.columns` is."""
    for setting, name in config.columns.items():
        if name not in names:
            fitting = [
                layout_name
                for layout_name, layout in LAYOUTS.items()
                if not layout.header and {layout.url_column, layout.caption_column} <= set(names)
            ]
            hint = f" Or is it --set ingest.layout={fitting[0]}?" if fitting else ""
            raise InputError(
                f"ingest.urls: {source.uri} has no column {_shown(name)} (ingest.{setting}). "
                f"{nearest(name, map(normalise_caption, names))}{hint}"
            )
        if (number := names.count(name)) > 1:
            raise InputError(
                f"ingest.urls: {source.uri} has {number} columns {_shown(name)} (ingest.{setting}), expected one. "
                f"Rename the others."
            )
    return [names.index(name) for name in config.columns.values()]


def _within_allowance(source: _Source, items: Iterable[T], length: Callable[[T], int]) -> Iterator[T]:
    """The items, as long as they are not many times longer than the file."""
    left = source.allowance
    for item in items:
        left -= length(item)
        if left < 0:
            raise _unreadable(
                source,
                f"its {source.size:,} bytes unpack to more than {source.allowance:,}",
                "Split it, or write it again without compression, if it is no trap.",
            )
        yield item


def _shown(name: str) -> str:
    """A foreign name as a message can show it."""
    return repr(normalise_caption(name)[:100])


def _unreadable(source: _Source, reason: str, remedy: str = "Write it again, or take it off the list.") -> InputError:
    return InputError(f"ingest.urls: {source.uri} cannot be read: {reason}. {remedy}")


@contextlib.contextmanager
def _readable(source: _Source) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise is an `InputError`."""
    try:
        yield
    except InputError:
        raise
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
