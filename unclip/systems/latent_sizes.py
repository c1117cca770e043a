"""Model sizes by name of the systems that sample latents: the autoencoder, the generator and their training settings.

`demo` has the images and CLIP of unCLIP's size of the same name, so that the systems can be compared. `small` samples 256 pixels
and `base` 512, with autoencoders of a factor of 8 and 4 channels. Autoencoder and generator of `base` have the channels of Stable
Diffusion's; `stable_diffusion` has the networks, the schedule and the text encoder of Stable Diffusion 1 (Rombach et al. 2022,
section 3, appendix E.2.1 and their published settings), so that its stacks can be exported to diffusers. The generators'
optimiser settings are our own.
"""

import dataclasses
from typing import Any

from unclip.config import merge, to_dict
from unclip.diffusion.process import DiffusionConfig
from unclip.models.latent_diffusion import LatentDiffusionConfig, LatentSampling
from unclip.models.text import TextTransformerConfig
from unclip.models.unet import UNetConfig
from unclip.systems.autoencoder import AutoencoderStageConfig
from unclip.systems.autoencoder import sizes as autoencoder_sizes
from unclip.systems.latent_diffusion import LatentDiffusionSampling, LatentDiffusionStageConfig
from unclip.systems.stable_unclip import StableUnclipSampling, StableUnclipStageConfig
from unclip.systems.unclip import sizes as unclip_sizes
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    autoencoder: int
    """Parameters of the autoencoder, without a discriminator."""
    generator: int
    """Parameters of the generator, including its text Transformer if it has one, with the size's CLIP."""


@dataclasses.dataclass(frozen=True)
class LatentSize:
    """Settings of the parts that sample latents, and the CLIP that they use."""

    part: str
    """Name of the generator's part."""
    autoencoder: AutoencoderStageConfig
    generator: LatentDiffusionStageConfig
    sampling: Any
    """Sampling settings, published with the stack."""
    min_reconstruction_accuracy: float | None
    """See `tasks.stages.latents`."""
    clip: str
    """CLIP's architecture."""
    pretrained: str | None
    """Its weights; None trains it on the pairs."""
    num_parameters: ParameterCounts

    def sections(self) -> dict[str, Any]:
        """Settings as sections of a run file, without the sizes that follow from others."""
        generator = to_dict(self.generator)
        del generator["model"]["latent_channels"], generator["model"]["unet"]["image_size"]
        return {
            "autoencoder": to_dict(self.autoencoder),
            self.part: generator,
            "latents": {"min_reconstruction_accuracy": self.min_reconstruction_accuracy},
            "clip": {"model": self.clip, "pretrained": self.pretrained},
            "evaluate": {"sampling": to_dict(self.sampling)},
        }


@dataclasses.dataclass(frozen=True)
class StableUnclipSize(LatentSize):
    """The same with a prior."""

    prior: unclip_sizes.ModelSize

    def sections(self, prior_kind: str = "diffusion") -> dict[str, Any]:
        """Settings as sections of a run file; those of the prior are unCLIP's."""
        prior = {"prior": self.prior.sections(prior_kind)["prior"]}
        return merge(prior, super().sections())


_DEMO_UNET = UNetConfig(16, 32, (1, 2, 4), 1, attention_resolutions=(4,), head_channels=32, norm_groups=8)
_DEMO_TRAINER = TrainerConfig(
    num_samples=60_000,
    batch_size=16,
    learning_rate=1.5e-3,
    beta2=0.95,
    ema_decay=0.99,
    warmup_samples=2_000,
    weight_decay=0.01,
    checkpoint_samples=15_000,
)
_DEMO_ACCURACY = 0.95
"""Least accuracy of reconstructions in the demo; see `tasks.stages.latents`."""


def _training(num_steps: int, batch_size: int, learning_rate: float) -> TrainerConfig:
    return TrainerConfig(
        num_samples=num_steps * batch_size,
        batch_size=batch_size,
        learning_rate=learning_rate,
        decay="none",
        warmup_samples=1000 * batch_size,
    )


def _enlarged(stage: AutoencoderStageConfig, image_size: int) -> AutoencoderStageConfig:
    """The same network and training on larger images."""
    return dataclasses.replace(stage, model=dataclasses.replace(stage.model, image_size=image_size))


_SMALL_UNET = UNetConfig(32, 192, (1, 2, 3), 2, attention_resolutions=(32, 16, 8))
_BASE_UNET = UNetConfig(64, 320, (1, 2, 4, 4), 2, attention_resolutions=(32, 16, 8))
_STABLE_DIFFUSION_UNET = UNetConfig(
    64,
    320,
    (1, 2, 4, 4),
    2,
    attention_resolutions=(64, 32, 16),
    scale_shift_norm=False,
    attention="spatial_transformer",
    num_heads=8,
    resampling="convolution",
)
_SMALL_AUTOENCODER = autoencoder_sizes.MODEL_SIZES["base_kl"]
_BASE_AUTOENCODER = autoencoder_sizes.MODEL_SIZES["stable_diffusion"]

