"""Networks of latents: lossless export to and import from diffusers' `UNet2DConditionModel`. Diffusers itself is not needed.

A folder holds `config.json` and `diffusion_pytorch_model.safetensors`, in float32. The network is that of Stable Diffusion:
spatial Transformers, resampling by convolutions, and the text states of a CLIP, read as they are (`unet.attention`
"spatial_transformer", `unet.resampling` "convolution", `text` "clip"). All others are refused. The projections around a
Transformer are written as linear layers, and read as these or as 1 x 1 convolutions, which compute the same.

Letters: L text tokens, W width of the text states, E CLIP embedding width, T time-embedding width.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from unclip import foreign
from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.interop import folders
from unclip.interop import unet as unets
from unclip.interop.folders import DIFFUSERS_WEIGHTS
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.latent_diffusion import ImageVector, LatentDiffusion, LatentDiffusionConfig
from unclip.models.text import CaptionFeatures, ClipStates, TextShape
from unclip.models.unet import UNetConfig
from unclip.training.objective import Tensors

MAX_LEVELS = 15
"""Most levels of an imported network; each but the last halves a resolution of at most 2**14."""


def check_exportable(model: LatentDiffusion) -> None:
    """Check that UNet2DConditionModel can represent a network.

    Raises:
        InputError: it cannot; names the first such setting, and the value to train with instead.
    """
    config = model.config
    required = {
        "unet.attention": (config.unet.attention, "spatial_transformer"),
        "unet.resampling": (config.unet.resampling, "convolution"),
        "text": (config.text, "clip"),
    }
    for name, (got, expected) in required.items():
        if got != expected:
            raise InputError(
                f"export: got a network of latents with {name} = {got!r}, expected {expected!r}, as in Stable Diffusion. Train "
                "with that setting to export."
            )


def export_latent_diffusion(model: LatentDiffusion, folder: str | Path) -> None:
    """Write a network of latents as a UNet2DConditionModel, which reads normalised latents.

    One that reads image embeddings takes them as `class_labels`, noised but not normalised, followed by the embedding of their
    noise level: the statistics are folded into the weights.

    Args:
        folder: folder of this model, for example `unet`.

    Raises:
        InputError: the class cannot represent the network; nothing is written.
    """
    check_exportable(model)
    config, unet = model.config.unet, model.unet
    widths = [config.channels * multiple for multiple in config.channel_mult]
    attends = [config.image_size // 2**level in config.attention_resolutions for level in range(len(widths))]
    heads: int | list[int] = config.num_heads or [max(1, config.heads(width)) for width in widths]
    description = _FIXED | {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.image_size,
        "in_channels": unet.input.in_channels,
        "out_channels": unet.output[-1].out_channels,
        "layers_per_block": config.num_res_blocks,
        "block_out_channels": widths,
        "down_block_types": [_ATTENDING[0] if attend else _PLAIN[0] for attend in attends],
        "up_block_types": [_ATTENDING[1] if attend else _PLAIN[1] for attend in reversed(attends)],
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "cross_attention_dim": model.config.context_dim,
        "norm_num_groups": config.norm_groups,
        "dropout": config.dropout,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "use_linear_projection": True,
    }
    tensors = unets.to_theirs(unet)
    if isinstance(model.image, ImageVector):
        mean, std = model.image.statistics.affine()
        embedding_dim = len(mean)
        description |= {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 2 * embedding_dim,
        }
        state = model.image.layers.state_dict()
        tensors |= _folded({theirs: state[ours] for ours, theirs in _IMAGE.items()}, mean, std)
    folders.write(Path(folder), description, tensors, DIFFUSERS_WEIGHTS)


def import_latent_diffusion(
    folder: str | Path,
    null_text: CaptionFeatures,
    *,
    diffusion: DiffusionConfig,
    latent_std: float = 1.0,
    statistics: EmbeddingStatistics | None = None,
) -> LatentDiffusion:
    """Read a network of latents from a UNet2DConditionModel, in evaluation mode.

    Args:
        folder: folder of this model.
        null_text: features of the empty caption with its padding (`caption_features`), a batch of one.
        diffusion: diffusion process of its training.
        latent_std: the network reads the autoencoder's latents divided by it.
        statistics: those of the image embeddings that a network was trained with, with any noise level; None for a network
            that reads no image embeddings.

    Raises:
        CheckpointError: files are missing or damaged, or describe a network that `LatentDiffusion` cannot represent.
    """
    folder = Path(folder)
    path = folder / "config.json"
    settings = unets.read_settings(folder, "UNet2DConditionModel", _FIXED)
    network = foreign.read(_Network, settings, path, ignore_others=True)
    unet = _unet_config(network, path)
    tensors = _with_linear_projections(folders.read_weights(folder, DIFFUSERS_WEIGHTS))
    _check_depth(network, len(tensors), path)
    length, width = null_text.text_encodings.shape[1:]
    channels = network.in_channels, network.out_channels
    expected = network.in_channels, network.in_channels * diffusion.outputs_per_channel
    if channels != expected or network.cross_attention_dim != width:
        raise CheckpointError(
            f"{path}: got {channels} channels and cross_attention_dim = {network.cross_attention_dim}, expected {expected} and "
            f"{width}, the width of the text encoder's states. These parts are not from the same pipeline."
        )
    embedding_dim = null_text.text_embedding.shape[1] if statistics is None else len(statistics.mean)
    projected = None if statistics is None else ("projection", 2 * embedding_dim)
    found = network.class_embed_type, network.projection_class_embeddings_input_dim
    if (None if found[0] is None else found) != projected:
        raise CheckpointError(
            f"{path}: got class_embed_type = {found[0]!r} and projection_class_embeddings_input_dim = {found[1]}, expected "
            + ("None: this pipeline has no image embeddings." if projected is None else f"{projected}.")
        )
    try:
        config = LatentDiffusionConfig(
            unet=unet,
            latent_channels=network.in_channels,
            context_dim=width,
            text="clip",
            diffusion=diffusion,
            reads_image_embedding=statistics is not None,
            max_noise_level=0 if statistics is None else diffusion.num_timesteps - 1,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: this network cannot be built here: {foreign.first_lines(error)}") from error
    model = unets.build(folder, lambda: LatentDiffusion(config, embedding_dim, TextShape(length, width, 0)))
    assert isinstance(model.text, ClipStates), "the network reads text states as they are"
    state: Tensors = {}
    if statistics is not None:
        state = _image_from_theirs(tensors, statistics, path)
        tensors = {name: value for name, value in tensors.items() if name not in _IMAGE.values()}
    state |= {f"unet.{name}": value for name, value in unets.from_theirs(model.unet, tensors, folder).items()}
    state |= {
        "latent_mean": null_text.text_encodings.new_zeros(network.in_channels),
        "latent_std": null_text.text_encodings.new_full((network.in_channels,), latent_std),
        "text.null_encodings": null_text.text_encodings[0],
        "text.null_mask": null_text.text_mask[0],
        "text.null_embedding": null_text.text_embedding[0],
    }
    unets.assign(model, state, {}, folder)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class _Network:
    """Settings that are read; the others have one supported value each (`_FIXED`). Missing ones have diffusers' defaults."""

    sample_size: foreign.Resolution
    block_out_channels: tuple[foreign.Size, ...]
    down_block_types: tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...]
    up_block_types: tuple[Literal["CrossAttnUpBlock2D", "UpBlock2D"], ...]
    in_channels: foreign.Size = 4
    out_channels: foreign.Size = 4
    layers_per_block: foreign.Depth = 2
    attention_head_dim: foreign.Size | tuple[foreign.Size, ...] = 8
    cross_attention_dim: foreign.Size = 1280
    norm_num_groups: foreign.Size = 32
    dropout: Annotated[float, foreign.Range(0, 1)] = 0.0
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    use_linear_projection: bool = False
    class_embed_type: Literal["projection"] | None = None
    projection_class_embeddings_input_dim: foreign.Size | None = None


