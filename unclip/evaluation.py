"""How well a stack draws what captions say, read from the pixels of its pictures."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from unclip import pictures, scenes

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
        for picture, scene in zip(pictures.to_uint8(images), known, strict=True)
    ]
    return SceneScores(known, measured)


class Layout(NamedTuple):
    """Where what differs from the background lies in pictures, and what the background is: numbers that can move a little."""

    background: np.ndarray
    """[B] mean of red, green and blue, 0 to 255: the median of the border."""
    centre: np.ndarray
    """[B, 2] x and y of its centre of mass, 0 to 1 from the top left; the picture's centre where there is nothing."""
    area: np.ndarray
    """[B] share of the picture."""


def layout(images: Tensor) -> Layout:
    """Measure pictures [B, 3, H, W] in [-1, 1] without naming anything."""
    pixels = pictures.to_uint8(images).astype(np.float64)  # [B, H, W, 3]
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
    return Layout(background.mean(axis=1), np.where(total[:, None] > 0, centre, 0.5), total / (height * width))


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