LATENT_DIFFUSION_SIZES: dict[str, LatentSize] = {
    # 64 pixels; minutes on two CPUs
    "demo": LatentSize(
        "latent_diffusion",
        autoencoder_sizes.DEMO_KL,
        LatentDiffusionStageConfig(
            LatentDiffusionConfig(
                _DEMO_UNET,
                context_dim=96,
                text="transformer",
                text_transformer=TextTransformerConfig(width=96, depth=1, num_heads=3),
                text_drop_prob=0.2,
                diffusion=unclip_sizes.DEMO_GENERATOR_DIFFUSION,
            ),
            _DEMO_TRAINER,
            text_learning_rate=0.3,
        ),
        LatentDiffusionSampling(latent_diffusion=LatentSampling(num_steps=15, guidance_scale=3.0)),
        _DEMO_ACCURACY,
        "unclip-demo",
        None,
        ParameterCounts(autoencoder_sizes.MODEL_SIZES["demo_kl"].num_parameters, 8_141_092),
    ),
    # 256 pixels, with ViT-B-32; days on one GPU
    "small": LatentSize(
        "latent_diffusion",
        _SMALL_AUTOENCODER.stage,
        LatentDiffusionStageConfig(
            LatentDiffusionConfig(_SMALL_UNET, context_dim=512), _training(300_000, 256, 1.0e-4)
        ),
        LatentDiffusionSampling(latent_diffusion=LatentSampling()),
        None,
        "ViT-B-32",
        "openai",
        ParameterCounts(_SMALL_AUTOENCODER.num_parameters, 117_919_364),
    ),
    # 512 pixels, with ViT-L-14
    "base": LatentSize(
        "latent_diffusion",
        _enlarged(_BASE_AUTOENCODER.stage, 512),
        LatentDiffusionStageConfig(
            LatentDiffusionConfig(_BASE_UNET, context_dim=768), _training(600_000, 1024, 1.0e-4)
        ),
        LatentDiffusionSampling(latent_diffusion=LatentSampling()),
        None,
        "ViT-L-14",
        "openai",
        ParameterCounts(_BASE_AUTOENCODER.num_parameters, 793_140_612),
    ),
    # 512 pixels, with ViT-L-14: the networks of Stable Diffusion 1
    "stable_diffusion": LatentSize(
        "latent_diffusion",
        _enlarged(_BASE_AUTOENCODER.stage, 512),
        LatentDiffusionStageConfig(
            LatentDiffusionConfig(
                _STABLE_DIFFUSION_UNET, context_dim=768, diffusion=DiffusionConfig(schedule="scaled_linear")
            ),
            _training(600_000, 1024, 1.0e-4),
        ),
        LatentDiffusionSampling(latent_diffusion=LatentSampling(guidance_scale=7.5)),
        None,
        "ViT-L-14",
        "openai",
        ParameterCounts(_BASE_AUTOENCODER.num_parameters, 859_520_964),
    ),
}
"""Name -> size of `latent_diffusion`. `num_parameters` are exact."""


def _stable(
    name: str, model: LatentDiffusionConfig, num_parameters: int, prior: str | None = None, **sampling: Any
) -> StableUnclipSize:
    """Size with the autoencoder, the CLIP and the training of the size of `latent_diffusion` with the same name, and the prior of
    unCLIP's.

    Args:
        prior: size of unCLIP with the same CLIP; None for that of the same name.
    """
    size, unclip = LATENT_DIFFUSION_SIZES[name], unclip_sizes.MODEL_SIZES[prior or name]
    return StableUnclipSize(
        "stable_unclip",
        size.autoencoder,
        StableUnclipStageConfig(model, size.generator.trainer),
        StableUnclipSampling(prior=unclip.sampling.prior, stable_unclip=LatentSampling(**sampling)),
        size.min_reconstruction_accuracy,
        size.clip,
        size.pretrained,
        ParameterCounts(size.num_parameters.autoencoder, num_parameters),
        unclip,
    )


STABLE_UNCLIP_SIZES: dict[str, StableUnclipSize] = {
    "demo": _stable(
        "demo",
        LatentDiffusionConfig(
            _DEMO_UNET,
            context_dim=128,
            text="none",
            reads_image_embedding=True,
            diffusion=DiffusionConfig(prediction_type="v"),
        ),
        3_336_292,
        num_steps=15,
    ),
    "small": _stable(
        "small",
        LatentDiffusionConfig(_SMALL_UNET, context_dim=512, reads_image_embedding=True, max_noise_level=999),
        120_806_276,
    ),
    "base": _stable(
        "base",
        LatentDiffusionConfig(_BASE_UNET, context_dim=768, reads_image_embedding=True, max_noise_level=999),
        799_830_404,
    ),
    # the networks of Stable Diffusion 1, whose generator reads the image embedding as a vector
    "stable_diffusion": _stable(
        "stable_diffusion",
        LatentDiffusionConfig(
            _STABLE_DIFFUSION_UNET,
            context_dim=768,
            reads_image_embedding=True,
            max_noise_level=999,
            diffusion=DiffusionConfig(schedule="scaled_linear"),
        ),
        863_128_004,
        prior="base",
        guidance_scale=7.5,
    ),
}
"""Name -> size of `stable_unclip`. `num_parameters` are exact."""
