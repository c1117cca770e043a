import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from tasks import progress, ranges, tables
from tasks.stage import Artifact, Call, Output, Resources, Run, StageContext, execute, stage
from tasks.store import Store
from tasks.tombstones import SCHEMA
from tasks.tracking import Tracker
from tasks.training import Training, _Takedowns, run_training
from tests.tasks.datasets import key, write_folder
from tests.unclip.training.test_trainer import Line, reader, settings
from unclip.data import Source


def test_f77_a_training_notices_takedowns_of_its_own_rows(tmp_path: Path) -> None:
    statuses = ["kept", "kept", "dropped", "failed"]
    selection = pa.table({"key": [key(n) for n in range(4)], "status": statuses})
    folder = write_folder(f"{tmp_path}/selection", selection.sort_by("key"), 2)
    takedowns = _Takedowns(str(tmp_path), folder)

    def take_down(*numbers: int) -> str:
        table = pa.Table.from_pylist([{"kind": "key", "value": key(n), "request": ""} for n in numbers], SCHEMA)
        tables.write_file(Store(str(tmp_path)).uri("tombstones.parquet"), table)
        return takedowns.message()

    assert takedowns.message() == "" and len(ranges.range_files(folder)) == 2
    assert take_down(2, 3, 7) == ""  # rows that it does not read
    assert take_down(1, 2, 3, 7).startswith("1 rows of its dataset were taken down")
    assert take_down(0, 1).startswith("2 rows") and takedowns.asks_to_stop(f"{tmp_path}/none")
    assert _Takedowns(str(tmp_path), None).message() == ""


@dataclasses.dataclass(frozen=True)
class LineConfig:
    folder: str


@stage("line", version=1, has_workers=True)
def line(context: StageContext, config: LineConfig) -> Output:
    """Train a line."""
    folder = Path(config.folder)
    rows = Source((str(folder / "rows.parquet"),), ("x", "y"))
    training = Training(lambda _: Line(), (rows,), lambda: reader(folder).places, settings())
    return Output(*run_training(context, training))


@ray.remote(num_cpus=2)
def hold_cpus(until: Path) -> None:
    wait_for(until.exists)


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)


@pytest.mark.timeout(120)
def test_waiting_for_cpus_is_shown_and_is_no_part_of_the_time_of_a_training(cluster: None, tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), Run("r1", "test", str(tmp_path), Tracker("", ""), "0")
    run = dataclasses.replace(run, resources={"line": Resources(cpus_per_worker=2)})
    reader(tmp_path)
    others = hold_cpus.remote(tmp_path / "over")
    wait_for(lambda: ray.available_resources().get("CPU", 0) == 0)  # type: ignore[no-untyped-call]
    place, started = ("runs", "r1", "progress", "line.json"), time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        training = pool.submit(execute, Call(line, LineConfig(str(tmp_path))), run, [])
        wait_for(lambda: store.exists(*place))
        shown = progress.bar("line", store.read_json(*place))
        time.sleep(3)
        (tmp_path / "over").touch()
        artifact, seconds = training.result(), time.monotonic() - started
    ray.get(others)
    assert shown.endswith("0/960 samples  waiting for 2 CPUs") and "waiting" not in progress.bar(
        "line", store.read_json(*place)
    )
    assert isinstance(artifact, Artifact) and 0 < artifact.seconds < seconds - 3


def test_resources_in_words() -> None:
    assert str(Resources(cpus_per_worker=1)) == "1 CPU" and str(Resources(2, 4)) == "2 x 4 CPUs"
    assert str(Resources(8, gpus_per_worker=1)) == "8 x 1 GPU"
