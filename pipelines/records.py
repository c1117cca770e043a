"""Records of runs, in MLflow and in the storage."""

import contextlib
import dataclasses
import datetime
import os
import time
import urllib.parse
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from pipelines.console import say
from tasks.database import artifacts_uri, database_uri, is_own, settle
from tasks.origin import run_tags
from tasks.run_records import HEARTBEAT_SECONDS, beat, driver, is_alive
from tasks.store import TABLE_FOLDERS, TOMBSTONES, Store
from tasks.tracking import Tracker, may_pass, open_client, remedy_for
from unclip import files
from unclip.background import run_periodically
from unclip.config import to_dict
from unclip.errors import ConfigError, StorageError
from unclip.messages import reason_of, without_credentials

KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""Tag of an experiment by which MLflow's pages choose what they show of it: trainings, or applications of language models."""

if TYPE_CHECKING:
    from pipelines.dataset import PipelineConfig
    from tasks.stage import Run


def tracking_uri(config: "PipelineConfig") -> str:
    """Return the MLflow tracking URI of a configuration.

    Raises:
        ConfigError: there is none, or it is not a URI.
    """
    uri = config.tracking_uri or tracking_uri_of(Store(config.storage))
    try:
        _ = urllib.parse.urlsplit(uri).port
    except ValueError:  # its message may quote a part of the password
        raise ConfigError(
            f"tracking_uri: got {without_credentials(uri)}, which has a part that is no port. In a password, write %2F for "
            f"a slash, %3A for a colon and %40 for @."
        ) from None
    return uri


