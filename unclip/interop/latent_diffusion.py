"""Networks of latents: lossless export to and import from diffusers' `UNet2DConditionModel`. Diffusers itself is not needed.

A folder holds `config.json` and `diffusion_pytorch_model.safetensors`, in float32. The network is that of Stable Diffusion:
spatial Transformers, resampling by convolutions, and the text states of a CLIP, read as they are (`unet.attention`
"spatial_transformer", `unet.resampling` "convolution", `text` "clip"). All others are refused. The projections around a
Transformer are written as linear layers, and read as these or as 1 x 1 convolutions, which compute the same.

Letters: L text tokens, W width of the text states.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from unclip import foreign
from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.interop import folders
from unclip.interop import unet as unets
from unclip.interop.folders import DIFFUSERS_WEIGHTS
from unclip.models.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
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
        "reads_image_embedding": (config.reads_image_embedding, False),
    }
    for name, (got, expected) in required.items():
        if got != expected:
            raise InputError(
                f"export: got a network of latents with {name} = {got!r}, expected {expected!r}, as in Stable Diffusion. Train "
                "with that setting to export."
            )


def export_latent_diffusion(model: LatentDiffusion, folder: str | Path) -> None:
    """Write a network of latents as a UNet2DConditionModel, which reads normalised latents.

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
    folders.write(Path(folder), description, unets.to_theirs(unet), DIFFUSERS_WEIGHTS)


def import_latent_diffusion(
    folder: str | Path, null_text: CaptionFeatures, *, diffusion: DiffusionConfig, latent_std: float = 1.0
) -> LatentDiffusion:
    """Read a network of latents from a UNet2DConditionModel, in evaluation mode.

    Args:
        folder: folder of this model.
        null_text: features of the empty caption with its padding (`caption_features`), a batch of one.
        diffusion: diffusion process of its training.
        latent_std: the network reads the autoencoder's latents divided by it.

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
    try:
        config = LatentDiffusionConfig(
            unet=unet, latent_channels=network.in_channels, context_dim=width, text="clip", diffusion=diffusion
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: this network cannot be built here: {error}") from error
    embedding_dim = null_text.text_embedding.shape[1]
    model = unets.build(folder, lambda: LatentDiffusion(config, embedding_dim, TextShape(length, width, 0)))
    assert isinstance(model.text, ClipStates), "the network reads text states as they are"
    state = {f"unet.{name}": value for name, value in unets.from_theirs(model.unet, tensors, folder).items()}
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


_PLAIN = ("DownBlock2D", "UpBlock2D")
_ATTENDING = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")

_FIXED = unets.FIXED_CONDITION | {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "class_embed_type": None,
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


def _with_linear_projections(tensors: Tensors) -> Tensors:
    """Weights with 1 x 1 convolutions around Transformers as matrices."""
    ends = (".proj_in.weight", ".proj_out.weight")
    return {
        name: value[:, :, 0, 0] if name.endswith(ends) and value.shape[2:] == (1, 1) else value
        for name, value in tensors.items()
    }


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
        raise CheckpointError(f"{path}: this network cannot be built here: {error}") from error


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
