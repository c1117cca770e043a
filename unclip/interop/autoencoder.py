"""Autoencoders: lossless export to and import from diffusers' `AutoencoderKL` and `VQModel`. Diffusers itself is not needed.

A folder holds `config.json` and `diffusion_pytorch_model.safetensors`, in float32. Autoencoders that diffusers cannot represent
are refused: those with the Gumbel-softmax, and those that read patches.

Letters: D latent channels.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from unclip import foreign
from unclip.config import require
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.interop import folders
from unclip.interop.folders import DIFFUSERS_WEIGHTS
from unclip.models.autoencoder import Autoencoder, AutoencoderConfig, Bottleneck
from unclip.training.objective import Tensors

MAX_LEVELS = 16
"""Most levels of an imported network; each but the last halves a resolution of at most 2**14."""


class Scaling(NamedTuple):
    """Scale of the latents that a diffusion model reads: (latents - shift) * factor.

    Diffusers keeps it with the autoencoder. Source: Rombach et al. 2022, appendix G.
    """

    factor: float = 1.0
    shift: float = 0.0


def export_autoencoder(autoencoder: Autoencoder, folder: str | Path, scaling: Scaling = Scaling()) -> None:  # noqa: B008
    """Write an autoencoder as an AutoencoderKL (kl) or a VQModel (vq).

    Args:
        folder: folder of this model, for example `vae`.
        scaling: scale of the latents; a VQModel has no shift.

    Raises:
        ConfigError: the factor is not above 0, or the shift is not 0 for a VQModel.
        InputError: diffusers' classes cannot represent the autoencoder; nothing is written.
    """
    config = autoencoder.config
    if config.bottleneck not in _CLASSES or config.patch_size != 1 or config.transformer is not None:
        networks = "convolutions" if config.transformer is None else "Transformers"
        raise InputError(
            f"export: got an autoencoder with bottleneck = {config.bottleneck!r}, patch_size = {config.patch_size} and "
            f"{networks}, expected 'kl' or 'vq' and patch_size = 1 and convolutions, as AutoencoderKL and VQModel support "
            "nothing else. Train with these to export."
        )
    is_kl = config.bottleneck == "kl"
    require(scaling.factor > 0, "scaling.factor", scaling.factor, "above 0")
    require(is_kl or scaling.shift == 0, "scaling.shift", scaling.shift, "0, as a VQModel has no shift")
    attends = [
        config.image_size // 2**level in config.attention_resolutions for level in range(len(config.channel_mult))
    ]
    description = _FIXED | {
        "_class_name": _CLASSES[config.bottleneck],
        "sample_size": config.image_size,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "block_out_channels": config.widths,
        "down_block_types": [_ATTENDING[0] if attend else _PLAIN[0] for attend in attends],
        "up_block_types": [_ATTENDING[1] if attend else _PLAIN[1] for attend in reversed(attends)],
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.middle_attention,
        "scaling_factor": scaling.factor,
    }
    if is_kl:
        description |= {"shift_factor": scaling.shift or None}
    else:
        description |= {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.latent_channels}
    state = autoencoder.state_dict()
    tensors: Tensors = {}
    for name, theirs in _names(state, config).items():
        tensors |= zip(theirs, state[name].chunk(len(theirs)), strict=True)
    folders.write(Path(folder), description, tensors, DIFFUSERS_WEIGHTS)


def import_autoencoder(folder: str | Path) -> tuple[Autoencoder, Scaling]:
    """Read an AutoencoderKL or a VQModel, in evaluation mode, and the scale of its latents.

    Raises:
        CheckpointError: files are missing or damaged, or describe a network that `Autoencoder` cannot represent.
    """
    path = Path(folder, "config.json")
    settings = foreign.read_json(path)
    kinds: dict[Any, Bottleneck] = {theirs: ours for ours, theirs in _CLASSES.items()}
    class_name = settings.get("_class_name")
    if not isinstance(class_name, str) or class_name not in kinds:
        expected = " or a ".join(_CLASSES.values())
        raise CheckpointError(f"{path}: got a {foreign.shorten(class_name)}, expected a {expected}.")
    bottleneck = kinds[class_name]
    foreign.check_fixed(settings, _FIXED | _OTHERS[bottleneck], path)
    network = foreign.read(_Network, settings, path, ignore_others=True)
    tensors = _with_current_names(folders.read_weights(Path(folder), DIFFUSERS_WEIGHTS))
    folders.check_depth(path, settings, "layers_per_block", tensors)
    config = _config_of(network, bottleneck, path)
    try:
        with torch.device("meta"):  # so that damaged settings cannot allocate memory
            autoencoder = Autoencoder(config)
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder}: this network cannot be built here: {foreign.first_lines(error)}") from error
    names = _names(autoencoder.state_dict(), config)
    expected_names = {name for theirs in names.values() for name in theirs}
    if expected_names != set(tensors):
        raise CheckpointError(
            f"{folder}: the weights do not fit their config.json: {len(expected_names - set(tensors))} missing, "
            f"{len(set(tensors) - expected_names)} unknown, such as {min(expected_names ^ set(tensors))}."
        )
    try:
        state = {name: torch.cat([tensors[each] for each in theirs]) for name, theirs in names.items()}
        autoencoder.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: the weights do not fit their config.json: {foreign.first_lines(error)}"
        ) from error
    return autoencoder.eval(), Scaling(network.scaling_factor, network.shift_factor or 0.0)


@dataclasses.dataclass(frozen=True)
class _Network:
    """Settings that are read; the others have one supported value each (`_FIXED`). Missing ones have diffusers' defaults."""

    latent_channels: foreign.Size
    block_out_channels: tuple[foreign.Size, ...]
    down_block_types: tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...]
    up_block_types: tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...]
    sample_size: foreign.Resolution = 32
    layers_per_block: foreign.Depth = 1
    norm_num_groups: foreign.Size = 32
    mid_block_add_attention: bool = True
    num_vq_embeddings: foreign.Size = 256
    vq_embed_dim: foreign.Size | None = None
    scaling_factor: Annotated[float, foreign.Range(1e-6, 1e6)] = 0.18215
    shift_factor: Annotated[float, foreign.Range(-1e6, 1e6)] | None = None


