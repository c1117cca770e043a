"""Stage `curate`: select the training pairs by CLIP scores, probes and semantic deduplication, and write the snapshot.

Scores are independent of thresholds: `scores.parquet` has the scores of every embedded pair. So a threshold can change, and
the report can show the pairs near it, without embedding anything again.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tasks import rows, tables
from tasks.snapshots import kept_keys, record_snapshot, save_statistics
from tasks.stage import Artifact, Output, StageContext, stage
from unclip import files
from unclip.config import fingerprint, require
from unclip.data import vectors
from unclip.errors import ConfigError, InputError
from unclip.evaluation.probes import load_probe

ROWS_AT_ONCE = 4096
NUM_SEARCHED_CLUSTERS = 8
"""Clusters that semantic deduplication searches for a row's duplicates: its own and the nearest ones."""


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    name: str
    """Name of the measured property, such as aesthetic or nsfw; reasons start with it."""
    weights: str
    """Safetensors file of a linear or MLP head on the image embeddings of this CLIP; a path or URI."""
    minimum: float | None = None
    """Pairs that score lower are dropped as `<name>_low`."""
    maximum: float | None = None
    """Pairs that score higher are dropped as `<name>_high`."""
    digest: str | None = None
    """sha256 of the weights, filled in by the pipeline; give it to accept these weights only."""

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[a-z][a-z0-9_]*", self.name)), "name", self.name, "lower-case letters, digits, _")
        require(self.name not in ("clip_score", "key"), "name", self.name, "another name")
        for limit in ("minimum", "maximum"):
            value = getattr(self, limit)
            require(value is None or math.isfinite(value), limit, value, "a number")
        both = self.minimum is not None and self.maximum is not None
        require(not both or self.minimum <= self.maximum, "maximum", self.maximum, "at least minimum")  # type: ignore[operator]


@dataclasses.dataclass(frozen=True)
class CurateConfig:
    min_clip_score: float | None = None
    """Smallest CLIP score (cosine of image and caption embeddings) that is kept; None keeps all."""
    max_clip_score: float | None = None
    """Largest CLIP score that is kept: images that show their caption as text score highest; None keeps all."""
    semantic_distance: float | None = None
    """Images whose embeddings are closer than this (1 - cosine) count as duplicates (SemDeDup); None keeps all."""
    cluster_size: int = 1000
    """Mean number of images per cluster of semantic deduplication; each image is compared within a few clusters."""
    probes: tuple[ProbeConfig, ...] = ()
    """Heads on the image embedding, with the limits outside which pairs are dropped."""

    def __post_init__(self) -> None:
        for name in ("min_clip_score", "max_clip_score"):
            value = getattr(self, name)
            require(value is None or -1 <= value <= 1, name, value, "a cosine, -1 to 1")
        distance = self.semantic_distance
        require(distance is None or 0 < distance < 1, "semantic_distance", distance, "between 0 and 1")
        require(self.cluster_size >= 2, "cluster_size", self.cluster_size, "at least 2")
        names = [probe.name for probe in self.probes]
        require(len(set(names)) == len(names), "probes", names, "different names")

    def limits(self) -> dict[str, tuple[float | None, float | None]]:
        """Smallest and largest score that is kept, for each score."""
        probes = {probe.name: (probe.minimum, probe.maximum) for probe in self.probes}
        return {"clip_score": (self.min_clip_score, self.max_clip_score), **probes}


def pin_probes(config: CurateConfig) -> CurateConfig:
    """Check that the probes can be read, and fill in their digests, so that changed weights cause a new run.

    Raises:
        InputError: a file is missing, damaged, or not a probe.
        ConfigError: a file does not have the digest in the settings.
    """
    pinned = []
    for probe in config.probes:
        load_probe(probe.weights)
        digest = files.sha256(files.read(probe.weights))
        if probe.digest not in (None, digest):
            raise ConfigError(
                f"curate.probes: {probe.weights} has sha256 {digest}, expected {probe.digest}. "
                "Restore the file, or take the digest out of the settings."
            )
        pinned.append(dataclasses.replace(probe, digest=digest))
    return dataclasses.replace(config, probes=tuple(pinned))


