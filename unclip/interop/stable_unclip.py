"""Whole stacks of `stable_unclip`: export to and import from folders of diffusers' StableUnCLIPPipeline. Diffusers itself is not
needed.

    model_index.json                                        class of the pipeline and of each part
    unet/, vae/, text_encoder/, tokenizer/, scheduler/      as for StableDiffusionPipeline (`unclip.interop.stable_diffusion`)
    prior/, prior_scheduler/                                text to image embeddings (`unclip.interop.prior`)
    prior_text_encoder/, prior_tokenizer/                   the CLIP's text tower with its projection
    image_normalizer/, image_noising_scheduler/             statistics of the embeddings, and the process that noises them

The prior's scheduler is a DDPMScheduler, as the pipeline does not tell an UnCLIPScheduler which timestep is next. Its steps are
those of the sampler "ddpm". The pipeline noises embeddings at level 0 too, by 0.6 % of their deviation for the cosine schedule.

A stack must be trained as for StableDiffusionPipeline, and its prior and CLIP as for UnCLIPPipeline (`unclip.interop.pipeline`).
Import reads what a stack can represent: one CLIP for prior and U-Net, and one diffusion process for latents and embeddings.
"""

import dataclasses
from pathlib import Path
from typing import Any

from unclip import foreign
from unclip.errors import CheckpointError, InputError
from unclip.interop import clip as clips
from unclip.interop import folders, schedulers, stable_diffusion
from unclip.interop import prior as priors
from unclip.interop.folders import DIFFUSERS_WEIGHTS
from unclip.interop.stable_diffusion import SCHEDULER, ImportedStack
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.latent_diffusion import ImageVector, LatentSampling
from unclip.models.prior import DiffusionPrior, PriorSampling
from unclip.models.text import caption_features
from unclip.systems.stable_unclip import STABLE_UNCLIP, StableUnclipSampling, StableUnclipStack
from unclip.systems.system import StackFiles

PIPELINE = "StableUnCLIPPipeline"
_PARTS = stable_diffusion.PARTS | {
    "image_noising_scheduler": ("diffusers", "DDPMScheduler"),
    "image_normalizer": ("stable_diffusion", "StableUnCLIPImageNormalizer"),
    "prior": ("diffusers", "PriorTransformer"),
    "prior_scheduler": ("diffusers", "DDPMScheduler"),
    "prior_text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "prior_tokenizer": ("transformers", "CLIPTokenizer"),
}
"""Part -> library and class."""

PIPELINE_SAMPLING = StableUnclipSampling(
    prior=PriorSampling(sampler="ddpm", num_steps=25, guidance_scale=4.0, num_candidates=1),
    stable_unclip=LatentSampling(num_steps=20, guidance_scale=10.0),
)
"""Defaults of the pipeline, and the sampling settings of imported stacks."""


def export_stack(stack: StableUnclipStack, folder: str | Path) -> list[str]:
    """Write a stack as a folder that diffusers can load and sample from; the folder is written completely or not at all.

    Args:
        folder: new or empty folder.

    Returns:
        Notes for the user on what the folder does not contain.

    Raises:
        InputError, ConfigError: the pipeline cannot represent the stack, or the folder is not empty. Nothing is written.
    """
    folders.check_new(Path(folder))
    stable_diffusion.check_exportable(stack)
    prior, image = stack.prior, stack.generator.image
    if not isinstance(prior, DiffusionPrior):
        raise InputError(
            "export: got an autoregressive prior, expected prior.kind = 'diffusion', as diffusers supports nothing else."
        )
    assert isinstance(image, ImageVector), "spatial Transformers read image embeddings as a vector"
    with folders.written_whole(Path(folder)) as scratch:
        stable_diffusion.write_parts(stack, scratch)
        clips.export_text(stack.clip, scratch / "prior_clip")
        for name in ("text_encoder", "tokenizer"):
            (scratch / "prior_clip" / name).rename(scratch / f"prior_{name}")
        (scratch / "prior_clip").rmdir()
        priors.export_prior(prior, scratch)
        folders.write_json(scratch / "prior_scheduler" / SCHEDULER, _prior_scheduler(prior))
        mean, std = image.statistics.affine()
        normalizer = {"_class_name": _PARTS["image_normalizer"][1], "embedding_dim": len(mean)}
        tensors = {"mean": mean[None], "std": std[None]}
        folders.write(scratch / "image_normalizer", normalizer, tensors, DIFFUSERS_WEIGHTS)
        noising = schedulers.describe(stack.generator.config.diffusion) | {"_class_name": "DDPMScheduler"}
        folders.write_json(scratch / "image_noising_scheduler" / SCHEDULER, noising)
        folders.write_index(scratch, PIPELINE, _PARTS)
    of_prior, ours = stack.sampling.prior, stack.sampling.stable_unclip
    return [
        f"Not stored in the folder: prior.num_steps {of_prior.num_steps} and guidance_scale {of_prior.guidance_scale}, "
        f"stable_unclip.num_steps {ours.num_steps}, guidance_scale {ours.guidance_scale} and noise_level {ours.noise_level}. "
        "Pass them when you call the pipeline. Its samplers are ddpm for the prior, of one candidate, and ddim, at timesteps "
        "that differ a little from those here.",
        *stable_diffusion.upsampler_notes(stack),
    ]


