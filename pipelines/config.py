"""The configuration of a pipeline: a preset, a run file over it, `--set` over that; typed and checked as a whole."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.dataset import PipelineConfig
from pipelines.pipeline import pipeline_of
from pipelines.preset import read_preset, read_toml
from unclip import config
from unclip.errors import ConfigError


def load(
    pipeline: str, run_file: str | None = None, assignments: Sequence[str] = (), storage: str | None = None
) -> PipelineConfig:
    """Resolve a pipeline's configuration.

    Args:
        pipeline: name of a preset.
        run_file: TOML file with what differs from the preset.
        assignments: `section.field=value`, applied last.
        storage: overrides the storage root.

    Raises:
        ConfigError: an unknown pipeline, section, key or an impossible value.
        InputError: the run file cannot be read.
    """
    values = read_preset(pipeline)
    if run_file is not None:
        values = config.merge(values, read_toml(Path(run_file)))
    for assignment in assignments:
        values = config.override(values, assignment)
    if storage is not None:
        values["storage"] = storage
    if "scenes" in values and "ingest" not in values:
        values["ingest"] = {"urls": "scenes"}  # replaced by the list that the scenes are written to
    if "ingest" not in values:
        raise ConfigError("ingest.urls: missing. Name your list of URLs and captions: --set ingest.urls=pairs.parquet")
    system = values.get("system", PipelineConfig.system)
    if not isinstance(system, str):
        raise ConfigError(f"system: got {system!r}, expected the name of a system.")
    of_system = pipeline_of(system)
    return config.load(of_system.config, of_system.resolve(values))