_PLAIN = ("DownBlock2D", "UpBlock2D")
_ATTENDING = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")

_FIXED = unets.FIXED_CONDITION | {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "time_embedding_dim": None,
    "timestep_post_act": None,
    "encoder_hid_dim_type": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "attention_type": "default",
    "num_attention_heads": None,
    "reverse_transformer_layers_per_block": None,
}
"""Settings that our network has no choice of; diffusers' defaults are the same."""


_IMAGE = {
    "0.weight": "class_embedding.linear_1.weight",
    "0.bias": "class_embedding.linear_1.bias",
    "2.weight": "class_embedding.linear_2.weight",
    "2.bias": "class_embedding.linear_2.bias",
}
"""Parameters of the layers of our `ImageVector` -> parameters of UNet2DConditionModel."""


def _folded(tensors: Tensors, mean: Tensor, std: Tensor) -> Tensors:
    """Fold standardisation into the first of the layers that read image embeddings [E], so that they read them as they are."""
    name = "class_embedding.linear_1"
    weight, bias = (tensors[f"{name}.{kind}"].cpu().double() for kind in ("weight", "bias"))
    mean, std = mean.cpu().double(), std.cpu().double()
    scaled = weight[:, : len(mean)] / std  # [T, E]
    folded = torch.cat([scaled, weight[:, len(mean) :]], dim=1).float()
    return tensors | {f"{name}.weight": folded, f"{name}.bias": (bias - scaled @ mean).float()}


