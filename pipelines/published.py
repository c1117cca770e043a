"""Lookup of published stacks, by `--model` or in a storage."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import click

from pipelines.storage import open_storage, open_tracked
from tasks import published
from tasks.published import CHALLENGER, CHAMPION, NAME, Entry, Record
from tasks.store import Store
from unclip import files
from unclip.errors import InputError
from unclip.messages import reason_of, without_credentials

_EXPECTED = "NAME, NAME@ALIAS, NAME/VERSION or the folder of a stack"


@dataclasses.dataclass(frozen=True)
class Found:
    """A published stack."""

    folder: str
    """Local folder of the stack."""
    name: str | None = None
    """Name of the registered model; None for a folder. Likewise the version."""
    version: str | None = None
    aliases: tuple[str, ...] = ()
    digest: str | None = None
    """Digest of the stack, if it is known."""


@dataclasses.dataclass(frozen=True)
class ModelName:
    """Parts of a `--model`."""

    name: str
    alias: str = CHAMPION
    version: str | None = None

    def __str__(self) -> str:
        return f"{self.name}/{self.version}" if self.version is not None else f"{self.name}@{self.alias}"


def find_stack(storage: str, model: str | None) -> str:
    """Return the local folder of a published stack; see `find_model`."""
    return find_model(storage, model).folder


def find_model(storage: str, model: str | None) -> Found:
    """Find a published stack.

    MLflow's aliases count where it answers, and the records of the storage otherwise, or if MLflow could not follow the last
    promotion. A stack that the storage has is never downloaded.

    Args:
        storage: storage that the pipeline published to.
        model: "name", its champion; "name@alias"; "name/version", by its number in the registry or the beginning of its digest;
            or the folder of a stack. None takes the champion that was promoted last in the storage.

    Raises:
        InputError: nothing was published, or there is no such model.
    """
    if model is None:
        return _last_promoted(open_storage(storage))
    if is_folder(model):
        return Found(model)
    request = parse(model)
    store, uri = open_tracked(storage)
    record = published.read(store, request.name) if store.list(published.FOLDER) else Record(request.name)
    known = entry_of(record, request)
    if record.is_ahead and known is not None:
        return _of_storage(store, uri, record, known)
    from tasks import registry
    from tasks.tracking import checked_client

    shown = without_credentials(uri)
    try:
        client = checked_client(uri)
        if request.version is None and request.alias == CHAMPION:
            found = registry.champion(client, request.name)
        else:
            found = registry.find(client, request.name, request.alias, request.version)
    except Exception as error:  # of the server, its database or the network
        if known is not None and is_there(known):
            click.echo(f"MLflow at {shown} does not answer; {request} is that of {store.root}", err=True)
            return _of_storage(store, uri, record, known)
        raise InputError(f"--model {model}: MLflow at {shown} does not have it: {reason_of(error)}") from None
    if found is None:
        if known is not None and known.version is None:
            return _of_storage(store, uri, record, known)
        raise InputError(f"--model {model}: neither MLflow at {shown} nor {store.root} has it. {_known_models(store)}")
    own = record.find(found.digest) if found.digest else None
    if own is not None and has_stack(own):
        folder = own.stack
    else:
        try:
            folder = registry.stack_folder(store, uri, found)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"--model {model}: MLflow at {shown} does not give its files: {reason_of(error)}"
            ) from None
    return Found(folder, request.name, found.version, found.aliases, found.digest or None)


def is_folder(model: str) -> bool:
    """Return True if a `--model` is the folder of a stack rather than a name."""
    return model.startswith(("/", ".", "~")) or Path(model, "stack.json").is_file()


def parse(model: str, where: str = "--model") -> ModelName:
    """Split "name", "name@alias" or "name/version".

    Raises:
        InputError: it is none of these.
    """
    match = re.fullmatch(rf"({NAME})(?:@({NAME})|/({NAME}))?", model)
    if match is None or len(model) > 500:
        raise InputError(f"{where}: got {model[:500]!r}, expected {_EXPECTED}.")
    return ModelName(match[1], match[2] or CHAMPION, match[3])


def entry_of(record: Record, request: ModelName) -> Entry | None:
    """Version of a record that a request names."""
    if request.version is not None:
        return record.named(request.version)
    return {CHAMPION: record.champion, CHALLENGER: record.challenger}.get(request.alias)


def has_stack(entry: Entry) -> bool:
    """Return True if the stack is in a local folder."""
    return "://" not in entry.stack and is_there(entry)


def is_there(entry: Entry) -> bool:
    """Return True if the storage has the stack."""
    return bool(entry.stack) and files.exists(f"{entry.stack}/stack.json")


def _last_promoted(store: Store) -> Found:
    """The champion that was promoted last.

    Raises:
        InputError: there is none.
    """
    records = published.read_all(store)
    champions = [(record.champion.at, record) for record in records if record.champion is not None]
    if not champions:
        if not records:
            raise InputError(
                f"{store.root}: nothing has been published here. Run a pipeline, or give its folder with --storage."
            )
        [first, *_] = [entry for record in records for entry in record.versions]
        raise InputError(
            f"{store.root}: has no champion: {first.reason}. Sample from {records[0].name}@challenger, or let "
            f"`unclip models promote {records[0].name}/{first.label}` make it the champion."
        )
    record = max(champions, key=lambda each: each[0])[1]
    assert record.champion is not None
    if has_stack(record.champion):
        return _own(record, record.champion)
    return _of_storage(*open_tracked(store.root), record, record.champion)


def _own(record: Record, entry: Entry) -> Found:
    return Found(entry.stack, record.name, entry.version, record.aliases_of(entry), entry.digest)


def _of_storage(store: Store, uri: str, record: Record, entry: Entry) -> Found:
    """A version of a record; if the storage does not have its stack any more, from MLflow.

    Raises:
        InputError: neither has it.
    """
    if has_stack(entry):
        return _own(record, entry)
    from mlflow.artifacts import download_artifacts

    from tasks import registry
    from tasks.tracking import checked_client

    gone = f"{record.name}/{entry.label}: {entry.stack or store.root} does not have its stack any more"
    advice = f"`unclip models list` shows the others, `unclip models rollback {record.name}` returns to the one before."
    try:
        if is_there(entry):  # in an object store
            return dataclasses.replace(_own(record, entry), folder=str(download_artifacts(artifact_uri=entry.stack)))
        found = registry.find_entry(checked_client(uri), record.name, entry)
        folder = None if found is None else registry.stack_folder(store, uri, found)
    except Exception as error:
        raise InputError(f"{gone}, and MLflow does not give it: {reason_of(error)}. {advice}") from None
    if folder is None or not Path(folder, "stack.json").is_file():
        raise InputError(f"{gone}, nor has MLflow. {advice}")
    return dataclasses.replace(_own(record, entry), folder=folder)


def _known_models(store: Store) -> str:
    names = published.names(store)
    return f"Published here: {', '.join(names)}." if names else "`unclip models list` shows what there is."


def facts_of(name: str, entry: Entry, aliases: tuple[str, ...]) -> dict[str, Any]:
    """Facts of a version for `--json`."""
    return {
        "name": name,
        "version": entry.version,
        "digest": entry.digest,
        "aliases": list(aliases),
        "system": entry.system,
        "snapshot": entry.snapshot,
        "pipeline": entry.pipeline,
        "run": entry.run,
        "image_size": entry.image_size,
        "metrics": dict(entry.metrics),
        "reason": entry.reason,
        "stack": entry.stack or None,
    }
