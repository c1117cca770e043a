"""Configurations from elsewhere: JSON objects, read into dataclasses that list all keys, types and ranges that are allowed.

Everything that names a model of other software, or comes with a model's files, is read this way, so that no other value
reaches the code that builds networks, and none of it is passed on to a library unseen.

A class gives each key a type: bool, int, float, str, None, Literal, a tuple, a mapping, another such class, a union of
these, Any, or `Annotated` with a `Range`. Its fields' defaults are those of missing keys.
"""

import dataclasses
import functools
import json
import math
import os
import stat
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from unclip import files
from unclip.config import nearest
from unclip.errors import CheckpointError, ConfigError

T = TypeVar("T")

MAX_TEXT_BYTES = 64 * 2**20
"""Size limit of a JSON or text file; the largest file needed, a tokenizer, has about 3 MB."""


class Range(NamedTuple):
    """Smallest and largest allowed number."""

    least: float
    most: float


Size = Annotated[int, Range(1, 2**22)]
"""Width, length or number of entries of a network's tensor."""
Context = Annotated[int, Range(1, 2**12)]
"""Tokens of a text of which each attends to all others: a mask has the square of this."""
Depth = Annotated[int, Range(1, 512)]
"""Number of layers of a network."""
Resolution = Annotated[int, Range(1, 2**14)]
"""Pixels."""
Timesteps = Annotated[int, Range(2, 100_000)]
"""Timesteps of a diffusion process."""


def check_link(path: Path) -> None:
    """Refuse a file that is a link out of its folder; a cache of Hugging Face's hub has links from `snapshots/` to its `blobs/`.

    Raises:
        CheckpointError: names the link and where it leads.
    """
    folder = Path(os.path.realpath(path.parent))
    blobs = [each.parent / "blobs" for each in folder.parents if each.name == "snapshots"]
    if not any(files.is_inside(path, each) for each in (folder, *blobs) if not each.is_symlink()):
        target = os.path.realpath(path)
        raise CheckpointError(f"{path}: a link to {target}, outside of its folder. Copy that file into the folder.")


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        CheckpointError: the path is missing, not a file, a link out of its folder, too large or not UTF-8; names it.
    """
    check_link(path)
    try:
        # a pipe would be waited for
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path}: not a regular file. Copy the whole folder again.")
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise CheckpointError(f"{path}: has more than {MAX_TEXT_BYTES:,} bytes. The file is damaged.")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. Copy the whole folder again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of finite numbers from a file.

    Raises:
        CheckpointError: as for `read_text`, or the file holds something else.
    """
    return parse_json(read_text(path), path)


def parse_json(text: str | bytes, where: str | Path) -> dict[str, Any]:
    """Read a JSON object of finite numbers.

    Args:
        where: file, for error messages.

    Raises:
        CheckpointError: the text is something else.
    """
    try:
        content = json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_exact)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: expected JSON: {error}. The file is damaged.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: got a {type(content).__name__}, expected a JSON object. The file is damaged.")
    return content


def read(cls: type[T], values: Any, where: str | Path, *, ignore_others: bool = False) -> T:
    """Build `cls` from the content of a JSON object.

    Args:
        where: file, and the path in it, for error messages.
        ignore_others: skip keys that `cls` does not list, for objects of which nothing else is used, instead of refusing them.

    Raises:
        CheckpointError: a key is not allowed or missing, or a value has another type or is out of range; names it.
    """
    hints = _hints(cls)  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where}: got {shorten(values)}, expected an object with {', '.join(sorted(hints))}.")
    arguments = {}
    for key, value in values.items():
        if key in hints:
            try:
                arguments[key] = _convert(hints[key], value, f"{where}: {key}")
            except _MismatchError as error:
                raise CheckpointError(
                    f"{where}: got {key} = {shorten(value)}, expected {error}. The file is damaged, or the model not supported."
                ) from None
        elif not ignore_others:
            raise CheckpointError(f"{where}: got {shorten(key)}, which is not allowed here. {nearest(str(key), hints)}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in arguments and not has_default:
            raise CheckpointError(f"{where}: {field.name} missing. The file is damaged.")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def check_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any], where: str | Path) -> None:
    """Refuse settings that differ from the only value that is supported; missing ones have it.

    Raises:
        CheckpointError: names the first such setting.
    """
    for name, value in fixed.items():
        if values.get(name, value) != value:
            raise CheckpointError(
                f"{where}: got {name} = {shorten(values[name])}, expected {value!r}, as nothing else is supported here."
            )


class _MismatchError(Exception):
    """A value that does not match its type; the message describes what does."""


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        number = _convert(arguments[0], value, where)
        least, most = arguments[1]
        if not least <= number <= most:
            raise _MismatchError(f"{arguments[0].__name__} from {least:,} to {most:,}")
        return number
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        problems = []
        for option in arguments:
            try:
                return _convert(option, value, where)
            except _MismatchError as error:
                problems.append(str(error))
        raise _MismatchError(" or ".join(problems))
    if origin is typing.Literal:
        if not any(type(value) is type(each) and value == each for each in arguments):
            raise _MismatchError(" or ".join(map(repr, arguments)))
        return value
    if origin is tuple:
        repeated = arguments[1:] == (Ellipsis,)
        if not isinstance(value, (list, tuple)) or not (repeated or len(value) == len(arguments)):
            raise _MismatchError("a list" if repeated else f"a list of {len(arguments)}")
        kinds = arguments[:1] * len(value) if repeated else arguments
        return tuple(_convert(kind, each, where) for kind, each in zip(kinds, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _MismatchError("an object")
        return {str(key): _convert(arguments[1], each, where) for key, each in value.items()}
    if dataclasses.is_dataclass(hint):
        return read(hint, value, where)  # type: ignore[arg-type]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not (type(None) if hint is None else hint):
        raise _MismatchError("nothing" if hint is type(None) else hint.__name__)
    return value


def numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """All numbers in nested objects and lists, with their names."""
    if isinstance(value, (int, float)):
        yield name, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from numbers(item, f"{name}.{key}")


def shorten(value: Any) -> str:
    """Text of a value for an error message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def first_lines(error: BaseException, count: int = 4) -> str:
    """First lines of an error's message, for one of ours: torch names every tensor of a network that does not fit."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    more = f" And {len(lines) - count:,} more lines." if len(lines) > count else ""
    return " ".join(line if len(line) <= 500 else f"{line[:500]}..." for line in lines[:count]) + more


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:50]} is not finite")
    return number


def _exact(text: str) -> int:
    if len(text) > 17:
        raise ValueError(f"{text[:50]} has too many digits")
    return int(text)
