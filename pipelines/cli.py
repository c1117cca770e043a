"""The command line. Every command checks what it was given before it starts anything; errors are one line and an exit code."""

import dataclasses
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from pipelines.commands import exchange
from pipelines.commands import plan_train as training_plan
from pipelines.commands import sampling as drawing
from pipelines.commands import train as training
from pipelines.options import CONFIG, PIPELINE, SET, STORAGE
from tasks.store import DEFAULT_ROOT
from unclip.errors import InputError, UnclipError

RETRY_FAILED = click.option(
    "--retry-failed",
    is_flag=True,
    help="Also fetch again what failed for reasons that may have passed, such as timeouts.",
)


class Commands(click.Group):
    """Prints the project's own errors as one line, with their exit code; a command's name may be two words."""

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if " ".join(arguments[:2]) in self.commands:
            arguments = [" ".join(arguments[:2]), *arguments[2:]]
        return super().resolve_command(context, arguments)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except UnclipError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on where this one stopped", err=True)
            context.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="unclip")
def main() -> None:
    """Train text-to-image models the unCLIP way, from a list of URLs to pictures."""


@main.command()
@PIPELINE
@CONFIG
@SET
@STORAGE
@RETRY_FAILED
@click.option("--until", metavar="STAGE", help="Run this stage and those that it needs, and no others.")
def run(
    pipeline: str,
    run_file: str | None,
    assignments: tuple[str, ...],
    storage: str | None,
    retry_failed: bool,
    until: str | None,
) -> None:
    """Run a pipeline. What is done is not done again: to resume, run the same command."""
    from pipelines.config import load
    from pipelines.run import run_pipeline

    config = load(pipeline, run_file, assignments, storage)
    sys.exit(run_pipeline(pipeline, config, until=until, retry_failed=retry_failed))


@main.command()
@PIPELINE
@CONFIG
@SET
@STORAGE
@RETRY_FAILED
def refresh(
    pipeline: str, run_file: str | None, assignments: tuple[str, ...], storage: str | None, retry_failed: bool
) -> None:
    """Bring the dataset up to date with its list of URLs: only what is new is fetched and embedded."""
    from pipelines.config import load
    from pipelines.run import run_pipeline
    from pipelines.systems.unclip import DATASET_STAGE

    config = load(pipeline, run_file, assignments, storage)
    sys.exit(run_pipeline(pipeline, config, until=DATASET_STAGE, retry_failed=retry_failed))


@main.command()
@PIPELINE
@CONFIG
@SET
@STORAGE
@click.option("--mermaid", is_flag=True, help="Print the DAG as Mermaid text only.")
@click.option("--picture", metavar="PNG", help="Draw the DAG to a file.")
def plan(
    pipeline: str,
    run_file: str | None,
    assignments: tuple[str, ...],
    storage: str | None,
    mermaid: bool,
    picture: str | None,
) -> None:
    """Print the resolved configuration and what a run would do; start nothing.

    `unclip plan train` says what training takes of GPUs.
    """
    from pipelines import dag as dags
    from pipelines.config import load
    from pipelines.run import compose, prepare
    from tasks.store import Store
    from unclip.config import to_dict

    config = prepare(load(pipeline, run_file, assignments, storage))
    dag = compose(config)
    states = dags.states(dag, Store(config.storage))
    labels = {name: state.label for name, state in states.items()}
    if picture:
        Path(picture).write_bytes(dags.picture(dag, labels))
        click.echo(picture)
    if mermaid:
        click.echo(dags.mermaid(dag, labels), nl=False)
    if mermaid or picture:
        return
    click.echo(json.dumps(to_dict(config), indent=2))
    click.echo()
    width, why_width = max(map(len, dag)), max(len(state.why) for state in states.values())
    for name, node in dag.items():
        state = states[name]
        help_line = node.stage.help.splitlines()[0]
        click.echo(f"{name:<{width}} {state.label:<7} {state.why:<{why_width}}  {help_line}")


