"""The diffusion prior: P(image embedding | caption).

Source: Ramesh et al. 2022, section 2.2. A causal Transformer reads, in order, the encoded text tokens, the CLIP text
embedding, the timestep, the noised CLIP image embedding and a learned query; its output at the query is the clean image
embedding (x0-prediction, plain mean squared error).

Letters: B batch, L text tokens, W width of the CLIP text encoder, E CLIP embedding width, D width of the prior.
"""

import dataclasses

import torch
from torch import Tensor, nn

from unclip import guidance, samplers
from unclip.config import require
from unclip.diffusion import Denoiser, DiffusionConfig, GaussianDiffusion
from unclip.embeddings import EmbeddingStatistics
from unclip.layers import TimestepMLP, TransformerBlock


@dataclasses.dataclass(frozen=True)
class PriorConfig:
    width: int = 512
    """Width of the Transformer."""
    depth: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads a block."""
    cond_drop_prob: float = 0.1
    """Probability of dropping the text during training, for classifier-free guidance."""
    diffusion: DiffusionConfig = DiffusionConfig(prediction_type="x0")
    """The diffusion process."""

    def __post_init__(self) -> None:
        require(self.width % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of width {self.width}")
        require(self.depth >= 1, "depth", self.depth, "at least 1")
        require(0 <= self.cond_drop_prob < 1, "cond_drop_prob", self.cond_drop_prob, "a probability below 1")


class DiffusionPrior(nn.Module):
    """Text in, CLIP image embeddings out."""

    def __init__(self, config: PriorConfig, embedding_dim: int, text_width: int, text_length: int) -> None:
        """Args:
        embedding_dim: E.
        text_width: W, width of the text encodings.
        text_length: L, length of the text encodings.
        """
        super().__init__()
        self.config = config
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.statistics = EmbeddingStatistics.empty(embedding_dim)
        width = config.width
        self.from_text_encodings = nn.Linear(text_width, width)
        self.from_text_embedding = nn.Linear(embedding_dim, width)
        self.from_timestep = TimestepMLP(width, width)
        self.from_image_embedding = nn.Linear(embedding_dim, width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.null_text = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.randn(text_length + 4, width) * 0.01)
        self.blocks = nn.ModuleList([TransformerBlock(width, config.num_heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(width)
        self.to_image_embedding = nn.Linear(width, embedding_dim)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        text_encodings: Tensor,
        text_mask: Tensor,
        text_embedding: Tensor,
        drop: Tensor | None = None,
    ) -> Tensor:
        """Predict the clean, normalised image embedding.

        Args:
            x_t: [B, E] noised, normalised image embedding.
            t: [B] int64.
            text_encodings: [B, L, W].
            text_mask: [B, L] bool, True = keep.
            text_embedding: [B, E] as CLIP gives it.
            drop: [B] bool, True = without text; x_t is seen all the same.

        Returns:
            [B, E].
        """
        batch, length = text_mask.shape
        tokens = self.from_text_encodings(text_encodings)  # [B, L, D]
        pooled = self.from_text_embedding(text_embedding)[:, None]  # [B, 1, D]
        if drop is not None:
            tokens = torch.where(drop[:, None, None], self.null_text.to(tokens.dtype), tokens)
            pooled = torch.where(drop[:, None, None], self.null_text.to(pooled.dtype), pooled)
            text_mask = text_mask & ~drop[:, None]
        time = self.from_timestep(t)[:, None]  # [B, 1, D]
        noised = self.from_image_embedding(x_t)[:, None]  # [B, 1, D]
        query = self.query.to(tokens.dtype).expand(batch, 1, -1)  # [B, 1, D]
        x = torch.cat([tokens, pooled, time, noised, query], dim=1) + self.positions  # [B, L + 4, D]

        keep = torch.cat([text_mask, text_mask.new_ones(batch, 4)], dim=1)  # [B, L + 4]
        causal = torch.ones(length + 4, length + 4, dtype=torch.bool, device=x.device).tril()
        mask = causal & keep[:, None, None, :] | torch.eye(length + 4, dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, mask)
        return self.to_image_embedding(self.norm(x[:, -1]))  # type: ignore[no-any-return]  # [B, E]

    def denoiser(
        self, text_encodings: Tensor, text_mask: Tensor, text_embedding: Tensor, guidance_scale: float = 1.0
    ) -> Denoiser:
        """A guided denoiser of normalised image embeddings, conditioned on one caption per sample."""

        def predict(dropped: bool) -> Denoiser:
            drop = text_mask.new_full((len(text_mask),), dropped)
            return self.diffusion.denoiser(lambda x_t, t: self(x_t, t, text_encodings, text_mask, text_embedding, drop))

        return guidance.classifier_free(predict(False), predict(True), guidance_scale)

    @torch.no_grad()
    def sample(
        self,
        text_encodings: Tensor,
        text_mask: Tensor,
        text_embedding: Tensor,
        *,
        num_candidates: int = 2,
        num_steps: int = 64,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw image embeddings, of `num_candidates` the one with the largest dot product with the text embedding.

        Returns:
            [B, E], in CLIP's own scale.

        Source: Ramesh et al. 2022, section 2.2 (two candidates).
        """

        def repeat(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(num_candidates, dim=0)

        denoise = self.denoiser(repeat(text_encodings), repeat(text_mask), repeat(text_embedding), guidance_scale)
        noise = torch.randn(
            len(text_mask) * num_candidates, len(self.statistics.mean), generator=generator, device=text_mask.device
        )
        candidates = self.statistics.denormalize(samplers.ddpm(self.diffusion, denoise, noise, num_steps, generator))
        image_embedding = candidates.view(len(text_mask), num_candidates, -1)  # [B, N, E]
        similarity = (image_embedding * text_embedding[:, None]).sum(dim=2)  # [B, N]
        best = similarity.argmax(dim=1)  # [B]
        return image_embedding[torch.arange(len(best), device=best.device), best]
