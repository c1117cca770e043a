"""Training on the cluster, shared by all stages that train.

Ray Train places the workers, sets up their process group, restarts them when they die, and tells them if their node is about to
be preempted. On one machine, a single worker without a GPU is a task of Ray instead, which starts sooner. Trainings resume
from the trainer's own checkpoints, whose manifests mark them as complete.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow.compute as pc
import ray

from tasks import ranges, rows, signals, system_metrics
from tasks.deferred import DeferredTracker
from tasks.progress import Progress
from tasks.stage import Pinning, StageContext
from tasks.store import TOMBSTONES, Store
from tasks.tombstones import load_tombstones
from tasks.tracking import PREVIEWS, Tracker
from unclip import files
from unclip.background import rate_limited
from unclip.data import Places, Source
from unclip.errors import ConfigError, NonFiniteError, StageError, StoppedError, StorageError, UnclipError
from unclip.training import checkpoints
from unclip.training.objective import Monitor, Objective
from unclip.training.parallel import ALONE, Workers
from unclip.training.settings import TrainerConfig
from unclip.training.trainer import HUNG

# Branches of a DAG wait for each other's CPUs or GPUs; that is not a failure.
NO_TIMEOUT_SECONDS = 7 * 24 * 3600
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(NO_TIMEOUT_SECONDS))

MAX_FAILURES = 3
"""Times that a training is started again after its workers have died, or have raised what might not recur."""
FAILURE = "failure.json"
RAISED_BY_ALL_WORKERS = (StoppedError, NonFiniteError, ConfigError)
"""Errors that either all workers of a training raise, or none."""
STOP_CHECK_SECONDS = 2.0
"""Interval at which rank 0 checks for the file that asks trainings to stop."""
NUM_POINTS_WARNED = 10
"""Number of logged metrics points for which a warning stays beside the progress bar."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Everything that a worker needs to train one model."""

    build: Callable[[Workers], Objective]
    """Builds the model and its loss, in the worker."""
    sources: tuple[Source, ...]
    places: Callable[[], Places]
    """Places of the training rows."""
    config: TrainerConfig
    validation_places: Callable[[], Places] = lambda: Places([])
    """Places of the validation rows; disjoint from the training rows."""
    selection: str | None = None
    """Folder of range files (key, status) with the rows that the training reads; None does not watch for takedowns."""


def pin_trainer(config: Any, pinning: Pinning) -> Any:
    """Check a training's settings for its workers, and its reference curve, before anything starts; nothing changes."""
    try:
        config.trainer.check_workers(pinning.num_workers)
    except ConfigError as error:
        raise ConfigError(f"trainer.{error}") from None
    if config.trainer.reference_curve is not None:
        from unclip.training import curves

        curves.read(config.trainer.reference_curve)
    return config


def run_training(context: StageContext, training: Training) -> tuple[str, str]:
    """Train on the cluster, or in this process if `trains_in_process`, from this stage's last checkpoint if there is one.

    Returns:
        URI and digest of the finished model.

    Raises:
        StageError: the training failed; the message comes from the worker.
        UnclipError: see `trainer.train`; only if `trains_in_process`.
    """
    model = f"{context.folder}/model"
    if not files.exists(f"{model}/{checkpoints.MANIFEST}"):
        try:
            if context.run.trains_in_process:
                _train_here(context, training)
            else:
                _train_on_cluster(context, training)
        except StoppedError:
            with contextlib.suppress(OSError, StorageError):  # keep the original error
                if message := _Takedowns(context.run.storage, training.selection).message():
                    context.tracker.tags({"unclip.warning": message})
            raise
    return model, checkpoints.digest(model)


class _Takedowns:
    """Watches for takedowns of rows that a training reads."""

    def __init__(self, storage: str, selection: str | None) -> None:
        self._store, self._selection = Store(storage), selection
        self._stamp: str | None = None
        self._num_rows = 0

    def message(self) -> str:
        """Reason to stop; empty if no row of the training was taken down. Costs nothing until something is taken down."""
        stamp = files.stamp(self._store.uri(TOMBSTONES)) if self._selection is not None else None
        if stamp != self._stamp and self._selection is not None:
            keys = sorted(load_tombstones(self._store).keys)
            found = ranges.find_rows(self._selection, keys, ["key", "status"])
            self._num_rows, self._stamp = int(pc.sum(pc.equal(found["status"], rows.KEPT)).as_py() or 0), stamp
        if not self._num_rows:
            return ""
        return (
            f"{self._num_rows:,} rows of its dataset were taken down, so the training stopped. Run the pipeline again: it makes "
            f"a dataset version without them and trains on that."
        )

    def asks_to_stop(self, stop_uri: str) -> bool:
        """Return True if a row was taken down, or if there is a file at `stop_uri`."""
        with contextlib.suppress(OSError, StorageError):  # a short outage of the storage is no reason to fail
            return files.exists(stop_uri) or bool(self.message())
        return False

    def explain(self, error: StoppedError) -> StoppedError:
        """Error with the reason, if a takedown was the reason."""
        message = self.message()
        return StoppedError(message) if message else error


