"""Whole stacks of `latent_diffusion`: export to and import from folders of diffusers' StableDiffusionPipeline. Diffusers itself
is not needed.

    model_index.json            class of the pipeline and of each part
    unet/                       the network of latents (`unclip.interop.latent_diffusion`)
    vae/                        the autoencoder (`unclip.interop.autoencoder`)
    text_encoder/, tokenizer/   the CLIP's text tower without its projection (`unclip.interop.clip`)
    scheduler/                  a DDIMScheduler of the same diffusion process

The pipeline scales all latents by one factor. Statistics that differ between channels are folded into the 1 x 1 convolutions
before and after the autoencoder's latents, which is exact, so that its latents are those that the network reads.

Exact: the same noise and captions give the same latents at the same timesteps. DDIM visits other timesteps here than in the
pipeline, whose scheduler steps over a fixed number of timesteps: 999, 949, ... for 20 steps, and 999, 946, ..., 0 here.

A stack must be trained with a network as in Stable Diffusion (`unclip.interop.latent_diffusion`), a plain CLIP, an autoencoder of
convolutions without patches, and fixed variances. Upsamplers are not written: the pipeline has none. Import reads pipelines whose
text encoder pads as Stable Diffusion 1 does, with end-of-text tokens. It leaves the safety checker out.

Letters: D latent channels.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from unclip import foreign
from unclip.config import to_dict
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.schedules import BETA_ENDS
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.interop import clip as clips
from unclip.interop import folders, schedulers
from unclip.interop import latent_diffusion as latents
from unclip.interop.autoencoder import Scaling, export_autoencoder, import_autoencoder
from unclip.models.autoencoder import Autoencoder, AutoencoderConfig
from unclip.models.clip import Clip, save_with_config
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.latent_diffusion import LatentDiffusion, LatentSampling
from unclip.models.text import caption_features
from unclip.systems.latent_diffusion import (
    LATENT_DIFFUSION,
    LatentDiffusionSampling,
    LatentDiffusionStack,
    LatentSystem,
)
from unclip.systems.system import ClipFiles, StackFiles, save_stack
from unclip.training import checkpoints

System = TypeVar("System", bound=LatentSystem)

PIPELINE = "StableDiffusionPipeline"
SCHEDULER = "scheduler_config.json"
PARTS = {
    "scheduler": ("diffusers", "DDIMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
"""Part -> library and class."""

_ABSENT = ("feature_extractor", "image_encoder", "safety_checker")
"""Parts of the pipeline that it also runs without."""

PIPELINE_SAMPLING = LatentDiffusionSampling(latent_diffusion=LatentSampling(num_steps=50, guidance_scale=7.5))
"""Defaults of the pipeline, and the sampling settings of imported stacks."""


def check_exportable(stack: LatentSystem) -> None:
    """Check that the pipeline can represent a stack, before anything is written.

    Raises:
        InputError: it cannot; names the first such setting, and the value to train with instead. The exports of autoencoder and
            CLIP make further checks.
    """
    latents.check_exportable(stack.generator)
    variance = stack.generator.config.diffusion.variance
    if variance == "learned_range":
        raise InputError(
            f"export: got a network of latents with diffusion.variance = {variance!r}, expected 'fixed_small' or 'fixed_large', "
            "as the pipeline reads no variances. Train with one of these to export."
        )
    if stack.autoencoder.config.bottleneck != "kl":
        raise InputError(
            f"export: got an autoencoder with bottleneck = {stack.autoencoder.config.bottleneck!r}, expected 'kl', as the "
            "pipeline has an AutoencoderKL. Train with that to export."
        )


def export_stack(stack: LatentDiffusionStack, folder: str | Path) -> list[str]:
    """Write a stack as a folder that diffusers can load and sample from; the folder is written completely or not at all.

    Args:
        folder: new or empty folder.

    Returns:
        Notes for the user on what the folder does not contain.

    Raises:
        InputError, ConfigError: the pipeline cannot represent the stack, or the folder is not empty. Nothing is written.
    """
    folders.check_new(Path(folder))
    check_exportable(stack)
    with folders.written_whole(Path(folder)) as scratch:
        write_parts(stack, scratch)
        absent: dict[str, Any] = {name: [None, None] for name in _ABSENT}
        folders.write_index(scratch, PIPELINE, PARTS, absent | {"requires_safety_checker": False})
    ours = stack.sampling.latent_diffusion
    return [
        f"Not stored in the folder: latent_diffusion.num_steps {ours.num_steps} and guidance_scale {ours.guidance_scale}. Pass "
        "them when you call the pipeline. It samples with DDIM, at timesteps that differ a little from those here.",
        *upsampler_notes(stack),
    ]


def write_parts(stack: LatentSystem, folder: Path) -> None:
    """Write the network of latents, the autoencoder, the text encoder, its tokenizer and the scheduler."""
    latents.export_latent_diffusion(stack.generator, folder / "unet")
    autoencoder, scaling = _scaled(stack.autoencoder, stack.generator)
    export_autoencoder(autoencoder, folder / "vae", scaling)
    clips.export_text(stack.clip, folder, with_projection=False)
    folders.write_json(folder / "scheduler" / SCHEDULER, _scheduler(stack.generator.config.diffusion))


def upsampler_notes(stack: LatentSystem) -> list[str]:
    """Notes for the user on upsamplers, which the pipelines do not have."""
    if not stack.upsamplers:
        return []
    names = ", ".join(upsampler.config.name for upsampler in stack.upsamplers)
    return [f"Not in the folder: {names}. The pipeline samples {stack.autoencoder.config.image_size} pixels."]


class ImportedStack(NamedTuple, Generic[System]):
    """Contents of a pipeline's folder."""

    stack: System
    clip_config: dict[str, Any]
    """CLIP's architecture in open_clip's format."""
    notes: list[str]
    """Sentences for the user on parts of the folder that the stack lacks."""


