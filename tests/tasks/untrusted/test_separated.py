"""CSV and TSV with stray quotes: each costs its own row, and every line is accounted for."""

import csv
import io
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tasks.untrusted.separated import Parser


class Rows(NamedTuple):
    rows: list[list[str]]
    stray: list[int]
    num_blank: int
    num_continued: int
    ragged: list[int]


def parse(text: str, delimiter: str = ",", block: int = 10**6, quoted: bool = True) -> Rows:
    """Parse a text of two columns without header in blocks of some lines; all lines are accounted for."""
    lines = list(io.StringIO(text, newline=""))
    parser = Parser(delimiter, 2, [0, 1], [0], quoted=quoted)
    starts = range(0, len(lines) or 1, block)
    found = Rows([], [], 0, 0, [])
    for start in starts:
        parsed = parser.parse(lines[start : start + block], start == starts[-1])
        stray = [*found.stray, *(len(found.rows) + index for index in parsed.stray)]
        ragged = [*found.ragged, *(len(found.rows) + index for index in parsed.ragged)]
        rows = [list(row) for row in zip(parsed.texts[::2], parsed.texts[1::2], strict=True)]
        assert len(rows) == parsed.num_rows
        blank, continued = found.num_blank + parsed.num_blank, found.num_continued + parsed.num_continued
        found = Rows([*found.rows, *rows], stray, blank, continued, ragged)
    assert len(found.rows) + found.num_blank + found.num_continued == len(lines)
    return found


URLS = [f"http://a.example/{number}.jpg" for number in range(9)]


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_f54_a_stray_quote_costs_its_own_row_only(delimiter: str, block: int) -> None:
    captions = ["a red circle"] * 9
    for number in (2, 7):
        captions[number] = '"The Starry Night by a painter'
    text = "".join(f"{url}{delimiter}{caption}\n" for url, caption in zip(URLS, captions, strict=True))
    parsed = parse(text, delimiter, block=block)
    assert parsed.stray == [2, 7] and parsed.num_continued == 0
    assert parsed.rows == [[url, caption] for url, caption in zip(URLS, captions, strict=True)]


@pytest.mark.parametrize(
    ("lines", "stray"),
    [
        (['0,"a" b', "1,c"], [0]),
        (['0,"a', "1,c"], [0]),
        (["0,a", '1,"c'], [1]),
        (['0,"a', '1,"c'], [0, 1]),
        (['0,"a', '1,"b, c"'], [0]),
        (['0,"a', '1,"b" c', "2,d"], [0, 1]),
        (['0,"a, b', "1,c", "2,d"], [0]),
        (['0,"a', "", "1,b", "", '2,"c'], [0, 2]),
        (['0,6" pipe', "1,c"], []),
        (['0,6" pipe, "long', "1,c"], [0]),
        (['0,"a ""b"" c"', '1,""', '2,""""'], []),
        (['0,"a', 'b"', "1,c"], []),
        (['0,"a', "", 'b, ""c"" d"', '1,"e', 'f"'], []),
        (['"0', '",a', "1,c"], [0, 1]),
        (['0,"a "b" c', 'd"', "1,c"], [0, 1]),
        (['"0,a', "1,c"], [0]),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 1000])
