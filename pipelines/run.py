"""Pipeline runs: checks first, then Ray, MLflow and the console, and a summary at the end."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import dag as dags
from pipelines import scene_server
from pipelines.cluster import WORKER_ENVIRONMENT, check_cluster, start_ray, wait_for_resources
from pipelines.console import Console, say
from pipelines.dataset import PipelineConfig
from pipelines.notifications import describe_end, notify
from pipelines.pipeline import compose
from pipelines.prepare import prepare
from pipelines.preset import results_name
from pipelines.records import close_run, heartbeat, open_run, record_cluster, tracking_uri
from pipelines.shadows import refuse_shadows
from pipelines.summary import print_summary, summarise, write_results
from pipelines.takedowns import carry_out_recorded, print_carried_out
from tasks import signals, tombstones
from tasks.progress import times
from tasks.run_records import stage_events
from tasks.stage import WAIT_SECONDS, Failure, Run
from tasks.store import TOMBSTONES, Store
from tasks.tracking import flatten
from unclip import files
from unclip.config import require
from unclip.errors import AlreadyRunningError, ConfigError, StageError, StoppedError, StorageError, UnclipError
from unclip.messages import reason_of

DOWNLOAD = "download"
"""Stage that fetches images, from the server of the procedural ones if there is one."""
STOP_PATIENCE_SECONDS = 25.0
"""Time for training stages to write a checkpoint when the run is stopped; Kubernetes kills after 30 s."""


def run_pipeline(
    pipeline: str,
    config: PipelineConfig,
    until: str | None = None,
    retry_failed: bool = False,
    writes_results: bool = True,
    label: str = "",
) -> int:
    """Run a pipeline and return the exit code.

    Takedowns that were recorded come first. One that is recorded while the dataset is being made stops the run's stages; the
    run carries it out and starts again, which costs what the next refresh would cost. During the trainings, which read their own
    version, `unclip takedown` carries it out itself.

    In a cluster that others use too, the run ends instead, and the same command makes the dataset again.

    Args:
        until: last stage to run, after the stages it depends on; None runs all stages.
        writes_results: write the folder of results, and print the summary.
        label: system with its variant after a slash, which is shown before the names of stages and in the records: for runs side
            by side in threads of one process, which has joined a cluster for them (`cluster.start_ray`).

    Raises:
        UnclipError: the checks failed and nothing was started, or a stage failed.
    """
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        refuse_shadows(os.getcwd())  # Ray's workers search it first
    except ImportError as error:
        raise ConfigError(str(error)) from None
    started, store = time.monotonic(), Store(config.storage)
    tracking_uri(config)  # raises if there can be none, before an object store is asked for anything
    with contextlib.suppress(AlreadyRunningError):  # that run carries them out
        print_carried_out(store, carry_out_recorded(store, named=[config.tracking_uri]))
    prepared = prepare(config, retry_failed)
    todo = compose(prepared)
    require(until is None or until in todo, "--until", until, f"a stage: {', '.join(todo)}")
    todo = dags.up_to(todo, until) if until else todo
    states = dags.states(todo, store)
    if all(state.artifact for state in states.values()):
        say(f"{label or pipeline}: everything is up to date; nothing was started.")
        _finish(prepared, pipeline, todo, store, writes_results)
        return 0
    check_cluster(prepared)  # before anything is written, locks included
    dags.refuse_if_in_use(states, store)
    if not _run_stages(pipeline, prepared, until, states, store, writes_results, label):
        say(f"{label or pipeline}: starts again, without the rows that were taken down")
        attempt = dataclasses.replace(config.download, attempt=prepared.download.attempt)
        again = dataclasses.replace(config, download=attempt)
        return run_pipeline(pipeline, again, until, writes_results=writes_results, label=label)
    say(f"{f'{label}: ' if label else ''}took {time.monotonic() - started:.0f} s")
    return 0


def _run_stages(
    pipeline: str,
    config: PipelineConfig,
    until: str | None,
    states: Mapping[str, dags.State],
    store: Store,
    writes_results: bool,
    label: str,
) -> bool:
    """Run what is not done; returns False if rows were taken down meanwhile, so that the dataset must be made again.

    Raises:
        StageError: a stage failed.
    """
    with contextlib.ExitStack() as whole, contextlib.ExitStack() as scenes:
        if config.scenes is not None and DOWNLOAD in states and states[DOWNLOAD].artifact is None:
            scenes.enter_context(scene_server.serve(config.scenes))
        run = open_run(pipeline, config, store, label)
        whole.enter_context(heartbeat(run, store))
        state, message, must_repeat = "failed", "", False
        try:
            dag = compose(config, run)
            dag = dags.up_to(dag, until) if until else dag
            labels = {name: state.label for name, state in states.items()}
            run.tracker.bytes(dags.mermaid(dag, labels).encode(), "dag.mmd")
            run.tracker.bytes(dags.render_png(dag, labels), "dag.png")
            pending = [name for name, state in states.items() if not state.artifact]
            is_own_cluster = start_ray([config])
            record_cluster(run, store, wait_for_resources(config, pending))
            with contextlib.closing(Console(store, run.id, list(dag), label)) as console:
                failures = _execute(dag, run, store, scenes, console)
            must_repeat = is_own_cluster and _must_repeat(dag, failures, run, store)
            state = "stopped" if must_repeat else "failed" if failures else "done"
            message = "; ".join(f"{failure.stage} failed: {failure.message}" for failure in failures)
        except BaseException as error:
            state, message = "stopped" if isinstance(error, StoppedError) else "failed", reason_of(error)
            raise
        finally:
            close_run(run, store, state)
            if not must_repeat:
                with contextlib.suppress(OSError, StorageError):  # keep the original error
                    notify(config.notify, describe_end(run, store, state, message))
        if must_repeat:
            _carry_out_alone(store, config)
            return False
        if failures:
            reason = StageError("\n".join(f"{failure.stage} failed: {failure.message}" for failure in failures))
            if {failure.exit_code for failure in failures} == {StoppedError.exit_code}:
                reason.exit_code = StoppedError.exit_code  # the same command continues later
            raise reason
        summary = _finish(config, pipeline, dag, store, writes_results)
        _log_dataset(run, dag, store)
        run.tracker.json(store.portable(summary), "summary.json")
        run.tracker.metrics({key: value for key, value in flatten(summary).items() if isinstance(value, (int, float))})
    with contextlib.suppress(AlreadyRunningError):  # that run carries them out
        print_carried_out(store, carry_out_recorded(store, named=[config.tracking_uri]))
    return True


def _carry_out_alone(store: Store, config: PipelineConfig) -> None:
    """Carry out recorded takedowns after the end of all tasks, which could write parts otherwise."""
    import ray

    ray.shutdown()
    print_carried_out(store, carry_out_recorded(store, WAIT_SECONDS, [config.tracking_uri]))


def _must_repeat(dag: dags.Dag, failures: Sequence[Failure], run: Run, store: Store) -> bool:
    """Return True if stages that make the dataset failed while rows were taken down."""
    if all(dag[failure.stage].stage.reads_snapshot for failure in failures):
        return False
    before = store.read_json("runs", run.id, "run.json")["tombstones"]
    return bool(tombstones.recorded(store)) or files.stamp(store.uri(TOMBSTONES)) != before


def _log_dataset(run: Run, dag: dags.Dag, store: Store) -> None:
    """Record the dataset version of a run in MLflow, whose table of runs shows it."""
    state = dags.states(dag, store).get("curate")
    if state is not None and state.artifact is not None:
        facts = store.portable({name: state.artifact.facts[name] for name in ("rows", "reasons", "snapshot")})
        run.tracker.dataset(run.pipeline, state.artifact.digest, facts["snapshot"]["embeddings"], facts)


def _finish(config: PipelineConfig, pipeline: str, dag: dags.Dag, store: Store, writes_results: bool) -> dict[str, Any]:
    artifacts = {name: state.artifact for name, state in dags.states(dag, store).items() if state.artifact}
    summary = summarise(pipeline, artifacts)
    if writes_results:
        name = results_name(pipeline, config.system)
        option = [] if name == pipeline else ["--system", config.system]
        summary["command"] = ["unclip run", pipeline, *option]
        write_results(summary, artifacts, store, compose(config).keys(), name)
        print_summary(summary, store, config, name)
    return summary


def _execute(dag: dags.Dag, run: Run, store: Store, scenes: contextlib.ExitStack, console: Console) -> list[Failure]:
    """Execute the DAG with progress on the console; return the failures.

    Args:
        scenes: closed after the download, so that a refresh beside a training can serve them.
    """
    import warnings

    import ray

    last = list(dag)[-1]
    with warnings.catch_warnings():
        # Ray warns that DAGNode.execute will change; it works in all versions we allow
        warnings.simplefilter("ignore")
        result = dag[last].ray_node.execute()
    ready: list[Any] = []
    is_fetching = True
    with signals.stop_on_signal() as is_stopping:
        while not ready:
            ready, _ = ray.wait([result], timeout=1.0)
            console.refresh()
            download = ("runs", run.id, f"{DOWNLOAD}.json")
            if is_fetching and store.exists(*download) and store.read_json(*download)["state"] in ("done", "cached"):
                scenes.close()
                is_fetching = False
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
    return [Failure(event["stage"], event["message"], event.get("exit_code", 1)) for event in failed] or unrecorded


def _stop_training(dag: dags.Dag, run: Run, store: Store, console: Console) -> None:
    """Ask running training stages to write a checkpoint and stop; wait for them up to STOP_PATIENCE_SECONDS."""
    files.write(run.stop_uri, b"")
    deadline = time.monotonic() + STOP_PATIENCE_SECONDS
    begun = {name for name in dag if times(run.progress_uri(name)).began}  # the others wait for CPUs

    def is_training() -> bool:
        running = [name for name, event in stage_events(store, run.id).items() if event["state"] == "running"]
        return any(name in begun and hasattr(dag[name].config, "trainer") for name in running)

    if is_training():
        say("stopping: training stages write a checkpoint first; interrupt again to stop at once")
    while is_training() and time.monotonic() < deadline:
        time.sleep(0.5)
        console.refresh()
