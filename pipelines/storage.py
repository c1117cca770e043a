"""Opening of an existing storage, for commands that read it."""

import os
from pathlib import Path

from pipelines.records import tracking_uri_of
from tasks.store import DEFAULT_ROOT, ENTRIES, Store
from unclip.errors import InputError
from unclip.messages import reason_of

REMEDY = "Run a pipeline first, or give its folder with --storage."


def open_storage(storage: str | None) -> Store:
    """Open an existing storage, by default the one that pipelines use. An empty folder is accepted.

    Raises:
        InputError: the folder does not exist, or no pipeline has stored anything in it.
    """
    store = Store(storage or DEFAULT_ROOT)
    if store.is_local and not Path(store.root).is_dir():
        reason = "is a file, expected a folder" if Path(store.root).exists() else "no such folder"
        raise InputError(f"{store.root}: {reason}. {REMEDY}")
    try:
        found = store.list()
    except OSError as error:
        raise InputError(f"{store.root}: cannot be read: {reason_of(error)}. {REMEDY}") from None
    if not found and not store.is_local:
        raise InputError(f"{store.root}: nothing is stored here. {REMEDY}")
    if found and not ENTRIES & set(found):
        raise InputError(f"{store.root}: no pipeline has stored anything in this folder. {REMEDY}")
    return store


def open_tracked(storage: str | None) -> tuple[Store, str]:
    """Return a storage and the MLflow tracking URI of its runs. If MLFLOW_TRACKING_URI is set, the storage need not exist.

    Raises:
        InputError: the storage does not exist.
    """
    has_server = os.environ.get("MLFLOW_TRACKING_URI")
    store = Store(storage or DEFAULT_ROOT) if has_server else open_storage(storage)
    return store, tracking_uri_of(store)
