"""Decoders and upsamplers: lossless export to and import from diffusers' folders. Diffusers itself is not needed.

    decoder/, text_proj/, decoder_scheduler/    a decoder: UNet2DConditionModel, UnCLIPTextProjModel, UnCLIPScheduler
    super_res_first/, super_res_last/           one upsampler each: UNet2DModel
    super_res_scheduler/                        `scheduler_config` of the upsampler's diffusion

Each network is stored as `config.json` and `diffusion_pytorch_model.safetensors`, in float32. Decoders that diffusers cannot
represent are refused: those that read no captions, read them through their own Transformer, or inpaint.

Letters: E CLIP embedding width, D time-embedding width.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from unclip import foreign
from unclip.config import require
from unclip.diffusion.process import DiffusionConfig, PredictionType, VarianceType
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.interop import folders
from unclip.interop import unet as unets
from unclip.interop.folders import DIFFUSERS_WEIGHTS
from unclip.models.decoder import NUM_IMAGE_TOKENS, Decoder, DecoderConfig
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.text import CaptionFeatures, ClipText, TextShape
from unclip.models.unet import UNet, UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.training.objective import Tensors

SCHEDULER = "scheduler_config.json"


def export_decoder(decoder: Decoder, folder: str | Path) -> None:
    """Write `decoder/`, `text_proj/` and `decoder_scheduler/` of an UnCLIPPipeline into its local folder.

    The statistics of the image embeddings are folded into the weights of `text_proj`, which reads CLIP's embeddings as they
    are.

    Raises:
        InputError: diffusers' classes cannot represent the decoder; nothing is written.
    """
    config, text = decoder.config, decoder.text
    if not isinstance(text, ClipText) or config.inpainting:
        raise InputError(
            f"export: got a decoder with text = {config.text!r}, inpainting = {config.inpainting}, expected text = 'clip' "
            "without inpainting, as UnCLIPTextProjModel and its pipeline support nothing else."
        )
    embedding_dim, text_width = len(decoder.null_embedding), text.to_context.in_features
    if text_width != embedding_dim:
        raise InputError(
            f"export: got a CLIP with text width {text_width} and embedding width {embedding_dim}, expected equal widths, as "
            "UnCLIPTextProjModel requires. Train with such a CLIP, for example ViT-L-14."
        )
    scheduler = scheduler_config(config.diffusion)
    description = _describe_unet(config.unet, decoder.unet) | {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.unet.image_size,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "cross_attention_dim": config.context_dim,
        "class_embed_type": "identity",
    }
    folders.write(Path(folder, "decoder"), description, unets.to_theirs(decoder.unet), DIFFUSERS_WEIGHTS)
    projection = {
        "_class_name": "UnCLIPTextProjModel",
        "clip_extra_context_tokens": NUM_IMAGE_TOKENS,
        "clip_embeddings_dim": embedding_dim,
        "time_embed_dim": config.unet.time_dim,
        "cross_attention_dim": config.context_dim,
    }
    tensors = {_PROJECTION[name]: value for name, value in decoder.state_dict().items() if name in _PROJECTION}
    folders.write(
        Path(folder, "text_proj"), projection, _fold(tensors, *_affine(decoder.statistics)), DIFFUSERS_WEIGHTS
    )
    folders.write_json(Path(folder, "decoder_scheduler", SCHEDULER), scheduler)


def import_decoder(
    folder: str | Path,
    null_text: CaptionFeatures,
    *,
    statistics: EmbeddingStatistics | None = None,
    diffusion: DiffusionConfig | None = None,
) -> Decoder:
    """Read the decoder of an UnCLIPPipeline from its local folder, in evaluation mode.

    Args:
        null_text: features of the empty caption from the CLIP that the decoder was trained with, a batch of one.
        statistics: for standardising image embeddings in further training; None for no standardisation.
        diffusion: diffusion process of its training; None reads it from `decoder_scheduler/`.

    Raises:
        CheckpointError: files are missing or damaged, or describe a network that `Decoder` cannot represent.
    """
    network, tensors = _read_unet(Path(folder, "decoder"), "UNet2DConditionModel", _FIXED_CONDITION_UNET)
    embedding_dim, projection_tensors = _read_projection(Path(folder, "text_proj"))
    length, width = null_text.text_encodings.shape[1:]
    config = DecoderConfig(
        unet=_unet_config(network, Path(folder, "decoder")),
        context_dim=network.cross_attention_dim,
        text="clip",
        diffusion=diffusion or diffusion_config(Path(folder, "decoder_scheduler")),
    )
    if network.out_channels != 3 * config.diffusion.outputs_per_channel:
        raise CheckpointError(
            f"{folder}: got a network of {network.out_channels} output channels, expected "
            f"{3 * config.diffusion.outputs_per_channel} for the scheduler's variance {config.diffusion.variance!r}."
        )
    decoder = unets.build(folder, lambda: Decoder(config, embedding_dim, TextShape(length, width, 0)))
    statistics = statistics or EmbeddingStatistics.empty(embedding_dim)
    mean, std = _affine(statistics)
    try:
        projection_tensors = _fold(projection_tensors, -mean / std, 1 / std)  # folding the inverse undoes the fold
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}/text_proj: the weights do not fit their config.json: {foreign.first_lines(error)}"
        ) from error
    state = {f"unet.{name}": value for name, value in unets.from_theirs(decoder.unet, tensors, folder).items()}
    state |= {
        ours: projection_tensors.pop(theirs) for ours, theirs in _PROJECTION.items() if theirs in projection_tensors
    }
    state |= {f"statistics.{name}": value for name, value in statistics.state_dict().items()}
    state |= {
        "text.null_encodings": null_text.text_encodings[0],
        "text.null_mask": null_text.text_mask[0],
        "text.null_embedding": null_text.text_embedding[0],
    }
    unets.assign(decoder, state, projection_tensors, folder)
    return decoder.eval()


def export_upsampler(upsampler: Upsampler, folder: str | Path, *, noise_level: int | None = None) -> None:
    """Write an upsampler as a UNet2DModel, which reads x_t and the enlarged low-resolution image as six channels.

    Args:
        folder: folder of this model, for example `super_res_first`.
        noise_level: fixed noise level to sample at, for an upsampler trained with noise levels; None keeps the level an input,
            as the model's `class_labels`, which UnCLIPPipeline does not pass.

    Raises:
        ConfigError: a noise level is given, but the upsampler was trained without noise levels.
    """
    config, levels = upsampler.config, upsampler.noise_level_embedding
    require(
        noise_level is None or levels is not None,
        "noise_level",
        noise_level,
        "None for an upsampler without noise levels",
    )
    description = _describe_unet(config.unet, upsampler.unet) | {
        "_class_name": "UNet2DModel",
        "sample_size": config.output_size,
        "add_attention": False,
        "class_embed_type": "timestep" if levels is not None and noise_level is None else None,
    }
    tensors = unets.to_theirs(upsampler.unet)
    if levels is not None and noise_level is not None:
        with torch.no_grad():
            constant = levels(torch.tensor([noise_level], device=next(levels.parameters()).device))[0]
        tensors["time_embedding.linear_2.bias"] = tensors["time_embedding.linear_2.bias"] + constant.cpu()
    elif levels is not None:
        tensors |= {_LEVELS[name]: value for name, value in levels.state_dict().items()}
    folders.write(Path(folder), description, tensors, DIFFUSERS_WEIGHTS)


def import_upsampler(
    folder: str | Path,
    *,
    scale: int = 4,
    crop_size: int | None = None,
    max_noise_level: int = 300,
    diffusion: DiffusionConfig | None = None,
) -> Upsampler:
    """Read an upsampler from a UNet2DModel, in evaluation mode.

    Args:
        folder: folder of this model.
        scale: ratio of output to input resolution.
        crop_size: resolution of the crops for further training, pixels; None for whole images.
        max_noise_level: highest noise level of its training; ignored if it has no noise levels.
        diffusion: diffusion process of its training; None for that of published unCLIP upsamplers: cosine, eps.

    Raises:
        CheckpointError: files are missing or damaged, or describe a network that `Upsampler` cannot represent.
    """
    network, tensors = _read_unet(Path(folder), "UNet2DModel", _FIXED_UNET)
    resolution = network.sample_size
    unet = _unet_config(network, Path(folder), crop_size)
    has_levels = network.class_embed_type == "timestep"
    config = UpsamplerConfig(
        unet=unet,
        low_res_size=resolution // scale,
        scale=scale,
        max_noise_level=max_noise_level if has_levels else 0,
        diffusion=diffusion or DiffusionConfig(),
    )
    upsampler = unets.build(folder, lambda: Upsampler(config))
    state = {}
    if has_levels:
        state = {f"noise_level_embedding.{ours}": tensors.pop(theirs) for ours, theirs in _LEVELS.items()}
    state |= {f"unet.{name}": value for name, value in unets.from_theirs(upsampler.unet, tensors, folder).items()}
    unets.assign(upsampler, state, {}, folder)
    return upsampler.eval()


def scheduler_config(diffusion: DiffusionConfig) -> dict[str, Any]:
    """Settings of the `UnCLIPScheduler` whose steps are those of `samplers.ddpm` for images.

    Raises:
        InputError: the scheduler does not support the process.
    """
    supported = (
        diffusion.schedule == "cosine"
        and not diffusion.zero_terminal_snr
        and diffusion.prediction_type in PREDICTION_TYPES
        and diffusion.variance in _VARIANCE_TYPES
    )
    if not supported:
        raise InputError(
            f"export: got {diffusion.schedule} schedule, prediction {diffusion.prediction_type}, variance {diffusion.variance}, "
            f"zero_terminal_snr {diffusion.zero_terminal_snr}, expected a cosine schedule, prediction eps or x0, variance "
            "fixed_small or learned_range, zero_terminal_snr False, as UnCLIPScheduler supports nothing else. Train with "
            "these settings to export."
        )
    return {
        "_class_name": "UnCLIPScheduler",
        "num_train_timesteps": diffusion.num_timesteps,
        "variance_type": _VARIANCE_TYPES[diffusion.variance],
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "prediction_type": PREDICTION_TYPES[diffusion.prediction_type],
        "beta_schedule": "squaredcos_cap_v2",
    }


PREDICTION_TYPES: dict[PredictionType, str] = {"eps": "epsilon", "x0": "sample"}
_VARIANCE_TYPES: dict[VarianceType, str] = {"fixed_small": "fixed_small_log", "learned_range": "learned_range"}


def diffusion_config(folder: Path) -> DiffusionConfig:
    """Read the diffusion process of images from a scheduler's folder; missing settings have the scheduler's own defaults.

    Raises:
        CheckpointError: the file is missing or damaged, or describes a process that is not supported here.
    """
    settings = foreign.read_json(folder / SCHEDULER)
    fixed = {"_class_name": "UnCLIPScheduler", "beta_schedule": "squaredcos_cap_v2"}
    foreign.check_fixed(settings, fixed | {"clip_sample": True, "clip_sample_range": 1.0}, folder / SCHEDULER)
    process = foreign.read(_Scheduler, settings, folder / SCHEDULER, ignore_others=True)
    predictions = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    variances = {theirs: ours for ours, theirs in _VARIANCE_TYPES.items()}
    return DiffusionConfig(
        num_timesteps=process.num_train_timesteps,
        prediction_type=predictions[process.prediction_type],
        variance=variances[process.variance_type],
    )


@dataclasses.dataclass(frozen=True)
class _Scheduler:
    """Settings of an UnCLIPScheduler that are read."""

    num_train_timesteps: foreign.Timesteps = 1000
    prediction_type: Literal["epsilon", "sample"] = "epsilon"
    variance_type: Literal["fixed_small_log", "learned_range"] = "fixed_small_log"


@dataclasses.dataclass(frozen=True)
class _Network:
    """Settings of diffusers' two U-Nets that are read; the others have one supported value each (`_FIXED`)."""

    sample_size: foreign.Resolution
    in_channels: foreign.Size
    out_channels: foreign.Size
    layers_per_block: foreign.Depth
    block_out_channels: tuple[foreign.Size, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    cross_attention_dim: foreign.Size = 1
    attention_head_dim: foreign.Size | None = 8
    norm_num_groups: foreign.Size = 32
    dropout: Annotated[float, foreign.Range(0, 1)] = 0.0
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    class_embed_type: Literal["identity", "timestep"] | None = None


@dataclasses.dataclass(frozen=True)
class _Projection:
    """Settings of an UnCLIPTextProjModel that are read."""

    clip_embeddings_dim: foreign.Size


_PROJECTION = {
    "null_embedding": "learned_classifier_free_guidance_embeddings",
    "to_time.weight": "clip_image_embeddings_project_to_time_embeddings.weight",
    "to_time.bias": "clip_image_embeddings_project_to_time_embeddings.bias",
    "to_tokens.weight": "clip_extra_context_tokens_proj.weight",
    "to_tokens.bias": "clip_extra_context_tokens_proj.bias",
    "text.to_time.weight": "embedding_proj.weight",
    "text.to_time.bias": "embedding_proj.bias",
    "text.to_context.weight": "encoder_hidden_states_proj.weight",
    "text.to_context.bias": "encoder_hidden_states_proj.bias",
    "text.norm.weight": "text_encoder_hidden_states_norm.weight",
    "text.norm.bias": "text_encoder_hidden_states_norm.bias",
}
"""Parameters of our decoder outside its U-Net -> parameters of UnCLIPTextProjModel."""

_READ_EMBEDDINGS = ("clip_image_embeddings_project_to_time_embeddings", "clip_extra_context_tokens_proj")
_NULL = "learned_classifier_free_guidance_embeddings"

_LEVELS = {
    "layers.0.weight": "class_embedding.linear_1.weight",
    "layers.0.bias": "class_embedding.linear_1.bias",
    "layers.2.weight": "class_embedding.linear_2.weight",
    "layers.2.bias": "class_embedding.linear_2.bias",
}
"""Parameters of our noise level embedding -> parameters of UNet2DModel."""

_FIXED_UNET = unets.FIXED | {"time_embedding_dim": None, "num_class_embeds": None, "mid_block_type": "UNetMidBlock2D"}

_FIXED_CONDITION_UNET = unets.FIXED_CONDITION | {
    "class_embed_type": "identity",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}


def _describe_unet(config: UNetConfig, unet: UNet) -> dict[str, Any]:
    """Settings that both of diffusers' U-Nets have.

    Raises:
        InputError: the network has layers that they combine with others only.
    """
    if (config.attention, config.num_heads, config.resampling) != ("joint", None, "residual"):
        raise InputError(
            f"export: got a network with attention = {config.attention!r}, num_heads = {config.num_heads} and resampling = "
            f"{config.resampling!r}, expected 'joint', none and 'residual', as in the published networks of unCLIP. Train with "
            "these to export."
        )
    attends = [
        config.image_size // 2**level in config.attention_resolutions for level in range(len(config.channel_mult))
    ]
    return unets.FIXED | {
        "in_channels": unet.input.in_channels,
        "out_channels": unet.output[-1].out_channels,
        "layers_per_block": config.num_res_blocks,
        "block_out_channels": [config.channels * multiple for multiple in config.channel_mult],
        "down_block_types": ["SimpleCrossAttnDownBlock2D" if attend else _PLAIN[0] for attend in attends],
        "up_block_types": ["SimpleCrossAttnUpBlock2D" if attend else _PLAIN[1] for attend in reversed(attends)],
        "attention_head_dim": config.head_channels,
        "norm_num_groups": config.norm_groups,
        "dropout": config.dropout,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
    }


_PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")


def _unet_config(network: _Network, folder: Path, image_size: int | None = None) -> UNetConfig:
    resolution = image_size or network.sample_size
    widths, down = network.block_out_channels, network.down_block_types
    mirrored = [kind.replace("Down", "Up").replace("downsample", "upsample") for kind in reversed(down)]
    valid = {"SimpleCrossAttnDownBlock2D", _PLAIN[0]}
    fits = valid.issuperset(down) and mirrored == list(network.up_block_types) and len(widths) == len(down) > 0
    if not fits:
        raise CheckpointError(
            f"{folder}: got blocks {foreign.shorten(down)} and {foreign.shorten(network.up_block_types)} of "
            f"{foreign.shorten(widths)} channels, expected as many numbers of "
            f"channels as blocks, and mirrored blocks of the types {sorted(valid)}."
        )
    try:
        return UNetConfig(
            image_size=resolution,
            channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=network.layers_per_block,
            attention_resolutions=tuple(
                resolution // 2**level for level, kind in enumerate(down) if kind == "SimpleCrossAttnDownBlock2D"
            ),
            head_channels=network.attention_head_dim or 8,
            scale_shift_norm=network.resnet_time_scale_shift == "scale_shift",
            norm_groups=network.norm_num_groups,
            dropout=network.dropout,
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder}: this network cannot be built here: {foreign.first_lines(error)}") from error


def _affine(statistics: EmbeddingStatistics) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that standardising applies, [E] float64 each."""
    mean, std = statistics.affine()
    return mean.cpu().double(), std.cpu().double()


def _fold(tensors: Tensors, mean: Tensor, std: Tensor) -> Tensors:
    """Fold standardisation into the layers that read image embeddings, so that they read CLIP's embeddings as they are."""
    folded = dict(tensors)
    for name in _READ_EMBEDDINGS:
        weight = tensors[f"{name}.weight"].cpu().double() / std  # [D, E]
        folded[f"{name}.weight"] = weight.float()
        folded[f"{name}.bias"] = (tensors[f"{name}.bias"].cpu().double() - weight @ mean).float()
    folded[_NULL] = (tensors[_NULL].cpu().double() * std + mean).float()
    return folded


def _read_unet(folder: Path, class_name: str, fixed: Mapping[str, Any]) -> tuple[_Network, Tensors]:
    """Read config.json of a U-Net, and its weights in float32 from one file or from shards."""
    settings = unets.read_settings(folder, class_name, fixed)
    network = foreign.read(_Network, settings, folder / "config.json", ignore_others=True)
    tensors = folders.read_weights(folder, DIFFUSERS_WEIGHTS)
    folders.check_depth(folder / "config.json", settings, "layers_per_block", tensors)
    return network, tensors


def _read_projection(folder: Path) -> tuple[int, Tensors]:
    """Read an UnCLIPTextProjModel: width of the embeddings, and weights."""
    settings = unets.read_settings(folder, "UnCLIPTextProjModel", {"clip_extra_context_tokens": NUM_IMAGE_TOKENS})
    projection = foreign.read(_Projection, settings, folder / "config.json", ignore_others=True)
    return projection.clip_embeddings_dim, folders.read_weights(folder, DIFFUSERS_WEIGHTS)
