"""Untrained models of image tokens with an autoencoder of 16 pixels and the demo's CLIP."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.config import to_dict
from unclip.models import clip as clip_models
from unclip.models.autoencoder import Autoencoder, AutoencoderConfig
from unclip.models.clip import Clip
from unclip.models.dalle import Dalle, DalleConfig
from unclip.models.parti import Parti, PartiConfig
from unclip.models.token_transformer import TokenSampling
from unclip.systems.dalle import DALLE, DalleSampling
from unclip.systems.parti import PARTI, PartiSampling
from unclip.systems.system import ClipFiles, StackFiles, save_stack
from unclip.systems.tokens import TokenObjective
from unclip.training import checkpoints

AUTOENCODER = AutoencoderConfig(
    image_size=16,
    channels=8,
    channel_mult=(1, 1, 1),
    num_res_blocks=1,
    middle_attention=False,
    norm_groups=4,
    latent_channels=4,
    bottleneck="vq",
    codebook_size=12,
)
"""16 tokens."""
SIZES: dict[str, Any] = {"width": 16, "num_heads": 2, "text_vocab_size": 24, "grid_size": 4, "codebook_size": 12}
CAPTIONS = ["a small red circle", "a large blue star at the top", "a tiny green cross"]
PARTS = {"dalle": DALLE, "parti": PARTI}
KINDS = list(PARTS)


def demo_clip() -> Clip:
    torch.manual_seed(0)
    return Clip(clip_models.create("unclip-demo", None), "unclip-demo")


def autoencoder(**changes: Any) -> Autoencoder:
    torch.manual_seed(1)
    model = Autoencoder(dataclasses.replace(AUTOENCODER, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def model(kind: str, text_length: int = 24, **changes: Any) -> Dalle | Parti:
    torch.manual_seed(2)
    settings = {**SIZES, "depth": 2, "cond_drop_prob": 0.1, **changes}
    if kind == "dalle":
        return Dalle(DalleConfig(**settings), text_length)
    return Parti(PartiConfig(encoder_depth=1, **settings), text_length)


def rows(clip: Clip, batch: int = 16) -> dict[str, list[Any]]:
    """Rows with captions and codes that differ from each other."""
    generator = np.random.default_rng(0)
    captions = [f"{CAPTIONS[number % 3]} number {number}" for number in range(batch)]
    return {
        "tokens": [tokens.int().numpy() for tokens in clip.tokenize(captions)],
        "codes": list(generator.integers(0, 12, (batch, 16), np.int32)),
    }


def objective(kind: str, clip: Clip, **changes: Any) -> TokenObjective:
    given = rows(clip)
    preview = {name: values[:2] for name, values in given.items()}
    captions = torch.from_numpy(np.stack(given["tokens"])).long()
    return TokenObjective(kind, model(kind, clip.text_length, **changes), clip, autoencoder(), captions, preview)


def sampling(kind: str, **changes: Any) -> Any:
    """Sampling settings of a system."""
    settings = TokenSampling(**{"num_candidates": 3, "guidance_scale": 1.5, **changes})
    return DalleSampling(dalle=settings) if kind == "dalle" else PartiSampling(parti=settings)


def publish(folder: Path, kind: str, clip: Clip) -> Path:
    """Write a stack to `folder`/stack."""
    clip_models.save(clip.model, "unclip-demo", folder / "clip")
    trained = objective(kind, clip)
    parts: dict[str, tuple[torch.nn.Module, dict[str, Any]]] = {
        "autoencoder": (autoencoder(), {"kind": "autoencoder", "config": to_dict(AUTOENCODER)}),
        kind: (trained.model, trained.facts()),
    }
    for name, (network, facts) in parts.items():
        checkpoints.save(str(folder / name), {"model": network.state_dict()}, {**facts, "samples_seen": 1})
    models = {name: str(folder / name) for name in parts}
    clip_files = ClipFiles(f"local-dir:{folder}/clip")
    save_stack(str(folder / "stack"), StackFiles(kind, models, clip_files, None, to_dict(sampling(kind))))
    return folder / "stack"


def text_tokens(clip: Clip, captions: Sequence[str] = CAPTIONS) -> Tensor:
    return clip.tokenize(list(captions))
