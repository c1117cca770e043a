"""Cascaded diffusion models (CDM): a class-conditional denoiser, and upsamplers that read the class, too.

The upsamplers are trained on low-resolution images with noise, or with blur at high resolution, and read how strong it is, so
that sampling can choose it.

Source: Ho et al. 2021, "Cascaded Diffusion Models for High Fidelity Image Generation".
"""

import dataclasses
from typing import Any

from unclip.diffusion.process import DiffusionConfig
from unclip.models.degradations import DegradationConfig
from unclip.models.image_denoiser import ImageDenoiserConfig, ImageDenoiserSampling
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerConfig, UpsamplerSampling
from unclip.systems.denoiser import DenoiserStageConfig
from unclip.systems.guided_diffusion import DEMO_DENOISER, sections, training
from unclip.systems.image_stack import PARTS, SHORTCUTS, ImageStack, ImageStackSampling
from unclip.systems.system import SystemSpec
from unclip.systems.unclip.sizes import MODEL_SIZES as UNCLIP_SIZES
from unclip.systems.upsampler import UpsamplerStageConfig

SYSTEM = SystemSpec(
    "cascaded_diffusion",
    PARTS,
    ImageStackSampling,
    ImageStack.load,
    {**SHORTCUTS, "guidance_scale": "denoiser.guidance_scale"},
)

NO_DEGRADATION = DegradationConfig(kind="none")
BLUR = DegradationConfig(blur_prob=0.5, min_blur_sigma=0.4, max_blur_sigma=0.6)
"""Section 4.1: kernel 3, half of the images."""


def _demo_upsampler() -> UpsamplerStageConfig:
    unclips = UNCLIP_SIZES["demo"].upsamplers[0]
    return dataclasses.replace(
        unclips, model=dataclasses.replace(unclips.model, degradation=NO_DEGRADATION, max_noise_level=300)
    )


MODEL_SIZES: dict[str, dict[str, Any]] = {
    # 16 and 64 pixels; minutes on two CPUs. The denoiser is that of guided_diffusion
    "demo": sections(
        DEMO_DENOISER,
        (_demo_upsampler(),),
        ImageStackSampling(upsamplers={"64": UpsamplerSampling(num_steps=4, noise_level=100)}),
        ("unclip-demo", None),
    )
    | {"classes": {"source": "scenes"}},
    # 32, 64 and 256 pixels; days on one GPU
    "small": sections(
        DenoiserStageConfig(
            model=ImageDenoiserConfig(UNetConfig(32, 192, (1, 2, 3), 3, attention_resolutions=(16, 8), dropout=0.1)),
            trainer=training(300_000, 256, 1e-4),
        ),
        (
            UpsamplerStageConfig(
                UpsamplerConfig(
                    UNetConfig(64, 128, (1, 2, 3, 4), 2),
                    low_res_size=32,
                    scale=2,
                    degradation=NO_DEGRADATION,
                    max_noise_level=500,
                    diffusion=DiffusionConfig(),
                ),
                trainer=training(300_000, 256, 1e-4),
            ),
            UpsamplerStageConfig(
                UpsamplerConfig(UNetConfig(64, 96, (1, 2, 3, 4), 2), degradation=BLUR, reads_blur=True),
                trainer=training(300_000, 128, 1e-4),
            ),
        ),
        ImageStackSampling(
            denoiser=ImageDenoiserSampling("ddpm", num_steps=250),
            upsamplers={
                "64": UpsamplerSampling("ddpm", num_steps=100, noise_level=100),
                "256": UpsamplerSampling(num_steps=50),
            },
        ),
        ("ViT-B-32", "openai"),
    ),
}
"""Name -> sections of a run file."""
