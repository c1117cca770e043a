"""Agreement of sampled images with their captions, measured from pixels and from embeddings.

Letters: B images, N and M embeddings, E their width.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip import imaging
from unclip.errors import NonFiniteError, ShapeError
from unclip.evaluation import distances, scenes
from unclip.evaluation.distances import Statistics
from unclip.evaluation.inception import prepare
from unclip.evaluation.intervals import Estimate, mean_of
from unclip.evaluation.retrieval import match, r_precision
from unclip.models.clip import Clip

ATTRIBUTES = ("colour", "background", "size", "shape")

SCORED = (*ATTRIBUTES, "place")
"""Columns of `SceneScores.correct`."""

LABELS: Mapping[str, tuple[str, ...]] = {
    "shape": scenes.SHAPES,
    "colour": tuple(scenes.COLOURS),
    "size": scenes.SIZES,
}
"""Attribute of an object -> its values. The attributes are the columns of `SceneScores.expected` and `SceneScores.measured`."""


class SceneScores(NamedTuple):
    """Scenes measured in sampled images, compared with those that the captions name."""

    correct: Tensor
    """[N, 5] int8, by attribute of `SCORED`: 1 correct, 0 wrong, -1 not named by the caption."""
    expected: Tensor
    """[N, 3] int8, first object of the caption, as indices into the values of `LABELS`."""
    measured: Tensor
    """[N, 3] int8, first object of the image likewise; -1 for a value that `LABELS` lacks, or no object."""
    swapped: Tensor
    """[N, 3] int8, by attribute of `LABELS`: 1 if each of two objects has the other's value, otherwise 0; -1 if the caption
    does not name two objects that differ in it."""
    place: Tensor
    """[N] int8, place of the object as an index into `scenes.PLACES`; -1 for two objects, or none."""

    def accuracy(self) -> dict[str, float]:
        """Return the share of correct images by attribute; for `place`, among the captions that name one."""
        columns = dict(zip(SCORED, self.correct.T, strict=True))
        named = {attribute: column[column >= 0] for attribute, column in columns.items()}
        return {attribute: column.double().mean().item() for attribute, column in named.items() if len(column)}

    def all_correct(self) -> list[bool]:
        """Return one bool per image: True if every attribute of `ATTRIBUTES` is correct."""
        correct: list[bool] = (self.correct[:, : len(ATTRIBUTES)] == 1).all(dim=1).tolist()
        return correct

    def confusion(self, attribute: str) -> np.ndarray:
        """Count the first objects, [L, L + 1] for L labels: rows expected, columns measured, the last for other values."""
        column, count = list(LABELS).index(attribute), len(LABELS[attribute])
        counts = np.zeros((count, count + 1), dtype=np.int64)
        np.add.at(counts, (self.expected[:, column].numpy(), self.measured[:, column].numpy()), 1)  # -1 is the last
        return counts


class Features(NamedTuple):
    """Measurements of sampled images, one row per image: all that is kept of them, so that pixels need not be.

    A field is a tensor [N, ...], a named tuple of such, or None where it does not apply.
    """

    image_embedding: Tensor
    """[N, E], unit norm."""
    text_embedding: Tensor
    """[N, E], embeddings of the captions, unit norm."""
    scenes: SceneScores | None
    """None if a caption does not describe a scene."""
    inception: Tensor | None = None
    """[N, 2048], features of Inception, if its weights are given."""
    sampled_embedding: Tensor | None = None
    """[N, E], image embeddings that the system sampled for the captions before the images; any norm."""
    difference: Tensor | None = None
    """[N], mean absolute difference of the pixels from the image that a reconstruction is of."""


class Sampled(NamedTuple):
    """Images sampled for captions, by their features."""

    captions: Sequence[str]
    """N captions."""
    features: Features
    reference: Statistics | None = None
    """CLIP embeddings of held-out images of the dataset; None if there are fewer than two."""
    inception_reference: Statistics | None = None
    """Inception features of held-out images."""
    own: Tensor | None = None
    """[N, E], CLIP embeddings of the images that the captions come with, if they do."""


def extract_features(
    clip: Clip, images: Tensor, captions: Sequence[str], inception: nn.Module | None = None
) -> Features:
    """Measure a batch of images [B, 3, S, S] in [-1, 1], on CLIP's device, sampled for B captions.

    Args:
        inception: the network of `load_inception`, on the same device, if its features are measured as well.

    Raises:
        NonFiniteError: an image has NaN or infinite values, which would be measured as black or white.
    """
    finite = images.isfinite().flatten(1).all(dim=1)  # [B]
    if not finite.all():
        index = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"images: got values that are not finite for {captions[index]!r}, expected [-1, 1]. Sample with precision fp32; if "
            "they stay, train the model again with a lower learning rate."
        )
    tokens = clip.tokenize(list(captions)).to(images.device)
    return Features(
        clip.embed_images(clip.resize(images)).cpu(),
        clip.encode_text(tokens).text_embedding.cpu(),
        score_scenes(images, captions),
        None if inception is None else inception(prepare(images)).cpu(),
    )


def concatenate(batches: Iterable[Features], count: int) -> Features:
    """Join the features of batches in their order; a field that is None in any batch is None.

    Memory is allocated once, for `count` images in all, and no batch is kept: small pieces that are kept between the large
    temporaries of sampling would fragment the heap.

    Raises:
        ShapeError: the batches have not `count` rows together.
    """
    whole: Features | None = None
    start = 0
    for batch in batches:
        stop = start + len(batch.image_embedding)
        if stop <= count:
            whole = _write(_allocate(batch, count) if whole is None else whole, batch, slice(start, stop))
        start = stop
    if start != count or whole is None:
        raise ShapeError(f"features: got batches of {start} images together, expected {count}.")
    return whole


def _allocate(batch: Any, count: int) -> Any:
    """Return uninitialised features of `count` images, with the fields of a batch."""
    if isinstance(batch, Tensor):
        return batch.new_empty(count, *batch.shape[1:])
    return None if batch is None else type(batch)(*(_allocate(field, count) for field in batch))


def _write(whole: Any, batch: Any, rows: slice) -> Any:
    """Copy the features of a batch into rows of `whole`; a field that is None in either becomes None."""
    if whole is None or batch is None:
        return None
    if isinstance(whole, Tensor):
        whole[rows] = batch
        return whole
    return type(whole)(*(_write(*fields, rows) for fields in zip(whole, batch, strict=True)))


def score_scenes(images: Tensor, captions: Sequence[str]) -> SceneScores | None:
    """Measure images [B, 3, H, W] in [-1, 1] against their captions.

    Returns:
        None if a caption does not describe a scene; then nothing can be measured exactly.
    """
    expected = [scenes.parse_caption(caption) for caption in captions]
    known = [scene for scene in expected if scene is not None]
    if len(known) < len(captions) or not known:
        return None
    measured = [
        scenes.measure(pixels, num_objects=len(scene.objects), relation=scene.relation)
        for pixels, scene in zip(imaging.to_uint8(images), known, strict=True)
    ]
    scores = [scenes.score(found, scene) for found, scene in zip(measured, known, strict=True)]
    rows = (
        [[score.get(attribute, -1) for attribute in SCORED] for score in scores],
        [_labels(scene) for scene in known],
        [_labels(scene) for scene in measured],
        [_swapped(*pair) for pair in zip(measured, known, strict=True)],
        [-1 if scene.place is None else scenes.PLACES.index(scene.place) for scene in measured],
    )
    return SceneScores(*(torch.tensor(values, dtype=torch.int8) for values in rows))


def _labels(scene: scenes.Scene) -> list[int]:
    """Indices into the values of `LABELS` for a scene's first object; -1 where there is none."""
    values = [(getattr(scene.objects[0], name) if scene.objects else None, labels) for name, labels in LABELS.items()]
    return [labels.index(value) if value in labels else -1 for value, labels in values]


