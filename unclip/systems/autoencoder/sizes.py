"""Sizes of autoencoders by name, with their training settings; systems name one, or take its network and train it themselves.

The networks of papers have their papers' sizes, and the settings of the papers' training where these give them. DALL-E's has the
codes, the factor and the schedules of Ramesh et al. 2021, appendix A.2, in the layers of the others.
"""

import dataclasses

from unclip.models.autoencoder import AutoencoderConfig
from unclip.systems.autoencoder.part import (
    AdversarialConfig,
    AutoencoderStageConfig,
    LatentsConfig,
    PerceptualConfig,
)
from unclip.training.codebooks import CodebookConfig
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class AutoencoderSize:
    """Settings of the part, and the number of parameters of the network without its discriminator."""

    stage: AutoencoderStageConfig
    num_parameters: int


def _adversarial(
    num_steps: int, batch_size: int, learning_rate: float, first_step: int, weight: float
) -> tuple[AdversarialConfig, TrainerConfig]:
    """Discriminator and training in the terms of the papers: iterations, batch size and a constant learning rate."""
    trainer = TrainerConfig(
        num_steps * batch_size,
        batch_size,
        learning_rate=learning_rate,
        decay="none",
        beta1=0.5,
        beta2=0.9,
        ema_decay=0.999,
    )
    return AdversarialConfig(weight, start_samples=first_step * batch_size), trainer


def _demo(model: AutoencoderConfig, num_samples: int, learning_rate: float, kl_weight: float) -> AutoencoderStageConfig:
    """A few minutes on one CPU; scenes are so simple that pixels alone teach them."""
    return AutoencoderStageConfig(
        model=model,
        perceptual=PerceptualConfig(0.0),
        latents=LatentsConfig(kl_weight),
        trainer=TrainerConfig(
            num_samples,
            batch_size=16,
            learning_rate=learning_rate,
            warmup_samples=500,
            beta2=0.95,
            ema_decay=0.99,
            validation_rows=128,
            checkpoint_samples=8_000,
        ),
    )


DEMO_KL = _demo(
    AutoencoderConfig(64, 4, 64, (1,), 1, (), False, 8, latent_channels=4, bottleneck="kl"), 16_000, 2e-3, 1e-6
)
"""Latents of 16 x 16 x 4 for 64 pixels."""
DEMO_VQ = _demo(
    AutoencoderConfig(64, 4, 64, (1, 2), 1, (), False, 8, latent_channels=16, bottleneck="vq", codebook_size=512),
    32_000,
    2e-3,
    0.0,
)
"""8 x 8 tokens of 512 codes for 64 pixels."""

_STABLE_DIFFUSION = AutoencoderConfig(256, 1, 128, (1, 2, 4, 4), 2, (), True, 32, 4, "kl")
_VQGAN = AutoencoderConfig(256, 1, 128, (1, 1, 2, 2, 4), 2, (16,), True, 32, 256, "vq", codebook_size=1024)
_BASE_TRAINING = _adversarial(200_000, 64, 1e-4, 50_000, 0.5)
_LATENT_DIFFUSION_TRAINING = _adversarial(400_000, 96, 4.5e-5, 50_000, 0.5)
_VQGAN_TRAINING = _adversarial(400_000, 96, 4.5e-5, 50_000, 0.8)


def _size(
    model: AutoencoderConfig, training: tuple[AdversarialConfig, TrainerConfig], num_parameters: int
) -> AutoencoderSize:
    stage = AutoencoderStageConfig(
        model=model,
        codebook=CodebookConfig("loss" if model.bottleneck == "vq" else "ema"),
        discriminator=training[0],
        trainer=training[1],
    )
    return AutoencoderSize(stage, num_parameters)


MODEL_SIZES: dict[str, AutoencoderSize] = {
    # 64 pixels; minutes on one CPU
    "demo_kl": AutoencoderSize(DEMO_KL, 581_524),
    "demo_vq": AutoencoderSize(DEMO_VQ, 2_557_856),
    # 256 pixels; days on one GPU
    "base_kl": _size(dataclasses.replace(_STABLE_DIFFUSION, channels=64), _BASE_TRAINING, 20_945_575),
    "base_vq": _size(
        dataclasses.replace(_VQGAN, channels=64, codebook_size=8192, latent_channels=32), _BASE_TRAINING, 17_779_875
    ),
    # Rombach et al. 2022, Table 8: f = 8, 4 channels; the autoencoder of Stable Diffusion
    "stable_diffusion": _size(_STABLE_DIFFUSION, _LATENT_DIFFUSION_TRAINING, 83_653_863),
    # Esser et al. 2021, Table 7 and section 4: f = 16
    "vqgan_1024": _size(_VQGAN, _VQGAN_TRAINING, 72_141_699),
    "vqgan_16384": _size(dataclasses.replace(_VQGAN, codebook_size=16_384), _VQGAN_TRAINING, 76_073_859),
    # Ramesh et al. 2021, section 2.1 and appendix A.2: f = 8, 8,192 codes, 3 M steps of 512 images
    "dalle": AutoencoderSize(
        AutoencoderStageConfig(
            model=dataclasses.replace(_STABLE_DIFFUSION, latent_channels=128, bottleneck="gumbel"),
            perceptual=PerceptualConfig(0.0),
            latents=LatentsConfig(6.6, kl_warmup_samples=5_000 * 512, temperature_samples=150_000 * 512),
            trainer=TrainerConfig(
                3_000_000 * 512, 512, learning_rate=1e-4, weight_decay=1e-4, ema_decay=0.999, adam_eps=1e-8
            ),
        ),
        86_900_099,
    ),
}
"""Name -> size. `num_parameters` are exact."""
