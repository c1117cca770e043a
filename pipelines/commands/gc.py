"""Command that frees the space of what nothing needs any more."""

import click

from pipelines.options import FOLLOW_LINKS, JSON, STORAGE, TRACKING_URIS, print_json, say_links


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
@click.option(
    "--without-mlflow",
    multiple=True,
    metavar="URI",
    help="Do without the registered versions of this MLflow, which is gone for good; may be repeated.",
)
@TRACKING_URIS
@FOLLOW_LINKS
@STORAGE
@JSON
def gc(
    delete: bool,
    days: float,
    without_mlflow: tuple[str, ...],
    tracking_uris: tuple[str, ...],
    follow_links: bool,
    storage: str | None,
    as_json: bool,
) -> None:
    """Free the space of files that nothing needs any more.

    Kept are all dataset versions, the results, the published stacks and registered versions, and the last result of each stage
    of each pipeline. What goes are older results, unfinished stages, checkpoints of finished trainings, intermediate files, and
    parts of tables that no kept version has.

    Exit codes: 0 done; 2 invalid input, or an MLflow did not answer, or only a run in the storage names it, or a record cannot
    be read, so that nothing is deleted; 75 a run is changing the tables (--delete only). Trainings and evaluations go on
    meanwhile, and what they use stays.
    """
    import contextlib

    from pipelines.records import tracking_uris_of
    from pipelines.storage import open_storage
    from tasks import garbage
    from tasks.lock import lock
    from unclip.errors import InputError, StorageError
    from unclip.messages import without_credentials

    store = open_storage(storage)
    found_uris = tracking_uris_of(store, tracking_uris)
    asked = {without_credentials(uri).rstrip("/"): uri for uri in found_uris.named}
    unnamed = {without_credentials(uri).rstrip("/"): uri for uri in found_uris.unnamed}
    for uri in without_mlflow:
        shown = without_credentials(uri).rstrip("/")
        if asked.pop(shown, None) is None and unnamed.pop(shown, None) is None:
            known = ", ".join([*asked, *unnamed]) or "none"
            raise InputError(f"--without-mlflow: got {shown}, expected an MLflow of this storage: {known}.")
    for shown in unnamed:
        raise StorageError(
            f"MLflow at {shown} was not asked for its registered versions, as only records of the storage name it. Nothing was "
            f"deleted. Give --tracking-uri {shown} if it is yours, or --without-mlflow {shown} to do without it."
        )
    with lock(store) if delete else contextlib.nullcontext() as held:
        found = garbage.find(store, list(asked.values()), days, follow_links)
        if delete:
            found = garbage.delete(store, found, held, follow_links)
    if not follow_links:
        say_links(store.links())
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
