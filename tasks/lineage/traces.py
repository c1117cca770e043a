"""Traces of taken-down rows in MLflow: runs and models that read them, reports and previews that show them."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.database import ARTIFACTS, is_own, settle
from tasks.store import Store
from tasks.tracking import PREVIEW_KEYS, PREVIEWS, SHOWS_ROWS, checked_client, pages
from tasks.untrusted.normalise import first_line
from unclip import files
from unclip.errors import StorageError
from unclip.messages import without_credentials
from unclip.scratch import scratch_folder


@dataclasses.dataclass(frozen=True)
class Traces:
    """Traces found in all MLflow servers, and what was done with them."""

    runs: tuple[Mapping[str, str], ...] = ()
    """Runs that read dataset versions with such rows: id, name, experiment, tracking_uri."""
    models: tuple[Mapping[str, str], ...] = ()
    """Models registered by those runs: name, version, tracking_uri."""
    deleted_previews: tuple[str, ...] = ()
    """Runs whose previews showed such rows and were deleted."""
    remaining: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Run whose report or previews may still show such rows -> why they could not be cleaned."""
    unanswered: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """MLflow server that could not be searched -> why. Its traces are missing above."""


UNNAMED = "only records of the storage name it, so it was not asked"
"""Reason why an MLflow was not searched, whose address came with the storage."""


def remove(
    store: Store,
    tracking_uris: Iterable[str],
    keys: frozenset[str],
    datasets: Sequence[str],
    unnamed: Iterable[str] = (),
) -> Traces:
    """Redact report pages, delete previews that show the rows, and name and tag the runs and models that read them.

    Images that models sampled for captions, such as evaluation grids, are no one's data and stay. Those that have captions of
    rows below them, or were sampled from the embeddings of rows, are previews.

    Args:
        store: its artifact folder is searched as well, since it may hold runs that MLflow has forgotten.
        tracking_uris: all MLflow servers to search. A server that does not answer is reported within seconds and skipped.
        keys: keys of all rows that were ever taken down.
        datasets: digests of the dataset versions that contained a row of the current takedown.
        unnamed: MLflow servers that only the storage names. They are reported, and neither searched nor sent credentials.
    """
    found: dict[str, list[Any]] = {"runs": [], "models": [], "deleted_previews": []}
    remaining: dict[str, str] = {}
    unanswered = {without_credentials(uri): UNNAMED for uri in unnamed}
    known: set[str] = set()

    def clean(run_id: str, artifact_uri: str, tracking_uri: str | None, has_seen: bool) -> None:
        known.add(run_id)
        try:
            if _clean(open_artifacts(store, run_id, artifact_uri, tracking_uri), keys, has_seen):
                found["deleted_previews"].append(run_id)
        except Exception as error:  # one failing artifact store must not stop the others
            remaining[run_id] = first_line(error)

    for tracking_uri in tracking_uris:
        shown_uri = without_credentials(tracking_uri)
        try:
            settle(store, tracking_uri)
            mlflow = checked_client(tracking_uri)
            experiments = _experiments(mlflow)
            readers = set()
            for run in _runs_reading(mlflow, experiments, datasets):
                readers.add(run.info.run_id)
                name = run.info.run_name or run.info.run_id
                facts = {"id": run.info.run_id, "name": name, "experiment": experiments[run.info.experiment_id]}
                found["runs"].append({**facts, "tracking_uri": shown_uri})
                for name, version in _tag(mlflow, run):
                    found["models"].append({"name": name, "version": version, "tracking_uri": shown_uri})
            for run in _runs_showing_rows(mlflow, experiments):
                clean(run.info.run_id, run.info.artifact_uri, tracking_uri, run.info.run_id in readers)
        except Exception as error:  # one failing server must not stop the others
            unanswered[shown_uri] = first_line(error)
    for run_id in store.list(ARTIFACTS) if store.is_local else ():
        if run_id not in known:
            clean(run_id, "", None, False)
    lists = {name: tuple(values) for name, values in found.items()}
    return Traces(**lists, remaining=remaining, unanswered=unanswered)


def _experiments(mlflow: Any) -> dict[str, str]:
    """Return id -> name of all experiments, including deleted ones, whose artifacts MLflow keeps."""
    from mlflow.entities import ViewType

    return {found.experiment_id: found.name for found in pages(mlflow.search_experiments, view_type=ViewType.ALL)}


