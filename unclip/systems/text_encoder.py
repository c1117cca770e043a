"""Frozen text encoders for systems: which one there is, the table of its states, and a T5 as a saved model.

A text encoder is that of the run's CLIP, or a T5. The states of the kept rows' captions are in a table, which trainings read;
sampling needs the text encoder itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unclip.config import load, require, to_dict
from unclip.data import Batch
from unclip.errors import CheckpointError
from unclip.models.t5 import T5Settings, T5TextEncoder
from unclip.models.text_states import ClipTextEncoder, TextEncoder, from_bytes
from unclip.systems.part import Shapes
from unclip.systems.system import ClipFiles, load_built
from unclip.training import checkpoints
from unclip.training.objective import Tensors

COLUMNS = ("states", "length")
"""Columns of the table of text states that trainings read."""
TEXT_STAGE = "text_states"
"""Stage that makes it."""
ENCODER_STAGE = "text_encoder"
"""Stage that saves a T5."""


@dataclasses.dataclass(frozen=True)
class TextInput:
    """Sizes of the text encoder's states, for `unclip plan train`; trainings read them from the states themselves."""

    width: int | None = None
    """Width of the states; None for those of CLIP. Filled in from the section `text_encoder` of the run."""
    length: int | None = None
    """Tokens of the longest caption; None for those of CLIP. Filled in likewise."""

    def __post_init__(self) -> None:
        for name in ("width", "length"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or none")

    def sizes(self, shapes: Shapes) -> tuple[int, int]:
        """Length and width of the states."""
        return self.length or shapes.text.length, self.width or shapes.text.width


def text_tensors(batch: Batch) -> Tensors:
    """Text states of rows of the table, padded to the longest: states [B, L, W] and length [B]."""
    return dict(from_bytes(batch["states"], batch["length"])._asdict())


def text_arguments(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Text states in a prepared batch, as arguments of a network."""
    return tensors["states"], tensors["length"]


def save_t5(folder: str, encoder: T5TextEncoder) -> str:
    """Write a frozen T5 as a model; returns its digest."""
    facts = {
        "kind": "t5",
        "imported": True,
        "config": to_dict(encoder.settings),
        "num_tokenizer_bytes": len(encoder.tokenizer_file),
        "max_length": encoder.max_length,
    }
    return checkpoints.save(folder, {"model": encoder.state_dict()}, facts)


def load_t5(folder: str) -> T5TextEncoder:
    """Load a model of `save_t5`.

    Raises:
        CheckpointError: it is damaged, or another model.
        ConfigError: transformers is not installed.
    """
    model = load_built(folder, {"t5": _build})
    assert isinstance(model, T5TextEncoder)
    return model


def load_encoder(folder: str | None, clip: ClipFiles | None) -> TextEncoder:
    """Load a text encoder: a T5, if there is its folder, else that of CLIP.

    Raises:
        CheckpointError: files are missing or damaged, or there is neither.
        ConfigError: transformers is not installed.
    """
    if folder is not None:
        return load_t5(folder)
    if clip is None:
        raise CheckpointError(f"text encoder: got neither a CLIP nor a {ENCODER_STAGE}, expected one of them.")
    return ClipTextEncoder(clip.load())


def _build(facts: Mapping[str, Any]) -> T5TextEncoder:
    return T5TextEncoder(load(T5Settings, facts["config"]), facts["num_tokenizer_bytes"], facts["max_length"])
