"""Vision Transformers as encoder and decoder of an autoencoder: images as patches.

Source: Yu et al. 2022, "Vector-quantized Image Modeling with Improved VQGAN" (ViT-VQGAN), section 3.1. Codes are not normalised.

Letters: B batch, p patch size, S image size, s = S / p, W width.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import require
from unclip.errors import ShapeError
from unclip.models.layers import TransformerBlock


@dataclasses.dataclass(frozen=True)
class PatchTransformerConfig:
    patch_size: int = 8
    """p, pixels."""
    width: int = 512
    """W, width of both Transformers."""
    depth: int = 8
    """Transformer blocks of the encoder, and of the decoder."""
    num_heads: int = 8
    """Attention heads per block."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "width", "depth", "num_heads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.width % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of width {self.width}")


class _PatchTransformer(nn.Module):
    """Bidirectional Transformer over the patches of an image, with learned positions."""

    def __init__(self, config: PatchTransformerConfig, latent_size: int) -> None:
        super().__init__()
        self.latent_size = latent_size
        self.positions = nn.Parameter(torch.randn(latent_size**2, config.width) * 0.02)
        self.blocks = nn.ModuleList([TransformerBlock(config.width, config.num_heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, W, s, s] -> [B, W, s, s].

        Raises:
            ShapeError: the images are of another size than those that the positions are for.
        """
        height, width = x.shape[2:]
        if (height, width) != (self.latent_size, self.latent_size):
            raise ShapeError(
                f"autoencoder: got {height} x {width} patches, expected {self.latent_size} x {self.latent_size}, as its "
                "Transformers learn a position for each. Resize the images."
            )
        tokens = x.flatten(2).transpose(1, 2) + self.positions  # [B, ss, W]
        mask = torch.ones(1, 1, 1, tokens.shape[1], dtype=torch.bool, device=x.device)
        for block in self.blocks:
            tokens = block(tokens, mask)  # [B, ss, W]
        return self.norm(tokens).transpose(1, 2).unflatten(2, (height, width))  # type: ignore[no-any-return]


class PatchEncoder(nn.Module):
    """Network from images [B, 3, S, S] to [B, out_channels, s, s]."""

    def __init__(self, config: PatchTransformerConfig, latent_size: int, out_channels: int) -> None:
        super().__init__()
        self.input = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.transformer = _PatchTransformer(config, latent_size)
        self.output = nn.Sequential(
            nn.Conv2d(config.width, config.width, 1), nn.Tanh(), nn.Conv2d(config.width, out_channels, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.transformer(self.input(images)))  # type: ignore[no-any-return]  # [B, out_channels, s, s]


class PatchDecoder(nn.Module):
    """Network from latents [B, D, s, s] to images [B, 3, S, S]."""

    def __init__(self, config: PatchTransformerConfig, latent_size: int, latent_channels: int) -> None:
        """Args: latent_channels: D."""
        super().__init__()
        self.patch_size = config.patch_size
        self.input = nn.Conv2d(latent_channels, config.width, 1)
        self.transformer = _PatchTransformer(config, latent_size)
        self.to_hidden = nn.Sequential(nn.Conv2d(config.width, config.width, 1), nn.Tanh())
        self.output = nn.Conv2d(config.width, 3 * config.patch_size**2, 1)

    def hidden(self, latents: Tensor) -> Tensor:
        """Input [B, W, s, s] of the last convolution."""
        return self.to_hidden(self.transformer(self.input(latents)))  # type: ignore[no-any-return]

    def images(self, hidden: Tensor) -> Tensor:
        """Images [B, 3, S, S] from the input [B, W, s, s] of the last convolution, which predicts the pixels of a patch."""
        return F.pixel_shuffle(self.output(hidden), self.patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.images(self.hidden(latents))  # [B, 3, S, S]
