"""MLflow databases in folders of any name, and after a move."""

import re
import shutil
import sqlite3
from pathlib import Path

import pytest

from tasks.database import artifacts_here, artifacts_uri, database_path, database_uri, has_moved, settle
from tasks.store import Store
from tasks.tracking import Tracker, checked_client, client, open_client
from unclip import files
from unclip.errors import StorageError

NAMES = ["plain", " ", "#", "%", "?", "é", "[x]'&;=", "a?b#c 100% ü"]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow database without runs, shared because creating one takes a second."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client(database_uri(str(path)))
    return path


def logged(store: Store, empty: Path, location: str | None = None) -> tuple[str, str]:
    """Start a database with a run that has logged a file and registered a folder; returns its URI and the run."""
    Path(store.root).mkdir(parents=True)
    assert store.database is not None
    shutil.copy(empty, store.database)
    uri = database_uri(str(store.database))
    experiment = client(uri).create_experiment("tiny", artifact_location=location or artifacts_uri(uri))
    run_id = client(uri).create_run(experiment).info.run_id
    tracker = Tracker(uri, run_id)
    tracker.bytes(b"text", "notes/file.txt")
    Path(store.root, "stack").mkdir()
    Path(store.root, "stack", "weights").write_text("w")
    assert tracker.register(store.uri("stack"), "model") == "1"
    return uri, run_id


@pytest.mark.parametrize("name", NAMES)
def test_f68_mlflow_keeps_its_files_in_a_folder_of_any_name(empty: Path, tmp_path: Path, name: str) -> None:
    store = Store(str(tmp_path / "folder" / name))
    uri, run_id = logged(store, empty)
    assert database_path(uri) == store.database
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [name]
    assert Path(store.root, "mlflow-artifacts", run_id, "artifacts", "notes", "file.txt").read_text() == "text"
    read = client(uri).download_artifacts(run_id, "notes/file.txt", str(tmp_path))
    assert Path(read).read_text() == "text"
    assert not has_moved(store, uri)


def where(store: Store) -> set[str]:
    """All places of artifacts that a database names."""
    assert store.database is not None
    with sqlite3.connect(store.database) as connection:
        columns = ["experiments.artifact_location", "runs.artifact_uri", "model_versions.source"]
        return {
            uri
            for table, _, name in (column.partition(".") for column in columns)
            for (uri,) in connection.execute(f"SELECT {name} FROM {table}")
            if "mlflow-artifacts" in uri
        }


@pytest.mark.parametrize(("name", "form"), [("plain", "uri"), (NAMES[-1], "uri"), (NAMES[-1], "path")])
def test_f71_the_database_of_a_copy_names_the_copy(empty: Path, tmp_path: Path, name: str, form: str) -> None:
    """Earlier releases gave MLflow a path."""
    store = Store(str(tmp_path / "original"))
    uri, run_id = logged(store, empty, store.uri("mlflow-artifacts") if form == "path" else None)
    shutil.copytree(store.root, tmp_path / name)
    copy = Store(str(tmp_path / name))
    own = database_uri(str(copy.database))
    before, of_original = where(copy), where(store)
    source = client(own).get_model_version("model", "1").source
    model = source.rpartition("/models/")[2]
    assert re.fullmatch(r"m-[0-9a-f]{32}/artifacts", model)
    here = f"{artifacts_uri(own)}/models/{model}"
    assert artifacts_here(copy, own, run_id, source) == here, "known before anything is written"
    earlier = f"file:///original/mlflow-artifacts/{run_id}/artifacts/stack"
    assert artifacts_here(copy, own, run_id, earlier) == f"{artifacts_uri(own)}/{run_id}/artifacts/stack"
    assert before == of_original and has_moved(copy, own) and not has_moved(store, uri)
    settle(copy, own)
    assert not has_moved(copy, own)
    assert where(copy) == {f"{artifacts_uri(own)}{place.partition('mlflow-artifacts')[2]}" for place in before}
    assert client(own).get_model_version("model", "1").source == here
    experiment = client(own).get_run(run_id).info.experiment_id
    new = client(own).create_run(experiment).info.run_id
    Tracker(own, new).bytes(b"new", "notes/file.txt")
    assert Path(copy.root, "mlflow-artifacts", new, "artifacts", "notes", "file.txt").read_text() == "new"
    assert not Path(store.root, "mlflow-artifacts", new).exists()
    assert where(store) == of_original


def test_places_of_others_are_left_alone(empty: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "storage"))
    uri, run_id = logged(store, empty)
    mlflow = client(uri)
    places = ["s3://bucket/mlflow-artifacts", "/shared/artifacts", "mlflow-artifacts:/7"]
    experiments = [mlflow.create_experiment(place, artifact_location=place) for place in places]
    moved = Store(str(Path(store.root).rename(tmp_path / "moved")))
    own = database_uri(str(moved.database))
    settle(moved, own)
    assert [client(own).get_experiment(experiment).artifact_location for experiment in experiments] == places
    assert (
        client(own).get_run(run_id).info.artifact_uri
        == f"{files.to_uri(moved.uri('mlflow-artifacts'))}/{run_id}/artifacts"
    )


def test_a_database_that_is_none_is_reported(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("nothing that SQLite reads")
    with pytest.raises(StorageError, match=r"mlflow\.db: .*file is not a database"):
        settle(Store(str(tmp_path)), database_uri(str(tmp_path / "mlflow.db")))


def test_a_database_of_another_program_gets_no_tables(empty: Path, tmp_path: Path) -> None:
    path = tmp_path / "a?b c.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE cookies (value)")
    before = path.read_bytes()
    for opened in (checked_client, open_client):
        with pytest.raises(StorageError, match=r"database of another program, with the table cookies.*tracking_uri"):
            opened(database_uri(str(path)))
    assert path.read_bytes() == before
    shutil.copy(empty, path)
    assert checked_client(database_uri(str(path))) and open_client(database_uri(str(path)))


@pytest.mark.parametrize("source", ["http://127.0.0.1:9/a", "s3://bucket/a?endpoint_override=127.0.0.1:9", "runs:/r/a"])
def test_the_database_of_a_storage_names_no_server(tmp_path: Path, source: str) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(StorageError, match="expected them in mlflow-artifacts"):
        artifacts_here(store, database_uri(str(store.database)), "r", source)
    assert artifacts_here(store, "http://server", "r", source) == source
