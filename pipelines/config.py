"""The configuration of a pipeline: a preset, a run file over it, `--set` over that; typed and checked as a whole."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset import PipelineConfig
from pipelines.pipeline import pipeline_of
from unclip import config
from unclip.errors import ConfigError, InputError

PRESETS = Path(__file__).parent / "presets"


def pipeline_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


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
    if pipeline not in pipeline_names():
        raise ConfigError(f"{pipeline}: unknown pipeline. {config.nearest(pipeline, pipeline_names())}")
    values = _read_toml(PRESETS / f"{pipeline}.toml")
    extends = values.pop("extends", None)
    if extends:
        values = config.merge(_read_toml(PRESETS / f"{extends}.toml"), values)
    if run_file is not None:
        values = config.merge(values, _read_toml(Path(run_file)))
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


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such run file. Name a TOML file with --config.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML: {error}.") from None
