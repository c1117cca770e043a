"""Records of runs in a storage, shown by `unclip status`. Nothing here imports Ray, so reading them is fast."""

import dataclasses
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.store import Store

HEARTBEAT = "heartbeat"
"""File of a run that its driver writes again every HEARTBEAT_SECONDS."""
HEARTBEAT_SECONDS = 30.0
SILENT_SECONDS = 300.0
"""Time without a heartbeat after which a run of another machine counts as killed. Clocks may differ by nearly as much."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run with its state and its stages."""

    id: str
    pipeline: str
    system: str | None
    """System that it makes, with its variant after a slash; None if the run did not record it."""
    started: float
    """Seconds since 1970."""
    ended: float | None
    """Seconds since 1970; None while it runs, and if it was killed."""
    state: str
    """running, done, failed, stopped or killed."""
    stages: tuple["StageRecord", ...]
    """Stages that the run reached, in the order of their last change."""


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """A stage of a run."""

    name: str
    state: str
    """running, done, cached, failed, skipped, stopped or killed."""
    seconds: float | None
    """Duration of the stage, in this run or in the run that made the cached result."""
    message: str | None
    """Reason why it failed or was skipped."""


def last_runs(store: Store, number: int) -> list[RunRecord]:
    """The last `number` runs, oldest first; those that were killed before they were recorded are left out."""
    recorded = (run_id for run_id in reversed(store.list("runs")) if store.exists("runs", run_id, "run.json"))
    return [_read_run(store, run_id) for run_id in itertools.islice(recorded, number)][::-1]


def _read_run(store: Store, run_id: str) -> RunRecord:
    record, events = store.read_json("runs", run_id, "run.json"), stage_events(store, run_id)
    is_killed = record["state"] == "running" and not is_alive(store, run_id, record)
    state = "killed" if is_killed else record["state"]
    stages = []
    for name, event in sorted(events.items(), key=lambda item: item[1]["at"]):
        stage_state = event["state"]
        if state != "running" and stage_state == "running":
            stage_state = "stopped" if state == "stopped" else "killed"
        stages.append(StageRecord(name, stage_state, event.get("seconds"), event.get("message")))
    ended = record.get("ended")
    return RunRecord(run_id, record["pipeline"], record.get("system"), record["started"], ended, state, tuple(stages))


def stage_events(store: Store, run_id: str) -> dict[str, dict[str, Any]]:
    """Last recorded event of each stage of a run."""
    names = [name for name in store.list("runs", run_id) if name.endswith(".json") and name != "run.json"]
    return {name.removesuffix(".json"): store.read_json("runs", run_id, name) for name in names}


def driver() -> dict[str, Any]:
    """This process, as the driver of a run: the part of its record by which others see that it has ended."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "process": _process_start(pid)}


def beat(store: Store, run_id: str) -> None:
    """Write the heartbeat of a run."""
    store.write_json({"at": time.time()}, "runs", run_id, HEARTBEAT)


def is_running(record: Mapping[str, Any]) -> bool:
    """Return True if a process still drives the run of this `run.json` record, or if another machine would know."""
    if record["state"] != "running" or not _is_here(record):
        return bool(record["state"] == "running")
    start = _process_start(record["pid"])
    if not start:
        return start is not None
    return record.get("process") in (None, start)  # else the number is another process's now


def is_alive(store: Store, run_id: str, record: Mapping[str, Any]) -> bool:
    """Return True if a run whose record says that it is running has a driver, on this machine or another."""
    if record["state"] != "running":
        return False
    if _is_here(record):
        return is_running(record)
    heartbeat = ("runs", run_id, HEARTBEAT)
    return store.exists(*heartbeat) and time.time() - store.read_json(*heartbeat)["at"] < SILENT_SECONDS


def _is_here(record: Mapping[str, Any]) -> bool:
    """Return True if the driver's process number is one of this machine, or of this container."""
    return record["host"] == socket.gethostname() and record.get("machine") in (None, _machine())


def _machine() -> str | None:
    """Identity of the numbering of processes: the start of the system, and the container's own numbers. Linux only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """Time when a process started, in ticks, or "" where the system does not say; None if it has ended, zombies included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it belongs to someone else
        pass
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended meanwhile, or its owner hides it
        return None if not Path(f"/proc/{pid}").exists() else ""
    return None if fields[0] == "Z" else fields[19]
