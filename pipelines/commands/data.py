"""The commands that look at dataset versions and rows."""

import click

from pipelines.options import STORAGE
from tasks.store import DEFAULT_ROOT


@click.group()
def data() -> None:
    """Look at dataset versions and at single rows."""


@data.command("list")
@STORAGE
def list_versions(storage: str | None) -> None:
    """List the dataset versions."""
    from tasks.lineage.provenance import versions
    from tasks.store import Store

    for version in versions(Store(storage or DEFAULT_ROOT)):
        made = version.facts["committed"].astimezone()
        counts = "  ".join(f"{count:,} {name}" for name, count in version.counts.items())
        click.echo(
            f"{version.number:>3}  {version.digest[:8]}  {version.facts['pipeline']}  {made:%Y-%m-%d %H:%M}  {counts}"
        )


@data.command()
@click.argument("old")
@click.argument("new", default="latest")
@click.option("--keys", is_flag=True, help="Also print the keys.")
@STORAGE
def diff(old: str, new: str, keys: bool, storage: str | None) -> None:
    """Say how two dataset versions differ; name them by number, digest or `latest`."""
    from tasks.lineage.provenance import difference, find_version
    from tasks.store import Store

    store = Store(storage or DEFAULT_ROOT)
    versions = find_version(store, old), find_version(store, new)
    found = difference(*versions)
    click.echo(" -> ".join(f"{version.number} {version.digest[:8]}" for version in versions))
    for name, before in found.counts[0].items():
        after = found.counts[1][name]
        click.echo(f"    {name:<8} {before:>9,} -> {after:>9,}  {after - before:+,}")
    for (fate, new_fate), changed in found.changes.items():
        click.echo(f"{len(changed):>7,}  {fate} -> {new_fate}")
        for key in changed if keys else ():
            click.echo(f"             {key}")
    if not found.changes:
        click.echo("the same rows with the same fates")


@data.command()
@click.argument("key")
@STORAGE
def show(key: str, storage: str | None) -> None:
    """Say where a row came from, why it was dropped, and which dataset versions and runs contain it.

    KEY is a row's key or the first six or more of its 32 digits. Exit codes: 0 the row was found, whatever became of it; 2 no
    row or several have this key.
    """
    from tasks.lineage.provenance import show as facts_of
    from tasks.store import Store

    for name, value in facts_of(Store(storage or DEFAULT_ROOT), key).items():
        if isinstance(value, dict):
            click.echo(name)
            for inner, detail in value.items():
                click.echo(f"    {inner:<16} {detail}")
        else:
            click.echo(f"{name:<20} {value}")


COMMANDS = (data,)