@stage("curate", version=2, pin=lambda config, _: pin_probes(config))
def curate(context: StageContext, config: CurateConfig, embed: Artifact) -> Output:
    """Score the pairs by CLIP and by probes, drop those out of bounds and semantic duplicates, and write the snapshot."""
    facts = embed.facts
    keys = kept_keys(facts["selection"])
    columns = ["key", "image_embedding", "clip_score"]
    embedded = tables.read(facts["embeddings"], facts["embeddings_version"], columns)
    embedded = embedded.filter(pc.is_in(embedded.column("key"), value_set=pa.array(keys, pa.string())))
    image_embeddings = torch.tensor(vectors(embedded.column("image_embedding")))

    scores = score(embedded, image_embeddings, config)
    scores_uri = f"{context.folder}/scores.parquet"
    tables.write_file(scores_uri, scores)
    dropped = out_of_bounds(scores, config)
    if config.semantic_distance is not None:
        candidates = np.array([index for index, key in enumerate(keys) if key not in dropped])
        duplicates = semantic_duplicates(image_embeddings[candidates], config.semantic_distance, config.cluster_size)
        dropped |= {keys[candidates[index]]: "semantic_duplicate" for index in sorted(duplicates)}

    selection = rows.drop(tables.read_file(facts["selection"]), dropped)
    counts = rows.count(selection)
    uri = f"{context.folder}/selection.parquet"
    tables.write_file(uri, selection)

    training = pc.is_in(embedded.column("key"), value_set=pa.array(kept_keys(uri, "train"), pa.string())).to_numpy()
    if training.sum() < 2:
        raise InputError(
            f"curate: got {training.sum()} pairs to train on, expected at least 2 ({rows.top_reasons(counts)}). "
            f"{_spread(scores, config)}Loosen [curate] and [filter], or add URLs."
        )
    statistics = f"{context.folder}/statistics"
    explained = save_statistics(statistics, image_embeddings[torch.tensor(training)])

    digest = fingerprint(embed.digest, tables.content_digest(selection.drop_columns("position")))
    snapshot = {name: facts[name] for name in ("images", "images_version", "embeddings", "embeddings_version")}
    snapshot |= {"digest": digest, "selection": uri, "scores": scores_uri, "statistics": statistics}
    record_snapshot(context.store, context.run.pipeline, snapshot, counts)
    clip_score = float(np.mean(embedded.column("clip_score").to_numpy()))
    context.tracker.metrics({**counts["rows"], **explained, "clip_score": clip_score})
    context.tracker.dataset(context.run.pipeline, digest, facts["embeddings"], {**counts, "snapshot": snapshot})
    return Output(uri, digest, {**facts, **counts, "snapshot": snapshot, "clip_score": clip_score})


def score(embedded: pa.Table, image_embeddings: torch.Tensor, config: CurateConfig) -> pa.Table:
    """Table of key, clip_score and a column per probe, with one row per embedded pair.

    Args:
        embedded: key, clip_score.
        image_embeddings: [N, E] of the same rows.
    """
    table = embedded.select(["key", "clip_score"])
    for probe_config in config.probes:
        probe = load_probe(probe_config.weights)
        found = torch.cat([probe(batch) for batch in torch.split(image_embeddings, ROWS_AT_ONCE)])
        table = table.append_column(probe_config.name, pa.array(found.numpy(), pa.float32()))
    return table


def out_of_bounds(scores: pa.Table, config: CurateConfig) -> dict[str, str]:
    """Key -> reason of the rows with a score outside its limits; the first reason counts.

    NaN counts as low and infinity as low or high, even without limits: such a row is useless for training.
    """
    finite = np.finfo(np.float64)
    keys = scores.column("key").to_pylist()
    dropped: dict[str, str] = {}
    for name, (minimum, maximum) in config.limits().items():
        values = scores.column(name).to_numpy().astype(np.float64)
        low = ~(values >= (finite.min if minimum is None else minimum))
        high = values > (finite.max if maximum is None else maximum)
        for bound, mask in (("low", low), ("high", high)):
            for index in np.flatnonzero(mask):
                dropped.setdefault(keys[index], f"{name}_{bound}")
    return dropped


def _spread(scores: pa.Table, config: CurateConfig) -> str:
    """Quantiles of the scores that have limits, to reveal a limit in the wrong unit."""
    text = ""
    for name, limits in config.limits().items():
        values = scores.column(name).to_numpy()
        values = values[np.isfinite(values)]
        if len(values) and limits != (None, None):
            low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
            text += f"Quantiles of {name}: 5 % {low:.3g}, 50 % {middle:.3g}, 95 % {high:.3g}. "
    return text