def _swapped(measured: scenes.Scene, expected: scenes.Scene) -> list[int]:
    """By attribute of `LABELS`: 1 if the values of two objects are exchanged, 0 if not, -1 if there are none to exchange."""
    found = []
    for attribute in LABELS:
        want, got = ([getattr(each, attribute) for each in scene.objects] for scene in (expected, measured))
        found.append(int(got == want[::-1]) if len(set(want)) == 2 else -1)
    return found


class Placement(NamedTuple):
    """Background, and position and size of the foreground in images, as continuous numbers."""

    background: np.ndarray
    """[B] median colour of the border, as the mean of red, green and blue, 0 to 255."""
    centre: np.ndarray
    """[B, 2] x and y of the foreground's centre of mass, 0 to 1 from the top left; the image centre if there is none."""
    area: np.ndarray
    """[B] share of the image that the foreground covers."""


def placement(images: Tensor) -> Placement:
    """Measure images [B, 3, H, W] in [-1, 1] without naming objects or colours."""
    pixels = imaging.to_uint8(images).astype(np.float64)  # [B, H, W, 3]
    height, width = pixels.shape[1:3]
    border = np.ones((height, width), bool)
    border[1:-1, 1:-1] = False
    background = np.median(pixels[:, border], axis=1)  # [B, 3]
    contrast = np.linalg.norm(pixels - background[:, None, None], axis=3)  # [B, H, W]
    mass = (contrast > np.maximum(contrast.max(axis=(1, 2), keepdims=True) / 2, 20)).astype(np.float64)
    total = mass.sum(axis=(1, 2))
    x = (mass * (np.arange(width) + 0.5) / width).sum(axis=(1, 2))
    y = (mass * ((np.arange(height) + 0.5) / height)[:, None]).sum(axis=(1, 2))
    centre = np.stack([x, y], axis=1) / np.maximum(total, 1)[:, None]
    return Placement(background.mean(axis=1), np.where(total[:, None] > 0, centre, 0.5), total / (height * width))


