"""Images that show rows of the dataset, in a folder and in a run of MLflow, with the rows' keys, so that takedowns find them."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.lineage.traces import open_artifacts
from tasks.store import Store
from tasks.tombstones import load_tombstones
from tasks.tracking import PREVIEW_KEYS, PREVIEWS, Tracker
from unclip import files


def publish(store: Store, tracker: Tracker, folder: str, images: Mapping[str, bytes], keys: Sequence[str]) -> None:
    """Write images, and the keys of the rows that they show; nothing stays if one of the rows is taken down meanwhile.

    Args:
        folder: URI; the images are written to `previews/` in it, and in the run's artifacts.
        images: name, without a suffix -> PNG.
    """
    files.write_json(f"{folder}/{PREVIEW_KEYS}", list(keys))
    for name, data in images.items():
        files.write(f"{folder}/{PREVIEWS}/{name}.png", data)
    if _is_taken_down(store, keys):
        files.delete(f"{folder}/{PREVIEWS}")
        return
    tracker.json(list(keys), PREVIEW_KEYS)
    for name, data in images.items():
        tracker.bytes(data, f"{PREVIEWS}/{name}.png")
    if _is_taken_down(store, keys):
        files.delete(f"{folder}/{PREVIEWS}")
        tracker.attempt(lambda client: _delete_logged(store, tracker, client))


def _is_taken_down(store: Store, keys: Sequence[str]) -> bool:
    """To be called after writing: a takedown that has not found the files has written its tombstones before."""
    return not load_tombstones(store).keys.isdisjoint(keys)


def _delete_logged(store: Store, tracker: Tracker, client: Any) -> None:
    location = client.get_run(tracker.run_id).info.artifact_uri
    open_artifacts(store, tracker.run_id, location, tracker.tracking_uri).delete_artifacts(PREVIEWS)
