"""Tiny parts of the systems that sample latents: their objectives, rows to train on, and stacks."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.unclip.systems.tiny_stacks import fill_zeros
from unclip.config import to_dict
from unclip.data import half_bytes
from unclip.diffusion.process import DiffusionConfig
from unclip.models import clip as clip_models
from unclip.models.autoencoder import Autoencoder, AutoencoderConfig
from unclip.models.clip import Clip
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.latent_diffusion import LatentDiffusionConfig, LatentSampling
from unclip.models.prior import DiffusionPrior, PriorConfig, PriorSampling
from unclip.models.text import TextTransformerConfig
from unclip.models.unet import UNetConfig
from unclip.systems.latent_diffusion import (
    LatentDiffusionObjective,
    LatentDiffusionSampling,
    LatentDiffusionStageConfig,
)
from unclip.systems.stable_unclip import StableUnclipSampling, StableUnclipStageConfig
from unclip.systems.system import ClipFiles, StackFiles, save_stack
from unclip.systems.unclip.prior import PriorObjective
from unclip.training import checkpoints

AUTOENCODER = AutoencoderConfig(
    image_size=16, channels=8, channel_mult=(1, 1), num_res_blocks=1, norm_groups=4, middle_attention=False
)
"""Latents [4, 8, 8] of 16 pixels."""
MODEL = LatentDiffusionConfig(
    UNetConfig(8, 8, (1, 2), 1, attention_resolutions=(4,), head_channels=8, norm_groups=4),
    context_dim=16,
    text="transformer",
    text_transformer=TextTransformerConfig(16, 1, 2),
    diffusion=DiffusionConfig(prediction_type="v"),
)
_SAMPLING = LatentSampling(num_steps=4, guidance_scale=2.0)
CONFIGS = {
    "latent_diffusion": LatentDiffusionStageConfig(MODEL, preview=_SAMPLING),
    "stable_unclip": StableUnclipStageConfig(
        dataclasses.replace(MODEL, text="clip", reads_image_embedding=True, max_noise_level=500), preview=_SAMPLING
    ),
}
SAMPLING = {
    "latent_diffusion": LatentDiffusionSampling(latent_diffusion=_SAMPLING, precision="fp32"),
    "stable_unclip": StableUnclipSampling(prior=PriorSampling(num_steps=2), stable_unclip=_SAMPLING, precision="fp32"),
}
MEAN, STD = [0.5, -1.0, 0.0, 2.0], [1.0, 0.5, 2.0, 4.0]
FACTS = {"latent_shape": [4, 8, 8], "mean": MEAN, "std": STD}


def tiny_clip() -> Clip:
    torch.manual_seed(0)
    return Clip(clip_models.create("unclip-demo", None), "unclip-demo")


def tiny_autoencoder() -> Autoencoder:
    torch.manual_seed(1)
    return Autoencoder(AUTOENCODER).eval().requires_grad_(False)


def statistics(clip: Clip) -> EmbeddingStatistics:
    embeddings = torch.randn(50, clip.embedding_dim, generator=torch.Generator().manual_seed(0))
    return EmbeddingStatistics.of(F.normalize(embeddings, dim=1))


def rows(clip: Clip, batch: int = 8) -> dict[str, list[Any]]:
    """Rows of the tables of latents and of embeddings; latents have the mean and the deviation of `FACTS`."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(batch, 4, 8, 8))
    latents = noise * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
    embedding = F.normalize(torch.from_numpy(generator.normal(size=(batch, clip.embedding_dim))).float(), dim=1)
    return {
        "key": [str(number) for number in range(batch)],
        "latent": [half_bytes(each) for each in latents],
        "tokens": [tokens.int().numpy() for tokens in clip.tokenize([f"image number {n}" for n in range(batch)])],
        "image_embedding": list(embedding.numpy()),
    }


def objective(kind: str, clip: Clip, digest: str = "d1", **changes: Any) -> LatentDiffusionObjective:
    """Args: changes: settings of the network that differ."""
    config = CONFIGS[kind]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    torch.manual_seed(0)
    return LatentDiffusionObjective(
        kind, config, clip, statistics(clip), FACTS, tiny_autoencoder(), digest, rows(clip, 2)
    )


def publish(kind: str, folder: Path, clip: Clip) -> StackFiles:
    """Write the parts of a stack, and the stack itself to `folder`/stack; returns the files of the parts."""
    clip_models.save(clip.model, "unclip-demo", folder / "clip")
    saved = {"samples_seen": 1}
    autoencoder = {"kind": "autoencoder", "config": to_dict(AUTOENCODER)}
    checkpoints.save(f"{folder}/autoencoder", {"model": tiny_autoencoder().state_dict()}, saved | autoencoder)
    generator = objective(kind, clip, checkpoints.digest(f"{folder}/autoencoder"))
    model = fill_zeros(generator.model).state_dict()
    checkpoints.save(f"{folder}/{kind}", {"model": model}, saved | generator.facts())
    names = ["autoencoder", kind]
    if kind == "stable_unclip":
        torch.manual_seed(0)
        prior = PriorObjective(PriorConfig(width=16, depth=1, num_heads=2), clip, statistics(clip))
        assert isinstance(prior.model, DiffusionPrior)
        weights = fill_zeros(prior.model).state_dict()
        checkpoints.save(f"{folder}/prior", {"model": weights}, saved | prior.facts())
        names.append("prior")
    models = {name: f"{folder}/{name}" for name in names}
    files = StackFiles(kind, models, ClipFiles(f"local-dir:{folder}/clip"), None, to_dict(SAMPLING[kind]))
    save_stack(f"{folder}/stack", files)
    return files