def monotone(values: np.ndarray, slack: float = 0.1) -> np.ndarray:
    """Test which rows [B, N] move monotonically from their first value to their last.

    Args:
        slack: how far a row may move back, as a share of its total change.

    Returns:
        [B] bool; False if both ends are equal.
    """
    change = (values[:, -1] - values[:, 0])[:, None]  # [B, 1]
    forward = values * np.sign(change)
    retreat = (np.maximum.accumulate(forward, axis=1) - forward).max(axis=1)
    return np.asarray((change[:, 0] != 0) & (retreat <= slack * np.abs(change[:, 0])))


def clip_score(sampled: Sampled) -> dict[str, Estimate]:
    """Return the mean cosine of image and caption embeddings. Source: Hessel et al. 2021, without the weight."""
    features = sampled.features
    return {"clip_score": mean_of((features.image_embedding * features.text_embedding).sum(dim=1))}


def scene_accuracy(sampled: Sampled) -> dict[str, Estimate]:
    """Return the share of correct images; empty if a caption describes no scene.

    Returns:
        `accuracy.<attribute>` of `SCORED`, for `place` among the captions that name one, and `accuracy.all`, the share of images
        in which every attribute of `ATTRIBUTES` is correct.
    """
    scores = sampled.features.scenes
    if scores is None:
        return {}
    correct = {f"accuracy.{name}": mean for name, mean in _means(SCORED, scores.correct).items()}
    return {**correct, "accuracy.all": mean_of(torch.tensor(scores.all_correct(), dtype=torch.float32))}


def _means(names: Iterable[str], columns: Tensor) -> dict[str, Estimate]:
    """Means of columns [N, K] of 0 and 1 by name; -1 stands for a missing value, and columns without any other are left out."""
    numbers = torch.where(columns < 0, math.nan, columns.float())
    named = zip(names, numbers.T, strict=True)
    return {name: mean_of(column) for name, column in named if not column.isnan().all()}


def clip_frechet_distance(sampled: Sampled) -> dict[str, Estimate]:
    """Return the `frechet` distance of CLIP embeddings from held-out images; empty without at least two of either."""
    return _distance(sampled.features.image_embedding, sampled.reference, "clip_frechet_distance", distances.frechet)


def clip_kernel_distance(sampled: Sampled) -> dict[str, Estimate]:
    """Return the `kernel_distance` of CLIP embeddings from held-out images; empty without at least two of either."""
    return _distance(sampled.features.image_embedding, sampled.reference, "clip_kid", distances.kernel_distance)


def cmmd(sampled: Sampled) -> dict[str, Estimate]:
    """Return the `cmmd` of CLIP embeddings from held-out images; empty without at least two of either."""
    return _distance(sampled.features.image_embedding, sampled.reference, "cmmd", distances.cmmd)


def clip_manifold(sampled: Sampled) -> dict[str, Estimate]:
    """Return `clip_precision`, `clip_recall`, `clip_density` and `clip_coverage`, the `manifold_overlap` of CLIP embeddings."""
    if sampled.reference is None or len(sampled.captions) < 2:
        return {}
    found = distances.manifold_overlap(sampled.features.image_embedding, sampled.reference)
    return {f"clip_{name}": estimate for name, estimate in found.items()}


def frechet_inception_distance(sampled: Sampled) -> dict[str, Estimate]:
    """Return FID, the `frechet` distance of Inception features; empty unless these were measured."""
    name = "frechet_inception_distance"
    return _distance(sampled.features.inception, sampled.inception_reference, name, distances.frechet)


def kernel_inception_distance(sampled: Sampled) -> dict[str, Estimate]:
    """Return KID, the `kernel_distance` of Inception features; empty unless these were measured."""
    name = "kernel_inception_distance"
    return _distance(sampled.features.inception, sampled.inception_reference, name, distances.kernel_distance)


def _distance(
    features: Tensor | None,
    reference: Statistics | None,
    name: str,
    distance: distances.Distance,
) -> dict[str, Estimate]:
    is_possible = features is not None and reference is not None and len(features) >= 2
    return {name: distance(features, reference)} if is_possible else {}  # type: ignore[arg-type]


