"""The functions for arrays give the results of those for one text, whatever the texts are."""

import itertools
import random
import sys
import unicodedata

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tasks.untrusted.normalise import (
    _NOT_CANONICAL_CAPTION,
    MAX_CAPTION_CHARACTERS,
    MAX_URL_CHARACTERS,
    normalise_caption,
    normalise_captions,
    normalise_sha256,
    normalise_sha256s,
    normalise_url,
    normalise_urls,
)

HEX = "0123456789abcdef" * 4
URL_PARTS = (
    *("http://", "https://", "HTTP://", "hTTps://", "ftp://", "http:/", "//", "https:", "\thttp://", " http://"),
    *("a.example", "A.Example", "a.EXAMPLE", "xn--bcher-kva.example", "bücher.example", "ａ.example", "-", ".", "1.2.3.4"),
    *("a_b.c", "127.1", "[::1]", "[::1", "::1]", "[v1.a]", "[fe80::1%25eth0]", "user@", "user:pw@", "@", "%41.example"),
    *("℀.example", "a.example\\b"),
    *(":80", ":0", ":00080", ":", ":65535", ":65536", ":99999", ":1234567890", ":8a", ":-1", ":٣", ":8_0", ": 80"),
    *("/", "//", "/a.jpg", "/A.JPG", "/é.jpg", "/%C3%A9", "/e\u0301", "/a b", "/a\tb", "/a\nb", "/[x]", "/a@b", "/;p=1"),
    *("/~|`^{}<>\"'", "?", "?w=1", "?w=1&h=é", "??", "?a=/b@c", "#", "#top", "#?x", "?#", "?x#y?z"),
    *("\0", "\x1f", "\x7f", "\x85", "\u00a0", "\u200e", "\u202e", "\u2028", "\u3000", "\ufeff", "\ufffd", "\U0001f600"),
    *(" ", "\n", "\r\n"),
)  # fmt: skip
CAPTION_PARTS = (
    *("red", "a", "circle,", '"', "'", "<b>", "\\", "~", "!", "0", " ", "  ", "\t", "\n", "\r", "\v", "\f", "\x1c", "\x1f", "\0"),
    *("\x7f", "\x85", "\x9f", "\u00a0", "\u00ad", "\u061c", "\u1680", "\u2003", "\u200b", "\u200e", "\u2028", "\u202e", "\u2069"),
    *("é", "e\u0301", "\u0301", "\u0315\u0300", "\u0344", "\u1e0a\u0323", "\uac00", "\u1100\u1161\u11a8", "か\u3099"),
    *("\u2126", "\ufb01"),
    *("東京", "картина", "كلب", "👩\u200d🎨", "\ufeff", "\ufffd", "\U0010ffff", "x" * 999, "y " * 500, "e\u0301\u0315" * 700),
)  # fmt: skip
SHA256_PARTS = (HEX, HEX.upper(), HEX[1:], "a", "F", "g", " ", "\t", "\u2003", "\u200b", "\u0663", "\n", "\0", "")


def texts(parts: tuple[str, ...], seed: int, number: int = 3000, most: int = 6) -> list[str]:
    randomness = random.Random(seed)
    return ["", *parts] + ["".join(randomness.choices(parts, k=randomness.randint(1, most))) for _ in range(number)]


def urls(seed: int) -> list[str]:
    """URLs in the order of their parts, most of them valid, and parts in any order."""
    randomness = random.Random(seed)
    kinds = (URL_PARTS[:10], URL_PARTS[10:32], URL_PARTS[32:45], URL_PARTS[45:59], URL_PARTS[59:69], URL_PARTS[69:])
    likely = (0, 0, 0.7, 0.1, 0.6, 0.8)  # that a kind is left out
    ordered = [
        "".join(
            randomness.choice(kind[:2] if randomness.random() < 0.5 else kind)
            for kind, absent in zip(kinds, likely, strict=True)
            if randomness.random() >= absent
        )
        for _ in range(5000)
    ]
    fill = len("http://a.example/")
    lengths = [f"http://a.example/{'x' * (MAX_URL_CHARACTERS - fill + extra)}" for extra in (-1, 0, 1)]
    lengths += [f"http://a.example/{'é' * (MAX_URL_CHARACTERS - fill + extra)}" for extra in (-1, 0, 1)]
    return [*ordered, *lengths, *texts(URL_PARTS, seed)]


def captions(seed: int) -> list[str]:
    lengths = ["x" * (MAX_CAPTION_CHARACTERS + extra) for extra in (-1, 0, 1)]
    ends = ["x" * (MAX_CAPTION_CHARACTERS - 1) + end for end in (" y", " ", "é", "éé", "e\u0301", "\u0301", "\u200e")]
    return [*lengths, *ends, *texts(CAPTION_PARTS, seed), *(chr(code) for code in range(0x500))]


@pytest.mark.parametrize("seed", range(4))
def test_arrays_of_hostile_texts_give_what_each_text_gives(seed: int) -> None:
    for raw, of_one, of_array in (
        (urls(seed), normalise_url, normalise_urls),
        (captions(seed), normalise_caption, normalise_captions),
        (urls(seed), normalise_caption, normalise_captions),
        (texts(SHA256_PARTS, seed, most=3), normalise_sha256, normalise_sha256s),
    ):
        expected = [of_one(text) for text in raw]
        assert of_array(pa.array(raw, pa.string())).equals(pa.array(expected, pa.string()))
        assert len(set(expected)) > 3, "texts with different results"
        unchanged = sum(text == result for text, result in zip(raw, expected, strict=True))
        assert 10 < unchanged < 0.9 * len(raw), "both ways are used"


def test_characters_of_captions_that_are_left_alone_cannot_be_changed_by_any_neighbour() -> None:
    """By Unicode's definition of NFC: they are their own NFC, never reordered and never the second part of a composition."""
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    surrounded = pa.array([f"a{character}a" for character in characters])
    changes = pc.match_substring_regex(surrounded, _NOT_CANONICAL_CAPTION).to_pylist()
    stable = {character for character, change in zip(characters, changes, strict=True) if not change}
    composed = (unicodedata.normalize("NFD", character)[1:] for character in characters)
    assert stable.isdisjoint(itertools.chain.from_iterable(composed)) and len(stable) > 40_000
    for character in stable:
        assert unicodedata.is_normalized("NFC", character) and not unicodedata.combining(character)
        assert normalise_caption(f"a{character}a") == f"a{character}a", "neither white space nor unprintable"


def test_arrays_that_are_empty_or_slices() -> None:
    for of_array in (normalise_urls, normalise_captions, normalise_sha256s):
        assert of_array(pa.array([], pa.string())).equals(pa.array([], pa.string()))
    raw = pa.array(["http://z/", "http://A/", "http://b/#c", None], pa.string()).slice(1, 2)
    assert normalise_urls(raw).to_pylist() == ["http://a/", "http://b/"]
