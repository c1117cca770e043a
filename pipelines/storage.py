"""The storage that a command reads, which must be there."""

import os
from pathlib import Path

from pipelines.records import tracking_uri_of
from tasks.store import DEFAULT_ROOT, ENTRIES, Store
from unclip.errors import InputError

REMEDY = "Run a pipeline first, or name the folder of one with --storage."


def open_storage(storage: str | None) -> Store:
    """The storage with this name, or the one that pipelines take when none is named. An empty folder will do.

    Raises:
        InputError: there is no such folder, or what it holds comes from no pipeline.
    """
    store = Store(storage or DEFAULT_ROOT)
    if store.is_local and not Path(store.root).is_dir():
        reason = "is a file, expected a folder" if Path(store.root).exists() else "no such folder"
        raise InputError(f"{store.root}: {reason}. {REMEDY}")
    try:
        found = store.list()
    except OSError as error:
        raise InputError(f"{store.root}: cannot be read: {str(error).splitlines()[0]}. {REMEDY}") from None
    if not found and not store.is_local:
        raise InputError(f"{store.root}: nothing is stored here. {REMEDY}")
    if found and not ENTRIES & set(found):
        raise InputError(f"{store.root}: no pipeline has stored anything in this folder. {REMEDY}")
    return store


def open_tracked(storage: str | None) -> tuple[Store, str]:
    """A storage and the MLflow that knows its runs. Where the environment names an MLflow, the storage may be missing.

    Raises:
        InputError: there is no such storage.
    """
    is_elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
    store = Store(storage or DEFAULT_ROOT) if is_elsewhere else open_storage(storage)
    return store, tracking_uri_of(store)