def _runs_reading(mlflow: Any, experiments: Collection[str], datasets: Iterable[str]) -> Iterator[Any]:
    """Yield the runs whose dataset input is one of these."""
    for digest in datasets:
        yield from _search(mlflow, experiments, f"dataset.digest = '{digest[:36]}'")


def _runs_showing_rows(mlflow: Any, experiments: Collection[str]) -> Iterator[Any]:
    """Yield the runs of stages that show dataset rows, and runs of earlier releases, which do not record it."""
    for run in _search(mlflow, experiments, "tags.`unclip.stage` LIKE '%'"):
        if run.data.tags.get(SHOWS_ROWS, "true") == "true":
            yield run


def _tag(mlflow: Any, run: Any) -> Iterator[tuple[str, str]]:
    """Tag a run that read the rows and the model versions it registered; yield their names and versions."""
    if run.info.lifecycle_stage == "active":
        mlflow.set_tag(run.info.run_id, "unclip.takedown", "has seen rows that were taken down")
    for version in pages(mlflow.search_model_versions, f"run_id = '{run.info.run_id}'"):
        mlflow.set_model_version_tag(version.name, str(version.version), "unclip.takedown", "has seen such rows")
        yield version.name, str(version.version)


def open_artifacts(store: Store, run_id: str, artifact_uri: str, tracking_uri: str | None) -> Any:
    """Open the artifacts of a run, even if the storage has moved since.

    Raises:
        StorageError: they are in a folder of another machine, behind a link, or of the storage's own database and elsewhere.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if store.is_local and store.exists(ARTIFACTS, run_id):
        artifact_uri = files.to_uri(store.uri(ARTIFACTS, run_id, "artifacts"))
    path = files.to_path(artifact_uri)
    if path is not None and not path.parents[1].exists():
        raise StorageError(f"its artifacts are in {path}, which is not on this machine")
    homes = (Path(store.root), files.to_path(store.uri(ARTIFACTS)))  # a database may have been copied with its storage
    is_inside = path is not None and any(path.is_relative_to(home) for home in homes if home is not None)
    if tracking_uri is not None and is_own(store, tracking_uri) and not is_inside:
        raise StorageError(f"its artifacts are at {without_credentials(artifact_uri)}, outside of the storage")
    if path is not None and files.link(f"{path}/report.html"):  # MLflow would write to what it leads to
        raise StorageError(f"{path}/report.html is a link, which is not followed; remove it")
    return get_artifact_repository(artifact_uri, tracking_uri)


def _clean(artifacts: Any, keys: frozenset[str], has_seen: bool) -> bool:
    """Redact a run's report page, and delete its previews if they show one of the rows; return True if they did.

    Args:
        has_seen: True if the run read such rows; then previews without recorded rows are deleted too.
    """
    with scratch_folder("traces") as scratch:
        if any(file.path == "report.html" for file in artifacts.list_artifacts()):
            path = Path(artifacts.download_artifacts("report.html", str(scratch)))
            page = path.read_text("utf-8")
            if redact(page, keys) != page:
                path.write_text(redact(page, keys), "utf-8")
                artifacts.log_artifact(str(path))
        logged = {file.path for file in artifacts.list_artifacts(PREVIEWS)}
        if PREVIEW_KEYS in logged:
            shown = json.loads(Path(artifacts.download_artifacts(PREVIEW_KEYS, str(scratch))).read_text("utf-8"))
            show_rows = not keys.isdisjoint(shown)
        else:
            show_rows = bool(logged) and has_seen
    if show_rows:
        artifacts.delete_artifacts(PREVIEWS)
        if artifacts.list_artifacts(PREVIEWS):
            raise StorageError("its previews are still there after they were deleted")
    return show_rows


def _search(mlflow: Any, experiments: Collection[str], query: str) -> Iterator[Any]:
    from mlflow.entities import ViewType

    if experiments:
        yield from pages(mlflow.search_runs, list(experiments), query, run_view_type=ViewType.ALL)


def redact(page: str, keys: frozenset[str]) -> str:
    """Return the page without the images and captions of some rows."""
    parts = page.split("<figure data-key=")
    for number, part in enumerate(parts[1:], start=1):
        if part[1:33] in keys:
            parts[number] = f'"">taken down</figure>{part.partition("</figure>")[2]}'
    return "<figure data-key=".join(parts)