@main.command()
@STORAGE
@click.option("--last", default=5, show_default=True, help="How many runs to show.")
def status(storage: str | None, last: int) -> None:
    """Show the last runs and how their stages fared."""
    from pipelines.run import stage_events
    from tasks.stage import is_going_on
    from tasks.store import Store

    store = Store(storage or DEFAULT_ROOT)
    runs = store.list("runs")[-last:]
    if not runs:
        click.echo(f"no runs in {store.root}")
    for run_id in runs:
        record = store.read_json("runs", run_id, "run.json")
        started = datetime.datetime.fromtimestamp(record["started"]).astimezone()
        state = record["state"]
        if state == "running" and not is_going_on(record):
            state = "killed"
        click.echo(f"{run_id}  {record['pipeline']}  {started:%Y-%m-%d %H:%M}  {state}")
        events = stage_events(store, run_id)
        width = max(map(len, events), default=0)
        for name, event in sorted(events.items(), key=lambda item: item[1]["at"]):
            if state != "running" and event["state"] == "running":
                event["state"] = "stopped" if state == "stopped" else "killed"
            detail = event.get("message") or (f"{event['seconds']:.0f} s" if event.get("seconds") is not None else "")
            click.echo(f"    {name:<{width}} {event['state']:<8} {detail}".rstrip())


@main.command()
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
def takedown(
    url: tuple[str, ...],
    domain: tuple[str, ...],
    key: tuple[str, ...],
    sha256: tuple[str, ...],
    lists: tuple[str, ...],
    near: int | None,
    dry_run: bool,
    storage: str | None,
) -> None:
    """Remove rows and their bytes everywhere, keep them out for good, and name the runs and models that have seen them.

    Asks the MLflow of the environment, of the storage, and of every run that the storage has on record.

    Exit codes: 0 done; 1 done, but an MLflow did not answer or a preview could not be deleted, both of which are named, and
    the same command finishes it later; 2 something that was given cannot be used; 75 a run is at work in the storage.
    """
    from pipelines.lock import lock
    from pipelines.run import tracking_uris_of
    from tasks.lineage import takedown as takedowns
    from tasks.store import Store

    given = {"url": url, "domain": domain, "key": key, "sha256": sha256}
    requested = [takedowns.parse(kind, value) for kind, values in given.items() for value in values]
    requested += [tombstone for path in lists for tombstone in takedowns.parse_file(path)]
    if not requested:
        raise InputError("takedown: got nothing to take down. Give --url, --domain, --key, --sha256 or --file.")
    store = Store(storage or DEFAULT_ROOT)
    if not store.list("images"):
        raise InputError(f"{store.root}: no pictures are stored here. Name the folder of a pipeline with --storage.")
    if dry_run:
        for tombstone, keys in takedowns.find_keys(store, requested, near).items():
            click.echo(f"{len(keys):>7,} rows  {tombstone}")
        return
    tracking_uris = tracking_uris_of(store)
    with lock(store):
        ledger = takedowns.take_down(store, requested, near, tracking_uris)
        name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
        store.write_json(dataclasses.asdict(ledger), "takedowns", name)
    click.echo(f"{len(ledger.keys):,} rows taken down; their URLs and pictures will be refused from now on")
    for table, count in ledger.deleted.items():
        click.echo(f"    {count:>7,} rows and their bytes deleted from {table}")
    traces = ledger.traces
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
    click.echo(f"written to {store.uri('takedowns', name)}")
    click.echo(
        "The next run or refresh makes a dataset version without them; only models trained on that one have not seen them."
    )
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


@main.group()
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
    for (before, after), changed in found.changes.items():
        click.echo(f"{len(changed):>7,}  {before} -> {after}")
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


@main.command()
@click.option("--port", default=5000, show_default=True)
@STORAGE
def ui(port: int, storage: str | None) -> None:
    """Open the MLflow UI of a storage folder, on loopback."""
    from pipelines.run import tracking_uri_of
    from pipelines.scene_server import check_port
    from tasks.store import Store

    store = Store(storage or DEFAULT_ROOT)
    uri = tracking_uri_of(store)
    if uri.startswith("sqlite") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise InputError(
            f"{store.root}: no run was tracked here. Run a pipeline first, or name its folder with --storage."
        )
    if uri.startswith("http"):
        click.echo(f"the runs are tracked at {uri}")
        return
    check_port(port, "--port")
    click.echo(f"http://127.0.0.1:{port}")
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    hosts = f"127.0.0.1:{port},localhost:{port}"
    server = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", uri]
    artifacts = ["--default-artifact-root", store.uri("mlflow-artifacts"), "--allowed-hosts", hosts, "--workers", "1"]
    os.execve(sys.executable, [sys.executable, "-m", *server, *artifacts], environment)


for command in (*drawing.COMMANDS, *exchange.COMMANDS, *training.COMMANDS, *training_plan.COMMANDS):
    main.add_command(command)


if __name__ == "__main__":
    main()
