"""Model sizes by name: the network, training settings and number of parameters of each part of a stack.

`model_size = "base"` in a run file fills the sections of the settings from this table. `unclip plan train` reads the same
settings, so that the plan fits the training.

`dalle2` is Table 3 of Ramesh et al. 2022. Its decoder of 3.5 B parameters is GLIDE's: a U-Net of 2.24 B with 512 channels,
and a text Transformer of 1.31 B, of which 0.1 B embed the tokens. The second upsampler has 282 M parameters, which the paper
rounds to 300 M. The optimiser settings of `small` and `base` are our own, scaled from the paper's.
"""

import dataclasses
from typing import Any

from unclip.config import to_dict
from unclip.diffusion.process import DiffusionConfig
from unclip.models.autoregressive_prior import (
    BASE_AUTOREGRESSIVE_PRIOR,
    DALLE2_AUTOREGRESSIVE_PRIOR,
    SMALL_AUTOREGRESSIVE_PRIOR,
    AutoregressivePriorConfig,
)
from unclip.models.decoder import DecoderConfig
from unclip.models.degradations import DegradationConfig
from unclip.models.prior import BASE_PRIOR, DALLE2_PRIOR, SMALL_PRIOR, PriorConfig
from unclip.models.text import TextTransformerConfig
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerConfig
from unclip.systems.unclip.decoder import DecoderStageConfig
from unclip.systems.unclip.prior import PriorStageConfig
from unclip.systems.unclip.sampling import DecoderSampling, PriorSampling, SamplingConfig, UpsamplerSampling
from unclip.systems.upsampler import UpsamplerStageConfig, section_of
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    prior: int
    """Parameters of the diffusion prior."""
    decoder: int
    """Parameters of the decoder, including its text Transformer if it has one."""
    upsamplers: tuple[int, ...]
    """Parameters of each upsampler, lowest resolution first."""


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Settings of a stack's parts, and the CLIP that they use."""

    prior: PriorStageConfig
    """Both kinds of prior, with the training settings of the diffusion prior."""
    autoregressive_trainer: TrainerConfig
    """Training settings of the autoregressive prior."""
    decoder: DecoderStageConfig
    """Decoder, from embeddings to the smallest images."""
    upsamplers: tuple[UpsamplerStageConfig, ...]
    """Upsamplers; each enlarges the images of the one before."""
    clip: str
    """CLIP's architecture."""
    pretrained: str | None
    """Its weights; None trains it on the pairs."""
    num_parameters: ParameterCounts
    """Number of parameters of each part, with that CLIP."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling settings, published with the stack."""

    def sections(self, prior_kind: str = "diffusion") -> dict[str, Any]:
        """Settings as sections of a run file, without the sizes that follow from the chain of resolutions."""
        prior = self.prior
        if prior_kind == "autoregressive":
            prior = dataclasses.replace(prior, trainer=self.autoregressive_trainer)
        prior_section = to_dict(prior)
        del prior_section["kind"]
        return {
            "prior": prior_section,
            "decoder": to_dict(self.decoder),
            "upsamplers": {str(each.model.output_size): section_of(each) for each in self.upsamplers},
            "clip": {"model": self.clip, "pretrained": self.pretrained},
            "evaluate": {"sampling": to_dict(self.sampling)},
        }


def _unet(
    size: int, channels: int, channel_mult: tuple[int, ...], num_res_blocks: int, dropout: float = 0
) -> UNetConfig:
    return UNetConfig(size, channels, channel_mult, num_res_blocks, dropout=dropout)


def _attentive(unet: UNetConfig) -> UNetConfig:
    return dataclasses.replace(unet, attention_resolutions=(32, 16, 8), head_channels=64)


def _upsampler(unet: UNetConfig, trainer: TrainerConfig, **model: Any) -> UpsamplerStageConfig:
    return UpsamplerStageConfig(UpsamplerConfig(unet, **model), trainer)


def _training(num_steps: int, batch_size: int, learning_rate: float, **settings: Any) -> TrainerConfig:
    """Training settings in the terms of Table 3: iterations, batch size, learning rate, which the paper keeps constant."""
    return TrainerConfig(
        num_samples=num_steps * batch_size,
        batch_size=batch_size,
        learning_rate=learning_rate,
        decay="none",
        warmup_samples=1000 * batch_size,
        **settings,
    )


