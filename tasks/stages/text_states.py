"""Stage `text_states`: states of a frozen text encoder for the captions of all kept rows, without padding.

The table grows with the dataset: a refresh encodes only captions of new rows, as `tasks.derived` describes.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from tasks.derived import Derivation, derive
from tasks.stage import Artifact, Output, StageContext, stage
from unclip.config import fingerprint, require
from unclip.models.text_states import to_bytes
from unclip.systems.system import ClipFiles
from unclip.systems.text_encoder import load_encoder

SCHEMA = pa.schema({"key": pa.string(), "states": pa.binary(), "length": pa.int32()})
"""One row for each kept row. `length` is the number of tokens of its caption. `states` are the states of these tokens alone in
half precision, length x W numbers of 2 bytes, little-endian, token by token."""


@dataclasses.dataclass(frozen=True)
class TextStatesConfig:
    batch_size: int = 64
    """Captions that are encoded together."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")


@stage("text_states", version=1, has_workers=True)
def text_states(context: StageContext, config: TextStatesConfig, dataset: Artifact, encoder: Artifact) -> Output:
    """Encode the captions of the kept rows that have no states by this text encoder yet.

    Args:
        encoder: artifact of a CLIP, or of a saved T5.
    """
    is_clip = "model" in encoder.facts
    clip = ClipFiles(encoder.facts["model"], encoder.facts["pretrained"]) if is_clip else None
    load = functools.partial(_load, None if is_clip else encoder.uri, clip)
    derivation = Derivation("text_states", SCHEMA, ("caption",), load, (encoder.digest,), config.batch_size)
    table, num_made = derive(context, dataset, derivation)
    facts = {**dataclasses.asdict(table), "derived_now": num_made}
    return Output(table.derived, fingerprint(dataset.digest, derivation.id), facts)


def _load(folder: str | None, clip: ClipFiles | None, device: torch.device) -> "StatesEncoder":
    encoder = load_encoder(folder, clip)
    assert isinstance(encoder, nn.Module)
    encoder.to(device)
    return StatesEncoder(encoder)


class StatesEncoder:
    """Text encoder that makes the rows of the table; equal captions of a batch are encoded once."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def encode(self, rows: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        captions = list(dict.fromkeys(rows["caption"]))
        states = self.encoder.encode(captions)
        encoded = dict(zip(captions, zip(to_bytes(states), states.length.tolist(), strict=True), strict=True))
        found = [encoded[caption] for caption in rows["caption"]]
        return {"states": [each for each, _ in found], "length": [length for _, length in found]}
