"""The stage contract: the types that every stage of a pipeline uses, and the decorator that declares a stage.

A stage is a function `(context, config, *parents) -> Output`. The decorator turns it into a node of Ray's own DAG. When
the node runs, the stage's fingerprint (name, version, resolved config, digests of its parents) is looked up in the store:
a committed result is returned; otherwise the function runs under an MLflow child run and its result is committed.
To resume, run the same command again, on any machine that sees the storage.
"""

import contextlib
import dataclasses
import importlib
import inspect
import logging
import time
import traceback
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray

from tasks.lock import TABLES, Held, Owner, lock, result_lock
from tasks.progress import Progress, times
from tasks.run_records import is_running
from tasks.store import INTERMEDIATE, TOMBSTONES, Store
from tasks.tombstones import refuse_if_recorded
from tasks.tracking import Tracker
from unclip import files, seals
from unclip.background import run_periodically
from unclip.config import fingerprint, require, to_dict, without_operational
from unclip.errors import AlreadyRunningError, StageError, StoppedError, StorageError, UnclipError
from unclip.messages import reason_of, without_credentials
from unclip.scratch import scratch_folder

if typing.TYPE_CHECKING:  # a stage that trains nothing needs no torch
    from unclip.systems.part import Part

log = logging.getLogger(__name__)
WAIT_SECONDS = 600.0
"""Time that a stage of a run waits for another owner of its lock, such as a takedown."""
STOP_IF_LOST_SECONDS = 5.0
TAKEN_DOWN_MEANWHILE = (
    "Rows were taken down meanwhile. Run the same command again: it makes a dataset version without them, and a training that "
    "reads none of them continues."
)


@dataclasses.dataclass(frozen=True)
class Output:
    """Result of a stage function."""

    uri: str
    """Folder, file or table that holds the result."""
    digest: str
    """sha256 of the content; does not depend on the run that made it."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Facts for later stages and for users: counts, table versions, metrics. JSON values only."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A committed result. Stages pass artifacts, never data."""

    stage: str
    fingerprint: str
    uri: str
    digest: str
    facts: Mapping[str, Any]
    seconds: float
    """Duration of the stage when it made this artifact, without the time in which it waited for CPUs or GPUs."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Replaces an artifact if its stage or an earlier one failed, so that independent branches finish."""

    stage: str
    message: str
    exit_code: int = 1
    """Exit code of a command that runs only this stage."""


@dataclasses.dataclass(frozen=True)
class Resources:
    """Resources of each training and embedding worker. Not part of any fingerprint: they only affect speed."""

    num_workers: int = 1
    """Workers that train one model together."""
    cpus_per_worker: int = 2
    """Logical CPUs and torch threads of a worker."""
    gpus_per_worker: float = 0
    """GPUs of a worker; 0 trains on CPUs."""
    gib_per_worker: float = 0
    """GiB of memory that a worker reserves on its node; 0 reserves none."""

    def __post_init__(self) -> None:
        require(self.num_workers >= 1, "num_workers", self.num_workers, "at least 1")
        require(self.cpus_per_worker >= 1, "cpus_per_worker", self.cpus_per_worker, "at least 1")
        require(self.gpus_per_worker >= 0, "gpus_per_worker", self.gpus_per_worker, "0 or more")
        require(self.gib_per_worker >= 0, "gib_per_worker", self.gib_per_worker, "0 or more")

    def __str__(self) -> str:
        """Amounts in words, such as 2 CPUs, or 8 x 1 GPU."""
        amount, unit = (self.gpus_per_worker, "GPU") if self.gpus_per_worker else (self.cpus_per_worker, "CPU")
        each = f"{amount:g} {unit}{'' if amount == 1 else 's'}"
        return each if self.num_workers == 1 else f"{self.num_workers} x {each}"

    def per_worker(self) -> dict[str, float]:
        """Resources of one worker in Ray's format."""
        amounts = {"CPU": float(self.cpus_per_worker), "GPU": float(self.gpus_per_worker)}
        amounts["memory"] = round(self.gib_per_worker * (1 << 30))
        return {name: amount for name, amount in amounts.items() if amount}

    def options(self) -> dict[str, Any]:
        """Options of a Ray actor that is one worker."""
        memory = self.per_worker().get("memory")
        return {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_worker, "memory": memory}


