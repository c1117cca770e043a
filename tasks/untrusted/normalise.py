"""One way to write URLs, captions and hashes of lists in all tables, so that equal ones are equal; and foreign errors."""

import re
import unicodedata
import urllib.parse

MAX_CAPTION_CHARACTERS = 1000
MAX_URL_CHARACTERS = 2048
REPLACEMENT = "\ufffd"  # what invalid UTF-8 is decoded to

# Control characters, and the invisible ones that turn the direction of text around.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def normalise_url(text: str) -> str | None:
    """The URL as it is fetched and compared; None when it is none that can be fetched."""
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
    """NFC, one line, single spaces, nothing invisible, at most 1,000 characters."""
    # Cut before NFC, whose time grows with the square of a run of accents.
    one_line = " ".join(text.split())[: 4 * MAX_CAPTION_CHARACTERS]
    one_line = " ".join(unicodedata.normalize("NFC", one_line).split())
    return " ".join(_UNPRINTABLE.sub("", one_line).split())[:MAX_CAPTION_CHARACTERS].strip()


def normalise_sha256(text: str) -> str | None:
    """64 lower-case hex digits; None when it is no sha256."""
    stripped = text.strip()
    return stripped.lower() if re.fullmatch("[0-9a-fA-F]{64}", stripped) else None


def first_line(error: BaseException) -> str:
    """An error's first line, fit for a message: errors quote what others wrote."""
    return normalise_caption(next(iter(str(error).splitlines()), ""))[:300] or type(error).__name__
