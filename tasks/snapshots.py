"""Dataset snapshots: which rows of which table versions a training may read.

The facts of the `embed` stage's artifact are a snapshot. Trainings read through nothing else, so that a table which grows
meanwhile changes nothing for them, and so that MLflow can say which rows a model has seen.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow.compute as pc
import torch

from tasks import tables
from unclip import checkpoints
from unclip.data import Source
from unclip.embeddings import EmbeddingStatistics

Split = Literal["train", "holdout"]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Versions of the tables, and the rows that count."""

    digest: str
    """Of the content: keys, pictures, captions and embeddings."""
    selection: str
    """URI of a Parquet file with every input row's key, status, reason and split."""
    images: str
    images_version: int
    embeddings: str
    embeddings_version: int
    statistics: str
    """URI of the mean and standard deviation of the training rows' image embeddings."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Snapshot":
        return cls(**facts["snapshot"])

    def keys(self, split: Split) -> list[str]:
        """Kept keys of a split, sorted."""
        return kept_keys(self.selection, split)

    def source(self, table: Literal["images", "embeddings"], *columns: str) -> Source:
        """The files of a table at this snapshot's version."""
        uri = getattr(self, table)
        version = getattr(self, f"{table}_version")
        return Source(tuple(tables.files(uri, version)), columns)

    def load_statistics(self) -> EmbeddingStatistics:
        tensors, _ = checkpoints.load(self.statistics)
        return EmbeddingStatistics(**tensors["statistics"])


def kept_keys(selection: str, split: Split | None = None) -> list[str]:
    """Sorted keys of the rows that a selection keeps, of one split or of both."""
    table = tables.read_file(selection, ["key", "split"])
    wanted = pc.equal(table.column("split"), split) if split else pc.is_valid(table.column("split"))
    return sorted(table.filter(wanted).column("key").to_pylist())


def save_statistics(folder: str, image_embeddings: torch.Tensor) -> None:
    """Write the statistics of embeddings [N, E] where `Snapshot.load_statistics` finds them."""
    statistics = EmbeddingStatistics.of(image_embeddings)
    checkpoints.save(folder, {"statistics": dict(statistics.state_dict())}, {"rows": len(image_embeddings)})