def import_stack(folder: str | Path) -> ImportedStack[LatentDiffusionStack]:
    """Read a stack from the folder of a StableDiffusionPipeline, such as Stable Diffusion 1 or the output of `export_stack`.

    Its CLIP reads captions alone: the pipeline has neither an image encoder nor the projection to embeddings.

    Args:
        folder: local folder; nothing in it is run.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit each other; names them.
        ConfigError, InputError: our stacks do not support the settings.
    """
    folder = Path(folder)
    notes = check_index(folder, PIPELINE, PARTS)
    clip, clip_config = clips.import_clip(folder, with_projection=False)
    stack = LatentDiffusionStack(clip, *read_parts(folder, clip))
    stack.sampling = PIPELINE_SAMPLING
    return ImportedStack(stack.requires_grad_(False), clip_config, notes)


def read_parts(
    folder: Path, clip: Clip, statistics: EmbeddingStatistics | None = None
) -> tuple[LatentDiffusion, Autoencoder]:
    """Read the network of latents with its diffusion process, and the autoencoder.

    Args:
        clip: that of the pipeline.
        statistics: those of the image embeddings that the network reads; None for a network that reads none.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit each other; names them.
    """
    _check_padding(folder / "tokenizer")
    autoencoder, scaling = import_autoencoder(folder / "vae")
    if autoencoder.config.bottleneck != "kl" or scaling.shift:
        raise CheckpointError(
            f"{folder}/vae/config.json: got an autoencoder {autoencoder.config.bottleneck!r} with shift_factor {scaling.shift}, "
            "expected an AutoencoderKL without shift, as the pipeline applies none."
        )
    null_text = caption_features(clip, clip.tokenize([""]), reads_padding=True)
    process = diffusion_config(folder / "scheduler" / SCHEDULER)
    generator = latents.import_latent_diffusion(
        folder / "unet", null_text, diffusion=process, latent_std=1 / scaling.factor, statistics=statistics
    )
    autoencoder.config = _with_latent_size(autoencoder.config, generator.config.unet.image_size, folder / "vae")
    return generator, autoencoder


