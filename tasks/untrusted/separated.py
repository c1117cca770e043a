"""Rows of CSV and TSV text, parsed strictly: a stray quote or a wrong number of fields costs its own row and no other.

A field that begins with a quote ends at the next single quote, after which a separator or the end of the line must follow; line
breaks may lie within (RFC 4180). Quotes elsewhere are plain characters. A quote that is opened and never closed would swallow
all rows up to the next one, so a row may continue on further lines only if none of them looks like a row itself, and if no line
break lies within the fields that cannot have one, such as the URL.
"""

import csv
import dataclasses
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Literal

MAX_FIELD_CHARACTERS = 4 << 20
_URL = re.compile(r'\s*"?\s*https?://', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Parsed:
    """Rows of consecutive lines; together with the lines that are none of their own they account for every line."""

    texts: list[str]
    """Values of the wanted columns, one row after another: a list for each row would occupy the garbage collector."""
    num_rows: int
    stray: Sequence[int]
    """Indices of the rows that a stray quote makes unusable. Their values are those of one line, with quotes as plain
    characters; if it has too many or too few fields, all but the URL are the whole line."""
    num_blank: int
    """Blank lines."""
    num_continued: int
    """Lines that continue the row of an earlier line."""
    ragged: Sequence[int] = ()
    """Indices of the rows with too many or too few fields, which no quote explains. Their values are like those of `stray`."""


class Parser:
    """Parser of one file, which gets its lines in blocks that may end anywhere."""

    def __init__(
        self,
        delimiter: str,
        num_fields: int,
        wanted: Sequence[int],
        unbroken: Sequence[int],
        quoted: bool = True,
        skips_spaces: bool = False,
    ) -> None:
        """Create a parser for the lines after the header.

        Args:
            wanted: at least two columns, first that of the URL, by which rows are recognised.
            unbroken: columns whose values cannot contain a line break.
            quoted: False if quotes have no meaning in the file.
            skips_spaces: True if spaces after a separator are not part of a field.
        """
        csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARACTERS))  # a global setting of the process
        self._delimiter, self._num_fields, self._url_index = delimiter, num_fields, wanted[0]
        self._wanted, self._unbroken = operator.itemgetter(*wanted), unbroken
        self._skips_spaces = skips_spaces
        self._quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        self._pending: list[str] = []  # lines of a row that may continue in the next block
        self._is_damaged = False  # the lines after a stray quote may be remains of its row

    def parse(self, lines: list[str], is_last: bool = False) -> Parsed:
        """Parse the next lines, with their line endings."""
        lines = [*self._pending, *lines] if self._pending else lines
        self._pending = []
        texts: list[str] = []
        num_rows = num_blank = 0
        wanted, num_fields = self._wanted, self._num_fields
        try:
            for fields in self._reader(iter(lines)):
                if len(fields) == num_fields:
                    texts += wanted(fields)
                    num_rows += 1
                elif fields:
                    break
                else:
                    num_blank += 1
        except csv.Error:
            pass
        if num_rows + num_blank < len(lines):  # some row has not one line
            return self._parse_each(lines, is_last)
        self._is_damaged = self._is_damaged and not num_rows
        return Parsed(texts, num_rows, (), num_blank, 0)

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        return csv.reader(
            lines, delimiter=self._delimiter, quoting=self._quoting, skipinitialspace=self._skips_spaces, strict=True
        )

    def _parse_each(self, lines: list[str], is_last: bool) -> Parsed:
        texts: list[str] = []
        stray: list[int] = []
        ragged: list[int] = []
        num_rows = num_blank = num_continued = start = stop = 0

        def taken() -> Iterator[str]:
            """Lines of one row after another; it ends before a line that can only be swallowed by mistake."""
            nonlocal stop
            while stop < len(lines) and (stop == start or not self._looks_like_row(lines[stop])):
                stop += 1
                yield lines[stop - 1]

        while start < len(lines):
            stop, is_closed, is_ragged = start, True, False
            try:
                for fields in self._reader(taken()):
                    if not fields:
                        num_blank += 1
                    elif self._is_row(fields, lines, start, stop):
                        texts += self._wanted(fields)
                        num_rows += 1
                        num_continued += stop - start - 1
                        self._is_damaged = False
                    else:
                        has_quotes = self._quoting != csv.QUOTE_NONE and '"' in lines[start]
                        is_ragged = len(fields) != self._num_fields and not (has_quotes or self._is_damaged)
                        break
                    start = stop
            except csv.Error:
                is_closed = stop < len(lines)
            if start == len(lines):
                break
            if not is_closed and not is_last:
                self._pending = lines[start:]
                break
            (ragged if is_ragged else stray).append(num_rows)
            texts += self._wanted(self._plain_fields(lines[start]))
            num_rows += 1
            self._is_damaged |= not is_ragged
            start += 1
        return Parsed(texts, num_rows, stray, num_blank, num_continued, ragged)

    def _is_row(self, fields: Sequence[str], lines: Sequence[str], start: int, stop: int) -> bool:
        """Return False for a wrong number of fields, and for fields that a stray quote has made of these lines."""
        if len(fields) != self._num_fields:
            return False
        return stop == start + 1 or not any("\n" in fields[index] or "\r" in fields[index] for index in self._unbroken)

    def _looks_like_row(self, line: str) -> bool:
        if "://" not in line:
            return False
        fields = line.split(self._delimiter)
        if len(fields) >= self._num_fields and _URL.match(fields[self._url_index]):
            return True
        try:
            fields = next(self._reader(iter([line])))
        except csv.Error:
            return False
        return len(fields) == self._num_fields and _URL.match(fields[self._url_index]) is not None

    def _plain_fields(self, line: str) -> list[str]:
        line = line.rstrip("\r\n")
        fields = line.split(self._delimiter)
        if len(fields) == self._num_fields:
            return fields
        url = fields[self._url_index] if len(fields) > self._url_index else ""
        shown = [line] * self._num_fields
        shown[self._url_index] = url
        return shown
