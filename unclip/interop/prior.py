"""The diffusion prior: export to and import from diffusers' `PriorTransformer`, as its UnCLIPPipeline uses it.

Exact in both directions: weights, normalisation (clip_mean, clip_std), the empty caption as unconditional input, the clip
range of x0 and the sampling steps. Refused, because diffusers would compute something else: a unit-norm text embedding (its
text encoder returns the unnormalised projection), self-conditioning, dropped image embeddings, a clamped norm, a prior without
text encodings, v-prediction, any schedule but cosine, any variance but the posterior's, and a text encoder whose width differs
from that of the embeddings. Diffusers has no autoregressive prior.

Diffusers itself is not needed: a folder holds `config.json` and `diffusion_pytorch_model.safetensors`.

Letters: L text tokens, W width of the CLIP text encoder, E CLIP embedding width, D width of the prior.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from unclip import foreign
from unclip.config import to_dict
from unclip.diffusion.process import DiffusionConfig, PredictionType
from unclip.errors import CheckpointError, ConfigError
from unclip.interop import folders
from unclip.interop.folders import DIFFUSERS_WEIGHTS as WEIGHTS
from unclip.models.clip import Clip
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.text import CaptionFeatures
from unclip.training import checkpoints

_PREDICTION_TYPES: dict[PredictionType, str] = {"x0": "sample", "eps": "epsilon"}

KARLO_SCHEDULER = {"_class_name": "UnCLIPScheduler", "prediction_type": "sample", "clip_sample_range": 5.0}
"""Settings of the prior's scheduler in diffusers' conversion of Karlo; missing ones have the scheduler's defaults."""


@dataclasses.dataclass(frozen=True)
class _Transformer:
    """Settings of a PriorTransformer that are read; the others have one supported value each (`_config_of`)."""

    num_attention_heads: foreign.Size = 32
    attention_head_dim: foreign.Size = 64
    num_layers: foreign.Depth = 20
    embedding_dim: foreign.Size = 768
    num_embeddings: foreign.Size = 77


@dataclasses.dataclass(frozen=True)
class _Scheduler:
    """Settings of its UnCLIPScheduler that are read."""

    num_train_timesteps: foreign.Timesteps = 1000
    clip_sample: bool = True
    clip_sample_range: Annotated[float, foreign.Range(1e-6, 1e6)] = 1.0


_LAYERS = {
    "text.from_text_encodings": "encoder_hidden_states_proj",
    "text.norm": "embedding_proj_norm",
    "text.from_text_embedding": "embedding_proj",
    "from_timestep.layers.0": "time_embedding.linear_1",
    "from_timestep.layers.2": "time_embedding.linear_2",
    "from_image_embedding": "proj_in",
    "transformer.norm_in": "norm_in",
    "transformer.norm": "norm_out",
    "to_image_embedding": "proj_to_clip_embeddings",
}
"""Our layers with weight and bias -> diffusers' layers."""

_BLOCK_LAYERS = {
    "attention_norm": ("norm1",),
    "to_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "to_out": ("attn1.to_out.0",),
    "mlp_norm": ("norm3",),
    "mlp.0": ("ff.net.0.proj",),
    "mlp.2": ("ff.net.2",),
}
"""Our layers within a block -> diffusers' layers; if several, ours has their rows stacked."""

_TENSORS = {
    "query": ("prd_embedding", 2),
    "positions": ("positional_embedding", 1),
    "statistics.mean": ("clip_mean", 1),
    "statistics.std": ("clip_std", 1),
}
"""Our other tensors -> diffusers' tensors, and their number of extra leading dimensions of size one."""


