"""How well a stack draws what captions say: read from the pixels of its pictures, and from their embeddings.

Letters: B pictures, N and M embeddings, E their width.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip import imaging
from unclip.errors import ShapeError
from unclip.evaluation import scenes


class Sampled(NamedTuple):
    """Images sampled for captions, and what CLIP makes of both."""

    images: Tensor
    """[N, 3, S, S] in [-1, 1]."""
    captions: Sequence[str]
    """N of them."""
    image_embedding: Tensor
    """[N, E], unit norm."""
    text_embedding: Tensor
    """[N, E], unit norm."""
    reference: Tensor
    """[M, E], image embeddings of held-out images of the dataset; M may be 0."""


ATTRIBUTES = ("colour", "background", "size", "shape")


@dataclasses.dataclass(frozen=True)
class SceneScores:
    """Pictures of scene captions, measured."""

    expected: list[scenes.Scene]
    measured: list[scenes.Scene]

    def accuracy(self) -> dict[str, float]:
        """Share of the pictures that are right, by attribute; place among the captions that name one."""
        right: dict[str, list[bool]] = {}
        for measured, expected in zip(self.measured, self.expected, strict=True):
            for attribute, is_right in scenes.score(measured, expected).items():
                right.setdefault(attribute, []).append(is_right)
        return {attribute: float(np.mean(values)) for attribute, values in right.items()}

    def all_right(self) -> list[bool]:
        """For each picture, whether every attribute of `ATTRIBUTES` is right."""
        pairs = zip(self.measured, self.expected, strict=True)
        return [all(scenes.score(measured, expected)[name] for name in ATTRIBUTES) for measured, expected in pairs]

    def confusion(self, attribute: str, labels: Sequence[str]) -> np.ndarray:
        """Counts [len(labels), len(labels) + 1] of the first object: rows asked for, columns drawn; the last, none of these."""
        counts = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
        for measured, expected in zip(self.measured, self.expected, strict=True):
            row = labels.index(getattr(expected.objects[0], attribute))
            drawn = getattr(measured.objects[0], attribute) if measured.objects else None
            counts[row, labels.index(drawn) if drawn in labels else len(labels)] += 1
        return counts


def score_scenes(images: Tensor, captions: Sequence[str]) -> SceneScores | None:
    """Measure pictures [B, 3, H, W] in [-1, 1] against their captions.

    Returns:
        None when a caption is not a scene's; then nothing exact can be said.
    """
    expected = [scenes.parse_caption(caption) for caption in captions]
    known = [scene for scene in expected if scene is not None]
    if len(known) < len(captions) or not known:
        return None
    measured = [
        scenes.measure(picture, num_objects=len(scene.objects), relation=scene.relation)
        for picture, scene in zip(imaging.to_uint8(images), known, strict=True)
    ]
    return SceneScores(known, measured)


def score_embeddings(drawn: Tensor, true: Tensor, ranks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """How near the embeddings that a model samples for captions are to those of the captions' own pictures.

    Args:
        drawn: [N, E], one for each caption; of any norm.
        true: [N, E], those of the captions' pictures; of any norm.
        ranks: k of recall.

    Returns:
        `cosine`, the mean over pairs; `gap`, by how much that is above the mean over all others; `recall_at_<k>`, the
        share of the drawn embeddings that no more than k - 1 of the N pictures are nearer to than their own.

    Raises:
        ShapeError: not two like [N, E] of at least 2 rows.
    """
    if drawn.dim() != 2 or drawn.shape != true.shape or len(drawn) < 2:
        raise ShapeError(f"embeddings: got {tuple(drawn.shape)} and {tuple(true.shape)}, expected two like [N, E].")
    cosines = F.normalize(drawn.double(), dim=1) @ F.normalize(true.double(), dim=1).T  # [N, N]
    own, count = cosines.diag(), len(cosines)
    others = (cosines.sum() - own.sum()) / (count * (count - 1))
    nearer = (cosines > own[:, None]).sum(dim=1)  # [N]
    recall = {f"recall_at_{rank}": (nearer < rank).double().mean().item() for rank in ranks}
    return {"cosine": own.mean().item(), "gap": (own.mean() - others).item(), **recall}


def frechet_distance(drawn: Tensor, real: Tensor) -> float:
    """Distance of two sets of embeddings, each taken for a normal distribution with its own mean and covariance.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64. Few embeddings make it larger: compare sets of one size.

    Args:
        drawn: [N, E].
        real: [M, E]; with Inception features of 50,000 pictures it is what the literature calls FID.

    Raises:
        ShapeError: not [N, E] and [M, E] of at least 2 rows each.

    Source: Heusel et al. 2017, eq. 6; Dowson & Landau 1982.
    """
    if drawn.dim() != 2 or real.dim() != 2 or drawn.shape[1] != real.shape[1] or min(len(drawn), len(real)) < 2:
        raise ShapeError(f"embeddings: got {tuple(drawn.shape)} and {tuple(real.shape)}, expected [N, E] and [M, E].")
    means, roots, traces = [], [], []
    for embeddings in (drawn.double(), real.double()):
        means.append(embeddings.mean(dim=0))
        covariance = torch.cov(embeddings.T).reshape(embeddings.shape[1], -1)  # [E, E]
        variances, directions = torch.linalg.eigh(covariance)
        roots.append(directions * variances.clamp(min=0).sqrt())  # [E, E], root root^T = covariance
        traces.append(covariance.trace())
    # The eigenvalues of (C1 C2)^(1/2) are the singular values of root1^T root2: no root of a rounded product is taken.
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    return float((means[0] - means[1]).square().sum() + traces[0] + traces[1] - 2 * cross)


class Placement(NamedTuple):
    """Where what differs from the background lies in pictures, and what the background is: numbers that can move a little."""

    background: np.ndarray
    """[B] mean of red, green and blue, 0 to 255: the median of the border."""
    centre: np.ndarray
    """[B, 2] x and y of its centre of mass, 0 to 1 from the top left; the picture's centre where there is nothing."""
    area: np.ndarray
    """[B] share of the picture."""


