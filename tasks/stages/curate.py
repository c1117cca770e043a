"""Stage `curate`: select the training pairs by CLIP scores, probes and semantic deduplication, and write the snapshot.

Scores are independent of thresholds: `scores.parquet` has the scores of every embedded pair. So a threshold can change, and
the report can show the pairs near it, without embedding anything again.
"""

import dataclasses
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tasks import rows, tables
from tasks.semantic import duplicates_in_memory
from tasks.snapshots import kept_keys, record_snapshot, save_statistics
from tasks.stage import Artifact, Output, StageContext, stage
from unclip import files
from unclip.config import fingerprint, require
from unclip.data import vectors
from unclip.errors import ConfigError, InputError
from unclip.evaluation.probes import load_probe

ROWS_AT_ONCE = 4096


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
        is_duplicate = duplicates_in_memory(
            image_embeddings[candidates].numpy(), config.semantic_distance, config.cluster_size
        )
        duplicates = np.flatnonzero(is_duplicate).tolist()
        dropped |= {keys[candidates[index]]: "semantic_duplicate" for index in duplicates}

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
