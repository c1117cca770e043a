"""Parti: a Transformer that translates a caption into the tokens of an image; CLIP chooses among its images.

Source: Yu et al. 2022, "Scaling Autoregressive Models for Content-Rich Text-to-Image Generation".
"""

import dataclasses
from typing import Any

from unclip.config import operational
from unclip.models.autoencoder import AutoencoderConfig
from unclip.models.parti import Parti, PartiConfig
from unclip.models.patch_transformer import PatchTransformerConfig
from unclip.models.token_transformer import TokenSampling
from unclip.systems.autoencoder import AutoencoderStageConfig
from unclip.systems.autoencoder.part import AdversarialConfig
from unclip.systems.autoencoder.sizes import DEMO_VQ
from unclip.systems.tokens import DEMO_TRAINER, PREVIEW, TokenStackSampling, sections, token_part, token_system
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


SYSTEM = token_system(PARTI, PartiSampling)


VIT_VQGAN = AutoencoderStageConfig(
    model=AutoencoderConfig(
        latent_channels=32, bottleneck="vq", codebook_size=8192, transformer=PatchTransformerConfig()
    ),
    discriminator=AdversarialConfig(weight=0.1),
    trainer=TrainerConfig(
        num_samples=500_000 * 256,
        batch_size=256,
        learning_rate=1e-4,
        warmup_samples=50_000 * 256,
        weight_decay=1e-4,
        beta2=0.99,
    ),
)
"""256 pixels as 32 x 32 tokens: ViT-VQGAN-Small, whose tokens Parti reads. Source: Yu et al. 2022 (ViT-VQGAN), section 5."""


def _paper(width: int, num_heads: int, encoder_depth: int, depth: int) -> dict[str, Any]:
    """Sections of a size of Yu et al. 2022, Table 1, trained as in section 3: 450,000 steps of 8,192 images.

    The paper uses Adafactor, and lowers the learning rate exponentially.
    """
    return sections(
        "parti",
        VIT_VQGAN,
        PartiStageConfig(
            PartiConfig(width, depth, num_heads, dropout=0.1, encoder_depth=encoder_depth),
            TrainerConfig(
                num_samples=450_000 * 8192,
                batch_size=8192,
                learning_rate=4.5e-5,
                warmup_samples=5000 * 8192,
                weight_decay=0.045,
                beta2=0.96,
            ),
        ),
        PartiSampling(batch_size=1, precision="auto", parti=TokenSampling(guidance_scale=1.5, num_candidates=16)),
        ("unclip-dalle2", None),
    )


MODEL_SIZES: dict[str, dict[str, Any]] = {
    # 64 pixels as 8 x 8 tokens of a convolutional autoencoder; minutes on two CPUs
    "demo": sections(
        "parti",
        DEMO_VQ,
        PartiStageConfig(
            PartiConfig(width=192, depth=4, num_heads=3, text_vocab_size=128, dropout=0.1, encoder_depth=1),
            dataclasses.replace(DEMO_TRAINER, num_samples=80_000),
        ),
        PartiSampling(batch_size=32, parti=TokenSampling(0.7, top_p=0.9, guidance_scale=1.5, num_candidates=16)),
        ("unclip-demo", None),
        min_reconstruction_accuracy=0.9,
    ),
    "base": _paper(1024, 16, 12, 12),
    "parti_750m": _paper(1024, 16, 12, 36),
    "parti_3b": _paper(2048, 32, 12, 36),
    "parti_20b": _paper(4096, 64, 16, 64),
}
"""Name -> sections of a run file."""
