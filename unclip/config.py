"""Typed configuration: frozen dataclasses built from nested mappings (TOML, `--set`) and checked before anything starts.

A configuration class is a frozen dataclass of plain values (bool, int, float, str, tuples of those, None), other such
dataclasses, and mappings from names to those. It checks its own values in `__post_init__` with `require`, which raises
`ConfigError`.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import types
import typing
import unicodedata
import urllib.parse
from collections.abc import Mapping
from typing import Any, TypeVar

from unclip.errors import ConfigError
from unclip.messages import redacted

T = TypeVar("T")


def require(condition: bool, setting: str, got: object, expected: str) -> None:
    """Raise `ConfigError`, naming the setting, its value and the expected one, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{setting}: got {got!r}, expected {expected}.")


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """Suggest the valid name closest to `name`, or list all valid names if none is close."""
    names = sorted(valid)
    by_lower_case = {valid_name.lower(): valid_name for valid_name in names}
    close = difflib.get_close_matches(name[:200].lower(), by_lower_case, n=1, cutoff=0.5)
    if not close:
        return f"Valid names: {', '.join(names)}."
    found = by_lower_case[close[0]]
    in_ascii = f", in ASCII {found!a}" if _look_alike(name, found) and ascii(found) != repr(found) else ""
    return f"Did you mean {found!r}{in_ascii}?"


def _look_alike(name: str, other: str) -> bool:
    """Return True if names differ, where they do, by wide or invisible letters or those of another alphabet."""

    def visible(text: str) -> str:
        text = unicodedata.normalize("NFKC", text).lower()
        return "".join(letter for letter in text if unicodedata.category(letter) not in ("Cf", "Cc"))

    def is_latin(letter: str) -> bool:
        return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")

    pairs = list(itertools.zip_longest(visible(name), visible(other), fillvalue=" "))
    return all(one == two or not (is_latin(one) and is_latin(two)) for one, two in pairs)


def load(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build `cls` from a nested mapping; missing keys take their defaults.

    Args:
        cls: a configuration dataclass.
        values: keys are field names; nested mappings fill nested dataclasses.
        where: dotted path for error messages.

    Raises:
        ConfigError: a key is unknown (the nearest valid one is named), or a value has the wrong type, is invalid or missing.
    """
    hints = field_types(cls)  # type: ignore[arg-type]
    for key in values:
        if key not in hints:
            raise ConfigError(f"{_join(where, key)}: unknown setting. {nearest(key, hints)}")
    arguments = {key: _convert(hints[key], value, _join(where, key)) for key, value in values.items()}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in arguments and not has_default:
            if not dataclasses.is_dataclass(hints[field.name]):
                raise ConfigError(f"{_join(where, field.name)}: missing. Set it in the run file or with --set.")
            arguments[field.name] = load(hints[field.name], {}, _join(where, field.name))
    try:
        return cls(**arguments)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(where) else _join(where, message)) from None


def override(values: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    """Copy `values` with `section.field=value` applied; a value that is not valid TOML is taken as a string.

    Raises:
        ConfigError: the assignment has no `=`, or its path goes through a value that is not a section.
    """
    import tomllib

    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {assignment}: expected section.field=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    return _merge_at(values, path.strip().split("."), value, assignment)


def merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Copy `base` and override it with the values of `extra`, section by section."""
    merged = dict(base)
    for key, value in extra.items():
        both_sections = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_sections else value
    return merged


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration to nested plain values, ready for JSON; URIs come without their credentials, and of settings that
    are secret only enough to recognise them."""
    values = dataclasses.asdict(config)
    _hide_secrets(config, values)
    return redacted(json.loads(json.dumps(values)))  # type: ignore[no-any-return]


def secret(default: T) -> T:
    """Default of a setting that may hold a secret. Records and printed settings have of an address only its host, and of a list
    only its first text."""
    return dataclasses.field(default=default, metadata={"secret": True})


def _hide_secrets(config: Any, values: dict[str, Any]) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("secret"):
            values[field.name] = _hidden(value)
        elif dataclasses.is_dataclass(value):
            _hide_secrets(value, values[field.name])


def _hidden(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [*value[:1], *["…"] * len(value[1:])]
    if not isinstance(value, str):
        return value
    parts = urllib.parse.urlsplit(value)
    return f"{parts.scheme}://{parts.hostname}" if parts.hostname else "…"


def operational(default: T) -> T:
    """Default of a setting that affects only how work is saved and monitored, not its result. Such settings are left out of
    fingerprints."""
    return dataclasses.field(default=default, metadata={"operational": True})


def added(default: T) -> T:
    """Default of a setting that was added later. It is left out of fingerprints while it has this default, which means what
    the setting's absence meant, so that finished work stays finished."""
    return dataclasses.field(default=default, metadata={"added": True})


def without_operational(config: Any) -> Any:
    """Convert a configuration as `to_dict` does, without operational settings: only what the result depends on."""
    if dataclasses.is_dataclass(config):
        values = {
            field.name: getattr(config, field.name) for field in dataclasses.fields(config) if _counts(field, config)
        }
        return {name: without_operational(value) for name, value in values.items()}
    if isinstance(config, dict):
        return {name: without_operational(value) for name, value in config.items()}
    return [without_operational(value) for value in config] if isinstance(config, (list, tuple)) else config


def fingerprint(*parts: Any) -> str:
    """sha256 (hex) of JSON-serialisable parts; dict order does not matter."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field names and resolved types of a configuration dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def has_setting(config: Any, path: str) -> bool:
    """Tell if a configuration has the setting with a dotted path; in place of a section that is None, its class counts."""
    name, _, rest = path.partition(".")
    if isinstance(config, Mapping):
        return name in config and (not rest or has_setting(config[name], rest))
    cls = config if isinstance(config, type) else type(config)
    hint = field_types(cls).get(name) if dataclasses.is_dataclass(cls) else None
    if hint is None or not rest:
        return hint is not None
    section = None if config is cls else getattr(config, name)
    if section is None:
        section = next(filter(dataclasses.is_dataclass, [hint, *typing.get_args(hint)]), None)
    return has_setting(section, rest)


def _counts(field: dataclasses.Field[Any], config: Any) -> bool:
    """Return True if a result depends on a setting."""
    is_unused = field.metadata.get("added") and getattr(config, field.name) == field.default
    return not (field.metadata.get("operational") or is_unused)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _merge_at(values: Mapping[str, Any], path: list[str], value: Any, assignment: str) -> dict[str, Any]:
    copy = dict(values)
    if len(path) == 1:
        copy[path[0]] = value
        return copy
    section = copy.get(path[0], {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"--set {assignment}: {path[0]!r} is a value, not a section.")
    copy[path[0]] = _merge_at(section, path[1:], value, assignment)
    return copy


def _as_float(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{where}: got a number of {len(str(abs(value)))} digits, expected a smaller one.") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (value == "none" and type(None) in arguments):
            return None
        options = [option for option in arguments if option is not type(None)]
        return _convert(options[0], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: got {value!r}. {nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: got {value!r}, expected a list.")
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: got {value!r}, expected a section of named sections.")
        return {key: _convert(arguments[1], item, _join(where, key)) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: got {value!r}, expected a section with {', '.join(field_types(hint))}.")  # type: ignore[arg-type]
        return load(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value, where)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: got {value}, expected a finite number.")
    matches = (
        hint is bool and isinstance(value, bool) if hint is bool or isinstance(value, bool) else isinstance(value, hint)
    )
    if not matches:
        raise ConfigError(f"{where}: got {value!r}, expected {hint.__name__}.")
    return value
