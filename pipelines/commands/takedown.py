"""The command that takes rows down."""

import dataclasses
import datetime
import sys
from typing import TYPE_CHECKING

import click

from pipelines.options import JSON, STORAGE, print_json
from unclip.errors import InputError

if TYPE_CHECKING:
    from tasks.lineage.takedown import Ledger


@click.command()
@click.option("--url", multiple=True, help="Rows with this URL.")
@click.option("--domain", multiple=True, help="Rows with a URL on this host or below it.")
@click.option("--key", multiple=True, help="The row with this key.")
@click.option("--sha256", multiple=True, help="Rows whose picture's file has this hash.")
@click.option("--file", "lists", multiple=True, help="Text file with one of these on each line.")
@click.option(
    "--near", type=click.IntRange(0, 16), help="Also pictures whose perceptual hash differs in at most so many bits."
)
@click.option("--dry-run", is_flag=True, help="Only say how many rows it would be.")
@STORAGE
@JSON
def takedown(
    url: tuple[str, ...],
    domain: tuple[str, ...],
    key: tuple[str, ...],
    sha256: tuple[str, ...],
    lists: tuple[str, ...],
    near: int | None,
    dry_run: bool,
    storage: str | None,
    as_json: bool,
) -> None:
    """Remove rows and their bytes everywhere, keep them out for good, and name the runs and models that have seen them.

    Asks the MLflow of the environment, of the storage, and of every run that the storage has on record.

    Exit codes: 0 done; 1 done, but an MLflow did not answer or a preview could not be deleted, both of which are named, and
    the same command finishes it later; 2 something that was given cannot be used; 75 a run is at work in the storage.
    """
    from pipelines.lock import lock
    from pipelines.records import tracking_uris_of
    from pipelines.storage import open_storage
    from tasks.lineage import takedown as takedowns

    given = {"url": url, "domain": domain, "key": key, "sha256": sha256}
    requested = [takedowns.parse(kind, value) for kind, values in given.items() for value in values]
    requested += [tombstone for path in lists for tombstone in takedowns.parse_file(path)]
    if not requested:
        raise InputError("takedown: got nothing to take down. Give --url, --domain, --key, --sha256 or --file.")
    store = open_storage(storage)
    if not store.list("images"):
        raise InputError(f"{store.root}: no pictures are stored here. Name the folder of a pipeline with --storage.")
    if dry_run:
        found = takedowns.find_keys(store, requested, near)
        if as_json:
            asked = [{**dataclasses.asdict(tombstone), "rows": len(keys)} for tombstone, keys in found.items()]
            print_json({"storage": store.root, "requests": asked})
            return
        for tombstone, keys in found.items():
            click.echo(f"{len(keys):>7,} rows  {tombstone}")
        return
    tracking_uris = tracking_uris_of(store)
    with lock(store):
        ledger = takedowns.take_down(store, requested, near, tracking_uris)
        name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
        store.write_json(dataclasses.asdict(ledger), "takedowns", name)
    written = store.uri("takedowns", name)
    if as_json:
        told = dataclasses.asdict(ledger)
        traces_told = told.pop("traces")
        asked = [dataclasses.asdict(tombstone) for tombstone in requested]
        print_json({**told, **traces_told, "storage": store.root, "requests": asked, "ledger": written})
    else:
        _tell(ledger, written)
    traces = ledger.traces
    for run_id, reason in traces.remaining.items():
        click.secho(f"run {run_id}: its previews or report may still show such rows: {reason}", fg="red", err=True)
    for uri, reason in traces.unanswered.items():
        click.secho(
            f"MLflow at {uri} was not asked to the end: {reason}. Repeat the command when it answers.",
            fg="red",
            err=True,
        )
    if traces.remaining or traces.unanswered:
        sys.exit(1)


def _tell(ledger: "Ledger", written: str) -> None:
    traces = ledger.traces
    click.echo(f"{len(ledger.keys):,} rows taken down; their URLs and pictures will be refused from now on")
    for table, count in ledger.deleted.items():
        click.echo(f"    {count:>7,} rows and their bytes deleted from {table}")
    click.echo(f"{len(ledger.datasets)} dataset versions held such rows; these have read them:")
    for run in traces.runs:
        click.echo(f"    run    {run['id']}  {run['experiment']}  {run['name']}  {run['tracking_uri']}")
    for model in traces.models:
        click.echo(f"    model  {model['name']} version {model['version']}  {model['tracking_uri']}")
    for run_id in traces.deleted_previews:
        click.echo(f"previews of run {run_id} showed such rows and are deleted")
    click.echo(
        "Evaluation grids stay: their pictures were drawn by models, though a caption below one may be of such a row."
    )
    click.echo(f"written to {written}")
    click.echo(
        "The next run or refresh makes a dataset version without them; only models trained on that one have not seen them."
    )


COMMANDS = (takedown,)
