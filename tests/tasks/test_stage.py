"""The stage contract: caching, skipping and failures."""

import contextlib
import dataclasses
import os
import pickle
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import lock as locks
from tasks.lock import lock
from tasks.run_records import driver
from tasks.stage import (
    Artifact,
    Call,
    Failure,
    Output,
    OwnResources,
    Run,
    StageContext,
    StageResources,
    execute,
    stage,
)
from tasks.store import Store
from tasks.tracking import Tracker
from unclip import files
from unclip.errors import InputError


@dataclasses.dataclass(frozen=True)
class CountConfig:
    start: int = 0
    fails: bool = False


calls: list[int] = []


@stage("count", version=1)
def count(context: StageContext, config: CountConfig, *parents: Artifact) -> Output:
    """Count."""
    assert context.scratch.is_dir()
    if config.fails:
        raise InputError("count: got nothing, expected something.")
    calls.append(config.start)
    return Output(context.folder, f"digest of {config.start}", {"start": config.start, "others": [], "again": {}})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    calls.clear()
    return Run("r1", "test", str(tmp_path), Tracker("", ""), "0")


def parent(digest: str) -> Artifact:
    return Artifact("before", "f", "/somewhere", digest, {}, 1.0)


def test_a_committed_result_is_not_computed_again(run: Run) -> None:
    first = execute(Call(count, CountConfig(3)), run, [parent("a")])
    again = execute(Call(count, CountConfig(3)), run, [dataclasses.replace(parent("a"), uri="/elsewhere", seconds=9.0)])
    assert isinstance(first, Artifact) and isinstance(again, Artifact) and first == again and calls == [3]
    assert list(first.facts) == list(again.facts) == ["again", "others", "start"], "pages depend on no order of names"
    assert Store(run.storage).read_json("runs", "r1", "count.json")["state"] == "cached"


@stage("passing", version=1)
def passing(context: StageContext, config: CountConfig) -> Output:
    """Pass a file on."""
    files.write(f"{context.intermediate}/rows", b"a caption")
    if config.fails:
        raise InputError("passing: got nothing, expected something.")
    return Output(context.folder, "digest")


def test_intermediate_files_are_removed_when_a_stage_ends_well(run: Run) -> None:
    for fails in (True, False):
        result = execute(Call(passing, CountConfig(fails=fails)), run, [])
        left = list(Path(run.storage).rglob("rows"))
        assert bool(left) == fails == isinstance(result, Failure), "a failed stage may go on with them"
        for path in left:
            path.unlink()


def test_settings_parents_and_version_change_the_fingerprint(run: Run) -> None:
    newer = dataclasses.replace(count, version=2)
    for call, digest in (
        (Call(count, CountConfig(3)), "a"),
        (Call(count, CountConfig(4)), "a"),
        (Call(count, CountConfig(3)), "b"),
        (Call(newer, CountConfig(3)), "a"),
    ):
        execute(call, run, [parent(digest)])
    assert calls == [3, 4, 3, 3]


def test_a_failure_is_recorded_and_passed_on_but_never_cached(run: Run) -> None:
    failing = Call(count, CountConfig(fails=True))
    failure = execute(failing, run, [parent("a")])
    assert failure == Failure("count", "count: got nothing, expected something.", exit_code=2)
    record = Store(run.storage).read_json("runs", "r1", "count.json")
    assert (record["state"], record["message"]) == ("failed", failure.message)
    assert execute(Call(count, CountConfig(3)), run, [parent("a"), failure]) == failure and not calls
    assert Store(run.storage).read_json("runs", "r1", "count.json")["state"] == "skipped"
    assert not Store(run.storage).list("stages")


@dataclasses.dataclass(frozen=True)
class ResourcesOfTwo(StageResources):
    prior: OwnResources | None = None
    upsamplers: dict[str, OwnResources] = dataclasses.field(default_factory=dict)


def test_stages_may_have_their_own_resources() -> None:
    own = OwnResources(num_workers=1, gpus_per_worker=1)
    resources = ResourcesOfTwo(num_workers=2, cpus_per_worker=3, prior=own, upsamplers={"256": own})
    assert resources.of("prior").per_worker() == resources.of("upsampler-256").per_worker() == {"CPU": 3.0, "GPU": 1.0}
    assert [resources.of(name).num_workers for name in ("decoder", "upsampler-1024", "ingest")] == [2, 2, 2]


def test_a_stage_may_have_several_members(run: Run) -> None:
    members = [count.member("a"), pickle.loads(pickle.dumps(count.member("b")))]  # as in a worker
    artifacts = [execute(Call(each, CountConfig(3)), run, []) for each in (*members, *members)]
    assert [each.stage for each in artifacts] == ["count-a", "count-b"] * 2 and calls == [3, 3]
    assert artifacts[0] != artifacts[1] and artifacts[:2] == artifacts[2:]
    assert Store(run.storage).list("stages") == ["count-a", "count-b"]
    assert pickle.loads(pickle.dumps(count)) == count


def test_a_tracking_server_that_is_down_does_not_stop_the_work(run: Run) -> None:
    down = dataclasses.replace(run, tracker=Tracker("http://127.0.0.1:9", "some-run"))
    assert isinstance(execute(Call(count, CountConfig(3)), down, []), Artifact)


