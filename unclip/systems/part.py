"""A part: one trained network of a system, described once, where it is defined.

Everything that the trainer, the memory plan, the loader, evaluation, takedown and the command line ask of a trained network
is a field of its `Part`. A new network is a new `Part`; nothing else knows it by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import nn

from unclip.data import Batch
from unclip.models.clip import Clip
from unclip.models.embeddings import EmbeddingStatistics, PrincipalComponents
from unclip.models.text import TextShape
from unclip.training.memory import Network
from unclip.training.objective import Objective
from unclip.training.parallel import Workers
from unclip.training.settings import TrainerConfig


class Section(Protocol):
    """Settings of a part: a frozen dataclass with its network's settings and these."""

    @property
    def trainer(self) -> TrainerConfig:
        """Settings of the training."""


C = TypeVar("C", bound=Section)


class Shapes(NamedTuple):
    """Sizes that networks take from the frozen CLIP."""

    embedding_dim: int
    """E, width of the embeddings."""
    text: TextShape
    """Shape of the text encoder's states, and its vocabulary."""


class TrainingInputs(Protocol):
    """Inputs of an objective, read in the worker that asks for them."""

    workers: Workers

    def clip(self) -> Clip:
        """Frozen CLIP that embedded the rows; for parts that need "clip"."""

    def model(self, stage: str) -> str:
        """URI of the model folder that another stage trained; for parts that need this stage."""

    def statistics(self) -> EmbeddingStatistics:
        """Mean and standard deviation of the training rows' image embeddings."""

    def principal_components(self) -> PrincipalComponents:
        """Principal components of the training rows' image embeddings."""

    def first_rows(self, table: str, columns: tuple[str, ...], count: int) -> Batch:
        """First training rows, `count` of them or all there are: the same in every worker."""

    def preview_rows(self) -> Batch:
        """A few rows to watch the training on, held-out ones where there are any, with all columns that the part reads."""


@dataclasses.dataclass(frozen=True)
class Part(Generic[C]):
    """Description of a trained network."""

    name: str
    """Name of its stage and of its section of the settings; `facts["kind"]` of its saved models."""
    help: str
    """What it learns, in one line."""
    config: type[C]
    """Class of its section of the settings."""
    build: Callable[[Mapping[str, Any]], nn.Module]
    """Builds the network, without weights, from the facts that its objective saved with them."""
    objective: Callable[[C, TrainingInputs], Objective]
    """Makes the network and its loss."""
    reads: Callable[[C], Mapping[str, tuple[str, ...]]]
    """Columns that it is trained on, by table: images, embeddings."""
    network: Callable[[C, Shapes], Network]
    """The network and example inputs of `forward`, for the memory plan; built on fake tensors."""
    needs: tuple[str, ...] = ("clip",)
    """Stages, besides the dataset's, whose results it is trained with."""
    shows_rows: bool = False
    """Its previews show rows of the dataset, so that a takedown must find them."""
    kinds: tuple[str, ...] = ()
    """Values of `facts["kind"]` that `build` knows, where they are others than the name."""

    @property
    def saved_kinds(self) -> tuple[str, ...]:
        return self.kinds or (self.name,)
