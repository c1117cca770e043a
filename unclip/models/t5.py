"""T5's encoder, frozen, as a text encoder: transformers' network and its tokenizer, built without files.

Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"; Saharia et al.
2022 (Imagen), section 2.1, which reads captions with it. The package transformers is an optional dependency.

Letters: B batch, L text tokens, W width of the states.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from unclip import foreign
from unclip.config import require
from unclip.errors import ConfigError
from unclip.models.layers import without_autocast
from unclip.models.t5_tokenizer import build_tokenizer, damage_named
from unclip.models.text_states import TextStates, rounded

NEEDS_TRANSFORMERS = (
    "text_encoder.name: got {!r}, a T5 of the package transformers, but it is not installed. Install the extra "
    'unclip[interop] on every node, or take the text encoder of CLIP: text_encoder.name = "clip".'
)


@dataclasses.dataclass(frozen=True)
class T5Settings:
    """Settings of the encoder that a folder's `config.json` may have; others of the file are not read."""

    model_type: Literal["t5"] = "t5"
    vocab_size: foreign.Size = 32128
    d_model: foreign.Size = 512
    d_kv: foreign.Size = 64
    d_ff: foreign.Size = 2048
    num_layers: foreign.Depth = 6
    num_heads: foreign.Size = 8
    relative_attention_num_buckets: foreign.Size = 32
    relative_attention_max_distance: foreign.Size = 128
    layer_norm_epsilon: Annotated[float, foreign.Range(1e-12, 1)] = 1e-6
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"


class T5TextEncoder(nn.Module):
    """T5's encoder and its tokenizer; stays in evaluation mode. The tokenizer's file is a buffer, so that it is saved with the
    weights."""

    tokenizer_file: Tensor

    def __init__(self, settings: T5Settings, num_tokenizer_bytes: int, max_length: int) -> None:
        """Args:
            num_tokenizer_bytes: size of the tokenizer's file, which is loaded with the weights.
            max_length: tokens of the longest caption; longer ones are truncated.

        Raises:
            ConfigError: transformers is not installed.
        """
        super().__init__()
        try:
            from transformers import T5Config
            from transformers.models.t5.modeling_t5 import T5Stack
        except ImportError as error:
            raise ConfigError(NEEDS_TRANSFORMERS.format("T5")) from error
        require(max_length >= 2, "max_length", max_length, "at least 2")
        most = foreign.MAX_TEXT_BYTES
        require(num_tokenizer_bytes <= most, "num_tokenizer_bytes", num_tokenizer_bytes, f"at most {most:,}")
        self.settings, self.max_length = settings, max_length
        values = {name: value for name, value in dataclasses.asdict(settings).items() if name != "model_type"}
        self.encoder = T5Stack(T5Config(**values, dropout_rate=0.0, is_encoder_decoder=False, use_cache=False))
        self.register_buffer("tokenizer_file", torch.zeros(num_tokenizer_bytes, dtype=torch.uint8))
        self._tokenizer: Any = None
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "T5TextEncoder":
        """Stay in evaluation mode, even if a parent module switches to training mode."""
        return super().train(False)

    @property
    def text_width(self) -> int:
        return self.settings.d_model

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the file, with the longest length set.

        Raises:
            CheckpointError: as for `build_tokenizer`.
        """
        if self._tokenizer is None:
            content = self.tokenizer_file.cpu().numpy().tobytes()
            self._tokenizer = build_tokenizer(content, self.settings.vocab_size)
            self._tokenizer.enable_truncation(self.max_length)
        return self._tokenizer

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextStates:
        """States of captions; see `text_states.TextEncoder`.

        Raises:
            CheckpointError: the tokenizer's file is damaged.
        """
        device = self.tokenizer_file.device
        tokenizer = self.tokenizer
        with damage_named():
            ids = [each.ids for each in tokenizer.encode_batch(list(captions))]
        length = torch.tensor([len(each) for each in ids])  # [B]
        tokens = torch.zeros(len(ids), int(length.max()), dtype=torch.int64)  # [B, L]
        for row, each in zip(tokens, ids, strict=True):
            row[: len(each)] = torch.tensor(each)
        mask = torch.arange(tokens.shape[1]) < length[:, None]  # [B, L]
        with without_autocast(device):
            found = self.encoder(input_ids=tokens.to(device), attention_mask=mask.long().to(device))
        states = found.last_hidden_state.masked_fill(~mask.to(device)[:, :, None], 0)  # [B, L, W]
        return TextStates(rounded(states), length.to(device))