def placement(images: Tensor) -> Placement:
    """Measure pictures [B, 3, H, W] in [-1, 1] without naming anything."""
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
    """Rows [B, N] that move from their first value to their last and never back.

    Args:
        slack: how far back a row may go, as a share of its whole way.

    Returns:
        [B] bool; False where the ends are the same.
    """
    way = (values[:, -1] - values[:, 0])[:, None]  # [B, 1]
    forward = values * np.sign(way)
    back = (np.maximum.accumulate(forward, axis=1) - forward).max(axis=1)
    return np.asarray((way[:, 0] != 0) & (back <= slack * np.abs(way[:, 0])))


def clip_score(sampled: Sampled) -> dict[str, float]:
    """Mean cosine of CLIP's embeddings of the images and of their captions. Source: Hessel et al. 2021, without its weight."""
    return {"clip_score": (sampled.image_embedding * sampled.text_embedding).sum(dim=1).mean().item()}


def scene_accuracy(sampled: Sampled) -> dict[str, float]:
    """Share of the images that are right, by attribute, as `accuracy.<attribute>`; nothing where a caption is no scene's."""
    scores = score_scenes(sampled.images, sampled.captions)
    return {} if scores is None else {f"accuracy.{name}": value for name, value in scores.accuracy().items()}


def clip_frechet_distance(sampled: Sampled) -> dict[str, float]:
    """`frechet_distance` of CLIP's embeddings to those of held-out images; nothing without two of each."""
    if min(len(sampled.image_embedding), len(sampled.reference)) < 2:
        return {}
    return {"clip_frechet_distance": frechet_distance(sampled.image_embedding, sampled.reference)}


METRICS: Mapping[str, Callable[[Sampled], dict[str, float]]] = {
    "clip_score": clip_score,
    "scene_accuracy": scene_accuracy,
    "clip_frechet_distance": clip_frechet_distance,
}
"""The metrics of an evaluation: a new one is a function and a row. Each returns named numbers, none where it does not apply."""
