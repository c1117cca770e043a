"""Dataset snapshots: the table versions and rows that a training reads.

The facts of the `curate` stage's artifact contain a snapshot. Trainings read the dataset only through it. So a table that
grows in the meantime does not affect them, and MLflow records which rows a model has seen.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa

from tasks import tables
from tasks.places import open_places
from tasks.store import Store
from tasks.tombstones import refuse_if_recorded
from unclip.config import fingerprint
from unclip.data import Places, Source
from unclip.models.embeddings import EmbeddingStatistics, Moments, PrincipalComponents
from unclip.training import checkpoints

Split = Literal["train", "holdout"]
MAX_HELDOUT = 10_000
"""Held-out rows that evaluation and previews choose from; keys are hashes, so the first ones are a random sample."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Versions of the tables, and the selected rows."""

    digest: str
    """Digest of the content: keys, images, captions and embeddings."""
    selection: str
    """Folder with every input row's key, status, reason and split, by key range (`tasks.ranges`)."""
    images: str
    images_version: int
    index_version: int
    """Version of the index of the images table; see `tasks.index`."""
    embeddings: str
    embeddings_version: int
    scores: str
    """Folder with each embedded row's CLIP score, probe scores and place in the embeddings table, by key range."""
    places: str
    """Folder with the places of the kept rows; see `tasks.places`."""
    heldout: str
    """Parquet file with the first held-out rows in order of keys, at most `MAX_HELDOUT`; see `heldout_rows`."""
    statistics: str
    """URI of the statistics of the training rows' image embeddings: mean, standard deviation, principal components."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Snapshot":
        return cls(**facts["snapshot"])

    def open_places(self, *splits: Split) -> Places:
        """Memory-map the places of the kept rows of a split, or of several."""
        return open_places(self.places, *splits)

    def heldout_rows(self) -> pa.Table:
        """Held-out rows in order of keys: key, caption, split, is_trained_on, and places.

        `is_trained_on` is true if a training row has the same caption. If nothing is held out, these are training rows.
        """
        return tables.read_file(self.heldout)

    def source(self, table: str, *columns: str) -> Source:
        """The files of a table at this snapshot's version."""
        uri = getattr(self, table)
        version = getattr(self, f"{table}_version")
        return Source(tuple(tables.files(uri, version)), columns, table)

    def load_statistics(self) -> EmbeddingStatistics:
        tensors, _ = checkpoints.load(self.statistics)
        return EmbeddingStatistics(tensors["statistics"]["mean"], tensors["statistics"]["std"])

    def load_principal_components(self) -> PrincipalComponents:
        tensors, _ = checkpoints.load(self.statistics)
        return PrincipalComponents(**tensors["pca"])


def record_snapshot(store: Store, pipeline: str, snapshot: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    """Append one row to the `snapshots` table, unless it has this content already; a refresh writes it last.

    Raises:
        StageError: a takedown was recorded meanwhile.
    """
    table = store.uri("snapshots")
    known = tables.read_with_commit_times(table).to_pylist() if tables.version(table) is not None else []
    if any(row["digest"] == snapshot["digest"] for row in known):
        return
    names = [field.name for field in dataclasses.fields(Snapshot)]
    # Snapshots are ordered by number, not by time: clocks may go back.
    row = {"number": len(known) + 1, "pipeline": pipeline, **{name: snapshot[name] for name in names}}
    row = store.portable(row) | {name: json.dumps(counts[name], sort_keys=True) for name in ("rows", "reasons")}
    part = pa.table({name: [value] for name, value in row.items()})
    written = tables.write_part(table, fingerprint(row), part)
    refuse_if_recorded(store, "curate")
    tables.append_files(table, [written], part.schema)


def save_statistics(folder: str, moments: Moments) -> dict[str, float]:
    """Write the statistics of the embeddings with these moments for `Snapshot.load_statistics`.

    `statistics` holds `mean` and `std` [E]; `pca` holds `components` [E, E] (rows, by decreasing variance) of the centred
    embeddings, and `explained_variance_ratio` [E].

    Returns:
        Number of components that explain 90, 99 and 99.9 percent of the variance.
    """
    statistics, principal = EmbeddingStatistics.of_moments(moments), PrincipalComponents.of_moments(moments)
    tensors = {"statistics": dict(statistics.state_dict()), "pca": principal._asdict()}
    checkpoints.save(folder, tensors, {"rows": moments.count})
    return {f"components_{share:g}": float(principal.num_components(share / 100)) for share in (90, 99, 99.9)}
