"""Building blocks shared by the prior and the U-Nets. Letters: B batch, C channels, H height, W width, L tokens, D width."""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of timesteps.

    Args:
        t: [B] int64 or float.
        dim: even.

    Returns:
        [B, dim] float32 even under autocast: in bf16, half of 1,000 timesteps would coincide.

    Source: Vaswani et al. 2017, section 3.5.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepMLP(nn.Module):
    """MLP from a timestep to a conditioning vector."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(nn.Linear(dim, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.layers(timestep_embedding(t, self.dim))  # type: ignore[no-any-return]  # [B] -> [B, out_dim]


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which operations on a device keep their precision; on the meta device they always do."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class GroupNorm(nn.GroupNorm):
    """Group norm in float32: more stable, and on CPUs several times faster than in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return super().forward(x.float())


class Conv3x3(nn.Conv2d):
    """3 x 3 convolution that keeps height and width, [B, C_in, H, W] -> [B, C_out, H, W].

    A CPU's AMX tile holds 16 pixels, which oneDNN's convolutions take from one row. If rows are shorter, training uses
    matrix products instead, which fill the tiles.
    """

    SHORT_ROW, SHORTEST_ROW = 8, 4
    """Longest rows in pixels for which only the weight gradient, and for which everything, is a matrix product."""
    HAS_TILES = torch.cpu._is_amx_tile_supported()

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        in_tiles = self.HAS_TILES and x.device.type == "cpu" and x.dtype == torch.bfloat16
        # when sampling, autocast casts the weights of a plain convolution once for all steps, which saves more
        if not self.training or not in_tiles or x.shape[3] > self.SHORT_ROW:
            return super().forward(x)
        assert self.bias is not None
        return _ShortRows.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype))  # type: ignore[no-any-return]


