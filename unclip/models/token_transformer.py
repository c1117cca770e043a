"""Building blocks of Transformers that sample images token by token: vocabulary, positions, blocks and sampling.

Letters: B batch, L tokens, Q tokens that a call adds, C context tokens, D width, N image tokens, K codebook size, V size of the
text vocabulary.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import require
from unclip.models.clip import text_mask
from unclip.models.layers import KeyValueCache, attention

_UNUSED = 2**40
"""Entry of a vocabulary that no token id equals."""


class TextVocabulary(nn.Module):
    """Token ids that a model knows, the most frequent ones of its training captions; all others share the last index.

    A tokenizer for all of English has tens of thousands of ids, of which a dataset of one kind uses a few. A model that
    predicts the text pays for each of them.
    """

    ids: Tensor

    def __init__(self, size: int) -> None:
        """Args:
        size: V, at least 2; includes the index of unknown ids.
        """
        super().__init__()
        self.size = size
        self.register_buffer("ids", torch.full((size - 1,), _UNUSED, dtype=torch.int64))  # [V - 1], ascending

    def fit(self, tokens: Tensor) -> None:
        """Store the V - 1 most frequent ids of captions [N, L] int64, without padding; of equal ones, the smaller."""
        ids, counts = torch.unique(tokens[text_mask(tokens)], return_counts=True)  # ascending ids
        frequent = ids[counts.argsort(descending=True, stable=True)][: len(self.ids)].sort().values
        self.ids.fill_(_UNUSED)
        self.ids[: len(frequent)] = frequent

    def forward(self, tokens: Tensor) -> Tensor:
        """Indices in [0, V) of token ids [B, L] int64; V - 1 for unknown ones."""
        index = torch.searchsorted(self.ids, tokens).clamp(max=len(self.ids) - 1)
        return torch.where(self.ids[index] == tokens, index, self.size - 1)


class GridPositions(nn.Module):
    """Learned embeddings of the row and of the column of image tokens, added. Source: Ramesh et al. 2021, appendix B.1."""

    def __init__(self, grid_size: int, width: int) -> None:
        """Args:
        grid_size: rows, and columns, of the N image tokens.
        """
        super().__init__()
        self.rows = nn.Parameter(torch.randn(grid_size, width) * 0.01)
        self.columns = nn.Parameter(torch.randn(grid_size, width) * 0.01)

    def forward(self, first: int, last: int) -> Tensor:
        """Embeddings [last - first, D] of the tokens from `first` up to `last`, which is not included, row by row."""
        both = self.rows[:, None] + self.columns  # [rows, columns, D]
        return both.flatten(0, 1)[first:last]


class CrossAttention(nn.Module):
    """Attention of tokens to the tokens of a context."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Args:
            x: [B, Q, D].
            context: [B, C, D].
            mask: [B, C] bool, True = attend.
            cache: keeps the keys and values of the context, so that later calls with the same context need not compute them.

        Returns:
            [B, Q, D].
        """
        q = self.to_q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, Q, D / heads]
        if cache is not None and cache.length:
            k, v = cache.read()
        else:
            kv = self.to_kv(context).unflatten(2, (2, self.num_heads, -1))  # [B, C, 2, heads, D / heads]
            k, v = kv.permute(2, 0, 3, 1, 4)  # 2 x [B, heads, C, D / heads]
            if cache is not None:
                k, v = cache.append(k, v)
        attended = attention(q, k, v, mask[:, None, None])  # [B, heads, Q, D / heads]
        return self.to_out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TokenBlock(nn.Module):
    """Pre-norm causal Transformer block, with attention to a context if it has one.

    Sources: Radford et al. 2019 (GPT-2); Vaswani et al. 2017, section 3.1 (context).
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0, has_context: bool = False) -> None:
        """Args:
        dropout: probability of dropping a value of a residual branch.
        """
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.context_norm = nn.LayerNorm(width) if has_context else None
        self.context_attention = CrossAttention(width, num_heads) if has_context else None
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        context_cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Args:
            x: [B, Q, D].
            mask: [Q, L] bool, True if a token may attend to another; L = Q without a cache. None if x is the last token.
            context: [B, C, D], of a block that has one.
            context_mask: [B, C] bool, True = attend.
            cache: keys and values of the L - Q tokens before x; those of x are appended.
            context_cache: keys and values of the context; see `CrossAttention`.

        Returns:
            [B, Q, D].
        """
        qkv = self.to_qkv(self.attention_norm(x)).unflatten(2, (3, self.num_heads, -1))  # [B, Q, 3, heads, D / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, heads, Q, D / heads]
        if cache is not None:
            k, v = cache.append(k, v)  # 2 x [B, heads, L, D / heads]
        attended = attention(q, k, v, mask).transpose(1, 2).flatten(2)  # [B, Q, D]
        x = x + self.dropout(self.to_out(attended))  # [B, Q, D]
        if self.context_norm is not None and self.context_attention is not None:
            assert context is not None and context_mask is not None, "a block with a context needs one"
            attended = self.context_attention(self.context_norm(x), context, context_mask, context_cache)
            x = x + self.dropout(attended)  # [B, Q, D]
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]  # [B, Q, D]


class TokenCaches:
    """Keys and values of all blocks for the tokens so far, and of their context."""

    def __init__(self, depth: int, capacity: int, context_length: int = 0) -> None:
        """Args:
        depth: number of blocks.
        capacity: maximum number of tokens.
        context_length: C; 0 without a context.
        """
        self.tokens = [KeyValueCache(capacity) for _ in range(depth)]
        self.context = [KeyValueCache(context_length) if context_length else None for _ in range(depth)]

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return self.tokens[0].length

    def repeat(self, num: int) -> None:
        """Repeat each row `num` times in a row: several continuations of what is the same until here."""
        for cache in (*self.tokens, *self.context):
            if cache is not None:
                cache.repeat(num)


class TokenTransformer(nn.Module):
    """Causal Transformer blocks and a final norm, over sequences without padding."""

    def __init__(self, width: int, depth: int, num_heads: int, dropout: float = 0.0, has_context: bool = False) -> None:
        super().__init__()
        self.has_context = has_context
        self.dropout = nn.Dropout(dropout)
        blocks = [TokenBlock(width, num_heads, dropout, has_context) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        caches: TokenCaches | None = None,
    ) -> Tensor:
        """Args:
            x: [B, Q, D], the last Q of L tokens; all of them without caches.
            context: [B, C, D], if the blocks have one.
            context_mask: [B, C] bool, True = attend.
            caches: those of the L - Q tokens before x; x is appended.

        Returns:
            [B, Q, D]; each token depends on itself, the tokens before it, and the context.
        """
        num_queries = x.shape[1]
        length = num_queries if caches is None else caches.length + num_queries
        mask = None
        if num_queries > 1:
            mask = torch.ones(num_queries, length, dtype=torch.bool, device=x.device).tril(length - num_queries)
        x = self.dropout(x)
        for number, block in enumerate(self.blocks):
            cache = None if caches is None else caches.tokens[number]
            context_cache = None if caches is None else caches.context[number]
            x = block(x, mask, context, context_mask, cache, context_cache)
        return self.norm(x)  # type: ignore[no-any-return]

    def new_caches(self, capacity: int, context_length: int = 0) -> TokenCaches:
        """Empty caches for sequences of up to `capacity` tokens."""
        return TokenCaches(len(self.blocks), capacity, context_length)


@dataclasses.dataclass(frozen=True)
class TokenTransformerConfig:
    """Settings that models of image tokens share."""

    width: int = 512
    """Width of the Transformer."""
    depth: int = 12
    """Transformer blocks over the image tokens."""
    num_heads: int = 8
    """Attention heads per block."""
    dropout: float = 0.0
    """Probability of dropping a value of the embeddings and of the residual branches in training."""
    text_vocab_size: int = 16_384
    """Text tokens that the model tells apart: the most frequent ones of the training captions; all others are one."""
    grid_size: int = 32
    """Rows, and columns, of an image's tokens; filled in from the autoencoder."""
    codebook_size: int = 8192
    """Number of image tokens; filled in from the autoencoder."""
    cond_drop_prob: float = 0.0
    """Probability of dropping the text during training, for classifier-free guidance."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads", "grid_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("text_vocab_size", "codebook_size"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "at least 2")
        require(self.width % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of width {self.width}")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a probability below 1")
        require(0 <= self.cond_drop_prob < 1, "cond_drop_prob", self.cond_drop_prob, "a probability below 1")

    @property
    def num_image_tokens(self) -> int:
        """N."""
        return self.grid_size**2


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """Sampling settings of a model of image tokens."""

    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most likely tokens."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 0 for all. Source: Fan et al. 2018, section 5.1."""
    top_p: float = 1.0
    """Sample from the fewest most likely tokens whose probabilities add up to this, after `top_k`; 1 for all. Source: Holtzman et
    al. 2020, section 3.1 (nucleus sampling)."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance on logits; 1 = off. The text must have been dropped in training. Source: Yu et al. 2022
    (Parti), section 2.3."""
    num_candidates: int = 8
    """Images sampled per caption, of which CLIP chooses the best. Source: Ramesh et al. 2021, section 2.6."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        require(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")
        require(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "0 or more")
        require(1 <= self.num_candidates <= 1024, "num_candidates", self.num_candidates, "1 to 1024")


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits [B, K] of unlikely tokens to minus infinity; see `TokenSampling` for `top_k` and `top_p`.

    The most likely token is always kept. Tokens as likely as the last of the `top_k` are kept too.
    """
    if 0 < top_k < logits.shape[1]:
        smallest = logits.topk(top_k, dim=1).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=1)
        more_likely = probabilities.cumsum(dim=1) - probabilities  # [B, K], sum of the tokens before each
        dropped = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, more_likely >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def draw_tokens(logits: Tensor, settings: TokenSampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token from each row of logits: [B, K] -> [B] int64."""
    if settings.temperature == 0:
        return logits.argmax(dim=1)
    logits = filter_logits(logits / settings.temperature, settings.top_k, settings.top_p)
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


def sample_tokens(
    next_logits: Callable[[Tensor | None], Tensor],
    num_tokens: int,
    settings: TokenSampling,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample sequences of tokens, one token after another.

    Args:
        next_logits: takes the last token of each sequence [B], at first None, and returns the logits [B, K] of the next. With
            guidance, [2 B, K]: those given the captions, then those without, each for the same last tokens.
        num_tokens: N.

    Returns:
        [B, N] int64.

    Source: Yu et al. 2022 (Parti), section 2.3, for guidance.
    """
    tokens: list[Tensor] = []
    for _ in range(num_tokens):
        logits = next_logits(tokens[-1] if tokens else None).float()
        if settings.guidance_scale != 1:
            conditional, null = logits.chunk(2)
            logits = null + settings.guidance_scale * (conditional - null)
        tokens.append(draw_tokens(logits, settings, generator))
    return torch.stack(tokens, dim=1)


def mean_cross_entropy(logits: Tensor, targets: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of each row's tokens: [B, L, K] and [B, L] int64 -> [B], over those in keep [B, L] bool.

    A mean for each row makes the mean of a batch independent of how it is divided into micro-batches.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)  # [B, L]
    if keep is None:
        return losses.mean(dim=1)
    return (losses * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1)