_CLASSES: dict[Bottleneck, str] = {"kl": "AutoencoderKL", "vq": "VQModel"}

_PLAIN = ("DownEncoderBlock2D", "UpDecoderBlock2D")
_ATTENDING = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")

_FIXED: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "act_fn": "silu"}
"""Settings that our network has no choice of; diffusers' defaults are the same."""

_OTHERS: dict[Bottleneck, dict[str, Any]] = {
    "kl": {"use_quant_conv": True, "use_post_quant_conv": True, "latents_mean": None, "latents_std": None},
    "vq": {"norm_type": "group", "lookup_from_codebook": False},
}
"""Settings of one class that our network has no choice of."""

_ENDS = {
    "to_bottleneck": "quant_conv",
    "from_bottleneck": "post_quant_conv",
    "encoder.input": "encoder.conv_in",
    "encoder.output.0": "encoder.conv_norm_out",
    "encoder.output.2": "encoder.conv_out",
    "decoder.input": "decoder.conv_in",
    "decoder.norm": "decoder.conv_norm_out",
    "decoder.output": "decoder.conv_out",
}

_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "conv_shortcut"}
_ATTENTION = {"norm": ("group_norm",), "to_qkv": ("to_q", "to_k", "to_v"), "to_out": ("to_out.0",)}
"""Modules of our attention -> diffusers' modules; several if ours are fused."""

