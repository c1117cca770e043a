"""Reference of an evaluation: features of a dataset version's held-out images, computed once and read by later evaluations.

A reference is the result of no stage, but is stored like one, under the name `reference`: `artifacts/reference/<fingerprint>/`
with the keys of its rows and their statistics, and a commit record. It is keyed by the snapshot's digest, so that garbage
collection and verification treat it as they treat results, and a takedown deletes those that hold one of its rows.

Letters: M held-out rows, E width of features.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import torch

from tasks import tables
from tasks.lineage.evaluations import KEYS, REFERENCE, delete_reference, holds_rows
from tasks.lock import lock, result_lock
from tasks.places import read_vectors
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, find_artifact
from tasks.store import Store
from tasks.tombstones import load_tombstones
from unclip import seals
from unclip.config import fingerprint
from unclip.evaluation.distances import Statistics
from unclip.training import checkpoints

_VERSION = 1

Measure = Callable[[pa.Table], torch.Tensor]
"""Function of held-out rows that returns their features [M, E]."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """Stored statistics of held-out images."""

    uri: str
    """Folder that holds them."""
    digest: str
    num_images: int
    statistics: Statistics


def embeddings_reference(store: Store, snapshot: Snapshot) -> Reference | None:
    """Reference of the CLIP embeddings that the snapshot has; None with fewer than two held-out rows."""
    return find_reference(store, snapshot, "embeddings", lambda rows: read_embeddings(snapshot, rows))


def read_embeddings(snapshot: Snapshot, rows: pa.Table) -> torch.Tensor:
    """Image embeddings [M, E] of rows of `Snapshot.heldout_rows`."""
    if not rows.num_rows:
        return torch.empty(0, len(snapshot.load_statistics().mean))
    source = snapshot.source("embeddings", "image_embedding")
    return torch.from_numpy(read_vectors(rows, source.uris, "image_embedding"))


def find_reference(store: Store, snapshot: Snapshot, features: str, measure: Measure) -> Reference | None:
    """Read the reference of a snapshot, or compute and store it; None with fewer than two held-out rows.

    Rows that are taken down meanwhile do not stay: the tombstones are written before references are searched for their rows,
    and are read here once the reference is stored.

    Args:
        features: name of the features, with all that they depend on besides the snapshot.
        measure: measures held-out rows; called only if there is no such reference yet.
    """
    name = fingerprint(REFERENCE, _VERSION, snapshot.digest, features)
    # A process that measures may wait for resources that trainings hold, for as long as they take.
    with lock(store, result_lock(REFERENCE, name), math.inf):
        while True:
            found = find_artifact(store, REFERENCE, name) or _write(store, snapshot, name, features, measure)
            if found is None:
                return None
            if not holds_rows(found.uri, load_tombstones(store).keys):
                tensors, facts = checkpoints.load(f"{found.uri}/statistics")
                return Reference(found.uri, found.digest, facts["num_images"], Statistics(**tensors["statistics"]))
            delete_reference(store, name)


def _write(store: Store, snapshot: Snapshot, name: str, features: str, measure: Measure) -> Artifact | None:
    started = time.monotonic()
    folder = store.inside("artifacts", REFERENCE, name)
    rows = snapshot.heldout_rows()
    gone = pc.is_in(rows["key"], value_set=pa.array(sorted(load_tombstones(store).keys), pa.string()))
    rows = rows.filter(pc.and_(pc.equal(rows["split"], "holdout"), pc.invert(gone)))
    if rows.num_rows < 2:
        return None
    tables.write_file(f"{folder}/{KEYS}", rows.select(["key"]))  # first, so that a takedown knows what the folder holds
    statistics = Statistics.of(measure(rows))
    facts = {"snapshot": snapshot.digest, "features": features, "num_images": rows.num_rows}
    digest = checkpoints.save(f"{folder}/statistics", {"statistics": statistics._asdict()}, facts)
    seals.cover(folder)
    artifact = Artifact(REFERENCE, name, folder, digest, facts, round(time.monotonic() - started, 1))
    store.write_json(dataclasses.asdict(artifact), "stages", REFERENCE, f"{name}.json")
    return artifact
