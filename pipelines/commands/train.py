"""Command that trains one model of a pipeline."""

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING

import click

from pipelines.options import CONFIG, PIPELINE, SET, STORAGE, SYSTEM, complete
from pipelines.preset import model_names
from unclip.background import run_periodically
from unclip.config import nearest, require
from unclip.errors import ConfigError, StageError, StoppedError
from unclip.scratch import scratch_folder

if TYPE_CHECKING:
    from pipelines.dag import Dag
    from pipelines.dataset import PipelineConfig
    from tasks.stage import Artifact


@click.command()
@click.argument("model", shell_complete=lambda *given: complete(model_names(), given[-1]))
@PIPELINE
@CONFIG
@SYSTEM
@SET
@STORAGE
@click.option(
    "--on-ray",
    is_flag=True,
    help="Train on the workers of a Ray cluster, as `unclip run` does, instead of in this process.",
)
@click.option(
    "--overfit", metavar="N", type=int, help="Only test if the model can memorise N rows, such as 16; keep nothing."
)
def train(
    model: str,
    pipeline: str,
    run_file: str | None,
    system: str | None,
    assignments: tuple[str, ...],
    storage: str | None,
    on_ray: bool,
    overfit: int | None,
) -> None:
    """Train one MODEL of a PIPELINE.

    Uses the current dataset of the pipeline; a later `unclip run` reuses the trained model. MODEL is the stage of a part,
    as listed by `unclip plan`. A part with several members is named with the member: the section `[xs.256]` is the stage
    x-256.

    To resume, run the same command again. On SIGTERM or Ctrl-C, training writes a checkpoint and stops.
    """
    from pipelines.config import load
    from pipelines.pipeline import compose
    from pipelines.prepare import prepare
    from pipelines.run import run_pipeline

    config = load(pipeline, run_file, assignments, storage, system)
    models = trained_models(compose(config))
    if model not in models:
        raise ConfigError(f"{model}: unknown model of {pipeline}. {nearest(model, models)}")
    if overfit is not None:
        require(overfit >= 1, "--overfit", overfit, "at least 1")
        sys.exit(0 if memorises(model, pipeline, prepare(config), overfit) else 1)
    if on_ray:
        sys.exit(run_pipeline(pipeline, config, until=model))
    train_in_process(model, pipeline, prepare(config))


def trained_models(dag: "Dag") -> list[str]:
    """Return the stages of a DAG that train a part."""
    return [name for name, node in dag.items() if node.stage.part is not None]


def train_in_process(model: str, pipeline: str, config: "PipelineConfig") -> None:
    """Train in this process; the artifact is the same as that of the pipeline's stage."""
    from pipelines import dag as dags
    from pipelines.console import Console
    from pipelines.pipeline import compose
    from pipelines.records import close_run, heartbeat, open_run
    from tasks.stage import Call, Failure, execute
    from tasks.store import Store

    store, dag = Store(config.storage), compose(config)
    parents = _parents(model, pipeline, config)
    dags.refuse_if_in_use({model: dags.states(dag, store)[model]}, store)
    run = dataclasses.replace(open_run(pipeline, config, store), trains_in_process=True)
    result: Artifact | Failure = Failure(model, "interrupted")
    try:
        with contextlib.closing(Console(store, run.id, [model])) as console:
            with heartbeat(run, store), run_periodically(1.0, console.refresh, "console"):
                result = execute(Call(dag[model].stage, dag[model].config), run, parents)
            console.refresh()
    finally:
        is_stopped = isinstance(result, Failure) and result.exit_code == StoppedError.exit_code
        close_run(run, store, "stopped" if is_stopped else "failed" if isinstance(result, Failure) else "done")
    if isinstance(result, Failure):
        error = StageError(result.message)
        error.exit_code = result.exit_code
        raise error
    click.echo(result.uri)


def memorises(model: str, pipeline: str, config: "PipelineConfig", num_rows: int) -> bool:
    """Train on a few rows until the model should have memorised them; print a diagnosis, and return True if it has."""
    from pipelines.pipeline import compose
    from tasks.snapshots import Snapshot
    from tasks.stages.train import build_training
    from tasks.training import train_rows
    from unclip.training import overfitting, parallel

    dataset, *inputs = _parents(model, pipeline, config)
    node = compose(config)[model]
    section, part = node.config, node.stage.part
    assert part is not None
    section = dataclasses.replace(section, trainer=overfitting.settings(section.trainer, num_rows))
    training = build_training(part, section, Snapshot.of(dataset.facts), *inputs)
    places = training.places()
    few = places.take(places.spread(num_rows))
    diagnosis = overfitting.Diagnosis()
    click.echo(f"{model}: {overfitting.NUM_STEPS} steps on {len(few)} rows")
    with scratch_folder("overfit") as folder:
        train_rows(dataclasses.replace(training, places=lambda: few), str(folder), diagnosis, parallel.single_process())
    losses = "  ".join(f"{loss:.3f}" for loss in diagnosis.relative_losses)
    click.echo(f"loss relative to predicting the mean: {losses}")
    click.secho(diagnosis.verdict, fg="green" if diagnosis.has_memorised else "red")
    return diagnosis.has_memorised


def _parents(model: str, pipeline: str, config: "PipelineConfig") -> list["Artifact"]:
    """Return the current artifacts that the model's stage depends on.

    Raises:
        ConfigError: one of them does not exist yet.
    """
    from pipelines import dag as dags
    from pipelines.pipeline import compose
    from tasks.store import Store

    dag = compose(config)
    states = dags.states(dag, Store(config.storage))
    missing = [name for name in dag[model].parents if states[name].artifact is None]
    if missing:
        raise ConfigError(
            f"{config.storage}: has no {' and no '.join(missing)} for these settings. "
            f"Run this first: unclip run {pipeline} --until {missing[0]}"
        )
    return [artifact for name in dag[model].parents if (artifact := states[name].artifact)]


COMMANDS = (train,)
