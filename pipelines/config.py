"""Pipeline configuration: a preset, overridden by a run file, overridden by `--set`; typed and validated as a whole."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset import PipelineConfig
from pipelines.pipeline import Pipeline, find_pipeline
from pipelines.preset import full_system_name, read_preset, read_toml, system_names
from unclip import config
from unclip.errors import ConfigError


def load(
    pipeline: str,
    run_file: str | None = None,
    assignments: Sequence[str] = (),
    storage: str | None = None,
    system: str | None = None,
) -> PipelineConfig:
    """Resolve a pipeline's configuration.

    A run file or an assignment may name another system than the preset does. Settings that mean the same in both systems then
    remain: those of the dataset, the model size, and sections of the same class. The others of the preset are dropped. A
    table `systems.NAME` holds settings for one system, which other systems do not read.

    Args:
        pipeline: name of a preset.
        run_file: TOML file with the settings that differ from the preset.
        assignments: `section.field=value`, or `systems.NAME.section.field=value` for one system; applied last.
        storage: overrides the storage root.
        system: overrides the system, like the assignment `system=NAME`.

    Raises:
        ConfigError: unknown pipeline, section or key, or invalid value.
        InputError: the run file cannot be read.
    """
    if system is not None:
        assignments = (*assignments, f"system={system}")
    layers = read_preset(pipeline)
    if run_file is not None:
        layers.append(read_toml(Path(run_file)))
    layers.append(_only_system(assignments))
    chosen = _system(functools.reduce(operator.or_, layers))
    pipeline_spec = find_pipeline(chosen)
    values: dict[str, Any] = {}
    named: str = PipelineConfig.system
    for layer in layers:
        named = _system({"system": named} | layer)
        for_all, for_one = _split(layer, chosen)
        if named != chosen:
            for_all = shared_settings(for_all, find_pipeline(named).config, pipeline_spec.config)
            if not pipeline_spec.model_sizes:
                for_all.pop("model_size", None)  # the size of another system's models
        values = config.merge(config.merge(values, for_all), for_one)
    for assignment in _for_system(assignments, chosen):
        values = config.override(values, assignment)
    if "system" in values:
        values["system"] = chosen
    _check_model_size(values, chosen, pipeline_spec)
    if storage is not None:
        values["storage"] = storage
    if "scenes" in values and "ingest" not in values:
        values["ingest"] = {"urls": "scenes"}  # replaced by the list of scenes once it is written
    if "ingest" not in values:
        raise ConfigError("ingest.urls: missing. Set your list of URLs and captions: --set ingest.urls=pairs.parquet")
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
    return full_system_name(system)


def _split(layer: Mapping[str, Any], system: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a layer for all systems, and those for this one.

    Raises:
        ConfigError: it has settings for an unknown system.
    """
    of_systems = layer.get("systems", {})
    if not isinstance(of_systems, Mapping):
        raise ConfigError(f"systems: got {of_systems!r}, expected a table of the settings of each system.")
    own: dict[str, Any] = {}
    for name, section in of_systems.items():
        full_name = _find_system(name, f"systems.{name}")
        if not isinstance(section, Mapping):
            raise ConfigError(f"systems.{name}: got {section!r}, expected the settings of the system.")
        own = config.merge(own, section) if full_name == system else own
    return {name: value for name, value in layer.items() if name != "systems"}, own


def _for_system(assignments: Sequence[str], system: str) -> list[str]:
    """Return the assignments for a system: those for all systems, and its own without `systems.NAME`.

    Raises:
        ConfigError: an assignment is for an unknown system.
    """
    found = []
    for assignment in assignments:
        path = assignment.partition("=")[0].strip()
        if path.startswith("systems."):
            _, name, *setting = path.split(".", 2)
            full_name = _find_system(name, f"--set {assignment}")
            if not setting:
                raise ConfigError(f"--set {assignment}: expected systems.{name}.section.field=value.")
            if full_name != system:
                continue
            assignment = assignment.strip().removeprefix(f"systems.{name}.")
        found.append(assignment)
    return found


def _find_system(name: str, where: str) -> str:
    """Full name of a system.

    Raises:
        ConfigError: there is none, or several begin like this.
    """
    found = full_system_name(name)
    if found not in system_names():
        raise ConfigError(f"{where}: got the system {name!r}. {config.nearest(name, system_names())}")
    return found


def _check_model_size(values: Mapping[str, Any], system: str, spec: Pipeline) -> None:
    size = values.get("model_size")
    if size in (None, "none") or size in spec.model_sizes:
        return
    if not spec.model_sizes:
        raise ConfigError(f"model_size: got {size!r}, but the system {system} has no named sizes. Leave it out.")
    raise ConfigError(f"model_size: got {size!r}. {config.nearest(str(size), spec.model_sizes)}")


def shared_settings(values: Mapping[str, Any], given: type, wanted: type) -> dict[str, Any]:
    """Keep the settings of one system's class that mean the same in another's: those of the same type in both.

    Sections whose classes extend a common one are compared setting by setting. Unknown settings remain, to be refused.
    """
    given_types, wanted_types = config.field_types(given), config.field_types(wanted)
    kept: dict[str, Any] = {}
    for name, value in values.items():
        one, other = given_types.get(name), wanted_types.get(name)
        if one == other or one is None:
            kept[name] = value
        elif isinstance(value, Mapping) and _have_common_fields(one, other):
            assert isinstance(other, type)
            kept[name] = shared_settings(value, one, other)
    return kept


def _have_common_fields(one: Any, other: Any) -> bool:
    """Return True if two classes of settings extend a common one."""
    if not (isinstance(one, type) and isinstance(other, type)):
        return False
    return any(dataclasses.is_dataclass(cls) for cls in set(one.__mro__) & set(other.__mro__))
