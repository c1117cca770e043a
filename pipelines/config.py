"""The configuration of a pipeline: a preset, a run file over it, `--set` over that; typed and checked as a whole."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset import PipelineConfig
from pipelines.pipeline import pipeline_of
from pipelines.preset import read_preset, read_toml
from unclip import config
from unclip.errors import ConfigError


def load(
    pipeline: str, run_file: str | None = None, assignments: Sequence[str] = (), storage: str | None = None
) -> PipelineConfig:
    """Resolve a pipeline's configuration.

    A run file or assignment may name another system than the preset's: of the preset, the settings that all systems share
    stay, and those of its own system's parts are left out.

    Args:
        pipeline: name of a preset.
        run_file: TOML file with what differs from the preset.
        assignments: `section.field=value`, applied last.
        storage: overrides the storage root.

    Raises:
        ConfigError: an unknown pipeline, section, key or an impossible value.
        InputError: the run file cannot be read.
    """
    layers = read_preset(pipeline)
    if run_file is not None:
        layers.append(read_toml(Path(run_file)))
    layers.append(_only_system(assignments))
    values: dict[str, Any] = {}
    for layer in layers:
        if _system(values | layer) != _system(values):
            values = _shared(values, PipelineConfig)
        values = config.merge(values, layer)
    for assignment in assignments:
        values = config.override(values, assignment)
    if storage is not None:
        values["storage"] = storage
    if "scenes" in values and "ingest" not in values:
        values["ingest"] = {"urls": "scenes"}  # replaced by the list that the scenes are written to
    if "ingest" not in values:
        raise ConfigError("ingest.urls: missing. Name your list of URLs and captions: --set ingest.urls=pairs.parquet")
    of_system = pipeline_of(_system(values))
    return config.load(of_system.config, of_system.resolve(values))


def _only_system(assignments: Sequence[str]) -> dict[str, Any]:
    """The system that assignments name, if they name one."""
    named: dict[str, Any] = {}
    for assignment in assignments:
        if assignment.partition("=")[0].strip() == "system":
            named = config.override(named, assignment)
    return named


def _system(values: Mapping[str, Any]) -> str:
    system = values.get("system", PipelineConfig.system)
    if not isinstance(system, str):
        raise ConfigError(f"system: got {system!r}, expected the name of a system.")
    return system


def _shared(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The settings that a class has, in its sections too; systems extend both."""
    known = config.field_types(cls)
    return {
        name: _shared(value, known[name])
        if isinstance(value, Mapping) and dataclasses.is_dataclass(known[name])
        else value
        for name, value in values.items()
        if name in known
    }