def to_diffusers(prior: DiffusionPrior) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights (float32) of the equivalent `PriorTransformer`.

    Raises:
        ConfigError: diffusers cannot represent the prior; see the module.
        InputError: the prior was never given the statistics of a dataset.
    """
    config = prior.config
    text_length, text_width = prior.text.null_encodings.shape
    embedding_dim = len(prior.text.null_embedding)
    _check_export(config.text_norm != "unit", "text_norm", config.text_norm, "'none' or 'layer'")
    _check_export(not config.self_conditioning, "self_conditioning", True, "false")
    _check_export(not config.image_drop_prob, "image_drop_prob", config.image_drop_prob, "0")
    _check_export(not config.clamp_norm, "clamp_norm", True, "false")
    _check_export(config.text_encodings, "text_encodings", False, "true")
    same_width = f"that of its embeddings, {embedding_dim}"
    _check_export(text_width == embedding_dim, "width of the text encoder", text_width, same_width)
    prior.statistics.check("prior")
    settings = {
        "_class_name": "PriorTransformer",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.width // config.num_heads,
        "num_layers": config.depth,
        "embedding_dim": embedding_dim,
        "num_embeddings": text_length,
        "additional_embeddings": 4,
        "norm_in_type": "layer" if config.norm_in else None,
        "embedding_proj_norm_type": "layer" if config.text_norm == "layer" else None,
    }
    ours = dict(prior.state_dict())
    ours["statistics.mean"], ours["statistics.std"] = prior.statistics.affine()
    theirs: dict[str, Tensor] = {}
    for name, parts in _layers(config):
        theirs.update(zip(parts, ours[name].chunk(len(parts)), strict=True))
    for name, (other, leading) in _TENSORS.items():
        theirs[other] = ours[name][(None,) * leading]
    return settings, {name: value.detach().cpu().float().clone() for name, value in theirs.items()}


def from_diffusers(
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    null_text: CaptionFeatures,
    scheduler: Mapping[str, Any] = KARLO_SCHEDULER,
) -> DiffusionPrior:
    """Build the prior that is equivalent to a `PriorTransformer`, in float32.

    Args:
        settings: content of config.json.
        weights: state dict, in any precision.
        null_text: features of the empty caption from the text encoder that it was trained with, a batch of one.
        scheduler: content of the pipeline's `prior_scheduler/scheduler_config.json`.

    Raises:
        ConfigError: our prior does not support these settings.
        InputError: clip_mean or clip_std were never set, as in every new PriorTransformer.
        CheckpointError: the weights do not fit the settings.
    """
    transformer = foreign.read(_Transformer, settings, "PriorTransformer", ignore_others=True)
    folders.check_depth("PriorTransformer", settings, "num_layers", weights)
    config, embedding_dim = _config_of(transformer, settings, scheduler), transformer.embedding_dim
    try:
        with torch.device("meta"):  # so that damaged settings cannot allocate memory
            prior = DiffusionPrior(config, embedding_dim, embedding_dim, transformer.num_embeddings)
        expected = prior.state_dict()
        ours = {name: torch.cat([weights[part] for part in parts]) for name, parts in _layers(config)}
        ours |= {name: weights[other].reshape(expected[name].shape) for name, (other, _) in _TENSORS.items()}
        null = {f"text.null_{name.removeprefix('text_')}": value[0] for name, value in null_text._asdict().items()}
        state = {name: value.to(expected[name].dtype).clone() for name, value in {**null, **ours}.items()}
        prior.load_state_dict(state, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"PriorTransformer: the weights do not fit its config.json: {foreign.first_lines(error)}"
        ) from error
    prior.statistics.check("clip_mean and clip_std")
    return prior.eval().requires_grad_(False)


def scheduler_config(prior: DiffusionPrior) -> dict[str, Any]:
    """Settings of the `UnCLIPScheduler` whose steps are those of `DiffusionPrior.sample`.

    Raises:
        ConfigError: the scheduler does not support the process.
    """
    diffusion = prior.config.diffusion
    _check_export(diffusion.schedule == "cosine", "diffusion.schedule", diffusion.schedule, "'cosine'")
    _check_export(not diffusion.zero_terminal_snr, "diffusion.zero_terminal_snr", True, "false")
    _check_export(diffusion.variance == "fixed_small", "diffusion.variance", diffusion.variance, "'fixed_small'")
    supported = diffusion.prediction_type in _PREDICTION_TYPES
    _check_export(supported, "diffusion.prediction_type", diffusion.prediction_type, "'x0' or 'eps'")
    return {
        "_class_name": "UnCLIPScheduler",
        "num_train_timesteps": diffusion.num_timesteps,
        "variance_type": "fixed_small_log",
        "clip_sample": prior.config.clip_range is not None,
        "clip_sample_range": prior.config.clip_range or 1.0,
        "prediction_type": _PREDICTION_TYPES[diffusion.prediction_type],
        "beta_schedule": "squaredcos_cap_v2",
    }


def export_prior(prior: DiffusionPrior, folder: str | Path) -> None:
    """Write a prior as `prior/` and `prior_scheduler/` in a local folder.

    Raises:
        ConfigError: see `to_diffusers` and `scheduler_config`; nothing is written.
    """
    folder = Path(folder)
    settings, weights = to_diffusers(prior)
    scheduler = scheduler_config(prior)
    folders.write(folder / "prior", settings, weights, WEIGHTS)
    folders.write_json(folder / "prior_scheduler" / "scheduler_config.json", scheduler)


def import_prior(folder: str | Path, null_text: CaptionFeatures) -> DiffusionPrior:
    """Read a prior from `prior/` and `prior_scheduler/` in a local folder; see `from_diffusers`.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    folder = Path(folder)
    settings = foreign.read_json(folder / "prior" / "config.json")
    scheduler = foreign.read_json(folder / "prior_scheduler" / "scheduler_config.json")
    weights = folders.read_weights(folder / "prior", WEIGHTS)
    return from_diffusers(settings, weights, null_text, scheduler)


