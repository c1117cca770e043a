"""DALL·E: one Transformer over the tokens of a caption and of its image; CLIP chooses among its images.

Source: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation".
"""

import dataclasses
from typing import Any

from unclip.config import operational
from unclip.models.dalle import Dalle, DalleConfig
from unclip.models.token_transformer import TokenSampling
from unclip.systems.autoencoder.sizes import DEMO_VQ
from unclip.systems.autoencoder.sizes import MODEL_SIZES as AUTOENCODERS
from unclip.systems.tokens import DEMO_TRAINER, PREVIEW, TokenStackSampling, sections, token_part, token_system
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


SYSTEM = token_system(DALLE, DalleSampling)

MODEL_SIZES: dict[str, dict[str, Any]] = {
    # 64 pixels as 8 x 8 tokens; minutes on two CPUs
    "demo": sections(
        "dalle",
        DEMO_VQ,
        DalleStageConfig(
            DalleConfig(width=192, depth=4, num_heads=3, text_vocab_size=128, dropout=0.1, cond_drop_prob=0.1),
            DEMO_TRAINER,
        ),
        DalleSampling(batch_size=32, dalle=TokenSampling(0.8, top_p=0.9, guidance_scale=1.5)),
        ("unclip-demo", None),
        min_reconstruction_accuracy=0.9,
    ),
    # 256 pixels as 16 x 16 tokens of a VQGAN; days on one GPU
    "base": sections(
        "dalle",
        AUTOENCODERS["vqgan_16384"].stage,
        DalleStageConfig(
            DalleConfig(width=1024, depth=24, num_heads=16, dropout=0.1, cond_drop_prob=0.1),
            TrainerConfig(
                num_samples=204_800_000,
                batch_size=1024,
                learning_rate=3e-4,
                warmup_samples=5000 * 1024,
                weight_decay=0.045,
                beta2=0.96,
                ema_decay=0.999,
            ),
        ),
        DalleSampling(batch_size=16),
        ("ViT-L-14", "openai"),
    ),
    # Ramesh et al. 2021: 256 pixels as 32 x 32 tokens; section 2.2 and appendix B.2. The paper halves its learning rate five
    # times at plateaus. Its figures have 512 candidates, whose keys and values are 0.7 TB at once
    "dalle": sections(
        "dalle",
        AUTOENCODERS["dalle"].stage,
        DalleStageConfig(
            DalleConfig(width=3968, depth=64, num_heads=62),
            TrainerConfig(
                num_samples=430_000 * 1024,
                batch_size=1024,
                learning_rate=4.5e-4,
                warmup_samples=5000 * 1024,
                weight_decay=0.045,
                beta2=0.96,
                clip_norm=4.0,
                ema_decay=0.999,
            ),
        ),
        DalleSampling(batch_size=1, precision="auto"),
        ("unclip-dalle2", None),
    ),
}
"""Name -> sections of a run file."""