def import_stack(folder: str | Path) -> ImportedStack[StableUnclipStack]:
    """Read a stack from the folder of a StableUnCLIPPipeline, such as the output of `export_stack`; it embeds no images, as the
    pipeline has no image encoder.

    Args, Raises: those of `stable_diffusion.import_stack`.
    """
    folder = Path(folder)
    notes = stable_diffusion.check_index(folder, PIPELINE, _PARTS)
    clips.check_same_text_tower(folder, "text_encoder", "prior_text_encoder")
    clip, clip_config = clips.import_clip(folder, prefix="prior_")
    prior = priors.import_prior(folder, caption_features(clip, clip.tokenize([""])))
    statistics = _read_normalizer(folder / "image_normalizer")
    generator, autoencoder = stable_diffusion.read_parts(folder, clip, statistics)
    path = folder / "image_noising_scheduler" / SCHEDULER
    noising = stable_diffusion.diffusion_config(path)
    process = generator.config.diffusion
    if dataclasses.replace(noising, prediction_type=process.prediction_type) != process:
        raise CheckpointError(
            f"{path}: got another schedule, or another number of timesteps, than in scheduler/, expected the same, as a stack "
            "noises image embeddings by the process of its latents. Import another pipeline."
        )
    stack = StableUnclipStack(clip, prior, generator, autoencoder)
    stack.sampling = PIPELINE_SAMPLING
    return ImportedStack(stack.requires_grad_(False), clip_config, notes)


def save_imported(imported: ImportedStack[StableUnclipStack], folder: str | Path) -> None:
    """Write an imported stack as a local folder that `load_system` reads; `stack.json` is written last."""
    stack = imported.stack
    assert isinstance(stack.prior, DiffusionPrior), "diffusers has no other"
    priors.save_prior(stack.prior, stack.clip, PIPELINE, f"{folder}/prior")
    parts = stable_diffusion.save_parts(stack, STABLE_UNCLIP.name, PIPELINE, folder)
    models = {"prior": f"{folder}/prior", **parts}
    stable_diffusion.save_with_clip(imported, StackFiles(STABLE_UNCLIP.name, models), folder)


def _read_normalizer(folder: Path) -> EmbeddingStatistics:
    """Statistics of the image embeddings, [E]."""
    tensors = folders.read_weights(folder, DIFFUSERS_WEIGHTS)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    mean, std = (shapes.get(name, ()) for name in ("mean", "std"))
    if not (len(mean) == 2 and mean[0] == 1 and mean == std):
        raise CheckpointError(
            f"{folder / DIFFUSERS_WEIGHTS}: got {foreign.shorten(shapes)}, expected mean and std of [1, E]. The file is damaged."
        )
    statistics = EmbeddingStatistics(tensors["mean"][0], tensors["std"][0])
    statistics.check("image_normalizer")
    return statistics


def _prior_scheduler(prior: DiffusionPrior) -> dict[str, Any]:
    """Settings of the DDPMScheduler whose steps are those of `DiffusionPrior.sample` with the sampler "ddpm"."""
    clip_range = prior.config.clip_range
    return schedulers.describe(prior.config.diffusion) | {
        "_class_name": "DDPMScheduler",
        "clip_sample": clip_range is not None,
        "clip_sample_range": clip_range or 1.0,
        "timestep_spacing": "linspace",
        "variance_type": "fixed_small",
    }
