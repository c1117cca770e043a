"""Pipelines: the configuration and training of one system each, and how they are found.

A pipeline of this project is a module in `pipelines.systems` that defines `PIPELINE`. A pipeline of another package is an
entry point in the group `unclip.pipelines`, named after its system, that refers to a `Pipeline`.
"""

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pipelines import dag as dags
from pipelines import systems
from pipelines.dag import Binder
from pipelines.dataset import PipelineConfig
from pipelines.preset import SYSTEM_ENTRY_POINTS, system_names
from tasks.stage import Run
from tasks.tracking import Tracker
from unclip.config import nearest
from unclip.entry_points import entry_points
from unclip.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to train or sample a system that a comparison shows in a row of its own."""

    title: str
    """Name for people."""
    assignments: tuple[str, ...] = ()
    """Settings that differ from the system's, as `section.field=value`."""
    applies: Callable[[Any], bool] = lambda _: True
    """Tells from the configuration of the system if the variant differs from it."""
    is_default: bool = True
    """Compared when no systems are named; others cost more than most comparisons need, and are named if wanted."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Configuration and DAG of one system."""

    config: type[PipelineConfig]
    """Class of its configuration."""
    compose: Callable[[Binder], Any]
    """Function that composes the DAG and returns its last node."""
    resolve: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """Completes the given settings before validation: expands named model sizes and derives dependent resolutions."""
    model_sizes: Collection[str] = ()
    """Values of `model_size` that `resolve` expands."""
    variants: Mapping[str, Variant] = dataclasses.field(default_factory=dict)
    """Name -> variant, for comparisons; those that need no other training first."""


def find_pipeline(system: str) -> Pipeline:
    """Find the pipeline that trains a system.

    Raises:
        ConfigError: there is none; the message suggests the nearest name.
    """
    if re.fullmatch(r"[a-z][a-z0-9_]*", system):
        if importlib.util.find_spec(f"{systems.__name__}.{system}") is not None:
            found: Pipeline = importlib.import_module(f"{systems.__name__}.{system}").PIPELINE
            return found
        if point := entry_points(SYSTEM_ENTRY_POINTS).get(system):
            loaded: Pipeline = point.load()
            return loaded
    raise ConfigError(f"system: got {system!r}, which no pipeline trains. {nearest(system, system_names())}")


def compose(config: PipelineConfig, run: Run | None = None) -> dags.Dag:
    """Compose the DAG of a configuration; without a run it can be inspected but not executed."""
    placeholder = Run("", "", config.storage, Tracker("", ""), "")
    return dags.compose(find_pipeline(config.system).compose, config, run or placeholder)
