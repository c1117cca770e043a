"""How well a stack draws what captions say, read from the pixels of its pictures."""

import dataclasses
from collections.abc import Sequence

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