def test_f92_an_error_of_mlflow_without_a_message_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(client: Any) -> None:
        raise TimeoutError

    assert Tracker("http://me:c4n4ry@127.0.0.1:9", "some-run")._try(refuse) is None
    assert caplog.messages == ["MLflow at http://127.0.0.1:9 did not accept an entry: TimeoutError"]


def test_f93_a_process_with_the_number_of_a_dead_driver_is_not_the_driver(run: Run) -> None:
    store, me = Store(run.storage), driver()
    for change, expected in (
        ({}, False),
        ({"process": "1"}, True),
        ({"process": "1", "machine": "another container"}, False),  # which alone can tell
        ({"pid": 2**30}, True),
    ):
        store.write_json({"state": "running", **me, **change}, "runs", run.id, "run.json")
        assert run.is_abandoned() == expected, change


def test_a_run_whose_driver_is_gone_is_abandoned(run: Run) -> None:
    ended = subprocess.Popen(["true"])  # not waited for, so it becomes a zombie
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert not run.is_abandoned(), "a run without a record counts as running"
    here = socket.gethostname()
    for state, host, pid, expected in (
        ("running", here, os.getpid(), False),
        ("failed", here, os.getpid(), True),
        ("running", here, ended.pid, True),
        ("running", "elsewhere", ended.pid, False),
    ):
        record = {"state": state, "host": host, "pid": pid}
        Store(run.storage).write_json(record, "runs", run.id, "run.json")
        assert run.is_abandoned() == expected, record
    ended.wait()
    Store(run.storage).write_json({"state": "running", "host": here, "pid": ended.pid}, "runs", run.id, "run.json")
    assert run.is_abandoned()


actions: list[Callable[[Run], object]] = []


@pytest.fixture
def during() -> Iterator[list[Callable[[Run], object]]]:
    """Actions that the stage `study` carries out while it works, each once."""
    yield actions
    actions.clear()


@stage("study", version=1, reads_snapshot=True)
def study(context: StageContext, config: CountConfig) -> Output:
    """Study a snapshot."""
    calls.append(config.start)
    while actions:
        actions.pop(0)(context.run)
    return Output(context.folder, "digest", {})


def test_f75_beside_a_stage_on_a_snapshot_tables_change_and_its_other_results_are_made(
    run: Run, during: list[Callable[[Run], object]]
) -> None:
    def others(run: Run) -> None:
        with lock(Store(run.storage)):  # as a takedown does
            pass
        assert isinstance(execute(Call(count, CountConfig(7)), run, []), Artifact)
        assert isinstance(execute(Call(study, CountConfig(8)), run, []), Artifact)

    during.append(others)
    assert isinstance(execute(Call(study, CountConfig(1)), run, []), Artifact)
    assert calls == [1, 7, 8]


def test_f75_a_result_that_another_run_makes_is_waited_for_and_taken(
    run: Run, during: list[Callable[[Run], object]]
) -> None:
    threads: list[threading.Thread] = []
    results: list[object] = []

    def start_another(run: Run) -> None:
        again = lambda: results.append(execute(Call(study, CountConfig(1)), run, []))  # noqa: E731
        threads.append(threading.Thread(target=again))
        threads[0].start()
        time.sleep(0.5)
        assert not results

    during.append(start_another)
    first = execute(Call(study, CountConfig(1)), run, [])
    threads[0].join()
    assert calls == [1] and results == [first]


def test_f32_a_stage_whose_lock_is_not_given_back_ends_with_75(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.stage.WAIT_SECONDS", 0.2)
    with lock(Store(run.storage)):
        failure = execute(Call(count, CountConfig(1)), run, [])
    assert isinstance(failure, Failure) and failure.exit_code == 75 and "another run is using" in failure.message
    assert calls == []


def test_f77_a_stage_that_fails_after_a_takedown_may_be_run_again(run: Run) -> None:
    files.write_json(f"{run.storage}/runs/r1/run.json", {"host": "", "pid": 1, "state": "running", "tombstones": None})
    failure = execute(Call(count, CountConfig(1, fails=True)), run, [])
    assert isinstance(failure, Failure) and failure.exit_code == 2
    files.write(f"{run.storage}/tombstones.parquet", b"")
    failure = execute(Call(count, CountConfig(1, fails=True)), run, [])
    assert isinstance(failure, Failure) and failure.exit_code == 75
    assert "expected something. Rows were taken down meanwhile. Run the same command again" in failure.message


def test_f73_a_stage_that_loses_its_lease_commits_nothing(
    run: Run, during: list[Callable[[Run], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run takes over while it works, as after a pause; the stage's thread for its lease notices."""
    monkeypatch.setattr(Store, "is_local", property(lambda self: False))
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.05)
    lost: list[threading.Event] = []
    lease = locks.lock

    @contextlib.contextmanager
    def watched(*arguments: Any) -> Iterator[locks.Held]:
        with lease(*arguments) as held:
            lost.append(held.lost)
            yield held

    def take_over(run: Run) -> None:
        [uri] = Path(run.storage, "locks").iterdir()
        register = locks._Register(str(uri))
        assert register.take(register.read(), locks.Owner.of()) is not None
        assert lost[0].wait(10)

    monkeypatch.setattr("tasks.stage.lock", watched)
    during.append(take_over)
    failure = execute(Call(study, CountConfig(1)), run, [])
    assert isinstance(failure, Failure) and failure.exit_code == 75 and "another run has taken over" in failure.message
    assert calls == [1] and not files.exists(f"{run.storage}/stages")
