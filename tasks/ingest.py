"""Ingest: a list of (URL, caption) in Parquet, CSV, TSV or JSON lines becomes one clean, keyed, ordered table."""

import contextlib
import dataclasses
import hashlib
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.json
import pyarrow.parquet as pq

from tasks import rows, tables
from tasks.stage import Output, StageContext, stage
from unclip import files
from unclip.config import nearest, require
from unclip.errors import InputError

FORMATS = (".parquet", ".csv", ".tsv", ".jsonl")
MAX_CAPTION_CHARACTERS = 1000
MAX_URL_CHARACTERS = 2048

PAIRS = pa.schema(
    {
        "position": pa.int64(),  # row number in the list, files in order of their names
        "key": pa.string(),  # 32 hex digits of sha256(url, caption): the row's identity in all tables
        "url": pa.string(),
        "caption": pa.string(),
        "status": pa.string(),  # kept, dropped, failed
        "reason": pa.string(),  # see tasks.rows; null when kept
    }
)

# Control characters, and the invisible ones that turn the direction of text around.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclasses.dataclass(frozen=True)
class IngestConfig:
    urls: str
    """The list: a .parquet, .csv, .tsv or .jsonl file, or a folder of those; a path or URI."""
    url_column: str = "url"
    """Column with the picture's address."""
    caption_column: str = "caption"
    """Column with the text."""
    digest: str | None = None
    """sha256 of the list's bytes, filled in by the pipeline so that a changed list is a new run; None is unchecked."""

    def __post_init__(self) -> None:
        require(bool(self.urls), "urls", self.urls, "a file or folder with the list of URLs")
        require(
            self.url_column != self.caption_column, "caption_column", self.caption_column, "another than url_column"
        )


@stage("ingest", version=1)
def ingest(context: StageContext, config: IngestConfig) -> Output:
    """Read the list of URLs and captions, clean it and give every row its key."""
    if config.digest and check_source(config) != config.digest:
        raise InputError(f"ingest.urls: {config.urls} changed since this run was planned. Run the same command again.")
    pairs = clean(_read_pairs(config))
    facts = rows.count(pairs)
    if not facts["rows"][rows.KEPT]:
        raise InputError(
            f"ingest.urls: none of the {pairs.num_rows:,} rows of {config.urls} can be used ({rows.top_reasons(facts)}). "
            f"Check --set ingest.url_column and ingest.caption_column."
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
    digest, num_rows = hashlib.sha256(), 0
    for uri in _source_files(config.urls):
        num_rows += _check_file(uri, config)
        filesystem, path = files.locate(uri)
        digest.update(uri.rpartition("/")[2].encode() + b"\0")
        with filesystem.open_input_stream(path) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    if not num_rows:
        raise InputError(f"ingest.urls: {config.urls} has no rows. Give a list with at least one URL and caption.")
    return digest.hexdigest()


def normalise_url(text: str) -> str | None:
    """The URL as it is fetched and compared; None when it is none that can be fetched."""
    try:
        parts = urllib.parse.urlsplit(text.strip())
        valid = parts.port != 0 and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        return None
    if not valid or parts.scheme not in ("http", "https") or len(text) > MAX_URL_CHARACTERS:
        return None
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.lower(), parts.path or "/", parts.query, ""))


def normalise_caption(text: str) -> str:
    """NFC, one line, single spaces, nothing invisible, at most 1,000 characters."""
    one_line = " ".join(unicodedata.normalize("NFC", text).split())
    return " ".join(_UNPRINTABLE.sub("", one_line).split())[:MAX_CAPTION_CHARACTERS].strip()


def clean(pairs: pa.Table) -> pa.Table:
    """One row of `PAIRS` for every row of (url, caption), sorted by key, then position."""
    urls, captions = (_texts(pairs.column(name)) for name in ("url", "caption"))
    seen: set[str] = set()
    cleaned: list[tuple[Any, ...]] = []
    for position, (raw_url, raw_caption) in enumerate(zip(urls, captions, strict=True)):
        url, caption = normalise_url(raw_url), normalise_caption(raw_caption)
        shown = url or normalise_caption(raw_url)
        key = hashlib.sha256(f"{shown}\n{caption}".encode()).hexdigest()[:32]
        if not shown:
            outcome = (rows.FAILED, "no_url")
        elif url is None:
            outcome = (rows.FAILED, "bad_url")
        elif not caption:
            outcome = (rows.DROPPED, "no_caption")
        elif key in seen:
            outcome = (rows.DROPPED, "duplicate_row")
        else:
            outcome = (rows.KEPT, None)
            seen.add(key)
        cleaned.append((position, key, shown, caption, *outcome))
    columns = zip(*cleaned, strict=True) if cleaned else ((),) * len(PAIRS)
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, PAIRS, strict=True)], PAIRS)
    return table.sort_by([("key", "ascending"), ("position", "ascending")])