def save_prior(prior: DiffusionPrior, clip: Clip, pipeline: str, folder: str | Path) -> None:
    """Write an imported prior as a model folder.

    Args:
        clip: that of its stack.
        pipeline: class of the pipeline that it is from.
    """
    sizes = {"embedding_dim": clip.embedding_dim, "text_width": clip.text_width, "text_length": clip.text_length}
    facts = {"kind": "prior", "config": to_dict(prior.config), **sizes, "imported": pipeline}
    checkpoints.save(str(folder), {"model": prior.state_dict()}, facts)


def _layers(config: PriorConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Pairs of a tensor of our layers and the diffusers' tensors it is made of."""
    absent = {"text.norm": config.text_norm != "layer", "transformer.norm_in": not config.norm_in}
    layers: dict[str, tuple[str, ...]] = {name: (other,) for name, other in _LAYERS.items() if not absent.get(name)}
    for number in range(config.depth):
        for name, others in _BLOCK_LAYERS.items():
            layers[f"transformer.blocks.{number}.{name}"] = tuple(
                f"transformer_blocks.{number}.{other}" for other in others
            )
    for name, others in layers.items():
        for kind in ("weight", "bias"):
            yield f"{name}.{kind}", tuple(f"{other}.{kind}" for other in others)


def _config_of(transformer: _Transformer, settings: Mapping[str, Any], scheduler: Mapping[str, Any]) -> PriorConfig:
    num_heads, embedding_dim = transformer.num_attention_heads, transformer.embedding_dim
    width = num_heads * transformer.attention_head_dim
    supported = {
        "additional_embeddings": (4,),
        "dropout": (0.0,),
        "time_embed_act_fn": ("silu",),
        "norm_in_type": (None, "layer"),
        "embedding_proj_norm_type": (None, "layer"),
        "encoder_hid_proj_type": ("linear",),
        "added_emb_type": ("prd",),
        "time_embed_dim": (None, width),
        "embedding_proj_dim": (None, embedding_dim),
        "clip_embed_dim": (None, embedding_dim),
    }
    for name, allowed in supported.items():
        _check_import(
            settings.get(name, allowed[0]) in allowed, f"PriorTransformer.{name}", settings.get(name), allowed
        )
    predictions = {other: ours for ours, other in _PREDICTION_TYPES.items()}
    is_ddpm = scheduler.get("_class_name") == "DDPMScheduler"
    variance = "fixed_small" if is_ddpm else "fixed_small_log"  # two names for the posterior's
    for name, default, allowed in (
        ("_class_name", "UnCLIPScheduler", ("UnCLIPScheduler", "DDPMScheduler")),
        ("prediction_type", "epsilon", tuple(predictions)),
        ("variance_type", variance, (variance,)),
        ("beta_schedule", "linear" if is_ddpm else "squaredcos_cap_v2", ("squaredcos_cap_v2",)),
        ("rescale_betas_zero_snr", False, (False,)),
        ("thresholding", False, (False,)),
    ):
        got = scheduler.get(name, default)
        _check_import(got in allowed, f"prior_scheduler.{name}", got, allowed)
    process = foreign.read(_Scheduler, scheduler, "prior_scheduler", ignore_others=True)
    return PriorConfig(
        width=width,
        depth=transformer.num_layers,
        num_heads=num_heads,
        diffusion=DiffusionConfig(
            num_timesteps=process.num_train_timesteps,
            prediction_type=predictions[scheduler.get("prediction_type", "epsilon")],
        ),
        clip_range=process.clip_sample_range if process.clip_sample else None,
        text_norm="layer" if settings.get("embedding_proj_norm_type") == "layer" else "none",
        norm_in=settings.get("norm_in_type") == "layer",
    )


def _check_export(condition: bool, setting: str, got: object, expected: str) -> None:
    if not condition:
        raise ConfigError(
            f"{setting}: got {got!r}, expected {expected}, as diffusers supports nothing else. "
            "Train a prior with that setting to export it."
        )


def _check_import(condition: bool, setting: str, got: object, allowed: tuple[Any, ...]) -> None:
    if not condition:
        expected = " or ".join(map(repr, allowed))
        raise ConfigError(
            f"{setting}: got {foreign.shorten(got)}, expected {expected}. This prior is not supported here; import another one."
        )
