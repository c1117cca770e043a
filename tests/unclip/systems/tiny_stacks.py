"""Untrained stacks of a few thousand weights: they sample noise, but follow the same code paths as any other stack.

`tiny_stack` builds one in memory that exports to diffusers; `publish` writes one with the demo's CLIP to a folder.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from unclip.config import load, override, to_dict
from unclip.diffusion.process import DiffusionConfig
from unclip.models import clip
from unclip.models.clip import Clip
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.embeddings import EmbeddingStatistics, PrincipalComponents
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.text import EmptyCaption, TextShape, TextTransformer, caption_features, read_captions
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.systems.system import ClipFiles, StackFiles, load_system, save_stack
from unclip.systems.unclip.sampling import DecoderSampling, PriorSampling, SamplingConfig, UpsamplerSampling
from unclip.systems.unclip.stack import Stack
from unclip.training import checkpoints

EMBEDDING_DIM, LENGTH, RESOLUTION = 16, 10, 8
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": EMBEDDING_DIM,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": EMBEDDING_DIM, "heads": 2, "layers": 2},
}
UNET = UNetConfig(RESOLUTION, 8, (1, 2), 1, attention_resolutions=(4,), head_channels=4, norm_groups=4)


def add_noise(model: Any, scale: float = 0.15, seed: int = 0) -> Any:
    """Add random numbers to all weights, including those that start as zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def calm_variances(last: Any) -> None:
    """Scale down the learned variances of a network's last layer to their valid range, as training does."""
    with torch.no_grad():
        for parameter in (last.weight, last.bias):
            parameter[3:] *= 0.05


def tiny_clip(quick_gelu: bool = True, image_embeddings: Any = "unit", **changes: Any) -> Clip:
    import open_clip
    from open_clip.transform import PreprocessCfg

    torch.manual_seed(0)
    model = add_noise(open_clip.model.CLIP(**{**CLIP_CONFIG, **changes}, quick_gelu=quick_gelu), 0.1)
    open_clip.model.set_model_preprocess_cfg(model, {**vars(PreprocessCfg()), "size": 32})
    return Clip(model, "ViT-B-32", image_embeddings)


def tiny_stack(
    *,
    clip: Clip | None = None,
    prior: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    upsampler: dict[str, Any] | None = None,
) -> Stack:
    """Build a stack, with changes to the settings of its parts."""
    clip = clip or tiny_clip()
    null_text = caption_features(clip, clip.tokenize([""]))
    torch.manual_seed(1)
    statistics = EmbeddingStatistics.of(torch.randn(50, EMBEDDING_DIM) * 0.25 + 0.05)
    new_prior = DiffusionPrior(
        PriorConfig(**{"width": 32, "depth": 2, "num_heads": 4, "clip_range": 3.0, **(prior or {})}),
        EMBEDDING_DIM,
        EMBEDDING_DIM,
        LENGTH,
    )
    new_prior.statistics.load_state_dict(statistics.state_dict())
    new_prior.text.set_null(null_text)
    settings: dict[str, Any] = {"unet": UNET, "context_dim": 12, "text": "clip", **(decoder or {})}
    shape = TextShape(LENGTH, EMBEDDING_DIM, 49408)
    new_decoder = Decoder(DecoderConfig(**settings), EMBEDDING_DIM, shape)
    new_decoder.statistics.load_state_dict(statistics.state_dict())
    if new_decoder.text is not None:
        new_decoder.text.set_null(read_captions(settings["text"], clip, clip.tokenize([""])))  # type: ignore[arg-type]
    network = UNetConfig(RESOLUTION, 8, (1, 2), 1, norm_groups=4)
    new_upsampler = Upsampler(
        UpsamplerConfig(**{"unet": network, "low_res_size": RESOLUTION, "scale": 2, **(upsampler or {})})
    )
    for seed, model in enumerate((new_prior, new_decoder, new_upsampler)):
        add_noise(model, 0.15, seed)
    for unet in (new_decoder.unet, new_upsampler.unet, new_upsampler.last_unet):
        if unet is not None:
            calm_variances(unet.output[-1])
    return Stack(clip, new_prior, new_decoder, [new_upsampler])


ARCHITECTURE = "unclip-demo"
PUBLISHED_UNET = UNetConfig(
    8, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_channels=8, norm_groups=4
)
SMALLEST = UNetConfig(8, channels=4, channel_mult=(1, 1), num_res_blocks=1, norm_groups=2)
SAMPLING = SamplingConfig(
    prior=PriorSampling(num_steps=3),
    decoder=DecoderSampling(num_steps=6, guidance_scale=1.5, inversion_iterations=2, num_resamplings=2),
    upsamplers={
        "16": UpsamplerSampling(num_steps=2, num_resamplings=2),
        "32": UpsamplerSampling(num_steps=3, num_resamplings=2),
    },
    precision="fp32",
)


