from pathlib import Path

import pyarrow as pa

from tasks import ranges, tables
from tasks.store import Store
from tasks.tombstones import SCHEMA
from tasks.training import _Takedowns
from tests.tasks.datasets import key, write_folder


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
