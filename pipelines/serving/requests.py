"""Requests of clients: bodies read within limits, and values checked. Errors are those of OpenAI's API."""

import contextlib
import dataclasses
import json
import math
import re
import secrets
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from tasks.untrusted.normalise import MAX_CAPTION_CHARACTERS

MAX_FIELDS = 64
"""Parts of a form."""
MAX_HEADERS = 4096
"""Bytes of the headers of a part."""
IGNORED = frozenset(
    {
        "user",
        "background",
        "moderation",
        "output_compression",
        "quality",
        "style",
        "input_fidelity",
        "partial_images",
    }
)
"""Fields of OpenAI's API that have no effect here."""


class RequestError(Exception):
    """A request that is refused, with the status and the body of the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = self.param and self.param.encode(errors="replace").decode()  # JSON may name half a surrogate pair
        return {"error": {"message": self.message, "type": kind, "param": param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of requests."""

    max_num: int = 10
    """Images of a request."""
    max_steps: int = 250
    """Sampling steps of the base images."""
    max_caption: int = MAX_CAPTION_CHARACTERS
    """Characters of a caption."""
    max_image_bytes: int = 8 << 20
    """Bytes of a given image."""
    max_image_pixels: int = 1 << 24
    """Pixels of a given image."""
    max_requests: int = 64
    """Requests that wait or are sampled; more are refused with 429."""
    request_seconds: float = 300.0
    """Time that a request may wait and be sampled, once its body is there."""
    body_seconds: float = 30.0
    """Time until the whole body of a request is there."""

    @property
    def max_body_bytes(self) -> int:
        """Bytes of a form with two images."""
        return 2 * self.max_image_bytes + (1 << 16)


@dataclasses.dataclass(frozen=True)
class Fields:
    """Values of a request by name, and the bytes of its files."""

    values: Mapping[str, Any]
    files: Mapping[str, tuple[bytes, ...]]

    def text(self, name: str, limit: int, default: str | None = None, required: bool = False) -> str | None:
        """Text of a field, or the default if it is not there or null."""
        value = self.values.get(name)
        if value is None:
            if required:
                raise RequestError(400, f"{name}: missing, expected a text.", name, "missing_required_parameter")
            return default
        if not isinstance(value, str):
            raise _invalid(name, value, "a text")
        if len(value) > limit:
            raise RequestError(
                400,
                f"{name}: got {len(value):,} characters, expected at most {limit:,}.",
                name,
                "string_above_max_length",
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _invalid(name, value, "a text in Unicode") from None
        if required and not value.strip():
            raise RequestError(400, f"{name}: got an empty text, expected a description of the image.", name)
        return value

    def integer(self, name: str, low: int, high: int, default: int) -> int:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,30}", value.strip()):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _invalid(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        number = math.nan
        if isinstance(value, (int, float, str)) and not isinstance(value, bool) and len(str(value)) <= 40:
            with contextlib.suppress(ValueError):
                number = float(value)
        if not (math.isfinite(number) and low <= number <= high):
            raise _invalid(name, value, f"a number from {low:g} to {high:g}")
        return number

    def boolean(self, name: str) -> bool:
        value = self.values.get(name)
        if isinstance(value, str):
            value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise _invalid(name, value, "true or false")
        return value

    def images(self, name: str, least: int, most: int) -> tuple[bytes, ...]:
        """Contents of the files of a field, which may also be called `name[]`."""
        if name in self.values or f"{name}[]" in self.values:
            raise RequestError(400, f"{name}: got a text, expected a file: PNG, JPEG, WebP or GIF.", name)
        given = (*self.files.get(name, ()), *self.files.get(f"{name}[]", ()))
        if not least <= len(given) <= most:
            expected = str(least) if least == most else f"{least} to {most}"
            raise RequestError(400, f"{name}: got {len(given)} files, expected {expected}.", name)
        return given

    def seed(self) -> int:
        """Seed of the request, or a random one that JavaScript's numbers can hold."""
        return self.integer("seed", 0, 2**64 - 1, secrets.randbelow(2**32))

    def check_names(self, known: frozenset[str]) -> None:
        """Refuse fields that would have no effect, unless OpenAI's API has them."""
        for name, value in self.values.items():
            if name.removesuffix("[]") not in known | IGNORED and value is not None:
                raise RequestError(
                    400,
                    f"{_shown(name)}: unknown parameter. Known are {', '.join(sorted(known))}.",
                    name[:100],
                    "unknown_parameter",
                )
        for name in self.files:
            if name.removesuffix("[]") not in known:
                raise RequestError(400, f"{_shown(name)}: unknown file.", name[:100], "unknown_parameter")


