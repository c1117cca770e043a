"""Jobs, which the app hands to an engine, and what comes back."""

import dataclasses
from collections.abc import AsyncIterator, Collection
from typing import Literal, Protocol

import numpy as np

Kind = Literal["generations", "variations", "edits", "interpolations"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked request for images of one seed."""

    stack: str
    """Local folder of the stack."""
    kind: Kind
    settings: str
    """Sampling settings as JSON, of the class that the stack's system names."""
    num: int
    """Images to sample."""
    seed: int
    caption: str = ""
    negative: str | None = None
    images: tuple[np.ndarray, ...] = ()
    """Given images, [S, S, 3] uint8 at the stack's resolution."""
    known: np.ndarray | None = None
    """[S, S] bool, True = keep; for edits."""
    max_batch: int | None = None
    """Most images that the stack samples at once, as published; None for any number."""

    @property
    def key(self) -> tuple[object, ...]:
        """Jobs with equal keys can be sampled in one batch; variations and interpolations of one job are one already."""
        own = None if self.kind in ("generations", "edits") else id(self)
        return self.stack, self.kind, self.settings, self.negative is None, own


@dataclasses.dataclass(frozen=True)
class Progress:
    """Sampling steps done, of all."""

    step: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Images of a job."""

    pngs: tuple[bytes, ...]
    batch_size: int
    """Images of the batch that they were sampled in."""
    batch_jobs: int
    """Jobs of that batch."""
    seconds: float
    """Sampling time of that batch."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Facts about a loaded stack."""

    image_size: int
    """Resolution of its images, pixels."""
    has_variations: bool
    """True if it can sample variations of images, and interpolations."""
    has_edits: bool
    """True if it can inpaint."""


class Sampler(Protocol):
    """Source of images: an `Engine` in this process, or the replicas of one."""

    def sample(self, job: Job) -> AsyncIterator[Progress | Sampled]:
        """Sample a job; the last event is `Sampled`. A caller that closes the iterator gives up the job.

        Raises:
            InputError, ConfigError: the stack cannot sample it.
        """

    async def load(self, stack: str) -> Loaded:
        """Load a stack beside those that are loaded.

        Raises:
            CheckpointError: files are missing or damaged, or do not fit each other.
        """

    async def keep(self, stacks: Collection[str]) -> None:
        """Unload all stacks but these."""