def semantic_duplicates(embeddings: torch.Tensor, distance: float, cluster_size: int) -> set[int]:
    """Indices of embeddings that are closer than `distance` to an earlier one that is not a duplicate itself.

    As in SemDeDup (Abbas et al. 2023), k-means avoids work quadratic in N: a row is compared with at most NUM_SEARCHED_CLUSTERS
    clusters, of `cluster_size` rows on average. Unlike SemDeDup, a row is compared with neighbouring clusters as well as its
    own. So duplicates across a cluster border are found, and the row that is kept depends on the order of rows, not on the
    clusters. Up to NUM_SEARCHED_CLUSTERS * cluster_size rows are compared all with all.

    Args:
        embeddings: [N, E], unit norm; of duplicates, the first is kept.
        distance: 1 - cosine.
    """
    values = embeddings.numpy()
    reach = (2 * distance) ** 0.5  # Euclidean distance of unit vectors with that cosine
    clusters = _searched_clusters(values, reach, cluster_size)
    duplicates, undecided = np.zeros(len(values), bool), np.ones(len(values), bool)
    while undecided.any():
        followers = _has_earlier_duplicate(values, clusters, 1 - distance, undecided, undecided)
        winners = undecided & ~followers  # the first undecided row always wins, so every round decides at least one
        losers = _has_earlier_duplicate(values, clusters, 1 - distance, followers, winners)
        duplicates |= losers
        undecided = followers & ~losers
    return set(np.flatnonzero(duplicates).tolist())


def _searched_clusters(values: np.ndarray, reach: float, cluster_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ascending indices per cluster: its members, and the rows that may have a duplicate among them.

    A duplicate in another cluster lies beyond the plane halfway between the two centres. So a row farther than `reach` from
    the plane has no duplicate there. If more planes are within reach, only the nearest are considered.

    Args:
        values: [N, E].
        reach: largest Euclidean distance of duplicates.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics.pairwise import euclidean_distances

    num_clusters = round(len(values) / cluster_size)
    if num_clusters <= NUM_SEARCHED_CLUSTERS:
        return [(np.arange(len(values)), np.arange(len(values)))]
    centres = MiniBatchKMeans(num_clusters, random_state=0, n_init=1, batch_size=4096).fit(values).cluster_centers_
    squares = (centres**2).sum(axis=1)
    spans = euclidean_distances(centres).clip(min=1e-6)  # [K, K]
    homes, visits = [], []
    for start in range(0, len(values), ROWS_AT_ONCE):
        squared = squares - 2 * values[start : start + ROWS_AT_ONCE] @ centres.T  # [R, K], minus the row's squared norm
        home = squared.argmin(axis=1)
        own = (np.arange(len(home)), home)
        to_plane = (squared - squared[own][:, None]) / (2 * spans[home])
        to_plane[own] = -1
        nearest = np.argpartition(to_plane, NUM_SEARCHED_CLUSTERS - 1, axis=1)[:, :NUM_SEARCHED_CLUSTERS]
        row, place = np.nonzero(np.take_along_axis(to_plane, nearest, axis=1) <= reach)
        homes.append(home)
        visits.append(np.stack([start + row, nearest[row, place]]))
    row_indices, cluster_indices = np.concatenate(visits, axis=1)
    members = _grouped(np.arange(len(values)), np.concatenate(homes), num_clusters)
    return list(zip(members, _grouped(row_indices, cluster_indices, num_clusters), strict=True))


def _grouped(indices: np.ndarray, clusters: np.ndarray, num_clusters: int) -> list[np.ndarray]:
    """Ascending indices per cluster."""
    order = np.argsort(clusters, kind="stable")
    return np.split(indices[order], np.bincount(clusters, minlength=num_clusters).cumsum()[:-1])


def _has_earlier_duplicate(
    values: np.ndarray,
    clusters: Sequence[tuple[np.ndarray, np.ndarray]],
    threshold: float,
    queries: np.ndarray,
    candidates: np.ndarray,
) -> np.ndarray:
    """Mask of the rows in `queries` that have an earlier row in `candidates` (masks) with a cosine above the threshold."""
    found = np.zeros(len(values), bool)
    for members, visitors in clusters:
        others, rows_here = members[candidates[members]], visitors[queries[visitors]]
        for start in range(0, len(rows_here), ROWS_AT_ONCE):
            block = rows_here[start : start + ROWS_AT_ONCE]
            earlier = others[: np.searchsorted(others, block[-1])]
            for first in range(0, len(earlier), ROWS_AT_ONCE):
                columns = earlier[first : first + ROWS_AT_ONCE]
                near = values[block] @ values[columns].T > threshold  # [R, C]
                found[block] |= (near & (columns < block[:, None])).any(axis=1)
    return found
