"""Text for people and records: without credentials, and errors on one line."""

import re
from typing import Any

_QUOTES = r"\s'\"<>`"
_USER = rf"[^/?#@:\[\]{_QUOTES}]*"
_PASSWORD = re.compile(
    rf"(\b[A-Za-z][\w+.-]*://)({_USER}):"
    rf"(?!\d{{1,5}}(?:[/?#{_QUOTES}]|$))"  # a port
    rf"(?:[^/?#{_QUOTES}]*|[^{_QUOTES}]*)@"  # with a slash only if it must be: secret keys of S3 have some
)
_HTTP_USER = re.compile(rf"(\bhttps?://){_USER}@", re.IGNORECASE)
_QUERY = re.compile(
    r"(?<=[?&;])(?:[\w.-]*(?:secret|token|passw|signature|credential|api[-_]?key|access[-_]?key)[\w.-]*|sig|pwd|key)"
    rf"=[^&;#{_QUOTES}]*[&;]?",
    re.IGNORECASE,
)
_EMPTY_QUERY = re.compile(rf"[?&;]+(?=[#{_QUOTES}]|$)")


def without_credentials(text: str) -> str:
    """Remove the credentials from all URIs in a text, so that it may be printed and stored.

    These are passwords (`s3://key:secret@bucket` becomes `s3://key@bucket`), users of HTTP, whose name may be a token, and
    query parameters such as `token`, `password`, `sig` and `X-Amz-Signature`.
    """
    if "://" in text:
        text = _HTTP_USER.sub(r"\1", _PASSWORD.sub(_without_password, text))
    shorter = _QUERY.sub("", text) if "=" in text else text
    return text if shorter == text else _EMPTY_QUERY.sub("", shorter)


def _without_password(found: re.Match[str]) -> str:
    scheme, user = found.groups()
    return scheme if scheme.lower().startswith("http") or not user else f"{scheme}{user}@"


def redacted(value: Any) -> Any:
    """Copy of a JSON value, without credentials in any of its texts."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, dict):
        return {name: redacted(inner) for name, inner in value.items()}
    return [redacted(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def reason_of(error: BaseException, line: int = 0) -> str:
    """One line of an error's message, by default the first, without credentials; its type if it has no message."""
    lines = str(error).strip().splitlines()
    return without_credentials(lines[line]) if lines else type(error).__name__