@dataclasses.dataclass(frozen=True)
class OwnResources:
    """Resources of the workers of one stage, in the place of those of all stages; None leaves these as they are."""

    num_workers: int | None = None
    """See `Resources`."""
    cpus_per_worker: int | None = None
    """See `Resources`."""
    gpus_per_worker: float | None = None
    """See `Resources`."""
    gib_per_worker: float | None = None
    """See `Resources`."""

    def __post_init__(self) -> None:
        self.on(Resources())

    def on(self, shared: Resources) -> Resources:
        """Resources of the stage, from those of all stages.

        Raises:
            ConfigError: a value is out of its range.
        """
        own = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        values = {field.name: getattr(shared, field.name) for field in dataclasses.fields(Resources)}
        return Resources(**values | own)


@dataclasses.dataclass(frozen=True)
class StageResources(Resources):
    """Resources by stage: these values, unless the stage has its own, given by a field of a subclass.

    A field is named after its stage. For a stage with several members, `x-a` and `x-b`, the field `xs` maps the keys `a` and
    `b` to resources.
    """

    def of(self, stage_name: str) -> Resources:
        return self._own(stage_name).on(self)

    def with_cpus(self, stage_name: str, cpus_per_worker: int) -> typing.Self:
        """Copy with other CPUs for the workers of one stage; a stage without a field keeps those of all stages."""
        field, key = _field(stage_name)
        if not hasattr(self, field):
            return self
        own = dataclasses.replace(self._own(stage_name), cpus_per_worker=cpus_per_worker)
        changed: dict[str, Any] = {field: {**getattr(self, field), key: own} if key else own}
        return dataclasses.replace(self, **changed)

    def _own(self, stage_name: str) -> OwnResources:
        field, key = _field(stage_name)
        found = getattr(self, field, None)
        own: OwnResources | None = (found or {}).get(key) if key else found
        return own or OwnResources()


def _field(stage_name: str) -> tuple[str, str]:
    """Field of `StageResources` for a stage, and its key there if it is one of several members, otherwise ""."""
    name, _, key = stage_name.partition("-")
    return (f"{name}s" if key else name), key


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a pipeline: its storage and its tracking."""

    id: str
    pipeline: str
    storage: str
    tracker: Tracker
    experiment_id: str
    resources: Mapping[str, Resources] = dataclasses.field(default_factory=dict)
    """Resources of workers by stage; others take the defaults. Plain values: the class of a system's settings would make every
    worker import the system."""
    trains_in_process: bool = False
    """Train models in the calling process rather than by workers of a cluster."""
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tags of its MLflow runs: user, command, version of the code; see `tasks.origin`."""
    system_metrics_seconds: float = 0
    """Interval of the system metrics of trainings in MLflow; 0 logs none."""

    def progress_uri(self, stage_name: str) -> str:
        """URI of the file with the progress of a stage."""
        return Store(self.storage).uri("runs", self.id, "progress", f"{stage_name}.json")

    @property
    def stop_uri(self) -> str:
        """URI of a file that makes this run's trainings write a checkpoint and stop once it exists."""
        return Store(self.storage).uri("runs", self.id, "progress", "stop")

    def is_abandoned(self) -> bool:
        """Return True if the driver of this run has ended or given up, so that results of its tasks must be discarded.

        A run without a record, and a run that is driven from another machine, count as running.
        """
        store, record = Store(self.storage), ("runs", self.id, "run.json")
        return store.exists(*record) and not is_running(store.read_json(*record))


