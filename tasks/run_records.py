"""Records of runs in a storage, shown by `unclip status`. Nothing here imports Ray, so reading them is fast."""

import dataclasses
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.store import Store


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run with its state and its stages."""

    id: str
    pipeline: str
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
    """The last `number` runs, oldest first."""
    return [_read_run(store, run_id) for run_id in store.list("runs")[-number:]]


def _read_run(store: Store, run_id: str) -> RunRecord:
    record, events = store.read_json("runs", run_id, "run.json"), stage_events(store, run_id)
    state = "killed" if record["state"] == "running" and not is_running(record) else record["state"]
    stages = []
    for name, event in sorted(events.items(), key=lambda item: item[1]["at"]):
        stage_state = event["state"]
        if state != "running" and stage_state == "running":
            stage_state = "stopped" if state == "stopped" else "killed"
        stages.append(StageRecord(name, stage_state, event.get("seconds"), event.get("message")))
    return RunRecord(run_id, record["pipeline"], record["started"], record.get("ended"), state, tuple(stages))


def stage_events(store: Store, run_id: str) -> dict[str, dict[str, Any]]:
    """Last recorded event of each stage of a run."""
    names = [name for name in store.list("runs", run_id) if name.endswith(".json") and name != "run.json"]
    return {name.removesuffix(".json"): store.read_json("runs", run_id, name) for name in names}


def is_running(record: Mapping[str, Any]) -> bool:
    """Return True if a process still drives the run of this `run.json` record."""
    if record["state"] != "running" or record["host"] != socket.gethostname():
        return bool(record["state"] == "running")
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{record['pid']}/stat")  # Linux only; a zombie has ended as well
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
