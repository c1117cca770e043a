"""Origin of a run: its user, its command, and the version of the code, as MLflow's own tags.

The git commit is given only if it is true: the code that runs lies in a clone that tracks it, or pip installed it from a commit.
"""

import dataclasses
import functools
import getpass
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import unclip
from unclip.messages import without_credentials

PACKAGE = "unclip"
VERSION_TAG = "unclip.version"
COMMIT_TAG, BRANCH_TAG = "mlflow.source.git.commit", "mlflow.source.git.branch"
DIRTY_TAG, REPOSITORY_TAG = "mlflow.source.git.dirty", "mlflow.source.git.repoURL"
_GIT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Code:
    """Version of the code that runs."""

    version: str | None = None
    """Version of the package, if it is installed."""
    commit: str | None = None
    branch: str | None = None
    is_changed: bool | None = None
    """The clone has changes that are in no commit; None if that is not known."""
    repository: str | None = None
    """URL of the clone's first remote, without credentials."""


@functools.cache
def code() -> Code:
    """Version of the code that runs in this process."""
    try:
        installed = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return _of_clone(Path(unclip.__file__).parent, None)
    found = _of_clone(Path(unclip.__file__).parent, installed.version)
    return found if found.commit else _of_pip(installed)


def _of_clone(package: Path, version: str | None) -> Code:
    """Version of code in a git clone; without a commit if git does not track it, as with an environment inside a clone."""
    try:
        if not _git(package, "ls-files", "--error-unmatch", "__init__.py"):
            return Code(version)
        commit, branch = _git(package, "rev-parse", "HEAD"), _git(package, "rev-parse", "--abbrev-ref", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return Code(version)
    root = package.parent
    packages = [name for name in ("unclip", "tasks", "pipelines") if (root / name).is_dir()]
    is_changed = url = None
    try:
        is_changed = bool(_git(root, "status", "--porcelain", "--", *packages))
        remotes = _git(root, "remote").splitlines()
        url = without_credentials(_git(root, "remote", "get-url", remotes[0])) if remotes else None
    except (OSError, subprocess.SubprocessError):
        pass
    return Code(version, commit, None if branch == "HEAD" else branch, is_changed, url)


def _of_pip(installed: importlib.metadata.Distribution) -> Code:
    """Version of an installed package; with a commit if pip took it from one.

    Source: PEP 610, `direct_url.json`.
    """
    try:
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        commit, url = origin.get("vcs_info", {}).get("commit_id"), origin.get("url")
    except (ValueError, AttributeError, OSError):
        commit = url = None
    if not isinstance(commit, str) or not isinstance(url, str):
        return Code(installed.version)
    return Code(installed.version, commit, None, False, without_credentials(url))


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command, which changes nothing and starts no program of the clone's settings."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, env=environment, check=True)
    return result.stdout.strip()


def run_tags(command: str) -> dict[str, str]:
    """Tags of a run that MLflow shows as its user, its source and its version.

    Args:
        command: such as `unclip run demo`, without options, which may hold credentials.
    """
    here = code()
    tags = {"mlflow.source.name": command, "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    tags |= {VERSION_TAG: here.version, COMMIT_TAG: here.commit, BRANCH_TAG: here.branch}
    tags |= {REPOSITORY_TAG: here.repository}
    if here.is_changed is not None:
        tags[DIRTY_TAG] = str(here.is_changed).lower()
    return {name: value for name, value in tags.items() if value}


def code_of(tags: Mapping[str, str]) -> Code:
    """Version of the code that started a run, from the run's tags."""
    dirty = tags.get(DIRTY_TAG)
    is_changed = None if dirty is None else dirty == "true"
    return Code(tags.get(VERSION_TAG), tags.get(COMMIT_TAG), tags.get(BRANCH_TAG), is_changed, tags.get(REPOSITORY_TAG))


def _user() -> str | None:
    """Name of the user, as MLflow's own API sets it."""
    if name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return name
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container may have no name for its user
        return None