class _ShortRows(torch.autograd.Function):
    """Convolution of x [B, C_in, H, W] with weight [C_out, C_in, 3, 3] and bias [C_out]; saves only x and weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.shape[3] > Conv3x3.SHORTEST_ROW:
            return F.conv2d(x, weight, bias, padding=1)
        return _as_image(torch.addmm(bias, _neighbours(x), weight.permute(0, 2, 3, 1).flatten(1).T), x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        if x.shape[3] > Conv3x3.SHORTEST_ROW:
            x_gradient = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
            )[0]
        else:
            # an output reads the pixel at its left, so a pixel's gradient comes from the output at its right: the same product,
            # of images that are turned by half a turn
            from_last = _neighbours(gradient.flip(2, 3)) @ weight.permute(2, 3, 0, 1).flatten(0, 2)  # [BHW, C_in]
            x_gradient = _as_image(from_last, x).flip(2, 3)
        gradient = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # [BHW, C_out]
        weight_gradient = (gradient.T @ _neighbours(x)).view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        return x_gradient, weight_gradient, gradient.sum(0)


def _neighbours(x: Tensor) -> Tensor:
    """3 x 3 neighbourhood of each pixel, row by row, zero-padded at the border: [B, C, H, W] -> [BHW, 9C]."""
    batch, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()  # [B, H + 2, W + 2, C]
    image, row, pixel, _ = padded.stride()
    # three neighbours in a row are one piece of memory, so that the only copy is of long pieces
    neighbours = padded.as_strided((batch, height, width, 3, 3 * channels), (image, row, pixel, row, 1))
    return neighbours.reshape(batch * height * width, 9 * channels)


def _as_image(pixels: Tensor, like: Tensor) -> Tensor:
    """Reshape [BHW, C] to [B, C, H, W] with the B, H and W of `like`."""
    return pixels.view(len(like), *like.shape[2:], -1).permute(0, 3, 1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over [B, heads, L, D / heads]; mask is bool, True = attend.

    On CPUs in bf16, two matrix products are several times faster than the fused kernel at the lengths used here.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, heads, L, L]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v  # type: ignore[no-any-return]


def zero_init(module: nn.Module) -> nn.Module:
    """Zero the last module of a residual branch, so that the block starts as the identity.

    Source: Dhariwal & Nichol 2021, Table 2 and code notes.
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class KeyValueCache:
    """Keys and values that a causal block has computed, so that later tokens can reuse them.

    Decreasing `length` drops the tokens after it. Do not append while gradients are recorded.
    """

    def __init__(self, capacity: int) -> None:
        """Args:
        capacity: maximum number of tokens.
        """
        self.capacity, self.length = capacity, 0
        self._stored: Tensor | None = None  # [2, B, heads, capacity, D / heads]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, heads, L, D / heads]; returns all so far, [B, heads, length, D / heads] each."""
        if self._stored is None:
            batch, heads, _, width = keys.shape
            self._stored = keys.new_empty(2, batch, heads, self.capacity, width)
        start, self.length = self.length, self.length + keys.shape[2]
        self._stored[0, :, :, start : self.length] = keys
        self._stored[1, :, :, start : self.length] = values
        return self.read()

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values so far, [B, heads, length, D / heads] each; at least one was appended."""
        assert self._stored is not None, "nothing was appended"
        return self._stored[0, :, :, : self.length], self._stored[1, :, :, : self.length]

    def repeat(self, num: int) -> None:
        """Repeat the keys and values of each row `num` times in a row, so that the batch has `num` times as many rows."""
        if self._stored is not None:
            self._stored = self._stored.repeat_interleave(num, dim=1)


class TransformerBlock(nn.Module):
    """Pre-norm Transformer block; the mask makes it causal or not. Source: Radford et al. 2019 (GPT-2)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        cache: KeyValueCache | None = None,
        num_outputs: int | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Args:
            x: [B, L, D]; or [N, D], the tokens listed in `kept`.
            mask: [B, 1, L, K] bool, True if a query may attend to a key; K = L without a cache.
            cache: keys and values of the K - L tokens before x; those of x are appended.
            num_outputs: number of last tokens to return; None for all.
            kept: [N] int64, from `kept_tokens`.

        Returns:
            [B, num_outputs, D]; without num_outputs, the same shape as x.
        """
        qkv = self.to_qkv(self.attention_norm(x))  # [B, L, 3D] or [N, 3D]
        if kept is not None:
            batch, _, length, _ = mask.shape
            qkv = unpack(qkv, kept, batch, length)  # [B, L, 3D]
            if num_outputs is not None:
                x, kept = unpack(x, kept, batch, length), None  # [B, L, D]
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, heads, L, D / heads]
        if cache is not None:
            k, v = cache.append(k, v)  # 2 x [B, heads, K, D / heads]
        if num_outputs is not None:
            x, q, mask = x[:, -num_outputs:], q[:, :, -num_outputs:], mask[:, :, -num_outputs:]
        attended = attention(q, k, v, mask).transpose(1, 2).flatten(2)  # [B, L, D]
        x = x + self.to_out(attended if kept is None else pack(attended, kept))  # [B, L, D] or [N, D]
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]  # [B, L, D] or [N, D]


class CausalTransformer(nn.Module):
    """Causal Transformer blocks and a final norm, over sequences that may contain padding."""

    def __init__(self, width: int, depth: int, num_heads: int, norm_in: bool = False) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width) if norm_in else nn.Identity()
        self.blocks = nn.ModuleList([TransformerBlock(width, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        keep: Tensor,
        caches: list[KeyValueCache] | None = None,
        num_outputs: int | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Args:
            x: [B, L, D], the last L of K tokens; all of them without caches.
            keep: [B, K] bool, False for padding, which no other token attends to.
            caches: one per block, holding the K - L tokens before x; x is appended to them.
            num_outputs: number of last tokens to return; the last block computes only these. None for all.
            kept: [N] int64, `kept_tokens(keep)`: padding is then skipped, and must not be among the outputs. None computes
                padding too.

        Returns:
            [B, num_outputs or L, D].
        """
        batch, length, _ = x.shape
        mask = causal_mask(keep, length)  # [B, 1, L, K]
        x = self.norm_in(x)
        if kept is not None:
            x = pack(x, kept)  # [N, D]
            torch._dynamo.maybe_mark_dynamic(kept, 0)
        for number, block in enumerate(self.blocks):
            if kept is not None:
                torch._dynamo.maybe_mark_dynamic(x, 0)  # N differs from batch to batch: compile once for all
            block_outputs = num_outputs if number == len(self.blocks) - 1 else None
            x = block(x, mask, caches[number] if caches is not None else None, block_outputs, kept)
        x = self.norm(x)
        return x if kept is None or num_outputs is not None else unpack(x, kept, batch, length)

    def new_caches(self, capacity: int) -> list[KeyValueCache]:
        """Empty caches, one per block, for sequences of up to `capacity` tokens."""
        return [KeyValueCache(capacity) for _ in self.blocks]


def kept_tokens(keep: Tensor) -> Tensor:
    """Indices of non-padding tokens in the flattened batch: keep [B, L] bool -> [N] int64.

    Linear layers need to process only these.
    """
    return keep.flatten().nonzero()[:, 0]


def pack(x: Tensor, kept: Tensor) -> Tensor:
    """Gather the kept tokens of all rows: [B, L, D], [N] -> [N, D]."""
    return x.flatten(0, 1).index_select(0, kept)


def unpack(x: Tensor, kept: Tensor, batch: int, length: int) -> Tensor:
    """Scatter kept tokens back to their positions, with zeros elsewhere: [N, D], [N] -> [B, L, D]."""
    # unlike index_put, index_copy would save x for the backward pass
    return x.new_zeros(batch * length, x.shape[1]).index_put((kept,), x).view(batch, length, -1)


def causal_mask(keep: Tensor, num_queries: int) -> Tensor:
    """Attention mask of the last `num_queries` of K tokens: each attends to itself and to earlier non-padding tokens.

    Args:
        keep: [B, K] bool.

    Returns:
        [B, 1, num_queries, K] bool; no row is all False, which would make softmax return NaN.
    """
    num_keys = keep.shape[1]
    square = torch.ones(num_keys, num_keys, dtype=torch.bool, device=keep.device)
    causal, own = square.tril()[-num_queries:], torch.eye(num_keys, dtype=torch.bool, device=keep.device)
    return causal & keep[:, None, None, :] | own[-num_queries:]
