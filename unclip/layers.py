"""Building blocks shared by the prior and the U-Nets. Letters: B batch, C channels, H height, W width, L tokens, D width."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of timesteps.

    Args:
        t: [B] int64 or float.
        dim: even.

    Returns:
        [B, dim] float32, whatever the autocast dtype: in bf16 half of 1,000 timesteps would coincide.

    Source: Vaswani et al. 2017, section 3.5.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepMLP(nn.Module):
    """Timestep -> conditioning vector."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(nn.Linear(dim, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.layers(timestep_embedding(t, self.dim))  # type: ignore[no-any-return]  # [B] -> [B, out_dim]


class GroupNorm(nn.GroupNorm):
    """Group norm in float32: steadier, and on CPUs several times faster than in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over [B, heads, L, D / heads]; mask is bool, True = attend.

    On CPUs the fused kernel is several times slower in bf16 than two matrix products for the lengths met there.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5  # [B, heads, L, L]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1).to(v.dtype) @ v  # type: ignore[no-any-return]


def zero_init(module: nn.Module) -> nn.Module:
    """Start a residual branch as the identity. Source: Dhariwal & Nichol 2021, Table 2 and code notes."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class TransformerBlock(nn.Module):
    """Pre-norm causal Transformer block. Source: Radford et al. 2019 (GPT-2)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Args:
        x: [B, L, D].
        mask: [B, 1, L, L] bool, True where a query may attend to a key.
        """
        batch, length, width = x.shape
        qkv = self.to_qkv(self.attention_norm(x))  # [B, L, 3D]
        qkv = qkv.view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, heads, L, D / heads]
        attended = attention(q, k, v, mask)
        x = x + self.to_out(attended.transpose(1, 2).reshape(batch, length, width))  # [B, L, D]
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]  # [B, L, D]
