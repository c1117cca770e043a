"""Running a pipeline: checks first, then Ray, MLflow and the console; ends with a summary."""

import contextlib
import os
import time
from typing import Any

from pipelines import dag as dags
from pipelines import scene_server
from pipelines.cluster import WORKER_ENVIRONMENT, start_ray
from pipelines.composition import compose
from pipelines.console import Console
from pipelines.dataset import PipelineConfig
from pipelines.lock import lock
from pipelines.prepare import prepare
from pipelines.records import close_run, open_run
from pipelines.summary import print_summary, summarise, write_results
from tasks import signals
from tasks.run_records import stage_events
from tasks.stage import Failure, Run
from tasks.store import Store
from tasks.tracking import flatten
from unclip import files
from unclip.config import require
from unclip.errors import StageError, StoppedError, UnclipError

STOP_PATIENCE_SECONDS = 25.0
"""For trainings to write a checkpoint when the run is asked to stop; Kubernetes kills after thirty."""


def run_pipeline(pipeline: str, config: PipelineConfig, until: str | None = None, retry_failed: bool = False) -> int:
    """Run a pipeline; returns the exit code.

    Args:
        until: the last stage to run, with those that it needs; None runs all.

    Raises:
        UnclipError: nothing was started, or a stage failed.
    """
    os.environ.update(WORKER_ENVIRONMENT)
    started = time.monotonic()
    config = prepare(config, retry_failed)
    store = Store(config.storage)
    todo = compose(config)
    require(until is None or until in todo, "--until", until, f"a stage: {', '.join(todo)}")
    todo = dags.up_to(todo, until) if until else todo
    states = dags.states(todo, store)
    if all(state.artifact for state in states.values()):
        print(f"{pipeline}: everything is up to date; nothing was started.")
        _finish(config, pipeline, todo, store)
        return 0
    with lock(store), contextlib.ExitStack() as stack:
        if config.scenes is not None:
            stack.enter_context(scene_server.serve(config.scenes))
        run = open_run(pipeline, config, store)
        state = "failed"
        try:
            dag = compose(config, run)
            dag = dags.up_to(dag, until) if until else dag
            labels = {name: state.label for name, state in states.items()}
            run.tracker.bytes(dags.mermaid(dag, labels).encode(), "dag.mmd")
            run.tracker.bytes(dags.picture(dag, labels), "dag.png")
            start_ray(config)
            failures = _execute(dag, run, store)
            state = "failed" if failures else "done"
        except StoppedError:
            state = "stopped"
            raise
        finally:
            close_run(run, store, state)
        if failures:
            raise StageError("\n".join(f"{failure.stage} failed: {failure.message}" for failure in failures))
        summary = _finish(config, pipeline, dag, store)
        run.tracker.json(summary, "summary.json")
        run.tracker.metrics({key: value for key, value in flatten(summary).items() if isinstance(value, (int, float))})
    print(f"took {time.monotonic() - started:.0f} s")
    return 0


def _finish(config: PipelineConfig, pipeline: str, dag: dags.Dag, store: Store) -> dict[str, Any]:
    artifacts = {name: state.artifact for name, state in dags.states(dag, store).items() if state.artifact}
    summary = summarise(pipeline, artifacts)
    write_results(summary, artifacts, store)
    print_summary(summary, store, config)
    return summary


def _execute(dag: dags.Dag, run: Run, store: Store) -> list[Failure]:
    """Execute the DAG, telling on the console how its stages fare; returns the stages that failed."""
    import warnings

    import ray

    last = list(dag)[-1]
    with warnings.catch_warnings():
        # DAGNode.execute is announced to change; it is the API of the versions we allow
        warnings.simplefilter("ignore")
        result = dag[last].ray_node.execute()
    console = Console(store, run.id, list(dag))
    ready: list[Any] = []
    with signals.asked_to_stop() as is_asked:
        while not ready:
            ready, _ = ray.wait([result], timeout=1.0)
            console.refresh()
            if is_asked():
                _stop_trainings(dag, run, store, console)
                raise StoppedError(
                    f"{run.pipeline}: stopped as asked. Nothing is lost: run the same command again to go on."
                )
    try:
        outcome = ray.get(result)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UnclipError):
            raise cause from None
        reason = str(error).strip().splitlines()[0]
        raise StageError(
            f"a process of the cluster died: {reason}. Finished work is kept; run the same command again."
        ) from None
    failed = [event for event in stage_events(store, run.id).values() if event["state"] == "failed"]
    # What a full disk kept from being recorded is still told.
    told = [outcome] if isinstance(outcome, Failure) else []
    return [Failure(event["stage"], event["message"]) for event in failed] or told


def _stop_trainings(dag: dags.Dag, run: Run, store: Store, console: Console) -> None:
    """Ask those that run to write a checkpoint and end, and wait for them, but not for ever."""
    files.write(run.stop_uri, b"")
    deadline = time.monotonic() + STOP_PATIENCE_SECONDS
    started = set(store.list("runs", run.id, "progress"))  # others wait for CPUs

    def train() -> bool:
        running = [name for name, event in stage_events(store, run.id).items() if event["state"] == "running"]
        return any(f"{name}.json" in started and hasattr(dag[name].config, "trainer") for name in running)

    if train():
        print("stopping: what is trained writes a checkpoint first; ask again to stop at once", flush=True)
    while train() and time.monotonic() < deadline:
        time.sleep(0.5)
        console.refresh()
