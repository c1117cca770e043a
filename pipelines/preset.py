"""The presets: one TOML file for each pipeline. Reading their names takes no time, so that a shell can complete them."""

import tomllib
from pathlib import Path
from typing import Any

from unclip import config
from unclip.errors import ConfigError, InputError

PRESETS = Path(__file__).parent / "presets"
GENERATORS = ("prior", "decoder")
"""Models that every pipeline trains, besides its upsamplers."""


def pipeline_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_preset(pipeline: str) -> dict[str, Any]:
    """The settings of a pipeline, laid over those of the one that it extends.

    Raises:
        ConfigError: an unknown pipeline.
    """
    if pipeline not in pipeline_names():
        raise ConfigError(f"{pipeline}: unknown pipeline. {config.nearest(pipeline, pipeline_names())}")
    values = read_toml(PRESETS / f"{pipeline}.toml")
    extends = values.pop("extends", None)
    return config.merge(read_toml(PRESETS / f"{extends}.toml"), values) if extends else values


def model_names() -> list[str]:
    """Models that some pipeline trains, for completion, which is asked before the pipeline is named."""
    upsamplers = {}
    for pipeline in pipeline_names():
        sections = read_preset(pipeline).get("upsamplers", {})
        upsamplers |= {f"upsampler-{size}": None for size, section in sections.items() if section != "none"}
    return [*GENERATORS, *upsamplers]


def read_toml(path: Path) -> dict[str, Any]:
    """Raises:
    InputError: the file is not there, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such run file. Name a TOML file with --config.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML: {error}.") from None
