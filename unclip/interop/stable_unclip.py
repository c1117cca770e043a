"""Whole stacks of `stable_unclip`: export to folders of diffusers' StableUnCLIPPipeline. Diffusers itself is not needed.

    model_index.json                                        class of the pipeline and of each part
    unet/, vae/, text_encoder/, tokenizer/, scheduler/      as for StableDiffusionPipeline (`unclip.interop.stable_diffusion`)
    prior/, prior_scheduler/                                text to image embeddings (`unclip.interop.prior`)
    prior_text_encoder/, prior_tokenizer/                   the CLIP's text tower with its projection
    image_normalizer/, image_noising_scheduler/             statistics of the embeddings, and the process that noises them

The prior's scheduler is a DDPMScheduler, as the pipeline does not tell an UnCLIPScheduler which timestep is next. Its steps are
those of the sampler "ddpm". The pipeline noises embeddings at level 0 too, by 0.6 % of their deviation for the cosine schedule.

A stack must be trained as for StableDiffusionPipeline, and its prior and CLIP as for UnCLIPPipeline (`unclip.interop.pipeline`).
"""

from pathlib import Path
from typing import Any

from unclip.errors import InputError
from unclip.interop import clip as clips
from unclip.interop import folders, schedulers, stable_diffusion
from unclip.interop import prior as priors
from unclip.interop.folders import DIFFUSERS_WEIGHTS
from unclip.interop.stable_diffusion import SCHEDULER
from unclip.models.latent_diffusion import ImageVector
from unclip.models.prior import DiffusionPrior
from unclip.systems.stable_unclip import StableUnclipStack

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
