"""Scores of the images that a system samples for captions: the work of an evaluation, for whoever compares models.

Workers sample and measure; they return features, and pixels only of the images to show. Memory therefore grows by some
kilobytes with each image, at any resolution. The same captions, seed and batch size give every system the same noise.

Letters: B images of a batch, G of them to show, S resolution, E width of embeddings.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import nn

from tasks.dataflow import run_in_actors
from tasks.progress import Progress
from tasks.stage import Resources
from unclip import files, imaging
from unclip.evaluation import metrics
from unclip.evaluation.inception import WIDTH, load_inception, prepare
from unclip.evaluation.intervals import Estimate
from unclip.evaluation.metrics import Features
from unclip.models.clip import Clip
from unclip.systems.system import (
    ClipFiles,
    EmbedsCaptions,
    Reconstructs,
    StackFiles,
    batch_generator,
    find_system,
    sample_batch,
)
from unclip.training.batches import load_images


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Settings with which images are sampled and measured."""

    seed: int
    """Seed of the noise."""
    batch_size: int
    """Captions sampled together. It is part of what makes the noise."""
    num_shown: int = 0
    """First images of each group that are returned as pixels."""
    inception: str | None = None
    """Weights of Inception, whose features are measured as well; see `unclip.evaluation.inception`."""


Originals = Callable[[range], list[bytes]]
"""Function that reads images, stored as JPEG, by their numbers; called in the calling process, for one batch after another."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Captions to sample together."""

    number: int
    """Number in its group, which gives the noise."""
    captions: list[str]
    num_shown: int = 0
    """First images that are returned as pixels."""
    is_embedded: bool = False
    """Return the embeddings that the system samples before the images, too."""
    originals: list[bytes] | None = None
    """Images, stored as JPEG, to reconstruct instead."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Sampled images, measured: those of one batch, or of a group."""

    features: Features
    digests: list[str]
    """sha256 of the images of each batch, as [B, S, S, 3] uint8."""
    shown: np.ndarray
    """[G, S, S, 3] uint8, the first images, for the grid; G may be 0."""
    seconds: float = 0.0
    """Time that workers took to sample the images."""


@torch.no_grad()
def measure_batch(
    clip: Clip, images: torch.Tensor, captions: Sequence[str], num_shown: int, inception: nn.Module | None = None
) -> Measured:
    """Measure a batch of images [B, 3, S, S] in [-1, 1], on CLIP's device, and keep its first `num_shown` images."""
    pixels = imaging.to_uint8(images)
    features = metrics.extract_features(clip, images, captions, inception)
    return Measured(features, [files.sha256(pixels.tobytes())], pixels[:num_shown].copy())


def merge(batches: Iterable[Measured], count: int) -> Measured:
    """Join the batches of a group of `count` images, in their order, as they come."""
    digests: list[str] = []
    shown: list[np.ndarray] = []
    seconds: list[float] = []

    def features() -> Iterator[Features]:
        for batch in batches:
            digests.extend(batch.digests)
            shown.append(batch.shown)
            seconds.append(batch.seconds)
            yield batch.features

    joined = metrics.concatenate(features(), count)
    return Measured(joined, digests, np.concatenate(shown), sum(seconds))


def sample_groups(
    groups: Mapping[str, Sequence[str]],
    clip: ClipFiles,
    stack: StackFiles,
    scoring: Scoring,
    resources: Resources,
    progress: Progress | None = None,
    *,
    embedded: Collection[str] = (),
    reconstructed: Mapping[str, Originals] = MappingProxyType({}),
) -> dict[str, Measured]:
    """Sample and measure each group of captions; batches are distributed over workers, one at a time to each.

    Args:
        clip: CLIP that measures the images.
        stack: system that samples them.
        resources: workers, and what each of them takes of the cluster.
        progress: counts the images.
        embedded: groups for which the embeddings that the system samples before the images are returned, if it does.
        reconstructed: groups whose images are sampled from the embeddings of other images instead of from captions.
    """
    size = scoring.batch_size

    def batches() -> Iterator[Batch]:
        for group, captions in groups.items():
            for number, start in enumerate(range(0, len(captions), size)):
                some = list(captions[start : start + size])
                originals = reconstructed.get(group)
                given = None if originals is None else originals(range(start, start + len(some)))
                yield Batch(number, some, max(0, scoring.num_shown - start), group in embedded, given)

    num_batches = sum(math.ceil(len(captions) / size) for captions in groups.values())
    worker = SamplingWorker.options(**resources.options())  # type: ignore[attr-defined]
    start = functools.partial(
        worker.remote, clip, stack, scoring.seed, resources.cpus_per_worker, scoring.inception, progress
    )
    if progress is not None:
        progress.wait(f"for {resources}")
    num_workers = min(resources.num_workers, num_batches)
    done = _in_order(run_in_actors(start, num_workers, _sample_batch, enumerate(batches())))

    def next_batches(count: int) -> Iterator[Measured]:
        for measured in itertools.islice(done, math.ceil(count / size)):
            if progress is not None:
                progress.update(len(measured.features.image_embedding))
            yield measured

    return {group: merge(next_batches(len(captions)), len(captions)) for group, captions in groups.items()}


def _sample_batch(worker: Any, numbered: tuple[int, Batch]) -> Any:
    return worker.sample.remote(numbered[1])