def _invalid(name: str, value: object, expected: str) -> RequestError:
    return RequestError(400, f"{name}: got {_shown(value)}, expected {expected}.", name, "invalid_value")


def _shown(value: object) -> str:
    """Short form of a client's value, in letters that can be printed."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of many digits"
    return text if len(text) <= 80 else text[:77] + "..."


async def read_body(request: Request, limit: int) -> bytes:
    """Read the body of a request, up to a limit.

    Raises:
        RequestError: the body is longer.
    """
    refused = RequestError(413, f"body: got more than {limit:,} bytes, expected at most that. Send smaller images.")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise refused
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise refused
    return bytes(body)


def parse_json(content_type: str, body: bytes) -> Fields:
    """Parse a JSON object.

    Raises:
        RequestError: the body is none.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, f"content-type: got {_shown(content_type)}, expected application/json.")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"body: not JSON: {str(error)[:100]}.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise RequestError(
            400, f"body: got {_shown(type(values).__name__)}, expected a JSON object.", code="invalid_json"
        )
    return Fields(values, {})


def parse_form(content_type: str, body: bytes, limits: Limits) -> Fields:
    """Parse a form (multipart/form-data).

    Raises:
        RequestError: the body is none, or has too many parts, or a file is too large.

    Source: RFC 7578; RFC 2046, section 5.1.
    """
    kind, _, parameters = content_type.partition(";")
    boundary = re.search(r'boundary=(?:"([^"\r\n]{1,70})"|([^\s;"]{1,70}))', parameters, re.IGNORECASE)
    if kind.strip().lower() != "multipart/form-data" or boundary is None:
        raise RequestError(
            415, f"content-type: got {_shown(content_type)}, expected multipart/form-data with a boundary."
        )
    line = b"\r\n--" + (boundary[1] or boundary[2]).encode("latin-1", "replace")
    pieces = (b"\r\n" + body).split(line, MAX_FIELDS + 2)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise RequestError(400, "body: the form is cut off, or has too many parts.", code="invalid_form")
    values: dict[str, str] = {}
    files: dict[str, tuple[bytes, ...]] = {}
    for piece in pieces[1:-1]:
        head, _, content = piece.partition(b"\r\n\r\n")
        name, is_file = _disposition(head)
        if is_file:
            if len(content) > limits.max_image_bytes:
                raise RequestError(
                    413,
                    f"{_shown(name)}: got {len(content):,} bytes, expected at most {limits.max_image_bytes:,}.",
                    name[:100],
                )
            files[name] = (*files.get(name, ()), content)
        elif name in values:
            raise RequestError(400, f"{_shown(name)}: given twice.", name[:100])
        else:
            try:
                values[name] = content.decode()
            except UnicodeDecodeError:
                raise _invalid(name[:100], content[:20], "a text in UTF-8") from None
    return Fields(values, files)


def _disposition(head: bytes) -> tuple[str, bool]:
    """Name of a part of a form, and True if it is a file."""
    text = head[:MAX_HEADERS].decode("utf-8", "replace")
    found = re.search(r"(?im)^content-disposition:\s*form-data;(.*)$", text)
    name = found and re.search(r'(?i)(?:^|[;\s])name="([^"]{1,200})"', found[1])
    if not found or not name:
        raise RequestError(400, "body: a part of the form has no name.", code="invalid_form")
    return name[1], re.search(r"(?i)[;\s]filename\*?=", found[1]) is not None
