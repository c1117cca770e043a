"""The storage root: one folder or bucket that holds everything that pipelines write.

images/<recipe>/        Delta table: every URL that was tried, with its image or the reason why there is none
index/<recipe>/         Delta table: the small columns of an images table by key range, with the place of each row
embeddings/<clip>/      Delta table: CLIP embeddings of the kept images, one table per CLIP
derived/<stage>-<id>/   Delta table: what a stage made of the kept images with a trained model, such as latents
snapshots/              Delta table: one row per dataset version, written last
stages/<name>/<fp>.json commit records: the artifact of a stage, once it is complete
artifacts/<name>/<fp>/  files of a stage: models, checkpoints, images, reports
runs/<run id>/          records of each run and its stages
attempts/<recipe>.json  number of the last download attempt
tombstones.parquet      everything that was taken down; takedowns/ has the outcome of each request, and those that wait
results/<pipeline>/     summary, report and images of the last run, or of a comparison
published/<name>.json   published models, their champion and challenger; imported/ has stacks from elsewhere
scores/<stack>.parquet  scores of single images of published stacks, by which candidates are compared
locks/                  owners of the tables, and of results that are being made; see `tasks.lock`
scenes/<name>.parquet   lists of procedural images
mlflow.db               MLflow's database, with mlflow-artifacts/, unless a server is used

Everything stored names files below the root as `storage://images/...`, so a storage can be moved, copied and mounted elsewhere.
"""

import collections
import contextlib
import os
import posixpath
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unclip import files
from unclip.errors import ConfigError, StorageError

DEFAULT_ROOT = "unclip-data"
INTERMEDIATE = "intermediate"
"""Folder in a stage's folder for files that its tasks pass on to each other; see `StageContext.intermediate`."""
ENTRIES = frozenset(
    """
    images index embeddings derived snapshots stages artifacts runs attempts tombstones.parquet takedowns results published
    scores imported scenes mlflow.db mlflow-artifacts locks
    """.split()  # noqa: SIM905
)
"""Names in the root of a storage; every storage has some of them."""
ROOT = "storage://"
"""Start of a path below the root in what is stored."""
_FORM = re.compile(r"(?:local-dir:|sqlite:///)?")  # how other libraries have a path introduced
_FORMER_PATH = re.compile(
    r"(?P<root>(?:/|\w+://).*)/(?:artifacts/[\w-]+/[0-9a-f]{64}|(?:images|embeddings)/[0-9a-f]{16}|derived/\w+-[0-9a-f]{16}|imported/[\w.-]+)(?:/.*)?",
    re.DOTALL,
)
_AMBIGUOUS = re.compile(r"%[0-9a-fA-F]{2}|[\\\x00-\x1f\x7f]")  # Delta Lake decodes such a path twice, or not at all

TOMBSTONES = "tombstones.parquet"
"""File with everything that was taken down."""
TABLE_FOLDERS = ("images", "index", "embeddings", "derived", "snapshots")
"""Folders of the tables; the last one is a table itself."""


