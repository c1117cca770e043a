"""Spatial Transformer: self-attention over pixels, cross-attention to context tokens, and a gated feed-forward network.

Sources: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.3 and appendix E.2.1;
Shazeer 2020, "GLU Variants Improve Transformer", section 2 (GEGLU). Layers, biases and norms are those of the published networks,
so that weights convert one to one (`unclip.interop.latent_diffusion`).

Letters: B batch, C channels, H height, W width, L context tokens, X context width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.layers import GroupNorm, attention, zero_init

NORM_EPS = 1e-6
"""Epsilon of the group norm, as in the published networks."""


class SpatialTransformer(nn.Module):
    """One Transformer block over the pixels of a feature map, between two projections, with a residual connection."""

    def __init__(self, width: int, context_dim: int, num_heads: int, norm_groups: int) -> None:
        """Args:
        width: C.
        context_dim: X.
        """
        super().__init__()
        self.num_heads = num_heads
        self.group_norm = GroupNorm(norm_groups, width, NORM_EPS)
        self.proj_in = nn.Linear(width, width)
        self.pixel_norm = nn.LayerNorm(width)
        self.pixels_to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.pixels_to_out = nn.Linear(width, width)
        self.query_norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.context_to_kv = nn.Linear(context_dim, 2 * width, bias=False)
        self.context_to_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.to_hidden = nn.Linear(width, 2 * 4 * width)
        self.from_hidden = nn.Linear(4 * width, width)
        self.proj_out = zero_init(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Args: x [B, C, H, W]; context [B, L, X]; context_mask [B, L] bool, True = attend. Returns [B, C, H, W]."""
        pixels = self.proj_in(self.group_norm(x).flatten(2).transpose(1, 2))  # [B, HW, C]
        q, k, v = self.pixels_to_qkv(self.pixel_norm(pixels)).chunk(3, dim=2)  # 3 x [B, HW, C]
        pixels = pixels + self.pixels_to_out(self._attend(q, k, v))  # [B, HW, C]
        q = self.to_q(self.query_norm(pixels))  # [B, HW, C]
        k, v = self.context_to_kv(context).chunk(2, dim=2)  # 2 x [B, L, C]
        mask = None if context_mask is None else context_mask[:, None, None]  # [B, 1, 1, L]
        pixels = pixels + self.context_to_out(self._attend(q, k, v, mask))  # [B, HW, C]
        hidden, gate = self.to_hidden(self.mlp_norm(pixels)).chunk(2, dim=2)  # 2 x [B, HW, 4C]
        pixels = pixels + self.from_hidden(hidden * F.gelu(gate))  # [B, HW, C]
        return x + self.proj_out(pixels).transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of [B, HW, C] to keys and values [B, K, C]: [B, HW, C]."""
        q, k, v = (
            tensor.reshape(*tensor.shape[:2], self.num_heads, -1).transpose(1, 2) for tensor in (q, k, v)
        )  # [B, heads, HW or K, C / heads]
        return attention(q, k, v, mask).transpose(1, 2).flatten(2)
