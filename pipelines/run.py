"""Pipeline runs: checks first, then Ray, MLflow and the console, and a summary at the end."""

import contextlib
import os
import time
from typing import Any

from pipelines import dag as dags
from pipelines import scene_server
from pipelines.cluster import WORKER_ENVIRONMENT, check_cluster, start_ray
from pipelines.console import Console
from pipelines.dataset import PipelineConfig
from pipelines.lock import lock
from pipelines.pipeline import compose
from pipelines.prepare import prepare
from pipelines.records import close_run, heartbeat, open_run, record_cluster
from pipelines.shadows import refuse_shadows
from pipelines.summary import print_summary, summarise, write_results
from tasks import signals
from tasks.run_records import stage_events
from tasks.stage import Failure, Run
from tasks.store import Store
from tasks.tracking import flatten
from unclip import files
from unclip.config import require
from unclip.errors import ConfigError, StageError, StoppedError, UnclipError
from unclip.messages import reason_of

STOP_PATIENCE_SECONDS = 25.0
"""Time for training stages to write a checkpoint when the run is stopped; Kubernetes kills after 30 s."""


def run_pipeline(pipeline: str, config: PipelineConfig, until: str | None = None, retry_failed: bool = False) -> int:
    """Run a pipeline and return the exit code.

    Args:
        until: last stage to run, after the stages it depends on; None runs all stages.

    Raises:
        UnclipError: the checks failed and nothing was started, or a stage failed.
    """
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        refuse_shadows(os.getcwd())  # Ray's workers search it first
    except ImportError as error:
        raise ConfigError(str(error)) from None
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
    check_cluster(config)
    with lock(store), contextlib.ExitStack() as stack:
        if config.scenes is not None:
            stack.enter_context(scene_server.serve(config.scenes))
        run = open_run(pipeline, config, store)
        stack.enter_context(heartbeat(run, store))
        state = "failed"
        try:
            dag = compose(config, run)
            dag = dags.up_to(dag, until) if until else dag
            labels = {name: state.label for name, state in states.items()}
            run.tracker.bytes(dags.mermaid(dag, labels).encode(), "dag.mmd")
            run.tracker.bytes(dags.render_png(dag, labels), "dag.png")
            pending = [name for name, state in states.items() if not state.artifact]
            record_cluster(run, store, start_ray(config, pending))
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
        run.tracker.json(store.portable(summary), "summary.json")
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
    """Execute the DAG with progress on the console; return the failures."""
    import warnings

    import ray

    last = list(dag)[-1]
    with warnings.catch_warnings():
        # Ray warns that DAGNode.execute will change; it works in all versions we allow
        warnings.simplefilter("ignore")
        result = dag[last].ray_node.execute()
    console = Console(store, run.id, list(dag))
    ready: list[Any] = []
    with signals.stop_on_signal() as is_stopping:
        while not ready:
            ready, _ = ray.wait([result], timeout=1.0)
            console.refresh()
            if is_stopping():
                _stop_training(dag, run, store, console)
                raise StoppedError(
                    f"{run.pipeline}: stopped as asked. Finished work is kept; run the same command again to resume."
                )
    try:
        outcome = ray.get(result)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UnclipError):
            raise cause from None
        raise StageError(
            f"a process of the cluster died: {reason_of(error)}. Finished work is kept; run the same command again."
        ) from None
    failed = [event for event in stage_events(store, run.id).values() if event["state"] == "failed"]
    # On a full disk a failure may not have been recorded.
    unrecorded = [outcome] if isinstance(outcome, Failure) else []
    return [Failure(event["stage"], event["message"]) for event in failed] or unrecorded


def _stop_training(dag: dags.Dag, run: Run, store: Store, console: Console) -> None:
    """Ask running training stages to write a checkpoint and stop; wait for them up to STOP_PATIENCE_SECONDS."""
    files.write(run.stop_uri, b"")
    deadline = time.monotonic() + STOP_PATIENCE_SECONDS
    started = set(store.list("runs", run.id, "progress"))  # stages not started yet wait for CPUs

    def is_training() -> bool:
        running = [name for name, event in stage_events(store, run.id).items() if event["state"] == "running"]
        return any(f"{name}.json" in started and hasattr(dag[name].config, "trainer") for name in running)

    if is_training():
        print("stopping: training stages write a checkpoint first; interrupt again to stop at once", flush=True)
    while is_training() and time.monotonic() < deadline:
        time.sleep(0.5)
        console.refresh()
