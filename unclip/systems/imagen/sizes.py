"""Model sizes by name: the networks and training settings of Imagen's parts.

`demo` and `base` have the U-Net of unCLIP's decoder of the same name as their base network, and read the text encoder of CLIP,
so that the systems can be compared. `imagen` has the networks and the training of Saharia et al. 2022, appendix F and section
3.1, which counts 2 B, 600 M and 400 M parameters; there are 2.18 B, 461 M and 453 M here. By the paper's own words the two
super-resolution networks differ in the self-attention of one level alone, which has 8 M parameters and not 200 M. The base
network is trained with AdamW here, and with Adafactor there.
"""

import dataclasses
from typing import Any

from unclip.config import merge, to_dict
from unclip.diffusion.process import DiffusionConfig
from unclip.models.efficient_unet import Attention, EfficientUNetConfig
from unclip.models.imagen import ImagenConfig, ImagenSampling, TextUpsamplerConfig, TextUpsamplerSampling
from unclip.models.unet import UNetConfig
from unclip.systems.imagen.generator import ImagenStageConfig
from unclip.systems.imagen.stack import ImagenStackSampling
from unclip.systems.imagen.super_resolution import TextUpsamplerStageConfig
from unclip.systems.unclip import sizes as unclip_sizes
from unclip.systems.upsampler import section_of
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Settings of the parts, and the encoders that they use."""

    imagen: ImagenStageConfig
    """Base network, from captions to the smallest images."""
    upsamplers: tuple[TextUpsamplerStageConfig, ...]
    """Upsamplers; each enlarges the images of the one before."""
    clip: str
    """CLIP's architecture; it filters and measures, and reads captions unless there is another text encoder."""
    pretrained: str | None
    """Its weights; None trains it on the pairs."""
    num_parameters: tuple[int, ...]
    """Parameters of the base network and of each upsampler, with that text encoder."""
    sampling: ImagenStackSampling
    """Sampling settings, published with the stack."""
    text_encoder: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Section of the text encoder; empty for CLIP's."""

    def sections(self) -> dict[str, Any]:
        """Settings as sections of a run file, without the sizes that follow from others."""
        sections = {
            "imagen": to_dict(self.imagen),
            "upsamplers": {str(each.model.output_size): section_of(each) for each in self.upsamplers},
        }
        for section in (sections["imagen"], *sections["upsamplers"].values()):
            del section["text"]
        encoders = {"clip": {"model": self.clip, "pretrained": self.pretrained}, "text_encoder": self.text_encoder}
        return merge(sections, {**encoders, "evaluate": {"sampling": to_dict(self.sampling)}})


def _training(num_steps: int, batch_size: int, num_warmup_steps: int = 10_000) -> TrainerConfig:
    """Training with the learning rates of appendix F: linear warm-up to 1e-4, then cosine decay."""
    return TrainerConfig(
        num_samples=num_steps * batch_size, batch_size=batch_size, warmup_samples=num_warmup_steps * batch_size
    )


_DEMO = unclip_sizes.MODEL_SIZES["demo"]
_BASE = unclip_sizes.MODEL_SIZES["base"]
_PAPER_UNET = UNetConfig(64, 512, (1, 2, 3, 4), 3, attention_resolutions=(32, 16, 8), head_channels=64)
_TEXT_ONLY: tuple[Attention, ...] = ("none", "none", "none", "text")
_LINEAR = DiffusionConfig(schedule="linear")
"""Process of the second super-resolution network (appendix F.3)."""

MODEL_SIZES: dict[str, ModelSize] = {
    # 16 and 64 pixels; minutes on two CPUs
    "demo": ModelSize(
        imagen=ImagenStageConfig(
            ImagenConfig(
                _DEMO.decoder.model.unet,
                context_dim=96,
                pooling_heads=4,
                diffusion=unclip_sizes.DEMO_GENERATOR_DIFFUSION,
            ),
            dataclasses.replace(
                _DEMO.decoder.trainer, num_samples=60_000, batch_size=16, learning_rate=1.5e-3, ema_decay=0.99
            ),
        ),
        upsamplers=(
            TextUpsamplerStageConfig(
                TextUpsamplerConfig(
                    EfficientUNetConfig(32, 16, (1, 2), (1, 2), ("none", "text"), num_heads=2, norm_groups=4),
                    low_res_size=16,
                    max_noise_level=300,
                    context_dim=32,
                    pooling_heads=2,
                    diffusion=DiffusionConfig(prediction_type="x0"),
                ),
                _DEMO.upsamplers[0].trainer,
            ),
        ),
        clip=_DEMO.clip,
        pretrained=_DEMO.pretrained,
        num_parameters=(3_302_115, 155_027),
        sampling=ImagenStackSampling(
            imagen=ImagenSampling(num_steps=15, guidance_scale=3.0),
            upsamplers={"64": TextUpsamplerSampling(num_steps=4, noise_level=50)},
        ),
    ),
    # 64, 256 and 1,024 pixels, with the text encoder of ViT-L-14
    "base": ModelSize(
        imagen=ImagenStageConfig(ImagenConfig(_BASE.decoder.model.unet, context_dim=768), _BASE.decoder.trainer),
        upsamplers=(
            TextUpsamplerStageConfig(
                TextUpsamplerConfig(EfficientUNetConfig(256, 96, (1, 2, 4, 8), (2, 4, 6, 6), num_heads=8)),
                _training(600_000, 512),
            ),
            TextUpsamplerStageConfig(
                TextUpsamplerConfig(
                    EfficientUNetConfig(256, 64, (1, 2, 4, 8), (2, 4, 6, 6), _TEXT_ONLY, num_heads=8),
                    low_res_size=256,
                    diffusion=_LINEAR,
                ),
                _training(600_000, 256),
            ),
        ),
        clip=_BASE.clip,
        pretrained=_BASE.pretrained,
        num_parameters=(317_282_307, 198_677_411, 87_489_987),
        sampling=ImagenStackSampling(
            imagen=ImagenSampling("ddpm", num_steps=250, guidance_scale=5.0),
            upsamplers={
                "256": TextUpsamplerSampling(num_steps=50, noise_level=100),
                "1024": TextUpsamplerSampling(num_steps=25, noise_level=100),
            },
        ),
    ),
    # Saharia et al. 2022, appendix F: 64, 256 and 1,024 pixels, with the encoder of a T5-XXL
    "imagen": ModelSize(
        imagen=ImagenStageConfig(ImagenConfig(_PAPER_UNET, context_dim=1024), _training(2_500_000, 2048)),
        upsamplers=(
            TextUpsamplerStageConfig(TextUpsamplerConfig(context_dim=1024), _training(2_500_000, 2048)),
            TextUpsamplerStageConfig(
                TextUpsamplerConfig(
                    EfficientUNetConfig(attention=_TEXT_ONLY), low_res_size=256, context_dim=1024, diffusion=_LINEAR
                ),
                _training(2_500_000, 2048),
            ),
        ),
        clip="ViT-L-14",
        pretrained="openai",
        num_parameters=(2_176_301_059, 461_483_907, 453_087_107),
        sampling=ImagenStackSampling(
            imagen=ImagenSampling("ddpm", num_steps=256, guidance_scale=7.5),
            upsamplers={
                "256": TextUpsamplerSampling("ddpm", num_steps=128, guidance_scale=3.0, noise_level=100),
                "1024": TextUpsamplerSampling("ddpm", num_steps=32, noise_level=100),
            },
        ),
        text_encoder={"name": "hf-hub:google/t5-v1_1-xxl", "width": 4096},
    ),
}
"""Name -> size. `num_parameters` are exact."""
