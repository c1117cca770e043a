"""Classes of captions, for systems that are conditioned on classes.

Letters: B batch, K classes.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from unclip.config import require
from unclip.errors import ConfigError, InputError
from unclip.evaluation import scenes
from unclip.systems.part import TrainingInputs
from unclip.training import parallel

ClassSource = Literal["none", "captions", "scenes", "names"]

SEARCHED_ROWS = 20_000
"""Rows whose captions are searched for classes, evenly spaced over the training rows."""
MAX_FOUND = 2_000
"""Largest number of classes that are found in captions."""
SHOWN = 40
"""Classes that an error lists."""
CHECKED_ROWS = 1_000
"""Rows of which at least one must belong to a class."""


@dataclasses.dataclass(frozen=True)
class ClassesConfig:
    source: ClassSource = "none"
    """Classes: none; every distinct caption, for a list whose captions are labels; the 20 pairs of colour and shape of
    procedural scenes; or those in `names`."""
    names: tuple[str, ...] = ()
    """Names of the classes, with the source "names"."""

    def __post_init__(self) -> None:
        has_names = self.source == "names"
        expected = "at least two names" if has_names else f"no names with the source {self.source!r}"
        require(len(self.names) >= 2 if has_names else not self.names, "names", self.names, expected)

    @property
    def expected_number(self) -> int:
        """Number of classes as far as it is known without the dataset; 1,000 for captions, as in ImageNet."""
        return {"none": 0, "captions": 1000, "scenes": len(SCENE_CLASSES), "names": len(self.names)}[self.source]


SCENE_CLASSES = tuple(f"{colour} {shape}" for shape, colour in itertools.product(scenes.SHAPES, scenes.COLOURS))


class Classes:
    """Classes by number, and the class of a caption: one of this name, otherwise the first whose words all occur in it."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """Raises:
        ConfigError: a class has no word, or two classes have the same words.
        """
        self.names = tuple(names)
        self._by_name: dict[str, int] = {}
        words = [_words(name) for name in self.names]
        for number, found in enumerate(words):
            require(bool(found), "names", self.names[number], "a name with at least one word")
            other = self._by_name.setdefault(" ".join(found), number)
            require(other == number, "names", self.names[number], f"another name than that of {self.names[other]!r}")
        # a class is looked up by its rarest word, so that a caption is compared with few of many classes
        count = collections.Counter(word for found in words for word in set(found))
        self._by_word: dict[str, list[tuple[int, frozenset[str]]]] = {}
        for number, found in enumerate(words):
            rarest = min(found, key=lambda word: count[word])
            self._by_word.setdefault(rarest, []).append((number, frozenset(found)))

    def __len__(self) -> int:
        return len(self.names)

    def find(self, caption: str) -> int | None:
        """Number of a caption's class; None if it has none."""
        found = _words(caption)
        named = self._by_name.get(" ".join(found))
        if named is not None:
            return named
        words = set(found)
        numbers = [number for word in words for number, needed in self._by_word.get(word, ()) if needed <= words]
        return min(numbers, default=None)

    def labels(self, captions: Sequence[str]) -> Tensor:
        """Class of each caption, [B] int64; K, one more than the last, for none."""
        found = (self.find(caption) for caption in captions)
        return torch.tensor([len(self) if number is None else number for number in found], dtype=torch.int64)

    def check(self, captions: Sequence[str]) -> None:
        """Check that captions to sample belong to classes, if there are any classes.

        Raises:
            InputError: a caption does not; names the classes.
        """
        for caption in captions if self.names else ():
            if self.find(caption) is None:
                more = f" and {len(self) - SHOWN} more" if len(self) > SHOWN else ""
                raise InputError(
                    f"caption: got {caption!r}, which belongs to no class of this model, expected all words of one of "
                    f"{', '.join(self.names[:SHOWN])}{more}."
                )


NO_CLASSES = Classes()


class ClassShare:
    """Share of the images of a training that belong to a class, over all ranks."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._counts: dict[bool, Tensor] = {}  # [2]: images with a class, images

    def add(self, training: bool, label: Tensor) -> None:
        """Count labels [B]; those of no class are K."""
        counts = torch.stack([(label < self.num_classes).sum(), label.new_tensor(len(label))]).float()
        self._counts[training] = self._counts[training] + counts if training in self._counts else counts

    def take(self, training: bool) -> dict[str, float]:
        """Return and reset the share since the last call; all ranks must call it in training."""
        if training not in self._counts:
            return {}
        counts = self._counts.pop(training)
        with_class, count = (parallel.all_reduce_sum(counts) if training else counts).tolist()
        return {"share_with_class": with_class / count}


def find_classes(config: ClassesConfig, inputs: TrainingInputs) -> Classes:
    """Find the classes of a dataset; the same in every worker.

    Raises:
        ConfigError: there are too few or too many classes, or none of many captions belongs to one.
    """
    if config.source == "none":
        return NO_CLASSES
    count = SEARCHED_ROWS if config.source == "captions" else CHECKED_ROWS
    captions: list[str] = inputs.sample_rows("embeddings", ("caption",), count)["caption"]
    if config.source == "captions":
        return Classes(_distinct(captions))
    classes = Classes(SCENE_CLASSES if config.source == "scenes" else config.names)
    if captions and all(classes.find(caption) is None for caption in captions):
        raise ConfigError(
            f"classes: got {classes.names[0]!r} and {len(classes) - 1} others, but none of {len(captions):,} captions, such as "
            f"{captions[0]!r}, has the words of one. Set classes.source, or classes.names."
        )
    return classes


def reads_classes(classes: ClassesConfig) -> Mapping[str, tuple[str, ...]]:
    """Columns for images and the classes of their captions."""
    return {"images": ("jpg",)} if classes.source == "none" else {"images": ("jpg",), "embeddings": ("caption",)}


def _distinct(captions: Iterable[str]) -> list[str]:
    """Captions with different words, sorted by them."""
    by_words = {words: caption for caption in sorted(captions, reverse=True) if (words := " ".join(_words(caption)))}
    names = [by_words[words] for words in sorted(by_words)]
    if not 2 <= len(names) <= MAX_FOUND:
        raise ConfigError(
            f"classes.source: got 'captions', but there are {len(names):,} distinct captions, expected 2 to {MAX_FOUND:,}. For "
            "captions that are no labels, set classes.source to 'names' and classes.names to the classes."
        )
    return names


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