def _with_linear_projections(tensors: Tensors) -> Tensors:
    """Weights with 1 x 1 convolutions around Transformers as matrices."""
    ends = (".proj_in.weight", ".proj_out.weight")
    return {
        name: value[:, :, 0, 0] if name.endswith(ends) and value.shape[2:] == (1, 1) else value
        for name, value in tensors.items()
    }


def _image_from_theirs(tensors: Tensors, statistics: EmbeddingStatistics, path: Path) -> Tensors:
    """Weights for the `state_dict` of our network, of the layers that read image embeddings."""
    mean, std = (value.double() for value in statistics.affine())
    try:
        theirs = {name: tensors[name] for name in _IMAGE.values()}
        theirs = _folded(theirs, -mean / std, 1 / std)  # folding the inverse undoes the fold
    except (KeyError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{path}: the weights do not fit: {foreign.first_lines(error)}") from error
    state = {f"image.statistics.{name}": value for name, value in statistics.state_dict().items()}
    return state | {f"image.layers.{ours}": theirs[name] for ours, name in _IMAGE.items()}


def _check_depth(network: _Network, num_tensors: int, path: Path) -> None:
    """Refuse more residual blocks, of ten tensors each, than the weights have, before the network is built."""
    layers, levels = network.layers_per_block, len(network.block_out_channels)
    if 10 * levels * (2 * layers + 1) > num_tensors:
        raise CheckpointError(
            f"{path}: got layers_per_block = {layers} in {levels:,} blocks for {num_tensors} tensors, expected no more than the "
            "weights have. The file is damaged."
        )


def _unet_config(network: _Network, path: Path) -> UNetConfig:
    widths, down = network.block_out_channels, network.down_block_types
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    if not (0 < len(widths) == len(down) <= MAX_LEVELS and mirrored == list(network.up_block_types)):
        raise CheckpointError(
            f"{path}: got blocks {foreign.shorten(down)} and {foreign.shorten(network.up_block_types)} of "
            f"{foreign.shorten(widths)} channels, expected as many numbers of channels as blocks, at most {MAX_LEVELS}, and "
            "mirrored blocks."
        )
    if any(width % widths[0] for width in widths):
        raise CheckpointError(f"{path}: got block_out_channels = {widths}, expected multiples of the first.")
    attends = [kind == _ATTENDING[0] for kind in down]
    num_heads, head_channels = _heads(network, attends, path)
    try:
        return UNetConfig(
            image_size=network.sample_size,
            channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=network.layers_per_block,
            attention_resolutions=tuple(
                network.sample_size // 2**level for level, attend in enumerate(attends) if attend
            ),
            head_channels=head_channels,
            scale_shift_norm=network.resnet_time_scale_shift == "scale_shift",
            norm_groups=network.norm_num_groups,
            dropout=network.dropout,
            attention="spatial_transformer",
            num_heads=num_heads,
            resampling="convolution",
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: this network cannot be built here: {foreign.first_lines(error)}") from error


def _heads(network: _Network, attends: Sequence[bool], path: Path) -> tuple[int | None, int]:
    """Number of heads of all layers, or None, and otherwise the channels of a head; diffusers names the number of heads
    `attention_head_dim`."""
    given, widths = network.attention_head_dim, network.block_out_channels
    if isinstance(given, int):
        return given, UNetConfig.head_channels
    if len(given) == len(widths):
        layers = [(width, heads) for width, heads, attend in zip(widths, given, attends, strict=True) if attend]
        layers.append((widths[-1], given[-1]))  # the middle attends too
        if len({heads for _, heads in layers}) == 1:
            return given[-1], UNetConfig.head_channels
        if len({width / heads for width, heads in layers}) == 1 and widths[-1] % given[-1] == 0:
            return None, widths[-1] // given[-1]
    raise CheckpointError(
        f"{path}: got attention_head_dim = {foreign.shorten(given)} for {widths} channels, expected one number of heads for all "
        "blocks, or numbers that give all heads the same number of channels, as nothing else is supported here."
    )