def tracking_uri_of(store: Store) -> str:
    """Return the default MLflow tracking URI of a storage; a configuration may override it.

    Raises:
        ConfigError: the storage is not a local folder, and MLFLOW_TRACKING_URI is not set.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    if store.database is None:
        raise ConfigError(
            f"tracking_uri: {store.root} is not a local folder, so MLflow needs a server. Set MLFLOW_TRACKING_URI."
        )
    return database_uri(str(store.database))


@dataclasses.dataclass(frozen=True)
class TrackingUris:
    """Every MLflow that may have records of a storage."""

    named: list[str]
    """Named by the operator, or in the storage itself."""
    unnamed: list[str]
    """Named by runs of the storage alone, which may have been copied: they get neither requests nor credentials."""


def tracking_uris_of(store: Store, named: Iterable[str | None] = ()) -> TrackingUris:
    """Return the URI of every MLflow that may have records of a storage: the environment's, its own and those of its runs.

    Args:
        named: those that the operator has named besides the environment, such as by an option or in a run file.

    Raises:
        ConfigError: there is none: the storage is not a local folder, no run recorded a server, and MLFLOW_TRACKING_URI is
            not set.
    """
    paths = [("runs", run_id, "run.json") for run_id in store.list("runs")]
    records = [store.read_json(*path) for path in paths if store.exists(*path)]
    uris = [os.environ.get("MLFLOW_TRACKING_URI"), *named]
    in_storage = any(record["mlflow_run"] and record.get("tracking_uri", "?") is None for record in records)
    if store.database is not None and (in_storage or store.database.exists()):
        uris.append(database_uri(str(store.database)))
    recorded = [record.get("tracking_uri", record["config"].get("tracking_uri")) for record in records]
    known, unnamed = dict[str, str](), dict[str, str]()
    for uri in filter(None, uris):
        known.setdefault(without_credentials(uri).rstrip("/"), uri)  # the environment's URI may include the password
    for uri in filter(None, recorded):
        if (shown := without_credentials(uri).rstrip("/")) not in known:
            (known if is_own(store, uri) else unnamed).setdefault(shown, uri)
    if not known and not unnamed and not store.is_local:
        tracking_uri_of(store)
    return TrackingUris(list(known.values()), list(unnamed.values()))


def open_run(pipeline: str, config: "PipelineConfig", store: Store, label: str = "") -> "Run":
    """Record the start of a run in MLflow and in the storage.

    Args:
        label: system that it makes, with its variant after a slash; "" for the system of the settings.

    Raises:
        ConfigError: MLflow refuses it, which will not pass.
    """
    from pipelines.cluster import worker_resources
    from tasks.stage import Run

    if store.is_local:
        _sweep(store)
    uri = tracking_uri(config)
    experiment_id, run_id = "", ""
    own = is_own(store, uri)
    origin = run_tags(_command(pipeline))
    try:
        settle(store, uri)
        mlflow_client = open_client(uri)
        experiment = mlflow_client.get_experiment_by_name(pipeline)
        if experiment is None:
            experiment_id = _create_experiment(mlflow_client, pipeline, artifacts_uri(uri))
        else:
            experiment_id = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                _restore_experiment(mlflow_client, experiment_id)
                say(f"MLflow: the experiment {pipeline} was deleted there; it is restored.")
            _close_dead_runs(mlflow_client, experiment_id, store)
        if experiment is None or KIND_TAG not in experiment.tags:
            mlflow_client.set_experiment_tag(experiment_id, KIND_TAG, KIND)
        now = f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"
        name = " ".join(filter(None, (pipeline, label, now)))
        # A server has runs of several storages; the database of a storage moves with it.
        tags = {**origin, "unclip.pipeline": pipeline}
        tags |= {"unclip.storage": store.portable(store.root) if own else store.root}
        run_id = mlflow_client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    except Exception as error:
        shown = without_credentials(uri)
        if not may_pass(error):
            raise ConfigError(
                f"tracking_uri: MLflow at {shown} refuses this run: {reason_of(error).rstrip('.')}. {remedy_for(error)}".strip()
            ) from None
        # run anyway: the work matters more than its records
        say(f"MLflow at {shown} does not answer; this run is not tracked: {reason_of(error)}")
    tracker = Tracker(uri, run_id)
    tracker.params(store.portable(to_dict(config)))
    tracker.json(store.portable(to_dict(config)), "config.json")
    identity = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    resources, interval = worker_resources(config), config.system_metrics_seconds
    run = Run(
        identity,
        pipeline,
        store.root,
        tracker,
        experiment_id,
        resources,
        tags=origin,
        system_metrics_seconds=interval,
    )
    record = {"pipeline": pipeline, "system": label or config.system, "started": time.time(), **driver()}
    # None stands for the database in the storage, so that the storage can be moved.
    external_uri = None if own else without_credentials(uri)
    record |= {"tombstones": files.stamp(store.uri(TOMBSTONES))}
    record |= {"state": "running", "mlflow_run": run_id, "tracking_uri": external_uri, "config": to_dict(config)}
    beat(store, identity)
    store.write_json(record, "runs", identity, "run.json")
    return run


def _command(pipeline: str) -> str:
    """Command that works on a pipeline, without its options."""
    context = click.get_current_context(silent=True)
    return f"unclip {context.info_name} {pipeline}" if context and context.info_name else f"unclip {pipeline}"


def heartbeat(run: "Run", store: Store) -> contextlib.AbstractContextManager[None]:
    """Write the heartbeat of a run until the block ends, so that `unclip status` of other machines sees that it is alive."""

    def beat_again() -> None:
        with contextlib.suppress(OSError, StorageError):  # the work does not need it
            beat(store, run.id)

    return run_periodically(HEARTBEAT_SECONDS, beat_again, "heartbeat")


def record_cluster(run: "Run", store: Store, resources: Mapping[str, float]) -> None:
    """Record the CPUs and GPUs of the cluster that a run works on, so that the rates of its stages can be compared."""
    record = store.read_json("runs", run.id, "run.json")
    cluster = {name: resources.get(name, 0) for name in ("CPU", "GPU")}
    store.write_json({**record, "cluster": cluster}, "runs", run.id, "run.json")


def close_run(run: "Run", store: Store, state: str) -> None:
    """Record the end of a run in MLflow and in the storage; `state` is done, failed or stopped."""
    run.tracker.end({"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[state])
    record = store.read_json("runs", run.id, "run.json")
    # Keep the original error of a failed run. Without this record the run counts as killed.
    with contextlib.suppress(*[StorageError] * (state != "done")):
        store.write_json({**record, "state": state, "ended": time.time()}, "runs", run.id, "run.json")


def _sweep(store: Store) -> None:
    """Delete temporary files of killed runs. Owners of the tables delete those of tables, and stages those of their results."""
    for folder in store.list():
        if folder not in (*TABLE_FOLDERS, "artifacts", "mlflow-artifacts", "runs"):
            files.sweep(store.uri(folder), min_age_seconds=_MAX_WRITE_SECONDS)
    for run_id in store.list("runs"):
        path = ("runs", run_id, "run.json")
        is_dead = store.exists(*path) and not is_alive(store, run_id, store.read_json(*path))
        files.sweep(store.uri("runs", run_id), min_age_seconds=0.0 if is_dead else _MAX_WRITE_SECONDS)


_MAX_WRITE_SECONDS = 24 * 3600.0


def _restore_experiment(mlflow_client: Any, experiment_id: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        mlflow_client.restore_experiment(experiment_id)
    except MlflowException:  # another run may have done it meanwhile
        if mlflow_client.get_experiment(experiment_id).lifecycle_stage == "deleted":
            raise


def _create_experiment(mlflow_client: Any, name: str, location: str | None) -> str:
    try:
        return str(mlflow_client.create_experiment(name, artifact_location=location))
    except Exception:
        experiment = mlflow_client.get_experiment_by_name(name)  # another run may have created it meanwhile
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def _close_dead_runs(mlflow_client: Any, experiment_id: str, store: Store) -> None:
    """Close the MLflow runs of this storage that no process drives any more; others may run side by side."""
    opened = mlflow_client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
    if not opened:
        return
    paths = {run_id: ("runs", run_id, "run.json") for run_id in store.list("runs")}
    records = {run_id: store.read_json(*path) for run_id, path in paths.items() if store.exists(*path)}
    dead = {record["mlflow_run"] for run_id, record in records.items() if not is_alive(store, run_id, record)}
    for run in opened:
        if run.info.run_id in dead or run.data.tags.get("mlflow.parentRunId") in dead:
            mlflow_client.set_terminated(run.info.run_id, "KILLED")