def save_imported(imported: ImportedStack[LatentDiffusionStack], folder: str | Path) -> None:
    """Write an imported stack as a local folder that `load_system` reads; `stack.json` is written last."""
    stack = imported.stack
    parts = save_parts(stack, LATENT_DIFFUSION.name, PIPELINE, folder)
    save_with_clip(imported, StackFiles(LATENT_DIFFUSION.name, parts), folder)


def save_with_clip(imported: ImportedStack[System], files: StackFiles, folder: str | Path) -> None:
    """Write the CLIP, and last `stack.json`, of a stack whose other parts are written."""
    stack = imported.stack
    save_with_config(stack.clip.model, imported.clip_config, Path(folder, "clip"))
    clip = ClipFiles(f"local-dir:{folder}/clip", image_embeddings=stack.clip.image_embeddings)
    save_stack(str(folder), dataclasses.replace(files, clip=clip, sampling=to_dict(stack.sampling)))


def save_parts(stack: LatentSystem, kind: str, pipeline: str, folder: str | Path) -> dict[str, str]:
    """Write the network of latents and the autoencoder of an imported stack; return their folders by name.

    Args:
        kind: name of the network's part.
        pipeline: class of the pipeline that they are from.
    """
    generator, autoencoder = stack.generator, stack.autoencoder
    facts: dict[str, Any] = {"kind": "autoencoder", "config": to_dict(autoencoder.config), "imported": pipeline}
    generator.autoencoder_digest = checkpoints.save(f"{folder}/autoencoder", {"model": autoencoder.state_dict()}, facts)
    facts = {
        "kind": kind,
        "config": to_dict(generator.config),
        "embedding_dim": stack.clip.embedding_dim,
        "text_shape": None if generator.text_shape is None else to_dict(generator.text_shape),
        "autoencoder": generator.autoencoder_digest,
        "imported": pipeline,
    }
    checkpoints.save(f"{folder}/{kind}", {"model": generator.state_dict()}, facts)
    return {name: f"{folder}/{name}" for name in ("autoencoder", kind)}


def _with_latent_size(config: AutoencoderConfig, size: int, folder: Path) -> AutoencoderConfig:
    """The same convolutions for latents of another size, as published autoencoders are trained on smaller images."""
    image_size = size * config.factor
    if config.attention_resolutions and config.image_size != image_size:
        raise CheckpointError(
            f"{folder}/config.json: got sample_size = {config.image_size} and blocks with attention, expected sample_size = "
            f"{image_size}, {config.factor} times that of the U-Net."
        )
    return dataclasses.replace(config, image_size=image_size)


def _scaled(autoencoder: Autoencoder, generator: LatentDiffusion) -> tuple[Autoencoder, Scaling]:
    """Autoencoder in evaluation mode and the pipeline's factor, so that their product is what the network reads."""
    mean, std = (value.cpu() for value in (generator.latent_mean, generator.latent_std))  # 2 x [D]
    if not mean.any() and bool((std == std[0]).all()):
        return autoencoder, Scaling(1 / float(std[0]))
    return with_normalised_latents(autoencoder, mean, std), Scaling()


def with_normalised_latents(autoencoder: Autoencoder, mean: Tensor, std: Tensor) -> Autoencoder:
    """Convert a KL autoencoder to one whose latents are (latents - mean) / std, for the same images.

    Args:
        mean, std: [D].
    """
    mean, std = mean.double(), std.double()
    state = {name: value.cpu() for name, value in autoencoder.state_dict().items()}
    names = ("to_bottleneck.weight", "to_bottleneck.bias", "from_bottleneck.weight", "from_bottleneck.bias")
    weight, bias, out_weight, out_bias = (state[name].double() for name in names)
    # the posterior's means, then its log-variances: [2 D, 2 D, 1, 1] and [2 D]
    weight = torch.cat([weight[: len(std)] / std[:, None, None, None], weight[len(std) :]])
    bias = torch.cat([(bias[: len(std)] - mean) / std, bias[len(std) :] - 2 * std.log()])
    out_bias = out_bias + out_weight[:, :, 0, 0] @ mean
    out_weight = out_weight * std[:, None, None]
    state |= {name: value.float() for name, value in zip(names, (weight, bias, out_weight, out_bias), strict=True)}
    with torch.device("meta"):
        normalised = Autoencoder(autoencoder.config)
    normalised.load_state_dict(state, assign=True)
    return normalised.eval()