def test_f54_quotes_in_every_place(lines: list[str], stray: list[int], block: int) -> None:
    """Digits at the start of a line, after a quote perhaps, stand for URLs."""
    text = "".join(f"{line}\r\n" for line in lines)
    for digit, url in enumerate(URLS[:3]):
        text = text.replace(f'"{digit}', f'"{url}').replace(f"\n{digit},", f"\n{url},")
        text = url + text[1:] if text.startswith(f"{digit},") else text
    parsed = parse(text, block=block)
    assert parsed.stray == stray
    sound = [row for number, row in enumerate(parsed.rows) if number not in stray]
    if not stray:
        assert sound == [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    assert all(row[0] in URLS for row in sound)


def test_f54_a_line_break_lies_within_captions_and_never_within_urls() -> None:
    within = f'{URLS[0]},"a red\ncircle"\n'
    assert parse(within).rows == [[URLS[0], "a red\ncircle"]]
    broken = f'"{URLS[0]}\n",a red circle\n{URLS[1]},b\n'
    parsed = parse(broken)
    assert parsed.stray == [0, 1] and parsed.rows[2] == [URLS[1], "b"]


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_f98_a_wrong_number_of_fields_costs_its_own_row_only(block: int) -> None:
    parsed = parse(f"{URLS[0]},a\n{URLS[1]},b,c\n{URLS[2]}\n{URLS[3]},d\n", block=block)
    assert parsed.ragged == [1, 2] and parsed.stray == [] and parsed.rows[3] == [URLS[3], "d"]
    assert parsed.rows[1:3] == [[URLS[1], f"{URLS[1]},b,c"], [URLS[2], URLS[2]]]
    parsed = parse(f'{URLS[0]},"a\nb"\n{URLS[1]}\n{URLS[2]},"c\nd"\n', block=block)
    assert parsed.ragged == [1] and parsed.stray == [] and parsed.num_continued == 2
    assert [parsed.rows[0][1], parsed.rows[2][1]] == ["a\nb", "c\nd"]
    parsed = parse(f'{URLS[0]},"a" b\nremains\n\nof, the, row\n{URLS[1]},b\n', block=block)
    assert parsed.stray == [0, 1, 2] and parsed.rows[3] == [URLS[1], "b"] and parsed.num_blank == 1
    parsed = parse(f'{URLS[0]},"a" b\nremains\n{URLS[1]},b\nc\n', block=block)
    assert parsed.stray == [0, 1] and parsed.ragged == [3]
    assert parse(f'{URLS[0]}\t"a\tb\n', "\t", quoted=False).ragged == [0]


def test_f54_sound_text_is_read_as_the_csv_module_reads_it() -> None:
    randomness = random.Random(1)
    pieces = ["a", " ", '"', ",", "\n", "\r\n", "ä", "'", ";", "\t"]
    for _ in range(200):
        rows = [[url, "".join(randomness.choices(pieces, k=5))] for url in URLS]
        buffer = io.StringIO(newline="")
        csv.writer(buffer, quoting=randomness.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])).writerows(rows)
        parsed = parse(buffer.getvalue(), block=randomness.choice([1, 3, 100]))
        assert parsed.rows == rows and not parsed.stray


def test_f54_random_quotes_cost_no_row_without_them() -> None:
    randomness = random.Random(2)
    for _ in range(300):
        lines = [f"{url},a red circle" for url in URLS]
        hit = set(randomness.sample(range(9), 3))
        for number in hit:
            position = randomness.randrange(len(lines[number]) + 1)
            lines[number] = lines[number][:position] + '"' + lines[number][position:]
        parsed = parse("\n".join(lines) + "\n", block=randomness.choice([1, 4, 100]))
        assert [list(parsed.rows[number]) for number in range(9) if number not in hit] == [
            [URLS[number], "a red circle"] for number in range(9) if number not in hit
        ]
        assert set(parsed.stray) <= hit


class CountingParser(Parser):
    """Parser that counts how often it reads a line."""

    num_read = 0

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        return super()._reader(self._counted(lines))

    def _counted(self, lines: Iterator[str]) -> Iterator[str]:
        for line in lines:
            self.num_read += 1
            yield line


@pytest.mark.parametrize("line", ['x,"\n', '"\n', 'x,"""\n', 'x,"" y\n', '"x\n', 'x,"y""z\n', f'{URLS[0]},"a\n'])
def test_f54_hostile_quotes_cost_a_line_no_more_in_a_longer_list(line: str) -> None:
    reads = []
    for count in (400, 4_000, 40_000):
        parser = CountingParser(",", 2, [0, 1], [0])
        for start in range(0, count, 5_000):
            parser.parse([line] * min(5_000, count - start), start + 5_000 >= count)
        reads.append(parser.num_read / count)
    assert max(reads) <= 2 * reads[0] and reads[0] >= 1, reads
