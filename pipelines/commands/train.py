"""The command that trains one model by itself."""

import dataclasses
import sys
import tempfile
from typing import TYPE_CHECKING

import click

from pipelines.options import CONFIG, PIPELINE, SET, STORAGE, complete
from pipelines.preset import model_names
from unclip.background import repeatedly
from unclip.config import nearest, require
from unclip.errors import ConfigError, StageError, StoppedError

if TYPE_CHECKING:
    from pipelines.dag import Dag
    from pipelines.dataset import PipelineConfig
    from tasks.stage import Artifact


@click.command()
@click.argument("model", shell_complete=lambda *given: complete(model_names(), given[-1]))
@PIPELINE
@CONFIG
@SET
@STORAGE
@click.option(
    "--on-ray", is_flag=True, help="By the workers of a Ray cluster, as `unclip run` does, not in this process."
)
@click.option(
    "--overfit", metavar="N", type=int, help="Only see whether the model can memorise N rows; keeps nothing. Try 16."
)
def train(
    model: str,
    pipeline: str,
    run_file: str | None,
    assignments: tuple[str, ...],
    storage: str | None,
    on_ray: bool,
    overfit: int | None,
) -> None:
    """Train one MODEL of a PIPELINE on the dataset that the pipeline made last; a later `unclip run` finds it done.

    MODEL is the stage of a part of the system, as `unclip plan` lists them; a part with several members is named with the
    member, as in `[xs.256]` and x-256.

    To resume, run the same command. On SIGTERM or Ctrl-C it writes a checkpoint first.
    """
    from pipelines.composition import compose
    from pipelines.config import load
    from pipelines.prepare import prepare
    from pipelines.run import run_pipeline

    config = load(pipeline, run_file, assignments, storage)
    models = trained_models(compose(config))
    if model not in models:
        raise ConfigError(f"{model}: no model of {pipeline}. {nearest(model, models)}")
    if overfit is not None:
        require(overfit >= 1, "--overfit", overfit, "at least 1")
        sys.exit(0 if memorises(model, pipeline, prepare(config), overfit) else 1)
    if on_ray:
        sys.exit(run_pipeline(pipeline, config, until=model))
    train_here(model, pipeline, prepare(config))


def trained_models(dag: "Dag") -> list[str]:
    """The stages of a DAG that train a part."""
    return [name for name, node in dag.items() if node.stage.part is not None]


def train_here(model: str, pipeline: str, config: "PipelineConfig") -> None:
    """Train in this process; what it makes is the same artifact as the pipeline's stage makes."""
    from pipelines.composition import compose
    from pipelines.console import Console
    from pipelines.lock import lock
    from pipelines.records import close_run, open_run
    from tasks.stage import Call, Failure, execute
    from tasks.store import Store

    store, dag = Store(config.storage), compose(config)
    parents = _parents(model, pipeline, config)
    with lock(store):
        run = dataclasses.replace(open_run(pipeline, config, store), trains_here=True)
        result: Artifact | Failure = Failure(model, "interrupted")
        try:
            console = Console(store, run.id, [model])
            with repeatedly(1.0, console.refresh, "console"):
                result = execute(Call(dag[model].stage, dag[model].config), run, parents)
            console.refresh()
        finally:
            asked = isinstance(result, Failure) and result.exit_code == StoppedError.exit_code
            close_run(run, store, "stopped" if asked else "failed" if isinstance(result, Failure) else "done")
    if isinstance(result, Failure):
        error = StageError(result.message)
        error.exit_code = result.exit_code
        raise error
    click.echo(result.uri)


def memorises(model: str, pipeline: str, config: "PipelineConfig", num_rows: int) -> bool:
    """Train on a few rows until a model must know them by heart; says whether it does and, if not, what is wrong."""
    from pipelines.composition import compose
    from tasks.snapshots import Snapshot
    from tasks.stages.train import training_of
    from tasks.training import train_rows
    from unclip.training import overfitting, parallel

    dataset, *needed = _parents(model, pipeline, config)
    node = compose(config)[model]
    section, part = node.config, node.stage.part
    assert part is not None
    section = dataclasses.replace(section, trainer=overfitting.settings(section.trainer, num_rows))
    training = training_of(part, section, Snapshot.of(dataset.facts), *needed)
    keys = training.keys()[:num_rows]
    diagnosis = overfitting.Diagnosis()
    click.echo(f"{model}: {overfitting.NUM_STEPS} steps on {len(keys)} rows")
    with tempfile.TemporaryDirectory(prefix="unclip-overfit-") as folder:
        train_rows(dataclasses.replace(training, keys=lambda: keys), folder, diagnosis, parallel.by_itself())
    losses = "  ".join(f"{loss:.3f}" for loss in diagnosis.relative_losses)
    click.echo(f"loss beside that of predicting the mean: {losses}")
    click.secho(diagnosis.verdict, fg="green" if diagnosis.has_memorised else "red")
    return diagnosis.has_memorised


def _parents(model: str, pipeline: str, config: "PipelineConfig") -> list["Artifact"]:
    """What the model's stage is trained from, as the pipeline made it last.

    Raises:
        ConfigError: something of it is still to be made.
    """
    from pipelines import dag as dags
    from pipelines.composition import compose
    from tasks.store import Store

    dag = compose(config)
    states = dags.states(dag, Store(config.storage))
    missing = [name for name in dag[model].parents if states[name].artifact is None]
    if missing:
        raise ConfigError(
            f"{config.storage}: has no {' and no '.join(missing)} of these settings. "
            f"Make it first: unclip run {pipeline} --until {missing[0]}"
        )
    return [artifact for name in dag[model].parents if (artifact := states[name].artifact)]


COMMANDS = (train,)
