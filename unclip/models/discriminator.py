"""Discriminator of image patches, and its hinge loss.

Sources: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", appendix 6.1.2 (the network);
Lim & Ye 2017, "Geometric GAN", section 3 (the loss); Esser et al. 2021, "Taming Transformers for High-Resolution Image
Synthesis", section 3.1 (its use and its adaptive weight).

Group norm takes the place of the batch norm of the paper: the logits of an image then depend on this image alone, so the hinge
loss is the same for any number of workers and micro-batches. The adaptive weight is not: it is a ratio of norms in a micro-batch,
so a training with it is the same for any number of workers only if the size of the micro-batches is set.

Letters: B batch, C channels, S image size, h size of the map of logits.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import require
from unclip.models.layers import GroupNorm

LARGEST_MULTIPLE = 8
"""Channels of the widest layer, in multiples of the first layer's."""
SLOPE = 0.2
"""Slope of the leaky ReLUs below zero."""
LARGEST_ADAPTIVE_WEIGHT = 1e4


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    channels: int = 64
    """Channels of the first layer; each further one has twice as many, up to eight times as many."""
    num_layers: int = 3
    """Layers that halve the resolution."""
    norm_groups: int = 8
    """Groups of every group norm."""

    def __post_init__(self) -> None:
        for name in ("channels", "num_layers", "norm_groups"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        expected = f"a multiple of norm_groups, {self.norm_groups}"
        require(self.channels % self.norm_groups == 0, "channels", self.channels, expected)

    @property
    def smallest_image(self) -> int:
        """Smallest image that the network reads, pixels."""
        return int(4 * 2**self.num_layers)


class Discriminator(nn.Module):
    """Network from images [B, 3, S, S] to logits [B, 1, h, h], one for each patch; above 0 for images of the dataset."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**layer, LARGEST_MULTIPLE) for layer in range(config.num_layers + 1)]
        strides = [*[2] * config.num_layers, 1]
        # No module list: its graph is passed twice, for which activations cannot be recomputed; see `parallel.blocks`.
        self.layers = nn.Sequential()
        for layer, (in_width, width, stride) in enumerate(zip([3, *widths[:-1]], widths, strides, strict=True)):
            self.layers.append(_Layer(in_width, width, stride, config.norm_groups if layer else None))
        self.output = nn.Conv2d(widths[-1], 1, 4, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.layers(images.contiguous(memory_format=torch.channels_last))  # [B, C, H, W]
        return self.output(h).float()  # type: ignore[no-any-return]  # [B, 1, h, h]


class _Layer(nn.Module):
    """4 x 4 convolution, group norm unless it is the first layer, and leaky ReLU."""

    def __init__(self, in_width: int, out_width: int, stride: int, groups: int | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, 4, stride, padding=1)
        self.norm = nn.Identity() if groups is None else GroupNorm(groups, out_width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return F.leaky_relu(self.norm(h), SLOPE).to(h.dtype)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator: mean of max(0, 1 - real) and max(0, 1 + fake).

    Args:
        real: logits of images of the dataset, any shape.
        fake: logits of reconstructions, any shape.

    Source: Lim & Ye 2017, eq. 10.
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(last_hidden: Tensor, kernel: int, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """Weight of the adversarial term that makes its gradient as long as that of the reconstruction, for the weights of the
    decoder's last convolution; at most `LARGEST_ADAPTIVE_WEIGHT`.

    Args:
        last_hidden: [B, C, S, S], input of that convolution, which keeps the resolution.
        kernel: size of its kernel.
        reconstruction, adversarial: [B, 3, S, S], gradients of the two terms with respect to its output.

    Source: Esser et al. 2021, eq. 7.
    """
    hidden = last_hidden.float()
    weight = hidden.new_zeros(reconstruction.shape[1], hidden.shape[1], kernel, kernel)  # only its shape matters
    lengths: list[Tensor] = []
    for gradient in (reconstruction, adversarial):
        of_weight = torch.ops.aten.convolution_backward(
            gradient.float(),
            hidden,
            weight,
            None,
            [1, 1],
            [kernel // 2, kernel // 2],
            [1, 1],
            False,
            [0, 0],
            1,
            [False, True, False],
        )[1]
        lengths.append(of_weight.norm())
    return (lengths[0] / (lengths[1] + 1e-4)).clamp(max=LARGEST_ADAPTIVE_WEIGHT)
