"""U-Nets in diffusers' classes: names of the weights and settings that decoders, upsamplers and networks of latents share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unclip import foreign
from unclip.errors import CheckpointError
from unclip.models.unet import UNet, UNetConfig
from unclip.training.objective import Tensors

Network = TypeVar("Network", bound=nn.Module)

FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
}
"""Settings that our network has no choice of; diffusers' defaults are the same."""

FIXED_CONDITION: dict[str, Any] = FIXED | {
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "encoder_hid_dim": None,
    "addition_embed_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "time_cond_proj_dim": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "transformer_layers_per_block": 1,
}
"""The same of UNet2DConditionModel."""

_ENDS = {
    "input": "conv_in",
    "output.0": "conv_norm_out",
    "output.2": "conv_out",
    "time_embedding.layers.0": "time_embedding.linear_1",
    "time_embedding.layers.2": "time_embedding.linear_2",
}

_PARTS = {
    "norm1": ("norm1",),
    "conv1": ("conv1",),
    "time": ("time_emb_proj",),
    "norm2": ("norm2",),
    "conv2": ("conv2",),
    "skip": ("conv_shortcut",),
    "norm": ("group_norm",),
    "to_qkv": ("to_q", "to_k", "to_v"),
    "context_to_kv": ("add_k_proj", "add_v_proj"),
    "to_out": ("to_out.0",),
    "conv": ("conv",),
}
"""Modules of our residual blocks, resampling and attention -> diffusers' modules; several if ours are fused."""

_BLOCK = "transformer_blocks.0"
_SPATIAL_TRANSFORMER = {
    "group_norm": ("norm",),
    "proj_in": ("proj_in",),
    "pixel_norm": (f"{_BLOCK}.norm1",),
    "pixels_to_qkv": tuple(f"{_BLOCK}.attn1.to_{name}" for name in "qkv"),
    "pixels_to_out": (f"{_BLOCK}.attn1.to_out.0",),
    "query_norm": (f"{_BLOCK}.norm2",),
    "to_q": (f"{_BLOCK}.attn2.to_q",),
    "context_to_kv": tuple(f"{_BLOCK}.attn2.to_{name}" for name in "kv"),
    "context_to_out": (f"{_BLOCK}.attn2.to_out.0",),
    "mlp_norm": (f"{_BLOCK}.norm3",),
    "to_hidden": (f"{_BLOCK}.ff.net.0.proj",),
    "from_hidden": (f"{_BLOCK}.ff.net.2",),
    "proj_out": ("proj_out",),
}
"""The same of our spatial Transformers."""


def _names(keys: Iterable[str], config: UNetConfig) -> dict[str, tuple[str, ...]]:
    """Parameter of our U-Net -> diffusers' parameters, in the order in which ours fuses them."""
    blocks = dict(_blocks(config))
    names: dict[str, tuple[str, ...]] = {}
    for key in keys:
        module, kind = key.rsplit(".", 1)
        if module in _ENDS:
            names[key] = (f"{_ENDS[module]}.{kind}",)
        else:
            block, part = module.rsplit(".", 1)
            is_spatial = block.endswith(".attend") and config.attention == "spatial_transformer"
            parts = _SPATIAL_TRANSFORMER if is_spatial else _PARTS
            names[key] = tuple(f"{blocks[block]}.{name}.{kind}" for name in parts[part])
    return names


def _blocks(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Pairs of our and diffusers' residual blocks and attention layers, including attention layers that may not exist."""
    levels = range(len(config.channel_mult))
    down, up = 0, 0
    for level in levels:
        for layer in range(config.num_res_blocks):
            yield f"down.{down}.block", f"down_blocks.{level}.resnets.{layer}"
            yield f"down.{down}.attend", f"down_blocks.{level}.attentions.{layer}"
            down += 1
        yield f"down.{down}.block", f"down_blocks.{level}.downsamplers.0"
        down += 1
    yield "middle.0.block", "mid_block.resnets.0"
    yield "middle.0.attend", "mid_block.attentions.0"
    yield "middle.1", "mid_block.resnets.1"
    for level in levels:
        for layer in range(config.num_res_blocks + 1):
            yield f"up.{up}.block", f"up_blocks.{level}.resnets.{layer}"
            yield f"up.{up}.attend", f"up_blocks.{level}.attentions.{layer}"
            up += 1
        yield f"up.{up}.block", f"up_blocks.{level}.upsamplers.0"
        up += 1


def to_theirs(unet: UNet) -> Tensors:
    """Weights of a U-Net under diffusers' names."""
    state = unet.state_dict()
    theirs: Tensors = {}
    for key, names in _names(state, unet.config).items():
        theirs |= zip(names, state[key].chunk(len(names)), strict=True)
    return theirs


def from_theirs(unet: UNet, tensors: Mapping[str, Tensor], folder: str | Path) -> Tensors:
    """Weights for the `state_dict` of a U-Net, from weights under diffusers' names.

    Raises:
        CheckpointError: some are missing or unknown; names one.
    """
    names = _names(unet.state_dict(), unet.config)
    expected = {name for group in names.values() for name in group}
    if expected != set(tensors):
        raise CheckpointError(
            f"{folder}: the weights do not fit their config.json: {len(expected - set(tensors))} missing, "
            f"{len(set(tensors) - expected)} unknown, such as {min(expected ^ set(tensors))}."
        )
    return {key: torch.cat([tensors[name] for name in group]) for key, group in names.items()}


def build(folder: str | Path, make: Callable[[], Network]) -> Network:
    """Build a model on the meta device, so that damaged settings cannot allocate memory."""
    try:
        with torch.device("meta"):
            return make()
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder}: this network cannot be built here: {foreign.first_lines(error)}") from error


def assign(model: nn.Module, state: Tensors, unknown: Tensors, folder: str | Path) -> None:
    """Give a model on the meta device its own copy of the weights."""
    try:
        model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: the weights do not fit their config.json: {foreign.first_lines(error)}"
        ) from error
    if unknown:
        raise CheckpointError(f"{folder}: got unknown weights {sorted(unknown)}.")


def read_settings(folder: Path, class_name: str, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Read config.json of a network.

    Raises:
        CheckpointError: it describes another class, or has a setting with another value than `fixed` gives it.
    """
    path = folder / "config.json"
    settings = foreign.read_json(path)
    if settings.get("_class_name") != class_name:
        raise CheckpointError(f"{path}: got a {str(settings.get('_class_name'))[:100]}, expected a {class_name}.")
    foreign.check_fixed(settings, fixed, path)
    return settings
