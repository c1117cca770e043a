"""Work of a refresh with 1 % new rows, counted: rows that each data stage reads, hashes and writes, and its CPU time.

    python -m benchmarks.refresh --rows 10000,100000 --out refresh.json

The dataset is that of `benchmarks.scaling`: the first run works on all rows, and the refresh on a list with one more file. Both
run in one process, so that their work can be counted where it is done:

    read      rows of the list that are parsed, and rows of Parquet files that are decoded, whole row groups at a time
    looked up rows that are found in look-ups (`tasks.lookups`)
    moved     rows of intermediate files, and of places, which have 24 bytes
    hashed    rows whose content is hashed for a key or a digest
    written   rows of Parquet files that are written

Images and embeddings of the new rows are written by the benchmark, between the stages, as in `benchmarks.scaling`.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import measure, synthetic
from benchmarks.synthetic import PART_ROWS, Dataset
from tasks.stage import Artifact, Call, Pinning, Run, execute
from tasks.store import Store
from tasks.tracking import Tracker
from unclip import files

SHARE = 0.01
"""New rows, as a share of the earlier ones."""
MAX_SHARE = 0.03
"""Goal: rows that a stage reads, hashes or writes, as a share of all; and those of all stages, as a share of a first run's."""
STAGES: Mapping[str, tuple[str, ...]] = {
    "ingest": (), "download": ("ingest",), "filter": ("download",), "dedup": ("filter",), "embed": ("dedup", "clip"),
    "curate": ("embed",), "report": ("curate",),
}  # fmt: skip
"""Stage -> stages whose results it reads."""
KINDS = ("read", "looked up", "moved", "hashed", "written")
JUDGED = ("read", "hashed", "written")
"""Kinds of work that the goal is about."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one stage."""

    stage: str
    size: int
    """Rows of the list."""
    counts: Mapping[str, int]
    """Rows by kind of work."""
    seconds: float
    cpu_seconds: float


