"""A stack of a few thousand untrained weights, for tests: it draws noise, by the same rules as any other."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from unclip import checkpoints, clip
from unclip.clip import Clip
from unclip.config import to_dict
from unclip.decoder import Decoder, DecoderConfig
from unclip.diffusion import DiffusionConfig
from unclip.embeddings import EmbeddingStatistics, PrincipalComponents
from unclip.generation import SamplingConfig, Stack, save_stack
from unclip.prior import DiffusionPrior, PriorConfig
from unclip.text import TextShape
from unclip.unet import UNetConfig
from unclip.upsampler import Upsampler, UpsamplerConfig

ARCHITECTURE = "unclip-demo"
UNET = UNetConfig(
    8, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_channels=8, norm_groups=4
)
SMALLEST = UNetConfig(8, channels=4, channel_mult=(1, 1), num_res_blocks=1, norm_groups=2)
SAMPLING = SamplingConfig(
    prior_steps=3, decoder_steps=6, guidance_scale=1.5, inversion_iterations=2, upsampler_steps=2, precision="fp32"
)


def awake(model: Any) -> Any:
    """Zero-initialised layers hide what is wired to what, so give them weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.06)
    return model.eval().requires_grad_(False)


def publish(folder: Path, **decoder: Any) -> Path:
    """Write a stack that draws pictures of 16 x 16 pixels to `folder`/stack, and say in `folder` that it was published.

    Args:
        decoder: settings of `DecoderConfig` besides the network.
    """
    torch.manual_seed(0)
    clip.save(clip.create(ARCHITECTURE, None), ARCHITECTURE, folder / "models" / "clip")
    loaded = Clip.load(f"local-dir:{folder}/models/clip")
    width, length = loaded.embedding_dim, loaded.text_length
    # around what this CLIP says of pictures, so that a decoder tells them apart
    embeddings = loaded.embed_images(torch.randn(64, 3, 64, 64)).repeat(4, 1)
    embeddings = embeddings + torch.randn(embeddings.shape) * 0.002
    statistics = EmbeddingStatistics.of(embeddings)

    text_shape = TextShape(length, loaded.text_width, loaded.vocab_size)
    config = DecoderConfig(UNET, context_dim=8, diffusion=DiffusionConfig(prediction_type="v"), **decoder)
    upsampler = UpsamplerConfig(SMALLEST, low_res_size=8, scale=2, diffusion=DiffusionConfig(prediction_type="x0"))
    prior = PriorConfig(width=16, depth=1, num_heads=2)
    text = {"embedding_dim": width, "text_width": loaded.text_width, "text_length": length}
    models: dict[str, tuple[Any, dict[str, Any]]] = {
        "prior": (DiffusionPrior(prior, width, loaded.text_width, length), {"config": to_dict(prior), **text}),
        "decoder": (
            Decoder(config, width, text_shape),
            {"config": to_dict(config), "embedding_dim": width, "text_shape": to_dict(text_shape)},
        ),
        "upsampler": (Upsampler(upsampler), {"config": to_dict(upsampler)}),
    }
    for name, (model, facts) in models.items():
        if hasattr(model, "statistics"):
            model.statistics.load_state_dict(statistics.state_dict())
        state = awake(model).state_dict()
        checkpoints.save(f"{folder}/models/{name}", {"model": state}, {"kind": name, "samples_seen": 1, **facts})
    pca = PrincipalComponents.of(embeddings)._asdict()
    checkpoints.save(f"{folder}/models/statistics", {"statistics": dict(statistics.state_dict()), "pca": pca}, {})

    sources = {name: f"{folder}/models/{name}" for name in (*models, "statistics", "clip")}
    save_stack(f"{folder}/stack", sources, "local-dir:clip", None, SAMPLING)
    (folder / "published").mkdir()
    (folder / "published" / "tiny.json").write_text(json.dumps({"stack": f"{folder}/stack", "at": 0}))
    return folder / "stack"


def load(folder: Path, **decoder: Any) -> Stack:
    return Stack.load(publish(folder, **decoder))


def with_sampling(**changes: Any) -> SamplingConfig:
    return dataclasses.replace(SAMPLING, **changes)