def fill_zeros(model: Any, std: float = 0.1) -> Any:
    """Give weights to zero-initialised layers, which would otherwise hide wiring mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def publish(folder: Path, num_upsamplers: int = 1, **decoder: Any) -> Path:
    """Write a stack to `folder`/stack and register it as published in `folder`.

    Args:
        num_upsamplers: number of upsamplers after the decoder's 8x8 pixels; each doubles the resolution.
        decoder: settings of `DecoderConfig` besides the network.
    """
    torch.manual_seed(0)
    clip.save(clip.create(ARCHITECTURE, None), ARCHITECTURE, folder / "models" / "clip")
    loaded = Clip.load(f"local-dir:{folder}/models/clip")
    width, length = loaded.embedding_dim, loaded.text_length
    # near this CLIP's own image embeddings, so that the decoder's standardised inputs differ
    embeddings = loaded.embed_images(torch.randn(64, 3, 64, 64)).repeat(4, 1)
    embeddings = embeddings + torch.randn(embeddings.shape) * 0.002
    statistics = EmbeddingStatistics.of(embeddings)

    text_shape = TextShape(length, loaded.text_width, loaded.vocab_size)
    config = DecoderConfig(PUBLISHED_UNET, context_dim=8, diffusion=DiffusionConfig(prediction_type="v"), **decoder)
    diffusion = DiffusionConfig(prediction_type="x0")
    upsamplers = [
        UpsamplerConfig(SMALLEST, low_res_size=8 << n, scale=2, diffusion=diffusion) for n in range(num_upsamplers)
    ]
    prior = PriorConfig(width=16, depth=1, num_heads=2)
    text = {"embedding_dim": width, "text_width": loaded.text_width, "text_length": length}
    models: dict[str, tuple[Any, dict[str, Any]]] = {
        "prior": (DiffusionPrior(prior, width, loaded.text_width, length), {"config": to_dict(prior), **text}),
        "decoder": (
            Decoder(config, width, text_shape),
            {"config": to_dict(config), "embedding_dim": width, "text_shape": to_dict(text_shape)},
        ),
        **{each.name: (Upsampler(each), {"config": to_dict(each), "kind": "upsampler"}) for each in upsamplers},
    }
    for name, (model, facts) in models.items():
        if hasattr(model, "statistics"):
            model.statistics.load_state_dict(statistics.state_dict())
        for module in model.modules():
            if isinstance(module, EmptyCaption):
                module.set_null(caption_features(loaded, loaded.tokenize([""])))
            if isinstance(module, TextTransformer):
                module.set_null(loaded.tokenize([""]))
        state = fill_zeros(model, 0.06).state_dict()
        checkpoints.save(f"{folder}/models/{name}", {"model": state}, {"kind": name, "samples_seen": 1, **facts})
    pca = PrincipalComponents.of(embeddings)._asdict()
    checkpoints.save(f"{folder}/models/statistics", {"statistics": dict(statistics.state_dict()), "pca": pca}, {})

    sources = {name: f"{folder}/models/{name}" for name in (*models, "statistics", "clip")}
    clip_files = ClipFiles(f"local-dir:{sources.pop('clip')}")
    sampling = to_dict(SAMPLING)
    sampling["upsamplers"] = {size: sampling["upsamplers"][size] for size in ("16", "32")[:num_upsamplers]}
    stack = StackFiles("unclip", sources, clip_files, sources.pop("statistics"), sampling)
    save_stack(f"{folder}/stack", stack)
    (folder / "published").mkdir()
    (folder / "published" / "tiny.json").write_text(json.dumps({"stack": "storage://stack", "at": 0}))
    return folder / "stack"


def load_published(folder: Path, num_upsamplers: int = 1, **decoder: Any) -> Stack:
    return load_system(publish(folder, num_upsamplers, **decoder))


def with_sampling(changes: Mapping[str, Any] = MappingProxyType({}), **more: Any) -> SamplingConfig:
    """`SAMPLING` with changed values, by dotted name."""
    values = to_dict(SAMPLING)
    for name, value in {**changes, **more}.items():
        values = override(values, f"{name}={value}")
    return load(SamplingConfig, values)


def fitting(sampling: SamplingConfig, stack: Stack) -> SamplingConfig:
    """`sampling` without settings for upsamplers that the stack does not have."""
    sizes = map(str, stack.upsampled_sizes)
    return dataclasses.replace(sampling, upsamplers={size: sampling.upsamplers[size] for size in sizes})
