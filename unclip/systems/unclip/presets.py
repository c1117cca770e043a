"""Sizes of the models, and how many parameters each comes to.

`dalle2` is Table 3 of Ramesh et al. 2022. Its 3.5 B decoder is GLIDE's: a U-Net of 2.24 B parameters with 512 channels, and
a text Transformer of its own with 1.31 B, of which 0.1 B embed the tokens. The second upsampler comes to 282 M, which the
paper calls 300 M.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from unclip.diffusion.process import DiffusionConfig
from unclip.models.autoregressive_prior import (
    BASE_AUTOREGRESSIVE_PRIOR,
    DALLE2_AUTOREGRESSIVE_PRIOR,
    SMALL_AUTOREGRESSIVE_PRIOR,
    AutoregressivePriorConfig,
)
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.degradations import DegradationConfig
from unclip.models.prior import BASE_PRIOR, DALLE2_PRIOR, SMALL_PRIOR, DiffusionPrior, PriorConfig
from unclip.models.text import TextShape, TextTransformerConfig
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerConfig


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    prior: int
    """Parameters of the diffusion prior."""
    decoder: int
    """Parameters of the decoder, with its text Transformer if it has one."""
    upsamplers: tuple[int, ...]
    """Parameters of each upsampler, the smallest pictures first."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """A stack's models, and the CLIP that they fit."""

    prior: PriorConfig
    """Captions to embeddings."""
    autoregressive_prior: AutoregressivePriorConfig
    """The paper's other prior; its size depends on how many principal components the data needs."""
    decoder: DecoderConfig
    """Embeddings to the smallest pictures."""
    upsamplers: tuple[UpsamplerConfig, ...]
    """Each takes the pictures of the one before."""
    embedding_dim: int
    """Width of the CLIP's embeddings."""
    text_shape: TextShape
    """Of the CLIP's text encoder and tokenizer."""
    num_parameters: ParameterCounts
    """What the models come to with that CLIP."""

    def build_prior(self) -> DiffusionPrior:
        return DiffusionPrior(self.prior, self.embedding_dim, self.text_shape.width, self.text_shape.length)

    def build_decoder(self) -> Decoder:
        return Decoder(self.decoder, self.embedding_dim, self.text_shape)


def count_parameters(build: Callable[[], nn.Module]) -> int:
    """How many parameters a model has, at no cost: it is built on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def _unet(
    size: int, channels: int, channel_mult: tuple[int, ...], num_res_blocks: int, dropout: float = 0
) -> UNetConfig:
    return UNetConfig(size, channels, channel_mult, num_res_blocks, dropout=dropout)


def _attentive(unet: UNetConfig) -> UNetConfig:
    return dataclasses.replace(unet, attention_resolutions=(32, 16, 8), head_channels=64)


_LEARNED = DiffusionConfig(variance="learned_range")
_BLUR = DegradationConfig(kind="blur", min_blur_sigma=0.6, max_blur_sigma=0.6)
_BSR = DegradationConfig(kind="bsr")

PRESETS: dict[str, Preset] = {
    # 16 and 64 pixels, minutes on two CPUs: the sizes of pipelines/presets/demo.toml
    "demo": Preset(
        prior=PriorConfig(width=128, depth=4, num_heads=4),
        autoregressive_prior=AutoregressivePriorConfig(width=128, depth=4, num_heads=4, num_buckets=16),
        decoder=DecoderConfig(
            UNetConfig(16, 32, (1, 2, 4), 1, attention_resolutions=(4,), head_channels=32, norm_groups=8),
            context_dim=128,
            diffusion=DiffusionConfig(prediction_type="v"),
        ),
        upsamplers=(
            UpsamplerConfig(
                UNetConfig(32, 16, (1, 2), 1, norm_groups=4),
                low_res_size=16,
                diffusion=DiffusionConfig(prediction_type="x0"),
            ),
        ),
        embedding_dim=64,
        text_shape=TextShape(length=24, width=96, vocab_size=49_408),
        num_parameters=ParameterCounts(867_392, 3_335_715, (192_227,)),
    ),
    # 64 and 256 pixels, with ViT-B-32: days on one GPU
    "small": Preset(
        prior=SMALL_PRIOR,
        autoregressive_prior=SMALL_AUTOREGRESSIVE_PRIOR,
        decoder=DecoderConfig(
            _attentive(_unet(64, 128, (1, 2, 3, 4), 2)), context_dim=512, text="clip", diffusion=_LEARNED
        ),
        upsamplers=(UpsamplerConfig(_unet(64, 96, (1, 2, 3, 4), 2), degradation=_BLUR),),
        embedding_dim=512,
        text_shape=TextShape(length=77, width=512, vocab_size=49_408),
        num_parameters=ParameterCounts(39_447_552, 109_942_918, (51_250_275,)),
    ),
    # 64, 256 and 1,024 pixels, with ViT-L-14: the layout of published unCLIP decoders, so that diffusers can hold it
    "base": Preset(
        prior=BASE_PRIOR,
        autoregressive_prior=BASE_AUTOREGRESSIVE_PRIOR,
        decoder=DecoderConfig(
            _attentive(_unet(64, 192, (1, 2, 3, 4), 3, dropout=0.1)), context_dim=768, text="clip", diffusion=_LEARNED
        ),
        upsamplers=(
            UpsamplerConfig(_unet(64, 192, (1, 2, 3, 4), 2), degradation=_BLUR),
            UpsamplerConfig(_unet(256, 96, (1, 1, 2, 2, 4, 4), 2), low_res_size=256, degradation=_BSR),
        ),
        embedding_dim=768,
        text_shape=TextShape(length=77, width=768, vocab_size=49_408),
        num_parameters=ParameterCounts(206_874_368, 319_057_734, (204_853_443, 70_564_035)),
    ),
    # Ramesh et al. 2022, Table 3, with a CLIP of 1,024 dimensions
    "dalle2": Preset(
        prior=DALLE2_PRIOR,
        autoregressive_prior=DALLE2_AUTOREGRESSIVE_PRIOR,
        decoder=DecoderConfig(
            _attentive(_unet(64, 512, (1, 2, 3, 4), 3, dropout=0.1)),
            context_dim=2048,
            text="transformer",
            text_transformer=TextTransformerConfig(width=2048, depth=24, num_heads=32),
            diffusion=_LEARNED,
        ),
        upsamplers=(
            UpsamplerConfig(_unet(64, 320, (1, 2, 3, 4), 3, dropout=0.1), degradation=_BLUR),
            UpsamplerConfig(
                _unet(256, 192, (1, 1, 2, 2, 4, 4), 2),
                low_res_size=256,
                degradation=_BSR,
                diffusion=DiffusionConfig(schedule="linear"),
            ),
        ),
        embedding_dim=1024,
        text_shape=TextShape(length=256, width=1024, vocab_size=49_408),
        num_parameters=ParameterCounts(1_225_925_632, 3_567_368_710, (729_702_083, 282_059_139)),
    ),
}
"""By name. `num_parameters` are exact."""
