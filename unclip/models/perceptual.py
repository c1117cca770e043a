"""Perceptual distances of images: differences of the features of a frozen network.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1.

Letters: B batch, S image size, C channels of a feature map, P its positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unclip.errors import ConfigError
from unclip.models import clip as clip_models
from unclip.models.clip import Clip
from unclip.models.layers import without_autocast

NUM_LAYERS = 4
"""Layers of CLIP's image encoder whose features are compared, evenly spaced."""


class ClipDistance:
    """Distance of images by the features of several layers of a frozen CLIP's image encoder."""

    def __init__(self, clip: Clip) -> None:
        """Raises:
        ConfigError: the image encoder has no list of layers that is known here.
        """
        self.visual: Any = clip.model.visual
        self.model = clip.model
        layers = _layers(self.visual)
        count = min(NUM_LAYERS, len(layers))
        self.layers = [layers[(number + 1) * len(layers) // count - 1] for number in range(count)]

    def to(self, device: torch.device) -> "ClipDistance":
        self.model.to(device)
        return self

    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance of each of images [B, 3, S, S] to its other, both in [-1, 1]: [B] float32, differentiable in `images`."""
        with torch.no_grad():
            theirs = self._features(others)
        return _distance(self._features(images), theirs)

    def _features(self, images: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        handles = [layer.register_forward_hook(lambda *call: found.append(call[2])) for layer in self.layers]
        try:
            self.visual(clip_models.prepare(self.model, images))
        finally:
            for handle in handles:
                handle.remove()
        return [_as_positions(each) for each in found]


def _layers(visual: Any) -> Sequence[nn.Module]:
    """Layers of an image encoder of open_clip, in order."""
    if hasattr(visual, "layer4"):
        return [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    for path in ("transformer.resblocks", "trunk.blocks", "trunk.stages"):
        module = visual
        for name in path.split("."):
            module = getattr(module, name, None)
        if module is not None:
            return list(module)
    raise ConfigError(
        f"perceptual.network: got 'clip', whose image encoder {type(visual).__name__} has no layers that can be read here. "
        "Set perceptual.network = 'lpips' with its weights, or perceptual.weight = 0."
    )


def _as_positions(features: Tensor) -> Tensor:
    """Features [B, C, H, W] or [B, P, C] as [B, P, C] float32."""
    features = features.float()
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean over layers and positions of the squared distance of features of unit length: [B]."""
    with without_autocast(ours[0].device):
        terms = [
            (_unit(one) - _unit(other)).square().sum(dim=2).mean(dim=1) for one, other in zip(ours, theirs, strict=True)
        ]
        return torch.stack(terms).mean(dim=0)


def _unit(features: Tensor) -> Tensor:
    """Features [B, P, C] at unit length; the small constant keeps the gradient of zero features finite."""
    return features / (features.square().sum(dim=2, keepdim=True) + 1e-10).sqrt()
