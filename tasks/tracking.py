"""MLflow behind a few functions that never stop the work: an entry that cannot be logged is a warning, not a failure."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import sqlite3
import ssl
import time
import typing
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tasks.database import check_database, database_path
from unclip import files
from unclip.background import within
from unclip.errors import StorageError
from unclip.messages import reason_of, redacted, without_credentials
from unclip.scratch import scratch_folder

log = logging.getLogger(__name__)
T = TypeVar("T")

# A tracking server that is down must cost seconds, not the four minutes of the client's defaults.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # with the password that a tracking URI may have

MAX_DESCRIPTION = 4_700
"""Characters of a description; MLflow's databases take 5,000, of which links to images need some."""
IMAGES = "images"
"""Folder in a model's folder with images that its description shows."""
_VERSIONS_TAG = "mlflow.modelVersions"
"""Tag of a logged model by which MLflow's pages find its registered versions."""
_NOTE_TAG = "mlflow.note.content"
"""Tag of a logged model that MLflow's pages show as its description."""
PREVIEWS = "previews"
"""Folder with the images that a model samples during training, beside the rows they were sampled for. In the run's artifacts
and in the stage's folder."""
SHOWS_ROWS = "unclip.shows_rows"
"""Tag of a run: "true" if its logs show rows of the dataset. Runs of earlier versions lack this tag."""
PREVIEW_KEYS = "previews/keys.json"
"""File with the keys of those rows, so that a takedown finds the previews that show them."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """Text and numbers that MLflow shows with a version of a registered model."""

    description: str = ""
    """Markdown, at most MAX_DESCRIPTION characters; its images are files of the model's folder, below `images/`."""
    model_description: str = ""
    """Description of the registered model, if it has none yet."""
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the logged model."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Metrics of the logged model."""
    dataset: tuple[str, str] | None = None
    """Name and digest of the dataset input of the run that the metrics are about."""


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

    def register(self, folder: str, name: str, listing: "Listing | None" = None) -> str | None:
        """Make a model's folder a new version of a registered model.

        The folder becomes a logged model of this run. If MLflow keeps artifacts in a local folder, it gets links to the files of
        a local one, which take no space; a server gets a copy. A folder in an object store is referred to where it is.

        Args:
            folder: path or URI.
            listing: text and numbers that MLflow shows with the version.

        Returns:
            The version, or None if MLflow did not accept it.
        """
        shown = listing or Listing()

        def action(client: Any) -> str:
            model_id, source = self._log_model(client, folder, name, shown)
            _create_registered_model(client, name, shown.model_description)
            tags = {key: without_credentials(value)[:5000] for key, value in shown.tags.items()}
            made = client.create_model_version(name, source, self.run_id, tags=tags, model_id=model_id)
            version = str(made.version)
            known_as = {_VERSIONS_TAG: json.dumps([{"name": name, "version": made.version}])}
            if shown.description:  # its links name the version
                text = _with_links(shown.description, name, version)
                client.update_model_version(name, version, text)
                known_as[_NOTE_TAG] = text
            client.set_logged_model_tags(model_id, known_as)
            return version

        version: str | None = self._try(action)
        return version

    def _log_model(self, client: Any, folder: str, name: str, listing: "Listing") -> tuple[str, str]:
        """Make a folder a logged model of this run; returns its id, and the URI of its files."""
        from mlflow.entities import LoggedModelOutput, Metric

        params = {key: without_credentials(str(value))[:500] for key, value in listing.params.items()}
        run = client.get_run(self.run_id)
        origin = {
            key: value for key, value in run.data.tags.items() if key.startswith(("mlflow.source.", "mlflow.user"))
        }
        tags = origin | {key: without_credentials(value)[:5000] for key, value in listing.tags.items()}
        shown_name = name.replace(".", "-")  # MLflow allows no dot here
        model = client.create_logged_model(run.info.experiment_id, shown_name, self.run_id, tags, params, "unclip")
        location = urllib.parse.urlsplit(model.artifact_location)
        if "://" in folder:
            source = folder
        else:
            source = model.artifact_location
            if location.scheme in ("", "file"):
                destination = urllib.parse.unquote(location.path) if location.scheme else source
                for each in files.walk(folder):
                    files.copy(f"{folder}/{each.name}", f"{destination}/{each.name}")
            else:
                client.log_model_artifacts(model.model_id, folder)
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, 0)])
        now = int(time.time() * 1000)
        dataset = (
            {"dataset_name": listing.dataset[0], "dataset_digest": listing.dataset[1][:36]} if listing.dataset else {}
        )
        metrics = [
            Metric(key, float(value), now, 0, model.model_id, **dataset, run_id=self.run_id)
            for key, value in listing.metrics.items()
        ]
        if metrics:
            client.log_batch(self.run_id, metrics=metrics[:1000])
        return model.model_id, source

    def end(self, status: str = "FINISHED") -> None:
        self._try(lambda client: client.set_terminated(self.run_id, status))

    def child(
        self, experiment_id: str, name: str, shows_rows: bool = False, tags: Mapping[str, str] | None = None
    ) -> "Tracker":
        """Open a child run; without a server, logging to it does nothing.

        Args:
            shows_rows: the run's logs will show rows of the dataset.
            tags: further tags, such as those of the parent run.
        """
        tags = {**(tags or {}), "mlflow.parentRunId": self.run_id, "mlflow.runName": name, "unclip.stage": name}
        tags[SHOWS_ROWS] = str(shows_rows).lower()
        run = self._try(lambda client: client.create_run(experiment_id, tags=tags, run_name=name))
        return Tracker(self.tracking_uri, run.info.run_id if run else "")

    def attempt(self, action: Callable[[Any], T]) -> T | None:
        """Call a function with an MLflow client; None if there is no MLflow, or it does not accept what the function does."""
        result: T | None = self._try(action)
        return result

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


