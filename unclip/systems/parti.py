"""Parti: a Transformer that translates a caption into the tokens of an image; CLIP chooses among its images.

Source: Yu et al. 2022, "Scaling Autoregressive Models for Content-Rich Text-to-Image Generation".
"""

import dataclasses

from unclip.config import operational
from unclip.models.parti import Parti, PartiConfig
from unclip.models.token_transformer import TokenSampling
from unclip.systems.system import StackFiles, sampling_of
from unclip.systems.tokens import PREVIEW, TokenStack, TokenStackSampling, load_parts, token_part, token_system
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class PartiStageConfig:
    model: PartiConfig = PartiConfig()
    """The network."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""
    preview: TokenSampling = operational(PREVIEW)
    """Sampling settings of the previews."""


@dataclasses.dataclass(frozen=True)
class PartiSampling(TokenStackSampling):
    parti: TokenSampling = TokenSampling()
    """Settings of the Transformer."""


PARTI = token_part(
    "parti",
    "Train Parti's Transformer: from captions to the tokens of images.",
    PartiStageConfig,
    PartiConfig,
    Parti,
)


def load(files: StackFiles) -> TokenStack:
    """Load it from the files of a stack.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit each other.
    """
    return TokenStack("parti", *load_parts(files, PARTI), sampling_of(files, PartiSampling))


SYSTEM = token_system("parti", PARTI, PartiSampling, load)
