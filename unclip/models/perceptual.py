"""Perceptual distances of images: differences of the features of a frozen network.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1. The features of CLIP
have equal weights; LPIPS, which has learned ones, is read from a file of its weights.

Letters: B batch, S image size, C channels of a feature map, P its positions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip.errors import CheckpointError, ConfigError
from unclip.models import clip as clip_models
from unclip.models.layers import without_autocast

NUM_LAYERS = 4
"""Layers of CLIP's image encoder whose features are compared, evenly spaced."""


class ClipDistance(nn.Module):
    """Distance of images by the features of several layers of a frozen CLIP's image encoder."""

    def __init__(self, model: Any) -> None:
        """Args:
            model: CLIP of open_clip; its image encoder is frozen, and all that is kept of it.

        Raises:
            ConfigError: the image encoder has no list of layers that is known here.
        """
        super().__init__()
        self.visual: Any = model.visual.eval().requires_grad_(False)
        layers = _layers(self.visual)
        count = min(NUM_LAYERS, len(layers))
        self.layers = [layers[(number + 1) * len(layers) // count - 1] for number in range(count)]

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance of each of images [B, 3, S, S] to its other, both in [-1, 1]: [B] float32, differentiable in `images`."""
        with torch.no_grad():
            theirs = self._features(others)
        return _distance(self._features(images), theirs)

    def _features(self, images: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        handles = [layer.register_forward_hook(lambda *call: found.append(call[2])) for layer in self.layers]
        try:
            self.visual(clip_models.prepare(self, images))
        finally:
            for handle in handles:
                handle.remove()
        return [_as_positions(each) for each in found]


class LpipsDistance(nn.Module):
    """LPIPS with the network VGG16."""

    shift: Tensor
    scale: Tensor

    LAYERS = (3, 8, 15, 22, 29)
    """Last activations before each halving of the resolution, in the network of torchvision."""
    SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
    """Mean and standard deviation of its images, for images in [-1, 1]."""

    def __init__(self, network: nn.Sequential, weights: Sequence[Tensor]) -> None:
        """Args:
        network: VGG16 up to the last of its layers that are compared.
        weights: [C] of each of these layers.
        """
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.weights = nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in weights)
        for name, values in {"shift": self.SHIFT, "scale": self.SCALE}.items():
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    @classmethod
    def outline(cls) -> "LpipsDistance":
        """Distance on the meta device, without weights; for counting."""
        with torch.device("meta"):
            network = cls._network()
            return cls(network, [torch.empty(network[layer - 1].out_channels) for layer in cls.LAYERS])

    @classmethod
    def load(cls, path: str | Path) -> "LpipsDistance":
        """Read a file that `safetensors.torch.save_model` wrote of `lpips.LPIPS(net="vgg")`, of the package lpips.

        Raises:
            CheckpointError: the file is missing, damaged, no safetensors file, or of another network.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = {name: tensor.float() for name, tensor in load_file(str(path)).items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"perceptual.weights: {path} cannot be read: {error}. Weights must be complete safetensors files; pickles are "
                "not read."
            ) from error
        with torch.device("meta"):
            network = cls._network()
        # the file counts the layers in slices that end after a compared layer
        names = {}
        for name in network.state_dict():
            number = int(name.partition(".")[0])
            names[name] = f"net.slice{1 + sum(number > layer for layer in cls.LAYERS)}.{name}"
        try:
            network.load_state_dict({name: tensors[theirs] for name, theirs in names.items()}, assign=True)
            weights = [tensors[f"lin{layer}.model.1.weight"].flatten() for layer in range(len(cls.LAYERS))]
            widths = [network[layer - 1].out_channels for layer in cls.LAYERS]
            if [tuple(each.shape) for each in weights] != [(width,) for width in widths]:
                raise RuntimeError(
                    f"weights of layers of {[len(each) for each in weights]} channels, expected {widths}"
                )
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"perceptual.weights: {path} has no LPIPS of VGG16: {error}. Write it by "
                "safetensors.torch.save_model(lpips.LPIPS(net='vgg'), FILE)."
            ) from error
        return cls(network, weights)

    @classmethod
    def _network(cls) -> Any:
        """VGG16 of torchvision up to the last layer that is compared, with random weights."""
        from torchvision.models import vgg

        return vgg.make_layers(vgg.cfgs["D"])[: cls.LAYERS[-1] + 1]

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """As that of `ClipDistance`."""
        with torch.no_grad():
            theirs = self._features(others)
        ours = self._features(images)
        with without_autocast(images.device):
            terms = [
                ((_unit(one) - _unit(other)).square() @ weight).mean(dim=1)
                for one, other, weight in zip(ours, theirs, self.weights, strict=True)
            ]
            return torch.stack(terms).sum(dim=0)

    def _features(self, images: Tensor) -> list[Tensor]:
        h, found = (images - self.shift) / self.scale, []
        for number, layer in enumerate(self.network):
            h = layer(h)
            if number in self.LAYERS:
                found.append(_as_positions(h))
        return found


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


PerceptualDistance = ClipDistance | LpipsDistance
