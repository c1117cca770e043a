"""The records of runs in a storage, which `unclip status` shows. Nothing here needs Ray, so reading them takes no time."""

import dataclasses
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.store import Store


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run, and how it and its stages fared."""

    id: str
    pipeline: str
    started: float
    """Seconds since 1970."""
    ended: float | None
    """Likewise; None while it runs, and when it was killed."""
    state: str
    """running, done, failed, stopped or killed."""
    stages: tuple["StageRecord", ...]
    """Those that the run got to, in the order of their last change."""


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """A stage of a run."""

    name: str
    state: str
    """running, done, cached, failed, skipped, stopped or killed."""
    seconds: float | None
    """Time that the stage took, in this run or in the one that made what was found."""
    message: str | None
    """The reason why it failed or was skipped."""


def last_runs(store: Store, number: int) -> list[RunRecord]:
    """The last so many runs, the oldest first."""
    return [_read_run(store, run_id) for run_id in store.list("runs")[-number:]]


def _read_run(store: Store, run_id: str) -> RunRecord:
    record, events = store.read_json("runs", run_id, "run.json"), stage_events(store, run_id)
    state = "killed" if record["state"] == "running" and not is_going_on(record) else record["state"]
    stages = []
    for name, event in sorted(events.items(), key=lambda item: item[1]["at"]):
        fared = event["state"]
        if state != "running" and fared == "running":
            fared = "stopped" if state == "stopped" else "killed"
        stages.append(StageRecord(name, fared, event.get("seconds"), event.get("message")))
    return RunRecord(run_id, record["pipeline"], record["started"], record.get("ended"), state, tuple(stages))


def stage_events(store: Store, run_id: str) -> dict[str, dict[str, Any]]:
    """What is known of each stage of a run."""
    names = [name for name in store.list("runs", run_id) if name.endswith(".json") and name != "run.json"]
    return {name.removesuffix(".json"): store.read_json("runs", run_id, name) for name in names}


def is_going_on(record: Mapping[str, Any]) -> bool:
    """Whether the run of a `run.json` record is still driven by a process."""
    if record["state"] != "running" or record["host"] != socket.gethostname():
        return bool(record["state"] == "running")
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{record['pid']}/stat")  # where there is one: a zombie has ended, too
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
