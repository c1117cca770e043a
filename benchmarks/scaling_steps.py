"""Steps of the benchmark of scale: each data stage on a synthetic dataset, the readers, and one-machine scripts to compare with.

A step prepares and returns a function to time, which returns the number of rows that it worked on. Steps find the results of
earlier ones in the dataset's folder, so each may run in a process of its own.
"""

import dataclasses
import importlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from benchmarks import measure, synthetic
from benchmarks.synthetic import Dataset
from unclip import files

READ_ROWS = 100_000
"""Rows that a reader is timed on; fewer if the dataset has fewer."""
BATCH_SIZE = 256
WARM_ROWS = 500
OBJECT_STORE_BYTES = 2 << 30
NUM_CPUS = 2

Action = Callable[[], int]


@dataclasses.dataclass(frozen=True)
class Step:
    """A timed piece of work."""

    prepare: Callable[[Dataset], Action]
    module: str = ""
    """Module that Ray's workers import beforehand; empty for a step without Ray."""
    needs_images: bool = False
    """Needs real images or embeddings, so it is omitted at ten million rows."""
    is_setup: bool = False
    """Writes synthetic data for the next steps; is not reported."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """Measurements of one step; medians over its rounds."""

    rows: int
    seconds: float
    cpu_seconds: float
    """CPU time of all processes."""

    @property
    def microseconds_per_row(self) -> float:
        return self.seconds / max(1, self.rows) * 1e6


def run_step(name: str, data: Dataset, rounds: int = 1) -> Figures:
    """Run a step in this process; Ray must be running if the step needs it."""
    step, seconds, cpu_seconds, num_rows = {**STEPS, **SCRIPTS}[name], [], [], 0
    for _ in range(rounds):
        action = step.prepare(data)
        cpu_before, started = measure.tree_cpu_seconds(os.getpid()), time.monotonic()
        num_rows = action()
        seconds.append(time.monotonic() - started)
        cpu_seconds.append(measure.tree_cpu_seconds(os.getpid()) - cpu_before)
    middle = sorted(range(rounds), key=seconds.__getitem__)[rounds // 2]
    return Figures(num_rows, seconds[middle], cpu_seconds[middle])


def warm_up(name: str, data: Dataset) -> None:
    """Run a step on a small dataset of its own, so that imports and other work of once a process are not timed.

    Earlier steps must have been warmed up, since a step needs their results.
    """
    run_step(name, dataclasses.replace(data, root=f"{data.root}/warm", rows=min(data.rows, WARM_ROWS)))


def start_ray(module: str) -> None:
    """Start Ray on this machine with two workers that have imported a module."""
    import ray

    ray.init(
        "local", num_cpus=NUM_CPUS, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, log_to_driver=False
    )
    importlib.import_module(module)
    ray.get([ray.remote(_warm).options(scheduling_strategy="SPREAD").remote(module) for _ in range(NUM_CPUS)])


def _warm(module: str) -> None:
    importlib.import_module(module)
    time.sleep(1)  # so that no worker does it for both


def _stage(module: str, name: str, settings: Mapping[str, Any], *parents: str, save_as: str = "") -> Step:
    """Step that executes a stage on the artifacts of earlier steps.

    Args:
        settings: of the stage's configuration.
        parents: names of the steps whose artifacts the stage takes; `clip` is a CLIP that is never loaded.
        save_as: name under which later steps find the artifact; by default the stage's.
    """

    def prepare(data: Dataset) -> Action:
        from tasks.stage import Artifact, Call, execute
        from tasks.store import Store

        loaded = importlib.import_module(module)
        declared = getattr(loaded, name)
        make = getattr(loaded, f"{name.capitalize()}Config")
        config = make(**{key: value(data) if callable(value) else value for key, value in settings.items()})
        store = Store(data.storage)
        for folder in ("stages", "artifacts"):  # of an earlier round, whose result would be taken
            files.delete(store.uri(folder, name))
        call, run, artifacts = Call(declared, config), _run(data), [_artifact(data, parent) for parent in parents]

        def action() -> int:
            result = execute(call, run, artifacts)
            if not isinstance(result, Artifact):
                raise SystemExit(f"{result.stage}: {result.message}")
            files.write_json(f"{data.root}/{save_as or name}.json", dataclasses.asdict(result))
            return data.rows

        return action

    return Step(prepare, module)


def _run(data: Dataset) -> Any:
    from tasks.stage import Run
    from tasks.tracking import Tracker

    return Run("benchmark", "benchmark", data.storage, Tracker("", ""), "0")


def _artifact(data: Dataset, name: str) -> Any:
    from tasks.stage import Artifact

    if name == "clip":
        return Artifact("clip", "", "", "synthetic", {"model": "none", "pretrained": None}, 0.0)
    return Artifact(**files.read_json(f"{data.root}/{name}.json"))


def _setup(write: Callable[[Dataset], object]) -> Callable[[Dataset], Action]:
    def prepare(data: Dataset) -> Action:
        def action() -> int:
            write(data)
            return data.rows

        return action

    return prepare


def _index(data: Dataset) -> Action:
    """Build the index of the whole images table, as the first download does bit by bit."""
    from tasks import tables
    from tasks.index import index_uri, update_index

    version = tables.version(data.images)
    assert version is not None
    files.delete(index_uri(data.images))

    def action() -> int:
        update_index(data.images, version)
        return data.rows

    return action


def _refused(data: Dataset) -> Action:
    """Download into an empty storage; every host is refused before a connection, so the rest of the work remains."""
    own = dataclasses.replace(data, root=f"{data.root}/refused")
    files.delete(own.root)
    pairs = files.read_json(f"{data.root}/ingest.json")
    files.write_json(f"{own.root}/ingest.json", pairs)
    action = _stage("tasks.stages.download", "download", {}, "ingest").prepare(own)

    def checked() -> int:
        action()
        reasons = _artifact(own, "download").facts["reasons"]
        assert reasons["blocked_address"] == pairs["facts"]["rows"]["kept"], reasons
        return data.rows

    return checked


def _embeddings_uri(data: Dataset) -> str:
    from tasks.stages.embed import EmbedConfig
    from tasks.store import Store
    from unclip.config import fingerprint

    name = fingerprint(_artifact(data, "clip").digest, EmbedConfig().precision)[:16]
    return Store(data.storage).uri("embeddings", name)


def _shards(data: Dataset) -> Iterator[Any]:
    from tasks.derived import shards

    facts = _artifact(data, "dedup").facts
    return shards(facts["images"], facts["images_version"], facts["places"])


def _write_embeddings(data: Dataset) -> None:
    uri = _embeddings_uri(data)
    files.delete(uri)
    synthetic.write_embeddings(data, uri, _shards(data))


def _read_images(data: Dataset) -> Action:
    """Find and read the images to embed, shard by shard, without embedding them."""
    from tasks.dataflow import run_all

    def action() -> int:
        return sum(run_all(_read_shard, list(_shards(data))))

    return action


def _read_shard(shard: Any) -> int:
    from tasks.derived import read_shard

    return read_shard(shard, ("caption", "jpg"), "embed").num_rows


READERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "prior's reader": {"embeddings": ("tokens", "image_embedding")},
    "decoder's reader": {"images": ("jpg",), "embeddings": ("image_embedding", "tokens")},
    "upsampler's reader": {"images": ("jpg",)},
}
"""Reader -> columns by table, as the trainings read them."""


def _open_reader(name: str, data: Dataset) -> Any:
    from tasks.snapshots import Snapshot
    from unclip.data import RowReader

    snapshot = Snapshot.of(_artifact(data, "curate").facts)
    sources = [snapshot.source(table, *columns) for table, columns in READERS[name].items()]
    return RowReader(sources, snapshot.open_places("train"))


def _reader(name: str) -> Step:
    def prepare(data: Dataset) -> Action:
        reader = _open_reader(name, data)
        batch_size = min(BATCH_SIZE, len(reader))

        def action() -> int:
            batches = reader.batches(seed=0, samples_seen=0, batch_size=batch_size)
            num_rows = 0
            for batch in itertools.islice(batches, min(READ_ROWS, len(reader)) // batch_size):
                num_rows += len(batch["key"])
            batches.close()
            return num_rows

        return action

    return Step(prepare, needs_images=True)


def _open_readers(data: Dataset) -> Action:
    """Open the decoder's reader: list the files, map the places and find the row groups."""

    def action() -> int:
        return len(_open_reader("decoder's reader", data))

    return action


