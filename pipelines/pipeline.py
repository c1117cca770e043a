"""A pipeline: how one system is configured and trained; and where pipelines are found.

A pipeline of this project is one file of `pipelines.systems` that defines `PIPELINE`. One of another package is an entry
point of the group `unclip.pipelines`, named like its system, that names such a `Pipeline`.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Any

from pipelines import systems
from pipelines.dag import Binder
from pipelines.dataset import PipelineConfig
from unclip.config import nearest
from unclip.errors import ConfigError

ENTRY_POINTS = "unclip.pipelines"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a system is configured and trained."""

    config: type[PipelineConfig]
    """Class of its settings."""
    compose: Callable[[Binder], Any]
    """Composes its DAG; returns the last node."""
    resolve: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """Completes settings as they are given, before they are checked: model sizes by name, sizes that follow from others."""


def pipeline_of(system: str) -> Pipeline:
    """The pipeline that trains a system.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if re.fullmatch(r"[a-z][a-z0-9_]*", system):
        if importlib.util.find_spec(f"{systems.__name__}.{system}") is not None:
            found: Pipeline = importlib.import_module(f"{systems.__name__}.{system}").PIPELINE
            return found
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=system):
            loaded: Pipeline = point.load()
            return loaded
    known = [module.name for module in pkgutil.iter_modules(systems.__path__)]
    known += [point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)]
    raise ConfigError(f"system: got {system!r}, which no pipeline trains. {nearest(system, known)}")
