"""MLflow behind a few functions that never stop the work: an entry that cannot be logged is a warning, not a failure."""

import dataclasses
import json
import logging
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tasks.database import database_path
from unclip import files
from unclip.errors import StorageError
from unclip.messages import reason_of, redacted, without_credentials
from unclip.scratch import scratch_folder

log = logging.getLogger(__name__)

# A tracking server that is down must cost seconds, not the four minutes of the client's defaults.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # with the password that a tracking URI may have

PREVIEWS = "previews"
"""Folder with the images that a model samples during training, beside the rows they were sampled for. In the run's artifacts
and in the stage's folder."""
SHOWS_ROWS = "unclip.shows_rows"
"""Tag of a run: "true" if its logs show rows of the dataset. Runs of earlier versions lack this tag."""
PREVIEW_KEYS = "previews/keys.json"
"""File with the keys of those rows, so that a takedown finds the previews that show them."""


@dataclasses.dataclass(frozen=True)
class Tracker:
    """Logs to one MLflow run, without credentials. Pickles to two strings, so any Ray worker can log to the run of its stage."""

    tracking_uri: str = dataclasses.field(repr=False)  # Ray Train records the repr of what its workers get
    run_id: str

    def params(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, without_credentials(str(value))[:6000]) for key, value in flatten(config).items()]
        self._try(
            lambda client: [
                client.log_batch(self.run_id, params=params[i : i + 100]) for i in range(0, len(params), 100)
            ]
        )

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log named numbers at `step` (samples seen, while training)."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._try(lambda client: client.log_batch(self.run_id, metrics=metrics))

    def tags(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, without_credentials(str(value))[:5000]) for key, value in values.items()]
        self._try(lambda client: client.log_batch(self.run_id, tags=tags))

    def file(self, path: str | Path, folder: str | None = None) -> None:
        """Log a file or a whole folder as an artifact."""
        log_artifact = "log_artifacts" if Path(path).is_dir() else "log_artifact"
        self._try(lambda client: getattr(client, log_artifact)(self.run_id, str(path), folder))

    def bytes(self, data: bytes, name: str) -> None:
        """Log bytes as the artifact `name`, which may contain folders."""
        folder, _, base = name.rpartition("/")
        with scratch_folder("log") as scratch:
            path = scratch / base
            path.write_bytes(data)
            self.file(path, folder or None)

    def json(self, value: Any, name: str) -> None:
        self.bytes(json.dumps(redacted(value), indent=2, sort_keys=True).encode(), name)

    def dataset(self, name: str, digest: str, source: str, facts: Mapping[str, Any]) -> None:
        """Record which dataset version this run read, as MLflow's dataset input.

        Args:
            digest: content digest of the snapshot; MLflow keeps the first 36 characters.
            source: URI of the table.
            facts: counts and versions, shown as the dataset's profile.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:36],
            source_type="delta",
            source=json.dumps({"uri": source}),
            profile=json.dumps(facts),
        )
        entry = DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
        self._try(lambda client: client.log_inputs(self.run_id, [entry]))

    def register(self, folder: str, name: str, alias: str) -> str | None:
        """Make a stack a new version of a registered model and move an alias to it.

        If the run's artifacts are in a local folder, they get links to the files of a local stack, which take no space. A server
        gets a copy. A stack in an object store is referred to where it is.

        Args:
            folder: path or URI.

        Returns:
            The version, or None if MLflow did not accept it.
        """
        from mlflow.exceptions import MlflowException

        def action(client: Any) -> str:
            artifacts = client.get_run(self.run_id).info.artifact_uri
            location = urllib.parse.urlsplit(artifacts)
            source = folder if "://" in folder else f"{artifacts}/stack"
            if source != folder and location.scheme in ("", "file"):
                destination = f"{urllib.parse.unquote(location.path) if location.scheme else artifacts}/stack"
                for entry in files.walk(folder):
                    files.copy(f"{folder}/{entry.name}", f"{destination}/{entry.name}")
            elif source != folder:
                client.log_artifacts(self.run_id, folder, "stack")
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = str(client.create_model_version(name, source, self.run_id).version)
            client.set_registered_model_alias(name, alias, version)
            return version

        version: str | None = self._try(action)
        return version

    def end(self, status: str = "FINISHED") -> None:
        self._try(lambda client: client.set_terminated(self.run_id, status))

    def child(self, experiment_id: str, name: str, shows_rows: bool = False) -> "Tracker":
        """Open a child run; without a server, logging to it does nothing.

        Args:
            shows_rows: the run's logs will show rows of the dataset.
        """
        tags = {"mlflow.parentRunId": self.run_id, "mlflow.runName": name, "unclip.stage": name}
        tags[SHOWS_ROWS] = str(shows_rows).lower()
        run = self._try(lambda client: client.create_run(experiment_id, tags=tags, run_name=name))
        return Tracker(self.tracking_uri, run.info.run_id if run else "")

    def _try(self, action: Callable[[Any], Any]) -> Any:
        if not self.run_id:
            return None
        try:
            return action(client(self.tracking_uri))
        except Exception as error:  # any failure of the server or the network; the work goes on
            log.warning(
                "MLflow at %s did not accept an entry: %s", without_credentials(self.tracking_uri), reason_of(error)
            )
            return None


def client(tracking_uri: str) -> Any:
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    # MLflow also logs at length the database errors that it raises.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


def checked_client(tracking_uri: str, seconds: float = 15.0) -> Any:
    """Client of an MLflow server that has just answered; never creates a missing database.

    Raises:
        StorageError: the database or folder does not exist, or the server does not answer within `seconds`.
        MlflowException: the server answers with an error.
    """
    import mlflow  # takes seconds, which must not count as the server's

    path = database_path(tracking_uri)
    if tracking_uri.startswith(("file:", "/", ".")):
        path = files.to_path(tracking_uri)
    if path is not None and not path.exists():
        raise StorageError(f"{path} does not exist")
    answers: list[mlflow.MlflowClient | Exception] = []

    def check() -> None:
        try:
            checked = client(tracking_uri)
            checked.search_experiments(max_results=1)
            answers.append(checked)
        except Exception as error:
            answers.append(error)

    # DNS lookups, database connections and retries have timeouts of their own, some of minutes.
    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(seconds if path is None else None)
    if not answers:
        raise StorageError(f"no answer within {seconds:g} s")
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"clip": {"depth": 2}} -> {"clip.depth": 2}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat
