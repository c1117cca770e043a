"""Rates, shares and sizes that a storage measured: from the artifacts of its last runs, and the clusters that these recorded."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from pipelines.dag import Dag
from pipelines.dataset import PipelineConfig
from pipelines.estimate import DATA_STAGES, ENCODINGS, Measured, Measurement
from pipelines.pipeline import compose
from tasks import tables
from tasks.run_records import stage_events
from tasks.stage import Artifact, find_artifact
from tasks.store import Store
from unclip import config as configs
from unclip import files
from unclip.errors import ConfigError

MAX_RUNS = 50
"""Newest runs that are read."""
MIN_ROWS = 1_000
"""Fewer rows say more about how a stage starts than about its rate."""
MIN_SECONDS = 1.0
"""Records have a tenth of a second."""
BEFORE = {name: before for before, name in itertools.pairwise((*DATA_STAGES, "report"))}
"""Data stage -> the one whose rows it gets."""
MADE_ROWS = {
    "download": ("fetched_now", "images", "images_recipe"),
    "embed": ("embedded_now", "embeddings", "embeddings"),
    "latents": ("encoded_now", "derived", "derived"),
    "text_states": ("derived_now", "derived", "derived"),
}
"""Stage that adds rows to a table -> fact with their number, folder of the table, and fact with its URI."""


@dataclasses.dataclass(frozen=True)
class _PastRun:
    """Run of a storage that worked on a cluster, with the artifacts that it made or used."""

    config: PipelineConfig
    dag: Dag
    cluster: Mapping[str, float]
    artifacts: Mapping[str, Artifact]
    made: frozenset[str]
    """Stages that it did from start to end."""


def measure(store: Store, config: PipelineConfig, on_gpus: bool) -> Measured:
    """Measure what says something about a configuration: of each stage, the run with most rows.

    Work counts if one run did it from start to end on a cluster that it recorded; a stage that was resumed has the seconds of its
    last attempt alone. Embedding, encoding, training and evaluation count on the same kind of device and with the same models.

    Args:
        on_gpus: the estimate is for GPUs.
    """
    dag = compose(config)
    stages: dict[str, Measurement] = {}
    ignored: dict[str, str] = {}
    image_size, shares, most_rows = None, dict[str, float](), 0
    for past in _past_runs(store, type(config)):
        for name in past.made & dag.keys():
            rows = _rows_in(name, past)
            if not rows:
                continue
            reason = _why_not(name, rows, past, config, dag, on_gpus)
            if reason:
                ignored.setdefault(name, reason)
            elif name not in stages or rows > stages[name].rows:
                stages[name] = Measurement(
                    rows, past.artifacts[name].seconds, _workers(name, rows, past), _row_bytes(name, rows, past, store)
                )
                if name == "download":
                    image_size = (
                        past.config.download.image_size if _encoding(past.config) == _encoding(config) else None
                    )
        found = _shares(past)
        if found and _kept(past, "ingest") > most_rows:
            shares, most_rows = found, _kept(past, "ingest")
    return Measured(stages, shares, image_size, {name: why for name, why in ignored.items() if name not in stages})


def _past_runs(store: Store, config_class: type[PipelineConfig]) -> list[_PastRun]:
    """Runs with settings of the same system, newest first."""
    run_ids = store.list("runs")[-MAX_RUNS:]
    events = {run_id: stage_events(store, run_id) for run_id in run_ids}
    attempts = collections.Counter(
        event["fingerprint"]
        for of_run in events.values()
        for event in of_run.values()
        if "fingerprint" in event and event["state"] != "cached"
    )
    found = []
    for run_id in reversed(run_ids):
        if not store.exists("runs", run_id, "run.json"):
            continue
        record = store.read_json("runs", run_id, "run.json")
        try:
            config = configs.load(config_class, record["config"])
        except ConfigError:  # another system, or settings of another version
            continue
        finished = {name: event for name, event in events[run_id].items() if event["state"] in ("done", "cached")}
        artifacts = {name: find_artifact(store, name, event["fingerprint"]) for name, event in finished.items()}
        made = frozenset(
            name
            for name, event in finished.items()
            if event["state"] == "done"
            and attempts[event["fingerprint"]] == 1
            and artifacts[name]
            and "cluster" in record
        )
        present = {name: artifact for name, artifact in artifacts.items() if artifact}
        found.append(_PastRun(config, compose(config), record.get("cluster", {}), present, made))
    return found


def _encoding(config: PipelineConfig) -> tuple[int, str]:
    return config.download.jpeg_quality, config.download.chroma_subsampling


def _kept(past: _PastRun, name: str) -> int:
    return int(past.artifacts[name].facts["rows"]["kept"])


def _shares(past: _PastRun) -> dict[str, float]:
    """Share of its rows that each data stage kept; empty unless the run has finished all of them on enough rows."""
    if not all(name in past.artifacts for name in DATA_STAGES):
        return {}
    rows = [past.artifacts["ingest"].facts["rows"]["in"], *(_kept(past, name) for name in DATA_STAGES)]
    if rows[0] < MIN_ROWS or not all(rows):
        return {}
    return {name: after / before for name, (before, after) in zip(DATA_STAGES, itertools.pairwise(rows), strict=True)}


def _rows_in(name: str, past: _PastRun) -> int:
    """Rows that a stage worked on; 0 if that is unknown, or if it has none."""
    facts = past.artifacts[name].facts
    if name == "ingest":
        return int(facts["rows"]["in"])
    if name in MADE_ROWS:
        return int(facts[MADE_ROWS[name][0]])
    if name in BEFORE:
        return _kept(past, BEFORE[name]) if BEFORE[name] in past.artifacts else 0
    if name == "evaluate":
        return sum(facts["captions"].values())
    if name == "clip":
        return past.config.clip.trainer.num_samples if past.config.clip.is_trained_from_scratch else 0
    return int(facts.get("samples_seen", 0))


def _workers(name: str, rows: int, past: _PastRun) -> float:
    """CPUs or GPUs that did the work."""
    if not past.dag[name].stage.has_workers:
        return past.cluster["CPU"]
    each = past.config.resources.of(name)
    at_once = dict.fromkeys(("embed", *ENCODINGS), past.config.download.shard_size)
    at_once["evaluate"] = _sampling(past.config).batch_size
    busy = min(each.num_workers, math.ceil(rows / at_once[name])) if name in at_once else each.num_workers
    return busy * (each.gpus_per_worker or each.cpus_per_worker)


def _why_not(name: str, rows: int, past: _PastRun, config: PipelineConfig, dag: Dag, on_gpus: bool) -> str | None:
    """Reason why this work says nothing about the estimate; None if it does."""
    seconds = past.artifacts[name].seconds
    if past.artifacts[name].facts.get("layers") and name not in MADE_ROWS:
        return "it continued an earlier refresh"
    if seconds < MIN_SECONDS or (rows < MIN_ROWS and name != "evaluate"):
        return f"{rows:,} rows in {seconds:g} s are too few to measure"
    if not past.dag[name].stage.has_workers:
        return None
    if (past.config.resources.of(name).gpus_per_worker > 0) != on_gpus:
        return f"this storage measured it on {'CPUs' if on_gpus else 'GPUs'}"
    pairs = [(past.config.clip.model, config.clip.model), (past.config.embed.precision, config.embed.precision)]
    parts = [each for each in dag if dag[each].stage.part is not None]
    for part in parts if name == "evaluate" else {name}.intersection(parts):
        pairs.append((_model(past.dag, part), _model(dag, part)))
    if name == "evaluate":
        pairs.append((_sampling(past.config), _sampling(config)))
    if name in ENCODINGS:
        pairs.append((_encoder(name, past.dag), _encoder(name, dag)))
    return None if all(then == now for then, now in pairs) else "this storage measured it with other models or settings"


def _model(dag: Dag, part: str) -> Any:
    """Settings of a part apart from its training; None if there is no such part."""
    section = dag[part].config if part in dag else None
    return section and dataclasses.replace(section, trainer=type(section.trainer)())


def _encoder(name: str, dag: Dag) -> Any:
    """Settings of what encodes the rows of an encoding; None if it is CLIP."""
    if name == "latents":
        return dag["autoencoder"].config.model, dag[name].config.precision
    encoder = dag["text_encoder"].config if "text_encoder" in dag else None
    return encoder and (encoder.folder or encoder.name, encoder.max_length)


def _sampling(config: PipelineConfig) -> Any:
    evaluate: Any = config.evaluate  # of the system's own class
    return evaluate.sampling


def _row_bytes(name: str, rows: int, past: _PastRun, store: Store) -> float | None:
    """Bytes stored for each row in; None if unknown."""
    artifact = past.artifacts[name]
    if name in MADE_ROWS:
        _, kind, fact = MADE_ROWS[name]
        # the table's name is below this root, wherever the storage was when the artifact was made
        num_rows, num_bytes = tables.extent(store.uri(kind, artifact.facts[fact].rpartition("/")[2]))
    elif name not in BEFORE and name != "ingest":
        return None
    else:
        num_rows, num_bytes = rows, files.size(store.uri("artifacts", name, artifact.fingerprint))
    return num_bytes / num_rows if num_rows and num_bytes else None
