"""Autoencoders whose codes the model sizes of `dalle` and `parti` read, with their training."""

from unclip.models.autoencoder import AutoencoderConfig
from unclip.models.patch_transformer import PatchTransformerConfig
from unclip.systems.autoencoder import AutoencoderStageConfig
from unclip.systems.autoencoder.part import AdversarialConfig, LatentsConfig, PerceptualConfig
from unclip.training.settings import TrainerConfig

DEMO_VQ = AutoencoderStageConfig(
    model=AutoencoderConfig(
        image_size=64,
        patch_size=4,
        channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        middle_attention=False,
        norm_groups=8,
        latent_channels=16,
        bottleneck="vq",
        codebook_size=256,
    ),
    perceptual=PerceptualConfig(weight=0.0),
    trainer=TrainerConfig(
        num_samples=32_000,
        batch_size=16,
        learning_rate=2e-3,
        warmup_samples=500,
        beta2=0.95,
        ema_decay=0.99,
        checkpoint_samples=16_000,
    ),
)
"""64 pixels as 8 x 8 tokens, for procedural images; minutes on one CPU."""

VQGAN = AutoencoderStageConfig(
    model=AutoencoderConfig(
        channels=128,
        channel_mult=(1, 1, 2, 2, 4),
        attention_resolutions=(16,),
        latent_channels=256,
        bottleneck="vq",
        codebook_size=16_384,
    ),
    discriminator=AdversarialConfig(weight=0.75, start_samples=250_000 * 12),
    trainer=TrainerConfig(
        num_samples=12_000_000, batch_size=12, learning_rate=5.4e-5, decay="none", beta1=0.5, beta2=0.9
    ),
)
"""256 pixels as 16 x 16 tokens, as published for ImageNet. Source: Esser et al. 2021."""

DVAE = AutoencoderStageConfig(
    model=AutoencoderConfig(
        channels=128, channel_mult=(1, 2, 4, 4), latent_channels=128, bottleneck="gumbel", codebook_size=8192
    ),
    perceptual=PerceptualConfig(weight=0.0),
    latents=LatentsConfig(kl_weight=6.6, kl_warmup_samples=5000 * 512, temperature_samples=150_000 * 512),
    trainer=TrainerConfig(
        num_samples=3_000_000 * 512, batch_size=512, learning_rate=1e-4, weight_decay=1e-4, ema_decay=0.999
    ),
)
"""256 pixels as 32 x 32 tokens, with this library's residual blocks. Source: Ramesh et al. 2021, appendix A.2."""

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
"""256 pixels as 32 x 32 tokens: ViT-VQGAN-Small, as Parti has it. Source: Yu et al. 2022 (ViT-VQGAN), section 5."""