@dataclasses.dataclass(frozen=True)
class StageContext:
    """Context of a stage function, besides its config and parents."""

    run: Run
    stage: str
    fingerprint: str
    store: Store
    tracker: Tracker
    """Logs to this stage's MLflow run."""
    scratch: Path
    """Local folder of this attempt only; removed when the stage ends."""

    @property
    def resources(self) -> Resources:
        """Resources of each worker of this stage."""
        return self.run.resources.get(self.stage, Resources())

    def log_dataset(self, digest: str, source: str, facts: Mapping[str, Any]) -> None:
        """Record in MLflow which dataset version this stage reads; see `Tracker.dataset`."""
        source, facts = self.store.portable([source, facts])
        self.tracker.dataset(self.run.pipeline, digest, source, facts)

    def progress(self, total: int, unit: str, done: int = 0) -> Progress:
        """Progress over `total` units of work, shown on the console of this run; may be sent to a worker."""
        return Progress(self.run.progress_uri(self.stage), total, unit, done)

    @property
    def folder(self) -> str:
        """URI of the folder for this stage's files; the same for every attempt, so that a new attempt can resume."""
        return self.store.uri("artifacts", self.stage, self.fingerprint)

    @property
    def intermediate(self) -> str:
        """URI of a folder for files that tasks of this stage pass on to each other; every node sees it.

        It is removed when the stage has ended well, and after a kill by the next attempt or a takedown, since it may hold rows.
        """
        return f"{self.folder}/{INTERMEDIATE}"


@dataclasses.dataclass(frozen=True)
class Pinning:
    """Context in which a stage checks and pins its settings before a run."""

    store: Store
    config: Any
    """Settings of the whole pipeline."""
    retry_failed: bool = False
    """Fetch rows that failed for transient reasons again."""
    num_workers: int = 1
    """Workers of the stage."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A declared stage. `bind` it to its config and parents to place it in a DAG."""

    name: str
    version: int
    function: Callable[..., Output]
    has_workers: bool = False
    """The stage starts workers, which get the stage's `Resources`."""
    pin: Callable[[Any, Pinning], Any] | None = None
    """Function that checks the settings before a run starts and pins the files they refer to by their digests."""
    shows_rows: bool = False
    """The stage logs images or text of dataset rows, so a takedown must search its logs."""
    part: "Part[Any] | None" = None
    """The part that the stage trains, if any."""
    reads_snapshot: bool = False
    """The stage reads what others have finished and changes no table, so it runs beside stages and takedowns that do."""
    factory: tuple[Callable[[Any], "Stage"], Any] | None = None
    """Module-level function and its argument that create this stage, if it is not a module attribute itself."""

    @property
    def help(self) -> str:
        return inspect.getdoc(self.function) or ""

    def member(self, key: str) -> "Stage":
        """Copy of this stage as one of several in a DAG, each with its own settings: `x` becomes `x-256`."""
        return dataclasses.replace(self, name=f"{self.name}-{key}")

    def bind(self, run: Run, config: Any, *parents: Any) -> Any:
        """Create a node of a Ray DAG; its result is an `Artifact` or a `Failure`."""
        return _run_stage.options(name=self.name).bind(Call(self, config), run, *parents)

    def __reduce__(self) -> Any:
        # The name in the module is this object, so workers import it instead of unpickling the function.
        if self.factory is not None:
            return _remake_stage, (*self.factory, self.name)
        return _import_stage, (self.function.__module__, self.function.__name__, self.name)

    def lock(self, stage_fingerprint: str) -> str:
        """Name of the lock that the stage holds while it works, for `tasks.lock`."""
        return result_lock(self.name, stage_fingerprint) if self.reads_snapshot else TABLES

    def fingerprint(self, config: Any, parents: typing.Iterable[str], store: Store) -> str:
        """Fingerprint of the stage with these settings and inputs, given by their digests; the same wherever the storage is."""
        settings = store.portable(without_operational(config))
        return fingerprint(self.name, self.version, settings, list(parents))


@dataclasses.dataclass(frozen=True)
class Call:
    """A stage with its resolved configuration."""

    stage: Stage
    config: Any