@contextlib.contextmanager
def counted() -> Iterator[collections.Counter[str]]:
    """Count the rows that this process works on in a `with` block, by kind of work."""
    from tasks import derived, find_duplicates, new_duplicates, places, ranges, tables
    from tasks.stages import curate, dedup, ingest

    counts: collections.Counter[str] = collections.Counter()

    def count(kinds: tuple[str, ...], size: Callable[[Any, Any], int]) -> Callable[[Any], Any]:
        def wrap(function: Any) -> Any:
            def counting(*arguments: Any, **options: Any) -> Any:
                result = function(*arguments, **options)
                for kind in kinds:
                    counts[kind] += size(arguments, result)
                return result

            return counting

        return wrap

    def of_result(_: Any, result: Any) -> int:
        return int(result.num_rows)

    def of_argument(arguments: Any, _: Any) -> int:
        return int(arguments[0].num_rows)

    wrapped: list[tuple[Any, str, Any]] = [
        *(
            (pq.ParquetFile, name, count(("read",), of_result))
            for name in ("read", "read_row_group", "read_row_groups")
        ),
        *((module, "look_up", count(("looked up",), of_result)) for module in (ranges, new_duplicates, curate)),
        *((module, "read_rows", count(("moved",), of_result)) for module in (find_duplicates, dedup, curate, places)),
        *((module, "open_block", count(("moved",), of_result)) for module in (places, curate, derived)),
        (ingest, "clean", count(("read", "hashed"), of_argument)),
        (tables, "rows_digest", count(("hashed",), of_argument)),
        (tables, "_sealed_parquet", count(("written",), of_argument)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in wrapped]
    for owner, name, wrap in wrapped:
        setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield counts
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


class Runs:
    """Runs of all stages on one dataset."""

    def __init__(self, data: Dataset) -> None:
        self.data, self.store = data, Store(data.storage)
        self.run = Run("benchmark", "benchmark", data.storage, Tracker("", ""), "0")
        clip = Artifact("clip", "", "", "synthetic", {"model": "none", "pretrained": None}, 0.0)
        self.found: dict[str, Artifact] = {"clip": clip}

    def execute(self, name: str) -> Artifact:
        """Run one stage on the results of the others."""
        module = importlib.import_module(f"tasks.stages.{name}")
        settings: dict[str, dict[str, Any]] = {
            "ingest": {"urls": self.data.list_uri},
            "download": {"tasks_in_flight": 1},
            "report": dict.fromkeys(("num_pictures", "num_at_edges", "num_clusters"), 0),  # the images are empty
        }
        config = getattr(module, f"{name.capitalize()}Config")(**settings.get(name, {}))
        stage = getattr(module, name)
        if name == "ingest":
            config = stage.pin(config, Pinning(self.store, None))
        result = execute(Call(stage, config), self.run, [self.found[parent] for parent in STAGES[name]])
        if not isinstance(result, Artifact):
            raise SystemExit(f"{result.stage}: {result.message}")
        self.found[name] = result
        return result

    def work(self) -> Iterator[Work]:
        """Run all stages; yield the work of each."""
        for name in STAGES:
            if name == "download":
                self._write_images()
            if name == "embed":
                self._write_embeddings()
            importlib.import_module(f"tasks.stages.{name}")
            started, cpu_before = time.monotonic(), time.process_time()
            with counted() as counts:
                self.execute(name)
            yield Work(name, self.data.rows, dict(counts), time.monotonic() - started, time.process_time() - cpu_before)

    def _write_images(self) -> None:
        from tasks import tables
        from tasks.index import update_index
        from tasks.stages.download import IMAGES

        known = set() if tables.version(self.data.images) is None else set(tables.files(self.data.images))
        starts = [start for start in self.data.starts() if f"{self.data.images}/{start:012d}.parquet" not in known]
        parts = [part for start in starts for part in synthetic._write_images(self.data, [start])]
        update_index(self.data.images, tables.append_files(self.data.images, parts, IMAGES))

    def _write_embeddings(self) -> None:
        from tasks import tables
        from tasks.derived import shards
        from tasks.stages import embed
        from unclip.config import fingerprint

        facts = self.found["dedup"].facts
        uri = self.store.uri("embeddings", fingerprint("synthetic", embed.EmbedConfig().precision)[:16])
        known = (
            []
            if tables.version(uri) is None
            else [name.rpartition("/")[2].partition("-")[0] for name in tables.files(uri)]
        )
        parts = [
            synthetic._write_embeddings(self.data, uri, shard)
            for shard in shards(facts["images"], facts["images_version"], facts["places"])
            if shard.uri.rpartition("/")[2].removesuffix(".parquet") not in set(known)
        ]
        tables.append_files(uri, parts, embed.SCHEMA)


def grow(data: Dataset) -> Dataset:
    """Add a file of new rows to the list."""
    grown = dataclasses.replace(data, rows=data.rows + max(1, round(data.rows * SHARE)))
    starts = [start for start in grown.starts() if start >= data.rows]
    table = pa.concat_tables(synthetic._listed(grown, start) for start in starts).select(["url", "caption"])
    files.write(f"{data.list_uri}/new.parquet", _parquet(table))
    return grown


def _parquet(table: pa.Table) -> bytes:
    from tasks import tables

    return tables.parquet_bytes(table)


def measure_size(root: str, rows: int, width: int) -> dict[str, list[Work]]:
    """Work of a first run and of a refresh."""
    from tasks.stages import ingest

    assert rows % PART_ROWS == 0, f"got {rows} rows, expected thousands"
    data = Dataset(root, rows, width, has_images=False)
    synthetic.write_list(data)
    small_bytes, ingest.SMALL_BYTES = ingest.SMALL_BYTES, 1 << 40  # so that this process reads the list
    try:
        first = list(Runs(data).work())
    finally:
        ingest.SMALL_BYTES = small_bytes
    return {"first run": first, "refresh": list(Runs(grow(data)).work())}


def show(rows: int, found: Mapping[str, list[Work]]) -> None:
    """Print the work of a refresh, in percent of all rows and of a first run's work, and the CPU time of both runs."""
    print(f"\n{rows:,} rows, {SHARE:.0%} new; rows in percent of all, and of those of a first run")
    print(f"{'stage':10}", *(f"{kind:>10}" for kind in KINDS), f"{'of first':>9} {'CPU s':>8} {'first run':>10}")
    total, first_total = collections.Counter[str](), collections.Counter[str]()
    for work, first in zip(found["refresh"], found["first run"], strict=True):
        total.update(work.counts)
        first_total.update(first.counts)
        cells = "".join(f"{100 * work.counts.get(kind, 0) / rows:11.2f}" for kind in KINDS)
        cells += f" {100 * share_of_first(work.counts, first.counts):9.2f}"
        verdict = _verdict(max(work.counts.get(kind, 0) for kind in JUDGED) / rows)
        print(f"{work.stage:10}{cells} {work.cpu_seconds:8.2f} {first.cpu_seconds:10.2f}  {verdict}", flush=True)
    share = share_of_first(total, first_total)
    print(f"all stages: {share:.2%} of the rows of a first run  {_verdict(share)}", flush=True)


def share_of_first(counts: Mapping[str, int], first: Mapping[str, int]) -> float:
    """Largest share of the rows that a first run reads, hashes or writes."""
    return max(counts.get(kind, 0) / max(1, first.get(kind, 0)) for kind in JUDGED)


def _verdict(share: float) -> str:
    return "met" if share <= MAX_SHARE else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000", help="sizes, separated by commas")
    parser.add_argument("--width", type=int, default=64, help="length of the embeddings")
    parser.add_argument("--folder", help="folder for the datasets; by default a temporary one")
    parser.add_argument("--out", help="JSON file for all numbers")
    arguments = parser.parse_args()
    machine = measure.machine("ray", "pyarrow", "deltalake", "torch")
    print(machine)
    results: dict[str, Any] = {"machine": machine, "settings": vars(arguments), "work": []}
    for size in map(int, arguments.rows.split(",")):
        with tempfile.TemporaryDirectory(prefix="unclip-refresh-", dir=arguments.folder) as folder:
            found = measure_size(f"{folder}/data", size, arguments.width)
        show(size, found)
        results["work"] += [{"run": run} | dataclasses.asdict(work) for run, works in found.items() for work in works]
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
