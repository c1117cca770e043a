"""The half of a pipeline that all systems share: its settings, its stages from a list of URLs to a dataset, and its end."""

import dataclasses
from typing import Any, NamedTuple

from pipelines.dag import Binder
from pipelines.scene_server import ScenesConfig
from tasks.stage import Resources, StageResources
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


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """The cluster that stages run on."""

    address: str | None = None
    """Address of a Ray cluster; None joins the one that submitted the job, or starts one on this machine."""
    num_cpus: int | None = None
    """Logical CPUs of the cluster that is started on this machine; None takes all it has."""


@dataclasses.dataclass(frozen=True)
class DatasetResources(StageResources):
    """Resources of workers: of all stages, but for those that have a section of their own."""

    clip: Resources | None = None
    """For training CLIP."""
    embed: Resources | None = None
    """For embedding."""
    evaluate: Resources | None = None
    """For sampling and measuring images."""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Settings of a run that all systems share; sections named like stages are those stages' own.

    A system's pipeline extends this class by the sections of its parts.
    """

    ingest: IngestConfig
    storage: str = DEFAULT_ROOT
    """Folder or URI that holds everything the pipeline makes."""
    tracking_uri: str | None = None
    """MLflow server or database; None takes MLFLOW_TRACKING_URI, or a database in the storage folder."""
    system: str = "unclip"
    """The system that is trained: the way from captions to images."""
    cluster: ClusterConfig = ClusterConfig()
    resources: DatasetResources = DatasetResources()
    scenes: ScenesConfig | None = None
    """Procedural images to train on; they are served on this machine while the pipeline runs."""
    download: DownloadConfig = DownloadConfig()
    filter: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    clip: ClipConfig = ClipConfig()
    embed: EmbedConfig = EmbedConfig()
    curate: CurateConfig = CurateConfig()
    report: ReportConfig = ReportConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    publish: PublishConfig = PublishConfig()


class Dataset(NamedTuple):
    """Nodes of the DAG that trainings depend on."""

    snapshot: Any
    """The dataset version."""
    clip: Any
    """The frozen CLIP that embedded it."""
    report: Any
    """The page about it."""


def dataset(bind: Binder) -> Dataset:
    """From a list of URLs to a dataset version."""
    pairs = bind(ingest)
    images = bind(download, pairs)
    filtered = bind(filter, images)
    unique = bind(dedup, filtered)
    frozen_clip = bind(clip, unique)
    embeddings = bind(embed, unique, frozen_clip)
    snapshot = bind(curate, embeddings)
    return Dataset(snapshot, frozen_clip, bind(report, snapshot))


def finish(bind: Binder, data: Dataset, *parts: Any) -> Any:
    """Evaluate a system and publish it.

    Args:
        parts: nodes of its parts, in the order in which it takes them; the frozen CLIP among them where it needs one.
    """
    evaluation = bind(evaluate, data.snapshot, data.clip, *parts)
    return bind(publish, data.snapshot, evaluation, data.report, *parts)


DATASET_STAGE = "report"
"""The last stage of a dataset refresh."""