def stage(
    name: str,
    version: int,
    *,
    has_workers: bool = False,
    pin: Callable[[Any, Pinning], Any] | None = None,
    shows_rows: bool = False,
    reads_snapshot: bool = False,
) -> Callable[[Callable[..., Output]], Stage]:
    """Declare a stage. Increase `version` when a code change affects its results.

    Args:
        has_workers: see `Stage`.
        pin: `(settings, pinning) -> settings`; see `Stage`.
        shows_rows: see `Stage`.
        reads_snapshot: see `Stage`.
    """
    return lambda function: Stage(name, version, function, has_workers, pin, shows_rows, reads_snapshot=reads_snapshot)


def find_artifact(store: Store, stage_name: str, stage_fingerprint: str) -> Artifact | None:
    """The committed artifact with this fingerprint, if there is one."""
    path = ("stages", stage_name, f"{stage_fingerprint}.json")
    return Artifact(**store.read_json(*path)) if store.exists(*path) else None


def execute(call: Call, run: Run, parents: typing.Sequence[Artifact | Failure]) -> Artifact | Failure:
    """Run one stage, or return its committed artifact."""
    store, name = Store(run.storage), call.stage.name
    failed = [parent for parent in parents if isinstance(parent, Failure)]
    if failed:
        _record(store, run, name, state="skipped", message=f"{failed[0].stage} failed")
        return failed[0]
    artifacts = [parent for parent in parents if isinstance(parent, Artifact)]
    stage_fingerprint = call.stage.fingerprint(call.config, [artifact.digest for artifact in artifacts], store)
    committed = find_artifact(store, name, stage_fingerprint)
    reads = {parent.stage: parent.digest for parent in artifacts}
    facts = {"fingerprint": stage_fingerprint, "trains": call.stage.part is not None, "reads": reads}
    if committed:
        return _cached(run, committed, facts)
    record = ("runs", run.id, "run.json")
    owner = Owner.of(store.read_json(*record) if store.exists(*record) else None)
    try:
        with lock(store, call.stage.lock(stage_fingerprint), WAIT_SECONDS, owner) as held:
            committed = find_artifact(store, name, stage_fingerprint)  # another run may have made it meanwhile
            return _cached(run, committed, facts) if committed else _run_function(call, run, artifacts, held, facts)
    except AlreadyRunningError as error:
        message = str(error)
        # Without the facts: the other run trains, not this one.
        _record(store, run, name, state="failed", message=message, exit_code=error.exit_code)
        return Failure(name, message, error.exit_code)


def _cached(run: Run, committed: Artifact, facts: Mapping[str, Any]) -> Artifact:
    _record(Store(run.storage), run, committed.stage, state="cached", seconds=committed.seconds, **facts)
    return committed