class Store:
    """Files below one root, a local folder (made absolute) or a URI that pyarrow supports.

    One place has one root, so that its locks are the same however it is written.
    """

    def __init__(self, root: str) -> None:
        """Raises:
        ConfigError: no table can be kept below such a path.
        StorageError: pyarrow does not support the URI.
        """
        self.root = _canonical(root)
        if not self.is_local:
            files.locate(self.root)

    @property
    def is_local(self) -> bool:
        return self.root.startswith("/")

    def uri(self, *parts: str) -> str:
        """Full path of a file or folder below the root."""
        return "/".join((self.root, *parts))

    def inside(self, *parts: str) -> str:
        """Full path like that of `uri`, to write to or to delete, of names that records of the storage give.

        Links to other places are followed only where they are folders of the root, as of an operator who moved one to another
        disk; a storage that was copied may have any.

        Raises:
            DamagedError: it would lead out of the storage.
        """
        top, _, rest = "/".join(parts).partition("/")
        folder = files.below(self.root, top)
        return files.below(folder, rest) if rest else folder

    def check_links(self, deep: bool = False) -> None:
        """Check that no folder in a folder of the root is a link to another place, before the storage is changed.

        Args:
            deep: check the folders in those, too, for changes in many of them.

        Raises:
            DamagedError: one is.
        """
        for top in sorted(ENTRIES) if self.is_local else ():
            for folder, names, _ in os.walk(self.uri(top)):
                for name in names:
                    if os.path.islink(os.path.join(folder, name)):
                        self.inside(os.path.relpath(os.path.join(folder, name), self.root), "*")
                if not deep:
                    break

    def links(self) -> dict[str, str]:
        """Folders and files of a local root that are links -> what they lead to."""
        return {name: str(files.to_path(self.uri(name))) for name in sorted(ENTRIES) if files.link(self.uri(name))}

    def check_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            StorageError: the root is not writable.
        """
        probe = self.uri(".probe")
        try:
            files.write(probe, b"")
            with contextlib.suppress(FileNotFoundError):  # another process checks too
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

    @property
    def database(self) -> Path | None:
        """File of MLflow's database in a local storage; there may be none yet, if a server is used."""
        return Path(self.root, "mlflow.db") if self.is_local else None

    def exists(self, *parts: str) -> bool:
        return files.exists(self.uri(*parts))

    def read_json(self, *parts: str) -> Any:
        """Read what `write_json` wrote, with full paths."""
        return self.resolve(files.read_json(self.uri(*parts)))

    def write_json(self, value: Any, *parts: str) -> None:
        """Write a JSON value, with paths below the root in portable form."""
        files.write_json(self.inside(*parts), self.portable(value))

    def portable(self, value: Any) -> Any:
        """Copy of a JSON value, with `storage://...` for paths below the root."""
        return _map_texts(value, lambda text: _moved(text, f"{self.root}/", ROOT))

    def resolve(self, value: Any) -> Any:
        """Copy of a JSON value that `portable` returned, with full paths.

        Earlier releases stored full paths. Most of the paths in a record are below the root of its time, which is replaced.
        """
        texts = list(_texts(value))
        is_portable = any(_FORM.sub("", text, count=1).startswith(ROOT) for text in texts)
        former = ROOT if is_portable else _former_root(texts)
        return value if former is None else _map_texts(value, lambda text: _moved(text, former, f"{self.root}/"))

    def list(self, *parts: str) -> list[str]:
        """Names in a folder, sorted; empty if the folder does not exist."""
        return files.names(self.uri(*parts))


def _canonical(root: str) -> str:
    """Absolute path of a local folder without symbolic links, or a URI without `.`, `..` and extra slashes.

    Letters that a URI cannot have are percent-encoded.
    """
    path = files.to_path(root)
    if path is None and (cut := re.search(r"[?#]", root)):
        code = urllib.parse.quote(cut[0])
        raise ConfigError(f"storage: got {root}, a URI whose path ends at {cut[0]!r}. Write {code} instead.")
    if found := _AMBIGUOUS.search(urllib.parse.unquote(root) if path is None else str(path)):
        raise ConfigError(
            f"storage: got {root}, with {found[0]!r} in its name, which Delta Lake reads as another character. "
            "Rename the folder, or choose another with --storage."
        )
    if path is not None:
        return str(path)
    scheme, _, rest = root.partition("://")
    host, _, folder = rest.partition("/")
    folder = posixpath.normpath(f"/{folder.lstrip('/')}").rstrip("/")
    return urllib.parse.quote(f"{scheme.lower()}://{host}{folder}", safe="%/:@!$&'()*+,;=~")


def _moved(text: str, before: str, after: str) -> str:
    """Path below one root as the path below another; other texts stay as they are. Roots end with a slash."""
    path = _FORM.sub("", text, count=1)
    form = text.removesuffix(path) if path else text
    path = before if f"{path}/" == before else path  # the root itself
    if not path.startswith(before):
        return text
    below = path.removeprefix(before)
    return form + (after + below if below or after == ROOT else after.removesuffix("/"))


def _former_root(texts: list[str]) -> str | None:
    """Root of the storage when an earlier release wrote a record, with a slash; None if the record has no path below it."""
    roots = collections.Counter(found["root"] for text in texts if (found := _FORMER_PATH.fullmatch(text)))
    return f"{roots.most_common(1)[0][0]}/" if roots else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in (*value, *value.values()):
            yield from _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_texts(name, change): _map_texts(each, change) for name, each in value.items()}
    return [_map_texts(each, change) for each in value] if isinstance(value, (list, tuple)) else value
