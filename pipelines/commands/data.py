"""Commands that show dataset versions and rows."""

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from pipelines.options import JSON, STORAGE, print_json

if TYPE_CHECKING:
    from tasks.lineage.provenance import Version


@click.group()
def data() -> None:
    """Inspect dataset versions and rows."""


@data.command("list")
@STORAGE
@JSON
def list_versions(storage: str | None, as_json: bool) -> None:
    """List the dataset versions."""
    from pipelines.storage import open_storage
    from tasks.lineage.provenance import versions

    store = open_storage(storage)
    found = versions(store)
    if as_json:
        print_json({"storage": store.root, "versions": [_facts(version) for version in found]})
        return
    for version in found:
        committed = version.facts["committed"].astimezone()
        counts = "  ".join(f"{count:,} {name}" for name, count in version.counts.items())
        click.echo(
            f"{version.number:>3}  {version.digest[:8]}  {version.facts['pipeline']}  {committed:%Y-%m-%d %H:%M}  {counts}"
        )


@data.command()
@click.argument("old")
@click.argument("new", default="latest")
@click.option("--keys", is_flag=True, help="Also print the keys of the rows.")
@STORAGE
@JSON
def diff(old: str, new: str, keys: bool, storage: str | None, as_json: bool) -> None:
    """Compare two dataset versions.

    OLD and NEW are each a number, a digest or `latest`; NEW defaults to `latest`.
    """
    from pipelines.storage import open_storage
    from tasks.lineage.provenance import difference, find_version

    store = open_storage(storage)
    versions = find_version(store, old), find_version(store, new)
    found = difference(*versions, with_keys=keys)
    if as_json:
        changes = [
            {
                "before": before,
                "after": after,
                "rows": number,
                "keys": found.keys[before, after].to_pylist() if keys else None,
            }
            for (before, after), number in found.changes.items()
        ]
        print_json({"old": _facts(versions[0]), "new": _facts(versions[1]), "changes": changes})
        return
    click.echo(" -> ".join(f"{version.number} {version.digest[:8]}" for version in versions))
    for name, before in found.counts[0].items():
        after = found.counts[1][name]
        click.echo(f"    {name:<8} {before:>9,} -> {after:>9,}  {after - before:+,}")
    for fates, number in found.changes.items():
        click.echo(f"{number:>7,}  {' -> '.join(fates)}")
        for key in found.keys[fates] if keys else ():
            click.echo(f"             {key}")
    if not found.changes:
        click.echo("no differences")


@data.command()
@click.argument("key")
@STORAGE
@JSON
def show(key: str, storage: str | None, as_json: bool) -> None:
    """Show where a row came from and what became of it.

    Prints why the row was dropped, and which dataset versions and runs contain it. KEY is the key of the row, or at least
    its first 6 of 32 digits. Exit codes: 0 if the row was found, kept or not; 2 if no row or several rows match.
    """
    from pipelines.storage import open_storage
    from tasks.lineage import provenance

    store = open_storage(storage)
    if as_json:
        print_json(dataclasses.asdict(provenance.find_row(store, key)))
        return
    for name, value in provenance.show(store, key).items():
        if isinstance(value, dict):
            click.echo(name)
            for inner, detail in value.items():
                click.echo(f"    {inner:<16} {detail}")
        else:
            click.echo(f"{name:<20} {value}")


def _facts(version: "Version") -> dict[str, Any]:
    facts = {"number": version.number, "digest": version.digest, "pipeline": version.facts["pipeline"]}
    return {**facts, "committed": version.facts["committed"].isoformat(), "counts": version.counts}


COMMANDS = (data,)