def filter_by_script(data: Dataset) -> Action:
    """Filter as a script on one machine would: join and filter whole tables in memory, and write one file."""
    from tasks.index import index_files
    from tasks.stages.filter import FilterConfig

    facts, config = _artifact(data, "download").facts, FilterConfig()
    kept = _artifact(data, "filter").facts["rows"]["kept"]
    index = index_files(facts["images"], facts["index_version"])

    def action() -> int:
        pairs = pads.dataset(facts["pairs"], format="parquet").to_table()
        columns = ["key", "status", "reason", "original_width", "original_height"]
        images = (
            pads.dataset(index, format="parquet")
            .to_table(columns)
            .rename_columns({"status": "fetched", "reason": "fault"})
        )
        table = pairs.join(images, "key")
        shorter = pc.min_element_wise(table["original_width"], table["original_height"])
        longer = pc.max_element_wise(table["original_width"], table["original_height"])
        words = pc.list_value_length(pc.utf8_split_whitespace(table["caption"]))
        bare = pc.replace_substring_regex(pc.utf8_lower(table["caption"]), r"\pN+", "")
        bare = pc.utf8_trim_whitespace(pc.replace_substring_regex(bare, r"\s+", " "))
        counts = bare.value_counts()
        is_frequent = pc.greater(counts.field("counts"), synthetic.MAX_CAPTION_REPEATS)
        frequent = counts.field("values").filter(is_frequent)
        reasons = {
            "too_small": pc.less(shorter, config.min_side),
            "bad_aspect": pc.greater(pc.divide(longer.cast(pa.float64()), shorter), config.max_aspect_ratio),
            "caption_too_short": pc.less(words, config.min_caption_words),
            "caption_too_long": pc.greater(words, config.max_caption_words),
            "boilerplate": pc.is_in(bare, value_set=frequent),
        }
        masks = [pc.fill_null(mask, False).combine_chunks() for mask in reasons.values()]
        reason = pc.case_when(pc.make_struct(*masks, field_names=list(reasons)), *reasons)
        reason = pc.coalesce(table["reason"], table["fault"], reason)
        is_failed = pc.or_(
            pc.equal(table["status"], "failed"), pc.fill_null(pc.equal(table["fetched"], "failed"), False)
        )
        status = pc.if_else(is_failed, "failed", pc.if_else(pc.is_valid(reason), "dropped", "kept"))
        selection = pa.table({"key": table["key"], "position": table["position"], "status": status, "reason": reason})
        selection = selection.sort_by([("key", "ascending"), ("position", "ascending")])
        _write(f"{data.root}/filtered.parquet", selection)
        found = pc.sum(pc.equal(selection["status"], "kept")).as_py()
        assert found == kept, f"the script keeps {found:,} rows, the stage {kept:,}"
        return data.rows

    return action


