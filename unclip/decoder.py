"""The decoder: P(picture | image embedding), at the base resolution.

Source: Ramesh et al. 2022, section 2.1. An ADM U-Net that sees the CLIP image embedding twice: projected and added to the
timestep embedding, and projected to four extra context tokens that every attention layer reads.

Letters: B batch, E CLIP embedding width, S side of the picture, X context width, D time-embedding width.
"""

import dataclasses

import torch
from torch import Tensor, nn

from unclip import guidance, samplers
from unclip.config import require
from unclip.diffusion import Denoiser, DiffusionConfig, GaussianDiffusion
from unclip.embeddings import EmbeddingStatistics
from unclip.unet import UNet, UNetConfig

NUM_IMAGE_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    unet: UNetConfig = UNetConfig(attention_resolutions=(32, 16, 8))
    """The network."""
    context_dim: int = 512
    """Width of the context tokens."""
    cond_drop_prob: float = 0.1
    """Probability of dropping the image embedding during training, for classifier-free guidance."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""

    def __post_init__(self) -> None:
        require(0 <= self.cond_drop_prob < 1, "cond_drop_prob", self.cond_drop_prob, "a probability below 1")
        require(bool(self.unet.attention_resolutions), "unet.attention_resolutions", (), "at least one side")


class Decoder(nn.Module):
    """CLIP image embeddings in, small pictures out."""

    def __init__(self, config: DecoderConfig, embedding_dim: int) -> None:
        super().__init__()
        self.config = config
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.statistics = EmbeddingStatistics.empty(embedding_dim)
        self.unet = UNet(config.unet, in_channels=3, out_channels=3, context_dim=config.context_dim)
        self.to_time = nn.Linear(embedding_dim, config.unet.time_dim)
        self.to_tokens = nn.Linear(embedding_dim, NUM_IMAGE_TOKENS * config.context_dim)
        self.null_embedding = nn.Parameter(torch.zeros(embedding_dim))

    def forward(self, x_t: Tensor, t: Tensor, image_embedding: Tensor, drop: Tensor | None = None) -> Tensor:
        """Predict eps, x0 or v, as configured.

        Args:
            x_t: [B, 3, S, S].
            t: [B] int64.
            image_embedding: [B, E] as CLIP gives it.
            drop: [B] bool, True = without the image embedding, on both of its paths.

        Returns:
            [B, 3, S, S].
        """
        embedding = self.statistics.normalize(image_embedding)  # [B, E]
        if drop is not None:
            embedding = torch.where(drop[:, None], self.null_embedding, embedding)
        tokens = self.to_tokens(embedding).unflatten(1, (NUM_IMAGE_TOKENS, -1))  # [B, 4, X]
        return self.unet(x_t, t, self.to_time(embedding), tokens)  # type: ignore[no-any-return]

    def denoiser(self, image_embedding: Tensor, guidance_scale: float = 1.0) -> Denoiser:
        """A guided denoiser of pictures in [-1, 1], conditioned on one image embedding per sample."""

        def predict(dropped: bool) -> Denoiser:
            drop = torch.full(image_embedding.shape[:1], dropped, device=image_embedding.device)
            return self.diffusion.denoiser(lambda x_t, t: self(x_t, t, image_embedding, drop))

        guided = guidance.classifier_free(predict(False), predict(True), guidance_scale)
        return guidance.clamped(guided, 1.0)

    @torch.no_grad()
    def sample(
        self,
        image_embedding: Tensor,
        *,
        num_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw pictures [B, 3, S, S] in [-1, 1] by DDIM."""
        side = self.config.unet.image_size
        noise = torch.randn(len(image_embedding), 3, side, side, generator=generator, device=image_embedding.device)
        return samplers.ddim(self.diffusion, self.denoiser(image_embedding, guidance_scale), noise, num_steps)
