"""MLflow's database in a local file: its URI, and the artifacts of its runs, which lie in a folder beside it.

MLflow stores the full URI of the artifacts of each experiment, run and model. When a storage is opened at another place, `settle`
changes them, so that nothing is read from or logged to the place where the storage was.
"""

import contextlib
import re
import sqlite3
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from tasks.store import Store
from unclip import files
from unclip.errors import StorageError
from unclip.messages import without_credentials

ARTIFACTS = "mlflow-artifacts"
"""Folder beside a database with the artifacts of its runs."""
_ARTIFACT_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def database_uri(path: str) -> str:
    """Tracking URI of an MLflow database in a local file."""
    if urllib.parse.quote(path) == path:
        return f"sqlite:///{path}"
    # SQLAlchemy decodes the path. MLflow creates its folder without decoding it, hence one name: its folder is "/".
    return f"sqlite:////{urllib.parse.quote(path.removeprefix('/'), safe='')}"


def database_path(tracking_uri: str) -> Path | None:
    """File of the database of a tracking URI; None for other URIs."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(urllib.parse.unquote(tracking_uri.removeprefix("sqlite:///").partition("?")[0])).absolute()


def check_database(path: Path) -> None:
    """Check that an existing database is MLflow's, or empty, since MLflow creates its tables in any.

    Raises:
        StorageError: another program's tables are in it.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=60)) as connection:
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error:  # MLflow says what is wrong
        return
    if names and not {"experiments", "alembic_version"} <= names:
        raise StorageError(
            f"{path}: a database of another program, with the table {min(names)} and without MLflow's. Correct tracking_uri or "
            "MLFLOW_TRACKING_URI."
        )


def artifacts_uri(tracking_uri: str) -> str | None:
    """URI of the artifacts of a database's runs; None for a server, which has its own place for them."""
    path = database_path(tracking_uri)
    return None if path is None else files.to_uri(str(path.parent / ARTIFACTS))


def is_own(store: Store, tracking_uri: str) -> bool:
    """Return True if a tracking URI is that of the storage's own database."""
    return store.database is not None and database_path(tracking_uri) == store.database


def artifacts_here(store: Store, tracking_uri: str, run_id: str, uri: str) -> str:
    """URI of artifacts of a run or of one of its logged models, which the storage's own database may name at the place where the
    storage was before.

    Raises:
        StorageError: the storage's own database, which may have been copied, names a server or a bucket.
    """
    found = re.fullmatch(rf".*/((?:{re.escape(run_id)}|models/m-[0-9a-f]+)/artifacts(?:/.*)?)", uri, re.DOTALL)
    if not is_own(store, tracking_uri):
        return uri
    if found is None:
        if files.to_path(uri) is None:
            raise StorageError(
                f"{store.database}: has artifacts at {without_credentials(uri)}, expected them in {ARTIFACTS} beside it. The "
                "database was changed by hand, or for another storage: publish the stack again."
            )
        return uri
    return files.to_uri(store.uri(ARTIFACTS)) + f"/{found[1]}"


def has_moved(store: Store, tracking_uri: str) -> bool:
    """Return True if this is the storage's own database, and it names artifacts at another place."""
    database = store.database
    if database is None or not is_own(store, tracking_uri) or not database.exists():
        return False
    with _transaction(database) as connection:
        return bool(_former_roots(connection, database))


def settle(store: Store, tracking_uri: str) -> None:
    """Let the storage's own database name the artifacts beside it, if the storage was moved or copied.

    It may be called while runs log to the database: they have done this before, at the same place.
    """
    database = store.database
    if database is None or not has_moved(store, tracking_uri):
        return
    after = files.to_uri(store.uri(ARTIFACTS))
    with _transaction(database) as connection:
        for before in _former_roots(connection, database):
            for table, column in _ARTIFACT_COLUMNS:
                if any(column == name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")):
                    is_below = f"substr({column} || '/', 1, ?) = ?"
                    update = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {is_below}"
                    connection.execute(update, (after, len(before) + 1, len(before) + 1, f"{before}/"))


def _former_roots(connection: sqlite3.Connection, database: Path) -> set[str]:
    """`ARTIFACTS` folders of experiments, as the database names them, other than the one beside it."""
    own = files.to_path(str(database.with_name(ARTIFACTS)))
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchall():
        return set()  # MLflow has not set it up yet
    locations = connection.execute("SELECT artifact_location FROM experiments").fetchall()
    found = (re.fullmatch(rf"(.*/{ARTIFACTS})(?:/\d+)?", location or "", re.DOTALL) for (location,) in locations)
    return {match[1] for match in found if match and files.to_path(match[1]) not in (None, own)}


@contextlib.contextmanager
def _transaction(database: Path) -> Iterator[sqlite3.Connection]:
    try:
        connection = sqlite3.connect(database, timeout=60, isolation_level="IMMEDIATE")
        with contextlib.closing(connection), connection:
            yield connection
    except sqlite3.Error as error:
        raise StorageError(f"{database}: cannot be read or written: {error}. Restore it, or move it away.") from error