def _demo_training(num_samples: int, batch_size: int, learning_rate: float, **settings: Any) -> TrainerConfig:
    return TrainerConfig(
        num_samples=num_samples,
        batch_size=batch_size,
        learning_rate=learning_rate,
        beta2=0.95,
        ema_decay=0.999,
        **settings,
    )


DEMO_GENERATOR_DIFFUSION = DiffusionConfig(prediction_type="x0", loss_weighting="min_snr", min_snr_gamma=0.2)
"""Process of the demo's networks that have to find an object in noise, as no image embedding tells them where it is.

Its place and shape show at signal-to-noise ratios of about 0.1 to 1. The loss of v with equal weights is mostly that of less
noisy images; that of x0 is mostly that of the noisiest, whose spread cannot be learned. These weights grow up to a ratio of 0.2.
"""

_LEARNED = DiffusionConfig(variance="learned_range")
_BLUR = DegradationConfig(kind="blur", min_blur_sigma=0.6, max_blur_sigma=0.6)
_BSR = DegradationConfig(kind="bsr")
_DEMO_PRIOR = _demo_training(
    64_000, 128, 1e-3, warmup_samples=3_000, weight_decay=0.01, checkpoint_samples=20_000
)  # with fewer samples, captions without a position give images with several objects

MODEL_SIZES: dict[str, ModelSize] = {
    # 16 and 64 pixels; minutes on two CPUs
    "demo": ModelSize(
        prior=PriorStageConfig(
            model=PriorConfig(width=128, depth=4, num_heads=4),
            # a few thousand rows do not fill the paper's 1,024 buckets
            autoregressive=AutoregressivePriorConfig(width=128, depth=4, num_heads=4, num_buckets=16),
            trainer=_DEMO_PRIOR,
        ),
        autoregressive_trainer=_DEMO_PRIOR,
        decoder=DecoderStageConfig(
            DecoderConfig(
                UNetConfig(16, 32, (1, 2, 4), 1, attention_resolutions=(4,), head_channels=32, norm_groups=8),
                context_dim=128,
                diffusion=DiffusionConfig(prediction_type="v"),
            ),
            _demo_training(30_000, 16, 1.5e-3, warmup_samples=2_000, weight_decay=0.01, checkpoint_samples=15_000),
        ),
        upsamplers=(
            _upsampler(
                UNetConfig(32, 16, (1, 2), 1, norm_groups=4),
                _demo_training(6_000, 32, 3e-3, warmup_samples=1_000, checkpoint_samples=3_000),
                low_res_size=16,
                diffusion=DiffusionConfig(prediction_type="x0"),
            ),
        ),
        clip="unclip-demo",
        pretrained=None,
        num_parameters=ParameterCounts(867_392, 3_335_715, (192_227,)),
        sampling=SamplingConfig(
            prior=PriorSampling(
                num_steps=16, temperature=0.6
            ),  # the autoregressive prior's temperature; after 4,000 rows its probabilities are still flat
            decoder=DecoderSampling(num_steps=15, guidance_scale=3.0),
            upsamplers={"64": UpsamplerSampling(num_steps=4)},
        ),
    ),
    # 64 and 256 pixels, with ViT-B-32; days on one GPU
    "small": ModelSize(
        prior=PriorStageConfig(
            model=SMALL_PRIOR,
            autoregressive=SMALL_AUTOREGRESSIVE_PRIOR,
            trainer=_training(200_000, 512, 1.1e-4, weight_decay=6e-2, beta2=0.96, adam_eps=1e-6),
        ),
        autoregressive_trainer=_training(
            300_000, 512, 1.6e-4, weight_decay=4e-2, beta2=0.91, adam_eps=1e-10, ema_decay=0.999
        ),
        decoder=DecoderStageConfig(
            DecoderConfig(
                _attentive(_unet(64, 128, (1, 2, 3, 4), 2)), context_dim=512, text="clip", diffusion=_LEARNED
            ),
            _training(300_000, 256, 1.2e-4),
        ),
        upsamplers=(_upsampler(_unet(64, 96, (1, 2, 3, 4), 2), _training(300_000, 128, 1.2e-4), degradation=_BLUR),),
        clip="ViT-B-32",
        pretrained="openai",
        num_parameters=ParameterCounts(39_447_552, 109_942_918, (51_250_275,)),
    ),
    # 64, 256 and 1,024 pixels, with ViT-L-14; laid out like published unCLIP decoders, so that it exports to diffusers
    "base": ModelSize(
        prior=PriorStageConfig(
            model=BASE_PRIOR,
            autoregressive=BASE_AUTOREGRESSIVE_PRIOR,
            trainer=_training(400_000, 2048, 1.1e-4, weight_decay=6e-2, beta2=0.96, adam_eps=1e-6),
        ),
        autoregressive_trainer=_training(
            600_000, 2048, 1.6e-4, weight_decay=4e-2, beta2=0.91, adam_eps=1e-10, ema_decay=0.999
        ),
        decoder=DecoderStageConfig(
            DecoderConfig(
                _attentive(_unet(64, 192, (1, 2, 3, 4), 3, dropout=0.1)),
                context_dim=768,
                text="clip",
                diffusion=_LEARNED,
            ),
            _training(600_000, 1024, 1.2e-4),
        ),
        upsamplers=(
            _upsampler(_unet(64, 192, (1, 2, 3, 4), 2), _training(600_000, 512, 1.2e-4), degradation=_BLUR),
            _upsampler(
                _unet(256, 96, (1, 1, 2, 2, 4, 4), 2),
                _training(600_000, 256, 1.0e-4),
                low_res_size=256,
                degradation=_BSR,
            ),
        ),
        clip="ViT-L-14",
        pretrained="openai",
        num_parameters=ParameterCounts(206_874_368, 319_057_734, (204_853_443, 70_564_035)),
    ),
    # Ramesh et al. 2022, Table 3, with a CLIP of 1,024 dimensions like the paper's, trained on the dataset's pairs
    "dalle2": ModelSize(
        prior=PriorStageConfig(
            model=DALLE2_PRIOR,
            autoregressive=DALLE2_AUTOREGRESSIVE_PRIOR,
            trainer=_training(600_000, 4096, 1.1e-4, weight_decay=6e-2, beta2=0.96, adam_eps=1e-6),
        ),
        autoregressive_trainer=_training(
            1_000_000, 4096, 1.6e-4, weight_decay=4e-2, beta2=0.91, adam_eps=1e-10, ema_decay=0.999
        ),
        decoder=DecoderStageConfig(
            DecoderConfig(
                _attentive(_unet(64, 512, (1, 2, 3, 4), 3, dropout=0.1)),
                context_dim=2048,
                text="transformer",
                text_transformer=TextTransformerConfig(width=2048, depth=24, num_heads=32),
                diffusion=_LEARNED,
            ),
            _training(800_000, 2048, 1.2e-4),
        ),
        upsamplers=(
            _upsampler(
                _unet(64, 320, (1, 2, 3, 4), 3, dropout=0.1),
                _training(1_000_000, 1024, 1.2e-4),
                degradation=_BLUR,
            ),
            _upsampler(
                _unet(256, 192, (1, 1, 2, 2, 4, 4), 2),
                _training(1_000_000, 512, 1.0e-4),
                low_res_size=256,
                degradation=_BSR,
                diffusion=DiffusionConfig(schedule="linear"),
            ),
        ),
        clip="unclip-dalle2",
        pretrained=None,
        num_parameters=ParameterCounts(1_225_925_632, 3_567_368_710, (729_702_083, 282_059_139)),
        sampling=SamplingConfig(
            prior=PriorSampling(sampler="analytic_dpm", num_steps=64),
            decoder=DecoderSampling(sampler="ddpm", num_steps=250),
            upsamplers={"256": UpsamplerSampling(num_steps=27), "1024": UpsamplerSampling(num_steps=15)},
        ),
    ),
}
"""Name -> size. `num_parameters` are exact."""
