"""A part: one trained network of a system, described once, where it is defined.

`Part` has a field for everything that the trainer, the memory plan, the loader, evaluation, takedown and the command line
need to know of a trained network. A new network is a new `Part`; no other code knows it by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import nn

from unclip.data import Batch
from unclip.models.clip import Clip, shape_of
from unclip.models.embeddings import EmbeddingStatistics, PrincipalComponents
from unclip.models.text import TextShape
from unclip.training.memory import Network
from unclip.training.objective import Objective
from unclip.training.parallel import Workers
from unclip.training.settings import TrainerConfig


class Section(Protocol):
    """Settings of a part: a frozen dataclass with its network's settings and the fields below."""

    @property
    def trainer(self) -> TrainerConfig:
        """Settings of the training."""


C = TypeVar("C", bound=Section)


def _pin_nothing(config: C) -> C:
    return config


class Shapes(NamedTuple):
    """Sizes that the frozen CLIP sets for the networks."""

    embedding_dim: int
    """E, width of the embeddings."""
    text: TextShape
    """Shape of the text encoder's states, and its vocabulary."""
    clip: str | None = None
    """Model of CLIP, by its name in open_clip, for networks whose loss reads its features; None if there are none."""

    @classmethod
    def of(cls, clip: str) -> "Shapes":
        """Sizes of a CLIP by its name in open_clip, from its configuration only.

        Raises:
            ConfigError: the configuration is not on this machine, or it does not give the sizes.
        """
        shape = shape_of(clip)
        return cls(shape.embedding_dim, TextShape.of(shape), clip)


class TrainingInputs(Protocol):
    """Inputs of an objective; the worker that needs them reads them."""

    workers: Workers

    def clip(self) -> Clip:
        """Frozen CLIP that embedded the rows; only for parts that need "clip"."""

    def model(self, stage: str) -> str:
        """URI of another stage's trained model; only for parts that need that stage."""

    def facts(self, stage: str) -> Mapping[str, Any]:
        """Facts of another stage's result, such as statistics of a table that it made; only for parts that need that stage."""

    def statistics(self) -> EmbeddingStatistics:
        """Mean and standard deviation of the training rows' image embeddings."""

    def principal_components(self) -> PrincipalComponents:
        """Principal components of the training rows' image embeddings."""

    def sample_rows(self, table: str, columns: tuple[str, ...], count: int) -> Batch:
        """At most `count` training rows, evenly spaced over the table; the same in every worker."""

    def preview_rows(self) -> Batch:
        """A few rows for previews, held out if possible, with all columns that the part reads."""


@dataclasses.dataclass(frozen=True)
class Part(Generic[C]):
    """Description of a trained network."""

    name: str
    """Name of its stage and of its section in the settings; `facts["kind"]` of its saved models."""
    help: str
    """Description in one line, for the command line."""
    config: type[C]
    """Class of its section in the settings."""
    build: Callable[[Mapping[str, Any]], nn.Module]
    """Builds the network, without weights, from the facts that its objective saved with the weights. Loading builds it on the
    meta device first, to compare it with the weights, so it must read no value of a tensor."""
    objective: Callable[[C, TrainingInputs], Objective]
    """Builds the network and its loss."""
    reads: Callable[[C], Mapping[str, tuple[str, ...]]]
    """Table -> the columns it is trained on. Tables are "images", "embeddings", and those of stages in `needs` that make one,
    by the name of the stage."""
    network: Callable[[C, Shapes], Network]
    """The network and example inputs of its `forward`, for the memory plan; built on fake tensors."""
    needs: tuple[str, ...] = ("clip",)
    """Stages whose results the training uses, besides the dataset's stages."""
    pin: Callable[[C], C] = _pin_nothing
    """Checks the files that the settings name, before a run starts, and returns the settings with absolute paths and digests, so
    that another file causes a new training."""
    shows_rows: bool = False
    """True if its previews show rows of the dataset, so that a takedown must find them."""
    version: int = 0
    """Number of changes of its code that made another network of the same settings; part of the version of its stage."""
    kinds: tuple[str, ...] = ()
    """Values of `facts["kind"]` that `build` accepts; empty for the name alone."""

    @property
    def saved_kinds(self) -> tuple[str, ...]:
        return self.kinds or (self.name,)
