"""Dataset snapshots: the table versions and rows that a training reads.

The facts of the `curate` stage's artifact contain a snapshot. Trainings read the dataset only through it. So a table that
grows in the meantime does not affect them, and MLflow records which rows a model has seen.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch

from tasks import tables
from tasks.store import Store
from unclip.config import fingerprint
from unclip.data import Source
from unclip.models.embeddings import EmbeddingStatistics, PrincipalComponents
from unclip.training import checkpoints

Split = Literal["train", "holdout"]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Versions of the tables, and the selected rows."""

    digest: str
    """Digest of the content: keys, images, captions and embeddings."""
    selection: str
    """URI of a Parquet file with every input row's key, status, reason and split."""
    images: str
    images_version: int
    index_version: int
    """Version of the index of the images table (tasks.index) that describes this version of it."""
    embeddings: str
    embeddings_version: int
    scores: str
    """URI of a Parquet file with each embedded row's CLIP score and probe scores."""
    places: str
    """URI of the folder with the kept rows in the order of the image files."""
    heldout: str
    """URI of a Parquet file with held-out rows, at most 10,000."""
    statistics: str
    """URI of the statistics of the training rows' image embeddings: mean, standard deviation, principal components."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Snapshot":
        return cls(**facts["snapshot"])

    def keys(self, split: Split) -> list[str]:
        """Kept keys of a split, sorted."""
        return kept_keys(self.selection, split)

    def source(self, table: str, *columns: str) -> Source:
        """The files of a table at this snapshot's version."""
        uri = getattr(self, table)
        version = getattr(self, f"{table}_version")
        return Source(tuple(tables.files(uri, version)), columns)

    def load_statistics(self) -> EmbeddingStatistics:
        tensors, _ = checkpoints.load(self.statistics)
        return EmbeddingStatistics(tensors["statistics"]["mean"], tensors["statistics"]["std"])

    def load_principal_components(self) -> PrincipalComponents:
        tensors, _ = checkpoints.load(self.statistics)
        return PrincipalComponents(**tensors["pca"])


def record_snapshot(store: Store, pipeline: str, snapshot: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    """Append one row to the `snapshots` table, unless it has this content already; a refresh writes it last."""
    table = store.uri("snapshots")
    known = tables.read_with_commit_times(table).to_pylist() if tables.version(table) is not None else []
    if any(row["digest"] == snapshot["digest"] for row in known):
        return
    names = (
        "digest",
        "images",
        "images_version",
        "embeddings",
        "embeddings_version",
        "selection",
        "scores",
        "statistics",
    )
    # Snapshots are ordered by number, not by time: clocks may go back.
    row = {"number": len(known) + 1, "pipeline": pipeline, **{name: snapshot[name] for name in names}}
    row |= {name: json.dumps(counts[name], sort_keys=True) for name in ("rows", "reasons")}
    part = pa.table({name: [value] for name, value in row.items()})
    tables.append_files(table, [tables.write_part(table, fingerprint(row), part)], part.schema)


def kept_keys(selection: str, split: Split | None = None) -> list[str]:
    """Sorted keys of the rows that a selection keeps, for one split or both."""
    table = tables.read_file(selection, ["key", "split"])
    wanted = pc.equal(table.column("split"), split) if split else pc.is_valid(table.column("split"))
    return sorted(table.filter(wanted).column("key").to_pylist())


def save_statistics(folder: str, image_embeddings: torch.Tensor) -> dict[str, float]:
    """Write the statistics of embeddings [N, E] for `Snapshot.load_statistics`.

    `statistics` holds `mean` and `std` [E]; `pca` holds `components` [E, E] (rows, by decreasing variance) of the centred
    embeddings, and `explained_variance_ratio` [E].

    Returns:
        Number of components that explain 90, 99 and 99.9 percent of the variance.
    """
    statistics, principal = EmbeddingStatistics.of(image_embeddings), PrincipalComponents.of(image_embeddings)
    tensors = {"statistics": dict(statistics.state_dict()), "pca": principal._asdict()}
    checkpoints.save(folder, tensors, {"rows": len(image_embeddings)})
    return {f"components_{share:g}": float(principal.num_components(share / 100)) for share in (90, 99, 99.9)}
