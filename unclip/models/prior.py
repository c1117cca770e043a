"""The diffusion prior: P(image embedding | caption).

Source: Ramesh et al. 2022, section 2.2. A causal Transformer reads, in order, the encoded text tokens, the CLIP text
embedding, the timestep, the noised CLIP image embedding and a learned query; its output at the query is the clean image
embedding (x0-prediction, plain mean squared error).

Dropped text is replaced by the empty caption, that is by the CLIP features of "". Diffusers pipelines do the same, so
guidance needs no weights that they lack. The noised embedding is dropped only with `image_drop_prob`.

Letters: B batch, L text tokens, W width of the CLIP text encoder, E CLIP embedding width, D width of the prior,
N candidates, S tokens that change from step to step.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import added, require
from unclip.diffusion import sampling
from unclip.diffusion.process import Denoised, Denoiser, DiffusionConfig, GaussianDiffusion
from unclip.diffusion.samplers import SamplerName
from unclip.diffusion.sampling import DiffusionSampling
from unclip.models.embeddings import EmbeddingStatistics, Normalization
from unclip.models.layers import CausalTransformer, KeyValueCache, TimestepMLP, kept_tokens
from unclip.models.text import CaptionFeatures, EmptyCaption

TextNorm = Literal["none", "layer", "unit"]
Coin = Literal["sample", "batch"]
CandidateScore = Literal["dot_product", "cosine"]


@dataclasses.dataclass(frozen=True)
class PriorConfig:
    width: int = 512
    """Width of the Transformer."""
    depth: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads per block."""
    cond_drop_prob: float = 0.1
    """Probability of dropping the text during training, for classifier-free guidance."""
    diffusion: DiffusionConfig = DiffusionConfig(prediction_type="x0")
    """The diffusion process."""
    normalization: Normalization = "standardise"
    """Normalisation of image embeddings: per dimension, or by one factor for all as in the paper."""
    clip_range: float | None = 10.0
    """Bound on the magnitude of x0's elements at every sampling step, in normalised units; None for no bound."""
    text_norm: TextNorm = "none"
    """Normalisation of CLIP's text projection: none, a layer norm, or unit norm, which diffusers does not support."""
    norm_in: bool = False
    """Add a layer norm before the first block."""
    self_conditioning: bool = False
    """Also read the x0 of the previous step (Chen et al. 2023); diffusers does not support it."""
    self_conditioning_coin: Coin = added("sample")
    """Choice, in training, between an estimate of x0 and none, with equal probability: for each sample, or once for all of a
    micro-batch, which then costs no second forward pass when there is none, if one worker trains."""
    image_drop_prob: float = added(0.0)
    """Probability of replacing the noised image embedding by a learned one during training, independently of the text. If
    above 0, guidance leads away from the prediction without either; diffusers does not support it."""
    clamp_norm: bool = added(False)
    """Scale each predicted x0 to the norm of image embeddings, in training and at every sampling step, so that only directions
    are learned; needs prediction_type x0, and diffusers does not support it."""
    text_encodings: bool = added(True)
    """Read the encoded text tokens besides CLIP's text embedding; diffusers needs them."""

    def __post_init__(self) -> None:
        require(self.width % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of width {self.width}")
        require(self.width % 2 == 0, "width", self.width, "an even number")
        require(self.depth >= 1, "depth", self.depth, "at least 1")
        for name in ("cond_drop_prob", "image_drop_prob"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a probability below 1")
        learns = self.diffusion.variance == "learned_range"
        require(not learns, "diffusion.variance", "learned_range", "fixed_small or fixed_large for embeddings")
        in_range = self.clip_range is None or self.clip_range > 0
        require(in_range, "clip_range", self.clip_range, "a positive number, or none")
        predicted = self.diffusion.prediction_type
        is_x0 = predicted == "x0"
        require(is_x0 or not self.clamp_norm, "diffusion.prediction_type", predicted, "x0 with clamp_norm")


@dataclasses.dataclass(frozen=True)
class PriorSampling(DiffusionSampling):
    """Sampling settings of either prior. The autoregressive prior uses `guidance_scale`, `temperature` and `num_candidates`."""

    sampler: SamplerName = "ddpm"
    """Sampler of the diffusion prior; self-conditioning needs one that calls the denoiser once per step."""
    num_steps: int = 64
    """Sampling steps of the diffusion prior."""
    temperature: float = 1.0
    """Divisor of the autoregressive prior's logits; 0 takes the most likely values."""
    num_candidates: int = 2
    """Image embeddings sampled per caption, of which the best is kept. Source: Ramesh et al. 2022, section 2.2."""
    best_by: CandidateScore = added("dot_product")
    """Score of a candidate: its dot product with the text embedding, as in the paper, or their cosine, which does not favour
    long embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        require(1 <= self.num_candidates <= 1024, "num_candidates", self.num_candidates, "1 to 1024")


DEFAULT_PRIOR_SAMPLING = PriorSampling()

DALLE2_PRIOR = PriorConfig(width=2048, depth=24, num_heads=32, normalization="scale")
"""Ramesh et al. 2022, Table 3: 1.22 B parameters with a CLIP ViT-H, "1 B" in the table. The Transformer corresponds to the
table's "text encoder": it reads CLIP's encodings, so no separate text encoder is needed."""
KARLO_PRIOR = PriorConfig(width=2048, depth=20, num_heads=32, cond_drop_prob=0.2)
"""The prior of Karlo v1 alpha, with a ViT-L-14: 1.02 B parameters."""
BASE_PRIOR = PriorConfig(width=1024, depth=16, num_heads=16)
"""205 M parameters with a ViT-L-14."""
SMALL_PRIOR = PriorConfig(width=512, depth=12, num_heads=8)
"""39 M parameters with a ViT-L-14."""


class TextPrefix(EmptyCaption):
    """First tokens of a prior's input: the text encodings, unless they are left out, then the CLIP text embedding."""

    def __init__(
        self,
        width: int,
        embedding_dim: int,
        text_width: int,
        text_length: int,
        text_norm: TextNorm,
        text_encodings: bool = True,
    ) -> None:
        super().__init__(text_length, text_width, embedding_dim)
        self.text_norm = text_norm
        self.num_tokens = (text_length if text_encodings else 0) + 1
        self.from_text_encodings = nn.Linear(text_width, width) if text_encodings else None
        self.norm = nn.LayerNorm(embedding_dim) if text_norm == "layer" else nn.Identity()
        self.from_text_embedding = nn.Linear(embedding_dim, width)

    def forward(
        self, text_encodings: Tensor, text_mask: Tensor, text_embedding: Tensor, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Args:
            text_encodings: [B, L, W].
            text_mask: [B, L] bool, True = keep.
            text_embedding: [B, E], CLIP's text projection; of any norm if text_norm is "unit".
            drop: [B] bool, True = replace by the empty caption.

        Returns:
            Tokens [B, L + 1, D], and a mask [B, L + 1] that is False at padding; L is 0 without text encodings.
        """
        if drop is not None:
            text = CaptionFeatures(text_encodings, text_mask, text_embedding)
            text_encodings, text_mask, text_embedding = self.without(text, drop)
        if self.text_norm == "unit":
            text_embedding = F.normalize(text_embedding, dim=-1)
        pooled = self.from_text_embedding(self.norm(text_embedding))[:, None]  # [B, 1, D]
        if self.from_text_encodings is None:
            return pooled, text_mask.new_ones(len(text_mask), 1)
        tokens = torch.cat([self.from_text_encodings(text_encodings), pooled], dim=1)  # [B, L + 1, D]
        return tokens, torch.cat([text_mask, text_mask.new_ones(len(text_mask), 1)], dim=1)

    def kept_tokens(self, text_mask: Tensor, drop: Tensor, length: int) -> Tensor:
        """`layers.kept_tokens` of sequences of `length` that start with captions; where drop [B] is True, with the empty one.

        Their number depends on the values of text_mask [B, L], so compute them before `forward`; the shapes inside `forward`
        then depend on no data.
        """
        text_mask = torch.where(drop[:, None], self.null_mask, text_mask)  # [B, L]
        text_mask = text_mask[:, : self.num_tokens - 1]  # [B, L] or [B, 0]
        return kept_tokens(F.pad(text_mask, (0, length - text_mask.shape[1]), value=True))


class DiffusionPrior(nn.Module):
    """Transformer that denoises CLIP image embeddings, given text."""

    def __init__(self, config: PriorConfig, embedding_dim: int, text_width: int, text_length: int) -> None:
        """Args:
        embedding_dim: E.
        text_width: W, width of the text encodings.
        text_length: L, length of the text encodings.
        """
        super().__init__()
        self.config = config
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.measured: dict[str, Tensor] = {}
        """Measurements from the end of training: `mean_squared_score` [T]."""
        self.statistics = EmbeddingStatistics.empty(embedding_dim, config.normalization)
        width = config.width
        self.text = TextPrefix(width, embedding_dim, text_width, text_length, config.text_norm, config.text_encodings)
        self.from_timestep = TimestepMLP(width, width)
        self.from_image_embedding = nn.Linear(embedding_dim, width)
        self.from_x0_estimate = nn.Linear(embedding_dim, width) if config.self_conditioning else None
        self.null_image_embedding = nn.Parameter(torch.zeros(embedding_dim)) if config.image_drop_prob else None
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        num_tokens = self.text.num_tokens + (4 if config.self_conditioning else 3)
        self.positions = nn.Parameter(torch.randn(num_tokens, width) * 0.01)
        self.transformer = CausalTransformer(width, config.depth, config.num_heads, config.norm_in)
        self.to_image_embedding = nn.Linear(width, embedding_dim)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        text_encodings: Tensor,
        text_mask: Tensor,
        text_embedding: Tensor,
        drop: Tensor | None = None,
        x0_estimate: Tensor | None = None,
        kept: Tensor | None = None,
        image_drop: Tensor | None = None,
    ) -> Tensor:
        """Predict the clean, normalised image embedding, or another quantity set by `config.diffusion`.

        Args:
            x_t: [B, E] noised, normalised image embedding.
            t: [B] int64.
            text_encodings: [B, L, W].
            text_mask: [B, L] bool, True = keep.
            text_embedding: [B, E], CLIP's text projection before normalisation to unit norm.
            drop: [B] bool, True = drop the text.
            x0_estimate: [B, E] of the previous step, zeros if there is none; only for self-conditioning.
            kept: [N] int64, from `kept_tokens` for the same captions and `drop`; gives the same result faster.
            image_drop: [B] bool, True = replace x_t by the learned null embedding; only with `image_drop_prob`.

        Returns:
            [B, E].
        """
        prefix, keep = self.text(text_encodings, text_mask, text_embedding, drop)  # [B, L + 1, D], [B, L + 1]
        suffix = self._suffix(x_t, t, x0_estimate, image_drop)  # [B, S, D]
        x = torch.cat([prefix, suffix], dim=1) + self.positions  # [B, L + 1 + S, D]
        keep = F.pad(keep, (0, suffix.shape[1]), value=True)  # [B, L + 1 + S]
        x = self.transformer(x, keep, num_outputs=1, kept=kept)  # [B, 1, D]
        return self._prediction(x)

    def _prediction(self, x: Tensor) -> Tensor:
        """Prediction [B, E] from the Transformer's outputs [B, 1, D] at the query."""
        prediction: Tensor = self.to_image_embedding(x[:, -1])  # [B, E]
        return self.statistics.with_norm(prediction) if self.config.clamp_norm else prediction

    def _suffix(self, x_t: Tensor, t: Tensor, x0_estimate: Tensor | None, image_drop: Tensor | None) -> Tensor:
        """Tokens after the text: timestep, noised image embedding, x0 estimate if used, query."""
        if image_drop is not None and self.null_image_embedding is not None:
            x_t = torch.where(image_drop[:, None], self.null_image_embedding, x_t)  # [B, E]
        tokens = [self.from_timestep(t), self.from_image_embedding(x_t)]  # [B, D] each
        if self.from_x0_estimate is not None:
            tokens.append(self.from_x0_estimate(torch.zeros_like(x_t) if x0_estimate is None else x0_estimate))
        tokens.append(self.query.to(tokens[0].dtype).expand_as(tokens[0]))
        return torch.stack(tokens, dim=1)  # [B, S, D]

    def estimate_x0(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """x0 [B, E] implied by a prediction, clamped to `clip_range`; input of the next step for self-conditioning."""
        x0 = self.diffusion.predict_x0(x_t, t, prediction)
        limit = self.config.clip_range
        return x0 if limit is None else x0.clamp(-limit, limit)

    def predictor(
        self,
        text_encodings: Tensor,
        text_mask: Tensor,
        text_embedding: Tensor,
        drop: Tensor | None = None,
        image_drop: Tensor | None = None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Function (x_t [B, E], t [B]) -> prediction [B, E], equal to `forward` but faster, for one sampling run.

        No text token attends to a later token, so the text is processed once. With self-conditioning, each call reads the x0
        of the previous call.
        """
        caches: list[KeyValueCache] = []
        keep, previous = text_mask, None

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            nonlocal caches, keep, previous
            length = self.text.num_tokens
            if not caches:
                prefix, keep = self.text(text_encodings, text_mask, text_embedding, drop)  # [B, L + 1, D], [B, L + 1]
                caches = self.transformer.new_caches(len(self.positions))
                self.transformer(prefix + self.positions[:length], keep, caches)
                keep = F.pad(keep, (0, len(self.positions) - length), value=True)  # [B, L + 1 + S]
            for cache in caches:
                cache.length = length
            suffix = self._suffix(x_t, t, previous, image_drop) + self.positions[length:]  # [B, S, D]
            prediction = self._prediction(self.transformer(suffix, keep, caches, num_outputs=1))  # [B, E]
            if self.config.self_conditioning:
                previous = self.estimate_x0(x_t, t, prediction)
            return prediction

        return predict

    @torch.no_grad()
    def denoiser(
        self,
        text_encodings: Tensor,
        text_mask: Tensor,
        text_embedding: Tensor,
        settings: DiffusionSampling = DEFAULT_PRIOR_SAMPLING,
        negative: CaptionFeatures | None = None,
    ) -> Denoiser:
        """Guided denoiser of normalised image embeddings, conditioned on one caption per sample, for one sampling run.

        Args:
            negative: captions to guide away from; None for the empty caption.
        """
        text = CaptionFeatures(text_encodings, text_mask, text_embedding)

        def branch(caption: CaptionFeatures, dropped: bool, image_dropped: bool = False) -> Denoiser:
            drop, image_drop = (text_mask.new_full((len(text_mask),), flag) for flag in (dropped, image_dropped))
            return self.diffusion.denoiser(self.predictor(*caption, drop, image_drop))

        null = branch(text, True, True) if negative is None else branch(negative, False, True)
        # x0 is clamped after guidance, because guidance is what pushes it out of range
        denoise = sampling.guided(self.diffusion, branch(text, False), null, settings, self.config.clip_range)
        return self._with_norm(denoise) if self.config.clamp_norm else denoise

    def _with_norm(self, denoise: Denoiser) -> Denoiser:
        def scaled(x_t: Tensor, t: Tensor) -> Denoised:
            denoised = denoise(x_t, t)
            return denoised._replace(x0=self.statistics.with_norm(denoised.x0))

        return scaled

    @torch.no_grad()
    def sample(
        self,
        text_encodings: Tensor,
        text_mask: Tensor,
        text_embedding: Tensor,
        settings: PriorSampling = DEFAULT_PRIOR_SAMPLING,
        *,
        negative: CaptionFeatures | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample image embeddings; of `num_candidates`, keep the one nearest to the text embedding.

        Args:
            text_encodings: [B, L, W].
            text_mask: [B, L] bool, True = keep.
            text_embedding: [B, E], CLIP's text projection before normalisation to unit norm.
            negative: captions to guide away from; None for the empty caption.

        Returns:
            [B, E] float32, in CLIP's scale.

        Source: Ramesh et al. 2022, section 2.2 (two candidates).
        """
        num_candidates = settings.num_candidates
        text = repeat_captions(CaptionFeatures(text_encodings, text_mask, text_embedding), num_candidates)
        others = None if negative is None else repeat_captions(negative, num_candidates)
        denoise = self.denoiser(*text, settings, others)
        noise = torch.randn(
            len(text_mask) * num_candidates, len(self.statistics.mean), generator=generator, device=text_mask.device
        )
        samples = sampling.sample(
            self.diffusion,
            denoise,
            noise,
            settings,
            mean_squared_score=self.measured.get("mean_squared_score"),
            generator=generator,
        )
        sampled = self.statistics.denormalize(samples)
        return best_candidate(sampled.view(len(text_mask), num_candidates, -1), text_embedding, settings.best_by)


def repeat_captions(text: CaptionFeatures, num: int) -> CaptionFeatures:
    """Repeat each caption `num` times in a row."""
    return CaptionFeatures(*(each.repeat_interleave(num, dim=0) for each in text))


def best_candidate(image_embedding: Tensor, text_embedding: Tensor, best_by: CandidateScore = "dot_product") -> Tensor:
    """Select from image embeddings [B, N, E] those [B, E] with the best score for text embeddings [B, E], of any norm.

    Source: Ramesh et al. 2022, section 2.2.
    """
    if best_by == "cosine":
        similarity = F.cosine_similarity(image_embedding, text_embedding[:, None], dim=2)  # [B, N]
    else:
        similarity = (image_embedding * text_embedding[:, None]).sum(dim=2)  # [B, N]
    best = similarity.argmax(dim=1)  # [B]
    return image_embedding[torch.arange(len(best), device=best.device), best]
