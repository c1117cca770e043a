"""Presets: one TOML file per pipeline; and the systems. Reading their names is fast enough for shell completion."""

import pkgutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip import config
from unclip.entry_points import entry_points
from unclip.errors import ConfigError, InputError

PRESETS = Path(__file__).parent / "presets"
SYSTEMS = Path(__file__).parent / "systems"
DEFAULT_SYSTEM = "unclip"
SYSTEM_ENTRY_POINTS = "unclip.pipelines"
"""Group of entry points of the pipelines in other packages."""


def pipeline_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def system_names() -> list[str]:
    """Return the systems that pipelines train, of this project and of other packages, without importing them."""
    own = (module.name for module in pkgutil.iter_modules([str(SYSTEMS)]))
    return sorted({*own, *entry_points(SYSTEM_ENTRY_POINTS)})


def full_system_name(name: str) -> str:
    """Complete the name of a system: hyphens count as underscores, and a beginning that only one system has is enough.

    Returns:
        The name as given if no system begins with it.

    Raises:
        ConfigError: several systems begin with it.
    """
    names, start = system_names(), name.replace("-", "_")
    found = [start] if start in names else [each for each in names if start and each.startswith(start)]
    if len(found) > 1:
        raise ConfigError(f"system: got {name!r}, with which {', '.join(found)} begin. Give more letters.")
    return found[0] if found else name


def read_preset(pipeline: str) -> list[dict[str, Any]]:
    """Return the settings of a pipeline after those of the presets it extends; later layers override earlier ones.

    Raises:
        ConfigError: unknown pipeline.
    """
    if pipeline not in pipeline_names():
        raise ConfigError(f"{pipeline}: unknown pipeline. {config.nearest(pipeline, pipeline_names())}")
    values = read_toml(PRESETS / f"{pipeline}.toml")
    extends = values.pop("extends", None)
    return [*(read_preset(extends) if extends else ()), values]


def results_name(pipeline: str, system: str) -> str:
    """Name of the folder with the results of a pipeline; another system than the preset's has a folder of its own."""
    preset = read_preset(pipeline) if pipeline in pipeline_names() else []
    own = next((layer["system"] for layer in reversed(preset) if "system" in layer), DEFAULT_SYSTEM)
    return pipeline if system == own else f"{pipeline}-{system}"


def model_names() -> list[str]:
    """Return the parts that any preset trains, for completing an argument that comes before the pipeline."""
    names: dict[str, None] = {}
    layers = [values for pipeline in pipeline_names() for values in read_preset(pipeline)]
    for values in [*layers, *(own for layer in layers for own in layer.get("systems", {}).values())]:
        for name, section in values.items():
            if isinstance(section, Mapping) and name != "clip":  # CLIP belongs to the dataset
                names |= {name: None} if "trainer" in section else {}
                members = {key: inner for key, inner in section.items() if isinstance(inner, Mapping)}
                names |= {f"{name.removesuffix('s')}-{key}": None for key in members if "trainer" in members[key]}
    return list(names)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: the file does not exist or is not valid TOML.
    """
    from unclip import files  # completion of names needs no Arrow

    try:
        return tomllib.loads(files.decode_text(path.read_bytes()))
    except FileNotFoundError:
        raise InputError(f"{path}: no such run file. Give a TOML file with --config.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML: {error}.") from None
