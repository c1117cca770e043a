"""Pipeline configuration: a preset, overridden by a run file, overridden by `--set`; typed and validated as a whole."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset import PipelineConfig
from pipelines.pipeline import find_pipeline
from pipelines.preset import read_preset, read_toml
from unclip import config
from unclip.errors import ConfigError


def load(
    pipeline: str, run_file: str | None = None, assignments: Sequence[str] = (), storage: str | None = None
) -> PipelineConfig:
    """Resolve a pipeline's configuration.

    A run file or an assignment may name another system than the preset does. The preset's settings that all systems share
    then remain; the settings of its own system's parts are dropped.

    Args:
        pipeline: name of a preset.
        run_file: TOML file with the settings that differ from the preset.
        assignments: `section.field=value`, applied last.
        storage: overrides the storage root.

    Raises:
        ConfigError: unknown pipeline, section or key, or invalid value.
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
        values["ingest"] = {"urls": "scenes"}  # replaced by the list of scenes once it is written
    if "ingest" not in values:
        raise ConfigError("ingest.urls: missing. Set your list of URLs and captions: --set ingest.urls=pairs.parquet")
    pipeline_spec = find_pipeline(_system(values))
    return config.load(pipeline_spec.config, pipeline_spec.resolve(values))


def _only_system(assignments: Sequence[str]) -> dict[str, Any]:
    """Return only the assignment of `system`, if there is one."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        if assignment.partition("=")[0].strip() == "system":
            values = config.override(values, assignment)
    return values


def _system(values: Mapping[str, Any]) -> str:
    system = values.get("system", PipelineConfig.system)
    if not isinstance(system, str):
        raise ConfigError(f"system: got {system!r}, expected the name of a system.")
    return system


def _shared(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Keep only the settings that the class defines, recursively; systems extend the class and its sections."""
    known = config.field_types(cls)
    return {
        name: _shared(value, known[name])
        if isinstance(value, Mapping) and dataclasses.is_dataclass(known[name])
        else value
        for name, value in values.items()
        if name in known
    }
