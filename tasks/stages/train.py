"""Stages that train: `train(part)` creates the stage that trains a part. Trainings are independent of each other."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.derived import DerivedTable
from tasks.snapshots import Snapshot, Split
from tasks.stage import Artifact, Output, Pinning, Stage, StageContext
from tasks.tracking import PREVIEW_KEYS
from tasks.training import Training, pin_trainer, run_training
from unclip import files
from unclip.data import Batch, Places, RowReader, Source
from unclip.models.clip import Clip
from unclip.models.embeddings import EmbeddingStatistics, PrincipalComponents
from unclip.systems.part import Part
from unclip.training.parallel import Workers
from unclip.training.trainer import CURVE

NUM_PREVIEWS = 16
VERSION = 2


def train(part: Part[Any]) -> Stage:
    """Create the stage that trains a part; its parents are the dataset, then the stages in `part.needs`."""

    def function(context: StageContext, config: Any, dataset: Artifact, *needed: Artifact) -> Output:
        if part.shows_rows:
            _record_shown_rows(context, dataset)
        return _train(context, dataset, build_training(part, config, Snapshot.of(dataset.facts), *needed))

    def pin(config: Any, pinning: Pinning) -> Any:
        return part.pin(pin_trainer(config, pinning))

    function.__doc__ = part.help
    return Stage(
        part.name,
        VERSION + part.version,
        function,
        has_workers=True,
        pin=pin,
        shows_rows=part.shows_rows,
        part=part,
        reads_snapshot=True,
        factory=(train, part),
    )


def build_training(part: Part[Any], config: Any, snapshot: Snapshot, *needed: Artifact) -> Training:
    """Everything that a worker needs to train a part with these settings on a snapshot.

    Args:
        needed: artifacts of the stages in `part.needs`, in the same order.
    """
    artifacts = dict(zip(part.needs, needed, strict=True))
    read = TablesRead.of(snapshot, artifacts)
    sources = tuple(read.source(table, *columns) for table, columns in part.reads(config).items())
    return Training(
        build=lambda workers: part.objective(config, SnapshotInputs(workers, snapshot, sources, artifacts)),
        sources=sources,
        places=lambda: read.open_places("train"),
        config=config.trainer,
        validation_places=lambda: read.open_places("holdout"),
        selection=snapshot.selection,
    )


@dataclasses.dataclass(frozen=True)
class TablesRead:
    """Tables that a training reads: those of a snapshot, and those that other stages made for it."""

    snapshot: Snapshot
    derived: Mapping[str, DerivedTable]
    """Stage -> its table."""

    @classmethod
    def of(cls, snapshot: Snapshot, artifacts: Mapping[str, Artifact]) -> "TablesRead":
        made = {stage: DerivedTable.of(artifact) for stage, artifact in artifacts.items()}
        return cls(snapshot, {stage: table for stage, table in made.items() if table is not None})

    def source(self, table: str, *columns: str) -> Source:
        """Files of a table."""
        derived = self.derived.get(table)
        return self.snapshot.source(table, *columns) if derived is None else derived.source(table, columns)

    def open_places(self, split: Split) -> Places:
        """Memory-map the places of the rows of a split in all tables."""
        places = self.snapshot.open_places(split)
        return places.beside([table.open_places(split) for table in self.derived.values()]) if self.derived else places


@dataclasses.dataclass
class SnapshotInputs:
    """Inputs of an objective from a snapshot and the artifacts of other stages; see `unclip.systems.part.TrainingInputs`."""

    workers: Workers
    snapshot: Snapshot
    sources: tuple[Source, ...]
    artifacts: Mapping[str, Artifact]

    def clip(self) -> Clip:
        facts = self.artifacts["clip"].facts
        return Clip.load(facts["model"], facts["pretrained"])

    def model(self, stage: str) -> str:
        return self.artifacts[stage].uri

    def facts(self, stage: str) -> Mapping[str, Any]:
        return self.artifacts[stage].facts

    def statistics(self) -> EmbeddingStatistics:
        return self.snapshot.load_statistics()

    def principal_components(self) -> PrincipalComponents:
        return self.snapshot.load_principal_components()

    def sample_rows(self, table: str, columns: tuple[str, ...], count: int) -> Batch:
        read = TablesRead.of(self.snapshot, self.artifacts)
        places = read.open_places("train")
        return RowReader((read.source(table, *columns),), places).read(places.spread(count))

    def preview_rows(self) -> Batch:
        shown, read = _shown_rows(self.snapshot), TablesRead.of(self.snapshot, self.artifacts)
        places, numbers = Places([shown]), np.arange(shown.num_rows)
        if read.derived and shown.num_rows:
            places = read.open_places(shown["split"][0].as_py())  # all are of one split
            numbers = places.find_rows("images", *(shown[f"images_{name}"].to_numpy() for name in ("file", "row")))
        return RowReader(self.sources, places).read(numbers)


def _train(context: StageContext, dataset: Artifact, training: Training) -> Output:
    snapshot = Snapshot.of(dataset.facts)
    facts: dict[str, Any] = {"rows": dataset.facts["rows"], "snapshot": dataset.facts["snapshot"]}
    context.log_dataset(snapshot.digest, snapshot.embeddings, facts)
    model, digest = run_training(context, training)
    if files.exists(f"{context.folder}/{CURVE}"):
        context.tracker.bytes(files.read(f"{context.folder}/{CURVE}"), CURVE)
    return Output(model, digest, {"samples_seen": training.config.num_samples, "snapshot": snapshot.digest})


def _shown_rows(snapshot: Snapshot) -> pa.Table:
    """A few rows for previews; held-out rows if there are any."""
    return snapshot.heldout_rows().slice(0, NUM_PREVIEWS)


def _record_shown_rows(context: StageContext, dataset: Artifact) -> None:
    """Record the shown rows before the first preview, so that a takedown finds previews that show a row."""
    keys = _shown_rows(Snapshot.of(dataset.facts))["key"].to_pylist()
    files.write_json(f"{context.folder}/{PREVIEW_KEYS}", keys)
    context.tracker.json(keys, PREVIEW_KEYS)
