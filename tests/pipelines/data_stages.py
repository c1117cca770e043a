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

from tasks import dataflow, ranges
from tasks.stage import Artifact, Call, Resources, Run, Stage, execute
from tasks.stages import ingest
from tasks.tracking import Tracker
from unclip import files

STAGES = ("ingest", "download", "filter", "dedup", "embed", "curate", "report")
NUM_NODES = 3
ROWS_PER_RANGE = 40
OPEN = "open"
"""File that opens a gate."""


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
    until: str = STAGES[-1]
    """Last stage: `ingest`, `embed` or the last of all."""
    gpus: str = "0"
    """GPUs of a worker that embeds."""
    gib: str = "0"
    """GiB of memory of a worker that embeds."""


def run_stages(job: Job) -> None:
    ranges.ROWS_PER_RANGE = ROWS_PER_RANGE  # like the numbers below, it counts in the process of the stage only
    ingest.SMALL_BYTES = 0
    pairs = run_stage(job, ingest.ingest, ingest.IngestConfig(job.urls))
    if job.until == "ingest":
        return

    from tasks import derived, duplicates, index, semantic
    from tasks.stages import clip, curate, dedup, download, embed, filter, report

    index._PARTS_AT_ONCE = duplicates._FILES_AT_ONCE = derived.FILES_AT_ONCE = curate.FILES_AT_ONCE = 2
    semantic._GROUP_ROWS = 30
    fetching = download.DownloadConfig(
        shard_size=30, timeout_seconds=5.0, allow_hosts=(job.allow_host,), stall_seconds=600.0
    )
    images = run_stage(job, download.download, fetching, pairs)
    filtered = run_stage(job, filter.filter, filter.FilterConfig(max_caption_repeats=2), images)
    unique = run_stage(job, dedup.dedup, dedup.DedupConfig(phash_distance=1, holdout=0.1), filtered)
    frozen_clip = run_stage(job, clip.clip, clip.ClipConfig(f"local-dir:{job.clip}", None), unique)
    embedded = run_stage(job, embed.embed, embed.EmbedConfig(batch_size=16), unique, frozen_clip)
    if job.until == "embed":
        return
    dataset = run_stage(job, curate.curate, curate.CurateConfig(semantic_distance=1e-6, cluster_size=2), embedded)
    run_stage(job, report.report, report.ReportConfig(), dataset)


def run_stage(job: Job, stage: Stage, config: Any, *parents: Artifact) -> Artifact:
    watch_tasks(job.started, stage.name)
    resources = {"embed": Resources(NUM_NODES, 1, float(job.gpus), float(job.gib))}
    result = execute(Call(stage, config), Run("r1", "test", job.storage, Tracker("", ""), "0", resources), parents)
    assert isinstance(result, Artifact), result
    return result


def watch_tasks(started: str, stage: str) -> None:
    """Make the tasks that start from now on wait at the gates of this stage."""
    folder = f"{started}/{stage}"

    @functools.cache
    def remote(function: Callable[..., Any]) -> Any:
        return ray.remote(gated(function, folder))

    dataflow._remote = remote
    if stage == "download":
        from tasks.stages import download

        task: Any = download._download_shard
        download._download_shard = ray.remote(**task._default_options)(gated(task._function, folder))
    if stage == "embed":
        from tasks.stages import embed

        actor: Any = embed.Embedder.__ray_metadata__.modified_class  # type: ignore[attr-defined]

        class GatedEmbedder(actor):  # type: ignore[misc]
            def embed(self, shard: Any) -> Any:
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
