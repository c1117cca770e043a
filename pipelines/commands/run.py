"""Commands that run a pipeline, plan a run and show past runs."""

import dataclasses
import datetime
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.options import CONFIG, JSON, PIPELINE, SET, STORAGE, SYSTEM, print_json

if TYPE_CHECKING:
    from pipelines.dag import Node, State
    from tasks.run_records import RunRecord

RETRY_FAILED = click.option(
    "--retry-failed",
    is_flag=True,
    help="Also retry downloads that failed for transient reasons, such as timeouts.",
)


@click.command()
@PIPELINE
@CONFIG
@SYSTEM
@SET
@STORAGE
@RETRY_FAILED
@click.option("--until", metavar="STAGE", help="Run only this stage and the stages it depends on.")
def run(
    pipeline: str,
    run_file: str | None,
    system: str | None,
    assignments: tuple[str, ...],
    storage: str | None,
    retry_failed: bool,
    until: str | None,
) -> None:
    """Run or resume a PIPELINE.

    Finished stages are skipped: to resume, run the same command again.
    """
    from pipelines.config import load
    from pipelines.run import run_pipeline

    config = load(pipeline, run_file, assignments, storage, system)
    sys.exit(run_pipeline(pipeline, config, until=until, retry_failed=retry_failed))


@click.command()
@PIPELINE
@CONFIG
@SYSTEM
@SET
@STORAGE
@RETRY_FAILED
def refresh(
    pipeline: str,
    run_file: str | None,
    system: str | None,
    assignments: tuple[str, ...],
    storage: str | None,
    retry_failed: bool,
) -> None:
    """Update the dataset of a PIPELINE from its list of URLs.

    Only new rows are downloaded and embedded.
    """
    from pipelines.config import load
    from pipelines.dataset import DATASET_STAGE
    from pipelines.run import run_pipeline

    config = load(pipeline, run_file, assignments, storage, system)
    sys.exit(run_pipeline(pipeline, config, until=DATASET_STAGE, retry_failed=retry_failed))


@click.command()
@PIPELINE
@CONFIG
@SYSTEM
@SET
@STORAGE
@click.option("--mermaid", is_flag=True, help="Print only the DAG, as Mermaid text.")
@click.option("--picture", metavar="PNG", help="Write a diagram of the DAG to this file.")
@JSON
def plan(
    pipeline: str,
    run_file: str | None,
    system: str | None,
    assignments: tuple[str, ...],
    storage: str | None,
    mermaid: bool,
    picture: str | None,
    as_json: bool,
) -> None:
    """Print the configuration and the stages a run would execute.

    Starts and writes nothing, except the file of --picture.

    `unclip plan train` estimates the GPU memory for training.
    """
    from pipelines import dag as dags
    from pipelines.config import load
    from pipelines.pipeline import compose
    from pipelines.prepare import prepare
    from tasks.store import Store
    from unclip.config import to_dict

    if as_json and (mermaid or picture):
        raise click.UsageError("--json cannot be combined with --mermaid or --picture.")
    config = prepare(load(pipeline, run_file, assignments, storage, system), read_only=True)
    dag = compose(config)
    states = dags.states(dag, Store(config.storage))
    labels = {name: state.label for name, state in states.items()}
    if picture:
        Path(picture).write_bytes(dags.render_png(dag, labels))
        click.echo(picture)
    if mermaid:
        click.echo(dags.mermaid(dag, labels), nl=False)
    if mermaid or picture:
        return
    if as_json:
        stages = [_stage_document(node, states[name]) for name, node in dag.items()]
        print_json({"pipeline": pipeline, "storage": config.storage, "config": to_dict(config), "stages": stages})
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
@click.option("--last", default=5, show_default=True, help="Number of runs to show.")
@JSON
def status(storage: str | None, last: int, as_json: bool) -> None:
    """Show the last runs and the states of their stages."""
    from pipelines.storage import open_storage
    from tasks.run_records import last_runs

    store = open_storage(storage)
    runs = last_runs(store, last)
    if as_json:
        print_json({"storage": store.root, "runs": [_run_document(run) for run in runs]})
        return
    if not runs:
        click.echo(f"no runs in {store.root}")
    for run in runs:
        of = " ".join(filter(None, (run.pipeline, run.system)))
        click.echo(f"{run.id}  {of}  {_local_time(run.started):%Y-%m-%d %H:%M}  {run.state}")
        width = max((len(stage.name) for stage in run.stages), default=0)
        for stage in run.stages:
            detail = stage.message or (f"{stage.seconds:.0f} s" if stage.seconds is not None else "")
            click.echo(f"    {stage.name:<{width}} {stage.state:<8} {detail}".rstrip())


def _stage_document(node: "Node", state: "State") -> dict[str, Any]:
    artifact = (
        {"digest": state.artifact.digest, "uri": state.artifact.uri}
        if state.artifact
        else {"digest": None, "uri": None}
    )
    return {"name": node.stage.name, "state": state.label, "why": state.why, "after": list(node.parents), **artifact}


def _run_document(run: "RunRecord") -> dict[str, Any]:
    times = {"started": run.started, "ended": run.ended}
    iso_times = {name: None if seconds is None else _local_time(seconds).isoformat() for name, seconds in times.items()}
    return {**dataclasses.asdict(run), **iso_times}


def _local_time(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds).astimezone()


COMMANDS = (run, refresh, plan, status)
