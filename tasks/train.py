"""Training on Ray Train: what the stages of the prior, the decoder, the upsamplers and CLIP share.

Ray Train places the workers, sets up their process group and restarts them when they die. What is resumed from is the
trainer's own checkpoints, whose manifests say that they are complete.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from tasks import signals
from tasks.deferred import DeferredTracker
from tasks.progress import Progress
from tasks.stage import StageContext
from tasks.tracking import PREVIEWS, Tracker
from unclip import checkpoints, files
from unclip.data import Source
from unclip.errors import StageError, UnclipError
from unclip.parallel import Workers
from unclip.trainer import Monitor, Objective, TrainerConfig

# Branches wait for each other's CPUs or GPUs; that is no failure.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(7 * 24 * 3600))


@dataclasses.dataclass(frozen=True)
class Training:
    """All that a worker needs to train one model."""

    build: Callable[[Workers], Objective]
    """Makes the model and its loss, in the worker."""
    sources: tuple[Source, ...]
    keys: Callable[[], list[str]]
    """The rows to train on."""
    config: TrainerConfig
    validation_keys: Callable[[], list[str]] = list
    """The rows to validate with, none of which is trained on."""


def run_training(context: StageContext, training: Training) -> tuple[str, str]:
    """Train on the cluster, or here when the run says so, from this stage's last checkpoint if there is one.

    Returns:
        URI of the finished model, and its digest.

    Raises:
        StageError: the training failed; the message is the worker's.
        UnclipError: as `trainer.train`, when it trains here.
    """
    model = f"{context.folder}/model"
    if not files.exists(f"{model}/{checkpoints.MANIFEST}"):
        if context.run.trains_here:
            _train_here(context, training)
        else:
            _train_on_cluster(context, training)
    return model, checkpoints.digest(model)


def _train_on_cluster(context: StageContext, training: Training) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    resources, folder = context.resources, context.folder
    files.delete(f"{folder}/failure.json")
    progress = context.progress(training.config.num_samples, "samples")
    for_worker = _WorkerContext(context.tracker, progress, resources.cpus_per_worker)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"training": training, "context": for_worker, "folder": folder},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=resources.per_worker(),
        ),
        run_config=ray.train.RunConfig(
            name=context.fingerprint[:16],
            storage_path=str(context.scratch / "ray-train"),
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        causes = list(getattr(error, "worker_failures", {}).values()) or [error]
        raise StageError(f"{context.stage}: {causes[0]}") from causes[0]
    if files.exists(f"{folder}/failure.json"):
        raise StageError(files.read_json(f"{folder}/failure.json")["message"])


def _train_here(context: StageContext, training: Training) -> None:
    """In this process, on its GPU if it has one; asked to end, it writes a checkpoint first."""
    import torch

    from unclip import parallel

    torch.set_num_threads(context.resources.cpus_per_worker)  # as a worker would: sums depend on it
    progress = context.progress(training.config.num_samples, "samples")
    with signals.asked_to_stop() as is_asked, _deferred(context.tracker, context.folder) as tracker:
        monitor = _MlflowMonitor(tracker, progress)
        monitor.wants_stop = is_asked  # type: ignore[method-assign]
        train_rows(training, context.folder, monitor, parallel.by_itself())


def _deferred(tracker: Tracker, folder: str) -> contextlib.closing[DeferredTracker]:
    return contextlib.closing(DeferredTracker(tracker, f"{folder}/unlogged.json"))


def train_rows(training: Training, folder: str, monitor: Monitor, workers: Workers) -> None:
    """This process's part of a training; raises as `trainer.train`."""
    import torch

    from unclip import trainer
    from unclip.data import RowReader

    torch.manual_seed(training.config.seed)
    objective = training.build(workers)
    reader = RowReader(training.sources, training.keys())
    held_out = training.validation_keys()[: training.config.validation_rows]
    validation = RowReader(training.sources, held_out) if held_out else None
    trainer.train(objective, reader, training.config, folder, monitor, workers, validation)


@dataclasses.dataclass(frozen=True)
class _WorkerContext:
    """The part of a stage's context that can be sent to a worker."""

    tracker: Tracker
    progress: Progress
    cpus_per_worker: int


def _work(loop: Mapping[str, Any]) -> None:
    """Runs in each Ray Train worker."""
    import ray.train
    import ray.train.torch
    import torch

    training: Training = loop["training"]
    context: _WorkerContext = loop["context"]
    place = ray.train.get_context()
    workers = Workers(place.get_world_rank(), place.get_world_size(), ray.train.torch.get_device())
    torch.set_num_threads(context.cpus_per_worker)
    try:
        with _deferred(context.tracker, loop["folder"]) as tracker:
            train_rows(training, loop["folder"], _MlflowMonitor(tracker, context.progress), workers)
    except UnclipError as error:  # would fail again in the same way: no use in Ray Train's restarts
        files.write_json(f"{loop['folder']}/failure.json", {"message": str(error)})


class _MlflowMonitor(Monitor):
    """Metrics and previews to MLflow, a progress line to the console."""

    def __init__(self, tracker: DeferredTracker, progress: Progress) -> None:
        self.tracker, self.progress = tracker, progress

    def start(self, samples_seen: int, num_samples: int) -> None:
        self.progress.start(samples_seen)
        self.samples_seen = samples_seen

    def step(self, samples_seen: int, loss: float) -> None:
        self.progress.update(samples_seen - self.samples_seen, f"loss {loss:.4f}")
        self.samples_seen = samples_seen

    def metrics(self, values: Mapping[str, float], samples_seen: int) -> None:
        self.tracker.metrics(values, samples_seen)

    def preview(self, images: Any, samples_seen: int) -> None:
        from unclip import pictures

        self.tracker.bytes(pictures.png(pictures.grid(images, columns=8)), f"{PREVIEWS}/{samples_seen:012d}.png")
