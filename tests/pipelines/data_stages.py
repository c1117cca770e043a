"""The data stages in a process of its own, over several key ranges; tests see where tasks run, and stop them at gates.

A task writes a file `started/<stage>/<step>/<task>.json` and then waits for the file `open` in the folder of its step or of
its stage. A step is named after the function that its tasks call.
"""

import dataclasses
import functools
import inspect
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from tasks import dataflow, index, ranges
from tasks.stage import Artifact, Call, Resources, Run, execute
from tasks.stages import curate, dedup, download, embed, filter, ingest, report
from tasks.stages.clip import ClipConfig, clip
from tasks.tracking import Tracker
from unclip import files

STAGES = ("ingest", "download", "filter", "dedup", "embed", "curate", "report")
NUM_NODES = 3
OPEN = "open"


@dataclasses.dataclass(frozen=True)
class Job:
    """Arguments of the process."""

    address: str
    """Address of the Ray cluster."""
    storage: str
    started: str
    """Folder for the files of the tasks that have started."""
    urls: str
    allow_host: str
    clip: str
    """Folder of a CLIP."""


def run_stages(job: Job) -> None:
    make_parts_small()
    run = Run(
        "r1", "test", job.storage, Tracker("", ""), "0", resources={"embed": Resources(NUM_NODES, cpus_per_worker=1)}
    )

    def done(stage: Any, config: Any, *parents: Artifact) -> Artifact:
        watch_tasks(job.started, stage.name)
        result = execute(Call(stage, config), run, parents)
        assert isinstance(result, Artifact), result
        return result

    fetching = download.DownloadConfig(
        shard_size=30, timeout_seconds=5.0, allow_hosts=(job.allow_host,), stall_seconds=600.0
    )
    pairs = done(ingest.ingest, ingest.IngestConfig(job.urls))
    images = done(download.download, fetching, pairs)
    filtered = done(filter.filter, filter.FilterConfig(max_caption_repeats=2), images)
    unique = done(dedup.dedup, dedup.DedupConfig(phash_distance=1, holdout=0.1), filtered)
    frozen_clip = done(clip, ClipConfig(f"local-dir:{job.clip}", None), unique)
    embedded = done(embed.embed, embed.EmbedConfig(batch_size=16), unique, frozen_clip)
    dataset = done(curate.curate, curate.CurateConfig(semantic_distance=1e-4, min_clip_score=-1.0), embedded)
    done(report.report, report.ReportConfig(), dataset)


def make_parts_small() -> None:
    """Give every step of the stages several tasks; all these numbers count in the process of the stage only."""
    ranges.ROWS_PER_RANGE = 40
    ingest.SMALL_BYTES = 0
    index._PARTS_AT_ONCE = embed.FILES_AT_ONCE = curate.FILES_AT_ONCE = 2


def watch_tasks(started: str, stage: str) -> None:
    """Make the tasks that start from now on wait at the gates of this stage."""
    folder = f"{started}/{stage}"

    @functools.cache
    def remote(function: Callable[..., Any]) -> Any:
        return ray.remote(gated(function, folder))

    dataflow._remote = remote
    if stage == "download":
        task: Any = download._download_shard
        download._download_shard = ray.remote(**task._default_options)(gated(task._function, folder))
    if stage == "embed":
        actor: Any = embed.Embedder.__ray_metadata__.modified_class  # type: ignore[attr-defined]

        class GatedEmbedder(actor):  # type: ignore[misc]
            def embed(self, shard: embed.Shard) -> Any:
                wait_at_gate(f"{folder}/embed")
                return super().embed(shard)

        embed.Embedder = ray.remote(GatedEmbedder)  # type: ignore[misc]


def gated(function: Callable[..., Any], folder: str) -> Callable[..., Any]:
    def enter(*arguments: Any) -> None:
        inner = arguments[0] if callable(arguments[0]) else function
        wait_at_gate(f"{folder}/{getattr(inner, 'func', inner).__name__}")

    def call(*arguments: Any) -> Any:
        enter(*arguments)
        return function(*arguments)

    def generate(*arguments: Any) -> Iterator[Any]:
        enter(*arguments)
        yield from function(*arguments)

    return generate if inspect.isgeneratorfunction(function) else call


def wait_at_gate(folder: str) -> None:
    files.write_json(f"{folder}/{uuid.uuid4()}.json", ray.get_runtime_context().get_node_id())
    step = Path(folder)
    while not ((step / OPEN).exists() or (step.parent / OPEN).exists()):
        time.sleep(0.02)


if __name__ == "__main__":
    job = Job(*sys.argv[1:])
    local = {"num_cpus": 2, "include_dashboard": False} if job.address == "local" else {}
    ray.init(address=job.address, log_to_driver=False, **local)
    run_stages(job)
