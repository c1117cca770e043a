"""Training on Ray Train: what all stages that train share.

Ray Train places the workers, sets up their process group and restarts them when they die. What is resumed from is the
trainer's own checkpoints, whose manifests say that they are complete.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from tasks import signals
from tasks.deferred import DeferredTracker
from tasks.progress import Progress
from tasks.stage import Pinning, StageContext
from tasks.tracking import PREVIEWS, Tracker
from unclip import files
from unclip.background import now_and_then
from unclip.data import Source
from unclip.errors import ConfigError, NonFiniteError, StageError, StoppedError, StorageError, UnclipError
from unclip.training import checkpoints
from unclip.training.objective import Monitor, Objective
from unclip.training.parallel import Workers
from unclip.training.settings import TrainerConfig
from unclip.training.trainer import HUNG

# Branches wait for each other's CPUs or GPUs; that is no failure.
FOR_EVER_SECONDS = 7 * 24 * 3600
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(FOR_EVER_SECONDS))

FAILURE = "failure.json"
OF_ALL_WORKERS = (StoppedError, NonFiniteError, ConfigError)
"""Errors that are raised by all workers of a training, or none."""
LOOK_SECONDS = 2.0
"""Between looks of a worker for the file that asks trainings to stop."""
NUM_POINTS_WARNED = 10
"""Points of the metrics during which a warning stands beside the progress bar."""


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


def pin_trainer(config: Any, _: Pinning) -> Any:
    """Check the reference curve of a training before anything starts; the settings stay as they are."""
    if config.trainer.reference_curve is not None:
        from unclip.training import curves

        curves.read(config.trainer.reference_curve)
    return config


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
    from ray.train.torch import TorchConfig, TorchTrainer

    resources, folder = context.resources, context.folder
    for report in (FAILURE, HUNG):
        files.delete(f"{folder}/{report}")
    progress = context.progress(training.config.num_samples, "samples")
    for_worker = _WorkerContext(context.tracker, progress, resources.cpus_per_worker, context.run.stop_uri)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"training": training, "context": for_worker, "folder": folder},
        # Longer than the watchdog waits, which names who hangs.
        torch_config=TorchConfig(timeout_s=round(max(1800.0, 2 * (training.config.hang_seconds or FOR_EVER_SECONDS)))),
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
    failed: Exception | None = None
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        failed = next(iter(getattr(error, "worker_failures", {}).values()), error)
    hung = files.read_json(f"{folder}/{HUNG}")["message"] if files.exists(f"{folder}/{HUNG}") else ""
    if hung:
        context.tracker.tags({"unclip.warning": hung})
    if files.exists(f"{folder}/model/{checkpoints.MANIFEST}"):
        return
    if files.exists(f"{folder}/{FAILURE}"):
        failure = files.read_json(f"{folder}/{FAILURE}")
        stage_error = StageError(failure["message"])
        stage_error.exit_code = failure["exit_code"]
        raise stage_error from failed
    raise StageError(f"{context.stage}: {failed} {hung}".rstrip()) from failed


def _train_here(context: StageContext, training: Training) -> None:
    """In this process, on its GPU if it has one; asked to end, it writes a checkpoint first."""
    import torch

    from unclip.training import parallel

    torch.set_num_threads(context.resources.cpus_per_worker)  # as a worker would: sums depend on it
    progress = context.progress(training.config.num_samples, "samples")
    with signals.asked_to_stop() as is_asked, _deferred(context.tracker, context.folder) as tracker:
        monitor = _MlflowMonitor(tracker, progress, context.folder, is_asked)
        train_rows(training, context.folder, monitor, parallel.by_itself())


def _deferred(tracker: Tracker, folder: str) -> DeferredTracker:
    return DeferredTracker(tracker, f"{folder}/unlogged.json")


def train_rows(training: Training, folder: str, monitor: Monitor, workers: Workers) -> None:
    """This process's part of a training; raises as `trainer.train`."""
    import torch

    from unclip.data import RowReader
    from unclip.training import trainer

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
    stop_uri: str


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

    def is_asked_to_stop() -> bool:
        with contextlib.suppress(OSError):  # a store that is away for a while is no reason to fail
            return workers.rank == 0 and files.exists(context.stop_uri)
        return False

    asks_to_stop = now_and_then(LOOK_SECONDS, is_asked_to_stop)
    try:
        with _deferred(context.tracker, loop["folder"]) as tracker:
            monitor = _MlflowMonitor(tracker, context.progress, loop["folder"], asks_to_stop, _NodeLoss().is_announced)
            train_rows(training, loop["folder"], monitor, workers)
    except UnclipError as error:
        with contextlib.suppress(StorageError):  # where no file can be written, Ray Train tells what happened
            files.write_json(f"{loop['folder']}/{FAILURE}", {"message": str(error), "exit_code": error.exit_code})
            # It would happen again: no use in Ray Train's restarts. Other workers wait for one that fails alone, though.
            if workers.world_size == 1 or isinstance(error, OF_ALL_WORKERS):
                return
        raise


