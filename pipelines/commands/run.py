"""The commands that run a pipeline, and that tell what it would do and what it did."""

import datetime
import json
import sys
from pathlib import Path

import click

from pipelines.options import CONFIG, PIPELINE, SET, STORAGE
from tasks.store import DEFAULT_ROOT

RETRY_FAILED = click.option(
    "--retry-failed",
    is_flag=True,
    help="Also fetch again what failed for reasons that may have passed, such as timeouts.",
)


@click.command()
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


@click.command()
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


@click.command()
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
    from pipelines.composition import compose
    from pipelines.config import load
    from pipelines.prepare import prepare
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


@click.command()
@STORAGE
@click.option("--last", default=5, show_default=True, help="How many runs to show.")
def status(storage: str | None, last: int) -> None:
    """Show the last runs and how their stages fared."""
    from pipelines.console import stage_events
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


COMMANDS = (run, refresh, plan, status)
