"""Runs of the entries of a comparison, several side by side in one cluster.

What entries share, such as the dataset, is found by its fingerprint and made once: an entry waits while another makes what it
needs too.
"""

import contextlib
import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence

import click

from pipelines import dag as dags
from pipelines.cluster import check_cluster, start_ray
from pipelines.comparison import EVALUATE, Entry, label_of
from pipelines.console import say
from pipelines.dag import Dag
from pipelines.dataset import DATASET_STAGE
from pipelines.pipeline import compose
from pipelines.prepare import prepare
from pipelines.run import run_pipeline
from pipelines.takedowns import carry_out_recorded, print_carried_out
from tasks import signals
from tasks.lock import TABLES
from tasks.stage import WAIT_SECONDS
from tasks.store import TOMBSTONES, Store
from unclip import files
from unclip.errors import AlreadyRunningError, StageError, StoppedError, StorageError, UnclipError
from unclip.messages import reason_of, without_credentials

LOOK_SECONDS = 2.0
"""Interval at which entries that wait for what another makes are looked at."""
RETRY_SECONDS = 15.0
"""Interval at which an entry is tried again whose tables or results another process holds."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """An entry that is to run, and its stages."""

    entry: Entry
    dag: Dag

    @classmethod
    def of(cls, entry: Entry) -> "Plan":
        """Plan an entry for the dataset as it is now.

        Raises:
            UnclipError: its settings are invalid, or what they name cannot be read.
        """
        return cls(entry, dags.up_to(compose(prepare(entry.config)), EVALUATE))

    def claims(self, store: Store) -> set[str]:
        """Identities of the results that are missing, and the lock of the tables if one of them changes tables: what no other
        entry may make meanwhile."""
        missing = [name for name, state in dags.states(self.dag, store).items() if state.artifact is None]
        identities = dags.identities(self.dag, store)
        changes_tables = any(not self.dag[name].stage.reads_snapshot for name in missing)
        return {identities[name] for name in missing} | ({TABLES} if changes_tables else set())


class _Waiting:
    """Entries that have not started, in their order."""

    def __init__(self, plans: Sequence[Plan], store: Store, stamp: str | None) -> None:
        """Args:
        stamp: that of the tombstones for which the entries were planned.
        """
        self.plans, self._store, self._stamp = list(plans), store, stamp
        self._refused: dict[str, float] = {}
        """Label -> time of the first refusal, monotonic."""
        self._again: dict[str, float] = {}
        """Label -> time to try it again, monotonic."""

    def take(self, running: Mapping[str, Plan]) -> Plan | None:
        """Take the first entry that claims nothing that a running one claims.

        Without an answer of the storage, None as long as entries run: one that fails must not end them.
        """
        try:
            self._plan_again()
            ready = [plan for plan in self.plans if self._again.get(plan.entry.label, 0) <= time.monotonic()]
            plan = first_alone(ready, list(running.values()), self._store)
        except (OSError, StorageError):
            if not running:
                raise
            return None
        if plan is not None:
            self.plans.remove(plan)
        return plan

    def put_back(self, plan: Plan, error: AlreadyRunningError) -> bool:
        """Wait for another process, as a stage that has started would; False if it has been waited for long enough."""
        label, now = plan.entry.label, time.monotonic()
        if label not in self._refused:
            say(f"{label} waits: {error}")
        if now - self._refused.setdefault(label, now) >= WAIT_SECONDS:
            return False
        self._again[label] = now + RETRY_SECONDS
        self.plans.insert(0, plan)
        return True

    def _plan_again(self) -> None:
        """Plan the entries for the dataset without the rows that were taken down since, which one of them makes."""
        stamp = files.stamp(self._store.uri(TOMBSTONES))
        if stamp != self._stamp:
            self.plans, self._stamp = [_planned_again(plan) for plan in self.plans], stamp


def _planned_again(plan: Plan) -> Plan:
    try:
        return Plan.of(plan.entry)
    except UnclipError:  # its run tells
        return plan


def first_alone(waiting: Sequence[Plan], running: Sequence[Plan], store: Store) -> Plan | None:
    """First waiting entry that claims nothing that a running one claims."""
    claimed = {claim for plan in running for claim in plan.claims(store)}
    return next((plan for plan in waiting if not claimed & plan.claims(store)), None)


def run_entries(pipeline: str, entries: Sequence[Entry]) -> dict[str, UnclipError]:
    """Train and evaluate all entries, several side by side; return the errors of those that failed, by label.

    Raises:
        UnclipError: the dataset could not be made, so that no entry can be.
        StoppedError: asked to stop; all that were running have stopped.
    """
    plans: list[Plan] = []
    failures: dict[str, UnclipError] = {}
    store = Store(entries[0].config.storage)
    stamp = files.stamp(store.uri(TOMBSTONES))
    for entry in entries:
        try:
            plans.append(Plan.of(entry))
        except UnclipError as error:
            failures[entry.label] = error
            print(f"{entry.label}: {error}", flush=True)
    if plans:
        print(f"\n{pipeline}: the dataset of all systems", flush=True)
        with _own_cluster():
            run_pipeline(pipeline, plans[0].entry.config, until=DATASET_STAGE, writes_results=False)
        try:
            with _own_cluster():
                failures |= _run_side_by_side(pipeline, plans, store, stamp)
        finally:  # requests that came while a run changed tables
            named = [entries[0].config.tracking_uri]
            with contextlib.suppress(AlreadyRunningError):  # that run carries them out
                print_carried_out(store, carry_out_recorded(store, named=named))
    return failures


@contextlib.contextmanager
def _own_cluster() -> Iterator[None]:
    """End the cluster that a block starts, so that the next one starts or joins one for its own settings."""
    import ray

    was_there = ray.is_initialized()
    try:
        yield
    finally:
        if not was_there:
            ray.shutdown()


def _run_side_by_side(pipeline: str, plans: Sequence[Plan], store: Store, stamp: str | None) -> dict[str, UnclipError]:
    """Run entries in their order, as many at a time as the first one's settings say; return the errors of those that failed.

    An entry that needs what another is about to make starts once it is made, or has failed.
    """
    configs = [plan.entry.config for plan in plans]
    waiting, has_started = _Waiting(plans, store, stamp), False
    running: dict[str, Plan] = {}
    ended: queue.SimpleQueue[tuple[str, BaseException | None]] = queue.SimpleQueue()
    failures: dict[str, UnclipError] = {}
    told: set[str] = set()
    stopped: StoppedError | None = None
    with signals.stop_on_signal() as is_stopping:
        while running or (waiting.plans and stopped is None):
            if is_stopping() and stopped is None:
                stopped = StoppedError(
                    f"{pipeline}: stopped as asked. Finished work is kept; run the same command again to resume."
                )
            has_place = stopped is None and len(running) < configs[0].comparison.side_by_side
            plan = waiting.take(running) if has_place else None
            if plan is not None:
                if not has_started and plan.claims(store):
                    check_cluster(configs[0])
                    start_ray(configs)
                    has_started = True
                running[plan.entry.label] = plan
                if plan.entry.label not in told:
                    told.add(plan.entry.label)
                    say(f"\n{plan.entry.label} ({len(told)} of {len(plans)})")
                _start(pipeline, plan.entry, ended)
                continue
            try:
                label, error = ended.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            plan = running.pop(label)
            if isinstance(error, StoppedError):
                stopped = stopped or error
            elif isinstance(error, AlreadyRunningError) and waiting.put_back(plan, error):
                continue
            elif isinstance(error, UnclipError):
                failures[label] = error
                say(f"{label}: {error}")
            elif error is not None:
                raise error
    if stopped is not None:
        raise stopped
    return failures


def _start(pipeline: str, entry: Entry, ended: "queue.SimpleQueue[tuple[str, BaseException | None]]") -> None:
    """Run an entry in a thread, which puts its label and its error into `ended`."""
    command = click.get_current_context(silent=True)  # for the records of the run; contexts belong to threads

    def work() -> None:
        error: BaseException | None = None
        try:
            with contextlib.nullcontext() if command is None else command.scope(cleanup=False):
                name = label_of(entry.name, entry.value)
                run_pipeline(pipeline, entry.config, until=EVALUATE, writes_results=False, label=name)
        except UnclipError as caught:
            error = caught
        except Exception as caught:  # the others go on
            say(without_credentials(traceback.format_exc()))
            error = StageError(f"{type(caught).__name__}: {reason_of(caught)}")
        except BaseException as caught:
            error = caught
        ended.put((entry.label, error))

    # a daemon, so that a second Ctrl-C ends the process
    threading.Thread(target=work, name=entry.label, daemon=True).start()