class _NodeLoss:
    """Whether a node of this training is about to be taken back, as spot machines are; each node is told of once.

    Asking Ray Train is a collective, so all workers must do it in the same steps: the first one's clock says in which.
    """

    SECONDS = 5.0

    def __init__(self) -> None:
        self._announced: list[str] = []
        self._num_steps = self._steps_left = 1
        self._asked_at = time.monotonic()

    def is_announced(self) -> bool:
        """Called in every step by every worker."""
        import ray.train
        import ray.train.collective

        self._steps_left -= 1
        if self._steps_left > 0:
            return False
        info = ray.train.get_preemption_info()
        step_seconds = (time.monotonic() - self._asked_at) / self._num_steps
        wanted = min(1000, max(1, round(self.SECONDS / max(step_seconds, 1e-3))))
        self._num_steps = self._steps_left = ray.train.collective.broadcast_from_rank_zero(wanted)
        self._asked_at = time.monotonic()
        announced = info.preempted_node_ids if info else []
        is_new, self._announced = not set(announced) <= set(self._announced), announced
        return is_new


class _MlflowMonitor(Monitor):
    """Metrics and previews to MLflow, a progress line to the console; the film of the previews is kept in the stage's folder."""

    def __init__(
        self,
        tracker: DeferredTracker,
        progress: Progress,
        folder: str,
        wants_stop: Callable[[], bool],
        wants_checkpoint: Callable[[], bool] = lambda: False,
    ) -> None:
        self.tracker, self.progress, self.folder = tracker, progress, folder
        self.wants_stop, self.wants_checkpoint = wants_stop, wants_checkpoint  # type: ignore[method-assign]
        self.warning, self.num_points_warned = "", 0

    def start(self, samples_seen: int, num_samples: int) -> None:
        self.progress.start(samples_seen)
        self.samples_seen = samples_seen

    def step(self, samples_seen: int, loss: float) -> None:
        self.progress.update(samples_seen - self.samples_seen, f"loss {loss:.4f}{self.warning}")
        self.samples_seen = samples_seen

    def metrics(self, values: Mapping[str, float], samples_seen: int) -> None:
        self.tracker.metrics(values, samples_seen)
        self.num_points_warned += 1
        if self.num_points_warned > NUM_POINTS_WARNED:
            self.warning = ""

    def warn(self, message: str) -> None:
        super().warn(message)
        self.warning, self.num_points_warned = f"  ! {message}", 0
        self.tracker.tags({"unclip.warning": message})

    def preview(self, images: Any, samples_seen: int) -> None:
        from unclip import imaging
        from unclip.training import film

        self.tracker.bytes(imaging.png(imaging.grid(images, columns=8)), f"{PREVIEWS}/{samples_seen:012d}.png")
        strip = film.add_preview(f"{self.folder}/{PREVIEWS}", images, samples_seen)
        self.tracker.bytes(strip, f"{PREVIEWS}/{film.FILM_STRIP}")
