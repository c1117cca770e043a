"""The configuration of a pipeline: a preset, a run file over it, `--set` over that; typed and checked as a whole."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.scene_server import ScenesConfig
from tasks.stage import StageResources
from tasks.stages.clip import ClipConfig
from tasks.stages.curate import CurateConfig
from tasks.stages.dedup import DedupConfig
from tasks.stages.download import DownloadConfig
from tasks.stages.embed import EmbedConfig
from tasks.stages.evaluate import EvaluateConfig
from tasks.stages.filter import FilterConfig
from tasks.stages.ingest import IngestConfig
from tasks.stages.publish import PublishConfig
from tasks.stages.report import ReportConfig
from tasks.stages.train import DecoderStageConfig, PriorStageConfig, UpsamplerStageConfig
from tasks.store import DEFAULT_ROOT
from unclip import config
from unclip.config import require
from unclip.errors import ConfigError, InputError

PRESETS = Path(__file__).parent / "presets"


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Where the stages run."""

    address: str | None = None
    """Address of a Ray cluster; None joins the one that submitted the job, or starts one on this machine."""
    num_cpus: int | None = None
    """Logical CPUs of the cluster that is started on this machine; None takes all it has."""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """All settings of a run. Sections named like stages are those stages' own; `upsamplers.256` is that of `upsampler-256`."""

    ingest: IngestConfig
    storage: str = DEFAULT_ROOT
    """Folder or URI that holds everything the pipeline makes."""
    tracking_uri: str | None = None
    """MLflow server or database; None takes MLFLOW_TRACKING_URI, or a database in the storage folder."""
    cluster: ClusterConfig = ClusterConfig()
    resources: StageResources = StageResources()
    scenes: ScenesConfig | None = None
    """Procedural pictures to train on; they are served on this machine while the pipeline runs."""
    download: DownloadConfig = DownloadConfig()
    filter: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    clip: ClipConfig = ClipConfig()
    embed: EmbedConfig = EmbedConfig()
    curate: CurateConfig = CurateConfig()
    report: ReportConfig = ReportConfig()
    prior: PriorStageConfig = PriorStageConfig()
    decoder: DecoderStageConfig = DecoderStageConfig()
    upsamplers: dict[str, UpsamplerStageConfig] = dataclasses.field(default_factory=dict)
    """One for each upsampler, by the side of its pictures, the smallest first. It takes the pictures of the one before, the
    first those of the decoder. "none" in the place of a section leaves it out."""
    evaluate: EvaluateConfig = EvaluateConfig()
    publish: PublishConfig = PublishConfig()

    def __post_init__(self) -> None:
        for name in self.resources.upsamplers:
            if name not in self.upsamplers:
                there_are = config.nearest(name, self.upsamplers) if self.upsamplers else "There is none."
                raise ConfigError(f"resources.upsamplers.{name}: no such upsampler. {there_are}")


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
    return config.load(PipelineConfig, _with_sizes(values))


def _with_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with upsamplers in the order of their sizes, and the sizes that sections do not give.

    This is where they are decided: an upsampler's name is the side of its pictures, and it is given those of the one before;
    pictures are stored large enough for the last of them.

    Raises:
        ConfigError: sizes that do not follow from each other; names the setting.
    """
    sections, decoder_section, stored = values.get("upsamplers"), values.get("decoder", {}), values.get("download", {})
    if not (isinstance(sections, Mapping) and isinstance(decoder_section, Mapping) and isinstance(stored, Mapping)):
        return dict(values)  # for `config.load` to judge
    sections = {name: section for name, section in sections.items() if section != "none"}
    for name in sections:
        is_side = bool(re.fullmatch(r"[1-9]\d*", name))
        require(is_side, f"upsamplers.{name}", name, "the side of its pictures, as in upsamplers.256")
    decoder = config.load(DecoderStageConfig, decoder_section, "decoder").model
    side, maker, sized = decoder.unet.image_size, "the decoder", {}
    for name in sorted(sections, key=int):
        section, expected = sections[name], f"a multiple of {side}, the side of the pictures of {maker}"
        require(int(name) > side and int(name) % side == 0, f"upsamplers.{name}", int(name), expected)
        sizes = {"low_res_size": side, "scale": int(name) // side}
        if isinstance(section, Mapping) and isinstance(model := section.get("model", {}), Mapping):
            for setting, size in sizes.items():
                given = model.get(setting, size)
                expected = f"{size}, as {maker} makes {side} pixels and this one {name}"
                require(given == size, f"upsamplers.{name}.model.{setting}", given, expected)
            section = config.merge({"model": sizes}, section)
        sized[name] = section
        side, maker = int(name), f"upsampler-{name}"
    stored = {"image_size": max(side, DownloadConfig.image_size), **stored}
    image_size = config.load(DownloadConfig, stored, "download").image_size
    expected = f"at least {side}, the side of the pictures of {maker}, which trains on them"
    require(image_size >= side, "download.image_size", image_size, expected)
    return {**values, "upsamplers": sized, "download": stored}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such run file. Name a TOML file with --config.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML: {error}.") from None