def clip_r_precision(sampled: Sampled) -> dict[str, Estimate]:
    """Return the share of images whose own caption is nearest among a hundred, see `r_precision`; empty if all are equal."""
    features = sampled.features
    scores = r_precision(sampled.captions, features.image_embedding, features.text_embedding)
    return {} if scores is None else {"clip_r_precision": mean_of(scores)}


def sampled_embeddings(sampled: Sampled) -> dict[str, Estimate]:
    """Compare the image embeddings that a system samples first with those of the captions' own images.

    Returns:
        `embedding_<name>` for each name of `retrieval.score_embeddings`; empty for other systems, and for captions
        without images.
    """
    embedding, own = sampled.features.sampled_embedding, sampled.own
    if embedding is None or own is None or len(own) < 2:
        return {}
    return {f"embedding_{name}": estimate for name, estimate in match(embedding, own).items()}


def reconstruction(sampled: Sampled) -> dict[str, Estimate]:
    """Compare images sampled from the embeddings of the captions' own images with these; empty for other images.

    Returns:
        `reconstruction_l1`, the mean absolute difference of pixels in [-1, 1]; `reconstruction_cosine`, that of CLIP embeddings.
    """
    difference, own = sampled.features.difference, sampled.own
    if difference is None or own is None:
        return {}
    cosine = F.cosine_similarity(sampled.features.image_embedding, own, dim=1)
    return {"reconstruction_l1": mean_of(difference), "reconstruction_cosine": mean_of(cosine)}


def scene_binding(sampled: Sampled) -> dict[str, Estimate]:
    """Tell whose attribute went to whom in images of two objects; empty if no caption names two that differ.

    Returns:
        `swapped.<attribute>`, the share of images in which each object has the other's value, of those whose caption names
        objects that differ in it.
    """
    scores = sampled.features.scenes
    if scores is None:
        return {}
    return {f"swapped.{name}": mean for name, mean in _means(LABELS, scores.swapped).items()}


def caption_diversity(sampled: Sampled) -> dict[str, Estimate]:
    """Measure how different the images of one caption are; empty unless every caption was sampled several times.

    Returns:
        `pairwise_distance`, the mean of 1 - cosine over all pairs of images of a caption, by CLIP's embeddings;
        `place_entropy`, the entropy of the places where the objects are, as a share of the log of the number of places, for
        captions that describe a scene and name no place. Both are means over captions, and so are their intervals.
    """
    rows_of: dict[str, list[int]] = {}
    for row, caption in enumerate(sampled.captions):
        rows_of.setdefault(caption, []).append(row)
    if not rows_of or min(map(len, rows_of.values())) < 2:
        return {}
    distances, entropies = [], []
    for rows in rows_of.values():
        embedding, count = sampled.features.image_embedding[rows].double(), len(rows)
        total = embedding.sum(dim=0).square().sum().item()  # over all pairs, each image with itself too
        distances.append(1 - (total - count) / (count * (count - 1)))
        scores = sampled.features.scenes
        if scores is not None and (scores.correct[rows, SCORED.index("place")] < 0).all():
            entropies += _entropies(scores.place[rows])
    found = {"pairwise_distance": distances, "place_entropy": entropies}
    return {
        name: Estimate(float(np.mean(values)), torch.tensor(values, dtype=torch.float64))
        for name, values in found.items()
        if values
    }


def _entropies(places: Tensor) -> list[float]:
    """Entropy of the places of one caption's images, as a share of the largest possible; none if no object was found."""
    counts = torch.bincount(places[places >= 0].long(), minlength=len(scenes.PLACES)).double()
    if not counts.sum():
        return []
    return [float(torch.special.entr(counts / counts.sum()).sum() / math.log(len(scenes.PLACES)))]


METRICS: Mapping[str, Callable[[Sampled], dict[str, Estimate]]] = {
    "clip_score": clip_score,
    "scene_accuracy": scene_accuracy,
    "clip_r_precision": clip_r_precision,
    "clip_frechet_distance": clip_frechet_distance,
    "clip_kid": clip_kernel_distance,
    "cmmd": cmmd,
    "clip_manifold": clip_manifold,
    "frechet_inception_distance": frechet_inception_distance,
    "kernel_inception_distance": kernel_inception_distance,
    "sampled_embeddings": sampled_embeddings,
    "reconstruction": reconstruction,
    "scene_binding": scene_binding,
    "caption_diversity": caption_diversity,
}
"""Metrics of an evaluation; a new one needs a function and an entry. Each returns named estimates, or none if not applicable."""


def measure(sampled: Sampled) -> dict[str, Estimate]:
    """Compute all metrics."""
    return {name: estimate for metric in METRICS.values() for name, estimate in metric(sampled).items()}


def values_of(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """Return the values of estimates by name."""
    return {name: estimate.value for name, estimate in estimates.items()}
