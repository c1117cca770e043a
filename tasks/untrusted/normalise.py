"""Canonical forms of URLs, captions and hashes, so that equal ones compare equal in all tables; and of error messages.

The functions for one text are the definition. Those for an Arrow array give the same results: they recognise the many texts
that are canonical already by a regular expression, and call the function for one text on the rest.
"""

import re
import unicodedata
import urllib.parse
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from unclip.messages import reason_of

MAX_CAPTION_CHARACTERS = 1000
MAX_URL_CHARACTERS = 2048
REPLACEMENT = "\ufffd"  # replaces invalid UTF-8 on decoding

# Control characters, and invisible characters that change the direction of text.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

# RE2 patterns that tell canonical texts apart; all URLs and hashes are ASCII then.
_CANONICAL_URL = (
    r"\Ahttps?://[a-z0-9][a-z0-9.-]*(:[1-9][0-9]{0,3})?"  # lower case; any port of four digits is valid
    r'/[!"$->@-~]*(\?[!"$-~]+)?\z'  # without spaces and "#"; "?" only if a query follows
)
# Printable characters that NFC leaves alone, whatever stands beside them: Latin, Greek, Cyrillic, Hebrew and Arabic letters,
# punctuation and symbols, Japanese, Chinese, Korean, and emoji.
_STABLE = (
    r" -~\x{a1}-\x{2ff}\x{388}-\x{482}\x{48a}-\x{52f}\x{5d0}-\x{5ea}\x{620}-\x{64a}\x{1e00}-\x{1eff}"
    r"\x{200b}-\x{200d}\x{2010}-\x{2027}\x{2030}-\x{205e}\x{20a0}-\x{20c0}\x{2122}\x{2190}-\x{2328}\x{2460}-\x{27ff}"
    r"\x{3001}-\x{3029}\x{3030}-\x{3098}\x{309b}-\x{30ff}\x{3400}-\x{9fff}\x{ac00}-\x{d7a3}\x{fe0f}\x{ff01}-\x{ffef}"
    r"\x{1f000}-\x{1faff}"
)
_NOT_CANONICAL_CAPTION = rf"[^{_STABLE}]|  |\A | \z"
_CANONICAL_SHA256 = r"\A([0-9a-f]{64})?\z"


def normalise_url(text: str) -> str | None:
    """Return the URL as it is fetched and compared; None if it cannot be fetched."""
    text = text.strip()
    if _CONTROL.search(text):  # urlsplit would join what a line break or tab separates
        return None
    try:
        parts = urllib.parse.urlsplit(text)
        valid = parts.port != 0 and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        return None
    if not valid or parts.scheme not in ("http", "https") or len(text) > MAX_URL_CHARACTERS:
        return None
    url = urllib.parse.urlunsplit((parts.scheme, parts.netloc.lower(), parts.path or "/", parts.query, ""))
    return None if _UNPRINTABLE.search(url) or REPLACEMENT in url else url


def normalise_caption(text: str) -> str:
    """Return the caption in NFC, on one line, with single spaces, without invisible characters, of at most 1,000 characters."""
    # Cut before NFC, whose time is quadratic in the length of a run of accents.
    one_line = " ".join(text.split())[: 4 * MAX_CAPTION_CHARACTERS]
    one_line = " ".join(unicodedata.normalize("NFC", one_line).split())
    return " ".join(_UNPRINTABLE.sub("", one_line).split())[:MAX_CAPTION_CHARACTERS].strip()


def normalise_sha256(text: str) -> str | None:
    """Return 64 lower-case hex digits; None if the text is not a sha256."""
    stripped = text.strip()
    return stripped.lower() if re.fullmatch("[0-9a-fA-F]{64}", stripped) else None


def normalise_urls(texts: pa.Array) -> pa.Array:
    """Return `normalise_url` of every text."""
    is_short = pc.less_equal(pc.binary_length(texts), MAX_URL_CHARACTERS)
    return map_texts(normalise_url, texts, pc.and_(is_short, pc.match_substring_regex(texts, _CANONICAL_URL)))


def normalise_captions(texts: pa.Array) -> pa.Array:
    """Return `normalise_caption` of every text."""
    is_long = pc.greater(pc.utf8_length(texts), MAX_CAPTION_CHARACTERS)
    needs_work = pc.or_(is_long, pc.match_substring_regex(texts, _NOT_CANONICAL_CAPTION))
    return map_texts(normalise_caption, texts, pc.invert(needs_work))


def normalise_sha256s(texts: pa.Array) -> pa.Array:
    """Return `normalise_sha256` of every text."""
    hashes = map_texts(normalise_sha256, texts, pc.match_substring_regex(texts, _CANONICAL_SHA256))
    return pc.if_else(pc.equal(hashes, ""), pa.scalar(None, hashes.type), hashes)


def map_texts(function: Callable[[str], str | None], texts: pa.Array, unchanged: pa.BooleanArray) -> pa.Array:
    """Apply a function to the texts that it may change; it returns the `unchanged` ones as they are."""
    changed = pc.invert(unchanged)
    results = [function(text) for text in texts.filter(changed).to_pylist()]
    return pc.replace_with_mask(texts, changed, pa.array(results, texts.type)) if results else texts


def first_line(error: BaseException) -> str:
    """Return an error's first line, cleaned for a message, since errors may quote untrusted text and credentials."""
    return normalise_caption(reason_of(error))[:300] or type(error).__name__
