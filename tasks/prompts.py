"""Prompt suites: files of captions by category, such as colours, counting, positions and text.

A suite is one of

- plain text, with one caption on each line;
- CSV (`.csv`) or TSV (`.tsv`) with a header that names a column `prompt`, `prompts`, `caption` or `text`, and may name
  `category`, as DrawBench and PartiPrompts have them;
- JSON lines (`.jsonl`), objects with these names.
"""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterator, Mapping

from tasks.untrusted.normalise import normalise_caption
from unclip import files
from unclip.errors import InputError

MAX_BYTES = 4 << 20
MAX_PROMPTS = 10_000
MAX_CATEGORIES = 64
MAX_CATEGORY_CHARACTERS = 40
CAPTION_NAMES = ("prompt", "prompts", "caption", "text")
CATEGORY = "category"


@dataclasses.dataclass(frozen=True)
class Suite:
    """Captions of a file."""

    digest: str
    """sha256 of the file."""
    categories: Mapping[str, list[str]]
    """Captions by category, both in the order of the file; a file without categories has one, ""."""


def read_suite(uri: str) -> Suite:
    """Read a suite of captions.

    Raises:
        InputError: the file cannot be read, is too large, or has a line that is no caption; names the line.
    """
    try:
        size = files.size_of(uri)
        data = files.read(uri) if size <= MAX_BYTES else b""
        text = files.decode_text(data)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{uri}: the prompts cannot be read: {error}. Name a text file in UTF-8.") from None
    if size > MAX_BYTES:
        raise InputError(f"{uri}: got {size:,} bytes, expected at most {MAX_BYTES:,} of prompts. Split the file.")
    categories: dict[str, list[str]] = {}
    count = 0
    for line, caption, category in _rows(uri, text):
        caption, category = normalise_caption(caption), _name(category)
        if not caption:
            raise InputError(f"{uri}, line {line}: got no caption. Fill it in, or remove the line.")
        categories.setdefault(category, []).append(caption)
        count += 1
        if count > MAX_PROMPTS or len(categories) > MAX_CATEGORIES:
            raise InputError(
                f"{uri}, line {line}: got more than {MAX_PROMPTS:,} captions or {MAX_CATEGORIES} categories. Split the file."
            )
    if not count:
        raise InputError(f"{uri}: got no captions, expected one on each line.")
    return Suite(files.sha256(data), categories)


def _name(category: str) -> str:
    """Category as a part of the names of files and metrics: letters of any script, digits, underscores and dashes."""
    return re.sub(r"\W+", "-", category.lower())[:MAX_CATEGORY_CHARACTERS].strip("-")


def _rows(uri: str, text: str) -> Iterator[tuple[int, str, str]]:
    """Yield number of the line, caption and category; "" if there is none."""
    name = uri.lower()
    if name.endswith((".csv", ".tsv")):
        yield from _table_rows(uri, text, "\t" if name.endswith(".tsv") else ",")
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if name.endswith(".jsonl"):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{uri}, line {number}: got no JSON object: {error}. Repair the line.") from None
            yield number, *_pick(uri, number, values if isinstance(values, dict) else {})
        else:
            yield number, line, ""


def _table_rows(uri: str, text: str, delimiter: str) -> Iterator[tuple[int, str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for values in reader:
            yield reader.line_num, *_pick(uri, reader.line_num, values)
    except csv.Error as error:
        raise InputError(
            f"{uri}, line {reader.line_num}: got a line that cannot be read: {error}. Repair it."
        ) from None


def _pick(uri: str, number: int, values: Mapping[str | None, object]) -> tuple[str, str]:
    """Caption and category of a row."""
    by_name = {str(name).strip().lower(): value for name, value in values.items() if name is not None}
    found = [by_name[name] for name in CAPTION_NAMES if isinstance(by_name.get(name), str)]
    if not found:
        names = ", ".join(sorted(by_name)[:10]) or "none"
        expected = ", ".join(CAPTION_NAMES)
        raise InputError(f"{uri}, line {number}: got the names {names[:200]}, expected one of {expected} with a text.")
    category = by_name.get(CATEGORY)
    return str(found[0]), category if isinstance(category, str) else ""
