"""DDPM and Improved DDPM: an unconditional denoiser of images.

Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; Nichol & Dhariwal 2021, "Improved Denoising Diffusion
Probabilistic Models". The settings `denoiser.model.diffusion` tell them apart: `schedule`, `variance`, `vlb_only` and
`timestep_sampling`.
"""

from typing import Any

from unclip.diffusion.process import DiffusionConfig
from unclip.models.image_denoiser import ImageDenoiserConfig, ImageDenoiserSampling
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerSampling
from unclip.systems.denoiser import DenoiserStageConfig
from unclip.systems.guided_diffusion import DEMO_UNET, demo_training, sections, training
from unclip.systems.image_stack import PARTS, SHORTCUTS, ImageStack, ImageStackSampling
from unclip.systems.system import SystemSpec
from unclip.systems.unclip.sizes import MODEL_SIZES as UNCLIP_SIZES

SYSTEM = SystemSpec("ddpm", PARTS, ImageStackSampling, ImageStack.load, SHORTCUTS)

DDPM = DiffusionConfig(schedule="linear", variance="fixed_large")
"""Process of Ho et al. 2020, section 4."""
IMPROVED_DDPM = DiffusionConfig(4000, variance="learned_range")
"""Process of Nichol & Dhariwal 2021: L_hybrid, the cosine schedule, 4,000 timesteps."""


def _denoiser(unet: UNetConfig, diffusion: DiffusionConfig) -> ImageDenoiserConfig:
    return ImageDenoiserConfig(unet, class_drop_prob=0.0, diffusion=diffusion)


MODEL_SIZES: dict[str, dict[str, Any]] = {
    # 16 and 64 pixels; minutes on two CPUs
    "demo": sections(
        DenoiserStageConfig(
            model=_denoiser(DEMO_UNET, DiffusionConfig(variance="learned_range")),
            trainer=demo_training(40_000, 32, 2e-3, ema_decay=0.999, weight_decay=0.01),
            measures_bits_per_dim=True,
        ),
        UNCLIP_SIZES["demo"].upsamplers,
        ImageStackSampling(
            denoiser=ImageDenoiserSampling("ddpm", num_steps=50), upsamplers={"64": UpsamplerSampling(num_steps=4)}
        ),
        ("unclip-demo", None),
    ),
    # Ho et al. 2020 for CIFAR-10 (appendix B), with this library's residual blocks; 32 pixels, a day on one GPU
    "small": sections(
        DenoiserStageConfig(
            model=_denoiser(
                UNetConfig(
                    32,
                    128,
                    (1, 2, 2, 2),
                    2,
                    attention_resolutions=(16,),
                    head_channels=256,
                    scale_shift_norm=False,
                    dropout=0.1,
                ),
                DDPM,
            ),
            trainer=training(800_000, 128, 2e-4, warmup_samples=5000 * 128),
            measures_bits_per_dim=True,
        ),
        (),
        ImageStackSampling(denoiser=ImageDenoiserSampling("ddpm", num_steps=1000)),
        ("ViT-B-32", "openai"),
    ),
    # Nichol & Dhariwal 2021 for 64 pixels (appendix A); days on one GPU
    "base": sections(
        DenoiserStageConfig(
            model=_denoiser(
                UNetConfig(64, 128, (1, 2, 3, 4), 3, attention_resolutions=(16, 8), head_channels=32), IMPROVED_DDPM
            ),
            trainer=training(1_500_000, 128, 1e-4),
            measures_bits_per_dim=True,
        ),
        (),
        ImageStackSampling(denoiser=ImageDenoiserSampling("ddpm", num_steps=4000)),
        ("ViT-L-14", "openai"),
    ),
}
"""Name -> sections of a run file."""
