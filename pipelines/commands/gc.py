"""Command that frees the space of what nothing needs any more."""

import click

from pipelines.options import JSON, STORAGE, print_json
from unclip.errors import StorageError


@click.command()
@click.option("--delete", is_flag=True, help="Delete the files; without it, they are only listed.")
@click.option(
    "--days",
    type=click.FloatRange(min=0),
    default=7,
    show_default=True,
    metavar="DAYS",
    help="Keep files that changed within this many days.",
)
@STORAGE
@JSON
def gc(delete: bool, days: float, storage: str | None, as_json: bool) -> None:
    """Free the space of files that nothing needs any more.

    Kept are all dataset versions, the results, the published stacks and registered versions, and the last result of each stage
    of each pipeline. What goes are older results, unfinished stages, checkpoints of finished trainings, intermediate files, and
    parts of tables that no kept version has.

    Exit codes: 0 done; 2 invalid input, or an MLflow did not answer or a record is damaged, so that nothing is deleted; 75 a run
    is using the storage (--delete only).
    """
    import contextlib

    from mlflow.exceptions import MlflowException

    from pipelines.records import tracking_uris_of
    from pipelines.storage import open_storage
    from tasks import garbage
    from tasks.lock import lock
    from unclip.messages import without_credentials

    store = open_storage(storage)
    tracking_uris = tracking_uris_of(store)
    with lock(store) if delete else contextlib.nullcontext():
        try:
            found = garbage.find(store, tracking_uris, days)
        except MlflowException as error:
            shown = ", ".join(map(without_credentials, tracking_uris))
            raise StorageError(
                f"MLflow at {shown} does not tell its registered versions: {error.message.splitlines()[0]}. "
                "Nothing was deleted; try again when it answers."
            ) from None
        if delete:
            garbage.delete(store, found)
    size = sum(each.size for each in found)
    if as_json:
        entries = [
            {"path": each.path, "what": each.what, "files": each.num_files, "bytes": each.size} for each in found
        ]
        print_json({"storage": store.root, "is_deleted": delete, "bytes": size, "garbage": entries})
        return
    for each in found:
        click.echo(f"{each.size / 1e6:>12,.1f} MB  {each.what}: {each.path}")
    click.echo(f"{size / 1e6:>12,.1f} MB  {'deleted' if delete else 'can be deleted: repeat with --delete'}")


COMMANDS = (gc,)