def _train_on_cluster(context: StageContext, training: Training) -> None:
    resources, folder = context.resources, context.folder
    for report in (FAILURE, HUNG):
        files.delete(f"{folder}/{report}")
    progress = context.progress(training.config.num_samples, "samples")
    worker_context = _WorkerContext(
        context.tracker,
        progress,
        resources.cpus_per_worker,
        context.run.stop_uri,
        context.run.storage,
        context.run.system_metrics_seconds,
    )
    loop = {"training": training, "context": worker_context, "folder": folder}
    progress.wait(f"for {resources}")
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    is_single = resources.num_workers == 1 and not resources.gpus_per_worker and len(nodes) == 1
    train_error = _train_in_task(loop, context) if is_single else _train_on_ray_train(loop, context)
    hung = files.read_json(f"{folder}/{HUNG}")["message"] if files.exists(f"{folder}/{HUNG}") else ""
    if hung:
        context.tracker.tags({"unclip.warning": hung})
    if files.exists(f"{folder}/model/{checkpoints.MANIFEST}"):
        return
    if files.exists(f"{folder}/{FAILURE}"):
        failure = files.read_json(f"{folder}/{FAILURE}")
        stage_error = StageError(failure["message"])
        stage_error.exit_code = failure["exit_code"]
        raise stage_error from train_error
    raise StageError(f"{context.stage}: {train_error} {hung}".rstrip()) from train_error


def _train_in_task(loop: Mapping[str, Any], context: StageContext) -> Exception | None:
    """Train in a task of Ray; returns the error that the last attempt ended with."""
    task = ray.remote(max_calls=1)(_work_alone)  # no later task shares its memory, nor its settings of torch
    options = {"name": context.stage, "max_retries": MAX_FAILURES, "retry_exceptions": True}
    try:
        ray.get(task.options(**options, **context.resources.options()).remote(loop))
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except ray.exceptions.RayError as error:
        return error
    return None


def _train_on_ray_train(loop: Mapping[str, Any], context: StageContext) -> Exception | None:
    """Train on workers of Ray Train; returns the error that the last attempt ended with."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from tasks.loopback import TorchConfig

    resources, hang_seconds = context.resources, loop["training"].config.hang_seconds
    trainer = TorchTrainer(
        _work,
        train_loop_config=dict(loop),
        # Longer than the watchdog waits, since the watchdog names the worker that hangs.
        torch_config=TorchConfig(timeout_s=round(max(1800.0, 2 * (hang_seconds or NO_TIMEOUT_SECONDS)))),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=resources.per_worker(),
        ),
        run_config=ray.train.RunConfig(
            name=context.fingerprint[:16],
            storage_path=str(context.scratch / "ray-train"),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        return next(iter(getattr(error, "worker_failures", {}).values()), error)
    return None


def _train_here(context: StageContext, training: Training) -> None:
    """Train in this process, on its GPU if it has one; on SIGTERM or Ctrl-C, write a checkpoint and stop."""
    import torch

    from unclip.training import parallel

    torch.set_num_threads(context.resources.cpus_per_worker)  # as in a worker: the order of sums depends on it
    progress = context.progress(training.config.num_samples, "samples")
    takedowns = _Takedowns(context.run.storage, training.selection)
    stops = rate_limited(STOP_CHECK_SECONDS, lambda: takedowns.asks_to_stop(context.run.stop_uri))
    interval = context.run.system_metrics_seconds
    with (
        signals.stop_on_signal() as is_stop_requested,
        _deferred(context.tracker, context.folder) as tracker,
        system_metrics.logged(tracker, interval),
    ):
        monitor = _MlflowMonitor(tracker, progress, context.folder, lambda: is_stop_requested() or stops())
        try:
            train_rows(training, context.folder, monitor, parallel.single_process())
        except StoppedError as error:
            raise takedowns.explain(error) from None


def _deferred(tracker: Tracker, folder: str) -> DeferredTracker:
    return DeferredTracker(tracker, f"{folder}/unlogged.json")


def train_rows(training: Training, folder: str, monitor: Monitor, workers: Workers) -> None:
    """Run this process's share of a training; raises the errors of `trainer.train`."""
    import torch

    from unclip.data import RowReader
    from unclip.training import trainer

    torch.manual_seed(training.config.seed)
    objective = training.build(workers)
    reader = RowReader(training.sources, training.places())
    held_out = training.validation_places()
    validation = RowReader(training.sources, held_out) if len(held_out) else None
    trainer.train(objective, reader, training.config, folder, monitor, workers, validation)


