"""Running a pipeline: checks first, then Ray, MLflow and the console; ends with a summary."""

import contextlib
import dataclasses
import datetime
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

from pipelines import dag as dags
from pipelines import scene_server
from pipelines.config import PipelineConfig
from pipelines.lock import lock
from pipelines.summary import print_summary, summarise, write_results
from pipelines.systems.unclip import text_to_image
from tasks import signals
from tasks.progress import bar
from tasks.stage import Failure, Resources, Run, declared_name
from tasks.stages.curate import pin_probes
from tasks.stages.download import pin_attempt
from tasks.stages.filter import check_settings
from tasks.stages.ingest import check_source
from tasks.stages.report import Limit
from tasks.store import Store
from tasks.tombstones import tombstones_digest
from tasks.tracking import Tracker, client, flatten, without_password
from unclip import files
from unclip.config import fingerprint, require, to_dict
from unclip.errors import ConfigError, StageError, StoppedError, StorageError, UnclipError
from unclip.training import curves

STOP_PATIENCE_SECONDS = 25.0
"""For trainings to write a checkpoint when the run is asked to stop; Kubernetes kills after thirty."""

WORKER_ENVIRONMENT = {
    # Nothing that this project uses may call home.
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "disabled",
    # Ray's own messages add nothing for people who run a pipeline.
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_maximum_startup_concurrency": "8",  # also what its warning about many workers starts from
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    # What one training step frees, the next one needs: giving it back to the system and faulting it in again would take a
    # tenth of a step on CPUs.
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
"""Ray's workers get these."""


def prepare(config: PipelineConfig, retry_failed: bool = False) -> PipelineConfig:
    """Check everything that can be wrong before anything starts, and pin the inputs.

    Args:
        retry_failed: fetch again what failed for reasons that may have passed.

    Returns:
        The configuration with what the pipeline fills in: digests of the list, of the block lists and of the probes, limits
        for the report.

    Raises:
        UnclipError: what is wrong, and what to do.
    """
    tracking_uri(config)  # raises when there can be none
    store = Store(config.storage)
    store.check_writable()
    for node in compose(config).values():
        reference_curve = node.config.trainer.reference_curve if hasattr(node.config, "trainer") else None
        if reference_curve is not None:
            curves.read(reference_curve)
    ingest, download = config.ingest, config.download
    if config.scenes is not None:
        name = fingerprint(to_dict(config.scenes))[:16]
        urls = store.uri("scenes", f"{name}.parquet")
        if not store.exists("scenes", f"{name}.parquet"):
            scene_server.write_url_list(config.scenes, urls)
        ingest = dataclasses.replace(ingest, urls=urls)
        download = dataclasses.replace(download, allow_hosts=(*download.allow_hosts, config.scenes.address))
    ingest = dataclasses.replace(ingest, digest=check_source(ingest), tombstones=tombstones_digest(store))
    download = pin_attempt(store, download, retry_failed)
    limits = {**config.filter.limits(), **config.curate.limits()}
    report = dataclasses.replace(config.report, limits=tuple(Limit(name, *pair) for name, pair in limits.items()))
    curate = pin_probes(config.curate)
    filter = dataclasses.replace(config.filter, digest=check_settings(config.filter))
    return dataclasses.replace(config, ingest=ingest, download=download, filter=filter, curate=curate, report=report)


def tracking_uri(config: PipelineConfig) -> str:
    """Where MLflow keeps its records."""
    return config.tracking_uri or tracking_uri_of(Store(config.storage))


def tracking_uri_of(store: Store) -> str:
    """Where MLflow keeps the records of a storage, unless its pipeline's configuration says otherwise.

    Raises:
        ConfigError: the storage is no folder, which could hold a database, and no server is named.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given and not store.is_local:
        raise ConfigError(
            f"tracking_uri: {store.root} is no local folder, so MLflow needs a server. Set MLFLOW_TRACKING_URI."
        )
    return given or f"sqlite:///{store.root}/mlflow.db"


def tracking_uris_of(store: Store) -> list[str]:
    """Every MLflow that may know of a storage: of the environment, of the storage itself, and of each of its runs.

    Raises:
        ConfigError: there is none, since the storage is no folder, no run says which server it had, and none is named.
    """
    paths = [("runs", run_id, "run.json") for run_id in store.list("runs")]
    records = [store.read_json(*path) for path in paths if store.exists(*path)]
    uris = [os.environ.get("MLFLOW_TRACKING_URI")]
    in_storage = any(record["mlflow_run"] and record.get("tracking_uri", "?") is None for record in records)
    if store.is_local and (in_storage or store.exists("mlflow.db")):
        uris.append(f"sqlite:///{store.root}/mlflow.db")
    uris += [record.get("tracking_uri") or record["config"].get("tracking_uri") for record in records]
    known: dict[str, str] = {}
    for uri in filter(None, uris):
        known.setdefault(without_password(uri).rstrip("/"), uri)  # the environment may have the password
    if not known and not store.is_local:
        tracking_uri_of(store)
    return list(known.values())


def compose(config: PipelineConfig, run: Run | None = None) -> dags.Dag:
    """The DAG of a configuration; without a run, to look at only."""
    placeholder = Run("", "", config.storage, Tracker("", ""), "")
    return dags.compose(text_to_image, config, run or placeholder)


def run_pipeline(pipeline: str, config: PipelineConfig, until: str | None = None, retry_failed: bool = False) -> int:
    """Run a pipeline; returns the exit code.

    Args:
        until: the last stage to run, with those that it needs; None runs all.

    Raises:
        UnclipError: nothing was started, or a stage failed.
    """
    os.environ.update(WORKER_ENVIRONMENT)
    started = time.monotonic()
    config = prepare(config, retry_failed)
    store = Store(config.storage)
    todo = compose(config)
    require(until is None or until in todo, "--until", until, f"a stage: {', '.join(todo)}")
    todo = dags.up_to(todo, until) if until else todo
    states = dags.states(todo, store)
    if all(state.artifact for state in states.values()):
        print(f"{pipeline}: everything is up to date; nothing was started.")
        _finish(config, pipeline, todo, store)
        return 0
    with lock(store), contextlib.ExitStack() as stack:
        if config.scenes is not None:
            stack.enter_context(scene_server.serve(config.scenes))
        run = open_run(pipeline, config, store)
        state = "failed"
        try:
            dag = compose(config, run)
            dag = dags.up_to(dag, until) if until else dag
            labels = {name: state.label for name, state in states.items()}
            run.tracker.bytes(dags.mermaid(dag, labels).encode(), "dag.mmd")
            run.tracker.bytes(dags.picture(dag, labels), "dag.png")
            _start_ray(config)
            failures = _execute(dag, run, store)
            state = "failed" if failures else "done"
        except StoppedError:
            state = "stopped"
            raise
        finally:
            close_run(run, store, state)
        if failures:
            raise StageError("\n".join(f"{failure.stage} failed: {failure.message}" for failure in failures))
        summary = _finish(config, pipeline, dag, store)
        run.tracker.json(summary, "summary.json")
        run.tracker.metrics({key: value for key, value in flatten(summary).items() if isinstance(value, (int, float))})
    print(f"took {time.monotonic() - started:.0f} s")
    return 0


def _finish(config: PipelineConfig, pipeline: str, dag: dags.Dag, store: Store) -> dict[str, Any]:
    artifacts = {name: state.artifact for name, state in dags.states(dag, store).items() if state.artifact}
    summary = summarise(pipeline, artifacts)
    write_results(summary, artifacts, store)
    print_summary(summary, store, config)
    return summary


def _execute(dag: dags.Dag, run: Run, store: Store) -> list[Failure]:
    """Execute the DAG, telling on the console how its stages fare; returns the stages that failed."""
    import warnings

    import ray

    last = list(dag)[-1]
    with warnings.catch_warnings():
        # DAGNode.execute is announced to change; it is the API of the versions we allow
        warnings.simplefilter("ignore")
        result = dag[last].ray_node.execute()
    console = Console(store, run.id, list(dag))
    ready: list[Any] = []
    with signals.asked_to_stop() as is_asked:
        while not ready:
            ready, _ = ray.wait([result], timeout=1.0)
            console.refresh()
            if is_asked():
                _stop_trainings(dag, run, store, console)
                raise StoppedError(
                    f"{run.pipeline}: stopped as asked. Nothing is lost: run the same command again to go on."
                )
    try:
        outcome = ray.get(result)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UnclipError):
            raise cause from None
        reason = str(error).strip().splitlines()[0]
        raise StageError(
            f"a process of the cluster died: {reason}. Finished work is kept; run the same command again."
        ) from None
    failed = [event for event in stage_events(store, run.id).values() if event["state"] == "failed"]
    # What a full disk kept from being recorded is still told.
    told = [outcome] if isinstance(outcome, Failure) else []
    return [Failure(event["stage"], event["message"]) for event in failed] or told


def _stop_trainings(dag: dags.Dag, run: Run, store: Store, console: "Console") -> None:
    """Ask those that run to write a checkpoint and end, and wait for them, but not for ever."""
    files.write(run.stop_uri, b"")
    deadline = time.monotonic() + STOP_PATIENCE_SECONDS
    started = set(store.list("runs", run.id, "progress"))  # others wait for CPUs

    def train() -> bool:
        running = [name for name, event in stage_events(store, run.id).items() if event["state"] == "running"]
        return any(f"{name}.json" in started and hasattr(dag[name].config, "trainer") for name in running)

    if train():
        print("stopping: what is trained writes a checkpoint first; ask again to stop at once", flush=True)
    while train() and time.monotonic() < deadline:
        time.sleep(0.5)
        console.refresh()


def stage_events(store: Store, run_id: str) -> dict[str, dict[str, Any]]:
    """What is known of each stage of a run."""
    names = [name for name in store.list("runs", run_id) if name.endswith(".json") and name != "run.json"]
    return {name.removesuffix(".json"): store.read_json("runs", run_id, name) for name in names}


class Console:
    """Tells how the stages of a run fare: a line when one changes, and how far the running ones are.

    On a terminal the progress is redrawn in place; in a log it is a line now and then.
    """

    LOG_SECONDS = 15.0

    def __init__(self, store: Store, run_id: str, stages: list[str]) -> None:
        self.store, self.run_id, self.stages = store, run_id, stages
        self.width = max(map(len, stages))
        self.told: dict[str, str] = {}
        self.logged: dict[str, float] = {}
        self.is_terminal = sys.stdout.isatty()
        self.drawn = 0

    def refresh(self) -> None:
        events = stage_events(self.store, self.run_id)
        self._erase()
        for name in self.stages:
            event = events.get(name)
            if event and self.told.get(name) != event["state"]:
                self.told[name] = event["state"]
                self._tell(name, event)
        for name, state in self.told.items():
            if state == "running":
                self._tell_progress(name)
        sys.stdout.flush()

    def _tell(self, name: str, event: Mapping[str, Any]) -> None:
        seconds = f"{event['seconds']:.0f} s" if event.get("seconds") is not None else ""
        marks = {"running": "▶", "done": "✓", "cached": "=", "failed": "✗", "skipped": "-"}
        print(
            f"{marks[event['state']]} {name:<{self.width}} {event['state']:<8} {event.get('message', seconds)}".rstrip()
        )
        self.logged[name] = time.monotonic()

    def _tell_progress(self, name: str) -> None:
        path = ("runs", self.run_id, "progress", f"{name}.json")
        due = self.is_terminal or time.monotonic() - self.logged[name] >= self.LOG_SECONDS
        if due and self.store.exists(*path):
            self.logged[name] = time.monotonic()
            self.drawn += 1
            line = bar(name.ljust(self.width), self.store.read_json(*path))
            # A line that wraps could not be erased.
            print(line[: shutil.get_terminal_size().columns - 1] if self.is_terminal else line)

    def _erase(self) -> None:
        if self.is_terminal and self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="")
        self.drawn = 0


def _start_ray(config: PipelineConfig) -> None:
    import logging

    import ray

    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    # What workers print stays in Ray's logs; what they fail with comes back as the stage's message.
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        try:
            ray.init(address=address, runtime_env={"env_vars": WORKER_ENVIRONMENT}, **options)
        except (ConnectionError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"cluster.address: no Ray cluster answers at {address}: {reason}. Start it first."
            ) from None
    else:
        needed = max(wanted.cpus_per_worker * wanted.num_workers for wanted in _resources(config).values())
        num_cpus = config.cluster.num_cpus or max(os.cpu_count() or 1, needed)
        # A cluster of this run alone: it dies with this process, joins no other that happens to be there, and survives a
        # change of network. Its workers inherit this process's environment; a runtime_env would cost each a second.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        # What needs more memory than there is would be tried for ever.
        os.environ.setdefault("RAY_task_oom_retries", "5")
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **options)
    total = ray.cluster_resources()
    for stage, resources in _resources(config).items():
        for name, amount in resources.per_worker().items():
            if total.get(name, 0) < amount:
                raise ConfigError(
                    f"resources: a worker of {stage} wants {amount:g} {name}, but the cluster has {total.get(name, 0):g} "
                    f"in all. Lower resources.cpus_per_worker or resources.gpus_per_worker, or join another cluster."
                )


def _resources(config: PipelineConfig) -> dict[str, Resources]:
    """What the workers of each stage that has some are given."""
    with_workers = ("clip", "embed", "prior", "decoder", "upsampler", "evaluate")
    return {stage: config.resources.of(stage) for stage in compose(config) if declared_name(stage) in with_workers}


def open_run(pipeline: str, config: PipelineConfig, store: Store) -> Run:
    """Register a run with MLflow and in the store, whose lock the caller holds."""
    uri = tracking_uri(config)
    experiment_id, run_id = "", ""
    try:
        mlflow_client = client(uri)
        experiment = mlflow_client.get_experiment_by_name(pipeline)
        if experiment is None:
            location = store.uri("mlflow-artifacts") if uri.startswith("sqlite") else None
            experiment_id = mlflow_client.create_experiment(pipeline, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        _close_dead_runs(mlflow_client, experiment_id, store.root)
        name = f"{pipeline} {datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"
        tags = {"unclip.pipeline": pipeline, "unclip.storage": store.root}
        run_id = mlflow_client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    except Exception as error:  # the work is worth more than its records
        print(f"MLflow at {uri} does not answer, so this run is not tracked: {str(error).splitlines()[0]}", flush=True)
    tracker = Tracker(uri, run_id)
    tracker.params(to_dict(config))
    tracker.json(to_dict(config), "config.json")
    identity = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    run = Run(identity, pipeline, store.root, tracker, experiment_id, config.resources)
    record = {"pipeline": pipeline, "started": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    # None is the database in the storage, wherever that is moved to.
    outside = None if uri == f"sqlite:///{store.root}/mlflow.db" else without_password(uri)
    record |= {"state": "running", "mlflow_run": run_id, "tracking_uri": outside, "config": to_dict(config)}
    store.write_json(record, "runs", identity, "run.json")
    return run


def close_run(run: Run, store: Store, state: str) -> None:
    """Tell both how the run ended: done, failed or stopped."""
    run.tracker.end({"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[state])
    record = store.read_json("runs", run.id, "run.json")
    # When something failed, that is what is told; a run without this counts as killed.
    with contextlib.suppress(*[StorageError] * (state != "done")):
        store.write_json({**record, "state": state, "ended": time.time()}, "runs", run.id, "run.json")


def _close_dead_runs(mlflow_client: Any, experiment_id: str, storage: str) -> None:
    """We hold the lock of this storage, so what is still open there belongs to processes that died."""
    opened = mlflow_client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
    dead = {run.info.run_id for run in opened if run.data.tags.get("unclip.storage") == storage}
    for run in opened:
        if run.info.run_id in dead or run.data.tags.get("mlflow.parentRunId") in dead:
            mlflow_client.set_terminated(run.info.run_id, "KILLED")