def _in_order(done: Iterable[tuple[tuple[int, Any], Measured]]) -> Iterator[Measured]:
    """Yield results in the order of their numbers; those that come early wait."""
    waiting: dict[int, Measured] = {}
    position = 0
    for (number, _), measured in done:
        waiting[number] = measured
        while position in waiting:
            yield waiting.pop(position)
            position += 1


@ray.remote
class SamplingWorker:
    """Holds one system and the CLIP that measures it; samples one batch per call."""

    def __init__(
        self,
        measuring_clip: ClipFiles,
        stack: StackFiles,
        seed: int,
        num_threads: int,
        inception: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        if progress is not None:
            progress.begin()
        torch.set_num_threads(num_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.system = find_system(stack.system).load(stack).to(device)
        self.clip = measuring_clip.load().to(device)
        self.inception = None if inception is None else load_inception(inception).to(device)
        self.seed = seed

    def sample(self, batch: Batch) -> Measured:
        """Sample and measure a batch."""
        started = time.monotonic()
        system, originals = self.system, None
        if batch.originals is None:
            images = sample_batch(system, batch.captions, batch.number, seed=self.seed, sampling=system.sampling)
        else:
            assert isinstance(system, Reconstructs)
            originals = load_images(batch.originals, system.image_size)
            generator = batch_generator(system, batch.number, self.seed)
            images = system.reconstruct(originals.to(system.device), system.sampling, generator).cpu()
        seconds = time.monotonic() - started
        measured = measure_batch(self.clip, images.to(system.device), batch.captions, batch.num_shown, self.inception)
        features = measured.features
        if originals is not None:
            features = features._replace(difference=(images - originals).abs().mean(dim=(1, 2, 3)))
        if batch.is_embedded:
            features = features._replace(sampled_embedding=self._embeddings(batch, features.text_embedding))
        return dataclasses.replace(measured, features=features, seconds=seconds)

    def _embeddings(self, batch: Batch, text_embedding: torch.Tensor) -> torch.Tensor | None:
        """Embeddings [B, E] that the images were sampled from; None unless they are those of the CLIP that measures."""
        system = self.system
        if not isinstance(system, EmbedsCaptions):
            return None
        own = system.embed_text(batch.captions).cpu()
        if own.shape != text_embedding.shape or not torch.allclose(own, text_embedding, rtol=0, atol=1e-3):
            return None
        generator = batch_generator(system, batch.number, self.seed)
        found = system.sample_embeddings(batch.captions, system.sampling, generator)
        return None if found is None else found.float().cpu()


def inception_features(
    originals: Originals, count: int, weights: str, image_size: int, batch_size: int, resources: Resources
) -> torch.Tensor:
    """Measure stored images by Inception: features [count, 2048].

    Args:
        originals: reads the images.
        image_size: resolution at which they are measured, that of the sampled images.
        resources: workers, and what each of them takes of the cluster.
    """
    worker = InceptionWorker.options(**resources.options())  # type: ignore[attr-defined]
    start = functools.partial(worker.remote, weights, image_size, resources.cpus_per_worker)
    spans = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    items = ((span, originals(span)) for span in spans)
    features = torch.empty(count, WIDTH)
    for (span, _), measured in run_in_actors(start, min(resources.num_workers, len(spans)), _measure_originals, items):
        features[span.start : span.stop] = measured
    return features


def _measure_originals(worker: Any, item: tuple[range, list[bytes]]) -> Any:
    return worker.measure.remote(item[1])


@ray.remote
class InceptionWorker:
    """Holds Inception; measures one batch of stored images per call."""

    def __init__(self, weights: str, image_size: int, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_inception(weights).to(self.device)
        self.image_size = image_size

    @torch.no_grad()
    def measure(self, encoded: list[bytes]) -> torch.Tensor:
        """Features [len(encoded), 2048] of images stored as JPEG."""
        images = load_images(encoded, self.image_size).to(self.device)
        return self.model(prepare(images)).cpu()  # type: ignore[no-any-return]


def scores_table(
    groups: Mapping[str, Sequence[str]],
    estimates: Mapping[str, Mapping[str, Estimate]],
    keys: Mapping[str, Mapping[str, str]] | None = None,
) -> pa.Table:
    """Scores of single images, one row for each image, in order.

    Args:
        groups: captions by group.
        estimates: metrics by group and name; those that score single images become columns.
        keys: key of the dataset's row that a caption is from, by group and caption.

    Returns:
        `group`, `index` (position in the group), `caption`, `key` (null for captions that are no row's), and a float32 column for
        each metric, null where an image has no such score.
    """
    names: dict[str, None] = {}
    for found in estimates.values():
        names |= dict.fromkeys(name for name, estimate in found.items() if estimate.is_per_image)
    parts = []
    for group, captions in groups.items():
        count, keys_of = len(captions), (keys or {}).get(group, {})
        columns: dict[str, Any] = {
            "group": pa.array([group] * count, pa.string()),
            "index": pa.array(np.arange(count), pa.int32()),
            "caption": pa.array(captions, pa.string()),
            "key": pa.array([keys_of.get(caption) for caption in captions], pa.string()),
        }
        for name in names:
            estimate = estimates[group].get(name)
            scores = np.full(count, np.nan) if estimate is None else estimate.rows.numpy()
            columns[name] = pa.array(scores.astype(np.float32), from_pandas=True)  # NaN becomes null
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)