def _scheduler(process: DiffusionConfig) -> dict[str, Any]:
    """Settings of a DDIMScheduler. Its timesteps are evenly spaced from the noisiest (Lin et al. 2023, section 3.3)."""
    return schedulers.describe(process) | {
        "_class_name": PARTS["scheduler"][1],
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # without effect; the pipeline warns of other values
        "timestep_spacing": "trailing",
        "thresholding": False,
        "trained_betas": None,
    }


@dataclasses.dataclass(frozen=True)
class _Scheduler:
    """Settings of a scheduler that are read, with the defaults of diffusers; all others are about sampling."""

    _class_name: Literal[
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ]
    num_train_timesteps: foreign.Timesteps = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    rescale_betas_zero_snr: bool = False
    trained_betas: None = None


def diffusion_config(path: Path) -> DiffusionConfig:
    """Read the diffusion process from a scheduler's file."""
    scheduler = foreign.read(_Scheduler, foreign.read_json(path), path, ignore_others=True)
    ours = {theirs: name for name, theirs in schedulers.SCHEDULES.items()}[scheduler.beta_schedule]
    predictions = {theirs: name for name, theirs in schedulers.PREDICTION_TYPES.items()}
    scale = scheduler.num_train_timesteps / 1000
    ends = scale * scheduler.beta_start, scale * scheduler.beta_end
    if ours in BETA_ENDS and any(abs(got / end - 1) > 1e-6 for got, end in zip(ends, BETA_ENDS[ours], strict=True)):
        raise CheckpointError(
            f"{path}: got betas from {scheduler.beta_start} to {scheduler.beta_end}, expected {BETA_ENDS[ours]} for 1,000 "
            f"timesteps of the schedule {ours!r}, as nothing else is supported here."
        )
    try:
        return DiffusionConfig(
            num_timesteps=scheduler.num_train_timesteps,
            schedule=ours,
            prediction_type=predictions[scheduler.prediction_type],
            zero_terminal_snr=scheduler.rescale_betas_zero_snr,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_index(folder: Path, pipeline: str, parts: Mapping[str, tuple[str, str]]) -> list[str]:
    """Check that a folder holds a pipeline with all parts that are read; return notes on those that are not.

    Args:
        parts: part -> library and class. A scheduler may have any class, as its file is checked.
    """
    path = folder / "model_index.json"
    index = foreign.read_json(path)
    if index.get("_class_name") != pipeline:
        raise CheckpointError(f"{path}: got a {foreign.shorten(index.get('_class_name'))}, expected a {pipeline}.")
    for name, (_, expected) in parts.items():
        entry = index.get(name)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        is_other = not name.endswith("scheduler") and found not in (expected, f"{expected}Fast")
        if not isinstance(found, str) or is_other:
            raise CheckpointError(f"{path}: got {name} = {foreign.shorten(entry)}, expected a {expected}.")
    left_out = [name for name in ("image_encoder", "safety_checker") if index.get(name) not in (None, [None, None])]
    return [f"Not imported: {', '.join(left_out)}."] if left_out else []


def _check_padding(folder: Path) -> None:
    """Check that a tokenizer pads with end-of-text tokens, as the network reads padding."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = foreign.read_json(folder / name).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token not in (None, clips.END):
                raise CheckpointError(
                    f"{folder / name}: got pad_token = {foreign.shorten(token)}, expected {clips.END!r}, as Stable Diffusion 1. "
                    "The network reads padding, and nothing else is supported here."
                )