def _run_function(
    call: Call, run: Run, artifacts: typing.Sequence[Artifact], held: Held, facts: Mapping[str, Any]
) -> Artifact | Failure:
    """Run the function of a stage under its MLflow run, and commit the result; the lock of the stage is held."""
    store, name, stage_fingerprint = Store(run.storage), call.stage.name, facts["fingerprint"]
    tracker = run.tracker.child(run.experiment_id, name, call.stage.shows_rows, run.tags)
    _record(store, run, name, state="running", started=time.time(), **facts)
    tracker.params(store.portable(to_dict(call.config)))
    tombstones = _tombstones_before(store, run)
    files.delete(run.progress_uri(name))  # an earlier attempt may have left one
    started = time.monotonic()
    try:
        with (
            scratch_folder(name) as scratch,
            run_periodically(STOP_IF_LOST_SECONDS, lambda: _stop_if_lost(call.stage, held, run), "lost lock"),
        ):
            context = StageContext(run, name, stage_fingerprint, store, tracker, scratch)
            store.check_links()
            store.inside("artifacts", name, stage_fingerprint, seals.MANIFEST)
            if store.is_local:
                files.sweep(context.folder)
                files.sweep(store.uri("stages", name), prefix=stage_fingerprint)
            output = call.stage.function(context, call.config, *artifacts)
            if held.lost.is_set():
                raise AlreadyRunningError(f"{name}: another run has taken over. Run the same command again later.")
            files.delete(context.intermediate)
            seals.cover(context.folder)
        if not call.stage.reads_snapshot:
            refuse_if_recorded(store, name)
    except Exception as error:
        message, exit_code = _explain(error), error.exit_code if isinstance(error, UnclipError) else 1
        with contextlib.suppress(OSError):  # keep the original error
            if exit_code != StoppedError.exit_code and files.stamp(store.uri(TOMBSTONES)) != tombstones:
                message, exit_code = f"{message} {TAKEN_DOWN_MEANWHILE}", StoppedError.exit_code
        trace = without_credentials(traceback.format_exc())
        tracker.bytes(trace.encode(), "error.txt")
        tracker.end("FAILED")
        log.error("%s failed: %s", name, message if isinstance(error, UnclipError) else trace)
        _record(store, run, name, state="failed", message=message, exit_code=exit_code, **facts)
        return Failure(name, message, exit_code)
    waited = times(run.progress_uri(name)).waited
    seconds = round(max(0.0, time.monotonic() - started - waited), 1)
    artifact = Artifact(name, stage_fingerprint, output.uri, output.digest, dict(output.facts), seconds)
    store.write_json(dataclasses.asdict(artifact), "stages", name, f"{stage_fingerprint}.json")
    stored = store.portable(dataclasses.asdict(artifact))
    tags = {"unclip.fingerprint": stage_fingerprint, "unclip.digest": output.digest, "unclip.uri": stored["uri"]}
    tracker.tags(tags)
    tracker.json(stored, "artifact.json")
    tracker.end()
    _record(store, run, name, state="done", seconds=seconds, **facts)
    # As a run that resumes reads it: JSON has lost the order of names, on which nothing may depend.
    committed = find_artifact(store, name, stage_fingerprint)
    assert committed is not None, f"{name}: the record that was just written is gone"
    return committed


def _tombstones_before(store: Store, run: Run) -> str | None:
    """Stamp of the tombstones when the run was prepared."""
    record = ("runs", run.id, "run.json")
    given = store.read_json(*record) if store.exists(*record) else {}
    return given["tombstones"] if "tombstones" in given else files.stamp(store.uri(TOMBSTONES))


def _stop_if_lost(stage: Stage, held: Held, run: Run) -> None:
    """Let the trainings of a run stop if another run has taken over one's lease; commits of tables are refused by the tables."""
    if held.lost.is_set() and stage.reads_snapshot:
        with contextlib.suppress(OSError, StorageError):  # then it is tried again
            files.write(run.stop_uri, b"")


# Stage tasks reserve no CPU: a stage that waits for its own tasks must not block them.
@ray.remote(num_cpus=0, max_retries=2)
def _run_stage(call: Call, run: Run, *parents: Artifact | Failure) -> Artifact | Failure:
    return execute(call, run, parents)


def _remake_stage(make: Callable[[Any], Stage], argument: Any, name: str) -> Stage:
    return dataclasses.replace(make(argument), name=name)


def _import_stage(module: str, function: str, name: str) -> Stage:
    declared: Stage = getattr(importlib.import_module(module), function)
    return dataclasses.replace(declared, name=name)


def _record(store: Store, run: Run, stage_name: str, **event: Any) -> None:
    """Overwrite a stage's last event in this run, for `unclip status` and the driver's console; the work does not need it."""
    try:
        store.write_json({"stage": stage_name, "at": time.time(), **event}, "runs", run.id, f"{stage_name}.json")
    except StorageError as error:
        log.warning("%s: %s", stage_name, error)


def _explain(error: BaseException) -> str:
    """Message of the innermost cause: Ray wraps the errors that tasks raise."""
    cause: BaseException = error
    while isinstance(cause, (ray.exceptions.RayTaskError, StageError)) and getattr(cause, "cause", None):
        cause = cause.cause  # type: ignore[union-attr]
    if isinstance(cause, UnclipError):
        return without_credentials(str(cause).strip()) or type(cause).__name__
    return f"{type(cause).__name__}: {reason_of(cause, -1)}"
