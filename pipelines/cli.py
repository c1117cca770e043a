"""The command line. Every command checks what it was given before it starts anything; errors are one line and an exit code."""

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from tasks.store import DEFAULT_ROOT
from unclip.errors import InputError, UnclipError

PIPELINE = click.argument("pipeline", shell_complete=lambda *_: _pipelines())
CONFIG = click.option("--config", "run_file", metavar="TOML", help="Run file: what differs from the pipeline's preset.")
SET = click.option("--set", "assignments", metavar="SECTION.FIELD=VALUE", multiple=True, help="Override one setting.")
STORAGE = click.option(
    "--storage", metavar="FOLDER", envvar="UNCLIP_STORAGE", help="Folder or URI for everything the pipeline makes."
)


class Commands(click.Group):
    """Prints the project's own errors as one line, with their exit code."""

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
def run(pipeline: str, run_file: str | None, assignments: tuple[str, ...], storage: str | None) -> None:
    """Run a pipeline. What is done is not done again: to resume, run the same command."""
    from pipelines.config import load
    from pipelines.run import run_pipeline

    sys.exit(run_pipeline(pipeline, load(pipeline, run_file, assignments, storage)))


@main.command()
@PIPELINE
@CONFIG
@SET
@STORAGE
def refresh(pipeline: str, run_file: str | None, assignments: tuple[str, ...], storage: str | None) -> None:
    """Bring the dataset up to date with its list of URLs: only what is new is fetched and embedded."""
    from pipelines.config import load
    from pipelines.run import run_pipeline

    sys.exit(run_pipeline(pipeline, load(pipeline, run_file, assignments, storage), dataset_only=True))


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
    """Print the resolved configuration and what a run would do; start nothing."""
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
    width = max(len(state.why) for state in states.values())
    for name, node in dag.items():
        state = states[name]
        click.echo(f"{name:<11} {state.label:<7} {state.why:<{width}}  {node.stage.help.splitlines()[0]}")


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
        for name, event in sorted(stage_events(store, run_id).items(), key=lambda item: item[1]["at"]):
            if state == "killed" and event["state"] == "running":
                event["state"] = "killed"
            detail = event.get("message") or (f"{event['seconds']:.0f} s" if event.get("seconds") is not None else "")
            click.echo(f"    {name:<11} {event['state']:<8} {detail}".rstrip())


@main.command()
@click.argument("caption")
@click.option("--num", default=8, show_default=True, help="How many pictures.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same pictures.")
@click.option("--guidance-scale", type=float, help="Of the decoder; 1 is off.  [default: as published]")
@click.option("--prior-guidance-scale", type=float, help="Of the prior; 1 is off.  [default: as published]")
@click.option("--out", default="samples.png", show_default=True, help="PNG to write.")
@click.option("--model", default=None, help="Registered model, name or name@alias.  [default: the one in the storage]")
@STORAGE
def sample(
    caption: str,
    num: int,
    seed: int,
    guidance_scale: float | None,
    prior_guidance_scale: float | None,
    out: str,
    model: str | None,
    storage: str | None,
) -> None:
    """Draw pictures of a caption with the published stack."""
    import dataclasses

    from pipelines.published import find_stack

    if num < 1:
        raise InputError(f"--num: got {num}, expected at least 1.")
    if not caption.strip():
        raise InputError("caption: got nothing, expected a description of the picture.")
    if not Path(out).resolve().parent.is_dir():
        raise InputError(f"--out: the folder {Path(out).resolve().parent} does not exist. Make it or name another.")
    folder = find_stack(storage or DEFAULT_ROOT, model)

    from unclip import pictures
    from unclip.generation import Stack

    stack = Stack.load(folder)
    scales = {"guidance_scale": guidance_scale, "prior_guidance_scale": prior_guidance_scale}
    given = {name: value for name, value in scales.items() if value is not None}
    sampling = dataclasses.replace(stack.sampling, **given)  # type: ignore[arg-type]
    with click.progressbar(length=num, label="drawing") as bar:
        images = stack.text2image([caption] * num, seed=seed, sampling=sampling, progress=bar.update)
    Path(out).write_bytes(pictures.png(pictures.grid(images, columns=min(num, 8))))
    click.echo(out)


@main.command()
@click.option("--port", default=5000, show_default=True)
@STORAGE
def ui(port: int, storage: str | None) -> None:
    """Open the MLflow UI of a storage folder, on loopback."""
    from pipelines.scene_server import check_port
    from tasks.store import Store

    store = Store(storage or DEFAULT_ROOT)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.root}/mlflow.db"
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


def _pipelines() -> list[str]:
    from pipelines.config import pipeline_names

    return pipeline_names()


if __name__ == "__main__":
    main()