@dataclasses.dataclass(frozen=True)
class _WorkerContext:
    """The part of a stage's context that can be sent to a worker."""

    tracker: Tracker
    progress: Progress
    cpus_per_worker: int
    stop_uri: str
    storage: str
    system_metrics_seconds: float = 0


def _work(loop: Mapping[str, Any]) -> None:
    """Entry point of each Ray Train worker."""
    import ray.train
    import ray.train.torch

    ray_context = ray.train.get_context()
    workers = Workers(ray_context.get_world_rank(), ray_context.get_world_size(), ray.train.torch.get_device())
    _train_as(workers, loop, _NodeLoss().is_announced)


def _work_alone(loop: Mapping[str, Any]) -> None:
    """Entry point of a training without other workers, on CPUs."""
    _train_as(ALONE, loop, lambda: False)


def _train_as(workers: Workers, loop: Mapping[str, Any], wants_checkpoint: Callable[[], bool]) -> None:
    """Do the work of one worker; errors that would recur are written to `FAILURE`."""
    import torch

    training: Training = loop["training"]
    context: _WorkerContext = loop["context"]
    torch.set_num_threads(context.cpus_per_worker)
    if workers.rank == 0:
        context.progress.begin()

    takedowns = _Takedowns(context.storage, training.selection)

    def is_stop_requested() -> bool:
        return workers.rank == 0 and takedowns.asks_to_stop(context.stop_uri)

    stop_requested = rate_limited(STOP_CHECK_SECONDS, is_stop_requested)
    interval = context.system_metrics_seconds if workers.rank == 0 else 0
    try:
        with _deferred(context.tracker, loop["folder"]) as tracker, system_metrics.logged(tracker, interval):
            monitor = _MlflowMonitor(tracker, context.progress, loop["folder"], stop_requested, wants_checkpoint)
            train_rows(training, loop["folder"], monitor, workers)
    except UnclipError as given:
        error = takedowns.explain(given) if isinstance(given, StoppedError) else given
        with contextlib.suppress(StorageError):  # if the file cannot be written, Ray reports the error
            files.write_json(f"{loop['folder']}/{FAILURE}", {"message": str(error), "exit_code": error.exit_code})
            # The error would recur, so a restart is useless. But if one worker fails alone, only raising ends the others.
            if workers.world_size == 1 or isinstance(error, RAISED_BY_ALL_WORKERS):
                return
        raise


class _NodeLoss:
    """Detects that a node of this training is about to be preempted, as spot machines are; reports each node once.

    Asking Ray Train is a collective, so all workers must ask in the same steps; the clock of rank 0 decides which.
    """

    SECONDS = 5.0

    def __init__(self) -> None:
        self._announced: list[str] = []
        self._num_steps = self._steps_left = 1
        self._asked_at = time.monotonic()

    def is_announced(self) -> bool:
        """Return True if a node was announced since the last call; every worker must call it in every step."""
        import ray.train
        import ray.train.collective

        self._steps_left -= 1
        if self._steps_left > 0:
            return False
        info = ray.train.get_preemption_info()
        step_seconds = (time.monotonic() - self._asked_at) / self._num_steps
        num_steps = min(1000, max(1, round(self.SECONDS / max(step_seconds, 1e-3))))
        self._num_steps = self._steps_left = ray.train.collective.broadcast_from_rank_zero(num_steps)
        self._asked_at = time.monotonic()
        announced = info.preempted_node_ids if info else []
        is_new, self._announced = not set(announced) <= set(self._announced), announced
        return is_new


class _MlflowMonitor(Monitor):
    """Sends metrics and previews to MLflow and progress to the console; keeps the film of the previews in the stage's folder."""

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