def _source_files(urls: str) -> list[str]:
    filesystem, path = files.locate(urls)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        raise InputError(f"ingest.urls: {urls} does not exist. Give a {', '.join(FORMATS)} file or a folder of those.")
    if kind == pafs.FileType.Directory:
        found = [f"{urls.rstrip('/')}/{name}" for name in files.names(urls) if name.endswith(FORMATS)]
    else:
        found = [urls] if urls.endswith(FORMATS) else []
    if not found:
        raise InputError(
            f"ingest.urls: {urls} is no {', '.join(FORMATS)} file, nor a folder with any. Convert the list."
        )
    return found


def _read_pairs(config: IngestConfig) -> pa.Table:
    read = (_read_file(uri, config) for uri in _source_files(config.urls))
    return pa.concat_tables(
        pa.table({"url": table.column(config.url_column), "caption": table.column(config.caption_column)})
        for table in read
    )


def _check_file(uri: str, config: IngestConfig) -> int:
    """Rows of a file, or 1 for "at least one" where counting means parsing."""
    with _readable(uri):
        if uri.endswith(".parquet"):
            with _open(uri) as file:
                parquet = pq.ParquetFile(file)
                _check_columns(uri, parquet.schema_arrow, config)
                return int(parquet.metadata.num_rows)
        first = next((batch for batch in _text_batches(uri, config) if batch.num_rows), None)
    if first is None:
        return 0
    _check_columns(uri, first.schema, config)
    return 1


def _read_file(uri: str, config: IngestConfig) -> pa.Table:
    names = (config.url_column, config.caption_column)
    with _readable(uri):
        if uri.endswith(".parquet"):
            with _open(uri) as file:
                parquet = pq.ParquetFile(file)
                _check_columns(uri, parquet.schema_arrow, config)
                table = parquet.read(columns=names)
        else:
            batches = [batch for batch in _text_batches(uri, config) if batch.num_rows]
            table = (
                pa.Table.from_batches(batches)
                if batches
                else pa.table({name: pa.array([], pa.binary()) for name in names})
            )
            _check_columns(uri, table.schema, config)
    return pa.table({name: table.column(name).cast(pa.binary()) for name in names})


def _text_batches(uri: str, config: IngestConfig) -> Iterator[pa.RecordBatch]:
    """Batches of a CSV, TSV or JSON lines file. Texts stay bytes: what is not UTF-8 is dealt with row by row."""
    names = [config.url_column, config.caption_column]
    with _open(uri) as file:
        if uri.endswith(".jsonl"):
            schema = pa.schema({name: pa.string() for name in names})
            yield from pyarrow.json.open_json(file, parse_options=pyarrow.json.ParseOptions(explicit_schema=schema))
            return
        parse = pyarrow.csv.ParseOptions(delimiter="\t" if uri.endswith(".tsv") else ",", newlines_in_values=True)
        convert = pyarrow.csv.ConvertOptions(check_utf8=False, column_types={name: pa.binary() for name in names})
        yield from pyarrow.csv.open_csv(file, parse_options=parse, convert_options=convert)


def _check_columns(uri: str, schema: pa.Schema, config: IngestConfig) -> None:
    for field in schema:  # a foreign type may run code of its own when its values are read
        if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
            raise InputError(
                f"ingest.urls: column {field.name!r} of {uri} has an extension type. Store it as a plain type."
            )
    for setting, name in (("url_column", config.url_column), ("caption_column", config.caption_column)):
        if name not in schema.names:
            raise InputError(
                f"ingest.urls: {uri} has no column {name!r} (ingest.{setting}). {nearest(name, schema.names)}"
            )
        kind = schema.field(name).type
        if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()):
            raise InputError(f"ingest.urls: column {name!r} of {uri}: got {kind}, expected text. Set {setting}.")


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"ingest.urls: {uri} cannot be read: {reason}. Write it again, or take it off the list."
        ) from None


def _open(uri: str) -> pa.NativeFile:
    filesystem, path = files.locate(uri)
    return filesystem.open_input_file(path)


def _texts(column: pa.ChunkedArray) -> Iterator[str]:
    for value in column:
        yield (value.as_py() or b"").decode("utf-8", "replace")
