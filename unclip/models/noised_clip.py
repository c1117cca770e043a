"""CLIP's image encoder for noised images, for CLIP guidance.

Source: Nichol et al. 2022 (GLIDE), sections 2.4 and 4.4; Dosovitskiy et al. 2021 (Vision Transformer). The encoder f(x_t, t)
is trained with CLIP's contrastive loss on the noising process of the model that it guides. The text side is that of the frozen
CLIP, so text embeddings are the same for noised and clean images. The class token is an embedding of the timestep.

Letters: B batch, S image size, P patches, W width, E CLIP embedding width.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import require
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.models.layers import TimestepMLP, TransformerBlock

MAX_LOGIT_SCALE = 100.0
"""Source: Radford et al. 2021, section 2.5."""


@dataclasses.dataclass(frozen=True)
class NoisedClipConfig:
    image_size: int = 64
    """Resolution of the images of the model to guide, pixels."""
    patch_size: int = 4
    """Height and width of a patch, pixels."""
    width: int = 768
    """Width of the Transformer."""
    depth: int = 12
    """Transformer blocks."""
    num_heads: int = 12
    """Attention heads per block."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process; the same as that of the model to guide."""

    def __post_init__(self) -> None:
        divides = self.patch_size >= 1 and self.image_size % self.patch_size == 0
        require(divides, "patch_size", self.patch_size, f"a divisor of image_size {self.image_size}")
        require(self.depth >= 1, "depth", self.depth, "at least 1")
        is_divisor = self.num_heads >= 1 and self.width % self.num_heads == 0
        require(is_divisor, "num_heads", self.num_heads, f"a divisor of width {self.width}")


class NoisedClip(nn.Module):
    """Vision Transformer from noised images and timesteps to CLIP embeddings."""

    def __init__(self, config: NoisedClipConfig, embedding_dim: int) -> None:
        super().__init__()
        self.config, self.embedding_dim = config, embedding_dim
        self.diffusion = GaussianDiffusion(config.diffusion)
        num_patches = (config.image_size // config.patch_size) ** 2
        self.patches = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.time_embedding = TimestepMLP(config.width, config.width)
        self.positions = nn.Parameter(torch.randn(1 + num_patches, config.width) * config.width**-0.5)
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList([TransformerBlock(config.width, config.num_heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, embedding_dim, bias=False)
        # the temperature of Radford et al. 2021, section 2.5; not a scalar, which cannot be sharded
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Args:
            x_t: [B, 3, S, S].
            t: [B] int64.

        Returns:
            [B, E] float32, image embeddings times CLIP's temperature: the dot product with a text embedding is a logit.
        """
        patches = self.patches(x_t).flatten(2).transpose(1, 2)  # [B, P, W]
        x = torch.cat([self.time_embedding(t)[:, None].to(patches.dtype), patches], dim=1)  # [B, 1 + P, W]
        x = self.norm_in(x + self.positions)
        mask = torch.ones(1, 1, 1, x.shape[1], dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, mask)
        embedding = F.normalize(self.projection(self.norm(x[:, 0])).float(), dim=-1)  # [B, E]
        return embedding * self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def embed(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Unit-norm image embeddings [B, E] of noised images; differentiable, for `guidance.clip_similarity`."""
        return F.normalize(self(x_t, t), dim=-1)
