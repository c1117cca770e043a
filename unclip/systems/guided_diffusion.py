"""Guided diffusion (ADM): a class-conditional denoiser, and a classifier of noised images that guides it to the class.

Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis".
"""

from collections.abc import Sequence
from typing import Any

from unclip.config import to_dict
from unclip.models.classifier import ClassifierConfig
from unclip.models.image_denoiser import ImageDenoiserConfig, ImageDenoiserSampling
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerSampling
from unclip.systems.classifier import ClassifierStageConfig
from unclip.systems.denoiser import DenoiserStageConfig
from unclip.systems.image_stack import PARTS, SHORTCUTS, ImageStack, ImageStackSampling
from unclip.systems.system import SystemSpec
from unclip.systems.unclip.sizes import DEMO_GENERATOR_DIFFUSION
from unclip.systems.unclip.sizes import MODEL_SIZES as UNCLIP_SIZES
from unclip.systems.upsampler import UpsamplerStageConfig, section_of
from unclip.training.settings import TrainerConfig

SYSTEM = SystemSpec(
    "guided_diffusion",
    PARTS,
    ImageStackSampling,
    ImageStack.load,
    {**SHORTCUTS, "guidance_scale": "denoiser.guidance_scale", "classifier_scale": "denoiser.classifier_scale"},
)


def sections(
    denoiser: DenoiserStageConfig,
    upsamplers: Sequence[UpsamplerStageConfig],
    sampling: ImageStackSampling,
    clip: tuple[str, str | None],
    **others: Any,
) -> dict[str, Any]:
    """Sections of a run file for a model size, without what the pipeline fills in: classes and resolutions.

    Args:
        clip: CLIP that measures the samples, as a model and its weights; None trains it on the pairs.
        others: further sections.
    """
    parts = {"denoiser": to_dict(denoiser), **{name: to_dict(each) for name, each in others.items()}}
    chain = {str(each.model.output_size): section_of(each) for each in upsamplers}
    for section in (*parts.values(), *chain.values()):
        section.pop("classes", None)
    if "classifier" in parts:
        del parts["classifier"]["model"]["diffusion"]
    return {
        **parts,
        "upsamplers": chain,
        "clip": {"model": clip[0], "pretrained": clip[1]},
        "evaluate": {"sampling": to_dict(sampling)},
    }


def training(num_steps: int, batch_size: int, learning_rate: float, **settings: Any) -> TrainerConfig:
    """Training settings in the terms of the paper's tables: iterations, batch size and a constant learning rate."""
    return TrainerConfig(num_steps * batch_size, batch_size, 0, learning_rate, decay="none", **settings)


def demo_training(num_samples: int, batch_size: int, learning_rate: float, **settings: Any) -> TrainerConfig:
    return TrainerConfig(
        num_samples, batch_size, 0, learning_rate, 2_000, beta2=0.95, checkpoint_samples=15_000, **settings
    )


DEMO_UNET = UNCLIP_SIZES["demo"].decoder.model.unet
DEMO_DENOISER = DenoiserStageConfig(
    model=ImageDenoiserConfig(DEMO_UNET, diffusion=DEMO_GENERATOR_DIFFUSION),
    trainer=demo_training(60_000, 16, 1.5e-3, ema_decay=0.99, weight_decay=0.01),
    measures_bits_per_dim=True,
)
ADM_64 = UNetConfig(64, 192, (1, 2, 3, 4), 3, attention_resolutions=(32, 16, 8), dropout=0.1)
CLASSIFIER_64 = UNetConfig(64, 128, (1, 2, 3, 4), 4, attention_resolutions=(32, 16, 8))

MODEL_SIZES: dict[str, dict[str, Any]] = {
    # 16 and 64 pixels; minutes on two CPUs
    "demo": sections(
        DEMO_DENOISER,
        UNCLIP_SIZES["demo"].upsamplers,
        ImageStackSampling(
            # both kinds of guidance, as each alone is weak after so short a training
            denoiser=ImageDenoiserSampling(guidance_scale=2.0, classifier_scale=1.0),
            upsamplers={"64": UpsamplerSampling(num_steps=4)},
        ),
        ("unclip-demo", None),
        classifier=ClassifierStageConfig(
            model=ClassifierConfig(DEMO_UNET),
            trainer=demo_training(60_000, 32, 2e-3, ema_decay=0.999, weight_decay=0.05),
        ),
    )
    | {"classes": {"source": "scenes"}},
    # 64 and 256 pixels; days on one GPU
    "small": sections(
        DenoiserStageConfig(
            model=ImageDenoiserConfig(UNetConfig(64, 128, (1, 2, 3, 4), 2, attention_resolutions=(32, 16, 8))),
            trainer=training(300_000, 256, 1e-4),
        ),
        UNCLIP_SIZES["small"].upsamplers,
        ImageStackSampling(denoiser=ImageDenoiserSampling(classifier_scale=1.0)),
        ("ViT-B-32", "openai"),
        classifier=ClassifierStageConfig(
            model=ClassifierConfig(UNetConfig(64, 128, (1, 2, 3, 4), 2, attention_resolutions=(32, 16, 8))),
            trainer=training(100_000, 256, 3e-4, weight_decay=0.05),
        ),
    ),
    # the paper's model of 64 pixels (Table 11) and its classifier (Table 12), with unCLIP's upsamplers
    "base": sections(
        DenoiserStageConfig(
            model=ImageDenoiserConfig(ADM_64, class_drop_prob=0.0),
            trainer=training(540_000, 2048, 3e-4),
        ),
        UNCLIP_SIZES["base"].upsamplers,
        ImageStackSampling(denoiser=ImageDenoiserSampling(classifier_scale=1.0)),
        ("ViT-L-14", "openai"),
        classifier=ClassifierStageConfig(
            model=ClassifierConfig(CLASSIFIER_64), trainer=training(300_000, 1024, 6e-4, weight_decay=0.2)
        ),
    ),
}
"""Name -> sections of a run file."""
