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
    from pipelines.dataset import DATASET_STAGE
    from pipelines.run import run_pipeline

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
    from tasks.run_records import last_runs
    from tasks.store import Store

    store = Store(storage or DEFAULT_ROOT)
    runs = last_runs(store, last)
    if not runs:
        click.echo(f"no runs in {store.root}")
    for run in runs:
        started = datetime.datetime.fromtimestamp(run.started).astimezone()
        click.echo(f"{run.id}  {run.pipeline}  {started:%Y-%m-%d %H:%M}  {run.state}")
        width = max((len(stage.name) for stage in run.stages), default=0)
        for stage in run.stages:
            detail = stage.message or (f"{stage.seconds:.0f} s" if stage.seconds is not None else "")
            click.echo(f"    {stage.name:<{width}} {stage.state:<8} {detail}".rstrip())


COMMANDS = (run, refresh, plan, status)
