"""Small untrained stacks with random weights everywhere."""

from typing import Any

import torch

from unclip.clip import Clip
from unclip.decoder import Decoder, DecoderConfig
from unclip.embeddings import EmbeddingStatistics
from unclip.generation import Stack
from unclip.prior import DiffusionPrior, PriorConfig
from unclip.text import TextShape, caption_features
from unclip.unet import UNetConfig
from unclip.upsampler import Upsampler, UpsamplerConfig

EMBEDDING_DIM, LENGTH, SIDE = 16, 10, 8
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": EMBEDDING_DIM,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": EMBEDDING_DIM, "heads": 2, "layers": 2},
}
UNET = UNetConfig(SIDE, 8, (1, 2), 1, attention_resolutions=(4,), head_channels=4, norm_groups=4)


def awaken(model: Any, scale: float = 0.15, seed: int = 0) -> Any:
    """Random weights added everywhere, also where training starts from zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def calm_variances(last: Any) -> None:
    """Bring the learned variances of a network's last layer into their range, as training does."""
    with torch.no_grad():
        for parameter in (last.weight, last.bias):
            parameter[3:] *= 0.05


def tiny_clip(quick_gelu: bool = True, image_embeddings: Any = "unit", **changes: Any) -> Clip:
    import open_clip
    from open_clip.transform import PreprocessCfg

    torch.manual_seed(0)
    model = awaken(open_clip.model.CLIP(**{**CLIP_CONFIG, **changes}, quick_gelu=quick_gelu), 0.1)
    open_clip.model.set_model_preprocess_cfg(model, {**vars(PreprocessCfg()), "size": 32})
    return Clip(model, "ViT-B-32", image_embeddings)


def tiny_stack(
    *,
    clip: Clip | None = None,
    prior: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    upsampler: dict[str, Any] | None = None,
) -> Stack:
    """A stack with settings changed here and there."""
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
    if settings["text"] == "clip":
        new_decoder.text.set_null(null_text)  # type: ignore[operator, union-attr]
    network = UNetConfig(SIDE, 8, (1, 2), 1, norm_groups=4)
    new_upsampler = Upsampler(
        UpsamplerConfig(**{"unet": network, "low_res_size": SIDE, "scale": 2, **(upsampler or {})})
    )
    for seed, model in enumerate((new_prior, new_decoder, new_upsampler)):
        awaken(model, 0.15, seed)
    for network_of in (new_decoder.unet, new_upsampler.unet, new_upsampler.last_unet):
        if network_of is not None:
            calm_variances(network_of.output[-1])
    return Stack(clip, new_prior, new_decoder, new_upsampler)
