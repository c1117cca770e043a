"""Canonical forms of URLs, captions and hashes, so that equal ones compare equal in all tables; and of error messages."""

import re
import unicodedata
import urllib.parse

MAX_CAPTION_CHARACTERS = 1000
MAX_URL_CHARACTERS = 2048
REPLACEMENT = "\ufffd"  # replaces invalid UTF-8 on decoding

# Control characters, and invisible characters that change the direction of text.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def normalise_url(text: str) -> str | None:
    """Return the URL as it is fetched and compared; None if it cannot be fetched."""
    try:
        parts = urllib.parse.urlsplit(text.strip())
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


def first_line(error: BaseException) -> str:
    """Return an error's first line, cleaned for a message, since errors may quote untrusted text."""
    return normalise_caption(next(iter(str(error).splitlines()), ""))[:300] or type(error).__name__