def dedup_by_script(data: Dataset) -> Action:
    """Find equal bytes and equal perceptual hashes as a script on one machine would: group whole tables in memory."""
    from tasks.index import index_files

    facts, kept = _artifact(data, "filter"), _artifact(data, "dedup").facts["rows"]["kept"]
    index = index_files(facts.facts["images"], facts.facts["index_version"])

    def action() -> int:
        selection = pads.dataset(facts.uri, format="parquet").to_table()
        images = pads.dataset(index, format="parquet").to_table(["key", "sha256", "phash"])
        table = selection.filter(pc.equal(selection["status"], "kept")).select(["key"]).join(images, "key")
        first = table.group_by("sha256").aggregate([("key", "min")])["key_min"]
        unique = table.filter(pc.is_in(table["key"], value_set=first))
        first_looks = unique.group_by("phash").aggregate([("key", "min")])["key_min"]
        is_first, is_first_look = (pc.is_in(selection["key"], value_set=values) for values in (first, first_looks))
        reason = pc.if_else(is_first, pc.if_else(is_first_look, None, "near_duplicate"), "duplicate_image")
        was_kept = pc.equal(selection["status"], "kept")
        is_dropped = pc.and_(was_kept, pc.is_valid(reason))
        status = pc.if_else(is_dropped, "dropped", selection["status"])
        columns = {"status": status, "reason": pc.if_else(is_dropped, reason, selection["reason"])}
        result = pa.table({"key": selection["key"], "position": selection["position"], **columns})
        _write(f"{data.root}/unique.parquet", result.sort_by([("key", "ascending"), ("position", "ascending")]))
        found = pc.sum(pc.equal(status, "kept")).as_py()
        assert found == kept, f"the script keeps {found:,} rows, the stage {kept:,}"
        return data.rows

    return action


def _write(path: str, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd")


_SEMANTIC = {"semantic_distance": synthetic.SEMANTIC_DISTANCE}

STEPS: Mapping[str, Step] = {
    "write list": Step(_setup(synthetic.write_list), is_setup=True),
    "ingest": _stage("tasks.stages.ingest", "ingest", {"urls": lambda data: data.list_uri}),
    "download, refused hosts": Step(_refused, "tasks.stages.download", needs_images=True),
    "write images": Step(_setup(synthetic.write_images), "benchmarks.synthetic", is_setup=True),
    "index": Step(_index, "tasks.index"),
    "download, nothing new": _stage("tasks.stages.download", "download", {}, "ingest"),
    "filter": _stage(
        "tasks.stages.filter", "filter", {"max_caption_repeats": synthetic.MAX_CAPTION_REPEATS}, "download"
    ),
    "dedup": _stage("tasks.stages.dedup", "dedup", {}, "filter"),
    "write embeddings": Step(_setup(_write_embeddings), "benchmarks.synthetic", needs_images=True, is_setup=True),
    "embed, reading images": Step(_read_images, "tasks.stages.embed", needs_images=True),
    "embed, nothing new": dataclasses.replace(
        _stage("tasks.stages.embed", "embed", {}, "dedup", "clip"), needs_images=True
    ),
    "curate, semantic": dataclasses.replace(
        _stage("tasks.stages.curate", "curate", _SEMANTIC, "embed", save_as="curate_semantic"), needs_images=True
    ),
    "curate": dataclasses.replace(_stage("tasks.stages.curate", "curate", {}, "embed"), needs_images=True),
    "report": dataclasses.replace(_stage("tasks.stages.report", "report", {}, "curate"), needs_images=True),
    "opening a reader": Step(_open_readers, needs_images=True),
    **{name: _reader(name) for name in READERS},
}
"""Steps, in the order in which they need each other's results. The last curate's artifact is the one that readers open."""

SCRIPTS: Mapping[str, Step] = {
    "filter by script": Step(filter_by_script),
    "dedup by script": Step(dedup_by_script),
}
"""One-machine scripts with the results of the stages that they are named after."""
