"""Command that takes rows down."""

import dataclasses
import sys
from typing import TYPE_CHECKING

import click

from pipelines.options import JSON, STORAGE, TRACKING_URIS, print_json
from unclip.errors import InputError

if TYPE_CHECKING:
    from tasks.lineage.takedown import Ledger


@click.command()
@click.option("--url", multiple=True, help="Take down rows with this URL, or path of a local file.")
@click.option("--domain", multiple=True, help="Take down rows with a URL on this host or its subdomains.")
@click.option("--key", multiple=True, help="Take down the row with this key.")
@click.option("--sha256", multiple=True, help="Take down rows whose image file has this hash.")
@click.option("--file", "lists", multiple=True, help="Text file with one URL, domain, key or hash per line.")
@click.option(
    "--near",
    metavar="N",
    type=click.IntRange(0, 16),
    help="Also take down, and keep out, images whose perceptual hash differs by at most N bits.",
)
@click.option("--dry-run", is_flag=True, help="Only print the number of rows.")
@click.option(
    "--wait",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Wait for a run that makes a dataset; after that, leave the recorded request to it.",
)
@TRACKING_URIS
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
    wait: float,
    tracking_uris: tuple[str, ...],
    storage: str | None,
    as_json: bool,
) -> None:
    """Delete rows everywhere, and block them from now on.

    Lists the runs, checkpoints and models that have seen the rows. Runs and models are looked up in the MLflow of the
    environment, of the storage, and of --tracking-uri; checkpoints in the records of the storage. An MLflow that only runs in
    the storage name gets no request, since a storage that was copied could name any: it counts as one that did not answer.

    The request is recorded first, whatever else uses the storage. If stages that make a dataset hold its tables for longer than
    --wait seconds, their run carries the request out before it commits anything else; the next run does if it dies.

    Exit codes: 0 done or recorded; 1 rows deleted, but an MLflow did not answer or a preview could not be deleted: the command
    prints which, and running it again completes the takedown; 2 invalid input.
    """
    from pipelines.records import tracking_uris_of
    from pipelines.storage import open_storage
    from pipelines.takedowns import carry_out_request
    from tasks import tombstones
    from tasks.lineage import takedown as takedowns
    from tasks.lineage.traces import UNNAMED, Traces
    from unclip.errors import AlreadyRunningError

    given = {"url": url, "domain": domain, "key": key, "sha256": sha256}
    requested = [takedowns.parse(kind, value) for kind, values in given.items() for value in values]
    requested += [tombstone for path in lists for tombstone in takedowns.parse_file(path)]
    if not requested:
        raise InputError("takedown: got nothing to take down. Give --url, --domain, --key, --sha256 or --file.")
    store = open_storage(storage)
    if not store.list():
        raise InputError(f"{store.root}: no images are stored here. Give the folder of a pipeline with --storage.")
    if dry_run:
        found = takedowns.find_keys(store, requested, near)
        if as_json:
            requests = [{**dataclasses.asdict(tombstone), "rows": len(keys)} for tombstone, keys in found.items()]
            print_json({"storage": store.root, "requests": requests})
            return
        for tombstone, keys in found.items():
            click.echo(f"{len(keys):>7,} rows  {tombstone}")
        return
    tracking_uris_of(store, tracking_uris)  # raises if there is none to search
    request = tombstones.record(store, requested, near)
    state = "done"
    try:
        ledger = carry_out_request(store, request, named=tracking_uris)
    except AlreadyRunningError:
        keys = takedowns.expand(store, request)
        try:
            ledger = carry_out_request(store, request, wait, tracking_uris)
        except AlreadyRunningError as error:
            state, owner = "recorded", str(error)
            ledger = takedowns.Ledger(tuple(map(str, requested)), tuple(sorted(keys)), {}, (), (), Traces())
    written = store.uri("takedowns", f"{request.id}.json")
    if as_json:
        document = dataclasses.asdict(ledger)
        document |= document.pop("traces")
        requests = [dataclasses.asdict(tombstone) for tombstone in requested]
        facts = {"storage": store.root, "requests": requests, "state": state}
        print_json({**document, **facts, "ledger": written if state == "done" else None})
    elif state == "recorded":
        click.echo(f"recorded: {len(keys):,} rows are known, and blocked from now on. Nothing is deleted yet.")
        click.echo(owner.partition(". ")[0])
        click.echo(
            "It deletes them before it commits anything else to the dataset; if it dies, the next "
            f"run or refresh does, or `unclip takedown` again. The ledger will be {written}"
        )
    else:
        _print_ledger(ledger, written)
    traces = ledger.traces
    for run_id, reason in traces.remaining.items():
        click.secho(f"run {run_id}: its previews or report may still show these rows: {reason}", fg="red", err=True)
    for uri, reason in traces.unanswered.items():
        again = f"with --tracking-uri {uri}, if it is yours" if reason == UNNAMED else "when it answers"
        click.secho(
            f"MLflow at {uri} could not be searched completely: {reason}. Run the command again {again}.",
            fg="red",
            err=True,
        )
    if traces.remaining or traces.unanswered:
        sys.exit(1)


def _print_ledger(ledger: "Ledger", written: str) -> None:
    traces = ledger.traces
    click.echo(f"{len(ledger.keys):,} rows taken down; their URLs and images are blocked from now on")
    for table, count in ledger.deleted.items():
        click.echo(f"    {count:>7,} rows and their bytes deleted from {table}")
    click.echo(f"{len(ledger.datasets)} dataset versions contained these rows; runs and models that read them:")
    for run in traces.runs:
        click.echo(f"    run    {run['id']}  {run['experiment']}  {run['name']}  {run['tracking_uri']}")
    for model in traces.models:
        click.echo(f"    model  {model['name']} version {model['version']}  {model['tracking_uri']}")
    for found in ledger.checkpoints:
        tracked = "" if found["mlflow_run"] else ", not tracked by MLflow"
        click.echo(f"    stage  {found['folder']}  run {found['run']}, {found['state']}{tracked}")
    for run_id in traces.deleted_previews:
        click.echo(f"previews of run {run_id} showed these rows and were deleted")
    click.echo("Images that models sampled for captions of these rows stay, without the captions.")
    click.echo(f"ledger written to {written}")
    click.echo(
        "The next run or refresh creates a dataset version without these rows. Only models trained on it have not seen them."
    )


COMMANDS = (takedown,)
