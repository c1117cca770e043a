"""Model sizes by name: the networks and training settings of GLIDE's parts.

`demo`, `small` and `base` have the U-Net and the upsamplers of unCLIP's size of the same name, and read captions instead of image
embeddings, so that the systems can be compared; `small` and `base` have the diffusion process and the training of its decoder
too. `glide` has the widths and depths of Nichol et al. 2022, section 4.1: a U-Net of 2.3 B with 512 channels, a text Transformer
of 1.2 B with 24 blocks of width 2,048, and 2.5 M iterations at batch size 2,048. The paper gives no optimiser settings; they are
those of unCLIP's decoder.

The paper's upsampler reads the caption too. Upsamplers here read none, as Ramesh et al. 2022 (section 2.1) found no benefit
of it, and all systems share them.
"""

import dataclasses
from typing import Any

from unclip.config import to_dict
from unclip.diffusion.process import DiffusionConfig
from unclip.models.glide import GlideConfig
from unclip.models.noised_clip import NoisedClipConfig
from unclip.models.small_images import ImageSampling
from unclip.models.text import TextTransformerConfig
from unclip.systems.glide.generator import GlideStageConfig
from unclip.systems.glide.noised_clip import NoisedClipStageConfig
from unclip.systems.glide.stack import GlideSampling
from unclip.systems.unclip import sizes as unclip_sizes
from unclip.systems.upsampler import UpsamplerStageConfig, section_of
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    glide: int
    """Parameters of the generator, including its text Transformer."""
    noised_clip: int
    """Parameters of the image encoder for noised images."""


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Settings of the parts, and the CLIP that they use."""

    glide: GlideStageConfig
    """Generator, from captions to the smallest images."""
    noised_clip: NoisedClipStageConfig
    """Image encoder for noised images, if it is trained."""
    upsamplers: tuple[UpsamplerStageConfig, ...]
    """Upsamplers; each enlarges the images of the one before."""
    clip: str
    """CLIP's architecture."""
    pretrained: str | None
    """Its weights; None trains it on the pairs."""
    num_parameters: ParameterCounts
    """Number of parameters of GLIDE's own parts, with that CLIP."""
    sampling: GlideSampling
    """Sampling settings, published with the stack."""

    def sections(self) -> dict[str, Any]:
        """Settings as sections of a run file, without the sizes that follow from others."""
        noised_clip = to_dict(self.noised_clip)
        for name in ("image_size", "diffusion"):
            del noised_clip["model"][name]
        return {
            "glide": to_dict(self.glide),
            "noised_clip": noised_clip,
            "upsamplers": {str(each.model.output_size): section_of(each) for each in self.upsamplers},
            "clip": {"model": self.clip, "pretrained": self.pretrained},
            "evaluate": {"sampling": to_dict(self.sampling)},
        }


def _size(
    unclip_size: str,
    text: TextTransformerConfig,
    noised_clip: NoisedClipConfig,
    noised_clip_trainer: TrainerConfig,
    num_parameters: ParameterCounts,
    diffusion: DiffusionConfig | None = None,
    text_learning_rate: float = 1.0,
    **training: Any,
) -> ModelSize:
    """Size with the U-Net, the training and the upsamplers of one of unCLIP's.

    Args:
        diffusion: process of the generator; None for that of unCLIP's decoder.
        text_learning_rate: see `GlideStageConfig`.
        training: settings of the generator's training that differ from unCLIP's decoder's.
    """
    size = unclip_sizes.MODEL_SIZES[unclip_size]
    decoder, sampling = size.decoder, size.sampling
    model = GlideConfig(decoder.model.unet, text, diffusion=diffusion or decoder.model.diffusion)
    trainer = dataclasses.replace(decoder.trainer, **training)
    noised_clip = dataclasses.replace(noised_clip, image_size=model.unet.image_size, diffusion=model.diffusion)
    return ModelSize(
        GlideStageConfig(model, trainer, text_learning_rate),
        NoisedClipStageConfig(noised_clip, noised_clip_trainer),
        size.upsamplers,
        size.clip,
        size.pretrained,
        num_parameters,
        GlideSampling(
            upsamplers=sampling.upsamplers,
            glide=ImageSampling(sampling.decoder.sampler, sampling.decoder.num_steps, guidance_scale=3.0),
        ),
    )


MODEL_SIZES: dict[str, ModelSize] = {
    # 16 and 64 pixels; minutes on two CPUs
    "demo": _size(
        "demo",
        TextTransformerConfig(width=96, depth=1, num_heads=3),
        NoisedClipConfig(patch_size=4, width=128, depth=4, num_heads=4),
        TrainerConfig(
            num_samples=48_000,
            batch_size=128,
            learning_rate=1e-3,
            beta2=0.95,
            ema_decay=0.999,
            warmup_samples=3_000,
            weight_decay=0.05,
            checkpoint_samples=20_000,
        ),
        ParameterCounts(8_131_203, 843_265),
        unclip_sizes.DEMO_GENERATOR_DIFFUSION,
        text_learning_rate=0.3,
        num_samples=72_000,
        batch_size=16,
        learning_rate=1.5e-3,
        ema_decay=0.99,
    ),
    # 64 and 256 pixels, with the tokenizer of ViT-B-32; days on one GPU
    "small": _size(
        "small",
        TextTransformerConfig(width=512, depth=12, num_heads=8),
        NoisedClipConfig(patch_size=8, width=384, depth=12, num_heads=6),
        TrainerConfig(num_samples=51_200_000, batch_size=1024, learning_rate=5e-4, weight_decay=0.1),
        ParameterCounts(171_531_398, 21_886_465),
    ),
    # 64, 256 and 1,024 pixels, with the tokenizer of ViT-L-14
    "base": _size(
        "base",
        TextTransformerConfig(width=1024, depth=16, num_heads=16),
        NoisedClipConfig(patch_size=4, width=768, depth=12, num_heads=12),
        TrainerConfig(num_samples=204_800_000, batch_size=4096, learning_rate=5e-4, weight_decay=0.1),
        ParameterCounts(574_509_126, 87_063_553),
    ),
    # Nichol et al. 2022, section 4.1 (generator) and 4.4 (ViT-L at 64 pixels)
    "glide": _size(
        "dalle2",
        TextTransformerConfig(width=2048, depth=24, num_heads=32),
        NoisedClipConfig(patch_size=4, width=1024, depth=24, num_heads=16),
        TrainerConfig(num_samples=819_200_000, batch_size=8192, learning_rate=5e-4, weight_decay=0.1),
        ParameterCounts(3_552_675_334, 305_774_593),
        num_samples=2_500_000 * 2048,
    ),
}
"""Name -> size. `num_parameters` are exact."""
