"""Commands that list published models, show where they come from, and promote them."""

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from pipelines.options import JSON, STORAGE, print_json
from unclip.errors import InputError
from unclip.messages import reason_of, without_credentials

if TYPE_CHECKING:
    from tasks.published import Entry, Record
    from tasks.registry import Registered
    from tasks.store import Store


@click.group()
def models() -> None:
    """List, show and promote published models."""


@dataclasses.dataclass(frozen=True)
class _Listed:
    """A version, as the storage and the registry know it."""

    name: str
    entry: "Entry"
    aliases: tuple[str, ...]


@models.command("list")
@STORAGE
@JSON
def list_models(storage: str | None, as_json: bool) -> None:
    """List the published models and their versions."""
    store, records, registered, unanswered = _all_known(storage)
    listed = [version for record in records for version in _listed(record, registered.get(record.name, []))]
    _warn(unanswered)
    if as_json:
        print_json({"storage": store.root, "models": [_facts(version) for version in listed], "unanswered": unanswered})
        return
    if not listed:
        click.echo(f"no models in {store.root}")
        return
    rows = [("model", "", "system", "dataset", "accuracy", "time", "")]
    for version in listed:
        entry = version.entry
        rows.append(
            (
                f"{version.name}/{entry.label}",
                ", ".join(version.aliases),
                entry.system or "",
                (entry.snapshot or "")[:8],
                _accuracy(entry),
                f"{_local_time(entry.at):%Y-%m-%d %H:%M}" if entry.at else "",
                entry.reason or "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@models.command()
@click.argument("model")
@STORAGE
@JSON
def show(model: str, storage: str | None, as_json: bool) -> None:
    """Show a version and where it comes from.

    MODEL is NAME, its champion, NAME@ALIAS or NAME/VERSION. Prints its metrics, why it is champion or challenger, the dataset
    version that it was trained on with the refreshes and lists behind it, and the runs of all stages that it was made of.
    """
    from tasks.lineage.models import trace

    store, version = _find(storage, model)
    lineage = trace(store, version.entry)
    if as_json:
        print_json({**_facts(version), "lineage": _lineage_facts(dataclasses.asdict(lineage))})
        return
    entry = version.entry
    facts = {
        "model": f"{version.name}/{entry.label}",
        "aliases": ", ".join(version.aliases),
        "why": entry.reason,
        "system": entry.system,
        "time": f"{_local_time(entry.at):%Y-%m-%d %H:%M}" if entry.at else None,
        "run": entry.run,
        "resolution": entry.image_size,
        "stack": entry.stack or "in MLflow's registry",
        "digest": entry.digest,
    }
    for name, value in facts.items():
        if value not in (None, ""):
            click.echo(f"{name:<12} {value}")
    for title, lines in (
        ("metrics of held-out captions", [f"{name:<26} {value:.3f}" for name, value in sorted(entry.metrics.items())]),
        ("dataset versions", [_dataset_line(each) for each in lineage.dataset_versions]),
        ("stages", [_stage_line(each) for each in lineage.stages]),
        ("rows of its dataset version were taken down", list(lineage.takedowns)),
    ):
        if lines:
            click.echo(title)
        for line in lines:
            click.echo(f"    {line}")


@models.command()
@click.argument("model", metavar="NAME/VERSION")
@click.option("--reason", help="Reason to record, in place of that it was promoted by hand.")
@STORAGE
def promote(model: str, reason: str | None, storage: str | None) -> None:
    """Make a version the champion, by hand.

    NAME@challenger works as well. `unclip sample` and all commands without --model take it from now on.
    """
    version = _find(storage, model)[1]
    words = reason or "promoted by hand"
    record = _change(storage, version.name, lambda record: record.promote(_entry_in(record, version), words))
    _print_change(record)


@models.command()
@click.argument("name")
@click.option("--reason", help="Reason to record, in place of that it was rolled back.")
@STORAGE
def rollback(name: str, reason: str | None, storage: str | None) -> None:
    """Make the champion before the champion again.

    Repeat the command to go back further.
    """
    from tasks import published

    published.check_name(name, "NAME")

    def change(record: "Record") -> "Record":
        label = "nothing" if record.champion is None else f"version {record.champion.label}"
        return record.roll_back(reason or f"rolled back from {label}")

    _print_change(_change(storage, name, change))


def _change(storage: str | None, name: str, change: "Callable[[Record], Record]") -> "Record":
    """Change the champion of a name, and let MLflow's aliases follow; without an MLflow that answers, they follow later.

    Raises:
        InputError: the stack of the new champion is nowhere.
    """
    from pipelines.published import is_there
    from pipelines.storage import open_storage
    from tasks import published, registry

    store = open_storage(storage)
    client, unanswered = _connect(store)

    def follow(record: "Record") -> "Record | None":
        nonlocal unanswered
        if client is None:
            return None
        try:
            return registry.follow(client, record)
        except Exception as error:  # of the server, its database or the network
            unanswered = reason_of(error)
            return None

    with published.changing(store, name) as record:
        if client is not None:
            record = registry.synced(client, record)
        record = change(record)
        champion = record.champion
        if champion is not None and champion.version is None and not is_there(champion):
            raise InputError(
                f"{name}/{champion.label}: {champion.stack}, its stack, is not there any more. `unclip models list` shows "
                f"the others, and `unclip models promote {name}/VERSION` takes one."
            )
        record = published.commit(store, record, follow)
    if unanswered is not None:
        click.secho(f"MLflow's aliases stay as they are until it answers: {unanswered}", fg="yellow", err=True)
    return record


def _print_change(record: "Record") -> None:
    entry = record.champion
    assert entry is not None
    click.echo(f"{record.name}/{entry.label} is the champion: {entry.reason}")
    if record.former:
        before = record.find(record.former[-1])
        label = record.former[-1][:8] if before is None else before.label
        click.echo(f"`unclip models rollback {record.name}` returns to {record.name}/{label}")


def _entry_in(record: "Record", version: _Listed) -> "Entry":
    return record.find(version.entry.digest) or version.entry


def _find(storage: str | None, model: str) -> "tuple[Store, _Listed]":
    """Find a version in the records of a storage or in the registry.

    Raises:
        InputError: there is none.
    """
    from pipelines.published import entry_of, parse
    from tasks import published

    request = parse(model, "MODEL")
    store, records, registered, unanswered = _all_known(storage, request.name)
    record = next(iter(records), published.Record(request.name))
    listed = _listed(record, registered.get(request.name, []))
    if request.version is not None:
        entry = entry_of(record, request)
        digests = [entry.digest] if entry is not None else []
        found = [each for each in listed if each.entry.version == request.version or each.entry.digest in digests]
    else:
        found = [each for each in listed if request.alias in each.aliases]
    _warn(unanswered)
    if not found:
        known = ", ".join(f"{each.name}/{each.entry.label}" for each in listed) or "no version of it"
        raise InputError(f"{model}: not found in {store.root} and its MLflow. There is {known}.")
    return store, found[-1]


def _all_known(
    storage: str | None, name: str | None = None
) -> "tuple[Store, list[Record], dict[str, list[Registered]], str | None]":
    """Records of a storage and versions in the registry, of one model or all; and why MLflow does not answer, if so."""
    from pipelines.storage import open_tracked
    from tasks import published, registry

    store, _ = open_tracked(storage)
    records = {record.name: record for record in ([published.read(store, name)] if name else published.read_all(store))}
    registered: dict[str, list[Registered]] = {}
    client, unanswered = _connect(store)
    if client is not None:
        try:
            for each in [name] if name else registry.names(client):
                registered[each] = registry.versions(client, each)
                records[each] = registry.synced(client, records.get(each, published.Record(each)))
        except Exception as error:  # of the server, its database or the network
            unanswered = reason_of(error)
    ordered = [records[key] for key in sorted(records)]
    return store, ordered, registered, unanswered


def _listed(record: "Record", registered: "list[Registered]") -> list[_Listed]:
    """Versions of a record and those of the registry that it lacks, oldest first."""
    known = {entry.digest for entry in record.versions}
    listed = []
    for entry in record.versions:
        numbers = [each.version for each in registered if each.digest == entry.digest]
        number = entry.version if entry.version in numbers or not numbers else numbers[-1]
        listed.append(_Listed(record.name, dataclasses.replace(entry, version=number), record.aliases_of(entry)))
    others = [each for each in registered if not {each.digest, each.entry().digest} & known]
    listed += [_Listed(record.name, each.entry(), each.aliases) for each in others]
    return sorted(listed, key=lambda each: (each.entry.version is None, int(each.entry.version or 0), each.entry.at))


def _connect(store: "Store") -> tuple[Any, str | None]:
    """Client of the MLflow of a storage, or None and why it does not answer."""
    from pipelines.records import tracking_uri_of
    from tasks.database import settle
    from tasks.tracking import checked_client

    try:
        uri = tracking_uri_of(store)
        settle(store, uri)
        return checked_client(uri), None
    except Exception as error:  # of the server, its database or the network
        return None, without_credentials(reason_of(error))


def _warn(unanswered: str | None) -> None:
    if unanswered is not None:
        click.secho(f"MLflow does not answer, so this is what the storage knows: {unanswered}", fg="yellow", err=True)


def _facts(version: _Listed) -> dict[str, Any]:
    from pipelines.published import facts_of

    facts = facts_of(version.name, version.entry, version.aliases)
    return {**facts, "at": _local_time(version.entry.at).isoformat() if version.entry.at else None}


def _lineage_facts(lineage: dict[str, Any]) -> dict[str, Any]:
    for stage in lineage["stages"]:
        stage["ended"] = None if stage["ended"] is None else _local_time(stage["ended"]).isoformat()
    return lineage


def _accuracy(entry: "Entry") -> str:
    for name, words in (("accuracy.all", ""), ("clip_score", " CLIP score")):
        if name in entry.metrics:
            return f"{entry.metrics[name]:.3f}{words}"
    return ""


def _dataset_line(version: Mapping[str, Any]) -> str:
    counts = "  ".join(f"{count:,} {name}" for name, count in version["counts"].items())
    made = f"  run {', '.join(version['runs'])}" if version["runs"] else ""
    lists = f"  list {', '.join(version['lists'])}" if version["lists"] else ""
    return f"{version['number']:>3}  {version['digest'][:8]}  {version['committed'][:16]}  {counts}{made}{lists}"


def _stage_line(stage: Mapping[str, Any]) -> str:
    done = "no record of its run" if stage["run"] is None else f"run {stage['run']}"
    seconds = "" if stage["seconds"] is None else f"{stage['seconds']:.0f} s"
    return f"{stage['stage']:<14} {stage['fingerprint'][:8]}  {done}  {seconds}".rstrip()


def _local_time(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds).astimezone()


COMMANDS = (models,)
