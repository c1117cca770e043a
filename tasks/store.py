"""The storage root: one folder or bucket that holds everything that pipelines write.

images/<recipe>/        Delta table: every URL that was tried, with its image or the reason why there is none
index/<recipe>/         Delta table: the small columns of an images table by key range, with the place of each row
embeddings/<clip>/      Delta table: CLIP embeddings of the kept images, one table per CLIP
snapshots/              Delta table: one row per dataset version, written last
stages/<name>/<fp>.json commit records: the artifact of a stage, once it is complete
artifacts/<name>/<fp>/  files of a stage: models, checkpoints, images, reports
runs/<run id>/          records of each run and its stages
attempts/<recipe>.json  number of the last download attempt
tombstones.parquet      everything that was taken down; takedowns/ has the outcome of each request, and those that wait
results/<pipeline>/     summary, report and images of the last run
published/<name>.json   published stacks for sampling; imported/ has stacks from elsewhere
scenes/<name>.parquet   lists of procedural images
mlflow.db               MLflow's database, with mlflow-artifacts/, unless a server is used
"""

import os
from pathlib import Path
from typing import Any

from unclip import files
from unclip.errors import StorageError

DEFAULT_ROOT = "unclip-data"
INTERMEDIATE = "intermediate"
"""Folder in a stage's folder for files that its tasks pass on to each other; see `StageContext.intermediate`."""
ENTRIES = frozenset(
    """
    images index embeddings snapshots stages artifacts runs attempts tombstones.parquet takedowns results published
    imported scenes mlflow.db mlflow-artifacts .lock lease.json
    """.split()  # noqa: SIM905
)
"""Names in the root of a storage; every storage has some of them."""


class Store:
    """Files below one root, a local folder (made absolute) or a URI that pyarrow supports."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") if "://" in root else str(Path(root).expanduser().resolve())
        if not self.is_local:
            files.locate(self.root)

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    def uri(self, *parts: str) -> str:
        """Full path of a file or folder below the root."""
        return "/".join((self.root, *parts))

    def check_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            StorageError: the root is not writable.
        """
        probe = self.uri(".probe")
        try:
            files.write(probe, b"")
            files.delete(probe)
        except (OSError, StorageError) as error:
            raise self._unwritable(error.__cause__ or error) from None

    def check_permissions(self) -> None:
        """Check permissions only, without writing or creating folders; a bucket is assumed to be writable.

        Raises:
            StorageError: the root is not writable or cannot be created.
        """
        if not self.is_local:
            return
        nearest = next(path for path in (Path(self.root), *Path(self.root).parents) if path.exists())
        if not nearest.is_dir():
            raise self._unwritable(f"{nearest} is a file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise self._unwritable(f"no permission to write in {nearest}")

    def _unwritable(self, reason: object) -> StorageError:
        return StorageError(f"storage: cannot write to {self.root}: {reason}. Choose another folder with --storage.")

    def exists(self, *parts: str) -> bool:
        return files.exists(self.uri(*parts))

    def read_json(self, *parts: str) -> Any:
        return files.read_json(self.uri(*parts))

    def write_json(self, value: Any, *parts: str) -> None:
        files.write_json(self.uri(*parts), value)

    def list(self, *parts: str) -> list[str]:
        """Names in a folder, sorted; empty if the folder does not exist."""
        return files.names(self.uri(*parts))
