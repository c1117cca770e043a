"""Versions of published models in MLflow's registry, with their aliases and tags.

All functions take an MLflow client and raise what it raises.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.database import artifacts_here
from tasks.published import CHALLENGER, CHAMPION, NAME, Entry, Record
from tasks.store import Store
from tasks.tracking import pages
from unclip import files
from unclip.errors import InputError

DIGEST, SYSTEM, SNAPSHOT, PROMOTION = "unclip.digest", "unclip.system", "unclip.snapshot", "unclip.promotion"
"""Tags of a version."""
EARLIER_ALIAS = "latest-published"
"""Alias of the releases before promotion."""


@dataclasses.dataclass(frozen=True)
class Registered:
    """A version in the registry."""

    name: str
    version: str
    digest: str
    """Digest of the stack; "" if neither the version nor its run has it."""
    source: str
    run_id: str
    created: float
    """Seconds since 1970."""
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    def entry(self) -> Entry:
        """Facts that a storage which did not publish the version records of it."""
        digest = self.digest or f"{self.name}/{self.version}"
        return Entry(
            "",
            digest,
            self.created,
            self.version,
            system=self.tags.get(SYSTEM),
            snapshot=self.tags.get(SNAPSHOT),
            reason=self.tags.get(PROMOTION),
        )


def names(client: Any) -> list[str]:
    """Models with names that stacks can be published under; a shared server has models of other programs."""
    found = (str(model.name) for model in pages(client.search_registered_models))
    return sorted(name for name in found if re.fullmatch(NAME, name))


def versions(client: Any, name: str) -> list[Registered]:
    """All versions of a model, oldest first; none if there is no such model."""
    aliases = _aliases(client, name)
    found = [_registered(client, each, aliases) for each in pages(client.search_model_versions, f"name = '{name}'")]
    return sorted(found, key=lambda each: int(each.version))


def find(client: Any, name: str, alias: str | None = None, version: str | None = None) -> Registered | None:
    """A version by its number or alias; None if there is none."""
    aliases = _aliases(client, name)
    number = version or aliases.get(alias or "")
    if number is None:
        return None
    from mlflow.exceptions import MlflowException

    try:
        return _registered(client, client.get_model_version(name, number), aliases)
    except MlflowException as error:
        if error.error_code not in _MISSING:
            raise
        return None


def champion(client: Any, name: str) -> Registered | None:
    """The champion; of a model that an earlier release published, the version that was published last."""
    return find(client, name, alias=CHAMPION) or find(client, name, alias=EARLIER_ALIAS)


def with_digest(client: Any, name: str, digest: str) -> Registered | None:
    """The version that was registered with this stack; earlier releases did not tag theirs."""
    found = [each for each in versions(client, name) if each.tags.get(DIGEST) == digest]
    return found[-1] if found else None


def follow(client: Any, record: Record) -> Record:
    """Let the aliases and the reasons in the registry be those of a record; returns the record, marked if they cannot be.

    Versions are found by the digests of their stacks: the numbers of a record may be those of another server.
    """
    aliases, known = _aliases(client, record.name), versions(client, record.name)
    registered = {entry.digest: _with_stack(known, record.name, entry) for entry in record.versions}
    for alias, entry in ((CHAMPION, record.champion), (CHALLENGER, record.challenger)):
        found = None if entry is None else registered[entry.digest]
        if found is not None:
            if aliases.get(alias) != found.version:
                client.set_registered_model_alias(record.name, alias, found.version)
        elif alias == CHALLENGER and alias in aliases:
            client.delete_registered_model_alias(record.name, alias)
    for entry in record.versions:
        found, reason = registered[entry.digest], (entry.reason or "")[:5000]
        if found is not None and reason not in ("", found.tags.get(PROMOTION)):
            client.set_model_version_tag(record.name, found.version, PROMOTION, reason)
    is_ahead = record.champion is not None and registered[record.champion.digest] is None
    if EARLIER_ALIAS in aliases and record.champion is not None and not is_ahead:
        client.delete_registered_model_alias(record.name, EARLIER_ALIAS)
    return dataclasses.replace(record, is_ahead=is_ahead)


def synced(client: Any, record: Record) -> Record:
    """Record of a storage with the champion that the registry names, unless the registry is behind the record."""
    if record.is_ahead:
        return record
    found = champion(client, record.name)
    if found is None:
        return record
    known = record.find(found.digest) if found.digest else None
    entry = found.entry() if known is None else dataclasses.replace(known, version=found.version)
    if record.champion is not None and record.champion.digest == entry.digest:
        return record.with_version(entry)
    return record.promote(entry, f"the alias was given to version {entry.version} in MLflow")


def find_entry(client: Any, name: str, entry: Entry) -> Registered | None:
    """The version with the stack of an entry."""
    return _with_stack(versions(client, name), name, entry)


def _with_stack(known: Sequence[Registered], name: str, entry: Entry) -> Registered | None:
    """Choose the version with the stack of an entry; numbers differ between servers and count only for what has no digest."""
    found = [each for each in known if each.digest == entry.digest]
    if entry.digest.startswith(f"{name}/"):
        found = [each for each in known if not each.digest and each.version == entry.version]
    return next((each for each in reversed(found) if each.version == entry.version), found[-1] if found else None)


def tags_of(entry: Entry) -> dict[str, str]:
    """Tags that tell which stack a version has; they are set as it is made, so that a killed run finds it again."""
    facts = {DIGEST: entry.digest, SYSTEM: entry.system, SNAPSHOT: entry.snapshot}
    return {name: value for name, value in facts.items() if value is not None}


def stack_folder(store: Store, tracking_uri: str, found: Registered, scratch: Path | None = None) -> str:
    """Local folder with the stack of a version.

    Args:
        scratch: folder to download to, if the version is on a server; None takes one that MLflow makes.
    """
    from mlflow.artifacts import download_artifacts

    source = artifacts_here(store, tracking_uri, found.run_id, found.source)
    path = files.to_path(source)
    if path is not None:
        return stack_in(str(path))
    destination = None if scratch is None else str(scratch)
    return stack_in(str(download_artifacts(artifact_uri=source, tracking_uri=tracking_uri, dst_path=destination)))


def stack_in(folder: str) -> str:
    """Stack in the folder of a version: the folder `stack` in it, or the folder itself.

    Raises:
        InputError: `stack` is a link to another place.
    """
    stack = Path(folder, "stack")
    if Path(folder, "stack.json").is_file() or not stack.is_dir():
        return folder
    if not files.is_inside(stack, folder):
        raise InputError(
            f"{stack}: a link to {os.path.realpath(stack)}, outside of the model. Publish the stack again."
        )
    return str(stack)


_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def _aliases(client: Any, name: str) -> dict[str, str]:
    """Alias -> version of a model; empty if there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return {str(alias): str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code not in _MISSING:
            raise
        return {}


def _registered(client: Any, found: Any, aliases: Mapping[str, str]) -> Registered:
    version, tags = str(found.version), dict(found.tags)
    digest = tags.get(DIGEST, "")
    if not digest and found.run_id:
        with contextlib.suppress(Exception):  # the run was deleted
            digest = client.get_run(found.run_id).data.tags.get(DIGEST, "")
    own = tuple(sorted(alias for alias, number in aliases.items() if number == version))
    created = found.creation_timestamp / 1000
    return Registered(found.name, version, digest, found.source, found.run_id or "", created, own, tags)
