"""Entry points, by which other packages add systems."""

import functools
import importlib.metadata
import sys
from collections.abc import Mapping


def entry_points(group: str) -> Mapping[str, importlib.metadata.EntryPoint]:
    """Return the entry points of a group by name, without importing them.

    They are read once for each value of `sys.path`: reading opens the metadata of every installed package.
    """
    return _read(group, tuple(sys.path))


@functools.cache
def _read(group: str, path: tuple[str, ...]) -> Mapping[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=group)}
