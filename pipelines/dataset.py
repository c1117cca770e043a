"""The part of a pipeline that all systems share: settings, the stages from a list of URLs to a dataset, and the last stages."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipelines.dag import Binder
from pipelines.notifications import NotifyConfig
from pipelines.preset import DEFAULT_SYSTEM
from pipelines.scene_server import ScenesConfig
from tasks.stage import OwnResources, StageResources
from tasks.stages.clip import ClipConfig, clip
from tasks.stages.curate import CurateConfig, curate
from tasks.stages.dedup import DedupConfig, dedup
from tasks.stages.download import DownloadConfig, download
from tasks.stages.embed import EmbedConfig, embed
from tasks.stages.evaluate import EvaluateConfig, evaluate
from tasks.stages.filter import FilterConfig, filter
from tasks.stages.ingest import IngestConfig, ingest
from tasks.stages.publish import PublishConfig, publish
from tasks.stages.report import ReportConfig, report
from tasks.store import DEFAULT_ROOT
from unclip.config import load, require


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Ray cluster that stages run on."""

    address: str | None = None
    """Address of a Ray cluster; None joins the cluster that the job was submitted to, or starts one on this machine."""
    num_cpus: int | None = None
    """Logical CPUs of a cluster started on this machine; None uses all that it may use."""
    wait_seconds: float = 600.0
    """Time for nodes that a run needs to join an existing cluster, such as those that autoscaling starts."""

    def __post_init__(self) -> None:
        require(self.num_cpus is None or self.num_cpus >= 1, "cluster.num_cpus", self.num_cpus, "at least 1")
        require(self.wait_seconds >= 0, "cluster.wait_seconds", self.wait_seconds, "0 or more")


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """Images that `unclip compare` samples besides those of every evaluation, and how it runs the systems."""

    num_relations: int = 0
    """Scene captions of two objects in a relation, whose attributes may get swapped; for procedural scenes."""
    num_repeated: int = 4
    """Captions that are sampled several times each, for the diversity at a fixed caption; of scenes, those without a place."""
    num_repeats: int = 16
    """Images of each of these captions."""
    num_columns: int = 8
    """Held-out captions in the figure."""
    side_by_side: int = 2
    """Systems that train and sample at the same time, in one cluster. What they share is still made once."""
    cpus_per_worker: int | None = None
    """Logical CPUs and torch threads of each worker of a training; None keeps those of `resources`. A training that can have no
    section of its own in `resources` keeps those of all stages."""

    def __post_init__(self) -> None:
        least_of = {"num_relations": 0, "num_repeated": 0, "num_repeats": 2, "num_columns": 1, "side_by_side": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            require(value >= least, f"comparison.{name}", value, f"at least {least}")
        cpus = self.cpus_per_worker
        require(cpus is None or cpus >= 1, "comparison.cpus_per_worker", cpus, "at least 1")


@dataclasses.dataclass(frozen=True)
class DatasetResources(StageResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    clip: OwnResources | None = None
    """Resources for training CLIP."""
    embed: OwnResources | None = None
    """Resources for embedding."""
    evaluate: OwnResources | None = None
    """Resources for sampling and evaluation."""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Settings of a run that all systems share; each stage reads the section of its name.

    A system's pipeline extends this class with the sections of its parts.
    """

    ingest: IngestConfig
    storage: str = DEFAULT_ROOT
    """Folder or URI that holds everything the pipeline makes."""
    tracking_uri: str | None = None
    """MLflow server or database; None uses MLFLOW_TRACKING_URI if set, otherwise a database in the storage folder."""
    system: str = DEFAULT_SYSTEM
    """Generative system to train, such as unclip."""
    model_size: str | None = None
    """Named size, such as demo, that fills in the sections of the parts and of CLIP; each system has its own table of sizes."""
    cluster: ClusterConfig = ClusterConfig()
    resources: DatasetResources = DatasetResources()
    scenes: ScenesConfig | None = None
    """Procedural images to train on, served on this machine while the pipeline runs."""
    download: DownloadConfig = DownloadConfig()
    filter: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    clip: ClipConfig = ClipConfig()
    embed: EmbedConfig = EmbedConfig()
    curate: CurateConfig = CurateConfig()
    report: ReportConfig = ReportConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    publish: PublishConfig = PublishConfig()
    comparison: ComparisonConfig = ComparisonConfig()
    system_metrics_seconds: float = 10.0
    """Interval at which trainings log the load of their machine (CPU, memory, disk, network, GPUs) to MLflow; 0 logs none."""
    notify: NotifyConfig = NotifyConfig()
    """Command and address that are told of the end of a run."""

    def __post_init__(self) -> None:
        seconds = self.system_metrics_seconds
        require(seconds == 0 or seconds >= 1, "system_metrics_seconds", seconds, "0, or at least 1")


class Dataset(NamedTuple):
    """DAG nodes of the dataset, for the training stages."""

    snapshot: Any
    """Dataset version."""
    clip: Any
    """Frozen CLIP that embedded it."""
    report: Any
    """Report page about it."""


def with_image_size(values: Mapping[str, Any], size: int, part: str) -> dict[str, Any]:
    """Store images at least as large as the last part of a system needs them.

    Args:
        values: settings of a run file.
        size: resolution that the part trains on.
        part: its name.

    Raises:
        ConfigError: they are stored smaller.
    """
    section = values.get("download", {})
    if not isinstance(section, Mapping):
        return dict(values)  # `config.load` reports the error
    stored = {"image_size": max(size, DownloadConfig.image_size), **section}
    image_size = load(DownloadConfig, stored, "download").image_size
    expected = f"at least {size}, the output resolution of {part}, which trains on these images"
    require(image_size >= size, "download.image_size", image_size, expected)
    return {**values, "download": stored}


def dataset(bind: Binder) -> Dataset:
    """Add the stages from a list of URLs to a dataset version."""
    pairs = bind(ingest)
    images = bind(download, pairs)
    filtered = bind(filter, images)
    unique = bind(dedup, filtered)
    frozen_clip = bind(clip, unique)
    embeddings = bind(embed, unique, frozen_clip)
    snapshot = bind(curate, embeddings)
    return Dataset(snapshot, frozen_clip, bind(report, snapshot))


def finish(bind: Binder, data: Dataset, *parts: Any) -> Any:
    """Add the stages that evaluate a system and publish it.

    Args:
        parts: nodes of the system's parts, in the order it expects; includes the frozen CLIP if it needs one.
    """
    evaluation = bind(evaluate, data.snapshot, data.clip, *parts)
    return bind(publish, data.snapshot, evaluation, data.report, *parts)


DATASET_STAGE = "report"
"""The last stage of a dataset refresh."""
