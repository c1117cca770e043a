"""DALL·E: one Transformer over the tokens of a caption and of its image; CLIP chooses among its images.

Source: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation".
"""

import dataclasses

from unclip.config import operational
from unclip.models.dalle import Dalle, DalleConfig
from unclip.models.token_transformer import TokenSampling
from unclip.systems.system import StackFiles, sampling_of
from unclip.systems.tokens import PREVIEW, TokenStack, TokenStackSampling, load_parts, token_part, token_system
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class DalleStageConfig:
    model: DalleConfig = DalleConfig()
    """The network."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""
    preview: TokenSampling = operational(PREVIEW)
    """Sampling settings of the previews."""


@dataclasses.dataclass(frozen=True)
class DalleSampling(TokenStackSampling):
    dalle: TokenSampling = TokenSampling()
    """Settings of the Transformer."""


DALLE = token_part(
    "dalle",
    "Train DALL·E's Transformer: from captions to the tokens of images.",
    DalleStageConfig,
    DalleConfig,
    Dalle,
)


def load(files: StackFiles) -> TokenStack:
    """Load it from the files of a stack.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit each other.
    """
    return TokenStack("dalle", *load_parts(files, DALLE), sampling_of(files, DalleSampling))


SYSTEM = token_system("dalle", DALLE, DalleSampling, load)