_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Modules of attention in folders of earlier versions of diffusers -> their names today."""


def _names(keys: Mapping[str, Tensor], config: AutoencoderConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter -> diffusers' parameters, in the order in which ours fuses them."""
    blocks = dict(_blocks(config))
    names: dict[str, tuple[str, ...]] = {}
    for key in keys:
        module, kind = key.rsplit(".", 1)
        if key == "bottleneck.codebook":
            names[key] = ("quantize.embedding.weight",)
        elif module in _ENDS:
            names[key] = (f"{_ENDS[module]}.{kind}",)
        elif ".attend." in module:
            block, part = module.split(".attend.")
            place = blocks[block].replace(".resnets.", ".attentions.")
            names[key] = tuple(f"{place}.{theirs}.{kind}" for theirs in _ATTENTION[part])
        else:
            block, part = module.rsplit(".", 1)
            theirs = "conv" if ".downsamplers." in blocks[block] or ".upsamplers." in blocks[block] else _RESIDUAL[part]
            names[key] = (f"{blocks[block]}.{theirs}.{kind}",)
    return names


def _blocks(config: AutoencoderConfig) -> Iterator[tuple[str, str]]:
    """Pairs of our and diffusers' blocks."""
    num_levels = len(config.channel_mult)
    number = 0
    for level in range(num_levels):
        for layer in range(config.num_res_blocks):
            yield f"encoder.blocks.{number}", f"encoder.down_blocks.{level}.resnets.{layer}"
            number += 1
        yield f"encoder.blocks.{number}", f"encoder.down_blocks.{level}.downsamplers.0"  # not in the last level
        number += 1
    number = 0
    for level in range(num_levels):
        for layer in range(config.num_res_blocks + 1):
            yield f"decoder.blocks.{number}", f"decoder.up_blocks.{level}.resnets.{layer}"
            number += 1
        yield f"decoder.blocks.{number}", f"decoder.up_blocks.{level}.upsamplers.0"
        number += 1
    for half in ("encoder", "decoder"):
        for layer in range(2):
            yield f"{half}.middle.{layer}", f"{half}.mid_block.resnets.{layer}"


def _with_current_names(tensors: Tensors) -> Tensors:
    """Weights under the names of today's diffusers; attention of a 1 x 1 convolution as a matrix."""
    renamed: Tensors = {}
    for key, value in tensors.items():
        module, _, kind = key.rpartition(".")
        parent, _, name = module.rpartition(".")
        if ".attentions." in key and name in _FORMER:
            key = f"{parent}.{_FORMER[name]}.{kind}"
            value = value.flatten(1) if kind == "weight" else value
        renamed[key] = value
    return renamed


def _config_of(network: _Network, bottleneck: Bottleneck, path: Path) -> AutoencoderConfig:
    widths, down = network.block_out_channels, network.down_block_types
    mirrored = [kind.replace("Down", "Up").replace("Encoder", "Decoder") for kind in reversed(down)]
    if len(widths) > MAX_LEVELS:
        raise CheckpointError(
            f"{path}: got {len(widths):,} blocks, expected at most {MAX_LEVELS}. The file is damaged."
        )
    if not (len(widths) == len(down) > 0 and mirrored == list(network.up_block_types)):
        raise CheckpointError(
            f"{path}: got blocks {foreign.shorten(down)} and {foreign.shorten(network.up_block_types)} of "
            f"{foreign.shorten(widths)} channels, expected as many numbers of channels "
            "as blocks, and mirrored blocks."
        )
    if any(width % widths[0] for width in widths):
        raise CheckpointError(f"{path}: got block_out_channels = {widths}, expected multiples of the first.")
    if bottleneck == "vq" and network.vq_embed_dim not in (None, network.latent_channels):
        raise CheckpointError(
            f"{path}: got vq_embed_dim = {network.vq_embed_dim}, expected latent_channels, {network.latent_channels}, as nothing "
            "else is supported here."
        )
    try:
        return AutoencoderConfig(
            image_size=network.sample_size,
            channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=network.layers_per_block,
            attention_resolutions=tuple(
                network.sample_size // 2**level for level, kind in enumerate(down) if kind == _ATTENDING[0]
            ),
            middle_attention=network.mid_block_add_attention,
            norm_groups=network.norm_num_groups,
            latent_channels=network.latent_channels,
            bottleneck=bottleneck,
            codebook_size=network.num_vq_embeddings if bottleneck == "vq" else AutoencoderConfig.codebook_size,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: this network cannot be built here: {foreign.first_lines(error)}") from error
