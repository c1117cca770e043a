"""Real images, measured like those of a system, as the reference of a comparison.

Images of held-out captions are the dataset's. Those of other captions of scenes are rendered.

Letters: B images of a batch, N shown ones, S resolution.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.dataset import PipelineConfig
from tasks.reference import embeddings_reference
from tasks.snapshots import Snapshot
from tasks.stage import Artifact
from tasks.stages.evaluate import caption_groups, heldout_pairs
from tasks.store import Store
from unclip import imaging
from unclip.data import Places, RowReader
from unclip.evaluation import scenes
from unclip.evaluation.intervals import Interval, intervals_of
from unclip.evaluation.metrics import Sampled, concatenate, extract_features, measure, values_of
from unclip.systems.system import ClipFiles
from unclip.training.batches import load_images

BATCH = 64
"""Images that are measured at once."""


@dataclasses.dataclass(frozen=True)
class RealImages:
    """Metrics of real images by group of captions, and the first held-out ones."""

    metrics: dict[str, dict[str, float]]
    """Group -> name -> value; without groups whose images nobody has."""
    intervals: dict[str, dict[str, Interval]]
    """Their 95 % intervals likewise."""
    images: np.ndarray
    """[N, S, S, 3] uint8."""
    correct: list[bool] | None
    """By image: True if it is measured as its caption says; None if its caption describes no scene."""
    captions: list[str]
    """N captions."""
    keys: list[str]
    """N keys of rows."""


@torch.no_grad()
def measure_real_images(config: PipelineConfig, dataset: Artifact, clip: Artifact) -> RealImages:
    """Measure real images for the captions that an evaluation with these settings samples.

    Args:
        dataset: artifact of the dataset version.
        clip: artifact of the frozen CLIP.
    """
    snapshot, num_shown = Snapshot.of(dataset.facts), config.evaluate.num_kept
    network = ClipFiles(clip.facts["model"], clip.facts["pretrained"]).load()
    reference = embeddings_reference(Store(config.storage), snapshot)
    statistics = None if reference is None else reference.statistics
    pairs, size = heldout_pairs(snapshot), config.download.image_size
    reader = RowReader((snapshot.source("images", "jpg"),), Places([pairs]))
    values: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, Interval]] = {}
    shown: list[np.ndarray] = []
    correct: list[bool] | None = None
    for group, captions in caption_groups(config.evaluate, pairs["caption"].to_pylist()).items():
        is_heldout = group == "heldout"
        if not is_heldout and any(scenes.parse_caption(caption) is None for caption in captions):
            continue
        features = []
        for start in range(0, len(captions), BATCH):
            texts = captions[start : start + BATCH]
            if is_heldout:
                images = load_images(reader.read(np.arange(start, start + len(texts)))["jpg"], size)  # [B, 3, S, S]
            else:
                images = render(texts, start, size)
            features.append(extract_features(network, images, texts))
            if is_heldout and start < num_shown:
                shown.append(imaging.to_uint8(images))
        joined = concatenate(features, len(captions))
        estimates = measure(Sampled(captions, joined, statistics))
        values[group], intervals[group] = values_of(estimates), intervals_of(estimates)
        if is_heldout and joined.scenes is not None:
            correct = joined.scenes.all_correct()[:num_shown]
    images_shown = np.concatenate(shown)[:num_shown]
    rows = pairs.slice(0, len(images_shown))
    return RealImages(values, intervals, images_shown, correct, rows["caption"].to_pylist(), rows["key"].to_pylist())


def render(captions: Sequence[str], first: int, image_size: int) -> Tensor:
    """Render images [B, 3, S, S] of captions of scenes; an object without a place gets a random one.

    Args:
        first: number of the first caption, which seeds the images.
    """
    rendered = []
    for index, caption in enumerate(captions, first):
        rng = np.random.default_rng([index, 3])
        scene = scenes.parse_caption(caption)
        assert scene is not None
        if scene.relation is None and scene.place is None:
            scene = dataclasses.replace(scene, place=str(rng.choice(scenes.PLACES)))
        rendered.append(scenes.render(scene, rng, image_size))
    return imaging.from_uint8(np.stack(rendered))