def _create_registered_model(client: Any, name: str, description: str) -> None:
    """Create a registered model, or give one that exists a description if it has none."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description or None)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if description and not client.get_registered_model(name).description:
            client.update_registered_model(name, description=description)


def _with_links(description: str, name: str, version: str) -> str:
    """Let the images of a description be those of the version, as a tracking server and MLflow's pages serve them."""
    query = urllib.parse.urlencode({"name": name, "version": version})
    return description.replace(f"]({IMAGES}/", f"](model-versions/get-artifact?{query}&path={IMAGES}/")


def client(tracking_uri: str) -> Any:
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    # MLflow also logs at length the database errors that it raises.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


def checked_client(tracking_uri: str, seconds: float = 15.0) -> Any:
    """Client of an MLflow server that has just answered; never creates a missing database.

    Raises:
        StorageError: the database or folder does not exist, or is another program's.
        TimeoutError: the server does not answer within `seconds`.
        MlflowException: the server answers with an error.
    """
    path = database_path(tracking_uri)
    if tracking_uri.startswith(("file:", "/", ".")):
        path = files.to_path(tracking_uri)
    if path is not None and not path.exists():
        raise StorageError(f"{path} does not exist")
    if path is not None and path.is_file():
        check_database(path)
    return _connect(tracking_uri, seconds if path is None else None)


def open_client(tracking_uri: str, seconds: float = 15.0) -> Any:
    """Client of an MLflow that has just answered; creates a missing database.

    Raises:
        Exception: see `may_pass`.
    """
    path = database_path(tracking_uri)
    if path is not None and path.exists():  # MLflow tries for minutes to open what is no database
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as connection:
            connection.execute("BEGIN IMMEDIATE")
        check_database(path)
    return _connect(tracking_uri, seconds if path is None else None)


def _connect(tracking_uri: str, seconds: float | None) -> Any:
    """Client of an MLflow that has just answered, within `seconds` if given."""
    import mlflow  # noqa: F401  takes seconds, which must not count as the server's

    def connect() -> Any:
        opened = client(tracking_uri)
        opened.search_experiments(max_results=1)
        return opened

    return connect() if seconds is None else within(seconds, connect)


def pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """Yield the results of a search of an MLflow client, page by page."""
    token = None
    while True:
        page = search(*arguments, **options, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


_TEMPORARY_CODES = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
_REFUSALS = re.compile(
    r"unable to open database|readonly database|not a database|malformed|authentication failed|access denied"
    r"|no password supplied|(?:database|role) \S+ does not exist",
    re.IGNORECASE,
)


def may_pass(error: BaseException) -> bool:
    """Return True if an error of MLflow is an outage, after which the same call may work; False if MLflow refuses it."""
    import requests
    import sqlalchemy.exc

    refusals = (ValueError, PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, ssl.SSLError)
    outages = (OSError, sqlite3.OperationalError, sqlalchemy.exc.OperationalError, sqlalchemy.exc.TimeoutError)
    has_outage, cause = False, typing.cast(BaseException | None, error)
    while cause is not None:
        if isinstance(cause, (*refusals, requests.exceptions.SSLError)) or _REFUSALS.search(str(cause)):
            return False
        has_outage |= isinstance(cause, outages) or getattr(cause, "error_code", None) in _TEMPORARY_CODES
        cause = cause.__cause__ or cause.__context__
    return has_outage


def remedy_for(error: BaseException) -> str:
    """Advice for an error of MLflow that will not pass."""
    if isinstance(error, StorageError):
        return ""  # its message has its own
    if "filesystem tracking backend" in str(error):
        return "Name a database, such as sqlite:////folder/mlflow.db; `mlflow migrate-filestore` copies what is in the folder."
    if "database schema" in str(error):
        return "Install the version of MLflow that wrote the database, or back it up and run `mlflow db upgrade` on its URI."
    return "Correct tracking_uri or MLFLOW_TRACKING_URI, or leave both out to track in the storage folder."


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"clip": {"depth": 2}} -> {"clip.depth": 2}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat
